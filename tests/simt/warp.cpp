// SPDX-License-Identifier: MIT
// What a warp does together, from the tables of the PTX ISA: sections "Matrix fragments for mma.m16n8k16" and its
// neighbours, "ldmatrix", "movmatrix". Kernels' ideas of these layouts are not used here.
#include <cstring>

#include "core/dtype.h"
#include "state.h"

namespace simt {
namespace {

template <class T>
T& lane_of(void* const* lanes, int i) {
  return *static_cast<T*>(lanes[i]);
}

void shuffle_lanes(void* const* lanes, uint32_t mask, Where where) {
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    auto& lane = lane_of<ShuffleLane>(lanes, i);
    if ((mask >> lane.source & 1) == 0)
      diagnose(where, "lane %d shuffles from lane %u, which is not there", i, lane.source);
    lane.result = lane_of<ShuffleLane>(lanes, static_cast<int>(lane.source)).value;
  }
}

uint32_t ballot(void* const* lanes, uint32_t mask) {
  uint32_t votes = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) != 0 && lane_of<VoteLane>(lanes, i).predicate) votes |= 1u << i;
  }
  return votes;
}

void answer(void* const* lanes, uint32_t mask, uint32_t result) {
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) != 0) lane_of<VoteLane>(lanes, i).result = result;
  }
}

// ldmatrix: lane 8 m + r gives the address of row r of matrix m. Lane l gets elements 2 (l % 4) and the next of row l /
// 4; with .trans of column l / 4.
void load_matrix(void* const* lanes, bool transposed) {
  const int matrices = lane_of<LoadMatrixLane>(lanes, 0).matrices;
  for (int m = 0; m < matrices; ++m) {
    for (int l = 0; l < 32; ++l) {
      uint32_t bits = 0;
      for (int half = 0; half < 2; ++half) {
        const int line = l / 4, element = 2 * (l % 4) + half;
        const int row = transposed ? element : line, column = transposed ? line : element;
        bits |= static_cast<uint32_t>(lane_of<LoadMatrixLane>(lanes, 8 * m + row).row[column]) << (16 * half);
      }
      lane_of<LoadMatrixLane>(lanes, l).result[m] = bits;
    }
  }
}

// movmatrix: source and destination lie as ldmatrix leaves them.
void move_matrix(void* const* lanes, uint32_t, Where) {
  uint16_t matrix[8][8];
  for (int l = 0; l < 32; ++l) {
    const uint32_t bits = lane_of<MoveMatrixLane>(lanes, l).value;
    matrix[l / 4][2 * (l % 4)] = static_cast<uint16_t>(bits);
    matrix[l / 4][2 * (l % 4) + 1] = static_cast<uint16_t>(bits >> 16);
  }
  for (int l = 0; l < 32; ++l) {
    const uint32_t low = matrix[2 * (l % 4)][l / 4], high = matrix[2 * (l % 4) + 1][l / 4];
    lane_of<MoveMatrixLane>(lanes, l).result = low | high << 16;
  }
}

// ------------------------------------------------------------------------------------------------------------------
// mma

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Half {
  static constexpr int kPerRegister = 2;
  static float element(uint32_t bits, int i) {
    static const auto table = [] {  // decoding is slow
      std::vector<float> values(65536);
      for (uint32_t v = 0; v < 65536; ++v) {
        values[v] = static_cast<float>(repvgg::Float16::decode(static_cast<uint16_t>(v)));
      }
      return values;
    }();
    return table[bits >> (16 * i) & 0xFFFF];
  }
};
struct Brain {
  static constexpr int kPerRegister = 2;
  static float element(uint32_t bits, int i) { return from_bits((bits >> (16 * i)) << 16); }
};
struct Tensor32 {
  static constexpr int kPerRegister = 1;
  static float element(uint32_t bits, int) { return from_bits(bits & 0xFFFFE000u); }  // 19 bits; the rest is ignored
};
struct Byte {
  static constexpr int kPerRegister = 4;
  static int32_t element(uint32_t bits, int i) { return static_cast<int8_t>(bits >> (8 * i)); }
};

