# SPDX-License-Identifier: MIT
"""The numbers of conv3x3: every algorithm, dtype and layout against the float64 oracle and its derived bound."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import repvgg_cuda
from repvgg_cuda import _ext, reference, testing

#: Every algorithm on its device.
RUNS = [
    pytest.param(device, algorithm, id=f"{device}-{algorithm}", marks=[pytest.mark.cuda] if device == "cuda" else [])
    for device in ("cpu", "cuda")
    for algorithm in ("auto", *repvgg_cuda.algorithms(device))
]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def assert_within_bound(y: Tensor, want: Tensor, bound: Tensor) -> None:
    assert y.shape == want.shape
    assert ((y.double() - want).abs() <= bound).all(), testing.worst(y, want, bound)


def skip_if_refused(algorithm: str, x: Tensor, weight: Tensor, stride: int, groups: int) -> None:
    if algorithm != "auto" and (why := repvgg_cuda.refusal(algorithm, x, weight, stride=stride, groups=groups)):
        pytest.skip(why)  # test_refusals_are_pinned keeps skips from growing unseen


#: The large layers run in float32 alone: the edge cases cover the other dtypes, in seconds.
CASES = [
    *((case, dtype) for case in testing.EDGE_CASES for dtype in testing.DTYPES),
    *((case, torch.float32) for case in testing.REPVGG_LAYERS),
]


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=[f"{case}-{str(dtype)[6:]}" for case, dtype in CASES])
@pytest.mark.parametrize(("device", "algorithm"), RUNS)
def test_matches_fp64(
    case: testing.Case, dtype: torch.dtype, memory_format: torch.memory_format, algorithm: str, device: str
) -> None:
    x, weight, bias = case.tensors(dtype, device)
    x = x.contiguous(memory_format=memory_format)
    skip_if_refused(algorithm, x, weight, case.stride, case.groups)
    geometry = (case.stride, case.groups)
    y = repvgg_cuda.conv3x3(
        x, weight, bias, stride=case.stride, groups=case.groups, activation="relu", algorithm=algorithm
    )
    want = testing.conv3x3_fp64(x, weight, bias, *geometry, activation="relu")
    assert_within_bound(y, want, testing.error_bound(x, weight, bias, *geometry, algorithm=algorithm))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=reference.output_format(x))


def test_the_bound_of_tf32_is_that_of_its_factors() -> None:
    """Factors with their low 13 bits rounded and cut off stay within it, and use most of it on a single product."""
    x, weight = torch.tensor([1 + 2**-10 - 2**-23]).reshape(1, 1, 1, 1), torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1 + 2**-11 - 2**-23
    cut, rounded = (
        (t.view(torch.int32) + add & -(1 << 13)).view(torch.float32) for t, add in ((x, 0), (weight, 1 << 12))
    )
    assert (cut.item(), rounded[0, 0, 1, 1].item()) == (1.0, 1.0)
    want, y = testing.conv3x3_fp64(x, weight, None), testing.conv3x3_fp64(cut, rounded, None)
    assert_within_bound(y, want, testing.error_bound(x, weight, None, algorithm="mma_tf32"))
    assert ((y - want).abs() > 0.98 * testing.error_bound(x, weight, None, algorithm="mma_tf32")).all()


def expected_refusal(name: str, case: testing.Case, dtype: torch.dtype) -> str | None:
    """What each row cannot do, said once more."""
    lanes = {"baseline": 4, "avx2": 8, "avx512": 16}[_ext.module.cpu_target()] if _ext.module else 0
    if dtype != torch.float32:
        return "x must be float32"
    if name == "stem":
        return "groups must be 1" if case.groups > 1 else "C_in must be at most 8" if case.C > 8 else None
    blocked = name in ("direct", *testing.WINOGRAD)
    if blocked and case.groups > 1 and (case.C // case.groups % lanes or case.K // case.groups % lanes):
        return "with groups, the channels of a group must be a multiple of the vector width"
    if name in testing.WINOGRAD:
        stride = 2 if name == "polyphase" else 1
        return None if case.stride == stride else f"stride must be {stride}"
    return None


def expected_cuda_refusal(name: str, case: testing.Case, dtype: torch.dtype) -> str | None:
    """What each row cannot do on some GPU that is not known."""
    half = name in ("mma", "stem")
    if (dtype in (torch.float16, torch.bfloat16)) != half or dtype == torch.float64:
        return "x must be float16 or bfloat16" if half else "x must be float32"
    if name in ("direct", "direct_split"):
        return None
    if name == "stem":
        refusals = {
            "groups must be 1": case.groups > 1,
            "stride must be 2": case.stride == 1,
            "in_channels must be at most 3": case.C > 3,
            "out_channels must be a multiple of 8": case.K % 8 != 0,
        }
        return next((text for text, refused in refusals.items() if refused), None)
    multiple = 8 if name == "mma" else 4
    if case.C // case.groups % multiple or case.K // case.groups % multiple:
        return f"in_channels and out_channels must be multiples of {multiple} in each group"
    return None


def test_refusals_are_pinned() -> None:
    """Nothing is refused but for these reasons; `aten` refuses nothing."""
    if _ext.module is None:
        pytest.skip(f"the compiled module {_ext.why_missing}")
    for device in ("cpu", "cuda"):
        for name in repvgg_cuda.algorithms(device)[:-1]:
            for case, dtype in CASES:
                for channels_last in (False, True):
                    shape, geometry = (case.N, case.C, case.H, case.W), (case.K, case.stride, case.groups)
                    why = _ext.module.refusal(name, device, -1, shape, *geometry, str(dtype)[6:], channels_last, "relu")
                    expected = expected_cuda_refusal if device == "cuda" else expected_refusal
                    want = expected(name, case, dtype)
                    assert why == want, (name, case)
    x, weight, _ = testing.EDGE_CASES[0].tensors()
    assert repvgg_cuda.refusal("aten", x, weight) is None
    names = ["planar", "stem", "winograd4", "winograd2", "polyphase", "direct", "winograd6", "aten"]
    assert repvgg_cuda.algorithms("cpu") == names
    if _ext.has_cuda_kernels():
        assert repvgg_cuda.algorithms("cuda") == ["mma", "stem", "direct", "direct_split", "mma_tf32", "aten"]


def test_a_named_algorithm_is_not_swapped_for_another() -> None:
    if _ext.module is None:
        pytest.skip(f"the compiled module {_ext.why_missing}")
    x, weight, _ = testing.EDGE_CASES[0].tensors(torch.float16)
    assert repvgg_cuda.refusal("direct", x, weight) == "x must be float32"
    with pytest.raises(RuntimeError) as error:
        repvgg_cuda.conv3x3(x, weight, algorithm="direct")
    text = "conv3x3: algorithm 'direct' cannot run this: x must be float32; use algorithm='auto'"
    assert str(error.value) == text


EVERY_ISA = """
import sys, torch, repvgg_cuda
from repvgg_cuda import _ext, testing
assert _ext.module.cpu_target() == sys.argv[1], _ext.module.cpu_target()
for case in (*testing.EDGE_CASES, *testing.REPVGG_LAYERS):
    x, weight, bias = case.tensors()
    geometry = (case.stride, case.groups)
    want = testing.conv3x3_fp64(x, weight, bias, *geometry)
    for algorithm in repvgg_cuda.algorithms()[:-1]:
        if repvgg_cuda.refusal(algorithm, x, weight, stride=case.stride, groups=case.groups):
            continue
        bound = testing.error_bound(x, weight, bias, *geometry, algorithm)
        first = None
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for memory_format in (torch.contiguous_format, torch.channels_last):
                y = repvgg_cuda.conv3x3(x.contiguous(memory_format=memory_format), weight, bias, stride=case.stride,
                                        groups=case.groups, algorithm=algorithm)
                assert ((y.double() - want).abs() <= bound).all(), (case, testing.worst(y, want, bound))
                first = y if first is None else first
                assert torch.equal(y, first), (case, algorithm, threads, memory_format)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    """The same kernels compiled for less capable machines, forced by REPVGG_CUDA_CPU_ISA."""
    if _ext.module is None:
        pytest.skip(f"the compiled module {_ext.why_missing}")
    if isa not in _ext.module.cpu_targets():
        pytest.skip(f"this CPU has no {isa}")
    environment = {**os.environ, "REPVGG_CUDA_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", EVERY_ISA, isa], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_an_error() -> None:
    if _ext.module is None:
        pytest.skip(f"the compiled module {_ext.why_missing}")
    code = "import torch, repvgg_cuda; repvgg_cuda.conv3x3(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3))"
    environment = {**os.environ, "REPVGG_CUDA_CPU_ISA": "avx3"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: REPVGG_CUDA_CPU_ISA must be one of baseline")
    assert last.endswith(", got 'avx3'")


@pytest.mark.parametrize("size", [(1, 96, 28), (1, 192, 14), (3, 192, 14)], ids=str)
def test_threads_may_share_blocks_of_tiles_or_not(size: tuple[int, int, int]) -> None:
    """Weights of over 1 MB, with more and with fewer tiles than pay for reading them in each thread."""
    batch, channels, extent = size
    case = testing.Case("large", batch, channels, extent, extent, channels)
    x, weight, bias = case.tensors()
    packed = repvgg_cuda.prepack(weight, list(x.shape), algorithm="winograd4")
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(repvgg_cuda.conv3x3(x, weight, bias, algorithm="winograd4", packed=packed))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_results_do_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for case in (*testing.EDGE_CASES, *testing.REPVGG_LAYERS):
            x, weight, bias = case.tensors()
            results = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                results.append(repvgg_cuda.conv3x3(x, weight, bias, stride=case.stride, groups=case.groups))
            assert torch.equal(results[0], results[1]), case
            assert torch.equal(results[0], results[2]), case
    finally:
        torch.set_num_threads(threads)


def test_concurrent_calls() -> None:
    """Several Python threads at once: each call has a workspace of its own."""
    x, weight, bias = testing.REPVGG_LAYERS[2].tensors()
    want = repvgg_cuda.conv3x3(x, weight, bias)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: repvgg_cuda.conv3x3(x, weight, bias), range(16)))
    assert all(torch.equal(y, want) for y in results)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 4), "groups")
    case = testing.Case(
        "any",
        N=data.draw(st.integers(0, 3), "N"),
        C=groups * data.draw(st.integers(1, 5), "C/groups"),
        H=data.draw(st.integers(1, 20), "H"),
        W=data.draw(st.integers(1, 20), "W"),
        K=groups * data.draw(st.integers(1, 5), "K/groups"),
        stride=data.draw(st.sampled_from([1, 2]), "stride"),
        groups=groups,
    )
    dtype = data.draw(st.sampled_from(testing.DTYPES), "dtype")
    with_bias = data.draw(st.booleans(), "bias")
    activation = data.draw(st.sampled_from(["identity", "relu"]), "activation")
    x, weight, bias = case.tensors(dtype, seed=data.draw(st.integers(0, 2**31), "seed"))
    bias_or_none = bias if with_bias else None
    y = repvgg_cuda.conv3x3(
        x,
        weight,
        bias_or_none,
        stride=case.stride,
        groups=groups,
        activation=activation,  # type: ignore[arg-type]
    )
    want = testing.conv3x3_fp64(x, weight, bias_or_none, case.stride, groups, activation)
    assert_within_bound(y, want, testing.error_bound(x, weight, bias_or_none, case.stride, groups))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_bias_may_be_float32_beside_16_bit(dtype: torch.dtype, device: str) -> None:
    x, weight, _ = testing.EDGE_CASES[3].tensors(dtype, device)
    bias = torch.randn(weight.shape[0], device=device)
    y = repvgg_cuda.conv3x3(x, weight, bias)
    want = testing.conv3x3_fp64(x, weight, bias)
    assert y.dtype == dtype
    # aten rounds the bias to the dtype of x first: one unit of that type on |bias| beyond the bound
    slack = testing.unit_roundoff(dtype) * bias.abs().double().reshape(1, -1, 1, 1)
    assert_within_bound(y, want, testing.error_bound(x, weight, bias) + slack)


