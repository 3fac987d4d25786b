#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <stdexcept>

namespace eca {

namespace {

int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }

int32_t power_of_two_up_to(int64_t n) {
  int32_t power = 1;
  while (2 * power <= n) power *= 2;
  return power;
}

constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();  // of grid.x
constexpr int64_t kMostElements = 1 << 30;  // in a block's or a warp's part: positions are 32 bits

// ---- GPUs by name ----

// {capability, multiprocessors, shared memory of a block, and of a multiprocessor, L2, threads,
// largest cluster}, of the usual card: CUDA programming guide, "Compute capabilities", and the
// architecture white papers of T4, A100, RTX 3080 Ti, RTX 4090, H200, B200, RTX 5090.
constexpr Gpu kGpus[] = {
    {75, 40, 64 << 10, 64 << 10, 4 << 20, 1024, 1},
    {80, 108, 163 << 10, 164 << 10, 40 << 20, 2048, 1},
    {86, 80, 99 << 10, 100 << 10, 6 << 20, 1536, 1},
    {89, 128, 99 << 10, 100 << 10, 72 << 20, 1536, 1},
    {90, 132, 227 << 10, 228 << 10, 50 << 20, 2048, 8},
    {100, 148, 227 << 10, 228 << 10, 126 << 20, 2048, 8},
    {120, 170, 99 << 10, 100 << 10, 96 << 20, 1536, 8},
};

// ---- costs ----

// What a plan takes, in bytes of DRAM traffic that would take as long. Ratios between plans are
// all that counts. The constants are assumptions, to be replaced where a measurement says
// otherwise.
constexpr double kL2Speed = 2.5;            // of L2, relative to DRAM
constexpr double kOneMultiprocessor = 1.6;  // bandwidth of one alone, relative to its fair share
constexpr double kMicrosecond = 32e3;       // bytes of DRAM traffic of one multiprocessor in it
constexpr double kLaunch = 2.0;             // microseconds
constexpr double kClusterBarriers = 0.7;
constexpr double kGlobalBarriers = 3.0;

constexpr int64_t kStreams = 8;  // on which groups may wait at the same time

constexpr int64_t kMostParts = 512;  // that a warp adds up for each channel

// How much of the time loads and stores overlap, by blocks on a multiprocessor: a block first only
// loads and then only stores.
double overlap(int64_t occupancy) {
  constexpr double kBy[] = {0.65, 0.65, 0.85, 0.92, 0.96};
  return kBy[std::min<int64_t>(occupancy, 4)];
}

// ---- plans ----

struct Planner {
  const Problem& p;
  const Pass pass;
  const Access& access;
  const Gpu& gpu;
  const int64_t size = size_of(p.dtype), accumulator = accumulator_size(p.dtype);
  const int64_t V = 16 / size;       // elements in a vector
  const int64_t sector = 32 / size;  // elements in what DRAM and L2 move at least
  const bool planes = p.layout == Layout::kPlanes;
  const bool backward = pass == Pass::kBackward;
  // Taps further out than all channels reach none.
  const int64_t pad = std::min(p.kernel_size / 2, p.channels);
  const int64_t map_bytes = p.samples * p.channels * p.pixels * size;

  // The bytes of the numbers per channel: mean and gate, taps, dz and the parts of dweight.
  int64_t small_bytes(const Plan& plan) const {
    const int64_t taps = (p.taps_per_channel ? p.channels : 1) * p.kernel_size *
                         (p.taps_dtype == p.dtype ? size : 4);
    int64_t bytes = 2 * p.samples * p.channels * accumulator + taps;
    if (!backward) return bytes;
    bytes += taps;  // dweight
    const int64_t partials = p.samples * plan.tiling.tiles * p.kernel_size * accumulator;
    return bytes + 2 * (p.taps_per_channel ? p.samples * p.channels * accumulator : partials);
  }

  int32_t occupancy(const Plan& plan) const {
    const int64_t reserved = gpu.capability >= 80 ? 1 << 10 : 0;  // by the driver, in each block
    const int64_t by_shared =
        gpu.shared_per_multiprocessor / std::max<int64_t>(1, plan.shared_bytes + reserved);
    const int64_t by_threads = gpu.threads_per_multiprocessor / plan.tiling.threads;
    const int64_t by_registers =
        65536 / (plan.tiling.threads * (backward ? kBackwardRegisters : kForwardRegisters));
    return int32_t(std::min({by_shared, by_threads, by_registers, int64_t(24)}));
  }

  // Channels held by all groups of a sample, their halos included.
  int64_t held_in_sample(const Tiling& t) const {
    if (p.circular) return p.channels + t.tiles * 2 * t.halo;
    int64_t held = 0;
    for (int64_t begin = 0; begin < p.channels; begin += t.tile)
      held += std::min(p.channels, begin + t.tile + t.halo) - std::max<int64_t>(0, begin - t.halo);
    return held;
  }

