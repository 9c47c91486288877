# SPDX-License-Identifier: MIT
"""Models to where they will run: ONNX, ``torch.export`` files and AOTInductor packages; the subcommand ``export``.

Every file is written whole or not at all. Batch and image size stay free unless ``dynamic=False``.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as export_config
from torch.utils._sympy.numbers import int_oo

from repvgg_cuda import checkpoint, demo, ops
from repvgg_cuda.branches import require
from repvgg_cuda.console import naming, positive, progress, require_target
from repvgg_cuda.conversion import model_for
from repvgg_cuda.convert import find
from repvgg_cuda.files import atomic_file, atomic_path
from repvgg_cuda.models import model_names
from repvgg_cuda.modules import RepConv3x3
from repvgg_cuda.reference import ACTIVATIONS
from repvgg_cuda.zoo import ZOOS

#: Protocol buffers, which ONNX files are, end here.
_ONNX_LIMIT = 2**31 - 1

_TORCHSCRIPT = (
    "TorchScript is not supported: torch.jit does not take these models, and is no longer developed; in its place, pt2 "
    "(torch.export) and aoti (AOTInductor) are for torch, onnx for every other runtime"
)


@dataclass(frozen=True)
class Exported:
    """What was written. ``operators``: how often each stands in the graph; ``notes`` on what was left out."""

    path: Path
    size: int
    operators: Mapping[str, int]
    notes: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------------- graphs


def _program(
    model: nn.Module, example: Tensor | Sequence[Tensor], dynamic: bool, keep_packed: bool
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """``model`` as a graph, and notes. The model itself stays as it is."""
    training = next((path for path, module in model.named_modules() if module.training), None)
    require(training is None, f"export: {training or 'the model'} is in training mode; call .eval() first")
    args = (example,) if isinstance(example, Tensor) else tuple(example)
    require(
        len(args) > 0 and all(isinstance(each, Tensor) for each in args),
        "export: example must be a tensor or a tuple of tensors, as the model takes them",
    )
    notes = _notes(model, keep_packed)
    if not keep_packed:
        model = _without_packed(model)
    shapes: tuple[dict[int, Any], ...] | None = None
    if dynamic:
        free = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
        shapes = tuple(dict(free) if each.dim() == 4 else {} for each in args)
    try:
        # Else a batch of one, and a feature map of one row or column, are taken for constants of the model.
        with torch.no_grad(), export_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            program = torch.export.export(model, args, dynamic_shapes=shapes)
    except Exception as error:  # torch has many, each of many lines
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "; dynamic=False (--fixed) takes the size of the example for good" if dynamic else ""
        raise RuntimeError(f"export: torch.export cannot take this model as a graph: {reason.strip()}{hint}") from error
    if dynamic:
        _require_any_size(program)
    return program, notes


def _require_any_size(program: torch.export.ExportedProgram) -> None:
    """A size that the graph does not hold for is an error of torch.export.load, but not of ONNX: it is asked here."""
    limits = [int(limit.upper) for limit in program.range_constraints.values() if limit.upper != int_oo]
    require(
        not limits,
        f"export: the graph of this model would hold for at most {min(limits, default=0)} rows or columns; a larger "
        "example may help, and dynamic=False (--fixed) takes the size of the example for good",
    )


def _notes(model: nn.Module, keep_packed: bool) -> tuple[str, ...]:
    notes = []
    branched = _branched(model)
    if branched:
        blocks = "1 block still has" if len(branched) == 1 else f"{len(branched)} blocks still have"
        notes.append(
            f"{blocks} branches ({', '.join(branched[:3])}{', ...' * (len(branched) > 3)}): fold first, with "
            "repvgg_cuda.deploy; no runtime does"
        )
    prepared = [m for m in model.modules() if isinstance(m, RepConv3x3) and m.prepared is not None]
    if prepared and not keep_packed:
        notes.append(
            f"packed weights of {len(prepared)} layers were left out: they are for this machine and this version"
        )
    if prepared and keep_packed:
        notes.append(f"packed weights of {len(prepared)} layers are in the file: other kinds of CPU pack in every call")
    return tuple(notes)


def _branched(model: nn.Module) -> list[str]:
    """The paths of blocks that could be folded."""
    with torch.no_grad():
        try:
            found, _ = find(model, chains=False)
        except RuntimeError:  # a block without running statistics, which nothing could fold
            return []
    return [each.path or "the model itself" for each in found if not each.block.reason]


def _without_packed(model: nn.Module) -> nn.Module:
    """``model``, or a copy of it whose layers are not prepared; its blocks then stand one by one in the graph."""
    if not any(isinstance(module, RepConv3x3) and module.prepared is not None for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, RepConv3x3):
            module.prepared = None
    return model


def _operators(program: torch.export.ExportedProgram) -> Mapping[str, int]:
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    return Counter(str(node.target).removesuffix(".default") for node in nodes)


def _target(path: str | Path, suffix: str) -> Path:
    path = Path(path)
    require(path.suffix == suffix, f"{path}: the name of the file must end in {suffix}")
    return path


# --------------------------------------------------------------------------------------------------------------- ONNX


def export_onnx(
    model: nn.Module, example: Tensor | Sequence[Tensor], path: str | Path, *, dynamic: bool = True, opset: int = 18
) -> Exported:
    """Writes an ONNX file; every operator of this package becomes ``Conv`` and, where it has one, ``Relu``.

    Args:
        model: in eval mode, usually deployed. Prepared or not: packed weights mean nothing to other runtimes.
        example: an input, or a tuple of them; only sizes and dtypes matter.
        path: ``.onnx``.
        dynamic: leave batch, height and width of every 4-D input free.
        opset: of ONNX's own operators.
    Raises:
        ImportError: onnx and onnxscript are needed. RuntimeError: the model is in training mode or cannot be exported.
        OSError: ``path`` cannot be written.
    """
    path = _target(path, ".onnx")
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"export_onnx needs onnx and onnxscript: pip install onnx onnxscript ({error})") from error
    program, notes = _program(model, example, dynamic, keep_packed=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        converted = torch.onnx.export(
            program, dynamo=True, opset_version=opset, custom_translation_table=_translations(), verbose=False
        )
    assert converted is not None
    proto = converted.model_proto
    foreign = {node.op_type for node in proto.graph.node if node.domain not in ("", "ai.onnx")}
    require(not foreign, f"export_onnx: {', '.join(sorted(foreign))} would be operators that no runtime knows")
    require(
        proto.ByteSize() <= _ONNX_LIMIT,
        f"export_onnx: the model takes {proto.ByteSize():,} bytes, and an ONNX file ends at {_ONNX_LIMIT:,}; use pt2",
    )
    onnx.checker.check_model(proto)
    data = proto.SerializeToString()
    with atomic_file(path) as file:
        file.write(data)
    return Exported(path, len(data), Counter(node.op_type for node in proto.graph.node), notes)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How ONNX says the operators of this package."""
    from onnxscript import opset18 as op

    def layer(x: Any, weight: Any, bias: Any, stride: int, groups: int, activation: str) -> Any:
        args = [x, weight] if bias is None else [x, weight, op.CastLike(bias, x)]  # a bias may be wider than x
        y = op.Conv(*args, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[stride, stride], group=groups)
        return op.Relu(y) if activation == "relu" else y

    def conv3x3(
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: int = 1,
        groups: int = 1,
        activation: str = "identity",
        algorithm: str = "auto",
        packed: Any = None,
    ) -> Any:
        return layer(x, weight, bias, stride, groups, activation)

    def conv3x3_chain(
        x: Any,
        weights: Sequence[Any],
        biases: Sequence[Any],
        packed: Sequence[Any],
        strides: Sequence[int],
        groups: Sequence[int],
        activations: Sequence[int],
        algorithm: str = "auto",
    ) -> Any:
        for weight, bias, stride, g, code in zip(weights, biases, strides, groups, activations, strict=True):
            x = layer(x, weight, None if bias.shape[0] == 0 else bias, stride, g, ACTIVATIONS[code])  # empty: none
        return x

    return {ops.OVERLOADS["conv3x3"]: conv3x3, ops.OVERLOADS["conv3x3_chain"]: conv3x3_chain}


