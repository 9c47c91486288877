# SPDX-License-Identifier: MIT
"""The bugs that mutants.py plants, beyond those it finds by itself, and what the mutants of each file are run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Listed:
    file: str  # in csrc/cuda
    code: str  # is there once
    instead: str
    plants: str
    equivalent: str = ""  # the reason why nothing can report it


#: (file, what is planted everywhere, words of its line or the next, the reason): nothing can report it.
EQUIVALENT_EVERYWHERE: tuple[tuple[str, str, str, str], ...] = ()

DIRECT, MMA, OUTPUT, STEM = "conv3x3_direct.cuh", "conv3x3_mma.cuh", "mma_output.h", "conv3x3_stem.cuh"
FUSE, PACK, LAYOUT = "fuse_weights.cuh", "pack_weights.cuh", "packed_layout.h"

LISTED = (
    # --------------------------------------------------------------------------------------------------------- direct
    Listed(DIRECT, "w = w0 + column;", "w = w0 + column + 1;", "the halo shifted by a column"),
    Listed(DIRECT, "h = h0 + row,", "h = h0 + row - 1,", "the halo shifted by a row"),
    Listed(DIRECT, "h >= 0 && h < shape.H", "h >= 0 && h <= shape.H", "a row below the image is read"),
    Listed(DIRECT, "w >= 0 && w < shape.W", "w >= -1 && w < shape.W", "a column left of the image is read"),
    Listed(DIRECT, "i < T::kStages * T::kChunkC;", "i < T::kChunkC;", "padding is zeroed in one buffer only"),
    Listed(DIRECT, "copies.start(buffer ^ 1,", "copies.start(buffer,", "the wrong slot of the ring"),
    Listed(
        DIRECT,
        "row % T::kStride * T::kStride + column % T::kStride;",
        "column % T::kStride * T::kStride + row % T::kStride;",
        "phases of stride 2 swapped",
    ),
    Listed(DIRECT, "left_k + T::kWeightRows - 1", "left_k + T::kWeightRows", "a row of weights past the group is read"),
    Listed(DIRECT, "count * 9 - tap_ : 0;", "count * 9 + 9 - tap_ : 0;", "weights past the chunk are read"),
    Listed(DIRECT, "if (a >= outer) break;", "if (a > outer) break;", "a store past the last of the outer outputs"),
    Listed(DIRECT, "if (b >= inner) break;", "if (b > inner) break;", "a store past the last of the inner outputs"),
    Listed(DIRECT, "if (p >= shape.P ||", "if (p > shape.P ||", "a row below the output is stored"),
    Listed(
        DIRECT,
        "sum[i][j] = channel(sum[i][j]);",
        "sum[i][j] = Epilogue::Channel{0.0f, channel.floor}(sum[i][j]);",
        "the bias forgotten",
    ),
    Listed(
        DIRECT,
        "sum[i][j] = channel(sum[i][j]);",
        "sum[i][j] = fmaxf(sum[i][j], channel.floor) + channel.bias;",
        "ReLU before the bias",
    ),
    Listed(DIRECT, "sum[k + i][j] =\n", "sum[k + (i ^ 1)][j] =\n", "output channels swapped"),
    Listed(
        DIRECT,
        "+ 1 == static_cast<unsigned>(slices.count)",
        ">= static_cast<unsigned>(slices.count) - 2",
        "a block that is not the last one finishes too",
    ),
    Listed(DIRECT, "first + slice * kSliceSize + i", "first + tile.slice * kSliceSize + i", "the wrong slice is added"),
    # ----------------------------------------------------------------------------------------------------------- mma
    Listed(MMA, "w = first_w + column - 1;", "w = first_w + column;", "the halo shifted by a column"),
    Listed(MMA, "h = first_h + row - 1,", "h = first_h + row,", "the halo shifted by a row"),
    Listed(MMA, "h >= params.H ||", "h > params.H ||", "a row below the image is read"),
    Listed(MMA, "w >= params.W ||", "w > params.W ||", "a column right of the image is read"),
    Listed(MMA, "tile.n + image >= params.N)", "tile.n + image > params.N)", "an image past the batch is read"),
    Listed(MMA, "if (padded && half == 0)", "if (padded && half == 1)", "the wrong half of a chunk is padding"),
    Listed(
        MMA,
        "/ 3 < chunks) producer.load_weights(stage % T::kRing);",
        "/ 3 < chunks) producer.load_weights((stage + 1) % T::kRing);",
        "the wrong slot of the ring",
    ),
    Listed(MMA, "if (T::kRing == 2) commit_copies();", "", "columns and halo of a ring of two in one group"),
    Listed(
        MMA,
        "producer.load_halo(buffer);",
        "producer.load_halo(T::kHaloBytes - buffer);",
        "the wrong buffer of the halo",
    ),
    Listed(
        MMA,
        "store_shared_16(to + j * T::kThreads * 16 + T::kHaloBytes, 0, 0, 0, 0);",
        ";",
        "padding is zeroed in one buffer only",
    ),
    Listed(
        MMA,
        "b[row / 2][row % 2 * 2], b[row / 2][row % 2 * 2 + 1]",
        "b[row / 2][row % 2 * 2 + 1], b[row / 2][row % 2 * 2]",
        "two registers of the pixels swapped",
    ),
    Listed(
        MMA, "mma<T::kType>(sum[j][i], a[i],", "mma<T::kType>(sum[j][i], a[i ^ 1],", "fragments of the weights swapped"
    ),
    Listed(
        MMA, "const int row = j * T::kStride + r;", "const int row = j * T::kStride + 2 - r;", "the filter upside down"
    ),
    Listed(MMA, "part < params.split;", "part + 1 < params.split;", "the last part of a split sum forgotten"),
    Listed(
        MMA,
        "v + s / 2 + s % 2 * T::kOddColumns",
        "v + s / 2 + (1 - s % 2) * T::kOddColumns",
        "odd and even columns swapped",
    ),
    Listed(
        MMA,
        "return (column - T::kJoinGap * image) >> 2 & 1;",
        "return 0;",
        "no swap of halves: bank conflicts",
    ),
    Listed(
        MMA, "(half ^ conv3x3_mma_swap<T>(column, image)) * 16", "half * 16", "halves are swapped by the producer only"
    ),
    # -------------------------------------------------------------------------------------------------------- epilogue
    Listed(
        OUTPUT,
        "const Epilogue::Channel activate{bias[h], floor_};",
        "const Epilogue::Channel activate{0.0f, floor_};",
        "the bias forgotten",
    ),
    Listed(
        OUTPUT,
        "const float low = activate(sum[2 * h]), high = activate(sum[2 * h + 1]);",
        "const float low = fmaxf(sum[2 * h], activate.floor) + activate.bias, "
        "high = fmaxf(sum[2 * h + 1], activate.floor) + activate.bias;",
        "ReLU before the bias",
    ),
    Listed(OUTPUT, "first_p_ + j >= P_ ||", "first_p_ + j > P_ ||", "a row below the output is stored"),
    Listed(OUTPUT, "|| k >= channels_) continue;", "|| k > channels_) continue;", "channels past the group are stored"),
    Listed(OUTPUT, "y_ = q < params.Q &&", "y_ = q <= params.Q &&", "a column right of the output is stored"),
    Listed(
        OUTPUT,
        "words[0][0], words[0][1], words[1][0], words[1][1]);",
        "words[0][0], words[1][0], words[0][1], words[1][1]);",
        "words of a pair swapped",
    ),
    Listed(OUTPUT, "pack_pair<kType>(low, high)", "pack_pair<kType>(high, low)", "neighbouring pixels swapped"),
    # ------------------------------------------------------------------------------------------------------------ stem
    Listed(STEM, "w = q0 * T::kStride + column - 1;", "w = q0 * T::kStride + column;", "the halo shifted by a column"),
    Listed(STEM, "h >= 0 && h < params.H && w", "h >= 0 && h <= params.H && w", "a row below the image is read"),
    Listed(STEM, "c < params.C && h", "h", "channels that x does not have are read"),
    Listed(
        STEM,
        "i < T::kPitch; ++i) staged",
        "i < T::kPitch - 1; ++i) staged",
        "the value behind a row is not zeroed",
        "a run's last value is masked, the packed weight there is zero",
    ),
    Listed(STEM, "product.e == 8 ? 0xFFFFu : 0xFFFFFFFFu", "0xFFFFFFFFu", "the padding of a run is not masked"),
    Listed(
        STEM,
        "mma<T::kType>(sum[i], a[1][i], b[2], b[3]);",
        "mma<T::kType>(sum[i], a[1][i], b[3], b[2]);",
        "two registers of the pixels swapped",
    ),
    Listed(
        STEM,
        "product.padding() || c >= C) continue;",
        "product.padding()) continue;",
        "weights of channels that x does not have are read",
    ),
    Listed(STEM, "min(k16 + i, fragments - 1)", "k16 + i", "fragments past the packed weights are read"),
    # ------------------------------------------------------------------------------------------------------------ pack
    Listed(LAYOUT, "first == 0 ? a", "first == 1 ? a", "neighbouring channels swapped"),
    Listed(LAYOUT, "(lane / 4 + e % 2 * 8)", "(lane / 4 + e / 2 * 8)", "two registers of the weights swapped"),
    Listed(PACK, "r * 3 + s, lane, e)", "s * 3 + r, lane, e)", "the filter transposed"),
    Listed(PACK, "if (k < group_K &&", "if (k <= group_K &&", "a channel past the group is read"),
    Listed(PACK, "first * 9 + at >= 0", "first * 9 + at > 0", "the first tap is taken for padding"),
    Listed(PACK, "i < layout.slack();", "i <= layout.slack();", "a store past the packed weights"),
    # ------------------------------------------------------------------------------------------------------------ fuse
    Listed(FUSE, "constexpr int kCentre = 4;", "constexpr int kCentre = 3;", "the 1x1 kernel beside the centre"),
    Listed(
        FUSE, "first_block <= blockIdx.x", "first_block < blockIdx.x", "a job's first channel goes to the one before"
    ),
    Listed(FUSE, "sums[e] *= channels.post[row].scale;", ";", "the BatchNorm on the sum forgotten in the kernel"),
    Listed(
        FUSE, "bias * post.scale + post.shift", "bias * post.scale", "the shift of the BatchNorm on the sum forgotten"
    ),
    Listed(FUSE, "&& tap < job.C * 9)", "&& tap <= job.C * 9)", "a store past a row of taps"),
    Listed(FUSE, "k >= 0 && tap >= 0 &&", "k >= 0 &&", "padding is folded"),
    Listed(FUSE, "k < job.group_K ?", "k <= job.group_K ?", "a channel past the group is folded"),
    Listed(FUSE, "chunk >= job.layout.chunks", "chunk > job.layout.chunks", "a chunk past the last one is packed"),
    Listed(FUSE, "r * 3 + s, lane, e)", "s * 3 + r, lane, e)", "the filter transposed in packed weights"),
    Listed(FUSE, "staged + i * kChunkC * 9", "staged", "the second chunk of tf32 is the first"),
    Listed(FUSE, "bits[e] = round_tf32(bits_float(bits[e]));", ";", "packed tf32 is not rounded"),
    Listed(
        FUSE,
        "c == fold_identity_channel(k, job.C)",
        "c == k",
        "the identity of a grouped convolution at the wrong channel",
    ),
    Listed(
        FUSE,
        "i < kFuseK * (job.n_branches + 1);",
        "i < kFuseK * job.n_branches;",
        "nobody computes the BatchNorm on the sum",
    ),
)

#: Where a header is used by many units that differ in the element type only, one of them stands for all.
UNITS = {
    MMA: ("conv3x3_mma_fp16.cu",),
    OUTPUT: ("conv3x3_mma_fp16.cu",),
}

Runs = Sequence[tuple[tuple[str, ...], tuple[str, ...]]]  # options of the driver, cases

_DIRECT = (
    "2,5,7,9,6,1,1,float32,nhwc,relu,bias",
    "1,4,19,17,20,1,1,float32,nchw,relu,bias",
    "1,6,9,12,8,2,1,float32,nchw,identity,bias",
    "2,6,11,8,12,2,2,float32,nhwc,relu,bias",
    "1,9,33,40,33,1,1,float32,nchw,relu,none",
)
_TILED = (
    "1,40,9,11,72,1,1,float16,nhwc,relu,bias",
    "3,32,14,15,48,1,1,float16,nhwc,relu,bias",
    "1,48,9,17,40,2,1,float16,nhwc,relu,bias",
    "2,80,8,9,48,1,2,float16,nhwc,identity,bias",
)
_STEM = (
    "2,3,9,11,24,2,1,float16,nchw,relu,bias",
    "1,3,8,67,72,2,1,float16,nhwc,relu,bias",
    "1,2,5,7,8,2,1,float16,nhwc,identity,bias",
)
_FUSE = (
    "fuse,6,8,float32,1,1,0,bn,bn+fuse,5,12,float16,1,1,0,bn,none",
    "fuse,6,2,float64,1,1,1,bn,none+fuse,3,5,float32,2,1,0,none,bn",
    "fuse,24,24,float16,1,1,0,bn,none,2,both+fuse,20,20,float32,1,1,1,bn,bn,1,packed",
)


def runs(file: str) -> Runs:
    """What a change of this file is run on, cheap enough for every schedule and checker."""
    if file.startswith("conv3x3_direct"):
        return (
            (("--algorithm", "direct"), _DIRECT),
            (("--algorithm", "direct", "--multiprocessors", "1"), _DIRECT),
            (("--algorithm", "direct_split"), _DIRECT),
        )
    if file.startswith("conv3x3_stem"):
        return ((("--algorithm", "stem"), _STEM),)
    if file.startswith("fuse_weights"):
        return ((("--algorithm", "fuse_weights"), _FUSE),)
    forced = (("--tile", "1"), ("--tile", "6"), ("--tile", "4", "--split", "2"), ("--tile", "8"))
    return tuple((("--algorithm", "mma", *options), _TILED) for options in ((), *forced))
