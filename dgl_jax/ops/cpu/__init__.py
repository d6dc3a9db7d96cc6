"""Formulations of convolutions that are fast on a CPU; chosen in `ops/conv.py`."""
