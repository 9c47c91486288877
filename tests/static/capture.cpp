// SPDX-License-Identifier: MIT
// A CUDA runtime that launches nothing and writes down what it is asked to launch: linked with the real launch code, it
// says which kernel a problem takes, with what grid, shared memory and parameters. Prints one JSON object a line.
//
//   capture PARAMETERS conv ROW N C H W K STRIDE GROUPS DTYPE LAYOUT ACTIVATION CAPABILITY
//   capture PARAMETERS pack ROW ... (as conv)
//   capture PARAMETERS fuse N_BRANCHES K C DTYPE
//
// PARAMETERS is a file with a line per kernel: its mangled name and the sizes of its parameters in bytes, as the PTX
// declares them. Pointers are made up: their highest byte is 0x5A, and each array has its own second byte.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/algos.h"

using namespace repvgg;

static std::map<const void*, std::string>& kernel_names() {
  static std::map<const void*, std::string> names;
  return names;
}
static std::map<std::string, std::vector<size_t>> parameter_sizes;

static void* array(int i) { return reinterpret_cast<void*>(0x5A00000000000000 + (static_cast<uint64_t>(i) << 48)); }

// ------------------------------------------------------------------------------------------------------- the runtime

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  kernel_names()[function] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

// Kernels are launched by launch_kernel, never with <<< >>>.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }

cudaError_t CUDARTAPI cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t CUDARTAPI cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
cudaError_t CUDARTAPI cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorNoDevice; }
cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }
const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "no device"; }

cudaError_t CUDARTAPI cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** parameters) {
  const std::string& name = kernel_names().at(function);
  std::printf("{\"kernel\": \"%s\", \"grid\": %u, \"block\": %u, \"dynamic_shared\": %zu, \"parameters\": [",
              name.c_str(), config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes);
  const std::vector<size_t>& sizes = parameter_sizes.at(name);
  for (size_t i = 0; i < sizes.size(); ++i) {
    std::printf("%s\"", i == 0 ? "" : ", ");
    for (size_t byte = 0; byte < sizes[i]; ++byte) {
      std::printf("%02x", static_cast<const unsigned char*>(parameters[i])[byte]);
    }
    std::printf("\"");
  }
  std::printf("]}\n");
  return cudaSuccess;
}
}  // extern "C"

// ------------------------------------------------------------------------------------------------------ the launches

static void conv(const std::string& name, bool pack, const std::vector<int64_t>& v) {
  ConvProblem prob{v[0],
                   v[1],
                   v[2],
                   v[3],
                   v[4],
                   static_cast<int32_t>(v[5]),
                   static_cast<int32_t>(v[6]),
                   static_cast<DType>(v[7]),
                   static_cast<Layout>(v[8]),
                   static_cast<Activation>(v[9])};
  constexpr int kMultiprocessors = 108;
  const Device device{true, 0, 1, static_cast<int>(v[10]), kMultiprocessors};
  const ConvAlgo* row = cuda::algos().find(name.c_str());
  if (row == nullptr) throw std::runtime_error("the CUDA table has no row " + name);
  if (const char* why = row->refuse(prob, device)) throw std::runtime_error(name + " refuses: " + why);
  if (pack) return row->pack(prob, {array(2), array(3), nullptr, {}});
  ConvArgs args{};
  args.x = array(1);
  args.weight = array(2);
  args.packed = row->packed_bytes(prob) > 0 ? array(3) : nullptr;
  args.bias = array(4);
  args.bias_dtype = prob.dtype;
  args.y = array(5);
  args.workspace = row->workspace(prob, device) > 0 ? array(6) : nullptr;
  args.device = device;
  row->launch(prob, args);
}

// A branch of each kind in turn: 3x3, 1x1, identity, all with a BatchNorm.
static void fuse(const std::vector<int64_t>& v) {
  int arrays = 0;
  const auto next = [&](DType dtype) { return FoldArray{array(++arrays), dtype}; };
  const auto dtype = static_cast<DType>(v[3]);
  FoldProblem prob{};
  prob.n_branches = static_cast<int32_t>(v[0]);
  prob.K = v[1];
  prob.C = v[2];
  prob.weight_dtype = prob.bias_dtype = dtype;
  prob.weight = array(++arrays);
  prob.bias = array(++arrays);
  for (int i = 0; i < prob.n_branches; ++i) {
    FoldBranch& branch = prob.branches[i];
    branch.kind = static_cast<FoldKind>(2 - i % 3);
    if (branch.kind != FoldKind::kIdentity) branch.kernel = next(dtype);
    branch.bn = {next(dtype), next(dtype), next(dtype), next(dtype), 1e-5};
  }
  cuda::fuse_weights(prob, nullptr);
}

int main(int argc, char** argv) {
  try {
    std::ifstream file(argv[1]);
    for (std::string line; std::getline(file, line);) {
      std::istringstream words(line);
      std::string name;
      words >> name;
      std::vector<size_t>& sizes = parameter_sizes[name];
      for (size_t size; words >> size;) sizes.push_back(size);
    }
    const std::string what = argv[2];
    const bool is_fuse = what == "fuse";
    std::vector<int64_t> values;
    for (int i = is_fuse ? 3 : 4; i < argc; ++i) values.push_back(std::atoll(argv[i]));
    if (is_fuse) {
      fuse(values);
    } else {
      conv(argv[3], what == "pack", values);
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
