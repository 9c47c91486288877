# SPDX-License-Identifier: MIT
"""Every row of the CUDA table on a GPU: numbers, memory, bits, streams, threads, graphs, devices, errors.

With REPVGG_CUDA_DRY_RUN=1 the CPU stands in, with its own rows: so `gpu-check --dry-run` finds what is broken in
this file before there is a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import repvgg_cuda
from repvgg_cuda import _ext, gpu_stages, reference, testing
from repvgg_cuda.devices import CudaDevice, DryRunDevice

pytestmark = pytest.mark.cuda

DRY_RUN = os.environ.get(gpu_stages.DRY_RUN_VARIABLE, "") not in ("", "0")
KIND = "cpu" if DRY_RUN else "cuda"
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

#: What the common cases leave out: channels in whole tensor-core tiles and just off them, several images in one tile
#: row, sums that are worth sharing, groups of every width of the grouped networks, sizes off every tile.
MORE_CASES = (
    testing.Case("tile", 1, 16, 8, 8, 16),
    testing.Case("tiles", 2, 64, 17, 35, 96),
    testing.Case("tail", 1, 40, 9, 23, 56),
    testing.Case("tail", 3, 24, 15, 13, 136, stride=2),
    testing.Case("images", 4, 32, 14, 14, 64),
    testing.Case("images", 9, 48, 28, 28, 48),
    testing.Case("images", 5, 64, 7, 7, 32),
    testing.Case("long-sum", 1, 512, 7, 7, 64),
    testing.Case("long-sum", 1, 192, 14, 14, 192, stride=2),
    testing.Case("g4", 2, 128, 14, 14, 128, groups=4),
    testing.Case("g4", 1, 256, 9, 9, 512, stride=2, groups=4),
    testing.Case("g2", 2, 96, 28, 28, 96, groups=2),
    testing.Case("stem", 2, 3, 64, 67, 48, stride=2),
)
CASES = (
    (*testing.EDGE_CASES[:4], MORE_CASES[0], MORE_CASES[9])
    if DRY_RUN
    else (*testing.EDGE_CASES, *MORE_CASES, *testing.REPVGG_LAYERS)
)


def accepts(algorithm: str, case: testing.Case, dtype: torch.dtype) -> list[str]:
    """The names of the memory formats in which the row takes the problem, as far as the problem itself says."""
    if _ext.module is None:
        return []
    shape = (case.x_size, case.K, case.stride, case.groups, str(dtype)[6:])
    return [
        name
        for name, memory_format in FORMATS.items()
        if _ext.module.refusal(algorithm, KIND, -1, *shape, memory_format == torch.channels_last, "relu") is None
    ]


ROWS = [name for name in repvgg_cuda.algorithms(KIND) if name != "aten"]
#: Sorted by case and dtype, so that the oracle of one is there for all.
PROBLEMS = [
    pytest.param(case, dtype, row, name, id=f"{case}-{str(dtype)[6:]}-{row}-{name}")
    for case in CASES
    for dtype in testing.DTYPES
    for row in ROWS
    for name in accepts(row, case, dtype)
]
EVERY_ROW = pytest.mark.parametrize("row", ROWS)


@pytest.fixture(scope="module")
def gpu() -> CudaDevice:
    return DryRunDevice() if DRY_RUN else CudaDevice()


def problem_for(row: str, gpu: CudaDevice, seed: int = 0) -> tuple[testing.Case, Tensor, Tensor, Tensor]:
    """A case of some size that the row takes on this GPU, in a dtype and layout that it takes, on the GPU."""
    wanted = [case for case in CASES if case.N * case.C >= 16] + [case for case in CASES if case.N > 0]
    for case, dtype in itertools.product(wanted, testing.DTYPES):
        for name in accepts(row, case, dtype):
            x, weight, bias = (t.to(gpu.torch_device) for t in case.tensors(dtype, seed=seed))
            x = x.contiguous(memory_format=FORMATS[name])
            if repvgg_cuda.refusal(row, x, weight, stride=case.stride, groups=case.groups, activation="relu") is None:
                return case, x, weight, bias
    pytest.skip(f"'{row}' takes no case on this GPU")


def call(case: testing.Case, x: Tensor, weight: Tensor, bias: Tensor | None, row: str, **options: Any) -> Tensor:
    return repvgg_cuda.conv3x3(
        x, weight, bias, stride=case.stride, groups=case.groups, activation="relu", algorithm=row, **options
    )


@functools.lru_cache(maxsize=8)
def oracle(case: testing.Case, dtype: torch.dtype, row: str) -> tuple[Tensor, Tensor]:
    """The output in float64 on the CPU, and how far the row may be from it."""
    x, weight, bias = case.tensors(dtype)
    bound = testing.error_bound(x, weight, bias, case.stride, case.groups, row)
    return testing.conv3x3_fp64(x, weight, bias, case.stride, case.groups, "relu"), bound


# -------------------------------------------------------------------------------------------------------------- memory


class GuardedMemory:
    """Within it every ``empty`` that the dispatcher makes on the device, ours included, is poisoned and has guards.

    An output holds NaN until it is written, and a write next to it is found by :meth:`check`.
    """

    GUARD = 4096  # bytes on each side, and so the alignment that any kernel may count on is kept
    POISON = 0xFF  # in every byte: NaN in every float type

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: list[tuple[Tensor, int]] = []  # with the bytes between the guards

    def __enter__(self) -> GuardedMemory:
        self.library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel of torch's is replaced: it is, until the end
            self.library.impl("empty.memory_format", self._empty, KIND.upper())
        return self

    def __exit__(self, *error: object) -> None:
        self.library._destroy()

    def _empty(
        self, size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
        memory_format: Any = None,
    ) -> Tensor:  # fmt: skip
        dtype = torch.get_default_dtype() if dtype is None else dtype
        count = math.prod(size) * dtype.itemsize
        total = self.GUARD + -(-count // self.GUARD) * self.GUARD + self.GUARD
        buffer = torch.empty_strided((total,), (1,), dtype=torch.uint8, device=device).fill_(self.POISON)
        self.buffers.append((buffer, count))
        like = torch.empty(tuple(size), device="meta", memory_format=memory_format or torch.contiguous_format)
        return buffer[self.GUARD :].view(dtype).as_strided(like.shape, like.stride())

    def owns(self, tensor: Tensor) -> bool:
        """Whether it lies in guarded memory."""
        spans = ((buffer.data_ptr() + self.GUARD, count) for buffer, count in self.buffers)
        return any(begin <= tensor.data_ptr() <= begin + count for begin, count in spans)

    def check(self) -> None:
        for buffer, count in self.buffers:
            for guard in (buffer[: self.GUARD], buffer[self.GUARD + count :]):
                assert bool((guard == self.POISON).all()), "memory next to an output was written"


def guarded_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """A dense copy on the device with NaN on both sides: what is read there shows in the result."""
    count, guard = tensor.numel(), 4096 // tensor.itemsize
    around = torch.full((count + 2 * guard,), math.nan, dtype=tensor.dtype).to(device)
    inside = around[guard : guard + count].as_strided(tensor.shape, tensor.stride(), guard)
    return inside.copy_(tensor)


def test_the_guards_find_what_they_are_for(gpu: CudaDevice) -> None:
    """Of the tester: a write beside, a write before, an element left out."""
    with GuardedMemory(gpu.torch_device) as memory:
        y = torch.empty(3, 5, device=gpu.torch_device)
        assert memory.owns(y)
        assert bool(y.isnan().all())
        memory.check()
        buffer, count = memory.buffers[0]
        for place in (memory.GUARD - 1, memory.GUARD + count):
            buffer[place] = 0
            with pytest.raises(AssertionError, match="next to an output"):
                memory.check()
            buffer[place] = memory.POISON
        like = torch.zeros(2, 3, 4, 5, device=gpu.torch_device)
        assert memory.owns(like.contiguous(memory_format=torch.channels_last))
    assert not memory.owns(torch.empty(3, 5, device=gpu.torch_device))


# ------------------------------------------------------------------------------------------------------------- numbers


def test_every_row_is_tested() -> None:
    """A row whose cases all refuse would pass unseen."""
    assert {param.values[2] for param in PROBLEMS} == set(ROWS)
    assert ROWS


@pytest.mark.parametrize(("case", "dtype", "row", "layout"), PROBLEMS)
def test_a_row_is_right_within_its_memory_and_in_every_bit_again(
    case: testing.Case, dtype: torch.dtype, row: str, layout: str, gpu: CudaDevice
) -> None:
    x, weight, bias = case.tensors(dtype)
    want, bound = oracle(case, dtype, row)
    x, weight, bias = (
        guarded_copy(t, gpu.torch_device) for t in (x.contiguous(memory_format=FORMATS[layout]), weight, bias)
    )
    why = repvgg_cuda.refusal(row, x, weight, stride=case.stride, groups=case.groups, activation="relu")
    if why is not None:
        pytest.skip(f"on this GPU: {why}")
    packed = repvgg_cuda.prepack(weight, case.x_size, stride=case.stride, groups=case.groups, algorithm=row)
    with GuardedMemory(gpu.torch_device) as memory, torch.inference_mode():
        ys = [call(case, x, weight, bias, row) for _ in range(3)]
        ys.append(call(case, x, weight, bias, "auto", packed=packed))
        gpu.synchronize()
        memory.check()
        assert all(memory.owns(y) for y in ys) or case.N == 0
    for y in ys:
        assert y.is_contiguous(memory_format=reference.output_format(x))
        assert y.dtype == dtype
        error = (y.double().cpu() - want).abs()
        assert bool((error <= bound).all()), testing.worst(y.cpu(), want, bound)
        assert torch.equal(y, ys[0])


@EVERY_ROW
def test_bias_and_activation(row: str, gpu: CudaDevice) -> None:
    """None or float32 bias, identity or ReLU."""
    case, x, weight, bias = problem_for(row, gpu)
    for given, activation in itertools.product((None, bias, bias.float()), ("identity", "relu")):
        if given is not None and given.dtype != x.dtype and x.dtype not in (torch.float16, torch.bfloat16):
            continue
        geometry = {"stride": case.stride, "groups": case.groups, "activation": activation}
        if repvgg_cuda.refusal(row, x, weight, **geometry):  # type: ignore[arg-type]
            continue
        y = repvgg_cuda.conv3x3(x, weight, given, algorithm=row, **geometry).cpu()  # type: ignore[arg-type]
        host = [x.cpu(), weight.cpu(), None if given is None else given.cpu()]
        want = testing.conv3x3_fp64(*host, case.stride, case.groups, activation)  # type: ignore[arg-type]
        bound = testing.error_bound(*host, case.stride, case.groups, row)  # type: ignore[arg-type]
        assert bool(((y.double() - want).abs() <= bound).all()), testing.worst(y, want, bound)


@EVERY_ROW
@pytest.mark.parametrize("view", ["sliced", "transposed", "expanded", "offset"])
def test_inputs_that_are_not_dense(view: str, row: str, gpu: CudaDevice) -> None:
    """The same bits as for a dense copy: what a row takes of the layout it takes of the copy."""
    case, x, weight, bias = problem_for(row, gpu)
    memory_format = reference.output_format(x)
    if view == "sliced":
        strided = torch.cat([x, x], 3)[:, :, :, : case.W]
    elif view == "transposed":
        strided = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif view == "expanded":
        strided = x[:1].expand(case.x_size)
        x = strided.contiguous(memory_format=memory_format)
    else:
        flat = torch.cat([x.new_zeros(1), x.permute(0, 2, 3, 1).reshape(-1)])[1:]  # not on 16 bytes
        strided = flat.reshape(case.N, case.H, case.W, case.C).permute(0, 3, 1, 2)
        x = strided.clone(memory_format=torch.preserve_format)
    dense = x.contiguous(memory_format=reference.output_format(strided))
    refused = [
        repvgg_cuda.refusal(row, each, weight, stride=case.stride, groups=case.groups, activation="relu")
        for each in (strided, dense)
    ]
    assert refused[0] == refused[1]
    if refused[0] is not None:
        pytest.skip(refused[0])
    assert torch.equal(call(case, strided, weight, bias, row), call(case, dense, weight, bias, row))


@EVERY_ROW
def test_nan_stays_near_where_it_was(row: str, gpu: CudaDevice) -> None:
    """And infinity: only outputs that read it, or share a Winograd tile with one that does, are not finite."""
    if row in testing.WINOGRAD:
        pytest.skip("a Winograd row may spread it over a tile")
    case, x, weight, bias = problem_for(row, gpu)
    x = x.clone(memory_format=torch.preserve_format)
    x[0, 0, case.H // 2, case.W // 2] = math.nan
    finite = call(case, x, weight, bias, row).isfinite().cpu()
    want = testing.conv3x3_fp64(x.cpu(), weight.cpu(), bias.cpu(), case.stride, case.groups, "relu").isfinite()
    assert torch.equal(finite, want)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_fuse_weights(dtype: torch.dtype, groups: int, gpu: CudaDevice) -> None:
    branches = testing.random_branches(16, 16, groups, bias=True, post_bn=True)
    wants, bounds = reference.fold_fp64(branches), testing.fold_bound(branches, dtype)
    there = repvgg_cuda.Branches.from_op_args(
        [t.to(gpu.torch_device) for t in branches.op_args()[0]], *branches.op_args()[1:]
    )
    with GuardedMemory(gpu.torch_device) as memory:
        folded = [repvgg_cuda.fuse_weights(there, dtype=dtype) for _ in range(3)]
        gpu.synchronize()
        memory.check()
    for want, bound, got, again, once_more in zip(wants, bounds, *folded, strict=True):
        assert memory.owns(got)
        assert torch.equal(got, again)
        assert torch.equal(got, once_more)
        assert bool(((got.cpu().double() - want).abs() <= bound).all()), testing.worst(got.cpu(), want, bound)


def test_fuse_and_prepack(gpu: CudaDevice) -> None:
    """With one launch what two calls give: channels that are no whole chunk, groups, a stem with a pack of its own."""
    cases = [
        (testing.random_branches(24, 40, identity=False), 1),
        (testing.random_branches(48, 48, 2), 2),
        (testing.random_branches(3, 24, identity=False), 2),
    ]
    blocks = [
        repvgg_cuda.Branches.from_op_args([t.to(gpu.torch_device) for t in tensors], *geometry)
        for tensors, *geometry in (block.op_args() for block, _ in cases)
    ]
    sizes, strides = [(2, block.in_channels, 14, 14) for block, _ in cases], [stride for _, stride in cases]
    tf32 = "mma_tf32" if "mma_tf32" in ROWS else "auto"
    for dtype, algorithm in ((torch.float16, "auto"), (torch.bfloat16, "auto"), (torch.float32, tf32)):
        n = 2 if algorithm == "mma_tf32" else 3  # which refuses a stem
        with GuardedMemory(gpu.torch_device) as memory:
            layers = repvgg_cuda.fuse_and_prepack(
                blocks[:n], sizes[:n], strides=strides[:n], dtype=dtype, algorithm=algorithm
            )
            memory.check()
        for block, size, stride, layer in zip(blocks[:n], sizes, strides, layers, strict=False):
            weight, bias = repvgg_cuda.fuse_weights(block, dtype=dtype)
            assert torch.equal(layer.weight, weight)
            assert torch.equal(layer.bias, bias)
            packed = repvgg_cuda.prepack(weight, size, stride=stride, groups=block.groups, algorithm=algorithm)
            x = torch.randn(size, dtype=dtype, device=gpu.torch_device).to(memory_format=torch.channels_last)
            y, want = (
                repvgg_cuda.conv3x3(x, weight, bias, stride=stride, groups=block.groups, packed=each)
                for each in (layer.packed, packed)
            )
            assert torch.equal(y, want)


def test_more_elements_than_an_int_counts(gpu: CudaDevice) -> None:
    """Offsets beyond 2^31: the last image of a huge batch has the bits it has by itself."""
    size = 64 if DRY_RUN else 4096
    case = testing.Case("huge", 17, 8, size, size, 8)
    if not DRY_RUN:
        free, _ = torch.cuda.mem_get_info(gpu.torch_device)
        if free < 24 << 30:
            pytest.skip("needs 24 GiB of free GPU memory")
        assert case.N * case.C * case.H * case.W > 1 << 31
    _, weight, bias = case.tensors()
    weight, bias = weight.to(gpu.torch_device), bias.to(gpu.torch_device)
    x = torch.zeros(case.x_size, device=gpu.torch_device)
    x[-1].normal_()
    for row in ROWS:
        if repvgg_cuda.refusal(row, x, weight, activation="relu") is None:
            y = call(case, x, weight, bias, row)[-1:].clone()
            assert torch.equal(y, call(case, x[-1:].clone(), weight, bias, row)), row


# -------------------------------------------------------------------------------------------- streams, threads, graphs


@EVERY_ROW
def test_streams_side_by_side(row: str, gpu: CudaDevice) -> None:
    problems = [problem_for(row, gpu, seed) for seed in range(4)]
    wants = [call(*problem, row) for problem in problems]
    for _ in range(5):
        ys = []
        with gpu.side_streams(len(problems)) as streams:
            for stream, problem in zip(streams, problems, strict=True):
                with stream:
                    ys.append(call(*problem, row))
        assert all(torch.equal(y, want) for y, want in zip(ys, wants, strict=True))


@EVERY_ROW
def test_python_threads(row: str, gpu: CudaDevice) -> None:
    """Each with a stream of its own; what a row keeps between calls must not be shared."""
    problems = [problem_for(row, gpu, seed) for seed in range(4)]
    wants = [call(*problem, row) for problem in problems]
    gpu.synchronize()

    def work(i: int) -> list[Tensor]:
        with gpu.side_streams(1) as [stream], stream, torch.inference_mode():
            ys = [call(*problems[i], row) for _ in range(8)]
        gpu.synchronize()
        return ys

    with ThreadPoolExecutor(4) as pool:
        for want, ys in zip(wants, pool.map(work, range(4)), strict=True):
            assert all(torch.equal(y, want) for y in ys)


@EVERY_ROW
def test_a_captured_call_replays(row: str, gpu: CudaDevice) -> None:
    case, x, weight, bias = problem_for(row, gpu)
    other = problem_for(row, gpu, seed=1)[1]
    packed = repvgg_cuda.prepack(weight, case.x_size, stride=case.stride, groups=case.groups, algorithm=row)
    for options in ({}, {"packed": packed}):
        static = x.clone(memory_format=torch.preserve_format)
        name = "auto" if options else row
        with torch.inference_mode():
            replay = gpu.capture(functools.partial(call, case, static, weight, bias, name, **options))
            for given in (x, other, x):
                static.copy_(given)
                assert torch.equal(replay(), call(case, given, weight, bias, row))  # type: ignore[arg-type]


@contextlib.contextmanager
def deterministic_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


NETWORK_DTYPES = [torch.float32] if DRY_RUN else [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", NETWORK_DTYPES, ids=str)
def test_a_whole_prepared_network(dtype: torch.dtype, layout: str, gpu: CudaDevice) -> None:
    """Within what verify allows of the trained one; captured, it replays on new images."""
    torch.manual_seed(0)
    trained = repvgg_cuda.create_model("RepVGG-A0", num_classes=10).eval().to(gpu.torch_device, dtype)
    deployed = repvgg_cuda.reparameterize(trained).model
    size = (2, 3, 32, 32) if DRY_RUN else (4, 3, 224, 224)
    images = [torch.randn(size).to(gpu.torch_device, dtype).contiguous(memory_format=FORMATS[layout]) for _ in range(2)]
    assert repvgg_cuda.verify(trained, deployed, images[0]).ok
    deployed.prepare(images[0])
    static = images[0].clone(memory_format=torch.preserve_format)

    def features(image: Tensor) -> Tensor:
        last: Tensor = deployed.forward_features(image)[-1]
        return last

    with torch.inference_mode(), deterministic_cudnn():
        wants = [(features(image), deployed(image)) for image in images]
        replays = gpu.capture(lambda: features(static)), gpu.capture(lambda: deployed(static))
        for image, (want, logits) in zip(images, wants, strict=True):
            static.copy_(image)
            assert torch.equal(replays[0](), want)  # type: ignore[arg-type]
            torch.testing.assert_close(replays[1](), logits)  # cuBLAS may take another algorithm in a graph
    assert repvgg_cuda.verify(trained, deployed, images[1]).ok


@EVERY_ROW
def test_a_prepared_layer_captured_and_compiled(row: str, gpu: CudaDevice) -> None:
    case, x, weight, bias = problem_for(row, gpu)
    layer = repvgg_cuda.RepConv3x3(
        case.C, case.K, stride=case.stride, groups=case.groups, activation="relu", algorithm=row
    )
    layer.load_state_dict({"weight": weight.cpu(), "bias": bias.cpu()})
    layer = layer.eval().to(gpu.torch_device, x.dtype)
    want = call(case, x, weight, bias, row)
    repvgg_cuda.prepare(layer, x)
    static = x.clone(memory_format=torch.preserve_format)
    with torch.inference_mode():
        assert torch.equal(layer(x), want)
        assert torch.equal(gpu.capture(lambda: layer(static))(), want)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(gpu.compile(layer, "default")(x), want)


def test_gradients(gpu: CudaDevice) -> None:
    """As on the CPU, in float64, where they differ by rounding alone."""
    case = testing.Case("gradients", 2, 4, 7, 9, 6, stride=2, groups=2)
    grads = []
    for device in (gpu.torch_device, torch.device("cpu")):
        leaves = [t.to(device).requires_grad_() for t in case.tensors(torch.float64)]
        call(case, *leaves, "auto").square().sum().backward()  # type: ignore[arg-type]
        grads.append([leaf.grad.cpu() for leaf in leaves])  # type: ignore[union-attr]
    for there, here in zip(*grads, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------- devices and errors


@EVERY_ROW
def test_another_device_than_the_current_one(row: str, gpu: CudaDevice) -> None:
    if not DRY_RUN and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    case, x, weight, bias = problem_for(row, gpu)
    other = torch.device("cpu") if DRY_RUN else torch.device("cuda", 1 - (gpu.torch_device.index or 0))
    there = [t.to(other) for t in (x, weight, bias)]
    y = call(case, *there, row)
    assert y.device == there[0].device
    assert torch.equal(y.cpu(), call(case, x, weight, bias, row).cpu())


def test_errors_name_the_argument_and_leave_the_device_usable(gpu: CudaDevice) -> None:
    case = testing.Case("errors", 1, 8, 6, 6, 8)
    x, weight, bias = (t.to(gpu.torch_device) for t in case.tensors())
    elsewhere = torch.device("meta") if DRY_RUN else torch.device("cpu")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"weight": weight.to(elsewhere)}, "weight"),
        ({"bias": bias.to(elsewhere)}, "bias"),
        ({"weight": weight.double()}, "weight"),
        ({"bias": bias[:3]}, "bias"),
        ({"stride": 3}, "stride"),
        ({"groups": 3}, "groups"),
        ({"algorithm": "nothing"}, "nothing"),
        ({"activation": "gelu"}, "activation"),
    ]
    for change, named in wrong:
        arguments: dict[str, Any] = {"x": x, "weight": weight, "bias": bias} | change
        with pytest.raises(RuntimeError, match=named):
            repvgg_cuda.conv3x3(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)
    for row in ROWS:
        refused = next((dtype for dtype in testing.DTYPES if not accepts(row, case, dtype)), None)
        if refused is not None:
            with pytest.raises(RuntimeError, match=f"'{row}' cannot run this"):
                call(case, x.to(refused), weight.to(refused), bias.to(refused), row)
    gpu.synchronize()
    want = testing.conv3x3_fp64(x.cpu(), weight.cpu(), bias.cpu(), activation="relu")
    y = call(case, x, weight, bias, "auto").cpu()
    assert bool(((y.double() - want).abs() <= testing.error_bound(x.cpu(), weight.cpu(), bias.cpu())).all())


def test_an_empty_batch_launches_nothing(gpu: CudaDevice) -> None:
    case = dataclasses.replace(testing.REPVGG_LAYERS[2], N=0)
    for row, dtype in itertools.product(ROWS, testing.DTYPES):
        for name in accepts(row, case, dtype):
            x, weight, bias = (t.to(gpu.torch_device) for t in case.tensors(dtype))
            y = call(case, x.contiguous(memory_format=FORMATS[name]), weight, bias, row)
            assert y.shape == (0, case.K, case.H, case.W)
    gpu.synchronize()


def test_the_operator_s_contracts(gpu: CudaDevice) -> None:
    """Schema, fake kernel, autograd registration, on tensors of this device."""
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    x, weight, bias = (t.to(gpu.torch_device) for t in testing.Case("contracts", 1, 8, 6, 6, 8).tensors())
    for arguments in ((x, weight, bias, 1, 1, "relu", "auto", None), (x, weight, None, 2, 1, "identity", "auto", None)):
        torch.library.opcheck(torch.ops.repvgg_cuda.conv3x3.default, arguments)
