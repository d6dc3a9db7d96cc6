"""One file an experiment, each a lab page; `bases` holds what several share. Shipped as `dgl_jax.configs`."""
