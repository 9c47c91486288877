# SPDX-License-Identifier: MIT
"""Every model of timm through the conversion: blocks expected, found, folded, errors, parameters, false positives.

    python benchmarks/timm_coverage.py                     # the whole list; hours. Stop and start again at will
    python benchmarks/timm_coverage.py 'repvgg_*' fastvit_t8
    python benchmarks/timm_coverage.py --table-only        # docs/coverage.md from what is known so far

First the structure alone is read, on the meta device. Where timm's classes or the graph pass say that there are sums
of branches, the model is built with random weights and disturbed BatchNorm statistics (a wrong fold then shows),
converted, and compared with itself in float64, beside timm's own ``reparameterize_model``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import json
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from repvgg_cuda import reparameterize
from repvgg_cuda.convert import find
from repvgg_cuda.files import write_text_atomically
from repvgg_cuda.networks import randomise_

ROOT = Path(__file__).resolve().parent.parent
#: More parameters than this are converted in structure only: the float64 oracle would not fit into memory.
MAX_PARAMETERS = 150_000_000
SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)


def import_timm() -> Any:
    """timm, also where torchvision was built for another torch: no model here needs its operators.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        import timm
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]  # half imported
        # The module registers shape rules for operators that did not load.
        sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")
        import timm
    return timm


# ------------------------------------------------------------------------------------------------------------ expected


def _count(*branches: Any) -> int:
    """Branches that there are: modules, and those in lists."""
    present = [each for each in branches if each is not None]
    return sum(len(each) if isinstance(each, nn.ModuleList | nn.Sequential) else 1 for each in present)


def _mobileone(m: Any) -> int:
    return int(_count(m.identity, m.conv_kxk, m.conv_scale) > 1)


def _ghost_module(m: Any) -> int:
    primary = _count(m.primary_rpr_skip, m.primary_rpr_conv, m.primary_rpr_scale) > 1
    return primary + (_count(m.cheap_rpr_skip, m.cheap_rpr_conv, m.cheap_rpr_scale) > 1)


#: Sums that timm's own classes fold, by class name: how many a module has.
EXPECTED: Mapping[str, Callable[[Any], int]] = {
    "RepVggBlock": lambda m: int(m.reparam_conv is None),
    "MobileOneBlock": _mobileone,
    "ReparamLargeKernelConv": lambda m: int(m.small_conv is not None),
    "RepMixer": lambda m: 1,
    "RepConditionalPosEnc": lambda m: 1,
    "RepVggDw": lambda m: 1,
    "RepCPE": lambda m: 1,
    "RepGhostModule": lambda m: int(_count(m.fusion_conv) > 0),
    "GhostModuleV3": lambda m: _ghost_module(m) if not m.infer_mode else 0,
    "GhostBottleneckV3": lambda m: int(m.stride > 1 and _count(m.dw_rpr_skip, m.dw_rpr_conv, m.dw_rpr_scale) > 1),
    "Residual": lambda m: int(type(getattr(m, "m", None)).__name__ == "Conv2dNorm"),
    "EfficientViMBlock": lambda m: 2,
    "PatchMerging": lambda m: _count(getattr(m, "dwconv1", None), getattr(m, "dwconv2", None)),
    "RepDepthwiseSeparable": lambda m: int(_count(m.dw_conv_list) > 1),
}


def expected_sums(model: nn.Module) -> int:
    """How many sums of branches timm's classes say there are; those within another one are part of it."""
    total = 0

    def visit(module: nn.Module) -> None:
        nonlocal total
        count = EXPECTED.get(type(module).__name__)
        if count is not None:
            total += count(module)
        if type(module).__name__ != "RepMixer":  # it holds two blocks, which its own sum takes in
            for child in module.children():
                visit(child)

    visit(model)
    return total


# ------------------------------------------------------------------------------------------------------------- one row


