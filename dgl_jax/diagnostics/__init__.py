"""Diagnostics of convergence, as pure functions: distances of samples, and probes of modules."""

from dgl_jax.diagnostics.distances import (
    Distance,
    distance,
    drift,
    mmd,
    project,
    sliced_wasserstein,
    weighted_drift,
)
from dgl_jax.diagnostics.probe import Parts, Probe, probe

__all__ = [
    "Distance",
    "Parts",
    "Probe",
    "distance",
    "drift",
    "mmd",
    "probe",
    "project",
    "sliced_wasserstein",
    "weighted_drift",
]