// groupID = lane / 4, threadID_in_group = lane % 4. With e elements in a register:
//   A [16, 8 e]: register i has row groupID + 8 (i % 2), columns 4 e (i / 2) + e threadID ...
//   B [8 e, 8]:  register i has column groupID, rows 4 e i + e threadID ...
//   C [16, 8]:   element i has row groupID + 8 (i / 2), column 2 threadID + i % 2
// Products of two 16-bit or tf32 numbers are exact in float. The ISA leaves the order of the additions open; here they
// are made one after another in float, in ascending k, the accumulator first. Sums of bytes wrap.
template <class Type, class Sum>
void multiply(void* const* lanes) {
  constexpr int e = Type::kPerRegister, kDepth = 8 * e;
  Sum a[16][kDepth], b[kDepth][8];
  for (int l = 0; l < 32; ++l) {
    const auto& lane = lane_of<MmaLane>(lanes, l);
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < e; ++j)
        a[l / 4 + 8 * (i % 2)][4 * e * (i / 2) + e * (l % 4) + j] = Type::element(lane.a[i], j);
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < e; ++j) b[4 * e * i + e * (l % 4) + j][l / 4] = Type::element(lane.b[i], j);
    }
  }
  Sum d[16][8];
  const auto each = [&](auto f) {
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i)
        f(d[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2], static_cast<Sum*>(lane_of<MmaLane>(lanes, l).d)[i]);
    }
  };
  each([](Sum& in_matrix, Sum& in_lane) { in_matrix = in_lane; });
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  each([](Sum& in_matrix, Sum& in_lane) { in_lane = in_matrix; });
}

void multiply_half(void* const* lanes, uint32_t, Where) {
  multiply<Half, float>(lanes);  // sm_75: two m16n8k8 of the same halves, which here is the same
}
void multiply_brain(void* const* lanes, uint32_t, Where where) {
  if (gpu.capability < 80) diagnose(where, "mma of bfloat16 needs compute capability 8.0");
  multiply<Brain, float>(lanes);
}
void multiply_tensor32(void* const* lanes, uint32_t, Where where) {
  if (gpu.capability < 80) diagnose(where, "mma of tf32 needs compute capability 8.0");
  multiply<Tensor32, float>(lanes);
}
void multiply_byte(void* const* lanes, uint32_t, Where where) {
  if (gpu.capability < 80) diagnose(where, "mma of int8 needs compute capability 8.0");
  multiply<Byte, int32_t>(lanes);
}

}  // namespace

const Collective kSyncWarp = {"__syncwarp", nullptr, false, true};
const Collective kShuffle = {"shuffle", shuffle_lanes, false, false};
const Collective kBallot = {"__ballot_sync",
                            [](void* const* lanes, uint32_t mask, Where) { answer(lanes, mask, ballot(lanes, mask)); },
                            false, false};
const Collective kAny = {
    "__any_sync", [](void* const* lanes, uint32_t mask, Where) { answer(lanes, mask, ballot(lanes, mask) != 0); },
    false, false};
const Collective kAll = {
    "__all_sync", [](void* const* lanes, uint32_t mask, Where) { answer(lanes, mask, ballot(lanes, mask) == mask); },
    false, false};
const Collective kLoadMatrix = {"ldmatrix", [](void* const* lanes, uint32_t, Where) { load_matrix(lanes, false); },
                                true, false};
const Collective kLoadMatrixTransposed = {
    "ldmatrix.trans", [](void* const* lanes, uint32_t, Where) { load_matrix(lanes, true); }, true, false};
const Collective kMoveMatrix = {"movmatrix", move_matrix, true, false};
const Collective kMmaFloat16 = {"mma (float16)", multiply_half, true, false};
const Collective kMmaBFloat16 = {"mma (bfloat16)", multiply_brain, true, false};
const Collective kMmaTF32 = {"mma (tf32)", multiply_tensor32, true, false};
const Collective kMmaInt8 = {"mma (int8)", multiply_byte, true, false};

}  // namespace simt
