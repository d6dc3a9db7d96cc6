"""Sweeps that are shipped with the package; each file yields the runs of one claim."""
