# SPDX-License-Identifier: MIT
"""The RepVGG family: one table of configurations, the network :class:`RepVGG`, and its larger sibling RepVGGplus.

Stage and block names, hence state_dict keys, are those of the official code, in train form and in deploy form.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from repvgg_cuda import ops
from repvgg_cuda.branches import require
from repvgg_cuda.modules import RepVGGBlock, RepVGGplusBlock
from repvgg_cuda.preparation import prepare
from repvgg_cuda.prepared import Report
from repvgg_cuda.runs import BlockSequence, RepVGGplusStage, run, unrolled
from repvgg_cuda.tuning_cache import Tune

# --------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Config:
    """One row of the family's table (arXiv:2101.03697, tables 2 and 3)."""

    num_blocks: tuple[int, int, int, int]
    width_multiplier: tuple[float, float, float, float]
    groups: int = 1  # of every second layer, from the third on
    use_se: bool = False
    plus: bool = False


_A, _B, _D = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)
_W1, _W2, _W25, _W3 = (1, 1, 1, 2.5), (2, 2, 2, 4), (2.5, 2.5, 2.5, 5), (3, 3, 3, 5)

CONFIGS: Mapping[str, Config] = {
    "RepVGG-A0": Config(_A, (0.75, 0.75, 0.75, 2.5)),
    "RepVGG-A1": Config(_A, _W1),
    "RepVGG-A2": Config(_A, (1.5, 1.5, 1.5, 2.75)),
    "RepVGG-B0": Config(_B, _W1),
    "RepVGG-B1": Config(_B, _W2),
    "RepVGG-B1g2": Config(_B, _W2, groups=2),
    "RepVGG-B1g4": Config(_B, _W2, groups=4),
    "RepVGG-B2": Config(_B, _W25),
    "RepVGG-B2g2": Config(_B, _W25, groups=2),
    "RepVGG-B2g4": Config(_B, _W25, groups=4),
    "RepVGG-B3": Config(_B, _W3),
    "RepVGG-B3g2": Config(_B, _W3, groups=2),
    "RepVGG-B3g4": Config(_B, _W3, groups=4),
    "RepVGG-D2se": Config(_D, _W25, use_se=True),
    "RepVGGplus-L2pse": Config(_D, _W25, use_se=True, plus=True),
}

#: Layers with groups in the g2 and g4 models: every second one, counted from the stem, which is layer 0.
_GROUPED_LAYERS = range(2, 27, 2)


class BlockPlan(NamedTuple):
    """The geometry of one block."""

    in_channels: int
    out_channels: int
    stride: int
    groups: int


def _plan(
    num_blocks: Sequence[int],
    width_multiplier: Sequence[float] | None,
    groups_map: Mapping[int, int] | None,
    in_channels: int,
) -> list[list[BlockPlan]]:
    """The blocks of stages 0 (the stem) to 4. Each stage begins with stride 2."""
    width = width_multiplier or ()
    require(
        len(num_blocks) == 4 and all(n >= 1 for n in num_blocks),
        f"num_blocks must hold four numbers of at least 1, got {list(num_blocks)}",
    )
    require(
        len(width) == 4 and all(w > 0 for w in width),
        f"width_multiplier must hold four positive numbers, got {list(width)}",
    )
    require(in_channels >= 1, f"in_channels must be at least 1, got {in_channels}")
    groups_map = groups_map or {}
    depth = 1 + sum(num_blocks)
    require(
        all(1 <= layer < depth for layer in groups_map),
        f"override_groups_map must name layers 1 to {depth - 1}, counted after the stem, got {sorted(groups_map)}",
    )
    scaled = [int(base * w) for base, w in zip((64, 128, 256, 512), width, strict=True)]
    require(min(scaled) >= 1, f"width_multiplier leaves a stage without channels: {list(width)}")
    channels = [min(64, scaled[0]), *scaled]
    stages: list[list[BlockPlan]] = []
    layer, previous = 0, in_channels
    for count, out_channels in zip((1, *num_blocks), channels, strict=True):
        stage = []
        for i in range(count):
            stage.append(BlockPlan(previous, out_channels, 1 if i else 2, groups_map.get(layer, 1)))
            layer, previous = layer + 1, out_channels
        stages.append(stage)
    return stages