  // A, B and D with these sizes; false where the kernels cannot run so.
  bool tile(int64_t channels, int64_t group, int64_t threads, Plan* plan) const {
    Tiling& t = plan->tiling;
    t = {};
    // The threads that sum one plane are a power of two, and must divide those of the block.
    if (threads < 32 || threads > kMostThreads || (threads & (threads - 1)) != 0) return false;
    const bool whole = channels == p.channels;
    const int64_t halo = whole ? 0 : planes ? pad : round_up(pad, sector);
    const int64_t held = channels + 2 * halo;
    if (!whole && (held > p.channels || access.in_place)) return false;
    if (!whole && !planes && (!access.aligned || channels % sector != 0)) return false;
    const int64_t length = planes ? held * p.pixels : p.pixels;
    if (held * p.pixels > kMostElements || held + 2 * pad > kMostElements || group > length)
      return false;
    t.exchange = group == 1                     ? Exchange::kNone
                 : gpu.largest_cluster >= group ? Exchange::kCluster
                                                : Exchange::kGlobal;
    t.vectors = access.aligned;
    t.stage_x = backward && !t.vectors;
    t.tile = int32_t(channels);
    t.halo = int32_t(halo);
    t.held = int32_t(held);
    t.pad = int32_t(pad);
    t.group = int32_t(group);
    t.share = int32_t(planes && t.vectors ? round_up(ceil_div(length, group), V)
                                          : ceil_div(length, group));
    t.tiles = ceil_div(p.channels, channels);
    t.threads = int32_t(threads);
    // As many threads for a plane as there are for each, but no more than it has vectors, and no
    // fewer than ask for a run of 128 bytes.
    const int64_t in_plane = ceil_div(p.pixels, t.vectors ? V : 1);
    const int64_t for_each =
        threads / std::max<int64_t>(1, t.share / std::max<int64_t>(1, p.pixels));
    t.lanes =
        power_of_two_up_to(std::min({threads, 2 * in_plane - 1, std::max<int64_t>(for_each, 8)}));
    t.chunk = p.samples;
    t.parts = 1;
    plan->strategy = !planes ? 'D' : group == 1 ? 'A' : 'B';
    plan->shared_bytes = shared_layout(p, pass, t).end;
    plan->blocks = p.samples * t.tiles * group;
    plan->launches = 1;
    return plan->blocks <= kMostBlocks;
  }

  double cost_on_chip(Plan* plan) const {
    const Tiling& t = plan->tiling;
    const int64_t maps = backward ? 2 : 1;  // read
    const int64_t held_bytes = p.samples * held_in_sample(t) * p.pixels * size * maps;
    plan->occupancy = occupancy(*plan);
    plan->dram_bytes = (maps + 1) * map_bytes + small_bytes(*plan);
    plan->l2_bytes = held_bytes + map_bytes + small_bytes(*plan);
    const double SMs = gpu.multiprocessors;
    const double halo_bytes = double(held_bytes - maps * map_bytes);
    double streaming = double(plan->dram_bytes) + halo_bytes / kL2Speed;
    if (plan->blocks > gpu.multiprocessors * int64_t(plan->occupancy))
      streaming /= overlap(plan->occupancy);
    const double block_bytes = double(held_bytes + map_bytes) / double(plan->blocks);
    const double busiest = double(ceil_div(plan->blocks, gpu.multiprocessors)) * block_bytes * SMs /
                           kOneMultiprocessor;
    const double fixed = kLaunch + (t.exchange == Exchange::kCluster  ? kClusterBarriers
                                    : t.exchange == Exchange::kGlobal ? kGlobalBarriers
                                                                      : 0);
    return std::max(streaming, busiest) + fixed * kMicrosecond * SMs;
  }

  // The largest tile that lets `occupancy` blocks live on a multiprocessor, evenly cut.
  bool largest_tile(int64_t group, int64_t occupancy, Plan* plan) const {
    const int64_t reserved = gpu.capability >= 80 ? 1 << 10 : 0;
    const int64_t budget =
        std::min(gpu.shared_per_block, gpu.shared_per_multiprocessor / occupancy - reserved);
    const int64_t threads = occupancy <= 4 ? kMostThreads : kMostThreads / 2;
    const int64_t unit = planes ? 1 : access.aligned ? sector : p.channels;
    const auto fits = [&](int64_t channels) {
      return tile(channels, group, threads, plan) && plan->shared_bytes <= budget;
    };
    if (fits(p.channels)) return true;
    int64_t low = 0, high = ceil_div(p.channels, unit) - 1;  // in units; low fits, or is none
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (fits(middle * unit)) low = middle;
      else high = middle - 1;
    }
    if (low == 0) return false;
    const int64_t tiles = ceil_div(p.channels, low * unit);
    const int64_t even = round_up(ceil_div(p.channels, tiles), unit);
    return fits(even) || fits(low * unit);
  }

