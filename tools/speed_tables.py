"""The tables of speed and memory in docs/results.md, from the records of `coatnet bench`."""

from __future__ import annotations

from statistics import mean
from typing import Any

from gpu_tables import gpu_section, is_of_a_card

Record = dict[str, Any]
Row = dict[str, Any]
# What the project set out to reach for coatnet_0 at 224 px on 2 cores, and of the limit by products; None: no goal.
GOALS: dict[tuple[str, int | None], tuple[float, float | None]] = {
    ("inference fp32", 1): (1.08, 90),
    ("inference fp32", 16): (1.12, 90),
    ("inference bf16", 1): (1.2, 82),
    ("inference bf16", 16): (1.2, 82),
    ("inference int8", 1): (1.4, 55),
    ("inference int8", 16): (1.4, 55),
    ("training bf16", 16): (2.0, 70),
    ("JPEG to tensor 500x375", None): (2.0, None),
    ("JPEG to tensor 1600x1200", None): (4.0, None),
    ("first prediction, cold shell", None): (2.0, None),
    ("evaluation of 2000 JPEGs, bf16", None): (1.5, None),
}
SMALL_ROWS = "Our small rows against timm's `resnet10t` on Fashion-MNIST"
SMALL_HEADINGS = (
    "model", "minutes", "top-1 % by seed", "mean", "peer's, by seed", "mean", "ahead by, points", "pictures seen",
    "peer's", "inference img/s", "best peer", "ratio (by round)", "record",
)  # fmt: skip
MEMORY_GOALS = {"coatnet": 0.6, "coatnet checkpointed": 0.3}  # of timm eager's


def speed_section(records: list[Record]) -> str:
    """Return the section on speed; what has no record is "not run"."""
    parts = ["## Speed", speed_table(records), *_memory(_found(records)), *_agreement(records), *_growth(records)]
    parts += [gpu_section(records), *_small(records), *_hosts(records)]
    return "\n\n".join(parts) + "\n"


def speed_table(records: list[Record]) -> str:
    """Return what was met beside what was to be reached, a row a piece of work."""
    found = _found(records)
    headings = (
        "work",
        "batch",
        "coatnet",
        "best peer",
        "ratio (by round)",
        "to reach",
        "% of limit",
        "to reach",
        "record",
    )
    lines = [_line(*headings), _line(*["---"] * len(headings))]
    lines += [_speed_line(work, goal, *found.get(work, (None, None))) for work, goal in GOALS.items()]
    return "\n".join(lines)


def _found(records: list[Record]) -> dict[tuple[str, int | None], tuple[Row, Record]]:
    """Return each row's figures from the run of the whole table, which comes before one of a row by itself."""
    return {key(row): (row, record) for record in reversed(records) for row in _rows(record)}


def key(row: Row) -> tuple[str, int | None]:
    """Return what a row of figures is about."""
    return row["work"], row.get("batch")


def _rows(record: Record) -> list[Row]:
    rows = record["figures"]["rows"] if record["kind"] in ("bench infer", "bench train", "bench data") else []
    return [row for row in rows if not is_of_a_card(row)]


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _speed_line(
    work: tuple[str, int | None], goal: tuple[float, float | None], row: Row | None, record: Record | None
) -> str:
    name, batch = work
    wanted = "-" if goal[1] is None else f"{goal[1]:.0f}"
    if row is None or record is None:
        return _line(name, batch or "-", *["not run"] * 3, f"{goal[0]:.2f}", "not run", wanted, "not run")
    ours = next(iter(row["images_per_s"]))
    best, ratio = row["best_peer"], row["ratio"]
    share = row.get("percent_of_limit", {}).get(ours)
    return _line(
        name, batch or "-", _rate(row, ours), f"{best}: {_rate(row, best)}",
        f"**{ratio['median']:.2f}** ({ratio['low']:.2f} to {ratio['high']:.2f})", f"{goal[0]:.2f}",
        "-" if share is None else f"{share:.1f}", wanted, f"`results/{record['file']}`",
    )  # fmt: skip


