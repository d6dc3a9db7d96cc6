"""Costs of blocks and modules: floating-point operations, time and memory."""
