"""The network: S0 .. S4 and the head. Source: arXiv 2106.04803 section 2, Tables 3 and 11, appendix A.1.

With `blocks="listing"` it is another network of the same outline, whose parts `listing.py` holds; its head is the mean
and a classifier without bias.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coatnet.config import ModelConfig
from coatnet.errors import ConfigError
from coatnet.layout import BlockSpec, unroll
from coatnet.model.attention import AttentionWeights, Transformer
from coatnet.model.init import init_weights
from coatnet.model.layers import LAYER_NORM_EPS, ConvStem, PatchStem
from coatnet.model.listing import ListingMBConv, ListingStem, ListingTransformer
from coatnet.model.mbconv import MBConv

Block = MBConv | Transformer | ListingMBConv | ListingTransformer
KINDS: dict[tuple[str, str], Callable[[ModelConfig, BlockSpec], Block]] = {
    ("paper", "C"): MBConv,
    ("paper", "T"): Transformer,
    ("listing", "C"): ListingMBConv,
    ("listing", "T"): ListingTransformer,
}


class CoAtNet(nn.Module):
    """One network of the design space: images (B, C, H, W) float -> logits (B, K).

    Any size from 1 x 1 px works: each grid is ceil(n/2) of the one before, and the bias tables are interpolated to
    the grid met. In training each sample's stochastic depth follows `depth_draws`, (B, num_depth_draws) uniform
    numbers in [0, 1), or torch's generator where none are given.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.widths[-1]
        self.activation_checkpointing = False
        self.s0 = _stem(config)
        self.s1, self.s2, self.s3, self.s4 = (_stage(config, stage) for stage in (1, 2, 3, 4))
        listing = config.blocks == "listing"
        self.norm = nn.Identity() if listing else nn.LayerNorm(self.num_features, eps=LAYER_NORM_EPS)
        self.pre_logits = nn.Linear(self.num_features, self.num_features) if config.head == "dense" else None
        self.classifier = nn.Linear(self.num_features, config.num_classes, bias=not listing)
        self.num_depth_draws = sum(block.num_branches for block in self.blocks)
        self.apply(partial(init_weights, style=config.init))

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """S0 .. S4."""
        return (self.s0, self.s1, self.s2, self.s3, self.s4)

    @property
    def blocks(self) -> Iterator[Block]:
        """The blocks of S1 .. S4 in order."""
        for stage in self.stages[1:]:
            yield from stage.children()  # pyright: ignore[reportReturnType]

    @overload
    def forward(self, images: Tensor, depth_draws: Tensor | None = None) -> Tensor: ...
    @overload
    def forward(self, images: Sequence[Tensor], depth_draws: None = None) -> list[Tensor]: ...
    def forward(self, images: Tensor | Sequence[Tensor], depth_draws: Tensor | None = None) -> Tensor | list[Tensor]:
        """Return logits (B, K), or, for tensors of several sizes, the list that separate calls give, in order.

        Raises: ConfigError if the images are not (B, in_channels, H, W) of floats, if the draws are not
        (B, num_depth_draws), or if draws come with a list.
        """
        if isinstance(images, Tensor):
            return self.forward_head(self.forward_features(images, depth_draws))
        if not isinstance(images, list | tuple):
            raise ConfigError(f"Images came as {type(images).__name__}. Give a tensor, or a list of tensors.")
        if depth_draws is not None:
            raise ConfigError("Depth draws came with a list of tensors. Give each tensor its own call.")
        return [self(crop) for crop in images]

    def forward_features(self, images: Tensor, depth_draws: Tensor | None = None) -> Tensor:
        """Return the map of S4: (B, C, H, W) -> (B, num_features, h, w)."""
        return self.forward_intermediates(images, depth_draws)[-1]

    def forward_intermediates(self, images: Tensor, depth_draws: Tensor | None = None) -> list[Tensor]:
        """Return the maps of S0 .. S4, at strides 2, 4, 8, 16 and 32 in the paper's rows."""
        self.check_images(images)
        draws = self._draws(images, depth_draws)
        maps = [self.s0(images)]
        for stage in self.stages[1:]:
            maps.append(self.forward_stage(stage, maps[-1], [next(draws) for _ in stage.children()]))
        return maps

    def forward_stage(self, stage: nn.Module, x: Tensor, draws: Sequence[Tensor | None]) -> Tensor:
        """Pass a map through the blocks of one of S1 .. S4, each with its draws."""
        for block, its_draws in zip(stage.children(), draws, strict=True):
            x = self._run(block, x, its_draws)
        return x

    def forward_head(self, features: Tensor) -> Tensor:
        """Classify a map of S4: its mean over (h, w), then `forward_pooled`: (B, D, h, w) -> (B, K)."""
        return self.forward_pooled(features.mean(dim=(2, 3)))

    def forward_pooled(self, means: Tensor) -> Tensor:
        """Classify S4's means: LayerNorm, Dense + tanh (head "dense"), classifier: (B, D) -> (B, K).

        The listing has the classifier alone.
        """
        pooled = self.norm(means)
        return self.classifier(pooled if self.pre_logits is None else torch.tanh(self.pre_logits(pooled)))

    def check_images(self, images: Tensor) -> None:
        """Raise ConfigError if images are not (B, in_channels, H, W) of floats."""
        channels = self.config.in_channels
        if images.dim() != 4 or images.shape[1] != channels or 0 in images.shape[2:]:
            raise ConfigError(f"Images came as {tuple(images.shape)}. Give (B, {channels}, H, W), H and W 1 or more.")
        if not images.is_floating_point():
            raise ConfigError(f"Images came as {images.dtype}. Give floats, scaled and normalised as in training.")

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """Return the weights of each attention block: (B, M, N, N), rows queries; by windows, (B, windows, M, n, n).

        Raises: ConfigError where no block has weights (layout CCCC, linear attention).
        """
        found: list[Tensor] = []
        keep: Callable[..., None] = lambda _module, _inputs, weights: found.append(weights)  # noqa: E731
        hooks = [m.register_forward_hook(keep) for m in self.modules() if isinstance(m, AttentionWeights)]
        try:
            self.forward_features(images)
        finally:
            for hook in hooks:
                hook.remove()
        if not found:
            raise ConfigError(
                f"{self.config.name} ({self.config.layout}, {self.config.attention} attention) has no attention "
                "weights. Use a network with T stages and global or window attention."
            )
        return found

    def reset_classifier(self, num_classes: int) -> None:
        """Give the network a new classifier for so many classes; everything before it stays."""
        old, has_bias = self.classifier.weight, self.config.blocks == "paper"
        self.config = replace(self.config, num_classes=num_classes)
        self.classifier = nn.Linear(self.num_features, num_classes, has_bias, device=old.device, dtype=old.dtype)
        init_weights(self.classifier, self.config.init)

    def _draws(self, images: Tensor, depth_draws: Tensor | None) -> Iterator[Tensor | None]:
        """Deal each block its columns of the draws."""
        branches = [block.num_branches for block in self.blocks]
        if not self.training or self.config.stochastic_depth_rate == 0:
            return iter([None] * len(branches))
        if depth_draws is None:
            depth_draws = torch.rand(images.shape[0], self.num_depth_draws, device=images.device)
        wanted = (images.shape[0], self.num_depth_draws)
        if depth_draws.shape != wanted:
            raise ConfigError(f"Depth draws came as {tuple(depth_draws.shape)}. Give (B, num_depth_draws), {wanted}.")
        return iter(depth_draws.split(branches, dim=1))

    def _run(self, block: nn.Module, x: Tensor, draws: Tensor | None) -> Tensor:
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return block(x, draws)
        if torch.compiler.is_compiling():
            return checkpoint(block, x, draws, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore
        contexts = partial(_checkpoint_contexts, block)
        return checkpoint(block, x, draws, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)  # pyright: ignore


def _stem(config: ModelConfig) -> nn.Module:
    if config.layout == "vit_rel":
        return PatchStem(config.in_channels, config.widths[0], config.patch_size)
    kind = ListingStem if config.blocks == "listing" else ConvStem
    return kind(config.in_channels, config.widths[0], config.depths[0], config.strides[0], config.batch_norm_momentum)


def _stage(config: ModelConfig, stage: int) -> nn.Sequential:
    specs = [spec for spec in unroll(config) if spec.stage == stage]
    return nn.Sequential(*(KINDS[config.blocks, spec.kind](config, spec) for spec in specs))


def _checkpoint_contexts(block: nn.Module) -> tuple[Any, Any]:
    """Return what surrounds a block's forward and its recomputation."""
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Generator[None]:
    """Run a block again without moving its BatchNorm statistics a second time."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = count
