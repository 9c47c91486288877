// SPDX-License-Identifier: MIT
// Packed weights: a plain uint8 tensor on the CPU, a header and then what a row's `pack` wrote. repvgg_cuda/packed.py
// reads and writes the same header. For weights on a GPU the tensor holds the header alone and owns what was packed,
// in the GPU's memory: calls then ask the GPU for nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ops/tensors.h"

namespace repvgg::ops {

// Little endian; a name shorter than its field ends in zeros.
struct PackedHeader {
  char magic[8];       // kPackedMagic: format and version
  char algorithm[16];  // the row to run, or "aten"
  char target[16];     // the instruction set whose kernels read the payload; "" without a payload
  int64_t C, K, groups, stride;
  int64_t payload_bytes;  // what follows this header
  uint64_t fingerprint;   // of the weight
  // What lies on a GPU; else zeros.
  const void* device_payload;
  const void* owner;  // this header's address: a copy of it owns nothing
  int64_t device_bytes;
  int32_t device_index;
  int32_t device_dtype;  // ScalarType of the weight
  char reserved[8];      // zeros
};
static_assert(sizeof(PackedHeader) == 128, "the payload follows at a multiple of a cache line");

constexpr char kPackedMagic[9] = "RVGPACK1";

constexpr Where kPrepack{"prepack", -1, "input_size"};

// Makes packed weights for `input_size` [N, C_in, H, W]: "auto" takes the row predicted to be fastest there. With
// `memory` "low" rows whose payload is larger than the weight are passed over. A row that reads weights as they are has
// the header alone.
Tensor prepack(const Tensor& weight, const std::vector<int64_t>& input_size, int64_t stride, int64_t groups,
               const std::string& algorithm, const std::string& memory);

// Packed weights in the making: the row and the memory are chosen, nothing is packed yet.
class NewPacked {
 public:
  // Of `weight` only the shape, the dtype and the device count, arguments are those of prepack.
  NewPacked(const Where& where, const Tensor& weight, const std::vector<int64_t>& input_size, int64_t stride,
            int64_t groups, const std::string& algorithm, const std::string& memory);

  // Where fuse_weights shall write what it folds; nullptr where it cannot.
  void* for_fold() const;
  // Packs the weight, if that is to be done; on a GPU on its current stream.
  void pack(const Tensor& weight);
  // The tensor. Waits for a GPU that packs: the weights can then be read on every stream, and before the launch ahead
  // has ended.
  Tensor finish(const Tensor& weight);

 private:
  Where where_;
  ConvProblem prob_;
  const ConvAlgo* algo_;  // nullptr: aten
  PackedHeader header_ = {};
  Tensor host_;                   // header and payload; undefined where the payload is on a GPU
  std::optional<Tensor> device_;  // the payload on a GPU
};

// What packed weights say.
struct Packed {
  const ConvAlgo* algo;  // nullptr: aten
  const void* payload;   // nullptr: there is none, it is for another instruction set, or was left on the GPU by a copy
};

// Checks that `packed` was made from `weight` for such a layer. Throws std::runtime_error, with the remedy, if not.
Packed open_packed(const Where& where, const Tensor& packed, const Tensor& weight, const ConvProblem& prob,
                   const std::string& algorithm);

}  // namespace repvgg::ops
