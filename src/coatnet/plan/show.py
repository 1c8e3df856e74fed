"""A plan as people read it: the answer in words, then a table of memory and one of time."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from coatnet.plan.estimate import ENOUGH_FOR_BATCH_NORM, GIB, USABLE, Form, Plan
from coatnet.plan.memory import PARTS


def to_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain JSON data."""
    request, best = plan.request, plan.best
    return {
        "model": plan.config.name,
        "image_size": list(plan.config.image_size),
        "num_classes": plan.config.num_classes,
        "num_params": plan.num_params,
        "recipe": request.recipe,
        "num_images": plan.num_images,
        "num_epochs": plan.num_epochs,
        "global_batch_size": plan.batch,
        "optimizer": plan.optimizer,
        "precision": request.precision,
        "gpus": request.gpus,
        "gpu_memory_gib": request.gpu_memory_gib,
        "assumed": {"gpu_tflops": request.gpu_tflops, "utilisation": request.utilisation, "usable_memory": USABLE},
        "forms": [
            {
                "name": form.name,
                "checkpointed": form.checkpointed,
                "microbatch_size": form.microbatch,
                "fits": form.fits,
                "total_bytes": form.total,
                "bytes": form.parts,
                **asdict(plan.costs[form.checkpointed]),
            }
            for form in plan.forms
        ],
        "best": best.name if best else None,
        "answer": answer(plan),
    }


def answer(plan: Plan) -> str:
    """Say in a few sentences what is needed."""
    request, best = plan.request, plan.best
    where = f"{request.gpus} GPU{'s' * (request.gpus > 1)} of {request.gpu_memory_gib:g} GiB"
    what = f"{plan.config.name} at {_px(plan)} px"
    if best is None:
        least = min(plan.forms, key=lambda form: form.total)
        return (
            f"{what} does not fit on {where}: {least.name} takes {_gib(least.total)} a GPU for a microbatch of "
            f"{least.microbatch}, of {_gib(_usable(plan))} that can be filled. "
            "Give more or larger GPUs, or smaller pictures."
        )
    cost = plan.costs[best.checkpointed]
    pieces = f"in microbatches of {best.microbatch}" if best.microbatch < plan.share else "at once"
    lines = [
        f"{what} on {where}: take {best.name}. Each GPU computes its {plan.share} pictures of an update {pieces} and "
        f"peaks at {_gib(best.total)}. {plan.num_epochs:g} epochs of {_millions(plan.num_images)} pictures take "
        f"{_duration(cost.days)}, {_number(cost.gpu_hours)} GPU-hours."
    ]
    unfit = [form.name for form in plan.forms if not form.fits]
    if unfit:
        asked = f"a microbatch of {request.microbatch}" if request.microbatch else "even the smallest microbatch"
        lines.append(f"{_listed(unfit)} cannot hold {asked}.")
    if best.microbatch < min(plan.share, ENOUGH_FOR_BATCH_NORM):
        lines.append("BatchNorm takes its statistics from a microbatch, and these are small: more GPUs would help.")
    return " ".join(lines)


def show(plan: Plan) -> None:
    """Print the answer and its tables."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)  # off a terminal nothing is cut
    request = plan.request
    console.print(answer(plan), soft_wrap=True)
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    console.print(
        f"Recipe {request.recipe}: {plan.data_name}, {plan.num_images:,} pictures, "
        f"{plan.config.num_classes:,} classes, batch {plan.batch}, {plan.optimizer}, {request.precision}. "
        f"{plan.num_params / 1e6:,.1f} M parameters.\n"
        f"Assumed, not measured: a GPU's products run at {request.utilisation:.0%} of {request.gpu_tflops:g} TFLOP/s "
        f"(--utilisation, --gpu-tflops), and {USABLE:.0%} of its memory can be filled. "
        "Communication and reading pictures take no time here; libraries' scratch takes no memory.",
        soft_wrap=True,
    )


def _memory_table(plan: Plan) -> Any:
    from rich.table import Table

    table = Table(title="memory a GPU at the peak of an update, GiB", title_justify="left")
    table.add_column("")
    for form in plan.forms:
        table.add_column(form.name, justify="right")
    for part in PARTS:
        if any(form.parts[part] for form in plan.forms):
            table.add_row(part, *(f"{form.parts[part] / GIB:.2f}" for form in plan.forms))
    table.add_section()
    table.add_row("in all", *(f"{form.total / GIB:.2f}" for form in plan.forms))
    table.add_row(f"fits {plan.request.gpu_memory_gib:g} GiB", *("yes" if form.fits else "no" for form in plan.forms))
    table.add_row("microbatch" if plan.request.microbatch else "largest microbatch", *map(_microbatch, plan.forms))
    return table


def _microbatch(form: Form) -> str:
    return str(form.microbatch) if form.fits else f"not {form.microbatch}"


def _time_table(plan: Plan) -> Any:
    from rich.table import Table

    table = Table(title="time, at the speed assumed", title_justify="left")
    for heading in ("", "PFLOP a step", "steps", "GPU-hours", "time"):
        table.add_column(heading, justify="right" if heading else "left")
    for again, cost in plan.costs.items():
        name = "with checkpointing" if again else "without checkpointing"
        flops = _number(cost.flops_a_step / 1e15)
        table.add_row(name, flops, f"{cost.num_steps:,}", _number(cost.gpu_hours), _duration(cost.days))
    return table


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _usable(plan: Plan) -> float:
    return USABLE * plan.request.gpu_memory_gib * GIB


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _px(plan: Plan) -> str:
    height, width = plan.config.image_size
    return str(height) if height == width else f"{height}x{width}"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M" if number >= 1e6 else f"{number:,}"


def _duration(days: float) -> str:
    if days >= 1:
        return f"{_number(days)} days"
    return f"{24 * days:.1f} hours" if days >= 1 / 24 else f"{24 * 60 * days:.1f} minutes"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
