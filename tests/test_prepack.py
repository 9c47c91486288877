# SPDX-License-Identifier: MIT
"""Packed weights: the header, what they are checked for, the choice, and that results are those of the algorithm."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import repvgg_cuda
from repvgg_cuda import _ext, packed, reference, testing
from repvgg_cuda.explanation import Explanation

OPS = torch.ops.repvgg_cuda

needs_module = pytest.mark.skipif(_ext.module is None, reason=f"the compiled module {_ext.why_missing}")

#: Stride 1 and 2, groups, few channels, channels that fill no vector.
CASES = [
    testing.Case("plain", 2, 16, 15, 14, 24),
    testing.Case("strided", 1, 16, 15, 14, 24, stride=2),
    testing.Case("grouped", 2, 12, 9, 10, 20, groups=2),
    testing.Case("stem", 1, 3, 20, 18, 10, stride=2),
    testing.Case("odd", 3, 5, 7, 9, 6),
]
CASE = CASES[0]


def size(case: testing.Case) -> list[int]:
    return [case.N, case.C, case.H, case.W]


def pack(case: testing.Case, weight: Tensor, algorithm: str = "auto", **kwargs: Any) -> Tensor:
    return repvgg_cuda.prepack(
        weight, size(case), stride=case.stride, groups=case.groups, algorithm=algorithm, **kwargs
    )


def run(case: testing.Case, *tensors: Tensor, **kwargs: Any) -> Tensor:
    return repvgg_cuda.conv3x3(*tensors, stride=case.stride, groups=case.groups, **kwargs)


def explain(case: testing.Case, **kwargs: Any) -> Explanation:
    x, weight, _ = case.tensors()
    return repvgg_cuda.explain(x, weight, stride=case.stride, groups=case.groups, **kwargs)


def runnable(case: testing.Case) -> list[str]:
    return [candidate.name for candidate in explain(case).candidates if candidate.refusal is None]


def packing(case: testing.Case = CASE) -> str:
    """The name of an algorithm that packs weights."""
    return next(c.name for c in explain(case).candidates if c.refusal is None and c.packed_bytes > 0)


@needs_module
@pytest.mark.parametrize(
    ("case", "want"),
    [
        (testing.Case("notebook", 1, 2, 256, 256, 2), "planar"),  # it would use two of eight lanes
        (testing.Case("stem", 1, 3, 224, 224, 48, stride=2), "stem"),
    ],
    ids=str,
)
def test_the_stem_is_for_layers_with_many_outputs(case: testing.Case, want: str) -> None:
    assert _ext.module is not None
    if _ext.module.cpu_target() != "avx2":
        pytest.skip("the rates of the cost model are those of AVX2")
    assert explain(case, prepared=True).chosen.name == want


# ------------------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_weights_give_the_bits_of_their_algorithm(case: testing.Case) -> None:
    x, weight, bias = case.tensors()
    for name in runnable(case):
        made = pack(case, weight, name)
        assert packed.read(made).algorithm == name
        for format in (torch.contiguous_format, torch.channels_last):
            given = x.contiguous(memory_format=format)
            want = run(case, given, weight, bias, activation="relu", algorithm=name)
            got = run(case, given, weight, bias, activation="relu", packed=made)
            assert torch.equal(got, want), name
            assert got.stride() == want.stride()
            assert torch.equal(run(case, given, weight, bias, activation="relu", algorithm=name, packed=made), want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_serve_every_size(case: testing.Case) -> None:
    """Made for one N, H, W, used for others; the empty batch among them."""
    _, weight, bias = case.tensors()
    for name in runnable(case):
        made = pack(case, weight, name)
        for N, H, W in ((0, 9, 9), (1, 1, 1), (5, 23, 4)):
            x = torch.randn(N, case.C, H, W)
            want = run(case, x, weight, bias, algorithm=name)
            assert torch.equal(run(case, x, weight, bias, packed=made), want), (name, N, H, W)


def test_auto_takes_what_explain_says() -> None:
    for case in CASES:
        _, weight, _ = case.tensors()
        info = packed.read(pack(case, weight))
        chosen = explain(case, prepared=True).chosen
        assert (info.algorithm, info.payload_bytes) == (chosen.name, chosen.packed_bytes)
        assert (info.in_channels, info.out_channels, info.groups, info.stride) == (
            case.C,
            case.K,
            case.groups,
            case.stride,
        )


def test_weights_of_any_strides_and_not_written() -> None:
    x, weight, bias = CASE.tensors()
    for strided in (
        weight.contiguous(memory_format=torch.channels_last),
        weight.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([weight, -weight], -1)[..., 0],
    ):
        for name in runnable(CASE):
            made = pack(CASE, strided, name)
            assert torch.equal(made, pack(CASE, weight, name))
            assert torch.equal(run(CASE, x, strided, bias, packed=made), run(CASE, x, strided, bias, algorithm=name))
    before = weight.clone()
    pack(CASE, weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_have_the_header_alone(dtype: torch.dtype) -> None:
    x, weight, bias = CASE.tensors(dtype)
    made = pack(CASE, weight)
    assert (packed.read(made).algorithm, made.numel()) == ("aten", packed.HEADER_BYTES)
    assert torch.equal(run(CASE, x, weight, bias, packed=made), run(CASE, x, weight, bias, algorithm="aten"))


def test_the_same_weights_pack_into_the_same_bytes() -> None:
    _, weight, _ = CASE.tensors()
    for name in runnable(CASE):
        assert torch.equal(pack(CASE, weight, name), pack(CASE, weight.clone(), name))


@needs_module
def test_large_payloads_begin_on_a_huge_page() -> None:
    case = testing.Case("large", 1, 192, 14, 14, 192)
    _, weight, _ = case.tensors()
    names = [c.name for c in explain(case).candidates if c.refusal is None and c.packed_bytes >= 1 << 20]
    assert names
    for name in names:
        made = pack(case, weight, name)
        assert (made.data_ptr() + packed.HEADER_BYTES) % (2 << 20) == 0
        assert made.untyped_storage().nbytes() <= made.numel() + (4 << 20)
        moved = made.clone()  # elsewhere in memory it is as good
        x = torch.randn(1, 192, 5, 6)
        assert torch.equal(run(case, x, weight, packed=moved), run(case, x, weight, packed=made))


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("case", CASES, ids=str)
def test_low_memory_packs_no_more_than_the_weight(case: testing.Case) -> None:
    _, weight, _ = case.tensors()
    made = pack(case, weight, memory="low")
    assert made.numel() - packed.HEADER_BYTES <= weight.numel() * weight.element_size()
    assert packed.read(made).algorithm == explain(case, prepared=True, memory="low").chosen.name


@needs_module
def test_low_memory_refuses_a_named_algorithm_that_needs_more() -> None:
    _, weight, _ = CASE.tensors()
    weight_bytes = weight.numel() * 4
    large = next(c for c in explain(CASE).candidates if c.packed_bytes > weight_bytes and c.refusal is None)
    with pytest.raises(RuntimeError) as error:
        pack(CASE, weight, large.name, memory="low")
    assert str(error.value) == (
        f"prepack: algorithm '{large.name}' packs the weight into {large.packed_bytes} bytes, more than its "
        f"{weight_bytes}, which memory='low' rules out; use memory='fast' or algorithm='auto'"
    )


# ------------------------------------------------------------------------------------------------- what does not fit


def altered(made: Tensor, offset: int, data: bytes) -> Tensor:
    result = made.clone()
    result[offset : offset + len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    return result


def misaligned(made: Tensor) -> Tensor:
    room = torch.empty(made.numel() + 64, dtype=torch.uint8)
    begin = 8 + (-room.data_ptr()) % 64 % 56
    return room[begin : begin + made.numel()].copy_(made)


def foreign() -> dict[str, tuple[Any, str]]:
    """Damaged, truncated and foreign tensors: from good packed weights, and the answer."""
    no_header = "packed does not begin with the header that repvgg_cuda.prepack writes; call prepack again"
    not_packed = "packed must be a contiguous 1-D uint8 tensor on the CPU, as repvgg_cuda.prepack returns, got "
    return {
        "float": (lambda p: p.float(), not_packed + "float32"),
        "2-d": (lambda p: p[None], not_packed + "uint8 [1, "),
        "strided": (lambda p: torch.stack([p, p], 1)[:, 0], not_packed + "uint8 ["),
        "empty": (lambda p: p[:0], no_header),
        "half-a-header": (lambda p: p[:100], no_header),
        "zeros": (lambda p: torch.zeros_like(p), no_header),
        "other-version": (lambda p: altered(p, 7, b"2"), no_header),
        "truncated": (lambda p: p[:-1], "packed must have 128 + "),
        "header-alone": (lambda p: p[:128], "packed must have 128 + "),
        "too-long": (lambda p: torch.cat([p, p]), "packed must have 128 + "),
        "negative-size": (lambda p: altered(p, 72, struct.pack("<q", -1)), "packed must have 128 + -1 bytes"),
        "huge-size": (lambda p: altered(p, 72, struct.pack("<q", 2**63 - 1)), "packed must have 128 + 92233720368547"),
        "channels": (lambda p: altered(p, 40, struct.pack("<q", 17)), "packed was made for C_in=17, C_out=24,"),
        "groups": (lambda p: altered(p, 56, struct.pack("<q", 0)), "packed was made for C_in=16, C_out=24, groups=0"),
        "stride": (lambda p: altered(p, 64, struct.pack("<q", 2)), "packed was made for C_in=16, C_out=24, groups=1, "),
        "fingerprint": (lambda p: altered(p, 80, b"\1\2\3"), "packed was made for other values of weight, which have"),
        "algorithm": (
            lambda p: altered(p, 8, b"magic\0"),
            "packed was made for algorithm 'magic', which is not available on cpu; call prepack again",
        ),
        "binary-algorithm": (lambda p: altered(p, 8, b"\xff" * 16), f"packed was made for algorithm '{'?' * 16}'"),
        "another-rows": (
            lambda p: altered(p, 8, b"polyphase"),
            "packed was made for algorithm 'polyphase', which cannot run this: stride must be 2; call prepack again",
        ),
        "another-payload": (
            lambda p: altered(p[:-4].clone(), 72, struct.pack("<q", p.numel() - 132)),
            "packed has a payload of ",
        ),
        "misaligned": (misaligned, "packed must begin at a multiple of 64 bytes in memory; copy it with .clone()"),
    }


@needs_module
@pytest.mark.parametrize("name", foreign())
def test_foreign_packed_weights_are_errors(name: str) -> None:
    x, weight, bias = CASE.tensors()
    change, message = foreign()[name]
    bad = change(pack(CASE, weight, "winograd4"))
    with pytest.raises(RuntimeError) as error:
        run(CASE, x, weight, bias, packed=bad)
    assert str(error.value).startswith(f"conv3x3: {message}"), error.value
    assert "\n" not in str(error.value)
    if bad.numel() == 0:
        return  # that says "not packed" in a chain
    none = torch.empty(0)
    with pytest.raises(RuntimeError) as error:
        OPS.conv3x3_chain(x, [weight], [none], [bad], [1], [1], [0])
    assert str(error.value).startswith(f"conv3x3_chain: layer 0: {message}"), error.value


@needs_module
@pytest.mark.parametrize(
    "name", [n for n in foreign() if n not in ("algorithm", "binary-algorithm", "another-rows", "another-payload")]
)
def test_python_says_the_same(name: str) -> None:
    """reference.conv3x3 is the operator where the compiled module is missing; it knows no row and no payload."""
    x, weight, _ = CASE.tensors()
    change, message = foreign()[name]
    bad = change(pack(CASE, weight, "winograd4"))
    if name == "misaligned":
        message = "algorithm 'winograd4' is not available on cpu; available: aten"
    with pytest.raises(RuntimeError) as error:
        reference.conv3x3(x, weight, packed=bad)
    assert str(error.value).startswith(f"conv3x3: {message}"), error.value


@needs_module
@pytest.mark.parametrize("flips", range(40))
def test_no_flipped_header_byte_crashes(flips: int) -> None:
    """Whatever the header says, it is an error or the right numbers."""
    x, weight, bias = CASE.tensors()
    made = pack(CASE, weight, "winograd4")
    want = run(CASE, x, weight, bias, packed=made)
    generator = torch.Generator().manual_seed(flips)
    for _ in range(8):
        offset = int(torch.randint(88, (1,), generator=generator))
        bad = altered(made, offset, bytes([int(made[offset]) ^ 1 << int(torch.randint(8, (1,), generator=generator))]))
        if 17 < offset < 40:  # behind the algorithm's name, or of another instruction set: the payload is ignored
            assert torch.equal(run(CASE, x, weight, bias, packed=bad), want)
            continue
        with pytest.raises(RuntimeError, match="^conv3x3: packed "):
            run(CASE, x, weight, bias, packed=bad)


def test_weights_that_changed_are_noticed() -> None:
    x, weight, bias = CASE.tensors()
    made = pack(CASE, weight)
    message = "conv3x3: packed was made for other values of weight, which have changed since; call prepack again"
    for other in (weight + 1e-3, torch.randn_like(weight), weight.flip(0)):
        with pytest.raises(RuntimeError) as error:
            run(CASE, x, other, bias, packed=made)
        assert str(error.value) == message
    assert torch.equal(run(CASE, x, weight.clone(), bias, packed=made), run(CASE, x, weight, bias, packed=made))
    with pytest.raises(RuntimeError, match=message):
        run(CASE, x.double(), weight.double(), bias.double(), packed=made)


@needs_module
def test_the_algorithm_is_that_of_the_packed_weights() -> None:
    x, weight, _ = CASE.tensors()
    made = pack(CASE, weight, "winograd4")
    with pytest.raises(RuntimeError) as error:
        run(CASE, x, weight, packed=made, algorithm="direct")
    assert str(error.value) == (
        "conv3x3: algorithm must be 'auto' or that of packed, 'winograd4', got 'direct'; call prepack again with "
        "algorithm='direct'"
    )


FOREIGN_TARGET = """
import sys, torch, repvgg_cuda
from repvgg_cuda import _ext, packed
file, isa = sys.argv[1:]
assert _ext.module.cpu_target() == isa
saved = torch.load(file)
x, weight, bias = saved["tensors"]
for name, made in saved["packed"].items():
    info = packed.read(made)
    assert info.target not in ("", isa), info
    got = repvgg_cuda.conv3x3(x, weight, bias, packed=made)
    assert torch.equal(got, repvgg_cuda.conv3x3(x, weight, bias, algorithm=name)), name
    none = torch.empty(0)
    chained = torch.ops.repvgg_cuda.conv3x3_chain(x, [weight], [bias], [made], [1], [1], [0])
    assert torch.equal(chained, got), name