# ------------------------------------------------------------------------------------------------------- torch's own


def export_pt2(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    path: str | Path,
    *,
    dynamic: bool = True,
    keep_packed: bool = False,
) -> Exported:
    """Writes a ``torch.export`` file: ``torch.export.load(path).module()`` runs it, after ``import repvgg_cuda``.

    Args:
        model, example, dynamic: as for :func:`export_onnx`. path: ``.pt2``.
        keep_packed: keep the packed weights of a prepared model. They are for one version of this package and one
            instruction set; elsewhere they are of no use, or refused. By default they are left out, and the file runs
            wherever this package does.
    Raises:
        RuntimeError, OSError: as :func:`export_onnx`.
    """
    path = _target(path, ".pt2")
    program, notes = _program(model, example, dynamic, keep_packed)
    with atomic_path(path) as temporary:
        torch.export.save(program, temporary)
    return Exported(path, path.stat().st_size, _operators(program), notes)


def export_aoti(
    model: nn.Module, example: Tensor | Sequence[Tensor], path: str | Path, *, dynamic: bool = True
) -> Exported:
    """Compiles the model ahead of time: ``torch._inductor.aoti_load_package(path)``, after ``import repvgg_cuda``.

    A package is machine code for this kind of CPU. Packed weights of a prepared model are left out all the same: the
    package does not keep them aligned as the operators need them. Needs a C++ compiler. Arguments and errors: as
    :func:`export_onnx`; path: ``.pt2``.
    """
    path = _target(path, ".pt2")
    program, notes = _program(model, example, dynamic, keep_packed=False)
    with atomic_path(path) as temporary:
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(temporary))
        except OSError:
            raise
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise RuntimeError(f"export_aoti: AOTInductor cannot compile the model: {reason.strip()}") from error
    return Exported(path, path.stat().st_size, _operators(program), notes)


