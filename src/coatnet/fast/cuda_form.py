"""The folded network on CUDA: compiled, then one CUDA graph for each batch and image size.

A graph starts its hundreds of short kernels at once, without Python or torch between them. It reads and writes memory
of its own, so what comes in is copied there and the answer is copied out.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import Tensor, nn

from coatnet.fast.compiling import compile_for_sizes, many_forms
from coatnet.fast.flex_attention import use_flex_attention
from coatnet.model.network import CoAtNet

KEPT_GRAPHS = 8  # each holds the maps of its batch in memory
CHUNK_PIXELS = 128 * 224 * 224  # computed at once: enough to fill a card
MODE = "max-autotune-no-cudagraphs"  # torch's own graphs serve only the thread that made them


class Graphed:
    """A network as CUDA graphs: images (B, C, H, W) of any B -> logits (B, K) float32. Threads take turns."""

    def __init__(self, folded: CoAtNet, dtype: torch.dtype) -> None:
        weights = folded.to(dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        network: nn.Module = compile_for_sizes(use_flex_attention(weights), MODE)
        self.graph = lru_cache(KEPT_GRAPHS)(
            lambda *shape: _Graph(network, shape, dtype, folded.classifier.weight.device)
        )
        self.turn = threading.Lock()

    def __call__(self, images: Tensor) -> Tensor:
        """Classify one or more images. The first call for a size compiles."""
        most = largest_chunk(images.shape[2] * images.shape[3])
        with self.turn:
            answers = [self.graph(graph_size(len(chunk)), *chunk.shape[1:])(chunk) for chunk in images.split(most)]
        return torch.cat(answers)


def graph_size(batch: int) -> int:
    """Return the batch of the graph that computes so many images: a power of two, so that few graphs serve all."""
    return 1 << (batch - 1).bit_length()


def largest_chunk(pixels: int) -> int:
    """Return how many images of so many pixels are computed at once: a power of two."""
    return 1 << (max(1, CHUNK_PIXELS // pixels).bit_length() - 1)


class _Graph:
    """The network for one batch and image size."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        images = torch.zeros(shape, dtype=dtype, device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), many_forms():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # the first compiles; in the second, libraries have chosen their ways
                    network(self.images)
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may use the card meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits: Tensor = network(self.images)
        self.is_free = torch.cuda.Event()  # a caller on another stream waits until its memory has been read

    def __call__(self, images: Tensor) -> Tensor:
        """Classify as many images as the graph has room for, or fewer."""
        stream = torch.cuda.current_stream(self.images.device)
        stream.wait_event(self.is_free)
        self.images[: len(images)].copy_(images)
        self.graph.replay()
        logits = self.logits[: len(images)].to(torch.float32, copy=True)
        self.is_free.record(stream)
        return logits
