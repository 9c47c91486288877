# SPDX-License-Identifier: MIT
"""What the benchmarks compare: for each suite its cases, and for each case its candidates with their checks.

Every output is checked against the trained block (or network) evaluated in float64, with a derived bound, so a row with
a time is a row with a right answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repvgg_cuda import baselines, checks, networks, reference, testing
from repvgg_cuda.baselines import CHANNELS_LAST, CUDA_GRAPH, THREE_BRANCHES, Baseline, Workload
from repvgg_cuda.branches import Branch, Branches
from repvgg_cuda.checks import Truth
from repvgg_cuda.comparison import Candidate, Work
from repvgg_cuda.devices import CpuDevice, CudaDevice, Device, DryRunDevice
from repvgg_cuda.folds import fold_candidates
from repvgg_cuda.modules import RepConv3x3
from repvgg_cuda.networks import OWN_PREFIX
from repvgg_cuda.ops import Activation, ChainLayer, algorithms, conv3x3, fuse_weights, prepack, refusal
from repvgg_cuda.timing import Run

#: The (in_channels, out_channels, groups) of RepVGG blocks whose weights the fusion suite folds.
FUSION_BLOCKS = ((48, 48, 1), (192, 192, 1), (512, 512, 4), (512, 512, 1), (512, 2048, 1))

#: The networks of the models suite, unless the user names others: always, and in a full run.
DEFAULT_MODELS = ("digits", "RepVGG-A0")
FULL_MODELS = (*DEFAULT_MODELS, "RepVGG-A2", "RepVGG-B1", "RepVGG-B1g4", "RepVGG-D2se")

#: Channels and size of the chains suite, each as CHAIN_DEPTH equal layers.
CHAINS = ((48, 56), (64, 56), (96, 28), (128, 28), (192, 14), (256, 14), (512, 14))
CHAIN_DEPTH = 4

#: Heights and widths of the small suite, which has the digits network too.
SMALL = ((64, 64), (97, 131))


@dataclass(frozen=True)
class Setup:
    """What every suite is told: where, in which dtype and with which batches to run, and how much of everything.

    Args:
        quick: a few small cases, and only the baselines that are there at once.
        full: every case, network and baseline, also those that take seconds to build.
        against: keys of baselines; None: what ``quick`` and ``full`` say.
        dry_run: rehearses a GPU on the CPU, where the tensors then are.
    """

    device: torch.device
    dtype: torch.dtype
    quick: bool = False
    models: tuple[str, ...] = ()
    full: bool = False
    batches: tuple[int, ...] = (1,)
    against: tuple[str, ...] | None = None
    dry_run: bool = False

    @property
    def tf32(self) -> bool:
        """Whether cuDNN may round float32 factors to TF32."""
        return self.device.type == "cuda" and self.dtype == torch.float32 and bool(torch.backends.cudnn.allow_tf32)

    @property
    def target(self) -> Device:
        if self.dry_run:
            return DryRunDevice()
        return CudaDevice(self.device.index) if self.device.type == "cuda" else CpuDevice()

    def baselines(self) -> list[Baseline]:
        """Those to compare with. "three-branches" and "eager" are always among them."""
        chosen = []
        for baseline in baselines.baselines(self.target):
            always = baseline.key in ("three-branches", "eager")
            if self.against is not None:
                wanted = baseline.key in self.against
            else:
                wanted = self.full or (not baseline.slow and (not self.quick or baseline.exact))
            if always or wanted:
                chosen.append(baseline)
        return chosen


class Built(NamedTuple):
    """A case with its weights and its truth. The first candidate is the baseline of the speed-ups."""

    candidates: list[Candidate]
    work: Work | None = None


@dataclass(frozen=True)
class Case:
    """One line of a suite; ``build`` may take a while. ``group`` is the name without the batch."""

    name: str
    build: Callable[[], Built]
    batch: int = 1
    group: str = ""


Cases = Sequence[Case]


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

        def bound() -> Tensor:
            return checks.with_tf32(testing.multi_branch_bound(self.x, branches, self.stride), terms, self.setup.tf32)

        known = Truth(lambda: truth, bound, self.x.dtype)
        return Candidate(
            name,
            lambda: self.act(reference.multi_branch(self.x, branches, self.stride)),
            known.check,
            error=known.error,
        )

    def fused(self, truth: Tensor, formats: Sequence[torch.memory_format]) -> Iterator[Candidate]:
        """The fused block: the baselines of the device, then ours as a user calls it, then by every algorithm."""
        weight, bias = fuse_weights(self.branches)
        work = self.workload(weight, bias)
        # cuDNN may choose a Winograd algorithm, with transforms that it does not document: ours stand for them.
        any_algorithm = self._known(truth, weight, bias, "aten", "winograd6" if self.stride == 1 else "polyphase")
        pytorch = any_algorithm if self.x.device.type == "cuda" else self._known(truth, weight, bias, "aten")
        for baseline in self.setup.baselines():
            if not baseline.needs_trained:
                yield networks.baseline_candidate(baseline, work, pytorch)
        yield from networks.own_candidates(work, any_algorithm)
        for memory_format in formats:
            x = self.x.contiguous(memory_format=memory_format)
            w = weight.contiguous(memory_format=memory_format)
            suffix = CHANNELS_LAST if memory_format == torch.channels_last else ""
            for algorithm in algorithms(x.device):
                known = self._known(truth, weight, bias, algorithm)
                ours = self._ours(algorithm, x, w, bias, suffix, known)
                yield ours
                if work.device.kind == "cuda" and algorithm != "aten":
                    build = partial(self._captured, algorithm, x, weight, bias)
                    yield dataclasses.replace(ours, name=ours.name + CUDA_GRAPH, run=None, build=build)

    def workload(self, weight: Tensor, bias: Tensor) -> Workload:
        """The fused block for the baselines, which get the very tensors that conv3x3 gets."""
        conv = RepConv3x3(
            self.branches.in_channels,
            self.branches.out_channels,
            stride=self.stride,
            groups=self.branches.groups,
            activation=self.activation,
            device="meta",
        ).eval()
        conv.weight, conv.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
        layer = ChainLayer(weight, bias, self.stride, self.branches.groups, self.activation)
        return Workload(
            conv,
            self.x,
            self.setup.target,
            lambda x: self.act(reference.multi_branch(x, self.branches, self.stride)),
            [layer],
        )

    def _known(self, truth: Tensor, weight: Tensor, bias: Tensor, *names: str) -> Truth:
        """With the widest of the bounds of the algorithms of these names."""

        def bound() -> Tensor:
            stride, groups = self.stride, self.branches.groups
            spread, shift = testing.fold_bound(self.branches, weight.dtype)
            folding = testing.conv3x3_fp64(self.x.abs(), spread, shift, stride, groups)
            usable = [name for name in names if name == names[0] or self.x.dtype == torch.float32]
            bounds = [testing.error_bound(self.x, weight, bias, stride, groups, name) for name in usable]
            widest = torch.stack(bounds).amax(0) + folding
            return checks.with_tf32(widest, 9 * weight.shape[1], self.setup.tf32 and "aten" in names)

        return Truth(lambda: truth, bound, self.x.dtype)

    def _ours(self, algorithm: str, x: Tensor, w: Tensor, bias: Tensor, suffix: str, known: Truth) -> Candidate:
        stride, groups, activation = self.stride, self.branches.groups, self.activation
        return Candidate(
            f"{OWN_PREFIX}{algorithm}{suffix}",
            lambda: conv3x3(x, w, bias, stride=stride, groups=groups, activation=activation, algorithm=algorithm),
            known.check,
            refusal=refusal(algorithm, x, w, stride=stride, groups=groups, activation=activation),
            own=True,
            error=known.error,
        )

    def _captured(self, algorithm: str, x: Tensor, weight: Tensor, bias: Tensor) -> Run:
        """A row with packed weights as a CUDA graph: what a layer of a captured network costs."""
        geometry: Any = {"stride": self.stride, "groups": self.branches.groups}
        packed = prepack(weight, x.shape, **geometry, algorithm=algorithm)
        run = partial(conv3x3, x, weight, bias, **geometry, activation=self.activation, packed=packed)
        return self.setup.target.capture(run)


def as_3x3_branches(branches: Branches) -> Branches:
    """The same block with every branch written as a 3x3 convolution: the step between three branches and one."""
    like = branches.tensors()[0]
    parts = tuple(
        Branch(reference.as_3x3(part.kernel, branches.out_channels, branches.groups, like), part.bias, part.bn)
        for part in branches.parts
    )
    return Branches(parts, branches.in_channels, branches.out_channels, branches.groups, branches.post_bn)


# ------------------------------------------------------------------------------------------------------------ suites


def work_of_layer(case: testing.Case, dtype: torch.dtype) -> Work:
    p, q = (case.H - 1) // case.stride + 1, (case.W - 1) // case.stride + 1
    moved = case.N * (case.C * case.H * case.W + case.K * p * q) + case.K * case.terms + case.K
    return Work(float(case.flops), float(moved * dtype.itemsize))


def notebook_suite(setup: Setup) -> Cases:
    """conv3x3 + conv1x1 + identity, without BatchNorm, on a 256x256 image of two channels."""
    case = next(case for case in testing.EDGE_CASES if case.name == "notebook")

    def build() -> Built:
        x = case.tensors(setup.dtype, setup.device)[0]
        branches = block_to(testing.random_branches(case.C, case.K, bias=True, bn=False), setup.device, setup.dtype)
        block = BlockCase(x, branches, case.stride, "identity", setup)
        truth = block.truth()
        candidates = [
            block.multi_branch(THREE_BRANCHES, branches, truth),
            block.multi_branch("three 3x3 convolutions", as_3x3_branches(branches), truth),
            *block.fused(truth, [torch.contiguous_format]),
        ]
        return Built(candidates, work_of_layer(case, setup.dtype))

    return [Case(str(case), build, group="notebook, (1, 2, 256, 256)")]


def layers_suite(setup: Setup) -> Cases:
    """The distinct blocks of RepVGG-A0 and B1 with BatchNorm and ReLU."""
    chosen = testing.REPVGG_LAYERS[:3] if setup.quick else testing.REPVGG_LAYERS
    return [layer_case(setup, dataclasses.replace(case, N=batch)) for batch in setup.batches for case in chosen]


def layer_case(setup: Setup, case: testing.Case) -> Case:
    """One block with BatchNorm and ReLU, of the size of ``case``, with every candidate."""

    def build() -> Built:
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
        return Built(candidates, work_of_layer(case, setup.dtype))

    return Case(str(case), build, case.N, case.name)


def fusion_suite(setup: Setup) -> Cases:
    """The fold of a trained float32 block into one kernel and bias of the given dtype."""

    def build(c_in: int, c_out: int, groups: int) -> Built:
        branches = block_to(testing.random_branches(c_in, c_out, groups), setup.device, torch.float32)
        return Built(fold_candidates(branches, setup.dtype))

    return [
        Case(f"fold-{c_in}-{c_out}" + (f"g{groups}" if groups > 1 else ""), partial(build, c_in, c_out, groups))
        for c_in, c_out, groups in (FUSION_BLOCKS[:2] if setup.quick else FUSION_BLOCKS)
    ]


# ---------------------------------------------------------------------------------------------------------- networks


def models_suite(setup: Setup) -> Cases:
    """Whole networks: the digits network, and networks of the RepVGG family, or of timm, with random weights."""
    names = setup.models or (FULL_MODELS if setup.full else DEFAULT_MODELS)
    return [network_case(setup, name, batch) for batch in setup.batches for name in names]


def small_suite(setup: Setup) -> Cases:
    """Small work, where what is not arithmetic counts: RepVGG-A0 on small images, and the digits network."""
    sizes = [network_case(setup, "RepVGG-A0", batch, size) for batch in setup.batches for size in SMALL]
    return [*sizes, *(network_case(setup, "digits", batch) for batch in setup.batches)]


def chains_suite(setup: Setup) -> Cases:
    """Four equal deployed layers in a row, as in a network; without branches, as there are none after the stem."""

    def build(channels: int, size: int, batch: int) -> Built:
        work = chain_workload(setup, channels, size, batch)
        truth = checks.network_truth(work.deployed, work.deployed, work.x, tf32=setup.tf32)
        return Built(list(network_rows(setup, work, truth)), networks.work_of(work.deployed, work.x))

    return [
        Case(f"{channels}@{size}-batch{batch}", partial(build, channels, size, batch), batch, f"{channels}@{size}")
        for batch in setup.batches
        for channels, size in ([(16, 8)] if setup.quick else CHAINS)
    ]


def chain_workload(setup: Setup, channels: int, size: int, batch: int) -> Workload:
    """Equal layers with He's weights, so that activations keep their size."""
    generator = torch.Generator().manual_seed(channels)
    layers, convs = [], []
    for _ in range(CHAIN_DEPTH):
        weight = torch.randn(channels, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
        bias = torch.randn(channels, generator=generator) * 0.1
        weight, bias = weight.to(setup.device, setup.dtype), bias.to(setup.device, setup.dtype)
        layers.append(ChainLayer(weight, bias, activation="relu"))
        conv = RepConv3x3(channels, channels, activation="relu", device="meta")
        conv.weight, conv.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
        convs.append(conv)
    x = torch.randn(batch, channels, size, size, generator=generator).to(setup.device, setup.dtype)
    return Workload(nn.Sequential(*convs).eval(), x, setup.target, None, layers)


def network_case(setup: Setup, name: str, batch: int, size: tuple[int, int] | None = None) -> Case:
    """One network with every candidate."""

    def build() -> Built:
        trained, x = networks.build_model(name, setup.device, setup.dtype, batch, size)
        deployed = networks.deploy(trained)
        work = networks.workload(trained, deployed, x, setup.target)
        truth = checks.network_truth(trained, deployed, x, tf32=setup.tf32)
        return Built(list(network_rows(setup, work, truth)), networks.work_of(deployed, x))

    shape = networks.input_shape(name, batch, size)
    group = name if size is None else f"{name} {size[0]}x{size[1]}"
    return Case(f"{name}-{'x'.join(map(str, shape))}", build, batch, group)


def network_rows(setup: Setup, work: Workload, truth: Truth) -> Iterator[Candidate]:
    for baseline in setup.baselines():
        if work.trained is not None or not baseline.needs_trained:
            yield networks.baseline_candidate(baseline, work, truth)
    yield from networks.own_candidates(work, truth, algorithm_rows=setup.full)
