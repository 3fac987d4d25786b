// Launchers: from a call and its plan to kernels. Instantiated once for each dtype.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "columns.h"
#include "cuda.h"
#include "dweight.h"
#include "kept.h"
#include "rows.h"
#include "runs.h"
#include "stream_planes.h"
#include "stream_runs.h"
#include "two_pass.h"

namespace eca::cuda {

// What a layout decides, such as which of two kernels.
template <class Choice>
Choice by_layout(const Problem& problem, Choice planes, Choice pixels) {
  return problem.layout == Layout::kPlanes ? planes : pixels;
}

inline Workspace arrange(const Problem& problem, Pass pass, const Plan& plan,
                         const Memory& memory) {
  const WorkspaceLayout at = workspace_layout(problem, pass, plan);
  char* const base = static_cast<char*>(memory.workspace);
  return {{memory.counters}, base + at.sums, base + at.dz,   base + at.shift,
          base + at.dweight, base + at.mean, base + at.gate, plan.dweight_parts};
}

inline Launch launch_of(const Plan& plan, const Memory& memory) {
  return {plan.blocks, plan.tiling.threads, plan.shared_bytes, static_cast<Stream>(memory.stream),
          plan.strategy == 'K' || plan.strategy == 'S'};
}

// The launches of two_pass over one chunk of samples.
struct ChunkLaunches {
  Launch sums, gates, rescale;

