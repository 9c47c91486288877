// SPDX-License-Identifier: MIT
// A CUDA runtime that launches nothing and writes down what it is asked to launch: linked with the real launch code, it
// says which kernel a problem takes, with what grid, shared memory and parameters. Prints one JSON object a line.
//
//   capture PARAMETERS conv ROW PROBLEM            as the row would launch it
//   capture PARAMETERS pack ROW PROBLEM            its weights
//   capture PARAMETERS tile TILE SPLIT PROBLEM     with a tile of kMmaTiles
//   capture PARAMETERS fuse BLOCKS BRANCHES K C DTYPE [1]    1: with packed weights
//   capture PARAMETERS list                        all kernels, as {"kernel": NAME}
// PROBLEM is N C H W K STRIDE GROUPS DTYPE LAYOUT ACTIVATION CAPABILITY, enumerators as numbers.
//
// PARAMETERS is a file with a line per kernel: its mangled name and the sizes of its parameters in bytes, as the PTX
// declares them; of a kernel without a line they are left out. Pointers are made up: their highest byte is 0x5A, and
// each array has its own second byte.
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
#include "cuda/mma_plan.h"
#include "cuda/mma_tiles.h"

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
cudaError_t CUDARTAPI cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t CUDARTAPI cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }
const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "no device"; }

cudaError_t CUDARTAPI cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** parameters) {
  const std::string& name = kernel_names().at(function);
  std::printf("{\"kernel\": \"%s\", \"grid\": %u, \"block\": %u, \"dynamic_shared\": %zu, \"parameters\": [",
              name.c_str(), config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes);
  const std::vector<size_t>& sizes = parameter_sizes[name];
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

using Numbers = std::vector<int64_t>;

static void launch(const std::string& what, const std::string& name, Numbers v) {
  int tile = 0, split = 0;
  if (what == "tile") {
    tile = std::stoi(name);
    split = static_cast<int>(v.front());
    v.erase(v.begin());
  }
  const auto small = [&v](int i) { return static_cast<int32_t>(v.at(i)); };
  const ConvProblem prob{v.at(0),
                         v.at(1),
                         v.at(2),
                         v.at(3),
                         v.at(4),
                         small(5),
                         small(6),
                         static_cast<DType>(small(7)),
                         static_cast<Layout>(small(8)),
                         static_cast<Activation>(small(9))};
  constexpr int kMultiprocessors = 108;
  const Device device{true, 0, 1, small(10), kMultiprocessors};
  const std::string row_name = what == "tile" ? prob.dtype == DType::kFloat32 ? "mma_tf32" : "mma" : name;
  const ConvAlgo* row = cuda::algos().find(row_name.c_str());
  if (row == nullptr) throw std::runtime_error("the CUDA table has no row " + row_name);
  if (const char* why = row->refuse(prob, device)) throw std::runtime_error(row_name + " refuses: " + why);
  if (what == "pack") return row->pack(prob, {array(2), array(3), nullptr, {}});
  ConvArgs args{};
  args.x = array(1);
  args.weight = array(2);
  args.packed = row->packed_bytes(prob) > 0 ? array(3) : nullptr;
  args.bias = array(4);
  args.bias_dtype = prob.dtype;
  args.y = array(5);
  args.workspace = array(6);
  args.device = device;
  if (what != "tile") return row->launch(prob, args);
  if (!cuda::mma_tile_fits(cuda::kMmaTiles[tile], prob)) throw std::runtime_error("the tile does not fit");
  cuda::launch_mma(prob, args, cuda::plan_mma_tile(tile, split, prob, device));
}

// Branches of each kind in turn: 3x3, 1x1, identity, all with a BatchNorm.
static void fuse(const Numbers& v) {
  int arrays = 0;
  const auto dtype = static_cast<DType>(v.at(4));
  const auto next = [&arrays, dtype] { return FoldArray{array(++arrays), dtype}; };
  std::vector<FoldProblem> problems(static_cast<size_t>(v.at(0)));
  for (FoldProblem& prob : problems) {
    prob = {};
    prob.n_branches = static_cast<int32_t>(v.at(1));
    prob.K = v.at(2);
    prob.C = v.at(3);
    prob.weight_dtype = prob.bias_dtype = dtype;
    prob.weight = array(++arrays);
    prob.bias = array(++arrays);
    prob.groups = 1;
    if (v.size() > 5) prob.packed = array(++arrays);
    for (int i = 0; i < prob.n_branches; ++i) {
      FoldBranch& branch = prob.branches[i];
      branch.kind = static_cast<FoldKind>(2 - i % 3);
      if (branch.kind != FoldKind::kIdentity) branch.kernel = next();
      branch.bn = {next(), next(), next(), next(), 1e-5};
    }
  }
  cuda::fuse_weights(problems.data(), static_cast<int>(problems.size()), nullptr);
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
    if (what == "list") {
      for (const auto& [function, name] : kernel_names()) std::printf("{\"kernel\": \"%s\"}\n", name.c_str());
      return 0;
    }
    const int first = what == "fuse" ? 3 : 4;
    Numbers numbers;
    for (int i = first; i < argc; ++i) numbers.push_back(std::stoll(argv[i]));
    if (what == "fuse") {
      fuse(numbers);
    } else {
      launch(what, argv[3], numbers);
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
