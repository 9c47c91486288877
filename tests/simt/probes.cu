// SPDX-License-Identifier: MIT
// Every wrapper of csrc/cuda/device.cuh, run by one warp on pseudo-random bits. Compiled for the CPU with the stand-in
// and by nvcc (nvcc -std=c++20 -I csrc -arch=native tests/simt/probes.cu): both print the same JSON, or the stand-in,
// and with it every test that runs on it, does not do what the hardware does.
//
//   {"capability": 80, "probes": {NAME: {"compare": "bits", "in": [words, lane by lane], "out": [...]}}}
//
// "close": float results whose rounding the ISA leaves open.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda/device.cuh>  // in angle brackets: quotes would look beside this file first, where the stand-in is
#include <vector>

namespace repvgg::cuda {
namespace {

constexpr int kWords = 12;  // per lane, in and out
constexpr int kLanes = 32;
constexpr int kSharedWords = kLanes * kWords;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kAmpere = false;  // main asks for none of the probes that need it
#else
constexpr bool kAmpere = true;
#endif

struct Lane {
  const uint32_t* in;  // this lane's
  uint32_t* out;
  SharedAddress shared;  // [kSharedWords], 16-byte aligned: in of all lanes
  int lane;
};

template <class F>
__global__ void probe_kernel(F probe, const uint32_t* in, uint32_t* out) {
  RVG_SHARED(uint32_t, words, [kSharedWords]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < kWords; ++i) words[lane * kWords + i] = in[lane * kWords + i];
  __syncthreads();  // the words are there
  probe(Lane{in + lane * kWords, out + lane * kWords, shared_address(words), lane});
}

// 8x8 matrices of 16-bit elements lie in shared memory with rows of 16 bytes, one behind the other, in a shuffled
// order.
__device__ SharedAddress matrix_row(const Lane& lane) {
  return lane.shared + 16 * static_cast<uint32_t>((lane.lane * 5 + 3) % kLanes);
}

struct LdmatrixX1 {
  __device__ void operator()(const Lane& lane) const { ldmatrix_x1(lane.out[0], matrix_row(lane)); }
};
struct LdmatrixX2 {
  __device__ void operator()(const Lane& lane) const { ldmatrix_x2(lane.out[0], lane.out[1], matrix_row(lane)); }
};
struct LdmatrixX2Trans {
  __device__ void operator()(const Lane& lane) const { ldmatrix_x2_trans(lane.out[0], lane.out[1], matrix_row(lane)); }
};
struct LdmatrixX4 {
  __device__ void operator()(const Lane& lane) const {
    uint32_t r[4];
    ldmatrix_x4(r, matrix_row(lane));
    for (int i = 0; i < 4; ++i) lane.out[i] = r[i];
  }
};
struct LdmatrixX4Trans {
  __device__ void operator()(const Lane& lane) const {
    uint32_t r[4];
    ldmatrix_x4_trans(r, matrix_row(lane));
    for (int i = 0; i < 4; ++i) lane.out[i] = r[i];
  }
};
struct Movmatrix {
  __device__ void operator()(const Lane& lane) const { lane.out[0] = movmatrix_trans(lane.in[0]); }
};

// in: a[4], b[2], d[4]
template <MmaType kType>
struct Mma {
  __device__ void operator()(const Lane& lane) const {
    if constexpr (kAmpere || kType == MmaType::kFloat16) {
      const uint32_t a[4] = {lane.in[0], lane.in[1], lane.in[2], lane.in[3]};
      float d[4];
      for (int i = 0; i < 4; ++i) d[i] = bits_float(lane.in[6 + i]);
      mma<kType>(d, a, lane.in[4], lane.in[5]);
      for (int i = 0; i < 4; ++i) lane.out[i] = float_bits(d[i]);
    }
  }
};
struct MmaInt8 {
  __device__ void operator()(const Lane& lane) const {
    const uint32_t a[4] = {lane.in[0], lane.in[1], lane.in[2], lane.in[3]};
    int32_t d[4];
    for (int i = 0; i < 4; ++i) d[i] = static_cast<int32_t>(lane.in[6 + i]);
    mma_int8(d, a, lane.in[4], lane.in[5]);
    for (int i = 0; i < 4; ++i) lane.out[i] = static_cast<uint32_t>(d[i]);
  }
};

template <MmaType kType>
struct PackPair {
  __device__ void operator()(const Lane& lane) const {
    for (int i = 0; i < kWords / 2; ++i) {
      lane.out[i] = pack_pair<kType>(bits_float(lane.in[2 * i]), bits_float(lane.in[2 * i + 1]));
    }
  }
};
struct RoundTF32 {
  __device__ void operator()(const Lane& lane) const {
    for (int i = 0; i < kWords; ++i) lane.out[i] = round_tf32(bits_float(lane.in[i]));
  }
};

// 16 bytes through shared memory, each lane to the place of another one.
struct Shared16 {
  __device__ void operator()(const Lane& lane) const {
    uint32_t r[4];
    load_shared_16(r, lane.shared + 16 * static_cast<uint32_t>(lane.lane));
    __syncwarp();  // every lane has loaded
    store_shared_16(lane.shared + 16 * static_cast<uint32_t>(lane.lane ^ 7), r[3], r[2], r[1], r[0]);
    __syncwarp();  // every lane has stored
    load_shared_16(r, lane.shared + 16 * static_cast<uint32_t>(lane.lane));
    for (int i = 0; i < 4; ++i) lane.out[i] = r[i];
  }
};
struct Global {
  __device__ void operator()(const Lane& lane) const {
    uint32_t r[4];
    load_global_16(r, lane.in + 4);
    store_global_16(lane.out + 4, r[1], r[2], r[3], r[0]);
    store_global_8(lane.out + 2, r[0], r[1]);
    store_global_4(lane.out + 1, r[2]);
    store_global_4(lane.out, shared_address(dynamic_shared()) % 1024);
  }
};
// Three groups of copies; of the first and last only some bytes.
struct CopyAsync {
  __device__ void operator()(const Lane& lane) const {
    const SharedAddress to = shared_address(dynamic_shared()) + 48 * static_cast<uint32_t>(lane.lane);
    copy_async_16_or_zero(to, lane.in, lane.lane / 2 % 9 * 2);
    commit_copies();
    copy_async_16(to + 16, lane.in + 4);
    commit_copies();
    copy_async_16_or_zero(to + 32, lane.in + 8, lane.lane % 2 * 16);
    commit_copies();
    uint32_t r[4];
    wait_copies<2>();
    load_shared_16(r, to);
    for (int i = 0; i < 4; ++i) lane.out[i] = r[i];
    wait_copies<1>();
    load_shared_16(r, to + 16);
    for (int i = 0; i < 4; ++i) lane.out[4 + i] = r[i];
    wait_copies<0>();
    load_shared_16(r, to + 32);
    for (int i = 0; i < 4; ++i) lane.out[8 + i] = r[i];
  }
};
// 4 bytes a copy, of every third none: there stays what was stored before.
struct CopyAsync4 {
  __device__ void operator()(const Lane& lane) const {
    const SharedAddress to = shared_address(dynamic_shared()) + 48 * static_cast<uint32_t>(lane.lane);
    for (int i = 0; i < 3; ++i) store_shared_16(to + 16 * i, 7, 7, 7, 7);
    for (int i = 0; i < kWords; ++i) copy_async_4_if((i + lane.lane) % 3 != 0, to + 4 * i, lane.in + i);
    commit_copies();
    wait_copies<0>();
    for (int i = 0; i < 3; ++i) {
      uint32_t r[4];
      load_shared_16(r, to + 16 * i);
      for (int e = 0; e < 4; ++e) lane.out[4 * i + e] = r[e];
    }
  }
};
struct GlobalLoads {
  __device__ void operator()(const Lane& lane) const {
    uint32_t r[4];
    load_global_16_written(r, lane.in + 8);
    for (int i = 0; i < 4; ++i) lane.out[i] = r[i];
    load_global_8(r[0], r[1], lane.in + 2);
    lane.out[4] = r[0];
    lane.out[5] = r[1];
    lane.out[6] = static_cast<uint32_t>(computed_again(static_cast<int>(lane.in[6])));
  }
};
// The words as floats; their halves as numbers of 16 bits.
struct LoadFloat {
  __device__ void operator()(const Lane& lane) const {
    for (int i = 0; i < 4; ++i) {
      lane.out[i] = float_bits(load_float(lane.in, DType::kFloat32, i));
      lane.out[4 + i] = float_bits(load_float(lane.in, DType::kFloat16, i));
      lane.out[8 + i] = float_bits(load_float(lane.in, DType::kBFloat16, i));
    }
  }
};
// The built-in functions that kernels use.
struct Warp {
  __device__ void operator()(const Lane& lane) const {
    constexpr unsigned kAll = 0xFFFFFFFFu;
    const uint32_t value = lane.in[0];
    lane.out[0] = __shfl_sync(kAll, value, static_cast<int>(lane.in[1] % 32));
    lane.out[1] = __shfl_sync(kAll, value, 5, 8);
    lane.out[2] = __shfl_up_sync(kAll, value, 3);
    lane.out[3] = __shfl_down_sync(kAll, value, 3, 16);
    lane.out[4] = __shfl_xor_sync(kAll, value, 9);
    lane.out[5] = __shfl_xor_sync(kAll, value, 9, 8);
    lane.out[6] = __ballot_sync(kAll, value & 1);
    lane.out[7] = static_cast<uint32_t>(__any_sync(kAll, lane.lane == 40));
    lane.out[8] = static_cast<uint32_t>(__all_sync(kAll, lane.lane < 32));
    if (lane.lane < 16) lane.out[9] = __ballot_sync(0xFFFFu, value & 2);
  }
};

// -----------------------------------------------------------------------------------------------------------------
// host

// Words on the machine that the kernels run on.
struct Words {
  uint32_t* data;
#ifdef __CUDACC__
  explicit Words(size_t size) { check(cudaMallocManaged(&data, size * sizeof *data), "cudaMallocManaged"); }
  ~Words() { cudaFree(data); }
  static void wait() { check(cudaDeviceSynchronize(), "probe"); }
#else
  explicit Words(size_t size) : data(static_cast<uint32_t*>(std::aligned_alloc(16, size * sizeof *data))) {}
  ~Words() { std::free(data); }
  static void wait() { simt::synchronize(); }
#endif
  Words(const Words&) = delete;
};

uint32_t state = 12345;
uint32_t random_bits() {
  state = state * 1664525u + 1013904223u;  // Numerical Recipes; the upper bits are the better ones
  const uint32_t high = state >> 16;
  state = state * 1664525u + 1013904223u;
  return high << 16 | state >> 16;
}

uint32_t any_bits() { return random_bits(); }
uint32_t no_nan() {
  const uint32_t bits = random_bits();
  return (bits & 0x7F800000u) == 0x7F800000u ? bits & ~0x7FFFFFu : bits;
}
// A float near 1 in magnitude, or around the limits of float16.
uint32_t some_float() {
  const uint32_t bits = random_bits(), exponent = 127 - 26 + random_bits() % 44;
  return (bits & 0x807FFFFFu) | exponent << 23;
}
// Integers from -8 to 8: any sum of their products is exact.
uint32_t integer_float() {
  const float value = static_cast<float>(static_cast<int>(random_bits() % 17) - 8);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
uint32_t integer_tf32_and_noise() { return integer_float() | (random_bits() & 0x1FFFu); }
uint32_t integer_brains() { return integer_float() >> 16 | (integer_float() & 0xFFFF0000u); }
uint32_t half_of(uint32_t float_bits) {  // normal, or 0
  const uint32_t sign = float_bits >> 16 & 0x8000u, magnitude = float_bits & 0x7FFFFFFFu;
  return magnitude == 0 ? sign : sign | ((magnitude >> 13) - ((127u - 15u) << 10));
}
uint32_t integer_halves() { return half_of(integer_float()) | half_of(integer_float()) << 16; }
uint32_t fraction_halves() {
  const uint32_t bits = random_bits();  // 1/8 to 1/2 in magnitude
  return (bits & 0x87FF87FFu) | 0x30003000u;
}

bool first = true;

template <class F>
void probe(const char* name, const char* compare, uint32_t (*operand)(), uint32_t (*accumulator)(), F f) {
  Words in(kLanes * kWords), out(kLanes * kWords);
  for (int i = 0; i < kLanes * kWords; ++i) {
    in.data[i] = i % kWords < 6 ? operand() : accumulator();
    out.data[i] = 0;
  }
  launch_kernel("probe", probe_kernel<F>, {1, kLanes, 48 * kLanes}, nullptr, f, in.data, out.data);
  Words::wait();
  std::printf("%s\n  \"%s\": {\"compare\": \"%s\"", first ? "" : ",", name, compare);
  first = false;
  for (const auto& [key, words] : {std::pair<const char*, const uint32_t*>("in", in.data), {"out", out.data}}) {
    std::printf(",\n    \"%s\": [", key);
    for (int i = 0; i < kLanes * kWords; ++i) std::printf("%s%u", i == 0 ? "" : ", ", words[i]);
    std::printf("]");
  }
  std::printf("}");
}

void run() {
  int capability = 0, multiprocessors = 0;
  describe_gpu(0, &capability, &multiprocessors);
  std::printf("{\"capability\": %d, \"probes\": {", capability);
  probe("ldmatrix_x1", "bits", any_bits, any_bits, LdmatrixX1());
  probe("ldmatrix_x2", "bits", any_bits, any_bits, LdmatrixX2());
  probe("ldmatrix_x2_trans", "bits", any_bits, any_bits, LdmatrixX2Trans());
  probe("ldmatrix_x4", "bits", any_bits, any_bits, LdmatrixX4());
  probe("ldmatrix_x4_trans", "bits", any_bits, any_bits, LdmatrixX4Trans());
  probe("movmatrix", "bits", any_bits, any_bits, Movmatrix());
  probe("shared_16", "bits", any_bits, any_bits, Shared16());
  probe("global", "bits", any_bits, any_bits, Global());
  probe("copy_async", "bits", any_bits, any_bits, CopyAsync());
  probe("copy_async_4", "bits", any_bits, any_bits, CopyAsync4());
  probe("global_loads", "bits", any_bits, any_bits, GlobalLoads());
  probe("load_float", "bits", fraction_halves, fraction_halves, LoadFloat());
  probe("warp", "bits", any_bits, any_bits, Warp());
  probe("pack_pair_float16", "bits", some_float, no_nan, PackPair<MmaType::kFloat16>());
  probe("pack_pair_bfloat16", "bits", some_float, no_nan, PackPair<MmaType::kBFloat16>());
  probe("mma_float16", "bits", integer_halves, integer_float, Mma<MmaType::kFloat16>());
  probe("mma_float16_rounding", "close", fraction_halves, integer_float, Mma<MmaType::kFloat16>());
  if (capability >= 80) {
    probe("mma_bfloat16", "bits", integer_brains, integer_float, Mma<MmaType::kBFloat16>());
    probe("mma_tf32", "bits", integer_float, integer_float, Mma<MmaType::kTF32>());
    probe("mma_tf32_low_bits", "bits", integer_tf32_and_noise, integer_float, Mma<MmaType::kTF32>());
    probe("mma_int8", "bits", any_bits, any_bits, MmaInt8());
    probe("round_tf32", "bits", no_nan, no_nan, RoundTF32());
  }
  std::printf("}}\n");
}

}  // namespace
}  // namespace repvgg::cuda

int main([[maybe_unused]] int argc, char** argv) {
  try {
#ifndef __CUDACC__
    if (argc > 1) simt::gpu.capability = std::atoi(argv[1]);  // to be compared with a GPU of this one
#endif
    repvgg::cuda::run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 1;
  }
  return 0;
}
