# SPDX-License-Identifier: MIT
"""The subcommand ``convert``: a checkpoint file to another form, another zoo, another kind of file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from repvgg_cuda import checkpoint
from repvgg_cuda.branches import require
from repvgg_cuda.console import naming, progress, require_target
from repvgg_cuda.models import RepVGG, RepVGGplus, create_model, model_names
from repvgg_cuda.renaming import FAMILIES
from repvgg_cuda.state_dict import StatePlan
from repvgg_cuda.zoo import ZOOS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``repvgg-cuda convert``."""
    accepted = ", ".join((*checkpoint.SAFETENSORS_SUFFIXES, *checkpoint.TORCH_SUFFIXES))
    parser.add_argument("input", type=Path, metavar="IN", help=f"checkpoint in train form ({accepted})")
    parser.add_argument("output", type=Path, metavar="OUT", help="where the deploy form is written; same extensions")
    parser.add_argument(
        "--from",
        dest="source",
        choices=("auto", *ZOOS),
        default="auto",
        help="whose keys IN has (default: %(default)s, told by the keys)",
    )
    targets = list(dict.fromkeys(zoo for family in FAMILIES.values() for zoo in family))
    parser.add_argument("--to", dest="target", choices=targets, help="whose keys OUT gets (default: those of IN)")
    parser.add_argument(
        "--eps",
        type=float,
        help="of the checkpoint's BatchNorms, which it does not carry itself (default: that of its zoo, and said: "
        f"{', '.join(f'{zoo.name} {zoo.eps:g}' for zoo in ZOOS.values())})",
    )
    parser.add_argument("--keep-branches", action="store_true", help="only rename the keys, as --to says")
    parser.add_argument(
        "--model", choices=model_names(), metavar="NAME", help="also check that it is of this model, such as RepVGG-A0"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    """``repvgg-cuda convert``."""
    checkpoint.is_safetensors(args.output)
    require_target(args.input, args.output, args.force)
    require(
        not args.keep_branches or args.target is not None,
        "--keep-branches only renames: say with --to whose keys OUT gets",
    )

    def planned(specs: Mapping[str, Tensor]) -> StatePlan:
        todo = checkpoint.plan(specs, source=args.source, target=args.target, eps=args.eps, fold=not args.keep_branches)
        if args.model is not None:
            check_model(args.model, specs, args.source, folded=not args.keep_branches)
        return todo

    with progress() as show, naming(args.input):
        show(f"converting {args.input}")
        report = checkpoint.convert_file(
            args.input, args.output, planned, on_block=lambda block: show(f"folding {block}")
        )
    print(f"{args.input} -> {args.output}")
    for line in report.lines():
        print(f"  {line}")
    return 0


def check_model(name: str, specs: Mapping[str, Tensor], source: str = "auto", folded: bool = True) -> None:
    """Raises RuntimeError unless a state_dict of these specs, and what it folds to, are those of the model ``name``."""
    for fold in (False, True) if folded else (False,):
        outputs = checkpoint.plan(specs, source=source, target="official", fold=fold).outputs
        state = {out.key: torch.empty(out.shape, dtype=out.dtype, device="meta") for out in outputs}
        with torch.device("meta"):  # names and shapes suffice
            model = model_for(name, state)
        checkpoint.check_fits(model, state)


def model_for(name: str, state: Mapping[str, Tensor]) -> RepVGG | RepVGGplus:
    """The model ``name`` in the form of ``state``, with as many classes and input channels as ``state`` has."""
    form = checkpoint.form_of(state)
    head = state.get("linear.weight")
    require(head is not None, f"has no linear.weight, which would say the number of classes of {name}")
    assert head is not None
    stem = state.get("stage0.rbr_dense.conv.weight" if form == "train" else "stage0.rbr_reparam.weight")
    in_channels = 3 if stem is None else stem.shape[1]  # without a stem check_fits names what is missing
    return create_model(name, num_classes=head.shape[0], in_channels=in_channels, deploy=form == "deploy")
