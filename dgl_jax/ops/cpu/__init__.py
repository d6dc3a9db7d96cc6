"""Formulations that are fast on a CPU, chosen by the files of `dgl_jax.ops` and used by nobody else."""