def _rate(row: Row, name: str) -> str:
    timing = row["timings"][name]
    unit = f"{row['images_per_s'][name]:.1f} images/s"
    if row["work"].startswith("first"):
        unit = "a picture"
    return f"{unit}, {_time(timing['median_s'])} ({_time(timing['low_s'])} to {_time(timing['high_s'])})"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _memory(found: dict[tuple[str, int | None], tuple[Row, Record]]) -> list[str]:
    """Return the peak memory of training, as a share of timm's."""
    row, record = found.get(("training bf16", 16), (None, None))
    if row is None or record is None:
        return ["Peak memory of training: not run."]
    peaks = row["peak_memory_mib"]
    lines = [_line("training, batch 16, bf16", "peak MiB above what is resident before", "of timm eager's", "to reach")]
    lines.append(_line(*["---"] * 4))
    for name, peak in peaks.items():
        goal = MEMORY_GOALS.get(name)
        lines.append(
            _line(name, f"{peak:.0f}", f"{peak / peaks['timm eager']:.2f}", "-" if goal is None else f"{goal}")
        )
    return ["\n".join(lines), f"Record: `results/{record['file']}`."]


def _agreement(records: list[Record]) -> list[str]:
    rows = [
        (row, record) for record in records if record["kind"] == "bench agreement" for row in record["figures"]["rows"]
    ]
    if not rows:
        return ["Agreement of int8 with fp32 on a trained network: not run."]
    lines = [
        _line(
            "precision",
            "trained on",
            "px",
            "n",
            "agreement % (95 %)",
            "top-1 %",
            "fp32 top-1 %",
            "points lost",
            "record",
        )
    ]
    lines.append(_line(*["---"] * 9))
    for row, record in rows:
        low, high = row["agreement_interval"]
        lines.append(
            _line(
                row["work"].removeprefix("agreement "), f"{row['data']} (`{row['model']}`)", row["image_size"][0],
                row["n"],
                f"{row['agreement_percent']:.2f} ({low:.2f} to {high:.2f})", f"{row['top1_percent']:.2f}",
                f"{row['fp32_top1_percent']:.2f}", f"{row['loss_points']:.2f} ± {row['loss_deviation_points']:.2f}",
                f"`results/{record['file']}`",
            )
        )  # fmt: skip
    return ["\n".join(lines), "To reach in int8: agreement at least 99 %, at most 0.3 points lost, n at least 2,000."]


def _small(records: list[Record]) -> list[str]:
    """Return accuracy after equal time and speed of inference, a line a model."""
    found = [record for record in records if record["kind"] == "bench small"]
    if not found:
        return [f"{SMALL_ROWS}, after equal time: not run."]
    lines = [_line(*SMALL_HEADINGS), _line(*["---"] * len(SMALL_HEADINGS))]
    for record in found:
        rows = record["figures"]["rows"]
        accuracies = [row for row in rows if "top1_percent" in row]
        inferences = {row["model"]: row for row in rows if "ratio" in row}
        lines += [_small_line(row, inferences[row["model"]], record) for row in accuracies]
    return [
        f"{SMALL_ROWS}, both trained for as many minutes of all cores, in bf16:", "\n".join(lines),
        "To reach: 0.3 points ahead; 1.5 times the inference at equal accuracy.",
    ]  # fmt: skip


def _small_line(accuracy: Row, inference: Row, record: Record) -> str:
    ours, theirs = (accuracy["top1_percent"][accuracy[key]] for key in ("model", "peer"))
    best, ratio = inference["best_peer"], inference["ratio"]
    ahead = [one - other for one, other in zip(ours, theirs, strict=True)]
    cells = [cell for seeds in (ours, theirs) for cell in (" ".join(f"{x:.2f}" for x in seeds), f"{mean(seeds):.2f}")]
    return _line(
        f"`{accuracy['model']}`", f"{accuracy['minutes']:g}", *cells,
        f"**{mean(ahead):+.2f}** ({min(ahead):+.2f} to {max(ahead):+.2f})",
        *(f"{accuracy['images'][accuracy[key]]:,}" for key in ("model", "peer")), _rate(inference, accuracy["model"]),
        f"{best}: {_rate(inference, best)}", f"**{ratio['median']:.2f}** ({ratio['low']:.2f} to {ratio['high']:.2f})",
        f"`results/{record['file']}`",
    )  # fmt: skip


