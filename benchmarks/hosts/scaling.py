"""Predicted speed-up of a pipeline and of data parallelism on 8 to 1,024 devices.

python benchmarks/hosts/scaling.py [--write]

Nothing is measured: block times follow from operations at a stated rate, and links have printed
figures. `--write` writes docs/assets/scaling.png and a part of docs/distributed.md.
"""

import argparse
import dataclasses
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

from dgl_jax.models import BlockCosts
from dgl_jax.profile.flops import block_flops
from dgl_jax.profile.turn_timing import codec_costs
from dgl_jax.run.build import choose_cuts, make_spec
from dgl_jax.run.parts import known_info, make_blocks
from dgl_jax.spec import Traffic
from dgl_jax.tools.pipeline import Link, Reduction, make_pipeline, reductions

DOCS = Path(__file__).resolve().parents[2] / "docs"
NETWORKS = {"VGG-19": "vgg19", "ResNet-152": "resnet152"}
DEVICES = [8, 16, 32, 64, 128, 256, 512, 1024]
CODECS = ["identity", "int8", "vq"]
PER_HOST = 8
INSIDE = Link(450.0, 5e-6)  # NVLink
LINKS = {
    "400 Gbit/s InfiniBand": Link(50.0, 5e-6),
    "25 Gbit/s Ethernet": Link(3.125, 50e-6),
}
SUMMARY = """\
Over InfiniBand, eight modules on groups of devices keep scaling longer than data parallelism,
because a group sums the gradients of one module only: devices compute half of the time up to 512
devices for VGG-19 and 128 for ResNet-152, against 64 and 16 with `fused`. On few devices `fused`
is faster for VGG-19, whose eight modules are unequal: the slowest takes one and a half times the
mean. Codecs hardly change the speed at 50 GB/s, since messages hide behind the computation, and
the vectors from which a group learns a codebook cost at most 3 %; at 3 GB/s codecs decide, and
`vq` alone keeps the full speed, up to 64 devices. What ends the scaling are the sums inside a
group: its part of the batch shrinks with every device, the gradients and the latencies of batch
norm do not. Left out are the lower efficiency of small parts and the time in which every device
learns a codebook, which would bend curves earlier, and sums that overlap with computation, which
would bend them later.
"""
WORTH = 0.5  # a device that computes less than this share of the time is not worth its price


@dataclasses.dataclass(frozen=True)
class Network:
    """Numbers of a network from which a plan is made.

    Attributes:
      settings: configuration of the run.
      seconds: time of each module's turn on one device.
      sums: what a group of devices adds up.
      traffic: bytes that cross each hop, by codec.
      gathered: bytes of the vectors from which each module learns a codebook, by codec.
    """

    settings: Any
    seconds: list[float]
    sums: list[Reduction]
    traffic: dict[str, Traffic]
    gathered: dict[str, list[int]]


def load(name: str, args: argparse.Namespace) -> Network:
    """Cuts a network into modules with about equally many operations."""
    traffic, gathered = {}, {}
    for codec in CODECS:
        settings = harness.settings(
            data__name="imagenet",
            data__batch_size=args.batch_size,
            model__name=name,
            model__modules=args.modules,
            model__dtype="bfloat16",
            model__split="flops",
            engine__name="pipeline",
            codec__name=codec,
        )
        info = known_info(settings.data)
        network = make_blocks(settings, info)
        spec = make_spec(settings, info, choose_cuts(settings, network, _not_measured))
        traffic[codec] = spec.traffic()
        gathered[codec] = [sum(cost.gathered) for cost in codec_costs(spec, None)]
    # The backward pass takes twice as many operations as the forward pass.
    per_operation = 3.0 / (1e12 * args.teraflops)
    operations = block_flops(network)
    starts = [module.first for module in spec.modules]
    seconds = [per_operation * count for count in operations.modules(starts)]
    return Network(settings, seconds, reductions(spec), traffic, gathered)


def _not_measured() -> BlockCosts:
    raise AssertionError("a cut by operations needs no times")


def sum_seconds(sums: Reduction, devices: int, between: Link) -> float:
    """Returns the duration of a module's sums, with the algorithms of collective libraries.

    Gradients: a ring inside each host, then one ring over the hosts per device of a host, for its
    part. The small sums of batch norm: a tree, up and down.
    """
    inside = min(devices, PER_HOST)
    hosts = devices // inside
    gradients = Reduction(sums.bytes_, 1).seconds(inside, INSIDE)
    gradients += Reduction(sums.bytes_ / inside, 1).seconds(hosts, between)
    tree = 2 * (math.log2(inside) * INSIDE.latency + math.log2(hosts) * between.latency)
    return gradients + (sums.times - 1) * tree


