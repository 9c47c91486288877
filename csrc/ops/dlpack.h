// SPDX-License-Identifier: MIT
// DLPack (dmlc.github.io/dlpack): the C structs by which array libraries lend each other memory, and their borders with
// torch::stable::Tensor. Declared here because torch's own copy is closed to extensions on the stable ABI.
#pragma once

#include <pybind11/pybind11.h>

#include "ops/tensors.h"

namespace repvgg::ops {

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2 };
enum DLTypeCode : uint8_t { kDLFloat = 2, kDLBfloat = 4 };

struct DLDevice {
  int32_t device_type, device_id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; nullptr: dense, last dimension fastest
  uint64_t byte_offset;
};
struct DLManagedTensor {  // capsule "dltensor"
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {  // capsule "dltensor_versioned", DLPack 1.0
  uint32_t major, minor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor dl_tensor;
};

// A tensor over somebody else's memory. The capsule owns that memory: keep it as long as the tensor.
struct BorrowedTensor {
  Tensor tensor;
  pybind11::object capsule;
};

// Reads an object with __dlpack__ and __dlpack_device__ (NumPy, CuPy, torch, JAX, ...). `name` is for messages.
BorrowedTensor from_dlpack(const pybind11::object& array, const char* name);

// A tensor as a Python object with __dlpack__ and __dlpack_device__.
class DLPackArray {
 public:
  explicit DLPackArray(Tensor tensor) : tensor_(std::move(tensor)) {}
  pybind11::object dlpack(const pybind11::object& max_version) const;
  pybind11::tuple device() const;

 private:
  Tensor tensor_;
};

}  // namespace repvgg::ops
