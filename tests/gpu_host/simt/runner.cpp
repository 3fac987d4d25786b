// Runs the CUDA kernels on the host, one call after the other, for tests/helpers/gpu_host.py. It
// reads requests from stdin and writes results to stdout. Every buffer has exactly the size that
// the kernels may touch. What they write starts as NaN.
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/cuda/cuda.h"
#include "requests.h"
#include "run_tail.h"

using namespace eca;

namespace {

enum Operation : int64_t {
  kForward,
  kBackward,
  kReduce,
  kScale,
  kTailForward,
  kTailBackward,
  kTailSums
};

// The fields of tests/helpers/gpu_host.py's request, in its order.
struct Request {
  int64_t operation;  // an Operation
  int64_t dtype, layout, samples, channels, pixels, taps_dtype, kernel_size, own_taps, circular;
  int64_t in_place, want_mean, want_dx, want_dweight;  // reduce and scale: want_mean for dy, shift
  int64_t seed, resident, count;
  int64_t capability, multiprocessors, shared_per_block, shared_per_multiprocessor, l2,
      threads_per_multiprocessor;
  int64_t forced, strategy, tile, threads, depth;
  MapRequest x, y, dy, dx;  // of tails, forward dy is the identity, and later y the result
};

std::string describe_plan(const Plan& plan) {
  const Tiling& t = plan.tiling;
  return "{\"strategy\": \"" + std::string(strategy_name(plan.strategy)) +
         "\", \"tile\": " + std::to_string(t.tile) + ", \"halo\": " + std::to_string(t.halo) +
         ", \"vectors\": " + (t.vectors ? "true" : "false") +
         ", \"width\": " + std::to_string(t.width) +
         ", \"blocks\": " + std::to_string(plan.blocks) +
         ", \"launches\": " + std::to_string(plan.launches) +
         ", \"spare\": " + std::to_string(t.spare) + ", \"chunk\": " + std::to_string(t.chunk) +
         ", \"parts\": " + std::to_string(t.parts) +
         ", \"map_bytes\": " + std::to_string(plan.map_bytes) +
         ", \"dram_bytes\": " + std::to_string(plan.dram_bytes) +
         ", \"l2_bytes\": " + std::to_string(plan.l2_bytes) + "}";
}

bool answer_one() {
  Request r;
  read_all(&r, sizeof r);
  Problem p{Dtype(r.dtype),      Layout(r.layout), r.samples,       r.channels,     r.pixels,
            Dtype(r.taps_dtype), r.kernel_size,    r.own_taps != 0, r.circular != 0};
  const int64_t size = size_of(p.dtype), taps_size = size_of(p.taps_dtype);
  const int64_t taps = (r.own_taps ? p.channels : 1) * p.kernel_size;
  const int64_t small = p.samples * p.channels * accumulator_size(p.dtype);
  const Gpu gpu{int32_t(r.capability),
                int32_t(r.multiprocessors),
                r.shared_per_block,
                r.shared_per_multiprocessor,
                r.l2,
                int32_t(r.threads_per_multiprocessor)};
  const Forced forced{char(r.strategy), int32_t(r.tile), int32_t(r.threads), int32_t(r.depth)};

  simt::settings.seed = uint64_t(r.seed);
  simt::settings.count = r.count != 0;
  simt::settings.shared_limit = r.shared_per_block;
  simt::forget_buffers();
  simt::reset_traffic();

  MapBuffer x("x", r.x, size);
  Buffer weight("weight", taps * taps_size), mean("mean", small), gate("gate", small);
  x.memory.read();
  weight.read();
  std::string plan_text;
  const auto planned = [&](const auto& call, Pass pass) {
    return make_plan(p, pass, cuda::access_of(call), gpu, r.forced ? &forced : nullptr);
  };
  const auto run = [&](const auto& call, const Plan& plan, auto kernels,
                       std::vector<Buffer*> guarded) {
    plan_text = describe_plan(plan);
    // By default there is just enough room for the blocks that wait for each other.
    const int needed = plan.strategy == 'K' ? plan.tiling.parts : 2;
    simt::settings.resident = r.resident ? int(r.resident) : needed;
    Buffer workspace("workspace", plan.workspace), counters("counters", 4 * plan.counters);
    counters.clear();
    for (Buffer* b : guarded) b->guard(true);
    kernels(call, plan,
            cuda::Memory{workspace.data(), reinterpret_cast<uint32_t*>(counters.data()), nullptr});
    for (Buffer* b : guarded) b->guard(false);
    if (!counters.is_clear()) throw std::runtime_error("a counter was not left zero");
  };
  const auto report = [&] {
    write_text("ok");
    write_text(plan_text);
    write_text(describe(simt::traffic()));
  };
  try {
    if (r.operation == kForward || r.operation == kTailForward) {
      const std::unique_ptr<MapBuffer> y(r.in_place ? nullptr : new MapBuffer("y", r.y, size));
      const Map target = r.in_place ? x.map : y->map;
      const Forward f{p,
                      x.map,
                      target,
                      weight.data(),
                      r.want_mean ? mean.data() : nullptr,
                      r.want_mean ? gate.data() : nullptr};
      Buffer* const out = r.in_place ? &x.memory : &y->memory;
      if (r.operation == kTailForward) {
        MapBuffer identity("identity", r.dy, size);
        identity.memory.read();
        const auto kernels = [&](const Forward& call, const Plan& plan, const cuda::Memory& m) {
          cuda::tail_forward(call, identity.map, plan, m);
        };
        run(f, planned(f, Pass::kForward), kernels, {&x.memory, out, &identity.memory});
      } else {
        run(f, planned(f, Pass::kForward), cuda::forward, {&x.memory, out});
      }
      report();
      out->write();
      mean.write();
      gate.write();
    } else if (r.operation == kReduce) {
      gate.read();
      MapBuffer dy("dy", r.dy, size), dx("dx", r.dx, size);
      dy.memory.read();
      const Map none{nullptr, 0, 0};
      const Reduce c{
          p,           x.map,      r.want_mean ? dy.map : none, r.want_dx ? dx.map : none,
          gate.data(), mean.data()};
      run(c, cuda::plan_of(c, gpu), cuda::reduce, {&x.memory, &dy.memory, &dx.memory});
      report();
      mean.write();
      dx.memory.write();
    } else if (r.operation == kTailSums) {
      MapBuffer dy("dy", r.dy, size), y("result", r.y, size);
      dy.memory.read();
      y.memory.read();
      Buffer sums("sums", 2 * small);
      const Reduce c{p, x.map, dy.map, {nullptr, 0, 0}, nullptr, sums.data()};
      const auto kernels = [&](const Reduce& call, const Plan& plan, const cuda::Memory& m) {
        cuda::tail_sums(call, y.map, plan, m);
      };
      Plan plan = cuda::plan_of(c, gpu);
      plan.workspace *= 2;
      run(c, plan, kernels, {&x.memory, &dy.memory, &y.memory});
      report();
      sums.write();
    } else if (r.operation == kScale) {
      gate.read();
      mean.read();
      MapBuffer y("y", r.y, size);
      const Scale c{p, x.map, y.map, gate.data(), r.want_mean ? mean.data() : nullptr};
      run(c, cuda::plan_of(c, gpu), cuda::scale, {&x.memory, &y.memory});
      report();
      y.memory.write();
    } else {
      mean.read();
      gate.read();
      MapBuffer dy("dy", r.dy, size), dx("dx", r.dx, size);
      dy.memory.read();
      Buffer dweight("dweight", taps * taps_size);
      const Backward b{p,
                       dy.map,
                       x.map,
                       r.want_dx ? dx.map : Map{nullptr, 0, 0},
                       weight.data(),
                       mean.data(),
                       gate.data(),
                       r.want_dweight ? dweight.data() : nullptr};
      if (r.operation == kTailBackward) {
        MapBuffer y("result", r.y, size), other("d_identity", r.dx, size);
        y.memory.read();
        const auto kernels = [&](const Backward& call, const Plan& plan, const cuda::Memory& m) {
          cuda::tail_backward(call, y.map, other.map, plan, m);
        };
        run(b, planned(b, Pass::kBackward), kernels, {&x.memory, &dy.memory, &y.memory});
        report();
        other.memory.write();
      } else {
        run(b, planned(b, Pass::kBackward), cuda::backward, {&x.memory, &dy.memory, &dx.memory});
        report();
      }
      dx.memory.write();
      dweight.write();
    }
  } catch (const std::exception& error) {
    write_text(std::string("error: ") + error.what());
  }
  std::fflush(stdout);
  return true;
}

}  // namespace

int main() {
  while (answer_one()) {
  }
}