"""


@needs_module
def test_another_instruction_set_keeps_the_algorithm_and_packs_anew(tmp_path: Path) -> None:
    assert _ext.module is not None
    targets = _ext.module.cpu_targets()
    if _ext.module.cpu_target() == targets[0]:
        pytest.skip("the least capable instruction set runs here already")
    x, weight, bias = CASE.tensors()
    made = {
        c.name: pack(CASE, weight, c.name) for c in explain(CASE).candidates if c.refusal is None and c.packed_bytes
    }
    file = tmp_path / "packed.pt"
    torch.save({"tensors": (x, weight, bias), "packed": made}, file)
    environment = {**os.environ, "REPVGG_CUDA_CPU_ISA": targets[0]}
    command = [sys.executable, "-c", FOREIGN_TARGET, str(file), targets[0]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------- wrong arguments

X, WEIGHT, _ = testing.Case("ok", 1, 4, 5, 6, 8).tensors()
NAMES = ", ".join(repvgg_cuda.algorithms("cpu"))

BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "three-numbers": (dict(input_size=[4, 5, 6]), "input_size must be [N, C_in, H, W], got 3 numbers"),
    "int-weight": (
        dict(weight=WEIGHT.int()),
        "weight must be float64, float32, float16 or bfloat16, got int32; convert it with weight.float()",
    ),
    "negative-batch": (dict(input_size=[-1, 4, 5, 6]), "input_size must have N >= 0, got -1"),
    "1x1": (
        dict(weight=torch.randn(8, 4, 1, 1)),
        "weight must be [C_out, C_in / groups, 3, 3], got [8, 4, 1, 1]; use F.conv2d for other kernel sizes",
    ),
    "stride": (dict(stride=3), "stride must be 1 or 2, got 3; use F.conv2d for other strides"),
    "groups": (dict(groups=3), "groups must divide C_in and C_out, got groups=3, C_in=4, C_out=8"),
    "channels": (
        dict(input_size=[1, 6, 5, 6]),
        "input_size has C_in=6 channels, but weight [8, 4, 3, 3] with groups=1 expects 4",
    ),
    "no-rows": (dict(input_size=[1, 4, 0, 6]), "input_size must have H >= 1 and W >= 1, got [1, 4, 0, 6]"),
    "memory": (dict(memory="little"), "memory must be one of fast, low, got 'little'"),
    "algorithm-empty": (
        dict(algorithm=""),
        "algorithm must be 'auto' or a name from repvgg_cuda.algorithms(), got ''",
    ),
    "algorithm-unknown": (
        dict(algorithm="magic"),
        f"algorithm 'magic' is not available on cpu; available: {NAMES}",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_error_texts(change: dict[str, Any], message: str) -> None:
    """The compiled checks and those of the fake kernel say the same."""
    arguments = dict(weight=WEIGHT, input_size=[1, 4, 5, 6]) | change
    with pytest.raises(RuntimeError) as error:
        repvgg_cuda.prepack(**arguments)
    assert str(error.value) == f"prepack: {message}"
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(RuntimeError) as error:
        repvgg_cuda.prepack(**arguments | {"weight": mode.from_tensor(arguments["weight"])})
    assert str(error.value) == f"prepack: {message}"


@needs_module
def test_a_named_algorithm_that_refuses() -> None:
    with pytest.raises(RuntimeError) as error:
        repvgg_cuda.prepack(WEIGHT, [1, 4, 5, 6], stride=2, algorithm="winograd4")
    text = "prepack: algorithm 'winograd4' cannot run this: stride must be 1; use algorithm='auto'"
    assert str(error.value) == text


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="^prepack: weight must be a torch.Tensor, got list$"):
        repvgg_cuda.prepack([1.0], [1, 1, 1, 1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^conv3x3: packed must be a torch.Tensor, got bytes$"):
        repvgg_cuda.conv3x3(X, WEIGHT, packed=b"RVGPACK1")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- a citizen of PyTorch


@pytest.mark.parametrize("case", CASES[:3], ids=str)
@pytest.mark.parametrize("memory", packed.MEMORY)
def test_opcheck_prepack(case: testing.Case, memory: str) -> None:
    _, weight, _ = case.tensors()
    torch.library.opcheck(OPS.prepack.default, (weight, size(case), case.stride, case.groups, "auto", memory))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_conv3x3_with_packed_weights(requires_grad: bool) -> None:
    arguments = [t.requires_grad_(requires_grad) for t in CASE.tensors()]
    made = pack(CASE, arguments[1].detach())
    torch.library.opcheck(OPS.conv3x3.default, (*arguments, 1, 1, "relu", "auto", made))


def test_gradients_are_those_without_packed_weights() -> None:
    results = []
    for prepared in (False, True):
        x, weight, bias = (t.requires_grad_() for t in CASE.tensors())
        made = pack(CASE, weight, packing()) if prepared and _ext.module else None
        assert made is None or not made.requires_grad
        algorithm = "auto" if made is not None or _ext.module is None else packing()
        y = run(CASE, x, weight, bias, activation="relu", packed=made, algorithm=algorithm)
        results.append(torch.autograd.grad(y.square().sum(), (x, weight, bias)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_leaves_packed_weights_out() -> None:
    """They are those of the float32 weight, not of the cast one."""
    x, weight, bias = CASE.tensors()
    made = pack(CASE, weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(CASE, x, weight, bias, packed=made)
        assert torch.equal(y, run(CASE, x, weight, bias))
    assert y.dtype == torch.bfloat16


def test_vmap_over_images_keeps_them_and_over_weights_leaves_them_out() -> None:
    x, weight, bias = CASE.tensors()
    made = pack(CASE, weight)
    images = torch.stack([x, -x, 2 * x])
    got = torch.func.vmap(lambda image: run(CASE, image, weight, bias, packed=made))(images)
    want = torch.stack([run(CASE, image, weight, bias, packed=made) for image in images])
    assert torch.equal(got, want)
    weights = torch.stack([weight, -weight])
    got = torch.func.vmap(lambda w: run(CASE, x, w, bias, packed=made))(weights)
    for y, w in zip(got, weights, strict=True):
        want = testing.conv3x3_fp64(x, w, bias)
        assert ((y.double() - want).abs() <= testing.error_bound(x, w, bias)).all()
    with pytest.raises(RuntimeError, match="^prepack: vmap is not supported; pack the weights one after another"):
        torch.func.vmap(lambda w: pack(CASE, w))(weights)


def test_compiled_calls_take_packed_weights() -> None:
    x, weight, bias = CASE.tensors()
    made = pack(CASE, weight)
    compiled = torch.compile(lambda x, p: run(CASE, x, weight, bias, packed=p), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, made), run(CASE, x, weight, bias, packed=made))
    weight[0, 0, 0, 0] += 1  # the first weight is one of the samples
    with pytest.raises(RuntimeError, match="packed was made for other values of weight"):
        compiled(x, made)


def test_meta_weights_have_a_header_of_no_device() -> None:
    made = repvgg_cuda.prepack(WEIGHT.to("meta"), [1, 4, 5, 6])
    assert (made.device.type, made.dtype) == ("meta", torch.uint8)
    y = repvgg_cuda.conv3x3(X.to("meta"), WEIGHT.to("meta"), packed=made)
    assert y.shape == (1, 8, 5, 6)


# ------------------------------------------------------------------------------------------------------ explanations


@needs_module
@pytest.mark.parametrize("case", CASES, ids=str)
def test_explain_shows_every_row(case: testing.Case) -> None:
    explanation = explain(case)
    x, weight, _ = case.tensors()
    assert [c.name for c in explanation.candidates] == repvgg_cuda.algorithms("cpu")
    assert sum(c.chosen for c in explanation.candidates) == 1
    text = str(explanation)
    for candidate in explanation.candidates:
        why = repvgg_cuda.refusal(candidate.name, x, weight, stride=case.stride, groups=case.groups)
        assert candidate.refusal == why
        assert candidate == explanation[candidate.name]
        line = next(line for line in text.splitlines() if line.startswith(f"{candidate.name} "))
        assert why is None or line.endswith(f"refuses: {why}")
        if why is None:
            assert candidate.seconds is not None
            assert candidate.seconds > 0
            assert candidate.packed_bytes == pack(case, weight, candidate.name).numel() - packed.HEADER_BYTES
            assert candidate.chosen == line.endswith("chosen by 'auto'")
    with pytest.raises(KeyError, match="there is no algorithm 'magic' here"):
        explanation["magic"]


@needs_module
def test_opt_in_algorithms_are_never_chosen() -> None:
    for case in (*CASES, *testing.REPVGG_LAYERS):
        explanation = explain(case, prepared=True)
        assert explanation.chosen.name != "winograd6"
        if explanation["winograd6"].refusal is None:
            assert explanation["winograd6"].seconds == float("inf")
            assert "runs if named only" in str(explanation)


def test_explain_is_what_runs() -> None:
    """Without packed weights too: the bits are those of the algorithm it names."""
    for case in (*CASES, testing.EDGE_CASES[0], testing.EDGE_CASES[8]):
        x, weight, bias = case.tensors()
        name = explain(case).chosen.name
        assert torch.equal(run(case, x, weight, bias), run(case, x, weight, bias, algorithm=name)), case


def test_explain_checks_its_arguments() -> None:
    with pytest.raises(RuntimeError, match="^conv3x3: x has C_in=4 channels, but weight"):
        repvgg_cuda.explain(X, torch.randn(8, 3, 3, 3))
    with pytest.raises(RuntimeError, match="^explain: memory must be one of fast, low, got 'little'$"):
        repvgg_cuda.explain(X, WEIGHT, memory="little")  # type: ignore[arg-type]
