"""Rows of group c in PyTorch: eager, `torch.compile`, and CUDA graphs (`reduce-overhead`).

Channels last, autocast to bf16 and fused SGD; the batches wait on the device. In these processes
JAX stays on the CPU, where it only describes the networks.
"""

import gc
import importlib.util
from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.accelerator import images
from benchmarks.accelerator.common import configured, fitting
from benchmarks.accelerator.measuring import cnn6, described, timed
from benchmarks.accelerator.rows import Figures, Job, Row, Size, Skipped
from benchmarks.interleaved import Timing, Variant
from benchmarks.interleaved import timed as clocked
from dgl_jax.run.build import Experiment, make_experiment

_WARM_UP = 5  # CUDA graphs are recorded in the third step
_BATCHES = 4
_MODES = {"eager": "", "torch.compile": "default", "CUDA graphs": "reduce-overhead"}


def rows(size: Size, networks: Mapping[str, int]) -> list[Row]:
    """Returns the rows in PyTorch.

    Args:
      size: sizes to measure at.
      networks: ImageNet networks with the rank of their eager rows.
    """
    row = partial(Row, group="c", host=True)
    result = []
    for mode, (name, compiled) in enumerate(_MODES.items()):
        later = 2 if mode else 0
        for batch, rank in zip(size.batches, (0, size.late)):
            result += [
                row(
                    f"cnn6, batch {batch}: {label}, PyTorch {name}",
                    measure=partial(_cnn6, method, batch, compiled),
                    cost=60 if mode else 15,
                    process=f"torch {name}" if mode else "torch",
                    rank=rank + later,
                )
                for method, label in (("dgl", "DGL"), ("backprop", "back-propagation"))
            ]
        for network, rank in networks.items():
            label = f"{network}, {size.side} px: back-propagation, PyTorch {name}"
            result.append(
                row(
                    label,
                    measure=partial(_deep, network, compiled),
                    cost=90 if mode else 25,
                    process=label,
                    rank=rank + later,
                )
            )
    return result


def _device(job: Job, compiled: str) -> str:
    """Returns the device for PyTorch.

    Raises:
      Skipped: PyTorch is missing, or has no such device.
    """
    if importlib.util.find_spec("torch") is None:
        raise Skipped("PyTorch is not installed")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and job.platform not in ("cpu", ""):
        raise Skipped(f"PyTorch {torch.__version__} finds no device besides the CPU")
    if device == "cpu" and compiled == "reduce-overhead":
        raise Skipped("CUDA graphs need a CUDA device")
    torch.backends.cudnn.benchmark = True  # tries algorithms of convolutions, as XLA does
    if compiled:
        # Otherwise the modules of earlier rows count towards a limit, past which nothing is
        # compiled, and their shapes make sizes dynamic.
        torch._dynamo.reset()
    return device


def _variant(training: Any, experiment: Experiment, device: str) -> Variant:
    """Returns a variant that trains on batches of the experiment's source."""
    import torch

    stored = zip(range(_BATCHES), experiment.source.batches(0))
    batches = [
        [torch.as_tensor(x, device=device) for x in (batch.inputs, batch.context["label"])]
        for _, batch in stored
    ]
    batches = [(images, labels.long()) for images, labels in batches]

    def run(steps: int) -> Timing:
        def work() -> list[float]:
            for step in range(steps):
                losses = training.step(*batches[step % _BATCHES])
            return [float(loss) for loss in losses]

        return clocked(work, steps * experiment.spec.batch_size)

    run(_WARM_UP)
    return run


def _measured(
    job: Job, training: Any, experiment: Experiment, device: str, compiled: str
) -> Figures:
    import torch

    run = _variant(training, experiment, device)
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # what earlier rows of this process have reserved
        torch.cuda.reset_peak_memory_stats()
    figures = timed(job.size, {"baseline": run}, experiment.spec.batch_size)
    most = torch.cuda.max_memory_allocated
    if compiled == "reduce-overhead":  # replayed CUDA graphs allocate nothing, but keep their pool
        most = torch.cuda.max_memory_reserved
    peak = most() if device == "cuda" else "unknown"
    return figures | {"peak_memory_bytes": peak}


def _about(method: str, compiled: str) -> Figures:
    import torch

    library = f"PyTorch {torch.__version__}"
    return {"library": library, "method": method, "engine": "", "compiled": compiled}


def _cnn6(method: str, batch: int, compiled: str, job: Job) -> Figures:
    device = _device(job, compiled)
    import torch

    from benchmarks.cpu_reference.torch_dgl import counterpart

    fields: dict[str, Any] = {} if method == "dgl" else {"model.modules": 1}
    # The network in PyTorch always has these heads.
    fields["model.head"] = "mlp_sr"
    experiment = make_experiment(configured(dict(cnn6(job.size, batch)) | fields))
    network = counterpart(
        experiment, "channels_last", device=device, dtype=torch.bfloat16, compiled=compiled
    )
    about = described(experiment) | _about(method, compiled)
    return about | _measured(job, network, experiment, device, compiled)


def _deep(network: str, compiled: str, job: Job) -> Figures:
    device = _device(job, compiled)
    import torch

    from benchmarks.accelerator.torch_resnet import Training, resnet

    def attempt(batch: int) -> Figures:
        fields = images.fields(images.LARGE, job.size, batch) | {
            "model.name": network,
            "model.width": job.size.deep_width,
            "model.modules": 1,
            "model.dtype": "bfloat16",
        }
        experiment = make_experiment(configured(fields))
        classes = len(experiment.info.class_names)
        training = Training(
            resnet(network, job.size.deep_width, classes), device, torch.bfloat16, compiled
        )
        about = described(experiment) | _about("backprop", compiled)
        return about | _measured(job, training, experiment, device, compiled)

    return fitting(job.size.deep_batch, attempt)
