"""torch.compile as inference uses it: what it makes is kept in a private folder, and no size runs uncompiled."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import nn

from coatnet.files import private_cache

MOST_FORMS = 256  # beyond torch's own limit of 8 a network would run uncompiled, without a word


def compile_for_sizes(network: nn.Module, mode: str = "default") -> Any:
    """Compile a network anew for each size of its input; call the result `with many_forms()`."""
    with suppress(OSError):  # then torch takes its own folder
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(private_cache("inductor")))
    return torch.compile(network, mode=mode, dynamic=False)


def many_forms() -> AbstractContextManager[Any]:
    """Have torch.compile make as many forms of a network as there are sizes."""
    return torch._dynamo.config.patch(recompile_limit=MOST_FORMS)  # pyright: ignore[reportPrivateUsage]
