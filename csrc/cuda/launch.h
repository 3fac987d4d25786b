// Launchers: from a call and its plan to kernels. Instantiated once for each dtype.
#pragma once

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

inline Workspace arrange(const Problem& p, Pass pass, const Plan& plan, const Memory& memory) {
  const WorkspaceLayout at = workspace_layout(p, pass, plan);
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

  ChunkLaunches(const Problem& p, const Tiling& t, const Chunk& chunk, int vector, int accumulator,
                const Memory& memory) {
    const auto stream = static_cast<Stream>(memory.stream);
    const int64_t warps = t.threads / 32, channels = chunk.count * p.channels;
    const bool planes = p.layout == Layout::kPlanes;
    const int64_t blocks = planes ? ceil_div(channels * t.parts, warps) : chunk.count * t.parts;
    sums = {blocks, t.threads, planes ? 0 : int64_t(t.threads) * vector * accumulator, stream};
    gates = {ceil_div(channels, warps), t.threads, 0, stream};
    rescale = {blocks, t.threads, 0, stream};
  }
};

template <class T, class Body>
void for_each_chunk(const Problem& p, const Tiling& t, const Memory& memory, Body body) {
  for (int64_t first = 0; first < p.samples; first += t.chunk) {
    const Chunk chunk{first, t.chunk < p.samples - first ? t.chunk : p.samples - first};
    body(chunk, ChunkLaunches(p, t, chunk, kVector<T>, sizeof(Accumulator<T>), memory));
  }
}

template <class T, class Sum, class Step>
void sum(const ChunkLaunches& how, const Problem& p, const Map& x, const Map& dy, const Tiling& t,
         const Chunk& chunk, const Workspace& work, Step step) {
  const bool planes = p.layout == Layout::kPlanes;
  launch(how.sums, planes ? sum_planes<T, Sum, Step> : sum_pixels<T, Sum, Step>, p, x, dy, t, chunk,
         work, step);
}

template <class T, bool kShifts, class Step>
void rescale(const ChunkLaunches& how, const Problem& p, const Map& from, const Map& to,
             const void* gates, const void* shifts, const Tiling& t, const Chunk& chunk,
             Step step) {
  const bool planes = p.layout == Layout::kPlanes;
  launch(how.rescale, planes ? rescale_planes<T, kShifts, Step> : rescale_pixels<T, kShifts, Step>,
         p, from, to, gates, shifts, t, chunk, step);
}

template <int kNumber>
using Constant = std::integral_constant<int, kNumber>;

// Calls body(granule), or body(depth, granule), with the sizes of the kernel for a problem's runs.
template <class T, class Body>
void with_granule(const Problem& p, Body body) {
  if constexpr (sizeof(T) == 2)
    if (run_granule(p.pixels, sizeof(T)) == 4) return body(Constant<4>{});
  body(Constant<1>{});
}

template <class T, class Body>
void with_run_sizes(const Problem& p, const Tiling& t, Body body) {
  with_granule<T>(p, [&](auto granule) {
    if (t.depth == 2) return body(Constant<2>{}, granule);
    if (t.depth == 4) return body(Constant<4>{}, granule);
    body(Constant<8>{}, granule);
  });
}

// Strategies R, F, P, K and S. float64 only has C: it is for checking gradients.
template <class T, class Step>
void run_in_registers(Forward f, const Plan& plan, const Memory& memory, const Workspace& work,
                      Step step) {
  if constexpr (!std::is_same_v<T, double>) {
    const Tiling& t = plan.tiling;
    const SharedLayout s = shared_layout(f.problem, Pass::kForward, plan.strategy, t);
    const auto start = [&](auto kernel) { launch(launch_of(plan, memory), kernel, f, t, s, step); };
    const auto start_sharing = [&](auto kernel) {
      if (!f.mean) f.mean = work.mean, f.gate = work.gate;
      launch(launch_of(plan, memory), kernel, f, t, s, work, step);
    };
    switch (plan.strategy) {
      case 'K': return start_sharing(forward_kept<T, kKeptForwardDepth, Step>);
      case 'S':
        if (t.lanes)
          return with_granule<T>(f.problem, [&](auto granule) {
            start_sharing(forward_stream_runs<T, kStreamRunDepth, decltype(granule)::value, Step>);
          });
        return start_sharing(f.problem.layout == Layout::kPlanes
                                 ? forward_stream_planes<T, stream_plane_depth(false), Step>
                                 : forward_stream<T, stream_pixel_depth(false), Step>);
      case 'R': return start(t.depth == 7 ? forward_rows<T, 7, Step> : forward_rows<T, 13, Step>);
      case 'F':
        return with_run_sizes<T>(f.problem, t, [&](auto depth, auto granule) {
          start(forward_runs<T, decltype(depth)::value, decltype(granule)::value, Step>);
        });
      default:
        return start(t.depth == 4   ? forward_columns<T, 4, Step>
                     : t.depth == 7 ? forward_columns<T, 7, Step>
                                    : forward_columns<T, 13, Step>);
    }
  }
}