class FeatureInfo(NamedTuple):
    """One feature map of a ``features_only`` model: ``[N, channels, ceil(H / reduction), ceil(W / reduction)]``."""

    stage: int
    channels: int
    reduction: int


# ----------------------------------------------------------------------------------------------------------- networks


class _Network(nn.Module):
    """What RepVGG and RepVGGplus share. A network is a chain of *segments*, runs of blocks; a stage is one or two."""

    #: Each segment's name and the stage it belongs to.
    SEGMENTS: ClassVar[tuple[tuple[str, int], ...]]
    #: Classifiers that only training uses, named after the segment whose output they read.
    AUXILIARY_HEADS: ClassVar[tuple[str, ...]] = ()

    gap: nn.AdaptiveAvgPool2d
    linear: nn.Linear

    def __init__(
        self,
        plan: Sequence[Sequence[BlockPlan]],
        num_classes: int,
        features_only: bool,
        out_indices: Iterable[int] | None,
    ) -> None:
        super().__init__()
        require(num_classes >= 1, f"num_classes must be at least 1, got {num_classes}")
        require(
            features_only or out_indices is None,
            "out_indices selects the feature maps of a backbone: it needs features_only=True",
        )
        last = len(plan) - 1
        indices = (tuple(range(last + 1)) if features_only else (last,)) if out_indices is None else tuple(out_indices)
        require(
            len(indices) >= 1 and list(indices) == sorted(set(indices)) and set(indices) <= set(range(last + 1)),
            f"out_indices must be distinct stages from 0 to {last} in ascending order, got {list(indices)}",
        )
        self.num_classes, self.features_only = num_classes, features_only
        self.out_indices = indices
        #: One entry per feature map that :meth:`forward_features` returns.
        self.feature_info = tuple(FeatureInfo(i, plan[i][-1].out_channels, 2 ** (i + 1)) for i in indices)
        # No stage beyond the last feature map: parameters that are never used would stop DistributedDataParallel.
        self._segments = tuple((name, stage) for name, stage in self.SEGMENTS if stage <= indices[-1])
        if not features_only:
            self.gap = nn.AdaptiveAvgPool2d(1)
            self.linear = nn.Linear(plan[last][-1].out_channels, num_classes)

    def blocks(self) -> list[RepVGGBlock]:
        """Every block, the stem first."""
        return [module for module in self.modules() if isinstance(module, RepVGGBlock)]

    @property
    def deploy(self) -> bool:
        """True if every block is in deploy form."""
        return all(block.deploy for block in self.blocks())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns ``use_checkpoint`` on or off."""
        for module in self.modules():
            if isinstance(module, BlockSequence):
                module.use_checkpoint = enable

    def custom_l2(self) -> Tensor:
        """The sum of :meth:`RepVGGBlock.custom_l2` over the blocks, a scalar to be added to the loss in training."""
        return torch.stack([block.custom_l2() for block in self.blocks()]).sum()

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The feature maps of the stages in ``out_indices``, each ``[N, C, P, Q]`` as ``feature_info`` says."""
        features: dict[int, Tensor] = {}
        blocks: list[nn.Module] = []
        for i, (segment, stage) in enumerate(self._segments):
            blocks.extend(unrolled(getattr(self, segment)))
            ends = i + 1 == len(self._segments) or self._segments[i + 1][1] != stage
            if ends and stage in self.out_indices:
                x = features[stage] = run(blocks, x)
                blocks = []
        return list(features.values())

    def prepare(
        self, example: Tensor | Sequence[Any] | None = None, *, memory: ops.Memory = "fast", tune: Tune = False
    ) -> Report:
        """:func:`repvgg_cuda.prepare` of this network: packs its weights, and runs whole stretches of blocks as one.

        A stretch ends where a feature map is asked for, and at blocks that are more than a convolution and a ReLU.
        """
        return prepare(self, example, memory=memory, tune=tune)

    def forward_head(self, x: Tensor) -> Tensor:
        """The last feature map -> logits ``[N, num_classes]``."""
        logits: Tensor = self.linear(self.gap(x).flatten(1))
        return logits

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A backbone takes a whole checkpoint of its network: the head and the stages it does not have are passed over.
        if self.features_only:
            absent = {name for name, _ in self.SEGMENTS} - {name for name, _ in self._segments}
            absent |= {"linear", *self.AUXILIARY_HEADS}
            for key in list(state_dict):
                if key.startswith(prefix) and key.removeprefix(prefix).split(".")[0] in absent:
                    del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


