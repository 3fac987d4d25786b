// Prints a plan as JSON, and what a launch would hand to its kernel: the bytes of each struct, of
// which test_instructions.py makes a kernel's parameters. It is the one place of that test that
// knows the types and functions of csrc. Neither a GPU nor a kernel takes part.
//
//   parameters dtype layout samples channels pixels k backward [strategy threads depth]
//
// dtype and layout are the numbers of csrc/eca.h, backward is 0 or 1, and a strategy is its letter.
#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "../../csrc/cuda/arguments.h"
#include "../../csrc/cuda/step.h"

namespace {

using namespace eca;

// The blocks that are counted, and the elements of x that they rescale: from the middle of a
// sample, where no tile is narrower than others.
struct Counted {
  int64_t blocks[2];  // the second is -1 where one block does both
  int64_t elements;
};

Counted counted(const Problem& p, const Plan& plan) {
  const Tiling& t = plan.tiling;
  if (plan.strategy == 'S' && t.lanes) {  // of runs
    const int64_t tile = t.tiles / 2, step = 2 * t.chunk * t.tiles;
    return {{2 * tile, step + 2 * tile + 1}, t.tile * p.pixels};
  }
  if (plan.strategy == 'S' && p.layout == Layout::kPlanes) {
    const int64_t part = t.parts / 2, vector = 16 / size_of(p.dtype);
    const int64_t elements =
        std::min<int64_t>(t.share, p.pixels / vector - part * t.share) * vector;
    const int64_t block = p.channels / 2 * t.parts + part,
                  step = 2 * t.chunk * p.channels * t.parts;
    return {{2 * block, step + 2 * block + 1}, elements};
  }
  if (plan.strategy == 'K' || plan.strategy == 'S') {
    const int64_t rows = t.threads / (p.channels * size_of(p.dtype) / 16);  // pixels at a time
    const int64_t part = t.parts / 2, in_part = rows * (plan.strategy == 'K' ? t.share : t.depth);
    const int64_t elements = std::min(in_part, p.pixels - part * in_part) * p.channels;
    if (plan.strategy == 'K') return {{part, -1}, elements};
    // One block sums a part of the first sample, and one of the next step rescales it.
    const int64_t step = 2 * t.chunk * t.parts;
    return {{2 * part, step + 2 * part + 1}, elements};
  }
  const int64_t tile = t.tiles / 2;
  return {{tile, -1}, std::min<int64_t>(t.tile, p.channels - tile * t.tile) * p.pixels};
}

template <class Struct>
void print(const char* name, const Struct& value) {
  std::printf(", \"%s\": {\"alignment\": %zu, \"bytes\": \"", name, alignof(Struct));
  const auto* const bytes = reinterpret_cast<const unsigned char*>(&value);
  for (size_t i = 0; i < sizeof value; ++i) std::printf("%02x", bytes[i]);
  std::printf("\"}");
}

int run(int argc, char** argv) {
  if (argc != 8 && argc != 11) {
    std::fprintf(stderr, "7 or 10 arguments\n");
    return 2;
  }
  int64_t v[7];
  for (int i = 0; i < 7; ++i) v[i] = std::atoll(argv[i + 1]);
  const auto dtype = Dtype(v[0]);
  const Problem p{dtype, Layout(v[1]), v[2], v[3], v[4], dtype, v[5], false, false};
  const Pass pass = v[6] ? Pass::kBackward : Pass::kForward;
  Forced forced;
  if (argc == 11) {
    forced.strategy = argv[8][0];
    forced.threads = std::atoi(argv[9]);
    forced.depth = std::atoi(argv[10]);
  }
  const Plan plan =
      make_plan(p, pass, dense_access(p), gpu_by_name("sm_90:132"), argc == 11 ? &forced : nullptr);
  const Tiling& t = plan.tiling;

  // Not null, where that would leave out a result. Nothing is read there.
  void* const some = reinterpret_cast<void*>(uintptr_t(1) << 46);
  const Map map{some, p.channels * p.pixels, p.layout == Layout::kPlanes ? p.pixels : p.channels};

  const Counted these = counted(p, plan);
  std::printf("{\"strategy\": \"%s\", \"blocks\": %" PRId64 ", \"threads\": %d",
              strategy_name(plan.strategy), plan.blocks, t.threads);
  std::printf(", \"runs\": %s", t.lanes && plan.strategy != 'R' ? "true" : "false");
  std::printf(", \"tile\": %d, \"tiles\": %" PRId64 ", \"depth\": %d, \"granule\": %d", t.tile,
              t.tiles, t.depth, run_granule(p.pixels, size_of(dtype)));
  std::printf(", \"instructions\": %" PRId64, plan.instructions);
  std::printf(", \"elements\": %" PRId64 ", \"counted\": [%" PRId64, these.elements,
              these.blocks[0]);
  if (these.blocks[1] >= 0) std::printf(", %" PRId64, these.blocks[1]);
  std::printf("]");
  print("Forward", Forward{p, map, map, some, some, some});
  print("Backward", Backward{p, map, map, map, some, some, some, some});
  print("Tiling", t);
  print("SharedLayout", shared_layout(p, pass, plan.strategy, t));
  print("Workspace", cuda::Workspace{});
  print("Rescale", cuda::Rescale{});
  std::printf("}\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