def structure(timm: Any, name: str) -> dict[str, Any]:
    """What the graph pass finds in the structure of a model, without its weights."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # some compute with values as they are built
        model = timm.create_model(name, pretrained=False)
    model.eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        found, notes = find(model.to("meta"))
    sums = [each for each in found if not each.block.is_chain]
    return {
        "model": name,
        "parameters": parameters,
        "expected": expected_sums(model),
        "found": len(sums),
        "chains": len(found) - len(sums),
        "kinds": sorted({type(each.block.traced.module.get_submodule(each.block.scope)).__name__ for each in sums}),
        "reasons": sorted({each.block.reason for each in found if each.block.reason}),
        "notes": len(notes),
    }


@torch.no_grad()
def examine(timm: Any, name: str) -> dict[str, Any]:
    """Converts a model with random weights and compares it with itself in float64."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    x = smallest_input(model)
    as_trained_(model, x)
    want = copy.deepcopy(model).double()(x.double())
    row: dict[str, Any] = {"input": x.shape[-1], "trained_error": relative(model(x), want)}
    theirs: Any = None
    try:
        theirs = timm.utils.reparameterize_model(copy.deepcopy(model))
        row |= {"timm_error": relative(theirs(x), want), "timm_parameters": count(theirs)}
    except Exception as error:  # what timm does with its own model is a result
        row |= {"timm_error": None, "timm_failure": f"{type(error).__name__}: {str(error)[:100]}"}
    del theirs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, report = reparameterize(model, inplace=True)
    sums = [entry for entry in report.entries if entry.kind == "sum"]
    return row | {
        "fused": sum(entry.status == "fused" for entry in sums),
        "left": sorted({entry.reason for entry in sums if entry.status == "left"}),
        "fused_chains": sum(entry.status == "fused" and entry.kind == "chain" for entry in report.entries),
        "error": relative(ours(x), want),
        "parameters_after": count(ours),
    }


def smallest_input(model: nn.Module) -> Tensor:
    """Four images of the smallest size that the model takes."""
    for size in SIZES:
        x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
        try:
            y = model(x)
        except (RuntimeError, AssertionError, ValueError):  # too small, or not the size it was built for
            continue
        if isinstance(y, Tensor) and y.numel() and bool(y.isfinite().all()):
            return x
    raise RuntimeError(f"no input of {SIZES[0]} to {SIZES[-1]} pixels gives a finite output")


def as_trained_(model: nn.Module, x: Tensor) -> None:
    """Random weights, BatchNorm statistics somewhat off those of ``x``: a wrong fold shows, signals keep their size.

    With statistics that have nothing to do with the signals, deep networks amplify rounding up to their output.
    """
    randomise_(model)
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.abs().max() <= 0.01:  # layer scales as they are initialised: a wrong branch would not show
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.5 + 0.25)
    batchnorms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for bn in batchnorms:
        bn.weight.abs_().add_(0.2)
        bn.momentum = 1.0
        bn.train()
    model(x)
    model.eval()
    for bn in batchnorms:
        assert bn.running_mean is not None
        assert bn.running_var is not None
        noise = torch.randn(bn.running_mean.shape, generator=generator)
        bn.running_mean.add_(0.3 * noise * bn.running_var.sqrt())
        # Channels of next to no variance, as few pixels have, would amplify rounding as well.
        bn.running_var.mul_(torch.rand(bn.running_var.shape, generator=generator) + 0.5)
        bn.running_var.add_(0.2 * bn.running_var.mean() + 1e-3)


