"""Convolution, batch normalisation, pooling and recomputation: what networks are made of; `cpu/` holds formulations for CPUs."""