  bool on_chip(Plan* best) const {
    if (!can_hold()) return false;
    double lowest = std::numeric_limits<double>::infinity();
    Plan plan{};
    for (int64_t group = 1; group <= 8; group *= 2)
      for (int64_t occupancy : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48}) {
        if (!largest_tile(group, occupancy, &plan)) continue;
        const double cost = cost_on_chip(&plan);
        if (plan.occupancy < 1 || cost >= lowest) continue;
        // Blocks that wait for each other must all have room, beside those of other streams.
        if (plan.tiling.exchange == Exchange::kGlobal &&
            kStreams * group > plan.occupancy * int64_t(gpu.multiprocessors))
          continue;
        lowest = cost;
        *best = plan;
      }
    best_cost = lowest;
    return lowest < std::numeric_limits<double>::infinity();
  }
  mutable double best_cost = 0;

  double two_passes(Plan* plan) const {
    *plan = {};
    Tiling& t = plan->tiling;
    const int64_t maps = backward ? 2 : 1;
    const int64_t sample_bytes = std::max<int64_t>(1, p.channels * p.pixels * size);
    t.vectors = access.aligned;
    t.threads = kMostThreads;
    t.group = 1;
    t.tile = int32_t(std::min<int64_t>(p.channels, 256));  // for the sums of dweight
    t.tiles = ceil_div(p.channels, t.tile);
    t.chunk = std::clamp<int64_t>(gpu.l2 / 2 / (sample_bytes * maps), 1, p.samples);
    const int64_t in_sample = planes ? p.channels : 1;  // rows of blocks or warps
    t.chunk = std::min(t.chunk, std::max<int64_t>(1, kMostBlocks / 64 / in_sample));
    // Enough warps to ask for all the bytes that must be under way.
    const int64_t wanted = gpu.multiprocessors * (planes ? 48 : 6);
    const int64_t smallest = planes ? 4 << 10 : 16 << 10;  // bytes of a part
    const int64_t most = std::min<int64_t>(kMostParts, 1 + sample_bytes / in_sample / smallest);
    t.parts = int32_t(std::clamp<int64_t>(ceil_div(wanted, t.chunk * in_sample), 1, most));
    t.parts = int32_t(std::max<int64_t>(t.parts, ceil_div(p.pixels, kMostElements)));
    plan->strategy = 'C';
    const int64_t rows = t.chunk * in_sample * t.parts;
    plan->blocks = planes ? ceil_div(rows, t.threads / 32) : rows;
    plan->launches = 3 * ceil_div(p.samples, t.chunk) + (backward ? 1 : 0);
    plan->shared_bytes = planes ? 0 : t.threads * V * accumulator;
    plan->occupancy = occupancy(*plan);
    const bool reused = t.chunk * sample_bytes * maps <= gpu.l2 / 2;
    plan->l2_bytes = (maps + 2) * map_bytes + small_bytes(*plan);
    plan->dram_bytes = (maps + (reused ? 1 : 2)) * map_bytes + small_bytes(*plan);
    const double idle =
        std::max(1.0, gpu.multiprocessors / kOneMultiprocessor / double(plan->blocks));
    return idle * (double(plan->dram_bytes) / overlap(4) +
                   double(plan->l2_bytes - plan->dram_bytes) / kL2Speed) +
           kLaunch * double(plan->launches) * kMicrosecond * gpu.multiprocessors;
  }

  bool can_hold() const {
    return p.pixels > 0 && (planes ? access.dense : access.aligned || access.dense);
  }

  Plan wished(const Wish& wish) const {
    Plan plan{};
    if (wish.two_passes) {
      two_passes(&plan);
      return plan;
    }
    if (!can_hold() || !tile(wish.tile, wish.group, wish.threads, &plan) ||
        plan.shared_bytes > gpu.shared_per_block)
      throw std::invalid_argument("the kernels cannot run with a tile of " +
                                  std::to_string(wish.tile) + " channels and groups of " +
                                  std::to_string(wish.group) + " blocks");
    cost_on_chip(&plan);
    return plan;
  }

  Plan best() const {
    Plan plan{}, two{};
    const double two_cost = two_passes(&two);
    if (!on_chip(&plan) || two_cost < best_cost) return two;
    return plan;
  }

  Plan complete(Plan plan) const {
    const Tiling& t = plan.tiling;
    const bool global = t.exchange == Exchange::kGlobal;
    if (global) plan.counters = 1 + t.tiles + p.samples * t.tiles;
    else if (backward) plan.counters = p.taps_per_channel ? 1 + t.tiles : 2;
    plan.map_bytes = (backward ? 3 : 2) * map_bytes;
    plan.workspace = workspace_layout(p, pass, plan).end;
    return plan;
  }
};

}  // namespace

