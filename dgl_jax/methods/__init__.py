"""Training rules: what one turn of a module computes."""
