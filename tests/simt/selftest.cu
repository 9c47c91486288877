// SPDX-License-Identifier: MIT
// The tests of the tester: kernels with planted bugs, each of which must be reported, and sound ones, which must not.
// `selftest` lists them, `selftest NAME` runs one; exit statuses as of the driver.
//
// What is expected: "clean" in every build; "race" of ThreadSanitizer; "address" of AddressSanitizer; "wrong", a wrong
// result of the other builds, in every order of threads. In builds without a word: the executor's diagnosis, a regular
// expression after "/", if there is one.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.cuh"

namespace repvgg::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

// Global memory: AddressSanitizer guards both ends.
struct Words {
  explicit Words(size_t size, uint32_t value = 0) : data(new uint32_t[size]), size(size) {
    for (size_t i = 0; i < size; ++i) data[i] = value == 0 ? static_cast<uint32_t>(i) : value;
  }
  std::unique_ptr<uint32_t[]> data;
  size_t size;
};

template <class... Params, class... Args>
void run(void (*kernel)(Params...), unsigned grid, unsigned block, unsigned dynamic_shared, const Args&... args) {
  launch_kernel("selftest", kernel, {grid, block, dynamic_shared}, nullptr, args...);
  simt::synchronize();
}

void require(bool right) {
  if (right) return;
  std::fprintf(stderr, "selftest.cu: wrong result\n");
  std::exit(1);
}

// -------------------------------------------------------------------------------------------------------------
// barriers

enum class Bug {
  kNone,
  kNoFirstBarrier,
  kNoSecondBarrier,
  kHalfBarrier,
  kEarlyExit,
  kTwoBarriers,
  kWarpDeadlock,
  kNoSyncWarp,
  kPastEnd,
  kReadPastEnd,
  kBeforeDynamic,
  kPastGlobal,
  kUnwritten
};