def relative(got: Any, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class OutOfTimeError(BaseException):
    """No Exception: what handles those must not take it for a fault of the model."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Of this process's own time: a busy machine makes no model slower than it is."""

    def expire(*_: Any) -> None:
        raise OutOfTimeError(f"took more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, expire)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def row_of(timm: Any, name: str, seconds: int) -> dict[str, Any]:
    """The row of one model; whatever goes wrong is a part of it."""
    row: dict[str, Any] = {"model": name}
    try:
        with time_limit(seconds):
            row |= structure(timm, name)
            if (row["expected"] or row["found"]) and row["parameters"] <= MAX_PARAMETERS:
                row |= examine(timm, name)
    except (Exception, OutOfTimeError) as error:
        row["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return row


# --------------------------------------------------------------------------------------------------------------- table


def as_markdown(rows: list[dict[str, Any]], version: str, family: Mapping[str, str]) -> str:
    """The page docs/coverage.md. ``family``: of each model of timm."""
    blocks = [row for row in rows if row.get("expected") or row.get("found")]
    none = [row for row in rows if "expected" in row and not row["expected"] and not row["found"]]
    broken = [row for row in rows if "expected" not in row]
    missed = sum(max(0, row["expected"] - row["found"]) for row in blocks)
    lines = [
        "# Coverage: the models of timm",
        "",
        f"timm {version}: {len(rows)} of its {len(family)} models looked at, with "
        f"`python benchmarks/timm_coverage.py`. {len(blocks)} have sums of branches; in {len(none)} there are none and "
        f"none was found; {len(broken)} could not be looked at. Of {sum(row['expected'] for row in blocks)} sums that "
        f"timm's own classes fold, {missed} were not found.",
        "",
        "Random weights and disturbed BatchNorm statistics. *expected*: sums that timm's classes fold; 0 where timm "
        "leaves them, as the position encodings `x + conv(x)`. *found*, *folded*: by the graph pass, which knows no "
        "class. Errors: the largest of the output against the trained model in float64, relative to the largest "
        "output; *trained* is that of the model as it was. Parameters after include conv-BatchNorm chains, "
        "which timm folds in some models only.",
        "",
        "| model | px | expected | found | folded | error | timm's | trained | parameters | after | timm's | remarks |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in sorted(blocks, key=lambda row: row["model"]):
        lines.append(f"| {' | '.join(_cells(row))} |")
    lines += [
        "",
        "## None expected, none found",
        "",
        "By the module of timm that defines the models, with their number:",
        "",
    ]
    lines += [_by_family([row["model"] for row in none], family) or "-", ""]
    if broken:
        lines += ["## Not looked at", ""]
        lines += [f"- {row['model']}: {row['failure']}" for row in sorted(broken, key=lambda row: row["model"])]
    return "\n".join(lines).rstrip() + "\n"


def families(timm: Any) -> dict[str, str]:
    """For each model of timm the module that defines it."""
    return {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}


def _by_family(names: list[str], family: Mapping[str, str]) -> str:
    """How many models of each module, of how many."""
    sizes, found = Counter(family.values()), Counter(family[name] for name in names)
    return ", ".join(f"{key} ({n}{'' if n == sizes[key] else f' of {sizes[key]}'})" for key, n in sorted(found.items()))


def _cells(row: dict[str, Any]) -> list[str]:
    def number(key: str, style: str) -> str:
        return "-" if row.get(key) is None else format(row[key], style)

    remarks = [", ".join(row["kinds"]), *row.get("left", row["reasons"])]
    if "timm_failure" in row:
        remarks.append(f"timm: {row['timm_failure']}")
    if "failure" in row:
        remarks.append(row["failure"])
    elif "error" not in row:
        remarks.append(f"structure only: more than {MAX_PARAMETERS:,} parameters")
    return [
        row["model"],
        number("input", "d"),
        str(row["expected"]),
        str(row["found"]),
        number("fused", "d"),
        number("error", ".1e"),
        number("timm_error", ".1e"),
        number("trained_error", ".1e"),
        number("parameters", ","),
        number("parameters_after", ","),
        number("timm_parameters", ","),
        "; ".join(filter(None, remarks)).replace("|", "\\|"),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"], help="names or patterns of models (default: all)")
    parser.add_argument("--state", type=Path, default=ROOT / "out" / "timm_coverage.jsonl", help="what is known so far")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--seconds", type=int, default=300, help="of processor time, per model (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="look again at models that are known")
    parser.add_argument("--table-only", action="store_true", help="only write the table")
    args = parser.parse_args(argv)
    timm = import_timm()
    names = timm.list_models()
    args.state.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, dict[str, Any]] = {}
    if args.state.exists():
        known = {row["model"]: row for line in args.state.read_text().splitlines() for row in [json.loads(line)]}
    if not args.table_only:
        chosen = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in args.patterns)]
        with args.state.open("a") as state:
            for name in chosen:
                if name in known and "failure" not in known[name] and not args.again:
                    continue
                row = known[name] = row_of(timm, name, args.seconds)
                state.write(json.dumps(row) + "\n")
                state.flush()
                print(name, *(f"{key} {row[key]}" for key in ("expected", "found", "fused", "failure") if key in row))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(args.out, as_markdown(list(known.values()), timm.__version__, families(timm)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
