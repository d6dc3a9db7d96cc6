"""Words what JAX says when memory is used up, or when a device cannot be opened: one line with what helps."""

import re
import traceback

from dgl_jax import system

_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|(CUDA_ERROR|hipError)_?OUT_?OF_?MEMORY|CU(BLAS|DNN)_STATUS_ALLOC_FAILED", re.IGNORECASE)
_BUSY = re.compile(
    r"TPU is already in use|ALREADY_IN_USE|CUDA_ERROR_DEVICES?_UNAVAILABLE|busy or unavailable|CUDA_ERROR_OUT_OF_MEMORY"
    r"|Device or resource busy"
)
_BYTES = r"(\d+(?:\.\d+)?) ?(bytes|[KMGTPE]?i?B\b|[KMGTPE]\b)?"
_ASKED = re.compile(rf"(?:allocat\w*|reserve|request for|used) {_BYTES}", re.IGNORECASE)
_FREE = re.compile(rf"there are {_BYTES} free", re.IGNORECASE)
_LIMIT = re.compile(rf"used {_BYTES} of {_BYTES}", re.IGNORECASE)
_UNITS = "BKMGTPE"
_INSTALL = {"cuda": '"jax[cuda13]"', "gpu": '"jax[cuda13]"', "tpu": '"jax[tpu]"'}


def out_of_memory(error: BaseException) -> str | None:
    """Returns what was asked for, what is free and what helps; None where the error is of another kind."""
    text = str(error)
    if not isinstance(error, MemoryError) and not _MEMORY.search(text):
        return None
    asked, free, limit = _ASKED.search(text), _FREE.search(text), _LIMIT.search(text)
    said = [f"{_bytes(*asked.groups())} asked for"] if asked else []
    if limit:
        said.append(f"the device has {_bytes(*limit.groups()[2:])}")
    elif free:
        said.append(f"{_bytes(*free.groups())} free")
    elif isinstance(error, MemoryError):
        said += [f"{readable(host)} free on this machine"] if (host := system.free_memory()) is not None else []
    elif fullest := system.fullest_device():
        name, memory = fullest
        of = f" of {readable(memory.limit)}" if memory.limit is not None else ""
        said.append(f"{readable(memory.free or 0)}{of} free on {name}")
    return (
        f"out of memory ({', '.join(said) if asked else '; '.join([_first(text), *said])}); a smaller config.data.batch_size, "
        "a larger config.train.accumulate or config.model.remat=True needs less"
    )


def not_opened(error: BaseException) -> str | None:
    """Returns why the devices cannot be had, and what helps; None where the error is of another kind."""
    text = str(error)
    failed = re.search(r"Unable to initialize backend '(\w+)': (.*?)( \(set JAX_PLATFORMS=|$)", text, re.DOTALL)
    if not failed and not _is_unanswered(error) and not _BUSY.search(text):
        return None
    asked = _platforms()
    platform = failed[1] if failed else asked
    reason = _first(failed[2] if failed else text)
    if _BUSY.search(text):
        if not failed and "CUDA_ERROR_OUT_OF_MEMORY" in text:
            return None  # while a program runs: its own memory is used up
        return (
            f"another process holds the {platform.upper() or 'device'} ({reason}): end it or wait for it"
            + ("" if "TPU" in text else " (nvidia-smi lists it), take another with CUDA_VISIBLE_DEVICES")
            + ", or set JAX_PLATFORMS=cpu"
        )
    setting = f"JAX_PLATFORMS={asked}" if asked else f"backend {platform}"
    why = f" ({reason})" if reason else ""
    if package := next((_INSTALL[name] for name in (asked or platform).split(",") if name in _INSTALL), None):
        return (
            f"{setting}: JAX cannot open it here{why}; where the hardware is there, pip install -U {package} brings the rest; "
            "JAX_PLATFORMS=cpu does without"
        )
    return f"{setting}: JAX cannot open it here{why}; JAX_PLATFORMS=cpu, or none, takes what there is"


def readable(number: float) -> str:
    """Returns a number of bytes as text: 17179869184 as "16.0 GiB"."""
    power = 0
    while number >= 1024 and power < len(_UNITS) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.1f} {_UNITS[power]}iB" if power else f"{number:.0f} bytes"


def _bytes(number: str, unit: str | None) -> str:
    """Returns what an error message says of bytes in one form: "2.00G", "2147483648 bytes" and "2 GiB" as "2.0 GiB"."""
    power = _UNITS.find((unit or "B")[0].upper())
    return readable(float(number) * 1024**power)


def _first(text: str) -> str:
    """Returns the first line of an error message, cut."""
    return (text.strip().splitlines() or [""])[0][:200]


def _platforms() -> str:
    """Returns what JAX_PLATFORMS names."""
    import jax  # here, as this file is for errors: it may itself be what fails

    return getattr(jax.config, "jax_platforms", None) or ""


def _is_unanswered(error: BaseException) -> bool:
    """Returns whether JAX found no backend of the names it was given, which it asserts never happens."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, AssertionError) and bool(frames) and frames[-1].filename.endswith("xla_bridge.py")
