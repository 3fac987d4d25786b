// Runs the CUDA kernels of tails with ECA's gate on the host, for
// tests/helpers/gpu_host_block_tails.py. As runner.cpp: every buffer has exactly the size that the
// kernels may touch, and what they write starts as NaN.
#include <stdexcept>

#include "../../../csrc/cuda/cuda.h"
#include "requests.h"

using namespace eca;

namespace {

// The fields of tests/helpers/gpu_host_block_tails.py's request, in its order.
struct Request {
  int64_t backward;
  int64_t dtype, layout, samples, channels, pixels, taps_dtype, kernel_size, own_taps, circular;
  int64_t activation, has_identity, want_mask, identity_sum, want_dx, want_d_identity, want_dweight;
  int64_t seed, resident, count;
  int64_t capability, multiprocessors, shared_per_block, shared_per_multiprocessor, l2,
      threads_per_multiprocessor;
  int64_t forced, strategy, tile, threads, depth;
  MapRequest x, identity, dy, result;
};

std::string describe_plan(const Plan& plan) {
  const Tiling& t = plan.tiling;
  return "{\"strategy\": \"" + std::string(strategy_name(plan.strategy)) +
         "\", \"tile\": " + std::to_string(t.tile) + ", \"halo\": " + std::to_string(t.halo) +
         ", \"spare\": " + std::to_string(t.spare) + ", \"parts\": " + std::to_string(t.parts) +
         ", \"map_bytes\": " + std::to_string(plan.map_bytes) +
         ", \"dram_bytes\": " + std::to_string(plan.dram_bytes) +
         ", \"l2_bytes\": " + std::to_string(plan.l2_bytes) + "}";
}

bool answer_one() {
  Request r;
  read_all(&r, sizeof r);
  const Problem p{Dtype(r.dtype),      Layout(r.layout), r.samples,       r.channels,     r.pixels,
                  Dtype(r.taps_dtype), r.kernel_size,    r.own_taps != 0, r.circular != 0};
  const int64_t size = size_of(p.dtype), wide = accumulator_size(p.dtype), C = p.channels,
                planes = p.samples * C;
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

  const int64_t rows = p.layout == Layout::kPlanes ? planes : p.samples * p.pixels;
  MapBuffer x("x", r.x, size), identity("identity", r.identity, size), dy("dy", r.dy, size),
      first("first", r.result, size), second("second", r.result, size);
  Buffer mask("mask", rows * mask_row_bytes(p)), sums("sums", 3 * planes * 8),
      distance("distance", planes * wide), gate("gate", planes * wide),
      dmean("dmean", planes * wide);
  const int64_t taps = (r.own_taps ? C : 1) * p.kernel_size * size_of(p.taps_dtype);
  Buffer weight("weight", taps), dweight("dweight", taps), scale("scale", p.samples * wide),
      channels("channels", 6 * C * wide);
  for (MapBuffer* map : {&x, &identity, &dy}) map->memory.read();
  for (Buffer* given : {&weight, &scale, &channels}) given->read();
  if (r.backward)
    for (Buffer* saved : {&mask, &distance, &gate}) saved->read();
  const auto channel = [&](int64_t i) { return channels.data() + i * C * wide; };
  const Map none{nullptr, 0, 0};
  BlockTail b{p,
              Activation(r.activation),
              weight.data(),
              scale.data(),
              channel(0),
              channel(1),
              channel(2),
              {nullptr, nullptr, channel(3), channel(4), channel(5)},
              x.map,
              r.has_identity ? identity.map : none,
              first.map,
              r.want_mask ? reinterpret_cast<uint8_t*>(mask.data()) : nullptr,
              distance.data(),
              gate.data()};
  std::string plan_text = "{\"strategy\": \"two_pass\"}";
  const auto with_guards = [&](auto run) {
    Buffer* const guarded[] = {&x.memory, &identity.memory, &dy.memory};
    for (Buffer* g : guarded) g->guard(true);
    run();
    for (Buffer* g : guarded) g->guard(false);
  };
  const auto run = [&](const auto& call, Pass pass, auto kernels) {
    Plan plan{'C', {}};
    if (cuda::fits_on_chip(call))
      plan = make_plan(p, pass, cuda::access_of(call), gpu, r.forced ? &forced : nullptr);
    if (plan.strategy == 'C') {
      const cuda::TailPasses passes = cuda::passes_of(call, gpu);
      Buffer workspace("workspace", passes.workspace);
      with_guards([&] { kernels(passes, cuda::Memory{workspace.data(), nullptr, nullptr}); });
      return;
    }
    plan_text = describe_plan(plan);
    // By default there is just enough room for the blocks that wait for each other.
    simt::settings.resident = r.resident ? int(r.resident) : std::max(plan.tiling.parts, 1);
    Buffer workspace("workspace", plan.workspace), counters("counters", 4 * plan.counters);
    counters.clear();
    with_guards([&] {
      kernels(plan, cuda::Memory{workspace.data(), reinterpret_cast<uint32_t*>(counters.data()),
                                 nullptr});
    });
    if (!counters.is_clear()) throw std::runtime_error("a counter was not left zero");
  };
  try {
    if (r.backward) {
      const BlockTailBackward call{b,
                                   dy.map,
                                   r.want_dx ? first.map : none,
                                   r.want_d_identity ? second.map : none,
                                   reinterpret_cast<double*>(sums.data()),
                                   r.identity_sum != 0,
                                   dmean.data(),
                                   r.want_dweight ? dweight.data() : nullptr};
      run(call, Pass::kTailBackward, [&](const auto& plan, const auto& memory) {
        cuda::block_tail_backward(call, plan, memory);
      });
    } else {
      run(b, Pass::kTailForward,
          [&](const auto& plan, const auto& memory) { cuda::block_tail(b, plan, memory); });
    }
    write_text("ok");
    write_text(plan_text);
    write_text(describe(simt::traffic()));
    for (const Buffer* found :
         {&first.memory, &second.memory, &mask, &distance, &gate, &sums, &dmean, &dweight})
      found->write();
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