EXPORTERS: Mapping[str, Callable[..., Exported]] = {"onnx": export_onnx, "pt2": export_pt2, "aoti": export_aoti}


def export(
    model: nn.Module, example: Tensor | Sequence[Tensor], path: str | Path, *, to: str, **options: Any
) -> Exported:
    """:func:`export_onnx`, :func:`export_pt2` or :func:`export_aoti`, by name. RuntimeError for any other."""
    require(to != "torchscript", f"export: {_TORCHSCRIPT}")
    require(to in EXPORTERS, f"export: to must be one of {', '.join(EXPORTERS)}, got '{to}'")
    return EXPORTERS[to](model, example, path, **options)


# --------------------------------------------------------------------------------------------------------- subcommand


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``repvgg-cuda export``."""
    parser.add_argument("input", type=Path, metavar="CHECKPOINT", help="in train form or deploy form, of any zoo")
    parser.add_argument("output", type=Path, metavar="OUT", help=".onnx, or .pt2")
    parser.add_argument(
        "--model", choices=model_names(), metavar="NAME", required=True, help="whose it is, such as RepVGG-A0"
    )
    parser.add_argument(
        "--to", choices=(*EXPORTERS, "torchscript"), required=True, help="torchscript only says what to take instead"
    )
    parser.add_argument("--from", dest="source", choices=("auto", *ZOOS), default="auto", help="default: %(default)s")
    parser.add_argument("--eps", type=float, help="of the BatchNorms; default: that with which the zoo trains")
    parser.add_argument("--image-size", type=positive, metavar="PIXELS", help="default: that of the model, 224 or 320")
    parser.add_argument("--fixed", action="store_true", help="one image of that size for good; default: any")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    """``repvgg-cuda export``."""
    require(args.to != "torchscript", f"--to torchscript: {_TORCHSCRIPT}")
    _target(args.output, ".onnx" if args.to == "onnx" else ".pt2")
    require_target(args.input, args.output, args.force)
    with progress() as show:
        show(f"loading {args.input}")
        with naming(args.input):
            model, lines = load_deployed(args.input, args.model, source=args.source, eps=args.eps)
        size = args.image_size or demo.input_size(args.model)[1]
        weight = model.get_parameter("stage0.rbr_reparam.weight")
        example = torch.zeros(1, weight.shape[1], size, size, dtype=weight.dtype)
        show(f"exporting to {args.to}")
        exported = export(model, example, args.output, to=args.to, dynamic=not args.fixed)
    print(f"{args.input} -> {args.output} ({args.to}, {exported.size:,} bytes)")
    operators = ", ".join(f"{count} {name}" for name, count in sorted(exported.operators.items()))
    for line in (*lines, f"operators: {operators}", *(f"note: {note}" for note in exported.notes)):
        print(f"  {line}")
    return 0


def load_deployed(
    path: Path, name: str, *, source: str = "auto", eps: float | None = None
) -> tuple[nn.Module, list[str]]:
    """The model ``name`` deployed, in eval mode, from a checkpoint in either form of any zoo; and what was done to it.

    Raises:
        RuntimeError, OSError: as :func:`repvgg_cuda.checkpoint.load_state_dict_file`,
            :func:`repvgg_cuda.fuse_state_dict` and :func:`repvgg_cuda.checkpoint.check_fits`.
    """
    loaded = checkpoint.read_state_dict_file(path)
    trained = checkpoint.recognise(list(loaded.state), source=source).form == "train"
    state, report = checkpoint.fuse_state_dict(loaded.state, source=source, target="official", eps=eps, fold=trained)
    lines = [f"note: {note}" for note in loaded.notes] + [f"warning: {text}" for text in loaded.warnings]
    model = model_for(name, state)
    dtype = state["linear.weight"].dtype
    require(dtype.is_floating_point, f"linear.weight must be of floating point, got {dtype}")
    model.to(dtype)
    checkpoint.load_into(model, state)
    return model.eval(), lines + (report.lines() if trained else ["already in deploy form: nothing to fold"])
