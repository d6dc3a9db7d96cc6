"""Objectives: local losses that modules minimize, each one a Flax module."""

from dgl_jax.config.registry import OBJECTIVES
from dgl_jax.objectives.auglocal import AugLocal
from dgl_jax.objectives.base import (
    Context,
    Exchange,
    LocalLoss,
    Objective,
    ObjectiveInputs,
    ObjectiveKind,
    means,
)
from dgl_jax.objectives.classifier import Classifier, accuracy, classification, cross_entropy
from dgl_jax.objectives.info_pro import InfoPro
from dgl_jax.objectives.pred_sim import PredSim
from dgl_jax.objectives.transport import RESIDUAL, Transport

register_objective = OBJECTIVES.register

__all__ = [
    "OBJECTIVES",
    "RESIDUAL",
    "AugLocal",
    "Classifier",
    "Context",
    "Exchange",
    "InfoPro",
    "LocalLoss",
    "Objective",
    "ObjectiveInputs",
    "ObjectiveKind",
    "PredSim",
    "Transport",
    "accuracy",
    "classification",
    "cross_entropy",
    "means",
    "register_objective",
]
