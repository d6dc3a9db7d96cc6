"""Engines: where and when the modules' turns run."""

from dgl_jax.config.registry import ENGINES
from dgl_jax.engines.asynchronous import AsynchronousOptions
from dgl_jax.engines.base import (
    Engine,
    EngineInputs,
    EngineKind,
    EngineState,
    PlacedOptions,
    Report,
    SynchronousOptions,
    counts,
)
from dgl_jax.engines.flight import ring_specs
from dgl_jax.engines.fused import FusedEngine
from dgl_jax.engines.pipeline import PipelineEngine
from dgl_jax.engines.simulated import SimulatedEngine, SimulatedOptions
from dgl_jax.engines.threads import ThreadsEngine, ThreadsOptions

register_engine = ENGINES.register

__all__ = [
    "ENGINES",
    "AsynchronousOptions",
    "Engine",
    "EngineInputs",
    "EngineKind",
    "EngineState",
    "FusedEngine",
    "PipelineEngine",
    "PlacedOptions",
    "Report",
    "SimulatedEngine",
    "SimulatedOptions",
    "SynchronousOptions",
    "ThreadsEngine",
    "ThreadsOptions",
    "counts",
    "register_engine",
    "ring_specs",
]
