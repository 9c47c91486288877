# SPDX-License-Identifier: MIT
"""The command ``repvgg-cuda`` (``python -m repvgg_cuda``): parses arguments and calls; no tensor code.

A user's error is one line on stderr and exit status 1 (2 for a wrong command line); ``--traceback`` shows the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from repvgg_cuda import bench, checkpoint, conversion, demo, export, gpu_check, info, ops, testing, verification
from repvgg_cuda._version import __version__
from repvgg_cuda.branches import require
from repvgg_cuda.console import naming, positive, progress
from repvgg_cuda.conversion import model_for
from repvgg_cuda.gpus import GPUS
from repvgg_cuda.models import model_names
from repvgg_cuda.packed import MEMORY
from repvgg_cuda.preparation import prepare

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended: 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns the exit status: 0, 1 for an error or a failed check, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        status = command(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RuntimeError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


# --------------------------------------------------------------------------------------------------------- parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="repvgg-cuda", description="Fold RepVGG-style networks into plain 3x3 convolutions, check and time them."
    )
    parser.add_argument("--version", action="version", version=f"repvgg-cuda {__version__}")
    traceback_help = "on an error, show where it was raised"
    parser.add_argument("--traceback", action="store_true", help=traceback_help)
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=traceback_help)
    subparsers = parser.add_subparsers(title="subcommands", required=True, metavar="SUBCOMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        subparser = subparsers.add_parser(name, parents=[everywhere], help=summary, description=f"{summary}.")
        subparser.set_defaults(command=command)
        return subparser

    _add_info_arguments(add("info", _info, "Show versions, build, machine, and the algorithms available on it"))
    _add_explain_arguments(add("explain", _explain, "Show which algorithm a layer runs on, and why not the others"))
    conversion.add_arguments(add("convert", conversion.run, "Fold a checkpoint in train form into deploy form"))
    export.add_arguments(add("export", export.run, "Export a checkpoint to ONNX, torch.export or AOTInductor"))
    _add_verify_arguments(add("verify", _verify, "Compare a trained and a deployed checkpoint layer by layer"))
    bench.add_arguments(add("bench", bench.run, "Time blocks and networks before and after folding"))
    gpu_check.add_arguments(add("gpu-check", gpu_check.run, "Build, test and time everything on this machine's GPU"))
    demo.add_arguments(add("demo", demo.run, "Deploy a trained network on real images and show what changes"))
    return parser


# ----------------------------------------------------------------------------------------------------------- info


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs and bug reports")


def _info(args: argparse.Namespace) -> int:
    facts = info.collect()
    print(json.dumps(facts, indent=2) if args.json else info.render(facts))
    return 0


# -------------------------------------------------------------------------------------------------------- explain


def _add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layer", type=_layer, metavar="N,C,H,W,K", required=True, help="batch, input channels, size, output channels"
    )
    parser.add_argument("--stride", type=int, choices=(1, 2), default=1, help="default: %(default)s")
    parser.add_argument("--groups", type=positive, default=1, metavar="G", help="default: %(default)s")
    parser.add_argument("--prepared", action="store_true", help="as after prepare(): packing the weights costs nothing")
    parser.add_argument(
        "--memory", choices=MEMORY, default="fast", help="low: packed weights no larger than the weight"
    )
    parser.add_argument(
        "--gpu", choices=list(GPUS), metavar="NAME", help=f"as on such a GPU, which need not be here: {', '.join(GPUS)}"
    )
    parser.add_argument("--dtype", choices=list(bench.DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument("--channels-last", action="store_true", help="x lies in channels_last (NHWC)")


def _layer(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) != 5 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"must be five numbers N,C,H,W,K, got {text}")
    return tuple(map(positive, numbers))


def _explain(args: argparse.Namespace) -> int:
    batch, channels, height, width, outputs = args.layer
    case = testing.Case("layer", batch, channels, height, width, outputs, args.stride, args.groups)
    dtype = bench.DTYPES[args.dtype]
    x, weight = torch.empty(case.x_size, dtype=dtype), torch.empty(case.weight_size, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    geometry = {"stride": args.stride, "groups": args.groups}
    print(ops.explain(x, weight, **geometry, prepared=args.prepared, memory=args.memory, gpu=args.gpu))
    return 0


# --------------------------------------------------------------------------------------------------------- verify


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trained", type=Path, metavar="TRAINED", help="checkpoint in train form")
    parser.add_argument("deployed", type=Path, metavar="DEPLOYED", help="checkpoint in deploy form")
    parser.add_argument(
        "--model",
        choices=model_names(),
        metavar="NAME",
        required=True,
        help="whose checkpoints these are, such as RepVGG-A0",
    )
    parser.add_argument(
        "--image-size", type=positive, metavar="PIXELS", help="default: that of the model, 224 or with SE 320"
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="random images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random images (default: %(default)s)")
    parser.add_argument("--images", type=Path, nargs="+", metavar="FILE", help="compare on these, not on random images")
    parser.add_argument("--prepare", action="store_true", help="first prepare DEPLOYED for these images, and show how")


def _verify(args: argparse.Namespace) -> int:
    with progress() as show:
        show(f"loading {args.trained}")
        trained = _load_model(args.model, args.trained, "train")
        show(f"loading {args.deployed}")
        deployed = _load_model(args.model, args.deployed, "deploy")
        inputs = _inputs(args, trained)
        if args.prepare:
            show("preparing")
            print(prepare(deployed, inputs.to(next(deployed.parameters()).dtype)))
        show("comparing layer by layer")
        result = verification.verify(trained, deployed, inputs)
    Console().print(result.render())
    return 0 if result.ok else 1


def _load_model(name: str, path: Path, form: checkpoint.Form) -> nn.Module:
    state = checkpoint.load_state_dict_file(path)
    with naming(path):
        found = checkpoint.form_of(state)
        require(found == form, f"is in {found} form, but must be in {form} form: give TRAINED first, then DEPLOYED")
        model = model_for(name, state)
        if (dtype := state["linear.weight"].dtype).is_floating_point:
            model.to(dtype)  # in float32 the weights of a 16-bit checkpoint would be off by its rounding
        checkpoint.load_into(model, state)
    return model.eval()


def _inputs(args: argparse.Namespace, model: nn.Module) -> Tensor:
    """``[N, in_channels, PIXELS, PIXELS]``: the given photos, or random numbers."""
    size = args.image_size
    resize, crop = demo.input_size(args.model) if size is None else (size, size)
    channels = model.get_parameter("stage0.rbr_dense.conv.weight").shape[1]
    if args.images is None:
        generator = torch.Generator().manual_seed(args.seed)
        return torch.randn(args.batch, channels, crop, crop, generator=generator)
    require(channels == 3, f"--images: photos have 3 channels, but the stem of the checkpoints takes {channels}")
    return torch.cat([demo.load_image(path, resize, crop) for path in args.images])
