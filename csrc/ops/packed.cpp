// SPDX-License-Identifier: MIT
#include "ops/packed.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <string_view>
#include <unordered_set>

#include "cpu/algos.h"
#include "ops/layer.h"
#include "ops/scratch.h"
#ifdef RVG_WITH_CUDA
#include "cuda/algos.h"
#endif

// torch/csrc/stable/c/shim.h, from torch 2.11 on.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace repvgg::ops {
namespace {

constexpr int64_t kHeaderBytes = sizeof(PackedHeader);
constexpr int64_t kSamples = 16;

// FNV-1a over the bits of 16 weights, evenly spread from the first to the last. Catches weights that were trained on,
// loaded or swapped since; not the edit of a single weight. 0 on a GPU, whose weights the host does not wait for.
uint64_t fingerprint(const Tensor& weight) {
  if (!weight.is_cpu()) return 0;
  const int64_t last = weight.numel() - 1, bytes = weight.element_size();
  const auto* data = static_cast<const char*>(weight.const_data_ptr());
  std::array<int64_t, 4> size{}, stride{};
  for (int64_t d = 0; d < 4; ++d) {
    size[d] = weight.size(d);
    stride[d] = weight.stride(d) * bytes;
  }
  uint64_t hash = 0xcbf29ce484222325;
  for (int64_t i = 0; i < kSamples; ++i) {
    int64_t index = last * i / (kSamples - 1), offset = 0;
    for (int d = 3; d >= 0; --d) {
      offset += index % size[d] * stride[d];
      index /= size[d];
    }
    uint64_t bits = 0;
    std::memcpy(&bits, data + offset, static_cast<size_t>(bytes));
    hash = (hash ^ bits) * 0x100000001b3;
  }
  return hash;
}

template <size_t N>
std::string_view field(const char (&text)[N]) {
  return {text, strnlen(text, N)};
}

template <size_t N>
void set_field(char (&text)[N], const char* value) {
  check(std::strlen(value) <= N, "the name '", value, "' is too long for the header of packed weights");
  std::memcpy(text, value, std::strlen(value));
}

// For messages: a damaged header may hold anything.
std::string printable(std::string_view text) {
  std::string result(text);
  std::replace_if(result.begin(), result.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return result;
}

// A tensor whose payload begins on a huge page where it is worth one, else on a cache line: torch aligns to that.
Tensor allocate(int64_t payload_bytes) {
  const int64_t bytes = kHeaderBytes + payload_bytes;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  if (payload_bytes < kWorthHugePages) {
    return torch::stable::empty({&bytes, 1}, ScalarType::Byte, std::nullopt, cpu);
  }
  const int64_t pages = round_up(payload_bytes, kHugePage), room = kHeaderBytes + kHugePage + pages;
  Tensor whole = torch::stable::empty({&room, 1}, ScalarType::Byte, std::nullopt, cpu);
  auto* const begin = static_cast<char*>(whole.mutable_data_ptr());
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const int64_t past = static_cast<int64_t>((address + kHeaderBytes) % kHugePage);
  const int64_t payload = kHeaderBytes + (kHugePage - past) % kHugePage;
  advise_huge_pages(begin + payload, pages);
  return torch::stable::narrow(whole, 0, payload - kHeaderBytes, bytes);
}

// The addresses of the headers that own something. Never destroyed: tensors may be freed after static objects.
class Owners {
 public:
  static void add(const void* header) {
    locked([&](auto& live) { live.insert(header); });
  }
  static void remove(const void* header) {
    locked([&](auto& live) { live.erase(header); });
  }
  static bool contain(const void* header) {
    bool found = false;
    locked([&](auto& live) { found = live.count(header) > 0; });
    return found;
  }

 private:
  using Live = std::unordered_set<const void*>;
  static void locked(const std::function<void(Live&)>& f) {
    static auto& mutex = *new std::mutex;
    static auto& live = *new Live;
    const std::lock_guard<std::mutex> lock(mutex);
    f(live);
  }
};

// A header on its own that owns `payload`.
struct OwningHeader {
  PackedHeader header;
  Tensor payload;

  OwningHeader(const PackedHeader& made, Tensor packed) : header(made), payload(std::move(packed)) {
    header.owner = &header;
    Owners::add(&header);
  }
  ~OwningHeader() { Owners::remove(&header); }
};

Tensor owning_header(const Where& where, PackedHeader header, Tensor payload) {
  auto* const owner = new OwningHeader(header, std::move(payload));
  const int64_t size = kHeaderBytes, stride = 1;
  AtenTensorHandle handle = nullptr;
  const auto free_owner = [](void*, void* context) { delete static_cast<OwningHeader*>(context); };
  if (torch_from_blob(&owner->header, 1, &size, &stride, 0, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0,
                      &handle, aoti_torch_layout_strided(), nullptr, 0, free_owner, owner) != 0) {
    delete owner;
    fail(where, "torch cannot make the tensor of packed weights");
  }
  return Tensor(handle);
}

void wait_for_stream([[maybe_unused]] int32_t device_index) {
#ifdef RVG_WITH_CUDA
  cuda::wait_for_stream(current_stream(device_index));
#endif
}

const ConvAlgo* choose_packed(const Where& where, const ConvProblem& prob, const Device& device,
                              const std::string& device_type, const std::string& algorithm, int64_t max_bytes) {
  const AlgoTable table = algos_for(device_type);
  if (algorithm == "auto") return table.select(prob, device, /*packed=*/true, max_bytes);
  const ConvAlgo* algo = named_algo(where, table, prob, device, algorithm, device_type);
  const int64_t bytes = algo == nullptr ? 0 : algo->packed_bytes(prob);
  check(bytes <= max_bytes, where, "algorithm '", algorithm, "' packs the weight into ", bytes,
        " bytes, more than its ", max_bytes, ", which memory='low' rules out; use memory='fast' or algorithm='auto'");
  return algo;
}

// What lies on the GPU, checked; nullptr for a copy of the header, whose original may have freed it.
const void* device_payload(const Where& where, const PackedHeader& header, const void* address, const Tensor& weight,
                           int64_t bytes) {
  if (bytes == 0 || header.owner != address || !Owners::contain(address)) return nullptr;
  if (header.device_index != weight.get_device_index()) {
    fail(where, "packed was made on cuda:", header.device_index, ", but weight is on ", device_name(weight),
         "; call prepack again");
  }
  if (header.device_dtype != static_cast<int32_t>(weight.scalar_type())) {
    fail(where, "packed was made for weights of another dtype than ", dtype_name(weight.scalar_type()),
         "; call prepack again");
  }
  if (header.device_bytes != bytes) {
    fail(where, "packed has ", header.device_bytes, " bytes on the GPU, where its algorithm needs ", bytes,
         "; call prepack again");
  }
  return header.device_payload;
}

}  // namespace

NewPacked::NewPacked(const Where& where, const Tensor& weight, const std::vector<int64_t>& input_size, int64_t stride,
                     int64_t groups, const std::string& algorithm, const std::string& memory)
    : where_(where), prob_(make_problem(where, input_size, weight, stride, groups)) {
  if (weight.is_cuda() && weight.element_size() == 2) prob_.layout = Layout::kNHWC;  // as networks run
  check(memory == "fast" || memory == "low", where, "memory must be one of fast, low, got '", memory, "'");
  const int64_t weight_bytes = weight.numel() * weight.element_size();
  const int64_t max_bytes = memory == "low" ? weight_bytes : std::numeric_limits<int64_t>::max();
  algo_ = choose_packed(where, prob_, device_of(weight), device_type(weight), algorithm, max_bytes);

  std::memcpy(header_.magic, kPackedMagic, sizeof header_.magic);
  set_field(header_.algorithm, algo_ == nullptr ? "aten" : algo_->name);
  header_.C = prob_.C;
  header_.K = prob_.K;
  header_.groups = prob_.groups;
  header_.stride = prob_.stride;
  const int64_t bytes = algo_ == nullptr ? 0 : algo_->packed_bytes(prob_);
  if (weight.is_cuda() && bytes > 0) {
    check(torch_from_blob != nullptr, where, "packing weights on a GPU needs torch 2.11 or later");  // to finish
    device_ = torch::stable::empty({&bytes, 1}, ScalarType::Byte, std::nullopt, weight.device());
    header_.device_payload = device_->const_data_ptr();
    header_.device_bytes = bytes;
    header_.device_index = weight.get_device_index();
    header_.device_dtype = static_cast<int32_t>(weight.scalar_type());
    return;
  }
  header_.payload_bytes = bytes;
  if (bytes > 0) set_field(header_.target, cpu::target_name());
  host_ = allocate(bytes);
}

void* NewPacked::for_fold() const {
  return device_.has_value() && algo_->folds_packed ? device_->mutable_data_ptr() : nullptr;
}

void NewPacked::pack(const Tensor& weight) {
  void* to = nullptr;
  if (device_.has_value()) to = device_->mutable_data_ptr();
  if (header_.payload_bytes > 0) to = static_cast<char*>(host_.mutable_data_ptr()) + kHeaderBytes;
  if (to == nullptr) return;
  void* const stream = weight.is_cuda() ? current_stream(weight.get_device_index()) : nullptr;
  algo_->pack(prob_, {dense(weight).const_data_ptr(), to, stream, parallel_for});
}

Tensor NewPacked::finish(const Tensor& weight) {
  header_.fingerprint = fingerprint(weight);
  if (device_.has_value()) {
    wait_for_stream(header_.device_index);
    return owning_header(where_, header_, std::move(*device_));
  }
  std::memcpy(host_.mutable_data_ptr(), &header_, sizeof header_);
  return host_;
}

Tensor prepack(const Tensor& weight, const std::vector<int64_t>& input_size, int64_t stride, int64_t groups,
               const std::string& algorithm, const std::string& memory) {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (weight.is_cuda()) guard.emplace(weight.get_device_index());
  NewPacked packed(kPrepack, weight, input_size, stride, groups, algorithm, memory);
  packed.pack(weight);
  return packed.finish(weight);
}

Packed open_packed(const Where& where, const Tensor& packed, const Tensor& weight, const ConvProblem& prob,
                   const std::string& algorithm) {
  if (packed.scalar_type() != ScalarType::Byte || packed.dim() != 1 || !packed.is_cpu() || !packed.is_contiguous()) {
    fail(where, "packed must be a contiguous 1-D uint8 tensor on the CPU, as repvgg_cuda.prepack returns, got ",
         dtype_name(packed.scalar_type()), " ", shape_name(packed), " on ", device_name(packed));
  }
  const int64_t bytes = packed.numel();
  const auto* data = static_cast<const char*>(packed.const_data_ptr());
  PackedHeader header = {};
  if (bytes >= kHeaderBytes) std::memcpy(&header, data, sizeof header);
  if (field(header.magic) != kPackedMagic) {
    fail(where, "packed does not begin with the header that repvgg_cuda.prepack writes; call prepack again");
  }
  if (header.payload_bytes != bytes - kHeaderBytes) {
    fail(where, "packed must have ", kHeaderBytes, " + ", header.payload_bytes, " bytes, as its header says, got ",
         bytes, "; call prepack again");
  }
  if (header.C != prob.C || header.K != prob.K || header.groups != prob.groups || header.stride != prob.stride) {
    fail(where, "packed was made for C_in=", header.C, ", C_out=", header.K, ", groups=", header.groups,
         ", stride=", header.stride, ", but the layer has C_in=", prob.C, ", C_out=", prob.K, ", groups=", prob.groups,
         ", stride=", prob.stride, "; call prepack again");
  }
  if (header.fingerprint != fingerprint(weight)) {
    fail(where, "packed was made for other values of weight, which have changed since; call prepack again");
  }
  const std::string name(field(header.algorithm));
  if (algorithm != "auto" && algorithm != name) {
    fail(where, "algorithm must be 'auto' or that of packed, '", printable(name), "', got '", algorithm,
         "'; call prepack again with algorithm='", algorithm, "'");
  }
  if (name == "aten") return {nullptr, nullptr};
  const ConvAlgo* algo = algos_for(device_type(weight)).find(name.c_str());
  if (algo == nullptr) {
    fail(where, "packed was made for algorithm '", printable(name), "', which is not available on ",
         device_type(weight), "; call prepack again");
  }
  if (const Refusal why = algo->refuse(prob, device_of(weight)); why != nullptr) {
    fail(where, "packed was made for algorithm '", name, "', which cannot run this: ", why, "; call prepack again");
  }
  if (weight.is_cuda()) return {algo, device_payload(where, header, data, weight, algo->packed_bytes(prob))};
  if (header.payload_bytes == 0 || field(header.target) != cpu::target_name()) return {algo, nullptr};
  if (header.payload_bytes != algo->packed_bytes(prob)) {
    fail(where, "packed has a payload of ", header.payload_bytes, " bytes, where algorithm '", name, "' needs ",
         algo->packed_bytes(prob), "; call prepack again");
  }
  if (reinterpret_cast<uintptr_t>(data) % kCacheLine != 0) {
    fail(where, "packed must begin at a multiple of ", kCacheLine, " bytes in memory; copy it with .clone()");
  }
  return {algo, data + kHeaderBytes};
}

}  // namespace repvgg::ops
