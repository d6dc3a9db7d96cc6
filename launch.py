"""The command line; see `dgl_jax/cli.py`."""

from dgl_jax.cli import main

if __name__ == "__main__":
    main()
