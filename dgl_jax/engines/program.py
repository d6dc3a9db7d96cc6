"""Jitted programs of modules, cached so that equal programs are compiled once."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from dgl_jax.core.program_cache import cached_program
from dgl_jax.engines.placement import Placement
from dgl_jax.engines.transfer import placed_shapes
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Message, Outbox

_LOG = logging.getLogger(__name__)

# Commands that XLA records into CUDA graphs. Its default lacks the last three, and each of them
# would end one graph and begin another. Collectives are left out.
COMMANDS = (
    "FUSION",
    "CUBLAS",
    "CUBLASLT",
    "CUDNN",
    "CUSTOM_CALL",
    "DYNAMIC_SLICE_FUSION",
    "CONVOLUTION",
    "CONDITIONAL",
    "WHILE",
)
GRAPH_PLATFORMS = ("gpu", "cuda")

CompilerOptions = tuple[tuple[str, str | int], ...]


class Programs(dict[Any, Any]):
    """Dict of programs by turn, which builds each program when it is first looked up.

    Attributes:
      built: number of programs that all objects of this class have built.
    """

    built = 0

    def __init__(self, make: Callable[[Any], Any]):
        super().__init__()
        self._make = make

    def __missing__(self, turn: Any) -> Any:
        program = self[turn] = self._make(turn)
        Programs.built += 1
        return program


def command_buffers(device: jax.Device) -> CompilerOptions:
    """Returns the compiler options that record a whole program into as few CUDA graphs as possible.

    Versions of XLA differ in the commands that they can record. Those unknown to the installed one
    are left out; if a small program does not run with the options, there are none, with a log line.
    """
    if device.platform not in GRAPH_PLATFORMS:
        _LOG.info(
            "config.engine.command_buffers: has no effect on %s, only on GPUs", device.platform
        )
        return ()
    commands = list(COMMANDS)
    while True:
        options: CompilerOptions = (
            ("xla_gpu_enable_command_buffer", ",".join(commands)),
            ("xla_gpu_graph_min_graph_size", 1),
        )
        try:
            x = jax.device_put(jnp.ones((2, 8, 8, 8)), device)
            jax.block_until_ready(jax.jit(_trial, compiler_options=dict(options))(x))
            return options
        except jax.errors.JaxRuntimeError as error:
            refused = next((name for name in commands if f"'{name}'" in str(error)), None)
            if refused is None:
                reason = str(error).partition("\n")[0]
                _LOG.warning("config.engine.command_buffers: compiling without them: %s", reason)
                return ()
            _LOG.info("config.engine.command_buffers: this XLA cannot record %s", refused)
            commands.remove(refused)


def _trial(x: jax.Array) -> jax.Array:
    """Convolves, multiplies and adds, so that the first capture of each can fail here."""
    y = lax.conv_general_dilated(x, x, (1, 1), "SAME", dimension_numbers=("NHWC", "OHWI", "NHWC"))
    return y.sum((1, 2)).T @ y.sum((1, 2)) + 1


def on_group(program: Callable[..., Any], group: Mesh | None) -> Callable[..., Any]:
    """Makes a group of several devices known to a program while JAX traces it.

    A codec uses it to give every device what all of them compute (`codecs.draws.draw`).

    Args:
      program: function that runs on all devices of the group.
      group: devices of the program; None, or one device, changes nothing.
    """
    if group is None or group.size == 1:
        return program

    def traced(*arguments: Any) -> Any:
        if not jax.sharding.get_abstract_mesh().empty:  # the caller works with another mesh
            return program(*arguments)
        with jax.sharding.use_abstract_mesh(group.abstract_mesh):
            return program(*arguments)

    return traced


@cached_program(256)
def jitted(spec: TrainSpec, k: int, placement: Placement, kind: str = "step") -> Any:
    """Returns the jitted program that a turn of module k runs on its devices; it donates the state.

    Args:
      spec: device-independent description of the training run.
      k: index of the module.
      placement: device group of each module.
      kind: kind of the turn, such as "step" or "backward".
    """
    return jax.jit(
        on_group(spec.method.program(spec, k, kind), placement.groups[k]),
        donate_argnums=0,
        out_shardings=_output_shardings(spec, k, placement, kind),
    )


@cached_program(256)
def elsewhere(spec: TrainSpec, k: int, placement: Placement, kind: str = "step") -> Any:
    """Returns a stand-in for the program of a module whose devices belong to other processes.

    It has the arguments of `jitted`. It runs nothing and returns the state as it was, the shapes of
    the outbox with their shardings, and no metrics.
    """
    program, shardings = spec.method.program(spec, k, kind), placement.message(k)
    outbox: list[Outbox] = []

    def stand_in(state: Any, inbox: Any, context: Any) -> tuple[Any, Outbox, dict[str, Any]]:
        if not outbox:
            with jax.transfer_guard("allow"):
                _, sent, _ = jax.eval_shape(program, state, inbox, context)
            parts = (None if m is None else placed_message(m, shardings) for m in sent)
            outbox.append(Outbox(*parts))
        return state, outbox[0], {}

    return stand_in


def placed_message(message: Message, shardings: Message) -> Message:
    """Returns the shapes and dtypes of a message with their shardings."""
    return Message(*map(placed_shapes, message, shardings))


@cached_program(256)
def jitted_feed(spec: TrainSpec, k: int, train: bool, placement: Placement) -> Any:
    """Returns the jitted forward-only program of module k, for turns after its last update.

    Args:
      spec: device-independent description of the training run.
      k: index of the module.
      train: if true, batch norm normalizes with batch statistics, otherwise with the running ones.
      placement: device group of each module.
    """
    return jax.jit(spec.method.feed(spec, k, train), out_shardings=placement.message(k))


def _output_shardings(
    spec: TrainSpec, k: int, placement: Placement, kind: str = "step"
) -> tuple[Any, Any, Any]:
    """Returns the shardings of the state, the outbox and the metrics of a turn of module k."""
    _, sends = spec.method.ports(spec, k, kind)
    outbox = Outbox(*(None if sent is None else placement.message(k) for sent in sends))
    return placement.replicated(k), outbox, placement.replicated(k)
