"""Objectives: local losses that modules minimize, each one a Flax module."""

from dgl_jax.objectives.base import (
    Context,
    LocalLoss,
    Objective,
    ObjectiveInputs,
    ObjectiveKind,
    means,
)
from dgl_jax.objectives.classifier import Classifier, accuracy, classification, cross_entropy
from dgl_jax.registry import OBJECTIVES

register_objective = OBJECTIVES.register

__all__ = [
    "OBJECTIVES",
    "Classifier",
    "Context",
    "LocalLoss",
    "Objective",
    "ObjectiveInputs",
    "ObjectiveKind",
    "accuracy",
    "classification",
    "cross_entropy",
    "means",
    "register_objective",
]
