# SPDX-License-Identifier: MIT
"""The idea of RepVGG on one image, step by step: a 3x3 convolution, a 1x1 convolution and the identity are one 3x3.

    python examples/notebook.py

The block is the simplest there is, without BatchNorm, on an image of two channels and 256 x 256 pixels.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg_cuda import Branch, Branches, bench, conv3x3, fuse_weights, reference, suites, tables


def compare(what: str, got: Tensor, want: Tensor) -> None:
    difference = (got - want).abs().max().item()
    print(f"   {what}: max difference {difference:.2e}, torch.allclose: {torch.allclose(got, want)}")


def explain_allclose(got: Tensor, want: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Why ``torch.allclose`` says False of two right answers. ``terms``: the sum of each output's terms' magnitudes."""
    errors = [(y.double() - exact).abs().max().item() for y in (want, got)]
    print(f"   against float64: three branches are off by {errors[0]:.2e}, one convolution by {errors[1]:.2e}")
    outside = (got - want).abs() > 1e-8 + 1e-5 * want.abs()  # torch.allclose with its default atol and rtol
    if not outside.any():
        print("   with this seed every output is within the default tolerances of torch.allclose")
        return
    count, largest, size = int(outside.sum()), want[outside].abs().max().item(), terms[outside].mean().item()
    print(
        f"   torch.allclose objects to {count} of {want.numel()} outputs, all near zero: at most {largest:.3f}, where"
    )
    print(
        f"   the terms that add up to them have magnitudes of {size:.1f} together. It allows 1e-5 of each output plus"
    )
    print(
        "   1e-8, but a rounding error goes with the terms, not with what is left when they cancel: neither is wrong."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=40, help="samples per time (default: %(default)s)")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")

    torch.manual_seed(args.seed)
    image = torch.randn(1, 2, 256, 256)
    conv = nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False)
    pointwise = nn.Conv2d(2, 2, 1).requires_grad_(False)

    print("1. Three branches: conv3x3(x) + conv1x1(x) + x")
    three = conv(image) + pointwise(image) + image

    print(
        "2. Each branch as a 3x3 convolution: the 1x1 kernel in the centre of zeros, the identity as a centre of ones"
    )
    pointwise_3x3 = reference.pad_1x1_to_3x3(pointwise.weight)
    identity_3x3 = reference.identity_kernel(2, groups=1, like=conv.weight)
    bare = F.conv2d(image, identity_3x3, padding=1)
    all_3x3 = conv(image) + F.conv2d(image, pointwise_3x3, pointwise.bias, padding=1) + bare
    compare("identity as a convolution and the image", bare, image)
    compare("three 3x3 convolutions and three branches", all_3x3, three)

    print("3. Convolution is linear in its kernel: add the kernels and the biases, and convolve once")
    weight = conv.weight + pointwise_3x3 + identity_3x3
    bias = conv.bias + pointwise.bias
    one = F.conv2d(image, weight, bias, padding=1)
    compare("one convolution and three branches", one, three)
    exact = F.conv2d(image.double(), conv.weight.double(), conv.bias.double(), padding=1)
    exact += F.conv2d(image.double(), pointwise.weight.double(), pointwise.bias.double()) + image.double()
    explain_allclose(one, three, exact, F.conv2d(image.abs(), weight.abs(), bias.abs(), padding=1))
    torch.testing.assert_close(one, three)
    print("   torch.testing.assert_close, whose tolerances are made for float32 (1.3e-6 and 1e-5), accepts it")

    print("4. The same with this library: describe the block, fold it, run the folded kernel")
    block = Branches((Branch(conv.weight, conv.bias), Branch(pointwise.weight, pointwise.bias), Branch(None)), 2, 2)
    fused_weight, fused_bias = fuse_weights(block)
    ours = conv3x3(image, fused_weight, fused_bias)
    compare("conv3x3(x, *fuse_weights(block)) and three branches", ours, three)
    torch.testing.assert_close(ours, three)

    print("5. What it saves (outputs checked against float64 first, timed side by side)")
    setup = suites.Setup(torch.device("cpu"), torch.float32)
    console = tables.console()
    for case in suites.notebook_suite(setup):
        rows = bench.run_candidates("notebook", case.name, case.build().candidates, setup, args.rounds, console)
        console.print(tables.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