def gather_seconds(bytes_: int, devices: int, between: Link) -> float:
    """Returns how long all devices of a group take to receive the same bytes.

    A ring over the hosts per device of a host, for its part, then a ring inside each host.
    """
    inside = min(devices, PER_HOST)
    parts = Reduction(gathered=(bytes_ // inside,)).seconds(devices // inside, between)
    return parts + Reduction(gathered=(bytes_,)).seconds(inside, INSIDE)


def rates(network: Network, devices: int, between: Link) -> dict[str, float]:
    """Returns the ticks per second of `fused`, and of `pipeline` with each codec."""
    seconds, group = network.seconds, devices // len(network.seconds)
    pipeline, _ = make_pipeline(network.settings, seconds, seconds, devices)
    hop = INSIDE if devices <= PER_HOST else between
    # Each device of a group sends its part of the batch over a link of its own.
    wide = dataclasses.replace(hop, bandwidth=group * hop.bandwidth)
    ticks = {}
    for codec, traffic in network.traffic.items():
        works = []
        for work, each, bytes_ in zip(
            pipeline.works, network.sums, network.gathered[codec], strict=True
        ):
            reduction = sum_seconds(each, group, between)
            if bytes_:
                reduction += gather_seconds(bytes_, group, between)
            works.append(dataclasses.replace(work, reduction=reduction))
        planned = dataclasses.replace(pipeline, works=tuple(works), link=wide)
        ticks[codec] = planned.steady(traffic.wire)[0]
    summed = sum(sum_seconds(each, devices, between) for each in network.sums)
    ticks["fused"] = 1.0 / (sum(seconds) / devices + summed)
    return ticks


def table(network: Network, between: Link, args: argparse.Namespace) -> tuple[list[str], Any]:
    """Returns the lines of a Markdown table, and the speed-ups by engine or codec."""
    lines: list[str] = []
    speedups: dict[str, list[float]] = {name: [] for name in (*CODECS, "fused")}
    rows = []
    for devices in DEVICES:
        ticks = rates(network, devices, between)
        group = devices // args.modules
        for name, rate in ticks.items():
            speedups[name].append(rate * sum(network.seconds))
        sent = [
            max(network.traffic[codec].wire) * args.batch_size * ticks[codec] / group / 1e9
            for codec in CODECS
        ]
        last = {name: values[-1] for name, values in speedups.items()}
        rows.append(
            [
                f"{devices:,}",
                *(f"{last[name]:.0f} ({100 * (1 - last[name] / devices):.0f} %)" for name in last),
                " / ".join(f"{s:.2g}" for s in sent),
            ]
        )
    header = ["devices", *(f"`pipeline`, `{codec}`" for codec in CODECS), "`fused`"]
    harness.table([*header, "GB/s per device, " + " / ".join(CODECS)], rows, lines.append)
    return lines, speedups


def ends_at(speedups: Sequence[float]) -> str:
    """Returns where more devices stop being worth their price, in words."""
    good = [d for d, s in zip(DEVICES, speedups, strict=True) if s / d >= WORTH]
    if not good:
        return f"nowhere from {DEVICES[0]} devices on"
    return f"up to {good[-1]:,} devices" + ("" if good[-1] < DEVICES[-1] else ", the most tried")


def draw(curves: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """Draws the speed-ups over the devices, a panel per network."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(9, 4), sharey=True)
    for panel, (name, links) in zip(panels, curves.items(), strict=True):
        panel.plot(DEVICES, DEVICES, color="0.7", linewidth=1, label="linear")
        for (link, speedups), style in zip(links.items(), ("-", "--"), strict=True):
            for (label, key), color in zip(
                {"pipeline, identity": "identity", "pipeline, vq": "vq", "fused": "fused"}.items(),
                ("C0", "C2", "C3"),
                strict=True,
            ):
                gigabits = link.split()[0]
                panel.plot(
                    *(DEVICES, speedups[key], style),
                    color=color,
                    label=f"{label}, {gigabits} Gbit/s",
                )
        panel.set(xscale="log", yscale="log", title=name, xlabel="devices")
        panel.set_xticks(DEVICES, [str(d) for d in DEVICES])
        panel.minorticks_off()
    panels[0].set_ylabel("speed-up over one device")
    panels[1].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--teraflops", type=float, default=300.0, help="achieved by a device")
    flags.add_argument("--batch_size", type=int, default=4096)
    flags.add_argument("--modules", type=int, default=8)
    args = flags.parse_args()
    curves: dict[str, dict[str, Any]] = {}
    introduction = (
        f"Predicted, not measured: {args.modules} modules, {args.batch_size:,} images per batch, "
        f"{args.teraflops:g} TFLOP/s per device in bfloat16 at any size of its part (an assumption "
        f"for an H100), {PER_HOST} devices per host with {INSIDE.bandwidth:g} GB/s and "
        f"{1e6 * INSIDE.latency:g} microseconds between them. A cell is the speed-up over one "
        "device with the same modules, and the share of the time in which devices compute nothing. "
        "`python benchmarks/hosts/scaling.py` prints the tables."
    )
    text = [
        textwrap.fill(introduction, 100, break_on_hyphens=False),
        "",
        "![Speed-up over devices](assets/scaling.png)",
        "",
        SUMMARY,
    ]
    for name, model in NETWORKS.items():
        network, curves[name] = load(model, args), {}
        turns = [1e3 * s for s in network.seconds]
        bound = sum(turns) / max(turns) / len(turns)
        parameters = sum(each.bytes_ for each in network.sums) / 4e6
        for link, between in LINKS.items():
            lines, speedups = table(network, between, args)
            curves[name][link] = speedups
            speed = f"{between.bandwidth:g} GB/s, {1e6 * between.latency:g} microseconds"
            text += [f"**{name}**, {link} between hosts ({speed} per device):", "", *lines, ""]
            text += [
                "Devices compute at least half of the time: "
                + "; ".join(
                    f"{label} {ends_at(speedups[name])}"
                    for label, name in {
                        "`pipeline` with `identity`": "identity",
                        "with `vq`": "vq",
                        "`fused`": "fused",
                    }.items()
                )
                + ".",
                "",
            ]
        print(name, f"{parameters:.1f} M parameters", [f"{t:.0f}" for t in turns], f"{bound:.2f}")
    print("\n".join(text))
    if args.write:
        draw(curves, DOCS / "assets" / "scaling.png")
        page = DOCS / "distributed.md"
        before, begin, rest = page.read_text().partition("<!-- scaling -->\n")
        _, end, after = rest.partition("<!-- end -->\n")
        page.write_text(before + begin + "\n".join(text).rstrip() + "\n" + end + after)


if __name__ == "__main__":
    main()
