"""Experiments of dgl_jax, one file per experiment; `bases` holds what several of them share.

Each file is a lab page: command, hardware, time and expected result. The package ships them as
`dgl_jax.configs`.
"""
