// Launchers: from a call and its plan to kernels. Instantiated once for each dtype.
#pragma once

#include "cuda.h"
#include "on_chip.h"
#include "two_pass.h"

namespace eca::cuda {

inline Workspace arrange(const Problem& p, Pass pass, const Plan& plan, const Memory& memory) {
  const WorkspaceLayout at = workspace_layout(p, pass, plan);
  char* const base = static_cast<char*>(memory.workspace);
  return {{memory.counters}, base + at.sums, base + at.dz,  base + at.shift,
          base + at.dweight, base + at.mean, base + at.gate};
}

inline Launch launch_of(const Plan& plan, const Memory& memory) {
  const int cluster = plan.tiling.exchange == Exchange::kCluster ? plan.tiling.group : 1;
  return {plan.blocks, plan.tiling.threads, cluster, plan.shared_bytes,
          static_cast<Stream>(memory.stream)};
}

// Strategy C's launches over one chunk of samples.
struct ChunkLaunches {
  Launch sums, gates, rescale;

  ChunkLaunches(const Problem& p, const Tiling& t, const Chunk& chunk, int vector, int accumulator,
                const Memory& memory) {
    const auto stream = static_cast<Stream>(memory.stream);
    const int64_t warps = t.threads / 32, channels = chunk.count * p.channels;
    const bool planes = p.layout == Layout::kPlanes;
    const int64_t blocks = planes ? ceil_div(channels * t.parts, warps) : chunk.count * t.parts;
    sums = {blocks, t.threads, 1, planes ? 0 : int64_t(t.threads) * vector * accumulator, stream};
    gates = {ceil_div(channels, warps), t.threads, 1, 0, stream};
    rescale = {blocks, t.threads, 1, 0, stream};
  }
};

template <class T, class Body>
void for_each_chunk(const Problem& p, const Tiling& t, const Memory& memory, Body body) {
  for (int64_t first = 0; first < p.samples; first += t.chunk) {
    const Chunk chunk{first, t.chunk < p.samples - first ? t.chunk : p.samples - first};
    body(chunk, ChunkLaunches(p, t, chunk, kVector<T>, sizeof(Accumulator<T>), memory));
  }
}

template <class T>
void run_forward(Forward f, const Plan& plan, const Memory& memory) {
  const Problem& p = f.problem;
  const Tiling& t = plan.tiling;
  const bool planes = p.layout == Layout::kPlanes;
  const Workspace work = arrange(p, Pass::kForward, plan, memory);
  if (plan.strategy != 'C')
    return launch(launch_of(plan, memory),
                  planes ? forward_on_chip<T, Layout::kPlanes, Rescale>
                         : forward_on_chip<T, Layout::kPixels, Rescale>,
                  f, t, shared_layout(p, Pass::kForward, t), work, Rescale{});
  if (!f.mean) f.mean = work.mean, f.gate = work.gate;
  const Map none{nullptr, 0, 0};
  for_each_chunk<T>(p, t, memory, [&](const Chunk& chunk, const ChunkLaunches& how) {
    launch(how.sums, planes ? sum_planes<T, Rescale> : sum_pixels<T, Rescale>, p, f.x, none, t,
           chunk, work, Rescale{});
    launch(how.gates, make_gates<T>, f, t, chunk, work);
    launch(how.rescale, planes ? rescale_planes<T, Rescale> : rescale_pixels<T, Rescale>, p, f.x,
           f.y, f.gate, nullptr, t, chunk, Rescale{});
  });
}

template <class T>
void run_backward(const Backward& b, const Plan& plan, const Memory& memory) {
  const Problem& p = b.problem;
  const Tiling& t = plan.tiling;
  const bool planes = p.layout == Layout::kPlanes;
  const Workspace work = arrange(p, Pass::kBackward, plan, memory);
  if (plan.strategy != 'C')
    return launch(launch_of(plan, memory),
                  planes ? backward_on_chip<T, Layout::kPlanes, Rescale>
                         : backward_on_chip<T, Layout::kPixels, Rescale>,
                  b, t, shared_layout(p, Pass::kBackward, t), work, Rescale{});
  for_each_chunk<T>(p, t, memory, [&](const Chunk& chunk, const ChunkLaunches& how) {
    launch(how.sums, planes ? sum_planes<T, Rescale> : sum_pixels<T, Rescale>, p, b.x, b.dy, t,
           chunk, work, Rescale{});
    launch(how.gates, make_shifts<T>, b, t, chunk, work);
    if (b.dx.data)
      launch(how.rescale, planes ? rescale_planes<T, Rescale> : rescale_pixels<T, Rescale>, p, b.dy,
             b.dx, b.gate, work.shift, t, chunk, Rescale{});
  });
  if (!b.dweight) return;
  launch({p.samples * t.tiles, t.threads, 1, 16, static_cast<Stream>(memory.stream)},
         sum_dweight<T>, b, t, work);
}

template <class T>
void run_reduce(const Reduce& r, const Plan& plan, const Memory& memory) {
  const Problem& p = r.problem;
  const Tiling& t = plan.tiling;
  const bool planes = p.layout == Layout::kPlanes;
  const Workspace work = arrange(p, reduce_pass(r), plan, memory);
  for_each_chunk<T>(p, t, memory, [&](const Chunk& chunk, const ChunkLaunches& how) {
    launch(how.sums, planes ? sum_planes<T, Rescale> : sum_pixels<T, Rescale>, p, r.x, r.dy, t,
           chunk, work, Rescale{});
    launch(how.gates, add_parts<T>, p, t, chunk, work, r.result, r.dy.data ? int64_t(1) : p.pixels);
    if (r.dx.data)
      launch(how.rescale, planes ? rescale_planes<T, Rescale> : rescale_pixels<T, Rescale>, p, r.dy,
             r.dx, r.gate, nullptr, t, chunk, Rescale{});
  });
}

template <class T>
void run_scale(const Scale& s, const Plan& plan, const Memory& memory) {
  const Problem& p = s.problem;
  const Tiling& t = plan.tiling;
  const bool planes = p.layout == Layout::kPlanes;
  for_each_chunk<T>(p, t, memory, [&](const Chunk& chunk, const ChunkLaunches& how) {
    launch(how.rescale, planes ? rescale_planes<T, Rescale> : rescale_pixels<T, Rescale>, p, s.x,
           s.y, s.gate, s.shift, t, chunk, Rescale{});
  });
}

}  // namespace eca::cuda