def views_of(x: Tensor) -> dict[str, Tensor]:
    n, c, h, w = x.shape
    return {
        "sliced": torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2],
        "transposed": x.transpose(2, 3),
        "expanded-batch": x[:1].expand(n, c, h, w),
        "expanded-pixels": x[:, :, :1, :1].expand(n, c, h, w),
        "offset": torch.cat([x.flatten(), x.flatten()])[3 : 3 + x.numel()].view(x.shape),
        "channels-last-slice": x.contiguous(memory_format=torch.channels_last)[:, :, 1:],
    }


@pytest.mark.parametrize("view", views_of(torch.zeros(2, 4, 7, 9)))
@pytest.mark.parametrize(("device", "algorithm"), RUNS)
def test_strided_inputs(view: str, algorithm: str, device: str) -> None:
    x = views_of(torch.randn(2, 4, 7, 9, device=device))[view]
    weight = torch.randn(3, 3, 6, 4, device=device).permute(2, 3, 0, 1)  # not contiguous either
    bias = torch.randn(12, device=device)[::2]
    skip_if_refused(algorithm, x, weight, 1, 1)
    y = repvgg_cuda.conv3x3(x, weight, bias, algorithm=algorithm)
    bound = testing.error_bound(x, weight, bias, algorithm=algorithm)
    assert_within_bound(y, testing.conv3x3_fp64(x, weight, bias), bound)


