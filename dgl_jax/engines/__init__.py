"""Engines decide which module works when, and where; a new one is one new file and one line in experiment.py."""

from dgl_jax.engines.engine import Engine, EngineState, Recipe, Report, Traffic, counts, updates_of
from dgl_jax.engines.fused import FusedEngine, fused_step
from dgl_jax.engines.pipeline import PipelineEngine
from dgl_jax.engines.rings import ring_forms
from dgl_jax.engines.simulated import SimulatedEngine
from dgl_jax.engines.threads import ThreadsEngine

__all__ = [
    "Engine",
    "EngineState",
    "FusedEngine",
    "PipelineEngine",
    "Recipe",
    "Report",
    "SimulatedEngine",
    "ThreadsEngine",
    "Traffic",
    "counts",
    "fused_step",
    "ring_forms",
    "updates_of",
]
