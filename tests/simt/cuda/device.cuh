// SPDX-License-Identifier: MIT
// The stand-in of csrc/cuda/device.cuh, found before it on the include path: the same declarations for a CPU. What each
// does is documented there; here stands what is checked. Accesses of kernels are made in this header, because it is
// compiled with the kernels' sanitizers; the executor is not.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "builtins.h"
#include "core/dtype.h"
#include "executor.h"

namespace repvgg::cuda {

using simt::Where;

// ---------------------------------------------------------------------------------------------------- host: launches

constexpr int kMaxParameterBytes = 32764;

struct LaunchShape {
  unsigned grid, block;
  unsigned dynamic_shared = 0;
  bool overlap = false;
};

// A kernel with its parameters, which every thread copies.
template <class... Params>
struct Call {
  Call(void (*kernel)(Params...), std::tuple<Params...> params) : kernel(kernel), params(std::move(params)) {}
  void (*kernel)(Params...);
  std::tuple<Params...> params;

  template <size_t... i>
  void operator()(std::index_sequence<i...>) const {
    kernel(std::get<i>(params)...);
  }
  static void run(void* call) { (*static_cast<Call*>(call))(std::index_sequence_for<Params...>()); }
};

template <class... Params, class... Args>
void launch_kernel(const char* name, void (*kernel)(Params...), LaunchShape shape, void*, const Args&... args) {
  auto call = std::make_shared<Call<Params...>>(kernel, std::tuple<Params...>(static_cast<Params>(args)...));
  if (const char* error = simt::launch(name, {shape.grid, shape.block, shape.dynamic_shared, shape.overlap},
                                       Call<Params...>::run, std::move(call))) {
    throw std::runtime_error(std::string(name) + ": CUDA error: " + error);
  }
}

template <class... Params>
bool has_code(void (*)(Params...)) {
  return true;
}

inline void synchronize_stream(void*) { simt::synchronize(); }

inline void describe_gpu(int, int* capability, int* multiprocessors) {
  *capability = simt::gpu.capability;
  *multiprocessors = simt::gpu.multiprocessors;
}

// After the launches before it, and before those behind it.
inline void fill_zero(void* memory, int64_t bytes, void*) {
  simt::synchronize();
  std::memset(memory, 0, static_cast<size_t>(bytes));
}

// ------------------------------------------------------------------------------------------- device: shared memory

// A reference into the block's window. The static variable tells the instances of a template apart.
#define RVG_SHARED(type, name, extents)             \
  using name##_array = type extents;                \
  static const char name##_site = 0;                \
  name##_array& name = *static_cast<name##_array*>( \
      ::simt::shared_array(&name##_site, #name, sizeof(name##_array), ::simt::Where::current()))

using SharedAddress = uint32_t;

// 16 bytes in one access.
using Vector16 = uint32_t __attribute__((vector_size(16), may_alias));
using Vector8 = uint32_t __attribute__((vector_size(8), may_alias));
using Word = uint32_t __attribute__((may_alias));

__device__ __forceinline__ char* dynamic_shared(Where where = Where::current()) { return simt::dynamic_shared(where); }
__device__ __forceinline__ SharedAddress shared_address(const void* shared, Where where = Where::current()) {
  return simt::shared_offset(shared, where);
}

__device__ __forceinline__ void load_shared_16(uint32_t (&r)[4], SharedAddress address,
                                               Where where = Where::current()) {
  const Vector16 value = *reinterpret_cast<const Vector16*>(simt::shared_pointer(address, 16, where));
  for (int i = 0; i < 4; ++i) r[i] = value[i];
}
__device__ __forceinline__ void store_shared_16(SharedAddress address, uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                                Where where = Where::current()) {
  *reinterpret_cast<Vector16*>(simt::shared_pointer(address, 16, where)) = Vector16{a, b, c, d};
}

// ------------------------------------------------------------------------------------------- device: global memory

__device__ __forceinline__ void load_global_16(uint32_t (&r)[4], const void* p, Where where = Where::current()) {
  simt::check_aligned(p, 16, where);
  const Vector16 value = *static_cast<const Vector16*>(p);
  for (int i = 0; i < 4; ++i) r[i] = value[i];
}
__device__ __forceinline__ void load_global_8(uint32_t& a, uint32_t& b, const void* p, Where where = Where::current()) {
  simt::check_aligned(p, 8, where);
  const Vector8 value = *static_cast<const Vector8*>(p);
  a = value[0], b = value[1];
}
__device__ __forceinline__ void load_global_16_written(uint32_t (&r)[4], const void* p,
                                                       Where where = Where::current()) {
  load_global_16(r, p, where);
}
__device__ __forceinline__ void store_global_16(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                                Where where = Where::current()) {
  simt::check_aligned(p, 16, where);
  *static_cast<Vector16*>(p) = Vector16{a, b, c, d};
}
__device__ __forceinline__ void store_global_8(void* p, uint32_t a, uint32_t b, Where where = Where::current()) {
  simt::check_aligned(p, 8, where);
  *static_cast<Vector8*>(p) = Vector8{a, b};
}
__device__ __forceinline__ void store_global_4(void* p, uint32_t a, Where where = Where::current()) {
  simt::check_aligned(p, 4, where);
  *static_cast<Word*>(p) = a;
}

// The first `bytes` of 16, zeros behind them.
__device__ __forceinline__ Vector16 load_first(const char* from, int bytes) {
  if (bytes == 16) return *reinterpret_cast<const Vector16*>(from);
  uint8_t part[16] = {};
  for (int i = 0; i < bytes; ++i) part[i] = static_cast<uint8_t>(from[i]);
  Vector16 value;
  std::memcpy(&value, part, sizeof value);
  return value;
}

// From sm_80 on the destination is NaN until the wait that covers the copy; then only it gets its data, the latest
// moment that is allowed. The source is read both times: it must not change in between.
__device__ __forceinline__ void copy_async_16_or_zero(SharedAddress to, const void* from, int bytes,
                                                      Where where = Where::current()) {
  char* target = simt::shared_pointer(to, 16, where);
  simt::check_aligned(from, 16, where);
  if (bytes < 0 || bytes > 16) simt::diagnose(where, "an asynchronous copy of %d bytes", bytes);
  const Vector16 value = load_first(static_cast<const char*>(from), bytes);
  const bool later = simt::copies_are_asynchronous();
  *reinterpret_cast<Vector16*>(target) = later ? Vector16{~0u, ~0u, ~0u, ~0u} : value;
  if (later) simt::start_copy(target, from, bytes, 16, where);
}
__device__ __forceinline__ void copy_async_16(SharedAddress to, const void* from, Where where = Where::current()) {
  copy_async_16_or_zero(to, from, 16, where);
}
__device__ __forceinline__ void copy_async_4_if(bool wanted, SharedAddress to, const void* from,
                                                Where where = Where::current()) {
  if (!wanted) return;
  char* target = simt::shared_pointer(to, 4, where);
  simt::check_aligned(from, 4, where);
  const Word value = *static_cast<const Word*>(from);
  const bool later = simt::copies_are_asynchronous();
  *reinterpret_cast<Word*>(target) = later ? ~0u : value;
  if (later) simt::start_copy(target, from, 4, 4, where);
}
__device__ __forceinline__ void commit_copies() { simt::commit_copies(); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  simt::Copy copy;
  while (simt::next_covered_copy(kPending, &copy)) {
    if (copy.width == 4) {
      *reinterpret_cast<Word*>(copy.to) = *reinterpret_cast<const Word*>(copy.from);
    } else {
      *reinterpret_cast<Vector16*>(copy.to) = load_first(copy.from, copy.bytes);
    }
  }
}

__device__ __forceinline__ void wait_for_previous_kernel() { simt::wait_for_previous(); }
__device__ __forceinline__ void let_next_kernel_start() { simt::let_next_start(); }

// ------------------------------------------------------------------------------------------- device: tensor cores

template <int kMatrices>
__device__ __forceinline__ void load_matrices(const simt::Collective& what, uint32_t* result, SharedAddress row,
                                              Where where) {
  simt::LoadMatrixLane lane = {kMatrices, {}, result};
  if (simt::lane_index() < 8 * kMatrices) {  // the other lanes' addresses are ignored
    const Vector16 value = *reinterpret_cast<const Vector16*>(simt::shared_pointer(row, 16, where));
    std::memcpy(lane.row, &value, sizeof lane.row);
  }
  simt::collective(what, 0xFFFFFFFFu, &lane, where);
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row, Where where = Where::current()) {
  load_matrices<4>(simt::kLoadMatrix, r, row, where);
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t& r0, uint32_t& r1, SharedAddress row,
                                            Where where = Where::current()) {
  uint32_t r[2];
  load_matrices<2>(simt::kLoadMatrix, r, row, where);
  r0 = r[0], r1 = r[1];
}
__device__ __forceinline__ void ldmatrix_x1(uint32_t& r0, SharedAddress row, Where where = Where::current()) {
  load_matrices<1>(simt::kLoadMatrix, &r0, row, where);
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row, Where where = Where::current()) {
  load_matrices<4>(simt::kLoadMatrixTransposed, r, row, where);
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t& r0, uint32_t& r1, SharedAddress row,
                                                  Where where = Where::current()) {
  uint32_t r[2];
  load_matrices<2>(simt::kLoadMatrixTransposed, r, row, where);
  r0 = r[0], r1 = r[1];
}

__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t matrix, Where where = Where::current()) {
  simt::MoveMatrixLane lane = {matrix, 0};
  simt::collective(simt::kMoveMatrix, 0xFFFFFFFFu, &lane, where);
  return lane.result;
}

enum class MmaType { kFloat16, kBFloat16, kTF32, kInt8 };

template <MmaType kType>
bool can_multiply() {
  return true;
}

template <MmaType kType>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    Where where = Where::current()) {
  static_assert(kType != MmaType::kInt8, "8-bit products are summed in int32_t");
  simt::MmaLane lane = {d, a, {b0, b1}};
  simt::collective(kType == MmaType::kFloat16    ? simt::kMmaFloat16
                   : kType == MmaType::kBFloat16 ? simt::kMmaBFloat16
                                                 : simt::kMmaTF32,
                   0xFFFFFFFFu, &lane, where);
}
__device__ __forceinline__ void mma_int8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         Where where = Where::current()) {
  simt::MmaLane lane = {d, a, {b0, b1}};
  simt::collective(simt::kMmaInt8, 0xFFFFFFFFu, &lane, where);
}

// NaN is the canonical one of cvt.rn.
template <MmaType kType>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  static_assert(kType == MmaType::kFloat16 || kType == MmaType::kBFloat16, "a 16-bit type");
  const auto encode = [](float value) -> uint32_t {
    if (value != value) return 0x7FFF;
    if constexpr (kType == MmaType::kFloat16) return Float16::encode(value);
    return BFloat16::encode(value);
  };
  return encode(low) | encode(high) << 16;
}

__device__ __forceinline__ float load_float(const void* data, DType dtype, int64_t i) {
  return static_cast<float>(load_double(data, dtype, i));
}

__device__ __forceinline__ int computed_again(int value) { return value; }

__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ uint32_t round_tf32(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return 0x7FFFE000u;
  return (bits + 0x1000u) & 0xFFFFE000u;  // infinity has no lower bits that could carry
}

}  // namespace repvgg::cuda
