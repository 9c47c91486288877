// SPDX-License-Identifier: MIT
// The tensors of a case: what surrounds them nobody may touch, on one side a page, on both under AddressSanitizer.
#pragma once

#include <random>
#include <vector>

#include "../native/guarded.h"
#include "fiber.h"
#include "reference.h"

namespace simt_test {

using native::Guard;

class Buffer : public native::Guarded {
 public:
  Buffer(const char* name, int64_t size, DType dtype, Guard guard)
      : Guarded(name, size * element_size(dtype), kAlign, guard), dtype_(dtype), size_(size) {
    constexpr uintptr_t kPage = 4096;
    const auto begin = reinterpret_cast<uintptr_t>(data()), end = begin + bytes();
    simt::forbid(reinterpret_cast<void*>(begin / kPage * kPage), begin % kPage);
    simt::forbid(reinterpret_cast<void*>(end), (kPage - end % kPage) % kPage);
    poison();
  }
  ~Buffer() {
    constexpr uintptr_t kPage = 4096;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data()) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data()) + bytes() + kPage - 1) / kPage * kPage;
    simt::allow(reinterpret_cast<void*>(begin), end - begin);
  }

  int64_t size() const { return size_; }
  DType dtype() const { return dtype_; }
  double at(int64_t i) const { return repvgg::load_double(data(), dtype_, i); }
  void poison() const { std::memset(data(), 0xFF, bytes()); }  // NaN in every type

  // Values of magnitude `least` to `least` + `scale`, of either sign, and what they are after rounding.
  std::vector<double> fill_random(uint32_t seed, double scale, bool positive = false) const {
    std::mt19937 generator(seed);
    std::vector<double> values(static_cast<size_t>(size_));
    for (int64_t i = 0; i < size_; ++i) {
      const double fraction = static_cast<double>(generator() >> 8) / 16777216.0;
      const double sign = positive || (generator() & 1) != 0 ? 1 : -1;
      repvgg::store_double(data(), dtype_, i, sign * scale * (0.01 + fraction));
      values[static_cast<size_t>(i)] = at(i);
    }
    return values;
  }
  std::vector<char> copy() const { return {bytes_begin(), bytes_begin() + bytes()}; }
  bool same(const std::vector<char>& other) const { return std::equal(other.begin(), other.end(), bytes_begin()); }
  uint64_t hash() const {  // FNV-1a
    uint64_t h = 14695981039346656037u;
    for (size_t i = 0; i < bytes(); ++i) h = (h ^ static_cast<uint8_t>(bytes_begin()[i])) * 1099511628211u;
    return h;
  }

 private:
  static constexpr size_t kAlign = 16;
  const char* bytes_begin() const { return static_cast<const char*>(data()); }
  DType dtype_;
  int64_t size_;
};

}  // namespace simt_test
