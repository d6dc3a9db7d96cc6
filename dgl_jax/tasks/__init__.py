"""Tasks: preprocessing on the device, metrics and the ensemble rule for a kind of examples."""

from dgl_jax.config.registry import TASKS
from dgl_jax.tasks.base import Task, TaskInputs, TaskKind
from dgl_jax.tasks.image_classification import ImageClassification

register_task = TASKS.register

__all__ = [
    "TASKS",
    "ImageClassification",
    "Task",
    "TaskInputs",
    "TaskKind",
    "register_task",
]
