# SPDX-License-Identifier: MIT
"""One block of a state_dict, read from its keys: shapes are checked when it is made, values when it is folded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from repvgg_cuda.branches import FLOAT_DTYPES, BatchNorm, Branch, Branches, dtype_name, require, shape_name
from repvgg_cuda.ops import fuse_weights
from repvgg_cuda.zoo import BARE_BN, BlockKeys, Layout, Slot, Zoo, some

Load = Callable[[str], Tensor]

#: RepViT's classifiers, ``head`` or ``classifier``, each a BatchNorm before a linear layer, and one more if distilled.
HEAD_KEY = re.compile(r"(?P<prefix>(?:.*\.)?(head|classifier)\.)(?P<path>\2(?:_dist)?)\.(?:bn|l)\..+")

_BN_NAMES = ("weight", "bias", "running_mean", "running_var")


class Output(NamedTuple):
    """One tensor to be written: the one of ``source`` as it is, or ``weight`` or ``bias`` of a folded block."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    part: Literal["as it is", "weight", "bias"] = "as it is"


class Fold:
    """What becomes one convolution, or one linear layer.

    ``keys``: of the tensors that go into it; ``name`` for messages; ``counted``: it is a block with branches.
    """

    def __init__(self, prefix: str, eps: float, counted: bool) -> None:
        self.prefix, self.eps, self.counted = prefix, eps, counted
        self.name = prefix.removesuffix(".") or "the model itself"
        self.keys: tuple[str, ...] = ()

    def like(self) -> tuple[str, Tensor, tuple[int, ...]]:
        """Where the result lies, a tensor of its dtype, and the shape of its weight."""
        raise NotImplementedError

    def run(self, load: Load) -> tuple[Tensor, Tensor]:
        """``(weight, bias)``. Raises RuntimeError for values that no training leaves."""
        raise NotImplementedError

    def outputs(self) -> list[Output]:
        """Weight and bias, under the names of the zoo."""
        where, like, shape = self.like()
        return [
            Output(f"{where}weight", shape, like.dtype, self.prefix, "weight"),
            Output(f"{where}bias", shape[:1], like.dtype, self.prefix, "bias"),
        ]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


class _BranchKeys(NamedTuple):
    """One branch: the keys of its tensors inside the block; ``bn`` is where its BatchNorm lies."""

    kernel: str | None
    bias: str | None
    bn: str | None


class _Reader:
    """Takes the keys of one block apart, branch by branch; what is ``left`` no such block has."""

    def __init__(self, prefix: str, name: str, block: BlockKeys, tensors: Mapping[str, Tensor]) -> None:
        self.prefix, self.name, self.block, self.tensors, self.left = prefix, name, block, tensors, dict(tensors)

    def take(self, key: str) -> str:
        require(key in self.left, f"{self.prefix}{key} is missing: {self.name} is not a complete {self.block.name}")
        del self.left[key]
        return key

    def take_batchnorm(self, path: str) -> str:
        """Both or none of weight and bias (``affine=False``)."""
        self.left.pop(_join(path, "num_batches_tracked"), None)
        affine = any(_join(path, name) in self.left for name in ("weight", "bias"))
        for name in _BN_NAMES if affine else _BN_NAMES[2:]:
            self.take(_join(path, name))
        return path

    def take_slot(self, slot: Slot) -> list[_BranchKeys]:
        pattern = re.compile(rf"({slot.path})\." if slot.path else "()")
        paths = list(dict.fromkeys(match[1] for key in self.left if (match := pattern.match(key))))
        if not paths and slot.required:
            first = slot.path.replace(r"\d+", "0").replace("\\", "")
            self.take(_join(first, slot.layouts[0].conv or "", "weight"))
        return [self._take_branch(path, slot) for path in paths]

    def _take_branch(self, path: str, slot: Slot) -> _BranchKeys:
        def fits(layout: Layout) -> bool:
            return _join(path, layout.conv or layout.bn or "", "weight") in self.left

        layout = next((each for each in slot.layouts if fits(each)), slot.layouts[0])
        if layout.conv is None:
            return _BranchKeys(None, None, self.take_batchnorm(_join(path, layout.bn or "")))
        kernel, bias = self.take(_join(path, layout.conv, "weight")), _join(path, layout.conv, "bias")
        value = self.tensors[kernel]
        sizes = " or ".join(f"[C_out, C_in / groups, {size}, {size}]" for size in slot.sizes)
        require(
            value.dim() == 4 and value.shape[2] == value.shape[3] and value.shape[2] in slot.sizes,
            f"{self.prefix}{kernel} must be {sizes}, got {shape_name(value)}; only blocks of 3x3 and 1x1 branches can "
            "be folded",
        )
        if layout.bias:
            self.take(bias)
        has_bias = layout.bias or (layout.bias is None and self.left.pop(bias, None) is not None)
        bn = None if layout.bn is None else self.take_batchnorm(_join(path, layout.bn))
        return _BranchKeys(kernel, bias if has_bias else None, bn)


