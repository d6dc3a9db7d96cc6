"""Example of a user-defined network: a Vision Transformer."""
