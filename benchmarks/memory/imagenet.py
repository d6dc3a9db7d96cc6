"""The same for the networks of the ImageNet runs, 224 pixels, 1000 classes: bytes at two batch sizes, images that fit a device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import jax
from measure import Compiled, holdings, measure, pipeline_peak

from dgl_jax.run.build import DatasetInfo, choose_cuts, make_blocks, make_engine, make_spec
from dgl_jax.types import Batch, Inbox, Message, nbytes

DEVICE = 16 * 2**30  # bytes of the accelerators that the paper used
SIZE, CLASSES = 224, 1000
# The papers' cuts, ResNet-152 in four by count; and in two behind its second stage, where half of the activations are.
SPLITS = {"resnet152": ["0,26", "0,13,26,39", "0,12"], "vgg19": ["0,8", "0,4,8,12"]}


@dataclass(frozen=True)
class Line:
    """Bytes as a function of the batch size, through two measured ones."""

    fixed: float
    per_image: float

    @classmethod
    def through(cls, sizes: tuple[int, int], found: tuple[int, int]) -> "Line":
        """The line through two points."""
        slope = (found[1] - found[0]) / (sizes[1] - sizes[0])
        return cls(found[0] - slope * sizes[0], slope)

    def fits(self) -> float:
        """The largest batch, as a real number."""
        return (DEVICE - self.fixed) / self.per_image


def programs(network: str, split: str, batch_size: int) -> list[Compiled]:
    """The pipeline's programs, one a module; with an empty split the one of back-propagation."""
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
    found = []
    for k, (program, state) in enumerate(zip(harness.programs(engine), states, strict=True)):
        incoming = Message(spec.hops[k - 1].payload) if k else batch
        found.append(measure(program, state, Inbox(incoming), context))
        found[k].packet = nbytes((spec.hops[k].payload, context)) if k < len(spec.hops) else 0
    return found


def alone(found: list[Compiled]) -> list[int]:
    """Bytes of each module on a device of its own, its state and the packet at its entrance included."""
    entrances = [0, *(program.packet for program in found[:-1])]
    return [
        program.state + program.temporary + program.added + packet
        for program, packet in zip(found, entrances)
    ]


def together(found: list[Compiled]) -> list[int]:
    """Bytes of all modules on one device, while each of them works."""
    states = sum(program.state for program in found)
    turns = {k: [(k, hops)] for k, hops in holdings(len(found))}
    return [states + pipeline_peak(found, turns[k]) for k in range(len(found))]


def lines(
    sizes: tuple[int, int],
    bytes_of: Callable[[list[Compiled]], list[int]],
    found: list[list[Compiled]],
) -> list[Line]:
    """Of what `bytes_of` gives for the programs at both sizes. Which of them is the largest may change from size to size."""
    return [Line.through(sizes, pair) for pair in zip(*map(bytes_of, found), strict=True)]


def compare(network: str, sizes: tuple[int, int]) -> dict[str, Any]:
    """Back-propagation and every cut of one network; prints the table."""
    base = [programs(network, "", size) for size in sizes]
    (backprop,) = lines(sizes, alone, base)
    print(
        f"{network}, {SIZE} pixels, batch {sizes[1]}: back-propagation {alone(base[1])[0] / 2**30:.2f} GiB,",
        end=" ",
    )
    print(f"{backprop.fits():.0f} images in {DEVICE / 2**30:.0f} GiB", flush=True)
    header = [
        "K",
        "cut",
        "GiB a module",
        "images a module",
        "more a device",
        "all on one device, GiB",
        "more on one device",
    ]
    rows, results = [], []
    for split in SPLITS[network]:
        found = [programs(network, split, size) for size in sizes]
        each = [line.fits() for line in lines(sizes, alone, found)]
        one = min(line.fits() for line in lines(sizes, together, found))
        more = {
            "device_a_module": min(each) / backprop.fits() - 1,
            "one_device": one / backprop.fits() - 1,
        }
        results.append(
            {
                "split": split,
                "one_device_bytes": [max(together(of_size)) for of_size in found],
                "module_bytes": [alone(of_size) for of_size in found],
                "images": {
                    "modules": [round(images, 1) for images in each],
                    "one_device": round(one, 1),
                },
                "more_images": {name: round(value, 4) for name, value in more.items()},
                "programs": [[vars(program) for program in of_size] for of_size in found],
            }
        )
        gib = " ".join(f"{b / 2**30:.2f}" for b in alone(found[1]))
        fit = " ".join(f"{images:.0f}" for images in each)
        cells = [
            gib,
            fit,
            f"{more['device_a_module']:+.0%}",
            f"{max(together(found[1])) / 2**30:.2f}",
            f"{more['one_device']:+.0%}",
        ]
        rows.append([len(each), f"`{split}`", *cells])
    harness.table(header, rows)
    return {
        "environment": harness.environment(),
        "batch_sizes": list(sizes),
        "backprop_bytes": [alone(found)[0] for found in base],
        "backprop_images": round(backprop.fits(), 1),
        "backprop_programs": [vars(found[0]) for found in base],
        "splits": results,
    }