class BlockFold(Fold):
    """A block of branches, spelled as ``block`` says. ``tensors``: by their keys inside it, all that the fold takes in.

    Raises:
        RuntimeError: a tensor is missing, unknown or of the wrong shape; or the keys do not say whether there is an
            identity branch.
    """

    def __init__(self, zoo: Zoo, prefix: str, block: BlockKeys, tensors: Mapping[str, Tensor], eps: float) -> None:
        super().__init__(prefix, eps, counted=not block.companion)
        self._zoo, self._block, self._tensors = zoo, block, tensors
        reader = _Reader(prefix, self.name, block, tensors)
        self._branches = [branch for slot in block.slots for branch in reader.take_slot(slot)]
        kernels = [branch.kernel for branch in self._branches if branch.kernel is not None]
        self._first = tensors[kernels[0]]
        self._size = max(tensors[kernel].shape[2] for kernel in kernels)
        self._out, self._in_per_group = self._first.shape[:2]
        where = block.post_bn
        has_post_bn = where is not None and _join(where, "running_mean") in reader.left
        self._post_bn = reader.take_batchnorm(where) if where is not None and has_post_bn else None
        if len(kernels) == len(self._branches) and self._has_bare_identity():
            self._branches.append(_BranchKeys(None, None, None))
        # [C_out, C_in / groups, 3, 3] leaves groups open. The fold asks for them only to place the ones of an identity,
        # and then C_in = C_out settles them; without an identity every consistent answer folds alike, and 1 is one.
        has_identity = len(kernels) < len(self._branches)
        self._groups = self._out // max(self._in_per_group, 1) if has_identity else 1
        require(
            not reader.left,
            f"{self.name} has tensors that no {block.name} has ({some(reader.left)}); folding its branches "
            "without them would change what it computes",
        )
        keeps = f"{where}." if block.keeps_post_bn else None
        self.keys = tuple(prefix + key for key in tensors if keeps is None or not key.startswith(keeps))
        self._check_shapes(has_identity)

    # -------------------------------------------------------------------------------------------------- identity

    def _has_unit_stride(self) -> bool | None:
        """By the block's name; None: it does not say."""
        if re.fullmatch(self._zoo.strided, self.name):
            return False
        return True if re.fullmatch(self._zoo.unit_stride, self.name) else None

    def _has_bare_identity(self) -> bool:
        """Whether a block without the keys of an identity has one all the same; raises where that is not known."""
        if self._block.identity == "always":
            return True
        stride_1, narrow = self._has_unit_stride(), max(self._in_per_group, 1)
        channels_agree = self._zoo.same_channels or self._out == narrow
        if self._block.identity == "by name":
            require(
                stride_1 is not None or self._out % narrow != 0,
                f"{self.name} may have as many output as input channels, and its keys do not say whether it has an "
                "identity branch, which depends on its stride and groups; build the model and convert that: "
                "repvgg_cuda.reparameterize(model)",
            )
            return bool(stride_1) and channels_agree
        identity = self._block.slots[-1]
        require(
            not (stride_1 and channels_agree and identity.layouts == (BARE_BN,)),
            f"{self.prefix}{identity.path}.weight is missing: by its name {self.name} has stride 1 and it has as many "
            f"output as input channels, where {self._zoo.title} has an identity branch",
        )
        return False

    # ---------------------------------------------------------------------------------------------------- shapes

    def _check_shapes(self, has_identity: bool) -> None:
        """Every tensor against the first kernel, by name: the fold's own messages know only positions."""
        for branch in self._branches:
            if branch.kernel is not None:
                size = self._tensors[branch.kernel].shape[2]
                self._check(branch.kernel, (self._out, self._in_per_group, size, size))
            if branch.bias is not None:
                self._check(branch.bias, (self._out,))
        for path in [branch.bn for branch in self._branches] + [self._post_bn]:
            for name in _BN_NAMES:
                if path is not None and (key := _join(path, name)) in self._tensors:
                    self._check(key, (self._out,))
        channels = self._groups * self._in_per_group
        require(
            channels == self._out or not has_identity,
            f"{self.name} cannot be folded: it has an identity branch, which needs in_channels == out_channels, "
            f"got {channels} and {self._out}",
        )

    def _check(self, key: str, shape: tuple[int, ...]) -> None:
        value, sizes = self._tensors[key], ", ".join(map(str, shape))
        require(
            value.dtype in FLOAT_DTYPES,
            f"{self.name} cannot be folded: {self.prefix}{key} must be float64, float32, float16 or bfloat16, got "
            f"{dtype_name(value.dtype)}",
        )
        require(
            tuple(value.shape) == shape,
            f"{self.prefix}{key} must be [{sizes}] to fit the other tensors of {self.name}, got {shape_name(value)}",
        )
        require(value.numel() > 0, f"{self.prefix}{key} is empty ({shape_name(value)})")

    # ------------------------------------------------------------------------------------------------------ fold

    def like(self) -> tuple[str, Tensor, tuple[int, ...]]:
        where = self.prefix + (f"{self._block.deployed}." if self._block.deployed else "")
        return where, self._first, (self._out, self._in_per_group, self._size, self._size)

    def run(self, load: Load) -> tuple[Tensor, Tensor]:
        branches = self._read(load)
        try:
            weight, bias = fuse_weights(branches)
        except RuntimeError as error:
            raise RuntimeError(f"{self.name} cannot be folded: {error}") from error
        if self._size == 1:
            weight = weight[:, :, 1:2, 1:2].contiguous()  # the other taps of a sum of 1x1 kernels are zeros
        return weight, bias

    def _read(self, load: Load) -> Branches:
        def get(key: str) -> Tensor:
            return _checked(self.prefix + key, load(self.prefix + key).detach())

        def get_affine(key: str) -> Tensor | None:
            return get(key) if key in self._tensors else None

        def batchnorm(path: str | None) -> BatchNorm | None:
            if path is None:
                return None
            weight, bias = get_affine(_join(path, "weight")), get_affine(_join(path, "bias"))
            return BatchNorm(get(_join(path, "running_mean")), get(_join(path, "running_var")), self.eps, weight, bias)

        parts = tuple(
            Branch(None if kernel is None else get(kernel), None if bias is None else get(bias), batchnorm(bn))
            for kernel, bias, bn in self._branches
        )
        post_bn = None if self._block.keeps_post_bn else batchnorm(self._post_bn)
        return Branches(parts, self._groups * self._in_per_group, self._out, self._groups, post_bn)