def _growth(records: list[Record]) -> list[str]:
    for record in records:
        if record["kind"] == "bench growth":
            row = record["figures"]["rows"][0]
            lines = [_line("grows", "time a multiply-add grows, at most", "allowed"), _line("---", "---", "---")]
            lines += [
                _line(name, f"{factor:.2f} times", f"{row['allowed']:.2f}") for name, factor in row["steeper"].items()
            ]
            return [
                "### Growth", "![images/s against batch, image size and network](growth.png)", "\n".join(lines),
                f"In {row['work'].removeprefix('growth ')}; record `results/{record['file']}`.",
            ]  # fmt: skip
    return ["Growth with batch, image size and network: not run."]


def _hosts(records: list[Record]) -> list[str]:
    """Return what each record ran as, where and in which versions, and the profile behind each row."""
    benches = [record for record in records if record["kind"].startswith("bench ")]
    parts = ["### Runs of `coatnet bench`"] if benches else []
    for record in benches:
        host, versions = (
            record["host"],
            ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version),
        )
        parts.append(
            f"`{' '.join(record['command'])}`, commit `{(record['commit'] or 'none')[:10]}`, {host['cpu']}, "
            f"{host['cores']} cores, {host['torch_threads']} threads, {record['seconds']:.0f} s; {versions}."
        )
    return parts


def limits_section(records: list[Record]) -> str:
    """Return each row's machine limits beside what was met, in ms an image."""
    lines = [
        _line(
            "work", "batch", "met", "by products", "products by", "GELU", "softmax", "depthwise", "copying",
            "round trip",
        ),
        _line(*["---"] * 10),
    ]  # fmt: skip
    for record in records:
        for row in _rows(record):
            if "roofline_ms" in row:
                parts = row["roofline_ms"]
                met = 1e3 / next(iter(row["images_per_s"].values()))
                trip_ns = row["rates"].get("round_trip_ns")
                lines.append(
                    _line(
                        row["work"], row["batch"], f"{met:.1f}", f"{parts['products']:.1f}",
                        row["rates"]["products_by"],
                        *(f"{parts[name]:.1f}" for name in ("gelu", "softmax", "depthwise", "copy")),
                        f"{trip_ns:.0f} ns" if trip_ns else "-",
                    )
                )  # fmt: skip
    if len(lines) == 2:
        return "### Limits\n\nNot run.\n"
    text = (
        "In ms an image. The other columns are the same work at the rates of torch's own operations, one after the\n"
        "other; our kernels do most of it inside the products, so the sum can exceed what was met. A backward pass\n"
        "counts twice. The last is how long a cache line takes from one core to the other and back: less than 300 ns\n"
        "where they share a cache. Where they do not, what threads share costs more, at batch 1 above all; a host of\n"
        "virtual machines moves them from the one to the other within seconds."
    )
    return "### Limits\n\n" + text + "\n\n" + "\n".join(lines) + "\n" + _profiles(records)


def _profiles(records: list[Record]) -> str:
    """Return where the time goes, a column for each kind of operation; training has a table of its own."""
    rows = [row for record in records for row in _rows(record) if row.get("profile_ms")]
    inference, training = ([row for row in rows if row["work"].startswith(work)] for work in ("inference", "training"))
    parts = [_profile(inference), _profile(training)]
    if not any(parts):
        return ""
    text = (
        "Where the time goes, in ms an image, by the kinds of operations in `native/op.h`; GELU and the sums of\n"
        "shortcuts are inside the products. The rest is torch's own operations and Python."
    )
    return "\n\n".join(["", text, *(part for part in parts if part)])[1:] + "\n"


def _profile(rows: list[Row]) -> str:
    """Return a line a row, the kinds that take most first; those that take less than a hundredth are left out."""
    if not rows:
        return ""
    most: dict[str, float] = {}
    for row in rows:
        total = sum(row["profile_ms"].values())
        most |= {kind: max(most.get(kind, 0), ms / total) for kind, ms in row["profile_ms"].items()}
    kinds = sorted((kind for kind in most if most[kind] >= 0.01), key=lambda kind: -most[kind])
    lines = [_line("work", "batch", *(kind.lower().replace("_", " ") for kind in kinds))]
    lines.append(_line(*["---"] * (2 + len(kinds))))
    lines += [
        _line(row["work"], row["batch"], *(f"{row['profile_ms'].get(kind, 0):.2f}" for kind in kinds)) for row in rows
    ]
    return "\n".join(lines)
