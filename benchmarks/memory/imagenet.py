"""Memory of the ImageNet networks at 224 pixels and 1000 classes, and the largest batch that fits.

Memory is measured at two batch sizes; a line through both predicts the largest batch for a device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import jax
from measure import Compiled, holdings, measure, pipeline_peak

from dgl_jax.run.build import DatasetInfo, choose_cuts, make_engine, make_spec
from dgl_jax.run.parts import make_blocks
from dgl_jax.types import Batch, Inbox, Message, nbytes

DEVICE = 16 * 2**30  # bytes of the accelerators that the paper used
SIZE, CLASSES = 224, 1000
# The cuts of the papers, ResNet-152 in four modules by count, and ResNet-152 in two modules cut
# behind its second stage, where half of the activations are on either side.
SPLITS = {"resnet152": ["0,26", "0,13,26,39", "0,12"], "vgg19": ["0,8", "0,4,8,12"]}


@dataclass(frozen=True)
class Line:
    """Bytes as a linear function of the batch size."""

    fixed: float
    per_image: float

    @classmethod
    def through(cls, sizes: tuple[int, int], measured: tuple[int, int]) -> "Line":
        """Returns the line through the bytes measured at two batch sizes."""
        slope = (measured[1] - measured[0]) / (sizes[1] - sizes[0])
        return cls(measured[0] - slope * sizes[0], slope)

    def fits(self) -> float:
        """Returns the largest batch that fits the device, as a real number."""
        return (DEVICE - self.fixed) / self.per_image


def programs(network: str, split: str, batch_size: int) -> list[Compiled]:
    """Compiles the pipeline's programs, or that of back-propagation if `split` is empty."""
    settings = harness.settings(
        data__name="synthetic",
        data__batch_size=batch_size,
        model__name=network,
        model__modules=split.count(",") + 1,
        model__split=split or "count",
        model__head="mlp_sr",
        engine__name="pipeline" if split else "fused",
        method__name="dgl" if split else "backprop",
    )
    info = DatasetInfo(
        "made up", tuple(map(str, range(CLASSES))), (SIZE, SIZE, 3), (0.5,) * 3, (0.25,) * 3
    )
    spec = make_spec(settings, info, choose_cuts(settings, make_blocks(settings, info)))
    engine: Any = make_engine(settings, spec, jax.devices()[:1], 1)
    context, states = spec.context(0), spec.abstract_states()
    images: Any = jax.ShapeDtypeStruct((batch_size, SIZE, SIZE, 3), "uint8")
    step: Any = jax.ShapeDtypeStruct((), "int32")
    batch = Batch(images, context, step)
    if not split:
        return [measure(harness.step(engine), states, batch)]
    compiled = []
    for k, (program, state) in enumerate(zip(harness.programs(engine), states, strict=True)):
        incoming = Message(spec.hops[k - 1].payload) if k else batch
        compiled.append(measure(program, state, Inbox(incoming), context))
        compiled[k].message = nbytes((spec.hops[k].payload, context)) if k < len(spec.hops) else 0
    return compiled


def alone(compiled: list[Compiled]) -> list[int]:
    """Computes the bytes of each module alone on a device, with state and incoming message."""
    entrances = [0, *(program.message for program in compiled[:-1])]
    return [
        program.state + program.temporary + program.added + message
        for program, message in zip(compiled, entrances)
    ]


def together(compiled: list[Compiled]) -> list[int]:
    """Computes the bytes of all modules on one device, while module k runs, for every k."""
    states = sum(program.state for program in compiled)
    turns = {k: [(k, hops)] for k, hops in holdings(len(compiled))}
    return [states + pipeline_peak(compiled, turns[k]) for k in range(len(compiled))]


def lines(
    sizes: tuple[int, int],
    bytes_of: Callable[[list[Compiled]], list[int]],
    compiled: list[list[Compiled]],
) -> list[Line]:
    """Fits one line per entry of `bytes_of`, because the largest entry may depend on the size."""
    return [Line.through(sizes, pair) for pair in zip(*map(bytes_of, compiled), strict=True)]


def compare(network: str, sizes: tuple[int, int]) -> dict[str, Any]:
    """Compares every cut of one network with back-propagation and prints the table."""
    base = [programs(network, "", size) for size in sizes]
    (backprop,) = lines(sizes, alone, base)
    print(
        f"{network}, {SIZE} pixels, batch {sizes[1]}: "
        f"back-propagation {alone(base[1])[0] / 2**30:.2f} GiB,",
        end=" ",
    )
    print(f"{backprop.fits():.0f} images in {DEVICE / 2**30:.0f} GiB", flush=True)
    header = [
        "K",
        "cut",
        "GiB per module",
        "images per module",
        "more images, a device per module",
        "all on one device, GiB",
        "more images, one device",
    ]
    rows, results = [], []
    for split in SPLITS[network]:
        compiled = [programs(network, split, size) for size in sizes]
        each = [line.fits() for line in lines(sizes, alone, compiled)]
        one = min(line.fits() for line in lines(sizes, together, compiled))
        more = {
            "device_a_module": min(each) / backprop.fits() - 1,
            "one_device": one / backprop.fits() - 1,
        }
        results.append(
            {
                "split": split,
                "one_device_bytes": [max(together(at_size)) for at_size in compiled],
                "module_bytes": [alone(at_size) for at_size in compiled],
                "images": {
                    "modules": [round(images, 1) for images in each],
                    "one_device": round(one, 1),
                },
                "more_images": {name: round(value, 4) for name, value in more.items()},
                "programs": [[vars(program) for program in at_size] for at_size in compiled],
            }
        )
        gib = " ".join(f"{b / 2**30:.2f}" for b in alone(compiled[1]))
        fit = " ".join(f"{images:.0f}" for images in each)
        cells = [
            gib,
            fit,
            f"{more['device_a_module']:+.0%}",
            f"{max(together(compiled[1])) / 2**30:.2f}",
            f"{more['one_device']:+.0%}",
        ]
        rows.append([len(each), f"`{split}`", *cells])
    harness.table(header, rows)
    return {
        "environment": harness.environment(),
        "batch_sizes": list(sizes),
        "backprop_bytes": [alone(at_size)[0] for at_size in base],
        "backprop_images": round(backprop.fits(), 1),
        "backprop_programs": [vars(at_size[0]) for at_size in base],
        "splits": results,
    }
