# SPDX-License-Identifier: MIT
"""What the benchmarks compare: for each suite its cases, and for each case its candidates with their checks.

Every output is checked against the trained block (or network) evaluated in float64, with a derived bound, so a row with
a time is a row with a right answer.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg_cuda import digits, reference, testing
from repvgg_cuda.branches import BatchNorm, Branch, Branches, dtype_name, shape_name
from repvgg_cuda.convert import reparameterize
from repvgg_cuda.models import create_model
from repvgg_cuda.modules import RepConv3x3
from repvgg_cuda.ops import Activation, algorithms, conv3x3, fuse_weights, refusal
from repvgg_cuda.timing import Candidate
from repvgg_cuda.verification import NETWORK_FACTOR, verify

THREE_BRANCHES = "three branches"

#: TF32 keeps 10 bits of each factor, and may cut the rest off.
TF32_UNIT = 2.0**-10

#: The (in_channels, out_channels, groups) of RepVGG blocks whose weights the fusion suite folds.
FUSION_BLOCKS = ((48, 48, 1), (192, 192, 1), (512, 512, 4), (512, 512, 1), (512, 2048, 1))

#: What the names of rows of this library's convolution begin with; an algorithm's name follows.
OWN_PREFIX = "fused conv3x3 "
#: And the row of its fold.
FUSE_WEIGHTS = "fuse_weights"

#: The networks of the models suite, unless the user names others.
DEFAULT_MODELS = ("digits", "RepVGG-A0")

Cases = Iterator[tuple[str, list[Candidate]]]
Check = Callable[[Any], str]


@dataclass(frozen=True)
class Setup:
    """What every suite is told: where and in which dtype to run, and whether to keep to a few small cases."""

    device: torch.device
    dtype: torch.dtype
    quick: bool = False
    models: tuple[str, ...] = ()

    @property
    def tf32(self) -> bool:
        """Whether cuDNN may round float32 factors to TF32."""
        return self.device.type == "cuda" and self.dtype == torch.float32 and bool(torch.backends.cudnn.allow_tf32)


# ------------------------------------------------------------------------------------------------------------ checks


def check_close(want: Tensor, bound: Tensor, dtype: torch.dtype) -> Check:
    """A check that the output has the shape of ``want``, the given dtype, and lies within ``bound`` everywhere."""

    def check(y: Tensor) -> str:
        if y.shape != want.shape or y.dtype != dtype:
            expected = f"{shape_name(want)} {dtype_name(dtype)}"
            return f"expected {expected}, got {shape_name(y)} {dtype_name(y.dtype)}"
        return "" if bool(((y.double() - want).abs() <= bound).all()) else testing.worst(y, want, bound)

    return check


def with_tf32(bound: Tensor, terms: int, setup: Setup) -> Tensor:
    """``bound``, which is at least ``terms`` float32 units of the sum of magnitudes, with both factors in TF32."""
    if not setup.tf32:
        return bound
    in_units = (2 * TF32_UNIT + TF32_UNIT**2) / (terms * testing.unit_roundoff(torch.float32))
    return bound * (1 + in_units)


def block_to(branches: Branches, device: torch.device, dtype: torch.dtype) -> Branches:
    """The block with every tensor, BatchNorm statistics included, in this dtype, like ``model.to(device, dtype)``."""
    tensors, bn_eps, in_channels, out_channels, groups = branches.op_args()
    tensors = [tensor.to(device, dtype) for tensor in tensors]
    return Branches.from_op_args(tensors, bn_eps, in_channels, out_channels, groups)


# -------------------------------------------------------------------------------------------------------- one block


@dataclass(frozen=True)
class BlockCase:
    """One block on one input, with the truth about it in float64."""

    x: Tensor
    branches: Branches
    stride: int
    activation: Activation
    setup: Setup

    def truth(self) -> Tensor:
        exact = block_to(self.branches, self.x.device, torch.float64)
        return self.act(reference.multi_branch(self.x.double(), exact, self.stride))

    def act(self, y: Tensor) -> Tensor:
        """In place: the strongest form of the baselines."""
        return y.relu_() if self.activation == "relu" else y

    def multi_branch(self, name: str, branches: Branches, truth: Tensor) -> Candidate:
        """The unfused block in eager PyTorch."""
        terms = 9 * branches.in_channels // branches.groups
        bound = with_tf32(testing.multi_branch_bound(self.x, branches, self.stride), terms, self.setup)
        return Candidate(
            name,
            lambda: self.act(reference.multi_branch(self.x, branches, self.stride)),
            check_close(truth, bound, self.x.dtype),
        )

    def fused(self, truth: Tensor, formats: Sequence[torch.memory_format]) -> Iterator[Candidate]:
        """The fused block: F.conv2d (and cuDNN's fused call, on CUDA), then conv3x3 with every algorithm."""
        weight, bias = fuse_weights(self.branches)
        groups, stride = self.branches.groups, self.stride
        weight_bound, bias_bound = testing.fold_bound(self.branches, weight.dtype)
        folding = testing.conv3x3_fp64(self.x.abs(), weight_bound, bias_bound, stride, groups)
        for memory_format in formats:
            x = self.x.contiguous(memory_format=memory_format)
            w = weight.contiguous(memory_format=memory_format)
            suffix = ", channels_last" if memory_format == torch.channels_last else ""
            direct = testing.error_bound(x, w, bias, stride, groups) + folding
            yield from self._pytorch(
                x, w, bias, suffix, check_close(truth, with_tf32(direct, 9 * w.shape[1], self.setup), x.dtype)
            )
            for algorithm in algorithms(x.device):
                bound = testing.error_bound(x, w, bias, stride, groups, algorithm) + folding
                if algorithm == "aten":
                    bound = with_tf32(bound, 9 * w.shape[1], self.setup)
                yield self._ours(algorithm, x, w, bias, suffix, check_close(truth, bound, x.dtype))

    def _pytorch(self, x: Tensor, w: Tensor, bias: Tensor, suffix: str, check: Check) -> Iterator[Candidate]:
        stride, groups = self.stride, self.branches.groups

        def conv2d() -> Tensor:
            return self.act(F.conv2d(x, w, bias, stride, 1, 1, groups))

        name = "fused F.conv2d + relu" if self.activation == "relu" else "fused F.conv2d"
        yield Candidate(name + suffix, conv2d, check)
        if x.device.type != "cuda":
            return
        yield Candidate(f"{name}, cudnn.benchmark{suffix}", conv2d, check, context=cudnn_benchmark)
        if self.activation == "relu":

            def conv2d_relu() -> Tensor:
                return torch.cudnn_convolution_relu(x, w, bias, [stride] * 2, [1, 1], [1, 1], groups)

            yield Candidate(f"cudnn_convolution_relu{suffix}", conv2d_relu, check)
            yield Candidate(
                f"cudnn_convolution_relu, cudnn.benchmark{suffix}", conv2d_relu, check, context=cudnn_benchmark
            )

    def _ours(self, algorithm: str, x: Tensor, w: Tensor, bias: Tensor, suffix: str, check: Check) -> Candidate:
        stride, groups, activation = self.stride, self.branches.groups, self.activation
        return Candidate(
            f"{OWN_PREFIX}{algorithm}{suffix}",
            lambda: conv3x3(x, w, bias, stride=stride, groups=groups, activation=activation, algorithm=algorithm),
            check,
            refusal=refusal(algorithm, x, w, stride=stride, groups=groups, activation=activation),
        )


@contextlib.contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Lets cuDNN try its algorithms once per shape and keep the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def as_3x3_branches(branches: Branches) -> Branches:
    """The same block with every branch written as a 3x3 convolution: the step between three branches and one."""
    like = branches.tensors()[0]
    parts = tuple(
        Branch(reference.as_3x3(part.kernel, branches.out_channels, branches.groups, like), part.bias, part.bn)
        for part in branches.parts
    )
    return Branches(parts, branches.in_channels, branches.out_channels, branches.groups, branches.post_bn)


# ------------------------------------------------------------------------------------------------------------ suites


def notebook_suite(setup: Setup) -> Cases:
    """conv3x3 + conv1x1 + identity, without BatchNorm, on a 256x256 image of two channels."""
    case = next(case for case in testing.EDGE_CASES if case.name == "notebook")
    x = case.tensors(setup.dtype, setup.device)[0]
    branches = block_to(testing.random_branches(case.C, case.K, bias=True, bn=False), setup.device, setup.dtype)
    block = BlockCase(x, branches, case.stride, "identity", setup)
    truth = block.truth()
    candidates = [
        block.multi_branch(THREE_BRANCHES, branches, truth),
        block.multi_branch("three 3x3 convolutions", as_3x3_branches(branches), truth),
        *block.fused(truth, [torch.contiguous_format]),
    ]
    yield str(case), candidates


def layers_suite(setup: Setup) -> Cases:
    """The distinct blocks of RepVGG-A0 and B1 with BatchNorm and ReLU, batch 1."""
    for case in testing.REPVGG_LAYERS[:3] if setup.quick else testing.REPVGG_LAYERS:
        x = case.tensors(setup.dtype, setup.device)[0]
        identity = case.C == case.K and case.stride == 1
        branches = testing.random_branches(case.C, case.K, case.groups, identity=identity)
        block = BlockCase(x, block_to(branches, setup.device, setup.dtype), case.stride, "relu", setup)
        truth = block.truth()
        name = THREE_BRANCHES if identity else "two branches"
        candidates = [
            block.multi_branch(name, block.branches, truth),
            *block.fused(truth, [torch.contiguous_format, torch.channels_last]),
        ]
        yield str(case), candidates


def fusion_suite(setup: Setup) -> Cases:
    """The fold of a trained float32 block into one kernel and bias of the given dtype."""
    for c_in, c_out, groups in FUSION_BLOCKS[:2] if setup.quick else FUSION_BLOCKS:
        branches = block_to(testing.random_branches(c_in, c_out, groups), setup.device, torch.float32)
        yield f"fold-{c_in}-{c_out}" + (f"g{groups}" if groups > 1 else ""), _fusion_candidates(branches, setup.dtype)


def _fusion_candidates(branches: Branches, dtype: torch.dtype) -> list[Candidate]:
    like = branches.tensors()[0]
    square = branches.in_channels == branches.out_channels
    identity = reference.identity_kernel(branches.in_channels, branches.groups, like) if square else None
    want, once = reference.fold_fp64(branches), testing.fold_bound(branches, dtype)
    # Step by step in float32 every operation rounds, not only the last: as many as fold_bound counts for float64.
    roundings = 2 * (6 + len(branches.parts))
    always = [a + roundings * b for a, b in zip(once, testing.fold_bound(branches, torch.float32), strict=True)]
    return [
        Candidate(
            "step by step in PyTorch",
            lambda: fold_step_by_step(branches, identity, dtype),
            _check_fold(want, always, dtype),
        ),
        Candidate(FUSE_WEIGHTS, lambda: fuse_weights(branches, dtype=dtype), _check_fold(want, once, dtype)),
    ]


def fold_step_by_step(branches: Branches, identity: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The fold as a user writes it, in the dtype of the branches: BatchNorm into each kernel, each kernel to 3x3, add.

    ``identity`` is the identity's 3x3 kernel, prepared once, as implementations cache it.
    """

    def fold(part: Branch) -> tuple[Tensor, Tensor]:
        kernel, bn = identity if part.kernel is None else part.kernel, part.bn
        assert kernel is not None
        assert isinstance(bn, BatchNorm)
        assert bn.weight is not None
        assert bn.bias is not None
        scale = bn.weight / (bn.var + bn.eps).sqrt()
        kernel = kernel * scale.reshape(-1, 1, 1, 1)
        return F.pad(kernel, [1, 1, 1, 1]) if kernel.shape[2] == 1 else kernel, bn.bias - bn.mean * scale

    weight, bias = fold(branches.parts[0])
    for part in branches.parts[1:]:
        kernel, shift = fold(part)
        weight, bias = weight + kernel, bias + shift
    return weight.to(dtype), bias.to(dtype)


def _check_fold(want: tuple[Tensor, Tensor], bounds: Sequence[Tensor], dtype: torch.dtype) -> Check:
    def check(folded: tuple[Tensor, Tensor]) -> str:
        for what, got, truth, bound in zip(("weight", "bias"), folded, want, bounds, strict=True):
            if problem := check_close(truth, bound, dtype)(got):
                return f"{what}: {problem}"
        return ""

    return check


# ---------------------------------------------------------------------------------------------------------- networks


def models_suite(setup: Setup) -> Cases:
    """Whole networks at batch 1: the digits network, and networks of the RepVGG family with random weights."""
    formats = [torch.contiguous_format, torch.channels_last]
    for name in setup.models:
        trained, x = build_model(name, setup)
        candidates = model_candidates(trained, reparameterize(trained).model, x, formats)
        yield f"{name}-{'x'.join(map(str, x.shape))}", candidates


def build_model(name: str, setup: Setup) -> tuple[nn.Module, Tensor]:
    """A trained network in eval mode, and an input for it at batch 1.

    "digits" is the demo's network with a held-out scan. The others have random weights, because how long a network
    takes does not depend on what it has learnt; but their BatchNorms have statistics, so that they fold into something.
    """
    if name == "digits":
        model: nn.Module = digits.load_trained()
        x = digits.preprocess(digits.load_digits()[1].scans[:1])
    else:
        model = randomise_(create_model(name)).eval()
        size = 320 if name.endswith("se") else 224
        x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    return model.to(setup.device, setup.dtype), x.to(setup.device, setup.dtype)


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraws every weight and BatchNorm statistic of ``model``, in place, as training might have left them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            drawn = testing.random_batchnorm(module.num_features, generator)
            for own, value in (
                (module.running_mean, drawn.mean),
                (module.running_var, drawn.var),
                (module.weight, drawn.weight),
                (module.bias, drawn.bias),
            ):
                assert own is not None
                assert value is not None
                own.copy_(value)
        elif isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / fan_in**0.5)
        elif isinstance(module, nn.Linear):  # small, because features after a ReLU have one sign: logits of order 1
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / module.in_features)
    return model


class TorchConv3x3(RepConv3x3):
    """The deployed convolution as PyTorch alone runs it: F.conv2d and an in-place ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, 1, 1, self.groups)
        return y.relu_() if self.activation == "relu" else y


def model_candidates(
    trained: nn.Module | None, deployed: nn.Module, x: Tensor, formats: Sequence[torch.memory_format]
) -> list[Candidate]:
    """Every form of one network: trained (if there is one), then deployed on F.conv2d and on each algorithm."""

    def candidate(name: str, model: nn.Module, x: Tensor, refused: str | None = None) -> Candidate:
        check = _check_output(deployed, deployed, x) if trained is None else _check_network(trained, model, x)
        return Candidate(name, lambda: model(x), check, refused)

    candidates = []
    if trained is not None:
        candidates.append(Candidate(THREE_BRANCHES, lambda: trained(x), _check_output(trained, deployed, x)))
    for memory_format in formats:
        suffix = ", channels_last" if memory_format == torch.channels_last else ""
        own: Any = copy.deepcopy(deployed)
        model: nn.Module = own.to(memory_format=memory_format)
        images = x.contiguous(memory_format=memory_format)
        in_torch = copy.deepcopy(model)
        for conv in _convolutions(in_torch):
            conv.__class__ = TorchConv3x3
        candidates.append(candidate(f"fused F.conv2d + relu{suffix}", in_torch, images))
        candidates.append(candidate(f"{OWN_PREFIX}auto{suffix}", model, images))
        for algorithm in algorithms(x.device):
            ours, ran, refused = with_algorithm(model, algorithm, images)
            partly = f" in {ran} of {len(_convolutions(ours))} layers, aten in the others" if ran and refused else ""
            name = f"{OWN_PREFIX}{algorithm}{partly}{suffix}"
            candidates.append(candidate(name, ours, images, None if ran else refused))
    return candidates


def _check_network(trained: nn.Module, model: nn.Module, x: Tensor) -> Check:
    """A check that every layer of the deployed ``model``, and its output, is right: :func:`verification.verify`."""

    def check(y: Tensor) -> str:
        if not bool(y.isfinite().all()):
            return "the output holds NaN or infinity"
        row = verify(trained, model, x).first_failure
        return "" if row is None else f"{row.name}: error {row.error:.3g}, bound {row.bound:.3g}"

    return check


def _check_output(model: nn.Module, peer: nn.Module, x: Tensor) -> Check:
    """A check of the output alone, against ``model`` itself in float64.

    It may be off by what :func:`verification.verify` allows: a small multiple of the error of ``peer``, another
    evaluation of the same network, in the dtype of ``x``.
    """

    def check(y: Tensor) -> str:
        want = copy.deepcopy(model).double()(x.double())
        peer_error = (peer(x).double() - want).abs().max()
        bound = NETWORK_FACTOR * torch.maximum(peer_error, testing.unit_roundoff(x.dtype) * want.abs().max())
        return check_close(want, bound.expand_as(want), x.dtype)(y)

    return check


def _convolutions(model: nn.Module) -> list[RepConv3x3]:
    return [module for module in model.modules() if isinstance(module, RepConv3x3)]


@torch.inference_mode()
def with_algorithm(model: nn.Module, algorithm: str, x: Tensor) -> tuple[nn.Module, int, str | None]:
    """A copy of ``model`` that runs ``algorithm`` in every layer that it accepts, given the input ``x``, else aten.

    Returns:
        The copy, in how many layers ``algorithm`` runs, and the last of its refusals.
    """
    model = copy.deepcopy(model)
    reasons: list[str | None] = []

    def ask(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(conv, RepConv3x3)
        x, weight = inputs[0], conv.weight
        reason = refusal(algorithm, x, weight, stride=conv.stride, groups=conv.groups, activation=conv.activation)
        conv.algorithm = "aten" if reason else algorithm
        reasons.append(reason)

    hooks = [conv.register_forward_pre_hook(ask) for conv in _convolutions(model)]
    model(x)
    for hook in hooks:
        hook.remove()
    refusals = [reason for reason in reasons if reason]
    return model, len(reasons) - len(refusals), refusals[-1] if refusals else None