class RepVGG(_Network):
    """RepVGG (arXiv:2101.03697): a stem and four stages of :class:`RepVGGBlock`, average pooling, a linear classifier.

    Args:
        num_blocks: blocks of stages 1 to 4.
        num_classes: width of the classifier.
        width_multiplier: of the 64, 128, 256, 512 channels of stages 1 to 4.
        override_groups_map: groups by layer number; the stem is layer 0 and has none.
        deploy: build the deployed form at once.
        use_se: squeeze-and-excitation in every block.
        use_checkpoint: in training, recompute activations in the backward pass instead of keeping them. BatchNorms then
            see each batch twice, so their running statistics move faster.
        in_channels: of the input.
        features_only: return the feature maps of ``out_indices`` (default: all five) instead of logits, for use as a
            backbone. There is then no classifier and no stage beyond the last one asked for; ``load_state_dict`` passes
            over the tensors of those, so that a whole checkpoint loads. ``feature_info`` says the channels.

    ``forward``: ``[N, in_channels, H, W]``, any ``H >= 1`` and ``W >= 1``, -> logits ``[N, num_classes]``, or a list of
    ``[N, C, P, Q]``, the size halved (rounded up) at each stage. The stages are ``stage0`` (the stem) to ``stage4``.

    Raises:
        RuntimeError: an argument is out of range; the message names it.
    """

    SEGMENTS = tuple((f"stage{i}", i) for i in range(5))

    def __init__(
        self,
        num_blocks: Sequence[int],
        num_classes: int = 1000,
        width_multiplier: Sequence[float] | None = None,
        override_groups_map: Mapping[int, int] | None = None,
        deploy: bool = False,
        use_se: bool = False,
        use_checkpoint: bool = False,
        *,
        in_channels: int = 3,
        features_only: bool = False,
        out_indices: Iterable[int] | None = None,
    ) -> None:
        plan = _plan(num_blocks, width_multiplier, override_groups_map, in_channels)
        super().__init__(plan, num_classes, features_only, out_indices)
        for segment, stage in self._segments:
            blocks = [
                RepVGGBlock(c_in, c_out, stride=stride, groups=groups, deploy=deploy, use_se=use_se)
                for c_in, c_out, stride, groups in plan[stage]
            ]
            self.add_module(segment, BlockSequence(blocks, use_checkpoint) if stage else blocks[0])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        features = self.forward_features(x)
        return features if self.features_only else self.forward_head(features[-1])


