"""Parts of a run that follow from its settings alone: task, network, objectives, adapters."""

from collections.abc import Sequence
from functools import cache

import jax
from flax import linen as nn

from dgl_jax.config import DataSettings, Settings
from dgl_jax.config.registry import ADAPTERS, DATA_SETS, METHODS, OBJECTIVES, TASKS
from dgl_jax.core import rngs
from dgl_jax.data.info import DatasetInfo
from dgl_jax.errors import UserError
from dgl_jax.models import ContextInput, Network, make_head, make_network, with_choices
from dgl_jax.objectives import RESIDUAL, Objective, ObjectiveInputs, Transport
from dgl_jax.profile.flops import Blocks
from dgl_jax.tasks import Task, TaskInputs


def known_info(settings: DataSettings) -> DatasetInfo:
    """Returns the description of a data set without reading or downloading it.

    Mean and standard deviation are unknown before the data are read: 0 and 1 stand in for them.

    Raises:
      UserError: the shapes of this data set are not known in advance.
    """
    kind, name = DATA_SETS[settings.name], settings.name
    if kind.layout is None:
        known = (other for other, kind in DATA_SETS.items() if kind.layout)
        raise UserError(
            f"config.data.name={name}: its shapes are not known before it is read; use one of "
            f"{', '.join(known)} instead, for images with config.data.image_size"
        )
    example, dtype, label, classes = kind.layout.resized(settings.image_size)
    channels = example[-1] if len(example) == 3 and dtype == "uint8" else 0
    mean, std = (0.0,) * channels, (1.0,) * channels
    names = tuple(map(str, range(classes)))
    return DatasetInfo(name, names, example, mean, std, example_dtype=dtype, label_shape=label)


def make_task(settings: Settings, info: DatasetInfo) -> Task:
    """Returns the configured task for a data set.

    Raises:
      UserError: the task does not fit the data set.
    """
    example = jax.ShapeDtypeStruct(info.example_shape, info.example_dtype)
    details = info.label_shape, len(info.class_names), info.mean, info.std, settings.data.augment
    return TASKS[settings.task.name].make(
        settings.task, TaskInputs(settings.data.name, example, *details)
    )


def make_blocks(settings: Settings, info: DatasetInfo) -> Blocks:
    """Returns the uncut network, with the objective of each module that ends at each block.

    Raises:
      UserError: there is no such network, or it does not fit the examples.
    """
    task = make_task(settings, info)
    network = make_whole(settings, info, task)
    count, blocks = settings.model.modules, len(network.blocks)

    @cache
    def made(end: int, number: int) -> Objective | None:
        return objective(settings, network, info, end, number, count)

    def nearest(number: int, end: int) -> int:
        """Returns the module that may end there whose number is closest."""
        if end == blocks:
            return count - 1
        return max(0, min(max(number, count - 1 - (blocks - end)), end - 1, count - 2))

    rows = [
        tuple(made(end, nearest(number, end)) for end in range(1, blocks + 1))
        for number in range(count)
    ]
    # Which module a block begins is not known yet: the second module stands for all later ones.
    first, *later = adapters(settings, settings.model.modules)
    return Blocks(
        network.blocks,
        tuple(rows if len({*rows}) > 1 else rows[:1]),
        task.inputs(settings.data.batch_size),
        task.label,
        (first, *[later[0] if later else None] * (len(network.blocks) - 1)),
    )


def make_whole(settings: Settings, info: DatasetInfo, task: Task) -> Network:
    """Returns the configured network, before it is cut.

    Raises:
      UserError: there is no such network, or it does not fit the examples.
    """
    model = settings.model
    return make_network(
        model.name,
        model.width,
        len(info.class_names),
        task.inputs(1).shape[1:],
        model.dtype,
        model.ops,
    )


def objective(
    settings: Settings,
    network: Network,
    info: DatasetInfo,
    end: int,
    k: int,
    modules: int,
) -> Objective | None:
    """Returns the objective of a module whose last block is `end - 1`.

    Args:
      settings: configuration of the run.
      network: the network before it is cut.
      info: description of the data set.
      end: index of the first block after the module.
      k: index of the module.
      modules: number of modules.

    Returns:
      The objective; None if the method trains without local objectives and this is not the last
      module.
    """
    model, last, classes = settings.model, end == len(network.blocks), len(info.class_names)
    if not last and not METHODS[settings.method.name].local:
        return None

    def new_head(outputs: int) -> nn.Module:
        head = make_head(model.head, outputs, model.dtype, model.ops)
        return with_choices(head, logits=model.logits, pointwise=model.pointwise)

    head = (
        with_choices(network.classifier, logits=model.logits, pointwise=model.pointwise)
        if last
        else new_head(classes)
    )
    inputs = ObjectiveInputs(
        *(k, modules, network.blocks, end, classes, head),
        dtype=model.dtype,
        label_smoothing=settings.train.label_smoothing,
        make_head=new_head,
        ops=model.ops,
        mean=info.mean,
        std=info.std,
    )
    made: Objective = OBJECTIVES[settings.objective.name].make(settings.objective, inputs)
    weight = settings.objective.transport
    return Transport(made, weight) if weight else made


def adapters(settings: Settings, modules: int) -> Sequence[nn.Module | None]:
    """Returns the input adapter of each module, or None for a module without one.

    Raises:
      UserError: the adapter needs an array that evaluation does not provide, or two adapters are
        configured.
    """
    model = settings.model
    if settings.objective.context_input:
        if model.adapter != "none":
            raise UserError(
                f"config.model.adapter={model.adapter}: config.objective.context_input is an "
                "adapter too, and a module has only one; use none, or context_input=False"
            )
        return [None, *[ContextInput(model.dtype, model.ops)] * (modules - 1)]
    made = [ADAPTERS[model.adapter].make(k, model.dtype) for k in range(modules)]
    if missing := next(
        (name for adapter in made if adapter for name in adapter.needs if name != "image"), None
    ):
        raise UserError(
            f"config.model.adapter={model.adapter}: needs {missing!r}, but evaluation provides "
            "only 'image'"
        )
    return made


def check_residuals(settings: Settings, network: Network, inputs: jax.ShapeDtypeStruct) -> None:
    """Raises UserError if a transport cost is configured and no module could add it.

    No block sows a residual, or the method trains modules without objectives. Modules without such
    a block have no transport cost.

    Args:
      settings: configuration of the run.
      network: the network before it is cut.
      inputs: shape and dtype of a batch of network inputs.
    """
    weight, method = settings.objective.transport, settings.method.name
    if not weight:
        return
    if not METHODS[method].local and settings.model.modules > 1:
        raise UserError(
            f"config.objective.transport={weight}: under config.method.name={method} only the last "
            "module has an objective to add it to; use 0"
        )
    x = inputs
    for block in network.blocks:
        variables = jax.eval_shape(
            lambda key, x, block=block: block.init(key, x, train=False), rngs.root(0), x
        )
        x, sown = jax.eval_shape(
            lambda v, x, block=block: block.apply(v, x, train=False, mutable=["intermediates"]),
            variables,
            x,
        )
        if RESIDUAL in sown.get("intermediates", {}):
            return
    raise UserError(
        f"config.objective.transport={weight}: no block of "
        f"config.model.name={settings.model.name} sows its residual; networks such as resnet20 do, "
        f'blocks of your own with self.sow("intermediates", "{RESIDUAL}", y); or use 0'
    )
