# SPDX-License-Identifier: MIT
"""The operators as citizens of PyTorch: schemas, fake kernels, autograd, autocast, vmap, compile, export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import repvgg_cuda
from repvgg_cuda import Branches, _registration, reference, testing

OPS = torch.ops.repvgg_cuda


def conv_sample(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = testing.Case("sample", 2, 4, 5, 6, 6, groups=2).tensors(dtype)
    if requires_grad:
        return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    return x, weight, bias


def block_sample(dtype: torch.dtype = torch.float64) -> Branches:
    """Every kind of branch and tensor, requiring gradients."""
    block = testing.random_branches(4, 4, groups=2, n_3x3=1, n_1x1=1, bias=True, post_bn=True)
    tensors, *geometry = block.op_args()
    return Branches.from_op_args([t.to(dtype).requires_grad_(t.numel() > 0) for t in tensors], *geometry)


def test_schemas_in_python_are_those_of_the_compiled_module() -> None:
    for name, schema in _registration.SCHEMAS.items():
        assert str(getattr(OPS, name).default._schema) == f"repvgg_cuda::{name}{schema}"


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("stride", "activation"), [(1, "identity"), (2, "relu")])
def test_opcheck_conv3x3(stride: int, activation: str, channels_last: bool, requires_grad: bool) -> None:
    x, weight, bias = conv_sample()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    arguments = [t.requires_grad_(requires_grad) for t in (x, weight, bias)]
    torch.library.opcheck(OPS.conv3x3.default, (*arguments, stride, 2, activation, "auto"))


def test_opcheck_conv3x3_without_bias_and_batch() -> None:
    x, weight, _ = conv_sample()
    torch.library.opcheck(OPS.conv3x3.default, (x[:0], weight, None, 1, 2))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_fuse_weights(requires_grad: bool) -> None:
    tensors, *geometry = block_sample(torch.float32).op_args()
    tensors = [t.detach().requires_grad_(requires_grad and t.numel() > 0) for t in tensors]
    torch.library.opcheck(OPS.fuse_weights.default, (tensors, *geometry, None, None))


def batch_of(*blocks: Branches) -> tuple[list[Any], ...]:
    """The arguments of fuse_weights_batch up to the dtypes."""
    tensors, bn_eps, *geometry = zip(*(block.op_args() for block in blocks), strict=True)
    counts = [len(block_tensors) for block_tensors in tensors]
    return sum(tensors, []), counts, sum(bn_eps, []), *map(list, geometry)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_fuse_weights_batch(requires_grad: bool) -> None:
    tensors, *lists = batch_of(block_sample(torch.float32), testing.random_branches(3, 5, identity=False))
    tensors = [t.detach().requires_grad_(requires_grad and t.numel() > 0) for t in tensors]
    torch.library.opcheck(OPS.fuse_weights_batch.default, (tensors, *lists, None, None))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_fuse_and_prepack(requires_grad: bool) -> None:
    arguments = batch_of(block_sample(torch.float32), testing.random_branches(3, 5, identity=False))
    sizes = [extent for C in arguments[3] for extent in (1, C, 14, 14)]
    tensors = [t.detach().requires_grad_(requires_grad and t.numel() > 0) for t in arguments[0]]
    torch.library.opcheck(OPS.fuse_and_prepack.default, (tensors, *arguments[1:], None, None, sizes, [1, 2]))


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_conv3x3(stride: int, activation: str) -> None:
    arguments = conv_sample(torch.float64, requires_grad=True)

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return OPS.conv3x3(x, weight, bias, stride, 2, activation)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(f, arguments)
    assert torch.autograd.gradgradcheck(f, arguments)


def test_gradients_go_only_where_they_are_asked_for() -> None:
    x, weight, bias = conv_sample()
    repvgg_cuda.conv3x3(x, weight.requires_grad_(), bias, groups=2).sum().backward()
    assert x.grad is None
    assert bias.grad is None
    assert weight.grad is not None


def test_gradients_where_every_other_argument_is_left_at_its_default() -> None:
    """The dispatcher then passes x and weight alone to the backward formula."""
    x, weight, _ = testing.Case("no-bias", 1, 4, 5, 6, 6).tensors(torch.float64)
    assert torch.autograd.gradcheck(repvgg_cuda.conv3x3, (x.requires_grad_(), weight.requires_grad_()))


def test_gradient_of_a_float32_bias_beside_half() -> None:
    x, weight, bias = conv_sample(torch.bfloat16)
    bias = bias.float().requires_grad_()
    repvgg_cuda.conv3x3(x, weight, bias, groups=2).sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32
    assert torch.equal(bias.grad, torch.full((6,), 2.0 * 5 * 6))


def test_gradients_of_fuse_weights() -> None:
    """Every tensor of every branch, the BatchNorm on the sum included: for QAT and pruning."""
    block = block_sample()
    tensors, *geometry = block.op_args()
    given = [i for i, t in enumerate(tensors) if t.numel()]

    def f(*values: Tensor) -> tuple[Tensor, Tensor]:
        full = list(tensors)
        for i, value in zip(given, values, strict=True):
            full[i] = value
        return OPS.fuse_weights(full, *geometry, None, None)  # type: ignore[no-any-return]

    values = tuple(tensors[i] for i in given)
    assert torch.autograd.gradcheck(f, values)
    assert torch.autograd.gradgradcheck(f, values)


@pytest.mark.parametrize("packed", [False, True], ids=["fused", "packed"])
def test_gradients_of_a_batch_are_those_of_its_blocks(packed: bool) -> None:
    blocks = [block_sample(torch.float32), block_sample(torch.float32)]
    tensors, *lists = batch_of(*blocks)
    if packed:
        sizes = [extent for block in blocks for extent in (1, block.in_channels, 14, 14)]
        weights, biases, _ = OPS.fuse_and_prepack(tensors, *lists, None, None, sizes, [1, 1])
    else:
        weights, biases = OPS.fuse_weights_batch(tensors, *lists, None, None)
    (weights[0].square().sum() + biases[1].sum()).backward()  # two of the four outputs
    got = [t.grad for t in tensors]
    for block in blocks:
        for tensor in block.tensors():
            tensor.grad = None
    (repvgg_cuda.fuse_weights(blocks[0])[0].square().sum() + repvgg_cuda.fuse_weights(blocks[1])[1].sum()).backward()
    for tensor, grad in zip(tensors, got, strict=True):
        if tensor.numel():
            torch.testing.assert_close(torch.zeros_like(tensor) if grad is None else grad, tensor.grad)


def test_gradients_of_mixed_dtypes_keep_each_tensors_own() -> None:
    block = block_sample(torch.float32)
    tensors, *geometry = block.op_args()
    half = tensors[0].detach().half().requires_grad_()
    weight, bias = OPS.fuse_weights([half, *tensors[1:]], *geometry, None, None)
    (weight.float().sum() + bias.float().sum()).backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.float16
    assert tensors[2].grad is not None
    assert tensors[2].grad.dtype == torch.float32


def test_training_through_the_fold_equals_training_the_branches() -> None:
    """d loss / d kernels, biases, gammas and betas is the same through the fused kernel as through the branches."""
    block = block_sample()
    tensors, *geometry = block.op_args()
    statistics = {i for start in (4, 10, 16, 20) for i in (start, start + 1)}  # F.batch_norm has no gradient for them
    tensors = [t.detach() if i in statistics else t for i, t in enumerate(tensors)]
    block = Branches.from_op_args(tensors, *geometry)
    trained = [t for t in block.tensors() if t.requires_grad]
    assert len(trained) == 2 + 2 + 2 * 4
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((y * y).sum(), trained))

    weight, bias = repvgg_cuda.fuse_weights(block)
    fused = gradients(repvgg_cuda.conv3x3(x, weight, bias, groups=2))
    branched = gradients(reference.multi_branch(x, block))
    for a, b in zip(fused, branched, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-10, atol=1e-10
        )  # float64: agreement far beyond what a wrong formula has


class Net(nn.Module):
    """A model with torch.ops in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.bias = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.repvgg_cuda.conv3x3(x, self.weight, self.bias, 2, 1, "relu")
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


