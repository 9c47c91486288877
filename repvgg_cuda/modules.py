# SPDX-License-Identifier: MIT
"""The layers: :class:`RepVGGBlock` to train and :class:`RepConv3x3` to deploy.

Attribute names and state_dict keys are those of the official RepVGG code, in train form and in deploy form.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from repvgg_cuda import ops
from repvgg_cuda.branches import Branches, require
from repvgg_cuda.prepared import PreparedWeights, Report, prepare_alone
from repvgg_cuda.reference import ACTIVATIONS, output_format
from repvgg_cuda.structure import pair, read_branches, refuse_hooks
from repvgg_cuda.tuning_cache import Tune


class RepConv3x3(nn.Module):
    """3x3 convolution with zero padding 1, its bias and its activation in one operator: a deployed block.

    Args:
        in_channels, out_channels, groups, bias, device, dtype: as for ``nn.Conv2d``, initialised alike.
        stride: 1 or 2.
        activation: ``"identity"`` or ``"relu"``.
        algorithm: ``"auto"`` or a name from :func:`repvgg_cuda.algorithms`; may be set later.

    ``forward``: ``[N, C_in, H, W] -> [N, C_out, (H - 1) // stride + 1, (W - 1) // stride + 1]``. state_dict keys:
    ``weight`` ``[C_out, C_in / groups, 3, 3]`` and ``bias`` ``[C_out]``.

    Raises:
        RuntimeError: an argument is out of range; the message names it.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    #: Set by :meth:`prepare`. An attribute of the class for layers pickled before there was one.
    prepared: PreparedWeights | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        activation: ops.Activation = "identity",
        algorithm: str = "auto",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(
            in_channels >= 1
            and out_channels >= 1
            and groups >= 1
            and in_channels % groups == out_channels % groups == 0,
            f"RepConv3x3: groups must divide in_channels and out_channels, got groups={groups}, "
            f"in_channels={in_channels}, out_channels={out_channels}",
        )
        require(stride in (1, 2), f"RepConv3x3: stride must be 1 or 2, got {stride}; use nn.Conv2d for other strides")
        require(
            activation in ACTIVATIONS,
            f"RepConv3x3: activation must be one of {', '.join(ACTIVATIONS)}, got '{activation}'",
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride, self.groups = stride, groups
        self.activation: ops.Activation = activation
        self.algorithm = algorithm
        shape = (out_channels, in_channels // groups, 3, 3)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        empty_bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", empty_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights and biases from the distributions of ``nn.Conv2d``."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(9 * self.in_channels // self.groups)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv3x3(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            groups=self.groups,
            activation=self.activation,
            algorithm=self.algorithm,
            packed=self.packed_for(x.shape),
        )

    def prepare(
        self, example: Tensor | Sequence[int] | None = None, *, memory: ops.Memory = "fast", tune: Tune = False
    ) -> Report:
        """Packs the weight once, for the forwards in eval mode to come. Packed weights are never saved or copied.

        They are made again by the next forward where the weight has changed since. Graphs of ``torch.compile`` and
        ``torch.export`` do not ask: they raise where they see the change. Prepare before compiling.

        Args:
            example: an input, or its size ``[N, C_in, H, W]``, for which the algorithm is chosen; other sizes run on
                it too. None: the first forward decides.
            memory: ``"low"`` chooses among the algorithms whose packed weights are no larger than the weight.
            tune: choose by measuring, as for :func:`repvgg_cuda.prepare`, instead of by prediction.
        Returns:
            What was chosen among what. Print it.
        Raises:
            RuntimeError: the layer is in training mode, or does not fit ``example``.
        """
        return prepare_alone(self, example, memory, tune)

    def packed_for(self, input_size: Sequence[int]) -> Tensor | None:
        """Packed weights for an input of that size; None in training mode and without :meth:`prepare`."""
        return None if self.prepared is None or self.training else self.prepared.packed_for(self, input_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RepConv3x3:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.prepared is not None:
            self.prepared.drop()  # .to(), .half(), .cuda(): a new weight may even lie where the old one lay
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.prepared is not None and self.prepared.packed is not None and not self.weight.is_meta:
            self.packed_for(self.prepared.input_size or ())  # now: a compiled graph would not ask

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, stride={self.stride}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.activation != "identity":
            text += f", activation={self.activation}"
        if self.algorithm != "auto":
            text += f", algorithm={self.algorithm}"
        return text

    @classmethod
    @torch.no_grad()
    def from_branches(
        cls,
        branches: Branches,
        *,
        stride: int = 1,
        activation: ops.Activation = "identity",
        dtype: torch.dtype | None = None,
    ) -> RepConv3x3:
        """The deployed form of a block, by :func:`repvgg_cuda.fuse_weights`; shares no memory with ``branches``.

        Weight and bias get ``dtype`` (default: that of the first kernel), the device of the branches and the memory
        format of the 3x3 kernel. They require gradients if any parameter of the branches did: frozen stays frozen.
        """
        weight, bias = ops.fuse_weights(branches, dtype=dtype)
        kernels = [part.kernel for part in branches.parts if part.kernel is not None and part.kernel.shape[2] == 3]
        if kernels:
            weight = weight.contiguous(memory_format=output_format(kernels[0]))
        trainable = any(tensor.requires_grad for tensor in branches.tensors())
        conv = cls(
            branches.in_channels,
            branches.out_channels,
            stride=stride,
            groups=branches.groups,
            activation=activation,
            device="meta",  # no memory and no random numbers for weights that are replaced at once
        )
        conv.weight = nn.Parameter(weight, requires_grad=trainable)
        conv.bias = nn.Parameter(bias, requires_grad=trainable)
        return conv


# ------------------------------------------------------------------------------------------------------------- blocks


class SEBlock(nn.Module):
    """Squeeze-and-excitation (arXiv:1709.01507): scales each channel by a gate computed from the channels' means.

    ``[N, C, H, W] -> [N, C, H, W]`` for any H and W. Keys as in the official code: ``down`` and ``up``.
    """

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden_channels, kernel_size=1)
        self.up = nn.Conv2d(hidden_channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        gate: Tensor = torch.sigmoid(self.up(torch.relu(self.down(mean))))
        return x * gate


def _conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


def _check_block_arguments(kernel_size: object, stride: object, padding: object, dilation: object, mode: str) -> int:
    """The stride as an int. Raises RuntimeError for a geometry that train and deploy form could not share."""
    require(
        pair("RepVGGBlock: kernel_size", kernel_size) == (3, 3),
        f"RepVGGBlock: kernel_size must be 3, got {kernel_size}",
    )
    require(
        pair("RepVGGBlock: padding", padding) == pair("RepVGGBlock: dilation", dilation),
        f"RepVGGBlock: padding must equal dilation, so that the branches line up, got padding={padding} and "
        f"dilation={dilation}",
    )
    require(
        pair("RepVGGBlock: dilation", dilation) == (1, 1),
        f"RepVGGBlock: dilation must be 1, got {dilation}; the deployed 3x3 operator has no dilation",
    )
    require(
        mode == "zeros",
        f"RepVGGBlock: padding_mode must be 'zeros', got '{mode}'; the deployed 3x3 operator pads with zeros",
    )
    strides = pair("RepVGGBlock: stride", stride)
    require(
        strides in ((1, 1), (2, 2)),
        f"RepVGGBlock: stride must be 1 or 2, the same in both directions, got {stride}",
    )
    return strides[0]


class RepVGGBlock(nn.Module):
    """The RepVGG block (arXiv:2101.03697, sec. 3.2): ``ReLU(SE(BN(conv3x3(x)) + BN(conv1x1(x)) + BN(x)))``.

    Args:
        in_channels, out_channels, groups: as for ``nn.Conv2d``.
        kernel_size, padding, dilation, padding_mode: there for callers of the official code; only 3, 1, 1 and
            ``"zeros"``, which is what the deployed form computes.
        stride: 1 or 2. The identity branch exists where stride is 1 and ``in_channels == out_channels``.
        deploy: build the deployed form (``rbr_reparam``) at once.
        use_se: squeeze-and-excitation before the ReLU, with ``out_channels // 16`` hidden channels.

    ``forward``: ``[N, C_in, H, W] -> [N, C_out, (H - 1) // stride + 1, (W - 1) // stride + 1]``. state_dict keys:
    ``rbr_dense.{conv,bn}``, ``rbr_1x1.{conv,bn}``, ``rbr_identity``, ``se.{down,up}``; deployed: ``rbr_reparam``.

    Raises:
        RuntimeError: the geometry is one that the deployed form cannot have; the message names the argument.
    """

    rbr_dense: nn.Sequential
    rbr_1x1: nn.Sequential
    rbr_identity: nn.BatchNorm2d | None
    rbr_reparam: RepConv3x3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        deploy: bool = False,
        use_se: bool = False,
    ) -> None:
        super().__init__()
        step = _check_block_arguments(kernel_size, stride, padding, dilation, padding_mode)
        require(
            not use_se or out_channels >= 16,
            f"RepVGGBlock: use_se needs out_channels >= 16 (a sixteenth of them are hidden), got {out_channels}",
        )
        self.se: nn.Module = SEBlock(out_channels, out_channels // 16) if use_se else nn.Identity()
        self.nonlinearity: nn.Module = nn.ReLU()
        if deploy:
            self.install(RepConv3x3(in_channels, out_channels, stride=step, groups=groups))
            return
        self.rbr_dense = _conv_bn(in_channels, out_channels, 3, step, groups)
        self.rbr_1x1 = _conv_bn(in_channels, out_channels, 1, step, groups)
        has_identity = in_channels == out_channels and step == 1
        self.rbr_identity = nn.BatchNorm2d(out_channels) if has_identity else None

    @property
    def deploy(self) -> bool:
        """True once the branches are folded into ``rbr_reparam``."""
        return hasattr(self, "rbr_reparam")

    def forward(self, x: Tensor) -> Tensor:
        if self.deploy:
            y = self.rbr_reparam(x)
        else:
            y = self.rbr_dense(x) + self.rbr_1x1(x)
            if self.rbr_identity is not None:
                y = y + self.rbr_identity(x)
        y = self.nonlinearity(self.se(y))
        return y  # type: ignore[no-any-return]

    def branches(self) -> Branches:
        """The branches, sharing the tensors of this block, for :func:`repvgg_cuda.fuse_weights` (differentiable).

        Raises:
            RuntimeError: the block is deployed; or a BatchNorm is in training mode or has no running statistics.
        """
        require(
            not self.deploy, "RepVGGBlock.branches: the block is deployed, its branches are folded into rbr_reparam"
        )
        return read_branches(self)[0]

    def folded(self, path: str = "") -> RepConv3x3:
        """The deployed convolution, without its activation; the block stays as it is. ``path`` is for messages.

        Raises:
            RuntimeError: as :meth:`branches`; or a submodule has hooks, which would be lost with it.
        """
        require(not self.deploy, f"{path or 'the block'} is deployed already, its branches are folded")
        refuse_hooks(self, path)
        branches, stride = read_branches(self, path)
        return RepConv3x3.from_branches(branches, stride=stride)

    def install(self, conv: RepConv3x3) -> None:
        """Puts ``conv`` in the place of the branches. It takes over the ReLU if no SE stands between them."""
        if type(self.se) is nn.Identity and type(self.nonlinearity) is nn.ReLU:
            conv.activation = "relu"
            self.nonlinearity = nn.Identity().train(self.training)
        self.rbr_reparam = conv.train(self.training)
        for name in ("rbr_dense", "rbr_1x1", "rbr_identity"):
            if hasattr(self, name):
                delattr(self, name)

    def switch_to_deploy(self) -> None:
        """Folds the branches into ``rbr_reparam``, in place; does nothing to a deployed block.

        dtype, device, memory format, ``training`` and ``requires_grad`` stay as they are. Without SE the ReLU joins the
        convolution, and ``nonlinearity`` becomes ``nn.Identity``.

        Raises:
            RuntimeError: as :meth:`folded`; the block is then unchanged.
        """
        if not self.deploy:
            self.install(self.folded())

    def custom_l2(self) -> Tensor:
        """The official "custom L2" penalty on the equivalent kernel, a scalar, to be added to the loss in training.

        The 3x3 kernel off its centre, squared, plus the centre tap of the folded 3x3 and 1x1 kernels relative to the
        scale of their BatchNorms, squared; gradients do not flow into the scales.
        """
        require(not self.deploy, "RepVGGBlock.custom_l2: the block is deployed; the penalty is for training")
        kernel_3x3, scale_3x3 = _kernel_and_scale(self.rbr_dense)
        kernel_1x1, scale_1x1 = _kernel_and_scale(self.rbr_1x1)
        centre = kernel_3x3[:, :, 1:2, 1:2]
        folded_centre = centre * scale_3x3 + kernel_1x1 * scale_1x1
        ring = kernel_3x3.square().sum() - centre.square().sum()
        return ring + (folded_centre.square() / (scale_3x3.square() + scale_1x1.square())).sum()


def _kernel_and_scale(branch: nn.Sequential) -> tuple[Tensor, Tensor]:
    """The kernel of a conv-BN branch, and ``gamma / sqrt(var + eps)`` as ``[C_out, 1, 1, 1]``, detached."""
    conv, bn = branch.conv, branch.bn
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm)
    assert bn.running_var is not None
    scale = bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
    return conv.weight, scale.reshape(-1, 1, 1, 1)


class RepVGGplusBlock(RepVGGBlock):
    """The block of RepVGGplus: SE, if any, *after* the ReLU (``post_se``), with a quarter of the channels hidden."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        deploy: bool = False,
        use_post_se: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, deploy
        )
        require(
            not use_post_se or out_channels >= 4,
            f"RepVGGplusBlock: use_post_se needs out_channels >= 4 (a quarter of them are hidden), got {out_channels}",
        )
        self.post_se: nn.Module = SEBlock(out_channels, out_channels // 4) if use_post_se else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.post_se(super().forward(x))
        return y
