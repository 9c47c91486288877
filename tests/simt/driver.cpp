// SPDX-License-Identifier: MIT
// Runs rows of the CUDA table and fuse_weights through their own launch code, on the CPU, and checks the results.
//
//   driver [option value ...] case ...
//     --schedule forward | backward | random:SEED   --blocks-at-once N   --capability 80   --multiprocessors 108
//     --algorithm NAME (default: every row)         --guard after | before
//     --reach yes: also with a NaN in one pixel, which may reach the outputs that see it and no others
//     --tile I, --split N: of the tensor-core rows, instead of what they would choose
//   case: N,C,H,W,K,stride,groups,dtype,layout,activation,bias|none     as 2,5,7,9,6,1,1,float32,nhwc,relu,bias
//     or  fuse,K,C,dtype,3x3 branches,1x1 branches,identities,bn|none,bn of the sum|none     several joined by +: one
//     call. With ,groups,both|packed behind it also, or only, packed weights; C is then that of a group
//
// Prints a JSON object per row and case. Exit status: 0 all is well, 1 a result is wrong, 2 usage, 3 an access outside
// a buffer, 4 a diagnosis of the executor.
#include "driver.h"

#include "counters.h"
#include "cuda/mma_tiles.h"

namespace simt_test {
namespace {

void set_option(const std::string& name, const std::string& value) {
  if (name == "--schedule") {
    const bool random = value.rfind("random:", 0) == 0;
    simt::schedule.order = choose<simt::Order>(
        random ? "random" : value,
        {{"forward", simt::Order::kForward}, {"backward", simt::Order::kBackward}, {"random", simt::Order::kRandom}});
    if (random) simt::schedule.seed = std::stoull(value.substr(7));
  } else if (name == "--blocks-at-once") {
    simt::schedule.blocks_at_once = static_cast<unsigned>(std::stoul(value));
  } else if (name == "--capability") {
    simt::gpu.capability = std::stoi(value);
  } else if (name == "--multiprocessors") {
    simt::gpu.multiprocessors = std::stoi(value);
  } else if (name == "--guard") {
    options.guard = choose<Guard>(value, {{"after", Guard::kAfter}, {"before", Guard::kBefore}});
  } else if (name == "--reach") {
    options.reach = value == "yes";
  } else if (name == "--tile") {
    options.tile = std::stoi(value);
    if (options.tile >= repvgg::cuda::kMmaTileCount) throw std::invalid_argument("there is no tile " + value);
  } else if (name == "--split") {
    options.split = std::stoi(value);
  } else if (name == "--algorithm") {
    options.algorithm = value;
  } else {
    throw std::invalid_argument("there is no option " + name);
  }
}

int run(int argc, char** argv) {
  int first = 1;
  for (; first + 1 < argc && argv[first][0] == '-'; first += 2) set_option(argv[first], argv[first + 1]);
  if (first >= argc || argv[first][0] == '-') throw std::invalid_argument("there is no case");
  for (int i = first; i < argc; ++i) {
    const bool fold = std::strncmp(argv[i], "fuse,", 5) == 0;
    if (!fold && options.algorithm != "fuse_weights") run_conv(argv[i]);
    if (fold && (options.algorithm.empty() || options.algorithm == "fuse_weights")) run_fold(argv[i]);
  }
  const std::string counts = simt::take_counts();
  std::printf("{\"launches\": %" PRIu64 ", \"blocks\": %" PRIu64 ", \"threads\": %" PRIu64 ", \"barriers\": %" PRIu64
              ", \"collectives\": %" PRIu64 ", \"failures\": %d, \"counts\": %s}\n",
              simt::totals.launches, simt::totals.blocks, simt::totals.threads, simt::totals.barriers,
              simt::totals.collectives, failures, counts.c_str());
  return failures != 0;
}

}  // namespace
}  // namespace simt_test

int main(int argc, char** argv) {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which show the line
  native::catch_segfaults();
#endif
  try {
    return simt_test::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 2;
  }
}