def test_compile_fullgraph_forward_and_backward() -> None:
    net, x = Net(), torch.randn(2, 3, 9, 7)
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).sum().backward()
    got = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    net(x).sum().backward()
    for a, p in zip(got, net.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_compile_with_dynamic_shapes_does_not_recompile() -> None:
    net = Net().eval()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for shape in ((2, 3, 9, 7), (3, 3, 12, 30), (5, 3, 31, 8)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), net(x))
    assert counter.frame_count == 1


def test_export_keeps_one_node_and_dynamic_shapes() -> None:
    net = Net().eval()
    dynamic = {0: torch.export.Dim("n", min=1, max=64), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(net, (torch.randn(2, 3, 9, 7),), dynamic_shapes={"x": dynamic})
    nodes = [node for node in program.graph.nodes if node.target == OPS.conv3x3.default]
    assert len(nodes) == 1
    x = torch.randn(5, 3, 14, 6)
    torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.parametrize("channels_last", [False, True])
def test_meta_tensors(channels_last: bool) -> None:
    x, weight, bias = conv_sample()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    real = repvgg_cuda.conv3x3(x, weight, bias, stride=2, groups=2)
    fake = repvgg_cuda.conv3x3(x.to("meta"), weight.to("meta"), bias.to("meta"), stride=2, groups=2)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x, weight, bias = conv_sample()
    with torch.autocast("cpu", dtype):
        y = repvgg_cuda.conv3x3(x, weight, bias, groups=2)
    assert y.dtype == F.conv2d(x.to(dtype), weight.to(dtype), groups=2).dtype == dtype
    want = repvgg_cuda.conv3x3(x.to(dtype), weight.to(dtype), bias, groups=2)
    assert torch.equal(y, want)


class ArgumentDtypes(TorchDispatchMode):
    """Notes the dtypes of the tensors that reach the kernel of conv3x3."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is OPS.conv3x3.default:
            self.seen += [value.dtype for value in args if isinstance(value, Tensor)]
        return func(*args, **(kwargs or {}))


def test_autocast_leaves_a_float32_bias_to_the_kernel() -> None:
    """Its result shows it only where a kernel adds the bias in float32; aten rounds it first."""
    x, weight, bias = conv_sample()
    for given, reached in ((bias, torch.float32), (bias.half(), torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16), ArgumentDtypes() as dtypes:
            repvgg_cuda.conv3x3(x, weight, given, groups=2)
        assert dtypes.seen == [torch.bfloat16, torch.bfloat16, reached]


def test_autocast_leaves_float64_alone_and_trains() -> None:
    x, weight, bias = conv_sample(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert repvgg_cuda.conv3x3(x, weight, bias, groups=2).dtype == torch.float64
    x, weight, bias = conv_sample(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        repvgg_cuda.conv3x3(x, weight, bias, groups=2, activation="relu").float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_autocast_under_compile() -> None:
    net, x = Net().eval(), torch.randn(2, 3, 9, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = net(x)
        got = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


def over_x(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return repvgg_cuda.conv3x3(x, weight, bias, stride=2, groups=2, activation="relu")


@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (2, None, None), (None, 1, 1), (1, 0, None)],
    ids=str,
)
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    size = 3
    arguments = []
    for tensor, dim in zip(conv_sample(), in_dims, strict=True):
        stacked = torch.stack([tensor * (i + 1) for i in range(size)])
        arguments.append(tensor if dim is None else stacked.movedim(0, dim))

    def one(i: int) -> list[Tensor]:
        return [t if d is None else t.select(d, i) for t, d in zip(arguments, in_dims, strict=True)]

    got = torch.func.vmap(over_x, in_dims)(*arguments)
    want = torch.stack([over_x(*one(i)) for i in range(size)])
    torch.testing.assert_close(got, want)


def test_torch_func_grad_is_an_error() -> None:
    """torch.library's autograd does not compose with torch.func.grad: an error, never a wrong gradient."""
    x, weight, bias = conv_sample()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda w: over_x(x, w, bias).sum())(weight)


