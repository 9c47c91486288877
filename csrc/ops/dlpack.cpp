// SPDX-License-Identifier: MIT
#include "ops/dlpack.h"

#include <memory>
#include <utility>

namespace py = pybind11;

namespace repvgg::ops {
namespace {

constexpr char kCapsule[] = "dltensor", kCapsuleVersioned[] = "dltensor_versioned";

ScalarType scalar_type(DLDataType dtype, const char* name) {
  if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 64) return ScalarType::Double;
  if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 32) return ScalarType::Float;
  if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 16) return ScalarType::Half;
  if (dtype.lanes == 1 && dtype.code == kDLBfloat && dtype.bits == 16) return ScalarType::BFloat16;
  throw py::type_error(std::string(name) + " must be float64, float32, float16 or bfloat16, got DLPack type code " +
                       std::to_string(dtype.code) + " with " + std::to_string(dtype.bits) + " bits");
}

DLDataType dl_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return {kDLFloat, 64, 1};
    case ScalarType::Float: return {kDLFloat, 32, 1};
    case ScalarType::Half: return {kDLFloat, 16, 1};
    default: return {kDLBfloat, 16, 1};
  }
}

DLDevice dl_device(const Tensor& tensor) {
  return tensor.is_cuda() ? DLDevice{kDLCUDA, tensor.get_device_index()} : DLDevice{kDLCPU, 0};
}

// Asks for a capsule of DLPack 1.x, which can lend read-only memory; producers from before that do not know the
// keyword.
py::object request_capsule(const py::object& array, const py::dict& keywords) {
  py::dict versioned = keywords.attr("copy")();
  versioned["max_version"] = py::make_tuple(1, 0);
  try {
    return array.attr("__dlpack__")(**versioned);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return array.attr("__dlpack__")(**keywords);
}

const DLTensor& capsule_tensor(const py::object& capsule, const char* name) {
  if (PyCapsule_IsValid(capsule.ptr(), kCapsuleVersioned)) {
    auto* managed = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), kCapsuleVersioned));
    if (managed->major == 1) return managed->dl_tensor;
  } else if (PyCapsule_IsValid(capsule.ptr(), kCapsule)) {
    return static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), kCapsule))->dl_tensor;
  }
  throw py::type_error(std::string(name) + ": __dlpack__ must return an unused capsule of DLPack 1.x or before");
}

// What a lent tensor needs as long as the borrower holds it.
template <class Managed>
struct Lease {
  Tensor tensor;
  std::vector<int64_t> shape, strides;
  Managed managed;
};

template <class Managed>
py::object lend(const Tensor& tensor, const char* capsule_name) {
  auto lease = std::make_unique<Lease<Managed>>();
  lease->tensor = tensor;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    lease->shape.push_back(tensor.size(d));
    lease->strides.push_back(tensor.stride(d));
  }
  Managed& managed = lease->managed;
  managed = {};
  if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) managed.major = 1;
  managed.dl_tensor = {tensor.mutable_data_ptr(),
                       dl_device(tensor),
                       static_cast<int32_t>(tensor.dim()),
                       dl_dtype(tensor.scalar_type()),
                       lease->shape.data(),
                       lease->strides.data(),
                       0};
  managed.manager_ctx = lease.get();
  managed.deleter = [](Managed* self) { delete static_cast<Lease<Managed>*>(self->manager_ctx); };

  // A consumer renames the capsule and calls the deleter itself; a capsule that nobody consumed frees its lease.
  PyObject* capsule = PyCapsule_New(&managed, capsule_name, [](PyObject* self) {
    const char* name = PyCapsule_GetName(self);
    if (name != std::string(kCapsule) && name != std::string(kCapsuleVersioned)) return;
    auto* unused = static_cast<Managed*>(PyCapsule_GetPointer(self, name));
    unused->deleter(unused);
  });
  if (capsule == nullptr) throw py::error_already_set();
  lease.release();
  return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace

BorrowedTensor from_dlpack(const py::object& array, const char* name) {
  if (!py::hasattr(array, "__dlpack__") || !py::hasattr(array, "__dlpack_device__")) {
    throw py::type_error(std::string(name) + " must support DLPack (__dlpack__), got " +
                         py::str(py::type::of(array).attr("__name__")).cast<std::string>() +
                         "; pass a NumPy, CuPy or torch array");
  }
  const auto [device_type, device_id] = array.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  check(device_type == kDLCPU || device_type == kDLCUDA, name,
        " must be on a CPU or a CUDA device, got DLPack device type ", device_type);
  const bool is_cuda = device_type == kDLCUDA;
  py::dict keywords;
  if (is_cuda) {  // the producer makes its memory ready for the stream our kernels run on; 1 is the default stream
    const auto stream = reinterpret_cast<uintptr_t>(current_stream(device_id));
    keywords["stream"] = stream == 0 ? 1 : stream;
  }
  py::object capsule = request_capsule(array, keywords);
  const DLTensor& lent = capsule_tensor(capsule, name);

  const std::vector<int64_t> shape(lent.shape, lent.shape + lent.ndim);
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 0;) {
    if (lent.strides != nullptr) {
      strides[d] = lent.strides[d];
    } else if (d + 1 < shape.size()) {
      strides[d] = strides[d + 1] * shape[d + 1];
    }
    check(strides[d] >= 0, name, " must have strides of at least 0, got ", strides[d], "; make it contiguous first");
  }
  const auto device_kind = is_cuda ? torch::headeronly::DeviceType::CUDA : torch::headeronly::DeviceType::CPU;
  const torch::stable::Device device(device_kind, static_cast<int32_t>(is_cuda ? device_id : -1));
  Tensor tensor =
      torch::stable::from_blob(static_cast<char*>(lent.data) + lent.byte_offset, {shape.data(), shape.size()},
                               {strides.data(), strides.size()}, device, scalar_type(lent.dtype, name));
  return {std::move(tensor), std::move(capsule)};
}

py::object DLPackArray::dlpack(const py::object& max_version) const {
  const bool versioned = !max_version.is_none() && max_version.cast<std::pair<int, int>>().first >= 1;
  return versioned ? lend<DLManagedTensorVersioned>(tensor_, kCapsuleVersioned)
                   : lend<DLManagedTensor>(tensor_, kCapsule);
}

py::tuple DLPackArray::device() const {
  const DLDevice device = dl_device(tensor_);
  return py::make_tuple(device.device_type, device.device_id);
}

}  // namespace repvgg::ops