  ChunkLaunches(const Problem& problem, const Tiling& tiling, const Chunk& chunk, int vector,
                int accumulator, const Memory& memory) {
    const auto stream = static_cast<Stream>(memory.stream);
    const int64_t warps = tiling.threads / 32, channels = chunk.count * problem.channels;
    if (channels * tiling.parts > UINT32_MAX)  // the kernels count them in 32 bits
      throw std::runtime_error("eca_fused: expected fewer than 2^32 planes in a launch, got " +
                               std::to_string(channels * tiling.parts) + "; use a smaller batch");
    const int64_t blocks =
        by_layout(problem, ceil_div(channels * tiling.parts, warps), chunk.count * tiling.parts);
    sums = {blocks, tiling.threads,
            by_layout<int64_t>(problem, 0, int64_t(tiling.threads) * vector * accumulator), stream};
    gates = {ceil_div(channels, warps), tiling.threads, 0, stream};
    rescale = {blocks, tiling.threads, 0, stream};
  }
};

template <class T, class Body>
void for_each_chunk(const Problem& problem, const Tiling& tiling, const Memory& memory, Body body) {
  for (int64_t first = 0; first < problem.samples; first += tiling.chunk) {
    const Chunk chunk{
        first, tiling.chunk < problem.samples - first ? tiling.chunk : problem.samples - first};
    body(chunk, ChunkLaunches(problem, tiling, chunk, kVector<T>, sizeof(Accumulator<T>), memory));
  }
}

template <class T, class Sum, class Step>
void sum(const ChunkLaunches& how, const Problem& problem, const Map& x, const Map& dy,
         const Tiling& tiling, const Chunk& chunk, const Workspace& work, Step step) {
  launch(how.sums, by_layout(problem, sum_planes<T, Sum, Step>, sum_pixels<T, Sum, Step>), problem,
         x, dy, tiling, chunk, work, step);
}

template <class T, bool kShifts, class Step>
void rescale(const ChunkLaunches& how, const Problem& problem, const Map& from, const Map& to,
             const void* gates, const void* shifts, const Tiling& tiling, const Chunk& chunk,
             Step step) {
  launch(how.rescale,
         by_layout(problem, rescale_planes<T, kShifts, Step>, rescale_pixels<T, kShifts, Step>),
         problem, from, to, gates, shifts, tiling, chunk, step);
}

template <int kNumber>
using Constant = std::integral_constant<int, kNumber>;

// Calls body(granule), or body(depth, granule), with the sizes of the kernel for a problem's runs.
template <class T, class Body>
void with_granule(const Problem& problem, Body body) {
  if constexpr (sizeof(T) == 2)
    if (run_granule(problem.pixels, sizeof(T)) == 4) return body(Constant<4>{});
  body(Constant<1>{});
}

template <class T, class Body>
void with_run_sizes(const Problem& problem, const Tiling& tiling, Body body) {
  with_granule<T>(problem, [&](auto granule) {
    if (tiling.depth == 2) return body(Constant<2>{}, granule);
    if (tiling.depth == 4) return body(Constant<4>{}, granule);
    body(Constant<8>{}, granule);
  });
}

// Strategies R, F, P, K and S. float64 only has C: it is for checking gradients. A step with
// kWholeTiles has no S; forward it has P and K only for elements of 2 bytes, see
// Planner::tail_fits().
template <class T, class Step>
void run_in_registers(Forward f, const Plan& plan, const Memory& memory, const Workspace& work,
                      Step step) {
  if constexpr (!std::is_same_v<T, double>) {
    constexpr bool kPixels = !Step::kWholeTiles || sizeof(T) == 2;
    const Tiling& tiling = plan.tiling;
    constexpr Pass kPass = Step::kWholeTiles ? Pass::kTailForward : Pass::kForward;
    const SharedLayout shared = shared_layout(f.problem, kPass, plan.strategy, tiling);
    const auto start = [&](auto kernel) {
      launch(launch_of(plan, memory), kernel, f, tiling, shared, step);
    };
    const auto start_sharing = [&](auto kernel) {
      if (!f.gate) f.mean = work.mean, f.gate = work.gate;
      launch(launch_of(plan, memory), kernel, f, tiling, shared, work, step);
    };
    switch (plan.strategy) {
      case 'K':
        if constexpr (kPixels) {
          start_sharing(forward_kept<T, kept_depth(false, Step::kWholeTiles), Step>);
        }
        return;
      case 'S':
        if constexpr (!Step::kWholeTiles) {
          if (tiling.lanes)
            return with_granule<T>(f.problem, [&](auto granule) {
              start_sharing(
                  forward_stream_runs<T, kStreamRunDepth, decltype(granule)::value, Step>);
            });
          start_sharing(by_layout(f.problem,
                                  forward_stream_planes<T, stream_plane_depth(false), Step>,
                                  forward_stream<T, stream_pixel_depth(false), Step>));
        }
        return;
      case 'R':
        return start(tiling.depth == 7 ? forward_rows<T, 7, Step> : forward_rows<T, 13, Step>);
      case 'F':
        return with_run_sizes<T>(f.problem, tiling, [&](auto depth, auto granule) {
          start(forward_runs<T, decltype(depth)::value, decltype(granule)::value, Step>);
        });
      default:
        if constexpr (kPixels) {
          if constexpr (!Step::kWholeTiles)
            if (tiling.depth == 13) return start(forward_columns<T, 13, Step>);
          start(tiling.depth == 4 ? forward_columns<T, 4, Step> : forward_columns<T, 7, Step>);
        }
    }
  }
}

template <class T, class Step>
void run_in_registers(const Backward& b, const Plan& plan, const Memory& memory,
                      const Workspace& work, Step step) {
  if constexpr (!std::is_same_v<T, double>) {
    const Tiling& tiling = plan.tiling;
    constexpr Pass kPass = Step::kWholeTiles ? Pass::kTailBackward : Pass::kBackward;
    const SharedLayout shared = shared_layout(b.problem, kPass, plan.strategy, tiling);
    const auto start = [&](auto kernel) {
      launch(launch_of(plan, memory), kernel, b, tiling, shared, work, step);
    };
    switch (plan.strategy) {
      case 'K': return start(backward_kept<T, kept_depth(true, Step::kWholeTiles), Step>);
      case 'S':
        if constexpr (!Step::kWholeTiles) {
          if (tiling.lanes)
            return with_granule<T>(b.problem, [&](auto granule) {
              start(backward_stream_runs<T, kStreamRunDepth, decltype(granule)::value, Step>);
            });
          start(by_layout(b.problem, backward_stream_planes<T, stream_plane_depth(true), Step>,
                          backward_stream<T, stream_pixel_depth(true), Step>));
        }
        return;
      case 'R':
        return start(tiling.depth == 7 ? backward_rows<T, 7, Step> : backward_rows<T, 13, Step>);
      case 'F':
        return with_run_sizes<T>(b.problem, tiling, [&](auto depth, auto granule) {
          start(backward_runs<T, decltype(depth)::value, decltype(granule)::value, Step>);
        });
      default:
        start(tiling.depth == 4 ? backward_columns<T, 4, Step> : backward_columns<T, 7, Step>);
    }
  }
}

// dweight from what the kernels before it left in the workspace.
template <class T>
void run_dweight(const Backward& b, const Plan& plan, const Memory& memory, const Workspace& work) {
  if (!b.dweight) return;
  const Problem& problem = b.problem;
  const auto start = [&](int64_t blocks, int threads, int64_t sums, auto kernel) {
    const int64_t shared = sums * int64_t(sizeof(Accumulator<T>));
    launch({blocks, threads, shared, static_cast<Stream>(memory.stream)}, kernel, b, work);
  };
  if (problem.taps_per_channel)
    return start(ceil_div(problem.channels, 32) * problem.kernel_size, kOwnDweightThreads,
                 kOwnDweightThreads, sum_own_dweight<T>);
  if (plan.strategy == 'C')
    start(ceil_div(plan.dweight_parts, kPassThreads / 32), kPassThreads, 0, sum_dweight_parts<T>);
  start(problem.kernel_size, kDweightThreads, kDweightThreads / 32, add_dweight_parts<T>);
}

template <class T, class Step>
void run_forward(Forward f, const Plan& plan, const Memory& memory, Step step) {
  const Problem& problem = f.problem;
  const Tiling& tiling = plan.tiling;
  const Workspace work = arrange(problem, Pass::kForward, plan, memory);
  if (tiling.depth) return run_in_registers<T>(f, plan, memory, work, step);
  if (!f.mean) f.mean = work.mean, f.gate = work.gate;
  const Map none{nullptr, 0, 0};
  for_each_chunk<T>(problem, tiling, memory, [&](const Chunk& chunk, const ChunkLaunches& how) {
    sum<T, SumOfX>(how, problem, f.x, none, tiling, chunk, work, step);
    launch(how.gates, make_gates<T>, f, tiling, chunk, work);
    rescale<T, false>(how, problem, f.x, f.y, f.gate, nullptr, tiling, chunk, step);
  });
}

template <class T, class Step>
void run_backward(const Backward& b, const Plan& plan, const Memory& memory, Step step) {
  const Problem& problem = b.problem;
  const Tiling& tiling = plan.tiling;
  const Workspace work = arrange(problem, Pass::kBackward, plan, memory);
  if (tiling.depth) {
    run_in_registers<T>(b, plan, memory, work, step);
    return run_dweight<T>(b, plan, memory, work);
  }
  for_each_chunk<T>(problem, tiling, memory, [&](const Chunk& chunk, const ChunkLaunches& how) {
    sum<T, SumOfProducts>(how, problem, b.x, b.dy, tiling, chunk, work, step);
    launch(how.gates, make_shifts<T>, b, tiling, chunk, work);
    if (b.dx.data)
      rescale<T, true>(how, problem, b.dy, b.dx, b.gate, work.shift, tiling, chunk, step);
  });
  run_dweight<T>(b, plan, memory, work);
}

template <class T>
void run_reduce(const Reduce& r, const Plan& plan, const Memory& memory) {
  const Problem& problem = r.problem;
  const Tiling& tiling = plan.tiling;
  const Workspace work = arrange(problem, reduce_pass(r), plan, memory);
  for_each_chunk<T>(problem, tiling, memory, [&](const Chunk& chunk, const ChunkLaunches& how) {
    if (r.dy.data) sum<T, SumOfProducts>(how, problem, r.x, r.dy, tiling, chunk, work, Rescale{});
    else sum<T, SumOfX>(how, problem, r.x, r.dy, tiling, chunk, work, Rescale{});
    launch(how.gates, add_parts<T>, problem, tiling, chunk, work, r.result,
           r.dy.data ? int64_t(1) : problem.pixels);
    if (r.dx.data)
      rescale<T, false>(how, problem, r.dy, r.dx, r.gate, nullptr, tiling, chunk, Rescale{});
  });
}

template <class T>
void run_scale(const Scale& s, const Plan& plan, const Memory& memory) {
  const Problem& problem = s.problem;
  const Tiling& tiling = plan.tiling;
  for_each_chunk<T>(problem, tiling, memory, [&](const Chunk& chunk, const ChunkLaunches& how) {
    if (s.shift)
      rescale<T, true>(how, problem, s.x, s.y, s.gate, s.shift, tiling, chunk, Rescale{});
    else rescale<T, false>(how, problem, s.x, s.y, s.gate, nullptr, tiling, chunk, Rescale{});
  });
}

template <class T>
void run_forward(Forward f, const Plan& plan, const Memory& memory) {
  run_forward<T>(f, plan, memory, Rescale{});
}

template <class T>
void run_backward(const Backward& b, const Plan& plan, const Memory& memory) {
  run_backward<T>(b, plan, memory, Rescale{});
}

}  // namespace eca::cuda
