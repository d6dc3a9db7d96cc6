"""Text form of a plan, as `--mode=plan` prints it without `--json`."""

import dataclasses
from typing import Any

from dgl_jax.profile.table import ModuleCost, aligned, table


def plan_lines(numbers: dict[str, Any]) -> list[str]:
    """Formats a plan as tables.

    Args:
      numbers: the dictionary that `plan` returns, with the path of the picture as `timeline`.

    Returns:
      Lines of text, without line ends.
    """
    fields = {f.name for f in dataclasses.fields(ModuleCost)}
    rows = [
        ModuleCost(**{name: value for name, value in row.items() if name in fields})
        for row in numbers["modules"]
    ]
    shared = f", which share {numbers['cores']:g} cores" if numbers["cores"] else ""
    given = [
        f"{numbers[name]:g} {unit}"
        for name, unit in (
            ("bandwidth", "GB/s per link"),
            ("latency", "ms latency"),
            ("message_cost", "ms of the host per message"),
        )
        if numbers[name]
    ]
    link = ", ".join(given) or "messages take no time"
    # Parts of a turn, shown if any module has them.
    parts = {
        title: name
        for title, name in (
            ("of it sums", "reduction_milliseconds"),
            ("of it augmentation", "augmentation_milliseconds"),
            ("of it the codec", "codec_milliseconds"),
        )
        if any(row[name] for row in numbers["modules"])
    }
    turns = [["module", "ms per turn", *parts, "on devices"]]
    turns += [
        [
            row["name"],
            *(f"{row[name]:.4g}" for name in ("milliseconds", *parts.values())),
            ", ".join(map(str, row["devices"])),
        ]
        for row in numbers["modules"]
    ]
    fused = numbers["fused_ticks_per_second"]
    devices = [["device", "idle", "peak memory, MiB"]]
    for number, (idle, memory) in enumerate(zip(numbers["idle"], numbers["peak_memory_bytes"])):
        devices.append(
            [
                str(number),
                f"{100 * idle:.0f} %",
                "-" if memory is None else f"{memory / 2**20:,.1f}",
            ]
        )
    hops, sizes = (
        [f"after {row['name']}" for row in numbers["modules"][:-1]],
        numbers["codec_sizes"],
    )
    labels = {
        "int8": f"int8, dims={sizes['dims']}",
        "vq": "vq, " + ", ".join(f"{name}={size}" for name, size in sizes.items()),
    }
    codecs, unfit = [["codec, bytes per image", *hops, "MB/s total", "ticks/s"]], []
    for name, codec in numbers["codecs"].items():
        if codec is None:
            unfit.append(
                f"codec {name}: config.codec.dims does not divide the channels of every hop"
            )
            continue
        sent = [f"{bytes_:,.0f}" for bytes_ in codec["bytes_per_image"]]
        codecs.append(
            [
                labels.get(name, name),
                *sent,
                f"{sum(codec['megabytes_per_second']):,.1f}",
                f"{codec['ticks_per_second']:.4g}",
            ]
        )
    sections = [
        [f"{numbers['devices']} devices{shared}; block times {numbers['block_times']}; {link}"],
        table(rows),
        aligned(turns),
        [
            f"{numbers['ticks_per_second']:.4g} ticks/s "
            f"({numbers['images_per_second']:,.0f} images/s), "
            f"{numbers['speedup']:.2f} times one device; "
            f"idle {100 * numbers['idle_share']:.0f} % of the time",
            *([f"fused, data parallel: {fused:.4g} ticks/s"] if fused else []),
        ],
        [*aligned(devices), f"(memory as compiled for {numbers['memory_compiled_for']})"],
        [*aligned(codecs), *unfit],
        [f"timeline: {numbers['timeline']}"] if numbers["timeline"] else [],
    ]
    return [line for section in sections if section for line in [*section, ""]][:-1]
