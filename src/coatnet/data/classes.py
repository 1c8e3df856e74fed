"""Which class a label means: by its name, or by its number where there are no names."""

from __future__ import annotations

import numpy as np

from coatnet.data.draws import IntArray
from coatnet.errors import DataError

MAX_CLASSES = 1_000_000  # a number from here on is no class, and would ask for a classifier of that size


def class_names_of(labels: IntArray, label_names: tuple[str, ...] | None, data: str) -> tuple[str, ...]:
    """Return the names that training's labels have, or "0" to the highest number.

    Raises: DataError for fewer than two classes that occur.
    """
    names = label_names or tuple(str(number) for number in range(int(labels.max()) + 1))
    check_two(labels, names, data)
    return names


def check_two(labels: IntArray, names: tuple[str, ...], data: str) -> None:
    """Raise DataError unless two classes or more occur."""
    if len(met := np.unique(labels)) < 2:
        raise DataError(f"{data} has one class, {names[met[0]]}. It takes two or more to tell apart.")


def to_classes(
    labels: IntArray, label_names: tuple[str, ...] | None, class_names: tuple[str, ...], part: str
) -> IntArray:
    """Return the class of each label (N,): labels count in `label_names`, or in the classes where there are none.

    Raises: DataError naming a label that training lacks.
    """
    if label_names is None:
        unknown = [str(label) for label in (int(labels.max()),) if label >= len(class_names)]
        class_of = np.arange(len(class_names), dtype=np.int64)
    else:
        number = {name: place for place, name in enumerate(class_names)}
        unknown = [name for name in label_names if name not in number]
        class_of = np.array([number.get(name, -1) for name in label_names], dtype=np.int64)
    if unknown:
        known = ", ".join(class_names[:5]) + (", ..." if len(class_names) > 5 else "")
        raise DataError(f"{part} has the class {unknown[0]}, which training lacks ({known}).")
    return class_of[labels]
