"""Engines decide which module works when, and where; a new one is one new file and one line in experiment.py."""

from dgl_jax.engines.asynchronous import ring_forms
from dgl_jax.engines.base import Engine, EngineState, Report, counts, updates_of
from dgl_jax.engines.fused import FusedEngine
from dgl_jax.engines.pipeline import PipelineEngine
from dgl_jax.engines.simulated import SimulatedEngine
from dgl_jax.engines.threads import ThreadsEngine
from dgl_jax.methods.dgl import fused_step
from dgl_jax.spec import Traffic, TrainSpec

__all__ = [
    "Engine",
    "EngineState",
    "FusedEngine",
    "PipelineEngine",
    "Report",
    "SimulatedEngine",
    "ThreadsEngine",
    "Traffic",
    "TrainSpec",
    "counts",
    "fused_step",
    "ring_forms",
    "updates_of",
]
