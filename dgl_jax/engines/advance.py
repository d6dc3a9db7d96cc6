"""Compilation of the programs of all modules in advance, at the same time.

Tracing holds the GIL, but XLA releases it while it compiles.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dgl_jax import waits
from dgl_jax.core.module import ModuleState
from dgl_jax.engines.base import module_shardings
from dgl_jax.engines.placement import Placement
from dgl_jax.engines.transfer import placed_shapes
from dgl_jax.methods.post import oldest, opened
from dgl_jax.profile.compiling import most_threads
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Context, Inbox, Message


def turn_shapes(
    spec: TrainSpec, placement: Placement, k: int, newest: bool = False
) -> tuple[ModuleState, Inbox, Context]:
    """Returns shapes, dtypes and shardings of the arguments of module k's program.

    Args:
      spec: device-independent description of the training run.
      placement: device group of each module.
      k: index of the module.
      newest: messages also carry the newest codebook.
    """
    split, everywhere = placement.split(k), placement.replicated(k)
    state: Any = spec.abstract_states()[k]
    shardings = jax.tree.broadcast(module_shardings(k, state, placement), state)
    state, mail = opened(jax.tree.map(placed_shapes, state, shardings))
    if k == 0:
        batch = placement.batch_shapes(spec.batch())
        return state, Inbox(batch, oldest(mail)), batch.context
    hop = spec.hops[k - 1]
    codebook = placed_shapes(hop.codebook, everywhere)
    message = Message(
        placed_shapes(hop.payload, split), codebook, codebook if hop.period and newest else None
    )
    return state, Inbox(message, oldest(mail)), placed_shapes(spec.context(k), split)


def compile_together(compilers: Sequence[Callable[[], object]]) -> None:
    """Calls functions that compile programs, at the same time, and waits for them.

    Some of them wait if there are many, see `profile.compiling.most_threads`.

    Raises:
      Exception: the first error.
    """
    errors: list[Exception] = []
    slots = threading.Semaphore(most_threads())

    def call(function: Callable[[], object]) -> None:
        with slots:
            try:
                function()
            except Exception as error:
                errors.append(error)

    # Daemon threads, so that a process which exits does not wait for the compiler.
    threads = [threading.Thread(target=call, args=(each,), daemon=True) for each in compilers]
    for thread in threads:
        thread.start()
    for thread in threads:
        waits.join(thread)
    if errors:
        raise errors[0]