@pytest.mark.parametrize(("device", "algorithm"), RUNS)
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_nan_and_inf_come_out_where_conv2d_has_them(algorithm: str, activation: str, device: str) -> None:
    x = torch.randn(1, 3, 9, 11, device=device)
    x[0, 0, 4, 4], x[0, 1, 0, 0], x[0, 2, 8, 10] = float("nan"), float("inf"), -float("inf")
    weight = torch.randn(4, 3, 3, 3, device=device)
    skip_if_refused(algorithm, x, weight, 1, 1)
    y = repvgg_cuda.conv3x3(x, weight, activation=activation, algorithm=algorithm)  # type: ignore[arg-type]
    want = F.conv2d(x, weight, padding=1)
    want = want.relu() if activation == "relu" else want
    assert want.isnan().any()
    assert want.isinf().any()
    if algorithm in testing.WINOGRAD:
        pytest.skip("spreads within a tile: test_nan_and_inf_stay_in_the_tiles_that_read_them")
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isposinf(), want.isposinf())
    assert torch.equal(y.isneginf(), want.isneginf())


@pytest.mark.parametrize("algorithm", testing.WINOGRAD)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_the_tiles_that_read_them(algorithm: str, value: float) -> None:
    """Every output of a Winograd tile may be NaN if one input of the tile is not finite; no other output changes."""
    if _ext.module is None:
        pytest.skip(f"the compiled module {_ext.why_missing}")
    stride, pairs = 2 if algorithm == "polyphase" else 1, len(testing.WINOGRAD[algorithm])
    x, weight = torch.randn(1, 3, 23, 29), torch.randn(4, 3, 3, 3)
    clean = repvgg_cuda.conv3x3(x, weight, stride=stride, algorithm=algorithm)
    reach = torch.zeros(clean.shape, dtype=torch.bool)
    h, w = 9, 14
    x[0, 1, h, w] = value
    touched = []
    for outputs, at in zip(clean.shape[2:], (h, w), strict=True):
        tiles = testing.winograd_tiles(outputs, pairs, stride)
        sizes = [(start, 2 * cls + stride - 1) for start, cls in tiles]
        touched.append([(s, s + m) for s, m in sizes if s * stride - 1 <= at <= (s + m - 1) * stride + 1])
    for top, bottom in touched[0]:
        for left, right in touched[1]:
            reach[:, :, top:bottom, left:right] = True
    y = repvgg_cuda.conv3x3(x, weight, stride=stride, algorithm=algorithm)
    want = F.conv2d(x, weight, stride=stride, padding=1)
    assert not y[~want.isfinite()].isfinite().any()
    assert torch.equal(y[~reach], clean[~reach])


