"""One training run: from a configuration to a workdir."""
