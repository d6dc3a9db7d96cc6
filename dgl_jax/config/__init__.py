"""Configuration of a run: groups of fields, their checks, and the frozen `Settings`.

The field names are the names on the command line (`--config.optimizer.learning_rate=0.05`), and
their defaults are the defaults of every file in `configs/`. Counts of steps are updates per module;
a field that counts epochs says so in its name.
"""

from dgl_jax.config.groups import (
    CheckpointSettings,
    CodecSettings,
    DataSettings,
    DiagnosticsSettings,
    EngineSettings,
    EvalSettings,
    Group,
    LogSettings,
    MethodSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    ReplaySettings,
    ScheduleSettings,
    TaskSettings,
    TrainSettings,
)
from dgl_jax.config.settings import (
    Settings,
    check_name,
    default_config,
    differences,
    field_names,
    fields_of,
    import_plugins,
    make_settings,
    options,
    values_of,
)

__all__ = [
    "CheckpointSettings",
    "CodecSettings",
    "DataSettings",
    "DiagnosticsSettings",
    "EngineSettings",
    "EvalSettings",
    "Group",
    "LogSettings",
    "MethodSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "ReplaySettings",
    "ScheduleSettings",
    "Settings",
    "TaskSettings",
    "TrainSettings",
    "check_name",
    "default_config",
    "differences",
    "field_names",
    "fields_of",
    "import_plugins",
    "make_settings",
    "options",
    "values_of",
]