class HeadFold(Fold):
    """RepViT's classifier: BatchNorm, then linear; the mean of two such if it was distilled. Becomes one linear layer.

    ``tensors``: by their whole keys.
    """

    _NAMES = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "l.weight", "l.bias")

    def __init__(self, prefix: str, tensors: Mapping[str, Tensor], eps: float) -> None:
        super().__init__(prefix, eps, counted=False)
        self.keys = tuple(tensors)
        self._paths = sorted({prefix + match["path"] for key in tensors if (match := HEAD_KEY.fullmatch(key))})
        for key in (f"{path}.{name}" for path in self._paths for name in self._NAMES):
            require(key in tensors, f"{key} is missing: {self.name} is not a complete RepViT classifier")
        self._weight = tensors[f"{self._paths[0]}.l.weight"]
        require(
            self._weight.dim() == 2, f"{self._paths[0]}.l.weight must be [classes, C], got {shape_name(self._weight)}"
        )
        classes, channels = self._weight.shape
        for path in self._paths:
            for name in self._NAMES:
                shape = (classes, channels) if name == "l.weight" else (classes if name == "l.bias" else channels,)
                value = tensors[f"{path}.{name}"]
                require(
                    tuple(value.shape) == shape and value.dtype in FLOAT_DTYPES and value.numel() > 0,
                    f"{path}.{name} must be {list(shape)} of floating point, got {shape_name(value)} of "
                    f"{dtype_name(value.dtype)}",
                )

    def like(self) -> tuple[str, Tensor, tuple[int, ...]]:
        return self.prefix, self._weight, tuple(self._weight.shape)

    def run(self, load: Load) -> tuple[Tensor, Tensor]:
        weights, biases = [], []
        for path in self._paths:
            keys = [f"{path}.{name}" for name in self._NAMES]
            gamma, beta, mean, var, weight, bias = (_checked(key, load(key).detach()).double() for key in keys)
            scale = gamma / torch.sqrt(var + self.eps)
            weights.append(weight * scale)
            biases.append(bias + weight @ (beta - mean * scale))
        weight, bias = torch.stack(weights).mean(0), torch.stack(biases).mean(0)
        return weight.to(self._weight.dtype), bias.to(self._weight.dtype)


def _checked(key: str, value: Tensor) -> Tensor:
    """``value``, unless it holds what no training leaves, and what a BatchNorm would turn into NaN without a word."""
    lowest, highest = map(float, value.aminmax())  # NaN if there is any
    bad = next((each for each in (lowest, highest) if not math.isfinite(each)), None)
    require(bad is None, f"{key} holds {bad}: the checkpoint is damaged, or its training diverged")
    require(
        lowest >= 0 or not key.endswith("running_var"),
        f"{key} holds {lowest:g}, and a variance is at least 0: the checkpoint is damaged",
    )
    return value