@pytest.mark.parametrize("algorithm", [name for name in repvgg_cuda.algorithms() if name != "aten"])
def test_every_small_size(algorithm: str) -> None:
    """Extents from 1 to 40, every remainder modulo the tiles of both dimensions; channels off the vector width."""
    stride = 2 if algorithm == "polyphase" else 1
    for h in range(1, 41):
        for w in {1, 2, 3, 40, *(1 + (h * step + 5) % 40 for step in (1, 3, 7, 9, 11))}:
            case = testing.Case("size", 1 + h % 2, 1 + (h + w) % 9, h, w, 1 + (h * w) % 19, stride)
            if algorithm == "stem" and case.C > 8:
                continue
            x, weight, bias = case.tensors(seed=h * 64 + w)
            y = repvgg_cuda.conv3x3(x, weight, bias, stride=stride, algorithm=algorithm)
            want = testing.conv3x3_fp64(x, weight, bias, stride)
            assert_within_bound(y, want, testing.error_bound(x, weight, bias, stride, 1, algorithm))


@pytest.mark.parametrize("algorithm", [name for name in repvgg_cuda.algorithms() if name != "aten"])
def test_denormals(algorithm: str) -> None:
    stride = 2 if algorithm == "polyphase" else 1
    x = torch.randn(1, 8, 13, 17) * 1e-39
    weight = torch.randn(8, 8, 3, 3)
    y = repvgg_cuda.conv3x3(x, weight, stride=stride, algorithm=algorithm)
    # beside the relative bound each operation may lose half a step between subnormals
    steps = 2000 * torch.finfo(torch.float32).smallest_normal * testing.unit_roundoff(torch.float32)
    bound = testing.error_bound(x, weight, None, stride, 1, algorithm) + steps
    assert_within_bound(y, testing.conv3x3_fp64(x, weight, None, stride), bound)


