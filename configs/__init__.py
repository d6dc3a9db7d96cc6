"""Experiments of dgl_jax, one file per experiment, and sweeps of many runs in `claims`.

Each file is a lab page: command, hardware, time and expected result. Settings that several of them
share are in `bases`. The package ships them as `dgl_jax.configs`.
"""
