"""A Vision Transformer."""
