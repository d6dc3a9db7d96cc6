"""Everything that turns a configuration into a trained workdir: set-up, loop, files."""
