"""Sweeps that test the claims of the papers, at a small and at a full size."""
