"""Modes of the command line besides training and evaluation."""