def test_vmap_of_fuse_weights_is_a_clear_error() -> None:
    block = testing.random_branches(4, 4)
    tensors, *geometry = block.op_args()
    stacked = torch.stack([tensors[0], tensors[0]])

    def fold(kernel: Tensor) -> Any:
        return OPS.fuse_weights([kernel, *tensors[1:]], *geometry, None, None)

    with pytest.raises(RuntimeError, match="^fuse_weights: vmap is not supported; fuse the blocks one after another"):
        torch.func.vmap(fold)(stacked)

    batch = batch_of(block)

    def fold_batch(kernel: Tensor) -> Any:
        return OPS.fuse_weights_batch([kernel, *batch[0][1:]], *batch[1:], None, None)

    with pytest.raises(RuntimeError, match="^fuse_weights_batch: vmap is not supported"):
        torch.func.vmap(fold_batch)(stacked)


def test_jit_trace() -> None:
    net, x = Net().eval(), torch.randn(2, 3, 9, 7)
    traced = torch.jit.trace(net, x)
    torch.testing.assert_close(traced(torch.ones(1, 3, 6, 6)), net(torch.ones(1, 3, 6, 6)))


@pytest.mark.cuda
def test_cuda_graph_capture() -> None:
    x, weight, bias = (t.cuda() for t in conv_sample())

    def run() -> Tensor:
        return repvgg_cuda.conv3x3(x, weight, bias, groups=2, activation="relu")

    want = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    graph.replay()
    torch.testing.assert_close(y, want)


@pytest.mark.cuda
def test_side_stream_and_second_device() -> None:
    device = f"cuda:{torch.cuda.device_count() - 1}"
    x, weight, bias = (t.to(device) for t in conv_sample())
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        y = repvgg_cuda.conv3x3(x, weight, bias, groups=2)
    torch.cuda.current_stream(device).wait_stream(stream)
    assert str(y.device) == device
    torch.testing.assert_close(y.cpu(), repvgg_cuda.conv3x3(x.cpu(), weight.cpu(), bias.cpu(), groups=2))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_cuda_fold_is_the_cpu_fold(dtype: torch.dtype) -> None:
    block = testing.random_branches(8, 8, groups=2, bias=True, post_bn=True)
    tensors, *geometry = block.op_args()
    got: Callable[[str], Any] = lambda device: OPS.fuse_weights([t.to(device) for t in tensors], *geometry, dtype, None)  # noqa: E731
    for a, b in zip(got("cuda"), got("cpu"), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2 * testing.unit_roundoff(dtype), atol=0)


@pytest.mark.cuda
def test_a_batch_on_cuda_is_one_launch_and_can_be_captured() -> None:
    blocks = [testing.random_branches(8, 8), testing.random_branches(6, 10, identity=False)] * 20
    tensors, *lists = batch_of(*blocks)
    tensors = [t.cuda() for t in tensors]

    def run() -> Any:
        return OPS.fuse_weights_batch(tensors, *lists, None, None)

    want = run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if "fuse_weights_kernel" in event.key) == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    for a, b in zip(want[0] + want[1], got[0] + got[1], strict=True):
        assert torch.equal(a, b)
