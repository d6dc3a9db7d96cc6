"""Formulations that are fast on a CPU; only the files of `dgl_jax.ops` use them."""