// Twice: everybody writes a word, everybody reads its mirror image.
template <Bug kBug>
__global__ void mirror_kernel(const uint32_t* in, uint32_t* out) {
  RVG_SHARED(uint32_t, words, [96]);
  const unsigned t = threadIdx.x, size = blockDim.x;
  if (kBug == Bug::kEarlyExit && t == 5) return;
  for (unsigned round = 0; round < 2; ++round) {
    if (kBug != Bug::kUnwritten || t != 9) words[t] = in[round * size + t + (kBug == Bug::kPastGlobal ? 1 : 0)];
    if (kBug == Bug::kTwoBarriers) {
      if (t < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    } else if (kBug == Bug::kWarpDeadlock && t < 16) {
      __syncwarp();
    } else if (kBug == Bug::kHalfBarrier ? t < 64 : kBug != Bug::kNoFirstBarrier) {
      __syncthreads();
    }
    out[round * size + t] = words[size - 1 - t + (kBug == Bug::kReadPastEnd && t == 0 ? 1 : 0)];
    if (kBug != Bug::kNoSecondBarrier) __syncthreads();
  }
  if (kBug == Bug::kPastEnd && t == 0) words[size] = 0;
}
template <Bug kBug>
void mirror() {
  const Words in(192), out(192);
  run(mirror_kernel<kBug>, 1, 96, 0, in.data.get(), out.data.get());
  for (uint32_t i = 0; i < 192; ++i) require(out.data[i] == i / 96 * 96 + 95 - i % 96);
}

template <Bug kBug>
__global__ void exchange_kernel(const uint32_t* in, uint32_t* out) {
  auto* words = reinterpret_cast<uint32_t*>(dynamic_shared());
  const unsigned t = threadIdx.x;
  words[t] = in[t];
  if (kBug != Bug::kNoSyncWarp) __syncwarp();
  out[t] = words[t ^ 31] + __shfl_xor_sync(kAll, in[t], 1);
  if (kBug == Bug::kPastEnd && t == 0) words[64] = 0;
  if (kBug == Bug::kBeforeDynamic && t == 0) words[-1] = 0;
}
template <Bug kBug>
void exchange() {
  const Words in(64), out(64);
  run(exchange_kernel<kBug>, 1, 64, 256, in.data.get(), out.data.get());
  for (uint32_t i = 0; i < 64; ++i) require(out.data[i] == (i ^ 31) + (i ^ 1));
}

// ---------------------------------------------------------------------------------------------------- asynchronous
// copies

enum class CopyBug { kNone, kWeakWait, kNoWait, kNoCommit, kNoBarrier, kBarrierFirst, kNoRingBarrier, kEarlyOverwrite };

// A ring of two stages, as kernels have it: while one is read the next is copied.
template <CopyBug kBug>
__global__ void ring_kernel(uint32_t* in, uint32_t* out, int stages) {
  const SharedAddress ring = shared_address(dynamic_shared());
  const unsigned t = threadIdx.x, stage_bytes = 16 * blockDim.x;
  const auto copy = [&](int stage) {
    if (stage < stages) copy_async_16(ring + stage % 2 * stage_bytes + 16 * t, in + 4 * (stage * blockDim.x + t));
    if (kBug != CopyBug::kNoCommit) commit_copies();
  };
  copy(0);
  for (int stage = 0; stage < stages; ++stage) {
    copy(stage + 1);
    if (kBug == CopyBug::kEarlyOverwrite && t == 0) in[4 * (stage + 1) * blockDim.x] = 0;
    if (kBug == CopyBug::kBarrierFirst) __syncthreads();
    if (kBug == CopyBug::kWeakWait) {
      wait_copies<2>();
    } else if (kBug != CopyBug::kNoWait) {
      wait_copies<1>();
    }
    if (kBug != CopyBug::kNoBarrier && kBug != CopyBug::kBarrierFirst) __syncthreads();
    uint32_t r[4];
    load_shared_16(r, ring + stage % 2 * stage_bytes + 16 * (t ^ 37));
    store_global_16(out + 4 * (stage * blockDim.x + t), r[0], r[1], r[2], r[3]);
    if (kBug != CopyBug::kNoRingBarrier) __syncthreads();
  }
  wait_copies<0>();
}
template <CopyBug kBug>
void ring() {
  constexpr uint32_t kStages = 4, kBlock = 64;
  const Words in(4 * kBlock * (kStages + 1)), out(4 * kBlock * kStages);
  run(ring_kernel<kBug>, 1, kBlock, 2 * 16 * kBlock, in.data.get(), out.data.get(), static_cast<int>(kStages));
  for (uint32_t i = 0; i < out.size; ++i) {
    require(out.data[i] == i / (4 * kBlock) * 4 * kBlock + (i / 4 % kBlock ^ 37) * 4 + i % 4);
  }
}

// ------------------------------------------------------------------------------------------------------ warp
// collectives

enum class WarpBug {
  kNone,
  kPartialMma,
  kPartialLdmatrix,
  kOtherMma,
  kNotInMask,
  kMasksOverlap,
  kAbsentSource,
  kSwappedRegisters
};

template <WarpBug kBug>
__global__ void warp_kernel(uint32_t* out) {
  const unsigned t = threadIdx.x;
  // One half of the warp votes while the other one shuffles.
  uint32_t result = t < 16 ? __ballot_sync(0xFFFFu, t % 2) : __shfl_sync(0xFFFF0000u, t, 20);
  if (kBug == WarpBug::kNotInMask) result += __shfl_sync(0x7FFFFFFFu, t, 0);
  if (kBug == WarpBug::kMasksOverlap) result += t < 16 ? __any_sync(0x1FFFFu, 1) : __any_sync(0xFFFF0000u, 1);
  if (kBug == WarpBug::kAbsentSource && t < 16) result += __shfl_sync(0xFFFFu, t, 17);
  const uint32_t a[4] = {0x3C003C00u, 0x40004000u, 0x42004200u, 0x44004400u};  // 1, 2, 3, 4
  const uint32_t swapped[4] = {a[0], a[2], a[1], a[3]};
  float d[4] = {};
  if (kBug == WarpBug::kPartialMma) {
    if (t < 16) mma<MmaType::kFloat16>(d, a, a[0], a[0]);
  } else if (kBug == WarpBug::kOtherMma && t < 16) {
    mma<MmaType::kFloat16>(d, a, a[0], a[0]);
  } else {
    mma<MmaType::kFloat16>(d, kBug == WarpBug::kSwappedRegisters ? swapped : a, a[0], a[1]);
  }
  if (kBug == WarpBug::kPartialLdmatrix && t % 2 == 0) {
    uint32_t r;
    ldmatrix_x1(r, shared_address(dynamic_shared()) + 16 * t);
  }
  out[t] = result + static_cast<uint32_t>(d[0]) + (static_cast<uint32_t>(d[2]) << 16);
}
template <WarpBug kBug>
void warp() {
  const Words out(32);
  run(warp_kernel<kBug>, 1, 32, 1024, out.data.get());
  // Row 0: 8 * 1 * 1 + 8 * 3 * 2, row 8: 8 * 2 * 1 + 8 * 4 * 2.
  for (uint32_t i = 0; i < 32; ++i) require(out.data[i] == (i < 16 ? 0xAAAAu : 20u) + 56 + (80u << 16));
}

// ---------------------------------------------------------------------------------------------------------- between
// blocks

enum class GridBug { kNone, kNoFence, kBlockFence, kFenceBeforeBarrier, kPlainCounter, kNoReadFence };

// The block that comes last adds up what all have written. One thread's fences between barrier and counter publish what
// the others wrote before the barrier; or each thread makes its own.
template <GridBug kBug>
__global__ void last_block_kernel(uint32_t* partial, unsigned* counter, uint32_t* sum) {
  RVG_SHARED(unsigned, ticket, [1]);
  const unsigned t = threadIdx.x;
  partial[blockIdx.x * blockDim.x + t] = t + blockIdx.x;
  if (kBug == GridBug::kFenceBeforeBarrier) __threadfence();
  __syncthreads();  // every thread of the block has written
  if (t == 0) {
    if (kBug == GridBug::kBlockFence) {
      __threadfence_block();
    } else if (kBug != GridBug::kNoFence && kBug != GridBug::kFenceBeforeBarrier) {
      __threadfence();
    }
    if (kBug == GridBug::kPlainCounter) {
      ticket[0] = *counter;
      *counter = ticket[0] + 1;
    } else {
      ticket[0] = atomicAdd(counter, 1u);
    }
    if (kBug != GridBug::kNoReadFence) __threadfence();
  }
  __syncthreads();  // the ticket is there
  if (ticket[0] != gridDim.x - 1) return;
  uint32_t total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += partial[i * blockDim.x + t];
  sum[t] = total;
}
template <GridBug kBug>
void last_block() {
  const Words partial(8 * 32), sum(32);
  unsigned counter = 0;
  run(last_block_kernel<kBug>, 8, 32, 0, partial.data.get(), &counter, sum.data.get());
  for (uint32_t i = 0; i < 32; ++i) require(sum.data[i] == 8 * i + 28);
}

__global__ void histogram_kernel(const uint32_t* in, unsigned* bins) {
  RVG_SHARED(unsigned, own, [4]);
  if (threadIdx.x < 4) own[threadIdx.x] = 0;
  __syncthreads();  // the bins are empty
  atomicAdd(&own[in[threadIdx.x] % 4], 1u);
  __syncthreads();  // the bins are complete
  if (threadIdx.x < 4) atomicAdd(&bins[threadIdx.x], own[threadIdx.x]);
}
void histogram() {
  const Words in(128), bins(4);
  for (int i = 0; i < 4; ++i) bins.data[i] = 0;
  run(histogram_kernel, 5, 128, 0, in.data.get(), bins.data.get());
  for (int i = 0; i < 4; ++i) require(bins.data[i] == 5 * 32);
}

// Blocks of one launch write the same word.
__global__ void same_word_kernel(uint32_t* out) {
  if (threadIdx.x == blockIdx.x) *out = 1;
}
void same_word() {
  const Words out(1);
  run(same_word_kernel, 2, 32, 0, out.data.get());
  require(out.data[0] == 1);
}

// Two launches that may overlap.
template <bool kWaits>
__global__ void dependent_kernel(const uint32_t* in, uint32_t* out) {
  let_next_kernel_start();
  if (kWaits) wait_for_previous_kernel();
  out[threadIdx.x] = in[31 - threadIdx.x] + 1;
}
template <bool kWaits>
void dependent() {
  simt::gpu.capability = 90;
  const Words a(32), b(32), c(32);
  launch_kernel("first", dependent_kernel<true>, {1, 32}, nullptr, a.data.get(), b.data.get());
  launch_kernel("second", dependent_kernel<kWaits>, {1, 32, 0, true}, nullptr, b.data.get(), c.data.get());
  simt::synchronize();
  for (uint32_t i = 0; i < 32; ++i) require(c.data[i] == i + 2);
}

// -------------------------------------------------------------------------------------------------- addresses and
// launches

// Three launches: the second lets the third start before it has waited for the first, of which the third reads.
template <bool kEarly>
__global__ void middle_kernel(const uint32_t* in, uint32_t* out) {
  if (kEarly) let_next_kernel_start();
  wait_for_previous_kernel();
  if (!kEarly) let_next_kernel_start();
  out[threadIdx.x] = in[threadIdx.x];
}
__global__ void last_kernel(const uint32_t* first, uint32_t* out) { out[threadIdx.x] = first[threadIdx.x ^ 1]; }
template <bool kEarly>
void chain() {
  simt::gpu.capability = 90;
  const Words a(32), b(32), c(32), d(32);
  launch_kernel("first", dependent_kernel<true>, {1, 32}, nullptr, a.data.get(), b.data.get());
  launch_kernel("second", middle_kernel<kEarly>, {1, 32, 0, true}, nullptr, b.data.get(), c.data.get());
  launch_kernel("third", last_kernel, {1, 32, 0, true}, nullptr, b.data.get(), d.data.get());
  simt::synchronize();
  for (uint32_t i = 0; i < 32; ++i) require(d.data[i] == 32 - (i ^ 1));
}

enum class Address {
  kShared,
  kLdmatrix,
  kCopyTo,
  kCopyFrom,
  kGlobal,
  kPastShared,
  kPastSharedRaw,
  kNotShared,
  kNoDynamic
};

template <Address kBug>
__global__ void address_kernel(uint32_t* global) {
  RVG_SHARED(uint32_t, words, [256]);
  const SharedAddress at = shared_address(words) + 16 * threadIdx.x;
  uint32_t r[4];
  if (kBug == Address::kShared) load_shared_16(r, at + 8);
  if (kBug == Address::kLdmatrix) ldmatrix_x4(r, at + 2);
  if (kBug == Address::kCopyTo) copy_async_16(at + 4, global);
  if (kBug == Address::kCopyFrom) copy_async_16(at, global + 1);
  if (kBug == Address::kGlobal) load_global_16(r, global + 2);
  if (kBug == Address::kPastShared) store_shared_16(at + 1024, 0, 0, 0, 0);
  if (kBug == Address::kNotShared) global[0] = shared_address(global);
  if (kBug == Address::kNoDynamic) dynamic_shared()[0] = 0;
}
template <Address kBug>
void address() {
  alignas(16) uint32_t global[8] = {};
  run(address_kernel<kBug>, 1, 32, 0, static_cast<uint32_t*>(global));
}

template <int kKiB>
__global__ void large_kernel() {
  RVG_SHARED(char, memory, [kKiB * 1024]);
  memory[threadIdx.x] = 0;
}
template <int kKiB>
void large() {
  simt::gpu.capability = 86;
  run(large_kernel<kKiB>, 1, 32, kKiB == 40 ? 60 * 1024 : 0);
}

void empty_grid() {
  try {
    run(same_word_kernel, 0, 32, 0, nullptr);
  } catch (const std::runtime_error& error) {
    require(std::string(error.what()) == "selftest: CUDA error: invalid configuration argument");
    return;
  }
  require(false);
}

struct Test {
  const char *name, *expectation;
  void (*run)();
};

constexpr Test kTests[] = {
    {"mirror", "clean", mirror<Bug::kNone>},
    {"mirror without its first barrier", "wrong race", mirror<Bug::kNoFirstBarrier>},
    {"mirror without its second barrier", "wrong race", mirror<Bug::kNoSecondBarrier>},
    {"a barrier for half of the block", "/divergent barriers", mirror<Bug::kHalfBarrier>},
    {"a thread that left before the barrier", "/have ended before this barrier", mirror<Bug::kEarlyExit>},
    {"two barriers at once", "/divergent barriers", mirror<Bug::kTwoBarriers>},
    {"a warp split between __syncwarp and barrier", "/deadlock: __syncwarp", mirror<Bug::kWarpDeadlock>},
    {"a read of shared memory that nobody wrote", "wrong", mirror<Bug::kUnwritten>},
    {"a write past a static array", "address/outside the shared arrays", mirror<Bug::kPastEnd>},
    {"a read past a static array", "address wrong", mirror<Bug::kReadPastEnd>},
    {"a read past a global array", "address wrong", mirror<Bug::kPastGlobal>},
    {"exchange", "clean", exchange<Bug::kNone>},
    {"exchange without __syncwarp", "wrong race", exchange<Bug::kNoSyncWarp>},
    {"a write past dynamic memory", "address/outside the shared arrays", exchange<Bug::kPastEnd>},
    {"a write before dynamic memory", "address/outside the shared arrays", exchange<Bug::kBeforeDynamic>},
    {"ring", "clean", ring<CopyBug::kNone>},
    {"ring with a weak wait", "wrong", ring<CopyBug::kWeakWait>},
    {"ring without a wait", "wrong", ring<CopyBug::kNoWait>},
    {"ring without commits", "/never waited for", ring<CopyBug::kNoCommit>},
    {"ring without the barrier after the wait", "wrong race", ring<CopyBug::kNoBarrier>},
    {"ring with the barrier before the wait", "wrong race", ring<CopyBug::kBarrierFirst>},
    {"ring without the barrier after the reads", "wrong race", ring<CopyBug::kNoRingBarrier>},
    {"a source overwritten during its copy", "wrong", ring<CopyBug::kEarlyOverwrite>},
    {"warp", "clean", warp<WarpBug::kNone>},
    {"mma by half of a warp", "/waits for lanes|takes the whole warp", warp<WarpBug::kPartialMma>},
    {"ldmatrix by half of a warp", "/takes the whole warp", warp<WarpBug::kPartialLdmatrix>},
    {"two mma at once", "/the warp diverges", warp<WarpBug::kOtherMma>},
    {"a lane outside its mask", "/lacks the calling lane", warp<WarpBug::kNotInMask>},
    {"masks that overlap", "/the warp diverges", warp<WarpBug::kMasksOverlap>},
    {"a shuffle from an absent lane", "/which is not there", warp<WarpBug::kAbsentSource>},
    {"two fragment registers swapped", "wrong", warp<WarpBug::kSwappedRegisters>},
    {"last block", "clean", last_block<GridBug::kNone>},
    {"last block without the fence before the counter", "race", last_block<GridBug::kNoFence>},
    {"last block with a fence for its own block", "race", last_block<GridBug::kBlockFence>},
    {"last block with a fence of every writer", "clean", last_block<GridBug::kFenceBeforeBarrier>},
    {"last block without the fence after the counter", "race", last_block<GridBug::kNoReadFence>},
    {"last block with a counter that is not atomic", "race", last_block<GridBug::kPlainCounter>},
    {"histogram", "clean", histogram},
    {"blocks that write the same word", "race", same_word},
    {"dependent launches", "clean", dependent<true>},
    {"three dependent launches", "clean", chain<false>},
    {"three dependent launches, the second lets go too early", "race", chain<true>},
    {"dependent launches without the wait", "race", dependent<false>},
    {"a misaligned shared load", "/is no multiple of 16", address<Address::kShared>},
    {"a misaligned row of ldmatrix", "/is no multiple of 16", address<Address::kLdmatrix>},
    {"a misaligned destination of a copy", "/is no multiple of 16", address<Address::kCopyTo>},
    {"a misaligned source of a copy", "/is no multiple of 16", address<Address::kCopyFrom>},
    {"a misaligned global load", "/is no multiple of 16", address<Address::kGlobal>},
    {"a shared address past its array", "/access outside the shared arrays", address<Address::kPastShared>},
    {"a global pointer taken for a shared one", "/not into the block's shared memory", address<Address::kNotShared>},
    {"dynamic memory that was not asked for", "/the launch asked for none", address<Address::kNoDynamic>},
    {"too much static memory", "/more than 48 KiB", large<50>},
    {"too much memory for the GPU", "/compute capability 8.6 has", large<40>},
    {"an empty grid", "clean", empty_grid},
};

}  // namespace
}  // namespace repvgg::cuda

int main(int argc, char** argv) {
  for (const auto& test : repvgg::cuda::kTests) {
    if (argc == 1) std::printf("%s\t%s\n", test.name, test.expectation);
    if (argc < 2 || std::strcmp(test.name, argv[1]) != 0) continue;
    if (argc > 2) {
      simt::schedule.order = std::strcmp(argv[2], "backward") == 0 ? simt::Order::kBackward
                             : std::strcmp(argv[2], "random") == 0 ? simt::Order::kRandom
                                                                   : simt::Order::kForward;
    }
    if (argc > 3) simt::schedule.blocks_at_once = static_cast<unsigned>(std::atoi(argv[3]));
    test.run();
    return 0;
  }
  return argc == 1 ? 0 : 2;
}
