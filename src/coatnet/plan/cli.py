"""The command `coatnet plan`: what it takes, and how it asks."""

from __future__ import annotations

from coatnet.config import FloatPrecision
from coatnet.plan.estimate import H100_TFLOPS, UTILISATION, Request, make_plan
from coatnet.typed import Json, parse_size, print_json


def plan(
    model: str,
    *,
    recipe: str = "imagenet_1k",
    image_size: str | None = None,
    batch: int | None = None,
    microbatch_size: int | None = None,
    pictures: int | None = None,
    precision: FloatPrecision = "bf16",
    gpus: int = 8,
    gpu_memory: float = 80.0,
    gpu_tflops: float = H100_TFLOPS,
    utilisation: float = UTILISATION,
    json: Json = False,
) -> None:
    """Say what a training needs before it is begun: memory a GPU, operations, days and GPU-hours.

    Example: coatnet plan coatnet_7 --recipe imagenet_21k --gpus 256

    Parameters
    ----------
    model: str
        A name from `coatnet models`.
    recipe: str
        A row of recipes.py: batch, epochs, optimizer, number of pictures.
    image_size: str
        px, like 224 or 192x256; absent, the network's own.
    batch: int
        Pictures an update, over all GPUs; absent, the recipe's.
    microbatch_size: int
        Pictures that a GPU holds at once; absent, the most that fit.
    pictures: int
        How many there are to train on; absent, as many as the recipe's data set has.
    precision: str
        Of the computation; weights are kept in fp32.
    gpus: int
        How many.
    gpu_memory: float
        Of each, GiB.
    gpu_tflops: float
        Of each, in dense products of the precision; the default is an H100's in bf16, by its data sheet.
    utilisation: float
        Share of it that training reaches; the default is an assumption.
    """
    from coatnet.plan.show import show, to_dict

    found = make_plan(
        Request(
            model=model,
            recipe=recipe,
            image_size=parse_size(image_size) if image_size else None,
            batch=batch,
            microbatch=microbatch_size,
            num_images=pictures,
            precision=precision,
            gpus=gpus,
            gpu_memory_gib=gpu_memory,
            gpu_tflops=gpu_tflops,
            utilisation=utilisation,
        )
    )
    print_json(to_dict(found)) if json else show(found)
