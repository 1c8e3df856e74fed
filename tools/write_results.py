"""Write docs/results.md and the tables of README and docs/findings.md, from the records and the family's rows.

python tools/write_results.py            writes
python tools/write_results.py --check    exits 1 if what stands there is out of date
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from plan_table import plan_section
from promise_tables import promise_section
from speed_tables import limits_section, speed_section, speed_table
from study_tables import study_records, study_tables

from coatnet.family_table import rows

ROOT = Path(__file__).parent.parent
Record = dict[str, Any]
NUM_SEEDS_WANTED = 3


def main() -> None:
    """Write, or check, every generated text."""
    records = read_records()
    groups = group_trainings(records)
    repeated = {key: group for key, group in groups.items() if len(group) >= NUM_SEEDS_WANTED}
    readme = fill((ROOT / "README.md").read_text(), "family", family_table())
    readme = fill(readme, "measured", training_table(repeated))
    readme = fill(readme, "speed", speed_table(records) + "\n")
    findings, studies = (ROOT / "docs" / "findings.md").read_text(), study_records(records)
    for name in re.findall(r"<!-- study ([\w-]+):", findings):
        findings = fill(findings, f"study {name}", study_tables(studies.get(name)) + "\n")
    texts = {
        ROOT / "README.md": readme,
        ROOT / "docs" / "results.md": results_page(groups, records),
        ROOT / "docs" / "findings.md": findings,
    }
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text() != text]
    if "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(path.name for path in stale)}" if stale else 0)
    for path in stale:
        path.write_text(texts[path])


def read_records() -> list[Record]:
    """Return the records, each with the name of its file."""
    return [{"file": path.name, **json.loads(path.read_text())} for path in sorted((ROOT / "results").glob("*.json"))]


def group_trainings(records: list[Record]) -> dict[str, list[Record]]:
    """Group the records of trainings that differ in nothing but their seed."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["kind"] == "train":
            config = {key: value for key, value in record["config"].items() if key not in ("seed", "out")}
            groups[json.dumps(config, sort_keys=True)].append(record)
    return groups


def fill(text: str, name: str, content: str) -> str:
    """Put content between a page's marks of that name."""
    pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{content}{match[2]}", text, flags=re.DOTALL)


def family_table() -> str:
    """Return the family as Markdown."""
    headings = (
        "model",
        "px",
        "parameters",
        "G multiply-adds",
        "paper's top-1 % at 224 / 384 / 512",
        "with more data, 512",
    )
    lines = [_row(*headings), _row(*["---"] * len(headings))]
    for row in rows(None):
        is_ours = row["from"] != "paper"
        alone = "ours" if is_ours else " / ".join(_or_dash(value) for value in row["paper_top1_percent"].values())
        extra = _or_dash(row["paper_top1_extra_percent"]) + (f" ({row['extra_data']})" if row["extra_data"] else "")
        size, params = row["image_size"][0], f"{row['num_params'] / 1e6:.2f} M"
        lines.append(_row(f"`{row['name']}`", size, params, f"{row['gmacs']:.3g}", alone, extra))
    return "\n".join(lines) + "\n"


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value}"


def training_table(groups: dict[str, list[Record]]) -> str:
    """Return accuracy, time and host of each group of trainings; "not run" where there is none."""
    if not groups:
        return "Not run.\n"
    headings = ("data", "model", "top-1 %, mean ± deviation", "seeds", "pictures", "training, minutes", "host")
    lines = [_row(*headings), _row(*["---"] * len(headings))]
    for group in groups.values():
        first = group[0]
        host, num_ranks = first["host"], first["figures"].get("num_ranks", 1)
        top1 = [record["figures"]["top1_percent"] for record in group]
        minutes = [record["seconds"] / 60 for record in group]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        lines.append(
            _row(
                f"{first['config']['data']} ({first['figures']['part']})",
                f"`{first['config']['model']['name']}`",
                f"{statistics.mean(top1):.2f}{spread}",
                len(top1),
                first["n"],
                f"{min(minutes):.1f} to {max(minutes):.1f}",
                f"{host['cpu']}, {num_ranks} ranks, {host['torch_threads']} threads each",
            )
        )
    return "\n".join(lines) + "\n"


def results_page(groups: dict[str, list[Record]], records: list[Record]) -> str:
    """Return docs/results.md."""
    parts = ["# Results\n", "Written by `python tools/write_results.py` from the records under `results/`.\n"]
    parts += [speed_section(records), limits_section(records), promise_section(records), plan_section(records)]
    parts += ["## Trainings\n", training_table(groups)]
    parts += [f"Fewer than {NUM_SEEDS_WANTED} seeds make no claim: such a run only stands behind a picture.\n"]
    for group in groups.values():
        config = group[0]["config"]
        parts.append(f"### {config['model']['name']} on {config['data']}\n")
        parts.append(_seeds_table(group))
        parts.append("Commands:\n")
        parts.append("\n".join(f"    {' '.join(record['command'])}" for record in group) + "\n")
    return "\n".join(parts)


def _seeds_table(group: list[Record]) -> str:
    headings = ("seed", "top-1 %", "95 % over pictures", "loss", "epochs", "images/s", "seconds", "commit", "record")
    lines = [_row(*headings), _row(*["---"] * len(headings))]
    for record in group:
        figure = record["figures"]
        low, high = figure["top1_interval"]
        lines.append(
            _row(
                record["seeds"][0],
                f"{figure['top1_percent']:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{figure['loss']:.4f}",
                f"{figure['epochs']:.2f}",
                f"{figure['images_per_s']:.0f}",
                f"{record['seconds']:.0f}",
                f"`{(record['commit'] or 'none')[:10]}`",
                f"`results/{record['file']}`",
            )
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
