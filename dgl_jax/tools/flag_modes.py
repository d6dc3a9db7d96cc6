"""Modes of the command line to which a flag applies; flags that are not listed apply to all."""

from collections.abc import Iterable

from dgl_jax.errors import UserError

_OF_A_CHECKPOINT = ("eval", "predict", "export")
MODES: dict[str, tuple[str, ...]] = {
    "workdir": ("train", "eval", "predict", "export", "plot", "plan", "sweep", "report"),
    "checkpoint": _OF_A_CHECKPOINT,
    "init_from": ("train",),
    "heartbeat": ("train",),
    "split": ("eval",),
    "images": ("predict",),
    "output": ("predict", "export", "plan", "report"),
    **dict.fromkeys(("bench_steps", "bench_modules"), ("bench",)),
    **dict.fromkeys(("devices", "block_times", "bandwidth", "latency"), ("plan",)),
    **dict.fromkeys(("message_cost", "cores", "json"), ("plan",)),
    **dict.fromkeys(("sweep", "jobs", "estimate"), ("sweep",)),
    "config.GROUP": ("train", "eval", "plan", "bench", "sweep"),
}


def check(mode: str, given: Iterable[str]) -> None:
    """Checks that the flags on a command line apply to its mode.

    Args:
      mode: value of `--mode`.
      given: names of the flags on the command line.

    Raises:
      UserError: a flag would be ignored.
    """
    for name in given:
        override = name.startswith("config.") and name != "config.plugins"
        modes = MODES.get("config.GROUP" if override else name, (mode,))
        if mode not in modes:
            wanted = " or ".join([", ".join(modes[:-1]), modes[-1]] if modes[1:] else modes)
            raise UserError(f"--{name}: applies to --mode={wanted}, not to --mode={mode}")
