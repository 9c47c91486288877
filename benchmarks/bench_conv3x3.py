# SPDX-License-Identifier: MIT
"""conv3x3 against cuDNN on the layers of RepVGG: ``repvgg-cuda bench`` with the GPU's baselines, written to files.

    python benchmarks/bench_conv3x3.py                               # float32, TF32 off: exact against exact
    python benchmarks/bench_conv3x3.py --dtype float16 --json fp16.json --csv fp16.csv
    python benchmarks/plot.py fp16.json

Baselines on CUDA: three branches in eager PyTorch; the fused block as F.conv2d + relu with cudnn.benchmark off and on,
and as torch.cudnn_convolution_relu, each in NCHW and channels_last. All options of ``repvgg-cuda bench`` are taken.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path

from rich.console import Console

from repvgg_cuda import bench


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    bench.add_arguments(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows here as CSV too")
    parser.set_defaults(device="cuda", suite=["layers"], aa=True, json=Path("bench_conv3x3.json"))
    args = parser.parse_args(argv)
    try:
        for path in filter(None, (args.json, args.csv)):
            bench.require_writable(path)
        report = bench.collect(args, Console())
        bench.write_text_atomically(args.json, json.dumps(report, indent=1) + "\n")
        print(f"wrote {args.json}")
        if args.csv is not None:
            bench.write_text_atomically(args.csv, as_csv(report["rows"]))
            print(f"wrote {args.csv}")
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return bench.exit_code(report)


def as_csv(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