def test_relu_keeps_nan_and_comes_after_the_bias(device: str) -> None:
    x, weight = torch.zeros(1, 1, 2, 2, device=device), torch.zeros(3, 1, 3, 3, device=device)
    bias = torch.tensor([float("nan"), -1.0, 2.0], device=device)
    y = repvgg_cuda.conv3x3(x, weight, bias, activation="relu")
    assert y[0, 0].isnan().all()
    assert (y[0, 1] == 0).all()
    assert (y[0, 2] == 2).all()


def test_same_bits_every_time(device: str) -> None:
    x, weight, bias = testing.EDGE_CASES[5].tensors(device=device)
    assert torch.equal(repvgg_cuda.conv3x3(x, weight, bias), repvgg_cuda.conv3x3(x, weight, bias))


def test_arguments_are_not_written(device: str) -> None:
    x, weight, bias = testing.EDGE_CASES[3].tensors(device=device)
    before = [t.clone() for t in (x, weight, bias)]
    repvgg_cuda.conv3x3(x, weight, bias, activation="relu")
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias), strict=True))


def test_inference_mode_and_threads() -> None:
    x, weight, bias = testing.EDGE_CASES[5].tensors()
    want = repvgg_cuda.conv3x3(x, weight, bias)
    with torch.inference_mode():
        assert torch.equal(repvgg_cuda.conv3x3(x, weight, bias), want)


X, WEIGHT, BIAS = testing.Case("ok", 1, 4, 5, 6, 8).tensors()

