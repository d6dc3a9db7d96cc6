"""Runs the command line defined in `dgl_jax/cli.py`."""

from dgl_jax.cli import main

if __name__ == "__main__":
    main()