class RepVGGplus(_Network):
    """RepVGGplus: RepVGG with SE after the ReLU and, in training, three auxiliary classifiers.

    Arguments as for :class:`RepVGG`, with ``use_post_se`` for ``use_se``; stage 3 is split in two: it needs two blocks.

    ``forward``: as :class:`RepVGG`; but in training mode, in train form, a dict of logits as in the official code:
    ``"main"``, ``"stage1_aux"``, ``"stage2_aux"``, ``"stage3_first_aux"``. In eval mode the auxiliary classifiers do
    not run, and the deployed form does not have them. The "L2" of RepVGGplus-L2pse is a penalty that its training adds:
    :meth:`custom_l2`.
    """

    SEGMENTS = (("stage0", 0), ("stage1", 1), ("stage2", 2), ("stage3_first", 3), ("stage3_second", 3), ("stage4", 4))
    AUXILIARY_HEADS = ("stage1_aux", "stage2_aux", "stage3_first_aux")

    def __init__(
        self,
        num_blocks: Sequence[int],
        num_classes: int = 1000,
        width_multiplier: Sequence[float] | None = None,
        override_groups_map: Mapping[int, int] | None = None,
        deploy: bool = False,
        use_post_se: bool = False,
        use_checkpoint: bool = False,
        *,
        in_channels: int = 3,
        features_only: bool = False,
        out_indices: Iterable[int] | None = None,
    ) -> None:
        plan = _plan(num_blocks, width_multiplier, override_groups_map, in_channels)
        require(len(plan[3]) >= 2, f"num_blocks[2] must be at least 2, since stage 3 is split, got {len(plan[3])}")
        super().__init__(plan, num_classes, features_only, out_indices)
        half = len(plan[3]) // 2
        split = {"stage3_first": plan[3][:half], "stage3_second": plan[3][half:]}
        for segment, stage in self._segments:
            blocks = [
                RepVGGplusBlock(c_in, c_out, stride=stride, groups=groups, deploy=deploy, use_post_se=use_post_se)
                for c_in, c_out, stride, groups in split.get(segment, plan[stage])
            ]
            self.add_module(segment, RepVGGplusStage(blocks, use_checkpoint) if stage else blocks[0])
        if not deploy and not features_only:
            for head in self.AUXILIARY_HEADS:
                channels = plan[dict(self.SEGMENTS)[head.removesuffix("_aux")]][-1].out_channels
                self.add_module(head, _auxiliary_head(channels, num_classes))

    def drop_auxiliary_heads(self) -> list[str]:
        """Removes the classifiers that only training uses. Returns the names of those removed."""
        dropped = [name for name in self.AUXILIARY_HEADS if hasattr(self, name)]
        for name in dropped:
            delattr(self, name)
        return dropped

    def forward(self, x: Tensor) -> Tensor | list[Tensor] | dict[str, Tensor]:
        if self.training and all(hasattr(self, name) for name in self.AUXILIARY_HEADS):
            return self._forward_train(x)
        features = self.forward_features(x)
        return features if self.features_only else self.forward_head(features[-1])

    def _forward_train(self, x: Tensor) -> dict[str, Tensor]:
        auxiliary: dict[str, Tensor] = {}
        for segment, _ in self._segments:
            x = getattr(self, segment)(x)
            if f"{segment}_aux" in self.AUXILIARY_HEADS:
                auxiliary[f"{segment}_aux"] = getattr(self, f"{segment}_aux")(x)
        return {"main": self.forward_head(x), **auxiliary}


def _auxiliary_head(channels: int, num_classes: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
    downsample = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels), relu=nn.ReLU()))
    return nn.Sequential(downsample, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


# ------------------------------------------------------------------------------------------------------------ by name


def model_names() -> list[str]:
    """The names that :func:`create_model` takes: "RepVGG-A0", ..., "RepVGG-D2se", "RepVGGplus-L2pse"."""
    return list(CONFIGS)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    deploy: bool = False,
    features_only: bool = False,
    out_indices: Iterable[int] | None = None,
    use_checkpoint: bool = False,
) -> RepVGG | RepVGGplus:
    """A network of the family with fresh weights; the arguments are those of :class:`RepVGG`.

    Raises:
        RuntimeError: there is no model ``name`` (the message lists them), or an argument is out of range.
    """
    if name not in CONFIGS:
        by_lower = {known.lower(): known for known in CONFIGS}
        close = difflib.get_close_matches(name.lower(), by_lower, n=1)
        hint = f"did you mean '{by_lower[close[0]]}'? " if close else ""
        raise RuntimeError(f"create_model: there is no model '{name}'; {hint}the names are {', '.join(CONFIGS)}")
    config = CONFIGS[name]
    return (RepVGGplus if config.plus else RepVGG)(
        config.num_blocks,
        num_classes,
        config.width_multiplier,
        {layer: config.groups for layer in _GROUPED_LAYERS} if config.groups > 1 else None,
        deploy,
        config.use_se,
        use_checkpoint,
        in_channels=in_channels,
        features_only=features_only,
        out_indices=out_indices,
    )
