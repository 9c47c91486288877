// SPDX-License-Identifier: MIT
// What the parts of the driver share.
#pragma once

#include <cinttypes>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "buffers.h"
#include "executor.h"

namespace simt_test {

struct Options {
  std::string algorithm;  // "": every row
  Guard guard = Guard::kAfter;
  bool reach = false;
  int tile = -1, split = 1;  // of the tensor-core rows; -1: as they choose
};
inline Options options;
inline int failures = 0;

// Every row, or the one that is asked for.
void run_conv(const std::string& test);
void run_fold(const std::string& test);

inline std::vector<std::string> split(const std::string& text, char separator = ',') {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

template <class T>
T choose(const std::string& text, const std::vector<std::pair<const char*, T>>& choices) {
  for (const auto& [name, value] : choices) {
    if (text == name) return value;
  }
  throw std::invalid_argument("'" + text + "' is no choice here");
}

inline DType dtype_of(const std::string& text) {
  return choose<DType>(text, {{"float64", DType::kFloat64},
                              {"float32", DType::kFloat32},
                              {"float16", DType::kFloat16},
                              {"bfloat16", DType::kBFloat16}});
}

// One line of output.
inline void report(const std::string& row, const std::string& test, const std::string& rest) {
  std::printf("{\"row\": \"%s\", \"case\": \"%s\", %s}\n", row.c_str(), test.c_str(), rest.c_str());
  std::fflush(stdout);
}

inline std::string checked(const char* what, double used, uint64_t hash, const std::string& wrong) {
  if (!wrong.empty()) ++failures;
  char text[1000];
  std::snprintf(text, sizeof text,
                "\"ok\": %s, \"check\": \"%s\", \"bound_used\": %.3g, \"bits\": \"%016" PRIx64 "\"%s%s%s",
                wrong.empty() ? "true" : "false", what, used, hash, wrong.empty() ? "" : ", \"wrong\": \"",
                wrong.c_str(), wrong.empty() ? "" : "\"");
  return text;
}

// The first element that is further from `expected` than `bound`; `used`: the greatest share of a bound.
inline std::string compare(const char* name, const Buffer& got, const std::vector<double>& expected,
                           const std::vector<double>& bound, double* used) {
  std::string wrong;
  int64_t count = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const auto at = static_cast<size_t>(i);
    const double error = std::abs(got.at(i) - expected[at]);
    if (error <= bound[at]) {  // false for NaN
      if (bound[at] > 0) *used = std::max(*used, error / bound[at]);
    } else if (count++ == 0) {
      char text[200];
      std::snprintf(text, sizeof text, "%s[%" PRId64 "]: got %.9g, expected %.9g +- %.3g", name, i, got.at(i),
                    expected[at], bound[at]);
      wrong = text;
    }
  }
  if (count > 1) wrong += " and " + std::to_string(count - 1) + " more";
  return wrong;
}

}  // namespace simt_test