Gpu gpu_by_name(const std::string& name) {
  const auto fail = [&](const std::string& why) {
    throw std::invalid_argument(
        "expected a GPU as sm_90 or sm_90:132 (compute capability and "
        "number of multiprocessors), got '" +
        name + "'" + why);
  };
  if (name.rfind("sm_", 0) != 0) fail("");
  char* end = nullptr;
  const long capability = std::strtol(name.c_str() + 3, &end, 10);
  long multiprocessors = 0;
  if (*end == ':') {
    multiprocessors = std::strtol(end + 1, &end, 10);
    if (multiprocessors < 1 || multiprocessors > 10000) fail("");
  }
  if (*end != '\0') fail("");
  const Gpu* found = nullptr;
  for (const Gpu& gpu : kGpus)
    if (gpu.capability <= capability) found = &gpu;
  if (!found) fail("; the kernels need compute capability 7.5");
  Gpu gpu = *found;
  gpu.capability = int32_t(capability);
  if (multiprocessors) gpu.multiprocessors = int32_t(multiprocessors);
  return gpu;
}

Access dense_access(const Problem& p) {
  const int64_t length = p.layout == Layout::kPlanes ? p.pixels : p.channels;
  return {length * size_of(p.dtype) % 16 == 0, true, false};
}

Plan make_plan(const Problem& problem, Pass pass, const Access& access, const Gpu& gpu,
               const Wish* wish) {
  const Planner planner{problem, pass, access, gpu};
  return planner.complete(wish ? planner.wished(*wish) : planner.best());
}

SharedLayout shared_layout(const Problem& p, Pass pass, const Tiling& t) {
  const int64_t size = size_of(p.dtype), accumulator = accumulator_size(p.dtype), V = 16 / size;
  const bool planes = p.layout == Layout::kPlanes, backward = pass == Pass::kBackward;
  const int64_t held = planes ? t.share : int64_t(t.share) * t.held;
  const int64_t in_share = std::min<int64_t>(t.held, t.share / std::max<int64_t>(1, p.pixels) + 2);
  const int64_t scratch =
      planes ? in_share * std::max(1, t.lanes / 32) : std::max<int64_t>(t.threads * V, t.held);
  SharedLayout s{};
  int64_t at = 0;
  const auto place = [&](int32_t* where, int64_t bytes) {
    *where = int32_t(at);
    at = std::min<int64_t>(round_up(at + bytes, 16), std::numeric_limits<int32_t>::max());
  };
  place(&s.barrier, 8);
  place(&s.flag, 4);
  place(&s.sums, t.held * accumulator);
  place(&s.padded, (t.tile + 2 * int64_t(t.pad)) * accumulator);
  place(&s.gate, t.tile * accumulator);
  place(&s.shift, backward ? t.tile * accumulator : 0);
  place(&s.scratch, scratch * accumulator);
  place(&s.held, (held + V) * size);  // V: it may begin within a line
  place(&s.staged, t.stage_x ? (held + V) * size : 0);
  s.end = int32_t(at);
  return s;
}

WorkspaceLayout workspace_layout(const Problem& p, Pass pass, const Plan& plan) {
  const Tiling& t = plan.tiling;
  const int64_t accumulator = accumulator_size(p.dtype);
  const bool two_passes = plan.strategy == 'C', backward = pass == Pass::kBackward;
  const int64_t per_channel = p.samples * p.channels * accumulator;
  WorkspaceLayout w{};
  const auto place = [&](int64_t* where, int64_t bytes) {
    *where = w.end;
    w.end += round_up(bytes, 16);
  };
  const int64_t groups = p.samples * t.tiles * t.group;
  place(&w.sums, two_passes                        ? t.parts * per_channel
                 : t.exchange == Exchange::kGlobal ? groups * t.held * accumulator
                                                   : 0);
  place(&w.dz, backward && (two_passes || p.taps_per_channel) ? per_channel : 0);
  place(&w.shift, backward && two_passes ? per_channel : 0);
  place(&w.dweight,
        backward && !p.taps_per_channel ? p.kernel_size * p.samples * t.tiles * accumulator : 0);
  place(&w.mean, !backward && two_passes ? per_channel : 0);
  place(&w.gate, !backward && two_passes ? per_channel : 0);
  return w;
}

}  // namespace eca
