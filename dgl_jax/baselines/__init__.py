"""The alternatives that decoupled training is compared with, behind the protocol of the engines."""

from dgl_jax.baselines.backprop import backprop_step

__all__ = ["backprop_step"]