template <class T, class Step>
void run_in_registers(const Backward& b, const Plan& plan, const Memory& memory,
                      const Workspace& work, Step step) {
  if constexpr (!std::is_same_v<T, double>) {
    const Tiling& t = plan.tiling;
    const SharedLayout s = shared_layout(b.problem, Pass::kBackward, plan.strategy, t);
    const auto start = [&](auto kernel) {
      launch(launch_of(plan, memory), kernel, b, t, s, work, step);
    };
    switch (plan.strategy) {
      case 'K': return start(backward_kept<T, kKeptBackwardDepth, Step>);
      case 'S':
        if (t.lanes)
          return with_granule<T>(b.problem, [&](auto granule) {
            start(backward_stream_runs<T, kStreamRunDepth, decltype(granule)::value, Step>);
          });
        return start(b.problem.layout == Layout::kPlanes
                         ? backward_stream_planes<T, stream_plane_depth(true), Step>
                         : backward_stream<T, stream_pixel_depth(true), Step>);
      case 'R': return start(t.depth == 7 ? backward_rows<T, 7, Step> : backward_rows<T, 13, Step>);
      case 'F':
        return with_run_sizes<T>(b.problem, t, [&](auto depth, auto granule) {
          start(backward_runs<T, decltype(depth)::value, decltype(granule)::value, Step>);
        });
      default:
        return start(t.depth == 4 ? backward_columns<T, 4, Step> : backward_columns<T, 7, Step>);
    }
  }
}

// dweight from what the kernels before it left in the workspace.
template <class T>
void run_dweight(const Backward& b, const Plan& plan, const Memory& memory, const Workspace& work) {
  if (!b.dweight) return;
  const Problem& p = b.problem;
  const auto start = [&](int64_t blocks, int threads, int64_t sums, auto kernel) {
    const int64_t shared = sums * int64_t(sizeof(Accumulator<T>));
    launch({blocks, threads, shared, static_cast<Stream>(memory.stream)}, kernel, b, work);
  };
  if (p.taps_per_channel)
    return start(ceil_div(p.channels, 32) * p.kernel_size, kOwnDweightThreads, kOwnDweightThreads,
                 sum_own_dweight<T>);
  if (plan.strategy == 'C')
    start(ceil_div(plan.dweight_parts, kPassThreads / 32), kPassThreads, 0, sum_dweight_parts<T>);
  start(p.kernel_size, kDweightThreads, kDweightThreads / 32, add_dweight_parts<T>);
}

template <class T, class Step>
void run_forward(Forward f, const Plan& plan, const Memory& memory, Step step) {
  const Problem& p = f.problem;
  const Tiling& t = plan.tiling;
  const Workspace work = arrange(p, Pass::kForward, plan, memory);
  if (t.depth) return run_in_registers<T>(f, plan, memory, work, step);
  if (!f.mean) f.mean = work.mean, f.gate = work.gate;
  const Map none{nullptr, 0, 0};
  for_each_chunk<T>(p, t, memory, [&](const Chunk& chunk, const ChunkLaunches& how) {
    sum<T, SumOfX>(how, p, f.x, none, t, chunk, work, step);
    launch(how.gates, make_gates<T>, f, t, chunk, work);
    rescale<T, false>(how, p, f.x, f.y, f.gate, nullptr, t, chunk, step);
  });
}

template <class T, class Step>
void run_backward(const Backward& b, const Plan& plan, const Memory& memory, Step step) {
  const Problem& p = b.problem;
  const Tiling& t = plan.tiling;
  const Workspace work = arrange(p, Pass::kBackward, plan, memory);
  if (t.depth) {
    run_in_registers<T>(b, plan, memory, work, step);
    return run_dweight<T>(b, plan, memory, work);
  }
  for_each_chunk<T>(p, t, memory, [&](const Chunk& chunk, const ChunkLaunches& how) {
    sum<T, SumOfProducts>(how, p, b.x, b.dy, t, chunk, work, step);
    launch(how.gates, make_shifts<T>, b, t, chunk, work);
    if (b.dx.data) rescale<T, true>(how, p, b.dy, b.dx, b.gate, work.shift, t, chunk, step);
  });
  run_dweight<T>(b, plan, memory, work);
}

template <class T>
void run_reduce(const Reduce& r, const Plan& plan, const Memory& memory) {
  const Problem& p = r.problem;
  const Tiling& t = plan.tiling;
  const Workspace work = arrange(p, reduce_pass(r), plan, memory);
  for_each_chunk<T>(p, t, memory, [&](const Chunk& chunk, const ChunkLaunches& how) {
    if (r.dy.data) sum<T, SumOfProducts>(how, p, r.x, r.dy, t, chunk, work, Rescale{});
    else sum<T, SumOfX>(how, p, r.x, r.dy, t, chunk, work, Rescale{});
    launch(how.gates, add_parts<T>, p, t, chunk, work, r.result, r.dy.data ? int64_t(1) : p.pixels);
    if (r.dx.data) rescale<T, false>(how, p, r.dy, r.dx, r.gate, nullptr, t, chunk, Rescale{});
  });
}

template <class T>
void run_scale(const Scale& s, const Plan& plan, const Memory& memory) {
  const Problem& p = s.problem;
  const Tiling& t = plan.tiling;
  for_each_chunk<T>(p, t, memory, [&](const Chunk& chunk, const ChunkLaunches& how) {
    if (s.shift) rescale<T, true>(how, p, s.x, s.y, s.gate, s.shift, t, chunk, Rescale{});
    else rescale<T, false>(how, p, s.x, s.y, s.gate, nullptr, t, chunk, Rescale{});
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