#: What a user gets wrong, and every text that answers.
BAD_CALLS = {
    "no-batch": (
        dict(x=X[0]),
        "conv3x3: x must be [N, C_in, H, W], got 3 dimensions; add a batch dimension with x.unsqueeze(0)",
    ),
    "int-x": (
        dict(x=X.int()),
        "conv3x3: x must be float64, float32, float16 or bfloat16, got int32; convert it with x.float()",
    ),
    "complex-x": (
        dict(x=X.to(torch.complex64)),
        "conv3x3: x must be float64, float32, float16 or bfloat16, got complex64; convert it with x.float()",
    ),
    "5x5": (
        dict(weight=torch.randn(8, 4, 5, 5)),
        "conv3x3: weight must be [C_out, C_in / groups, 3, 3], got [8, 4, 5, 5]; use F.conv2d for other kernel sizes",
    ),
    "flat-weight": (
        dict(weight=torch.randn(8, 36)),
        "conv3x3: weight must be [C_out, C_in / groups, 3, 3], got [8, 36]; use F.conv2d for other kernel sizes",
    ),
    "weight-dtype": (
        dict(weight=WEIGHT.half()),
        "conv3x3: weight must have the dtype of x (float32), got float16; convert one of them with .to()",
    ),
    "weight-device": (
        dict(weight=WEIGHT.to("meta")),
        "conv3x3: weight must be on the device of x (cpu), got meta; move it with .to(x.device)",
    ),
    "stride-3": (dict(stride=3), "conv3x3: stride must be 1 or 2, got 3; use F.conv2d for other strides"),
    "stride-negative": (dict(stride=-1), "conv3x3: stride must be 1 or 2, got -1; use F.conv2d for other strides"),
    "groups-0": (dict(groups=0), "conv3x3: groups must be at least 1, got 0"),
    "groups-3": (
        dict(groups=3),
        "conv3x3: groups must divide C_in and C_out, got groups=3, C_in=4, C_out=8",
    ),
    "channels": (
        dict(x=torch.randn(1, 6, 5, 6)),
        "conv3x3: x has C_in=6 channels, but weight [8, 4, 3, 3] with groups=1 expects 4",
    ),
    "no-rows": (
        dict(x=torch.randn(1, 4, 0, 6)),
        "conv3x3: x must have H >= 1 and W >= 1, got [1, 4, 0, 6]",
    ),
    "bias-length": (dict(bias=torch.randn(7)), "conv3x3: bias must be [C_out] = [8], got [7]"),
    "bias-shape": (dict(bias=torch.randn(8, 1)), "conv3x3: bias must be [C_out] = [8], got [8, 1]"),
    "bias-dtype": (
        dict(bias=BIAS.double()),
        "conv3x3: bias must have the dtype of x (float32), or float32 where x is float16 or bfloat16, got float64; "
        "convert it with .to()",
    ),
    "bias-device": (
        dict(bias=BIAS.to("meta")),
        "conv3x3: bias must be on the device of x (cpu), got meta; move it with .to(x.device)",
    ),
    "activation": (
        dict(activation="gelu"),
        "conv3x3: activation must be one of identity, relu, got 'gelu'",
    ),
    "algorithm-empty": (
        dict(algorithm=""),
        "conv3x3: algorithm must be 'auto' or a name from repvgg_cuda.algorithms(), got ''",
    ),
    "algorithm-unknown": (
        dict(algorithm="magic"),
        f"conv3x3: algorithm 'magic' is not available on cpu; available: {', '.join(repvgg_cuda.algorithms('cpu'))}",
    ),
    "sparse-x": (
        dict(x=X.to_sparse()),
        "conv3x3: x must be a dense tensor, got layout sparse_coo; convert it with .to_dense()",
    ),
    "sparse-weight": (
        dict(weight=WEIGHT.to_sparse()),
        "conv3x3: weight must be a dense tensor, got layout sparse_coo; convert it with .to_dense()",
    ),
    "sparse-bias": (
        dict(bias=BIAS.to_sparse()),
        "conv3x3: bias must be a dense tensor, got layout sparse_coo; convert it with .to_dense()",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_error_texts(change: dict[str, object], message: str) -> None:
    arguments = dict(x=X, weight=WEIGHT, bias=BIAS) | change
    with pytest.raises(RuntimeError) as error:
        repvgg_cuda.conv3x3(**arguments)  # type: ignore[arg-type]
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [pair for name, pair in BAD_CALLS.items() if not name.startswith(("sparse", "algorithm-unknown"))],
    ids=[name for name in BAD_CALLS if not name.startswith(("sparse", "algorithm-unknown"))],
)
def test_fake_kernel_raises_the_same_errors(change: dict[str, object], message: str) -> None:
    """The compiled checks and the Python ones must not drift apart."""
    arguments = dict(x=X, weight=WEIGHT, bias=BIAS) | change
    with pytest.raises(RuntimeError) as error:
        reference.conv3x3_fake(**arguments)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_wrong_python_types_are_errors_of_python() -> None:
    with pytest.raises(TypeError, match="^conv3x3: x must be a torch.Tensor, got list$"):
        repvgg_cuda.conv3x3([[1.0]], WEIGHT)  # type: ignore[arg-type]
