"""What `coatnet study list` prints: the question of each study, its rows, its cost. No torch."""

from __future__ import annotations

import sys
from typing import Any

from coatnet.studies.catalogue import STUDIES
from coatnet.studies.cost import in_words, total_images, total_macs
from coatnet.studies.scales import SCALES, known_num_images
from coatnet.studies.study import names_of, settings_of
from coatnet.typed import ScaleName


def rows(scale_name: ScaleName, num_seeds: int) -> list[dict[str, Any]]:
    """Return a row a study at a scale."""
    scale, found = SCALES[scale_name], list[dict[str, Any]]()
    for study in STUDIES.values():
        trainings = study.trainings(scale)
        configs = [training.config for training in trainings]
        found.append(
            {
                "name": study.name,
                "source": study.source,
                "question": study.question,
                "rows": names_of(trainings),
                "settings": settings_of(trainings),
                "num_runs": num_seeds * len(trainings),
                "num_images": num_seeds * total_images(configs, known_num_images),
                "macs": num_seeds * total_macs(configs, known_num_images),
            }
        )
    return found


def show(found: list[dict[str, Any]], scale_name: ScaleName) -> None:
    """Print the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    scale = SCALES[scale_name]
    table = Table(caption=f"--scale {scale.name}: {scale.summary}", show_lines=True)
    for heading in ("study", "of the paper", "question", "rows", "settings", "runs", "cost"):
        table.add_column(heading, justify="right" if heading == "runs" else "left")
    for row in found:
        table.add_row(
            row["name"], row["source"], row["question"], "; ".join(row["rows"]), "; ".join(row["settings"]),
            str(row["num_runs"]), in_words(row["num_images"], row["macs"]),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 1000, highlight=False).print(table)
