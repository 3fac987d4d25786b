#include "plan.h"

#include <algorithm>
#include <cmath>
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
// largest cluster} of the usual card. From the CUDA programming guide, "Compute capabilities", and
// the architecture white papers of T4, A100, RTX 3080 Ti, RTX 4090, H200, B200, RTX 5090.
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

// A cost is a time, in bytes of DRAM traffic that would take as long. Only the ratios between plans
// count. The constants are assumptions, to be replaced where a measurement says otherwise.
constexpr double kL2Speed = 2.5;            // of L2, relative to DRAM
constexpr double kOneMultiprocessor = 1.6;  // bandwidth of one alone, relative to its fair share
constexpr double kMicrosecond = 32e3;       // bytes of DRAM traffic, for one multiprocessor
constexpr double kLaunch = 2.0;             // microseconds
constexpr double kClusterBarriers = 0.7;
constexpr double kGlobalBarriers = 3.0;

// R, F and P: the cost of an empty slot of a thread, as a share of a full one, and the bytes that a
// multiprocessor must have under way for full speed.
constexpr double kIdle = 0.3, kInFlight = 64 << 10;
constexpr double kColumnIdle = 0.8, kColumnInFlight = 96 << 10;  // P
// The speed of halos, which neighbours read too, relative to DRAM: R has instructions to spare, the
// others have not, and P reads in short pieces.
constexpr double kRowHaloSpeed = 5, kRunHaloSpeed = 2.5, kColumnHaloSpeed = 1.5;
constexpr double kLastWave = 0.5;
constexpr double kAlone = 0.95;  // the speed of a block that is alone on its multiprocessor
// The speed of S relative to a copy, which moves two thirds as much; backward three quarters.
constexpr double kStreamForwardSpeed = 0.74, kStreamBackwardSpeed = 0.66;
// K and S: microseconds from the last sum of a sample until its blocks go on, and what each channel
// adds to that. Each wave of blocks of K pays it, S pays it once.
constexpr double kGatesOfSample = 4.0, kGatesOfChannel = 1.0 / 128;

// Bytes of a multiprocessor's memory that K leaves to the L1 cache, which fills the registers.
constexpr int64_t kLeftToL1 = 32 << 10;

constexpr int64_t kStreams = 8;  // on which groups may wait at the same time

constexpr int64_t kMostParts = 512;  // that a warp adds up for each channel

// The share of the time in which loads and stores overlap, by blocks on a multiprocessor: one block
// first only loads, then only stores.
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
  const int64_t sector = 32 / size;  // elements in the least that DRAM and L2 move
  const bool planes = p.layout == Layout::kPlanes;
  const bool backward = pass == Pass::kBackward;
  // Taps further out than the number of channels reach none.
  const int64_t pad = std::min(p.kernel_size / 2, p.channels);
  const int64_t map_bytes = p.samples * p.channels * p.pixels * size;

  // Parts that are added up where there is one set of taps.
  int64_t dweight_parts(const Plan& plan) const {
    if (!backward || p.taps_per_channel) return 0;
    const char s = plan.strategy;
    const bool all = s == 'C' || s == 'K' || s == 'S';
    return p.samples * (all ? ceil_div(p.channels, kDweightTile) : plan.tiling.tiles);
  }

  // The bytes of the numbers per channel: mean and gate, taps, dweight, and what it is made from.
  int64_t small_bytes(const Plan& plan) const {
    const int64_t per_channel = p.samples * p.channels * accumulator;
    const int64_t taps = (p.taps_per_channel ? p.channels : 1) * p.kernel_size *
                         (p.taps_dtype == p.dtype ? size : 4);
    if (!backward) return 2 * per_channel + taps;
    const int64_t dz = plan.strategy == 'C' || p.taps_per_channel ? 2 * per_channel : 0;
    return 2 * per_channel + 2 * taps + dz + 2 * dweight_parts(plan) * p.kernel_size * accumulator;
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

  // A, B and D with these sizes; false where the kernels cannot run with them.
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
    // Each plane gets an equal share of the threads: enough to ask for a run of 128 bytes, but no
    // more than it has vectors.
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
    plan->launches = backward ? 2 : 1;
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

  // The largest tile, of tiles of even size, with `occupancy` blocks on a multiprocessor.
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

  // ---- R, F, P, K and S ----

  // What holds for all of them.
  bool registers_fit() const {
    // Taps further out than all channels would need a place of their own.
    return p.pixels > 0 && p.dtype != Dtype::kFloat64 && p.kernel_size / 2 <= p.channels &&
           p.kernel_size <= 255 && p.channels < kMostElements && p.pixels < kMostElements;
  }

  // The tile where `held` channels have room: all channels, or fewer and a halo on either side.
  bool tile_in_registers(char strategy, int64_t held, int64_t unit, int64_t halo, int64_t most_tile,
                         Plan* plan) const {
    Tiling& t = plan->tiling;
    const bool whole = held >= p.channels && (most_tile == 0 || most_tile >= p.channels);
    if (!whole && access.in_place) return false;
    int64_t most = whole ? p.channels : std::min(p.channels, (held - 2 * halo) / unit * unit);
    if (!whole && most_tile) most = std::min(most, most_tile / unit * unit);
    if (most < 1) return false;
    t.tiles = ceil_div(p.channels, most);
    const int64_t even = whole ? most : round_up(ceil_div(p.channels, t.tiles), unit);
    t.exchange = Exchange::kNone;
    t.group = 1;
    t.vectors = true;
    t.tile = int32_t(even);
    t.halo = int32_t(whole ? 0 : halo);
    t.held = t.tile + 2 * t.halo;
    t.pad = int32_t(pad);
    t.chunk = p.samples;
    t.parts = 1;
    t.by_tiles = divisor_of(t.tiles);
    t.by_pixels = divisor_of(p.pixels);
    t.factor = 1 / float(p.pixels);
    plan->strategy = strategy;
    plan->blocks = p.samples * t.tiles;
    plan->launches = backward ? 2 : 1;
    plan->shared_bytes = register_layout(p, pass, strategy, t).end;
    return plan->blocks <= kMostBlocks &&
           plan->shared_bytes <= std::min<int64_t>(48 << 10, gpu.shared_per_block);
  }

  bool rows(int32_t depth, int32_t threads, int64_t most_tile, Plan* plan) const {
    *plan = {};
    Tiling& t = plan->tiling;
    if (!planes || !access.aligned || threads > row_threads(depth)) return false;
    const int64_t vectors = p.pixels / V;
    t.depth = depth;
    t.threads = threads;
    t.lanes = 8;
    while (t.lanes * int64_t(depth) < vectors && t.lanes < threads) t.lanes *= 2;
    return t.lanes * int64_t(depth) >= vectors &&
           tile_in_registers('R', threads / t.lanes, 1, pad, most_tile, plan);
  }

  bool runs(int32_t depth, int32_t threads, int64_t most_tile, Plan* plan) const {
    *plan = {};
    Tiling& t = plan->tiling;
    if (!planes || !access.dense || !access.samples_aligned || p.pixels < V) return false;
    if (threads != kRunThreads || p.channels * p.pixels > kMostElements) return false;
    int64_t unit = 1;  // planes that together are whole vectors
    while (unit * p.pixels % V != 0) unit *= 2;
    t.depth = depth;
    t.threads = threads;
    const int64_t terms = p.pixels / run_granule(p.pixels, size);
    t.lanes = power_of_two_up_to(std::clamp<int64_t>((terms + 14) / 32, 1, 32));
    t.share = int32_t(ceil_div(terms, t.lanes) | 1);
    const int64_t capacity = int64_t(threads) * depth * V;
    // The first vector may begin before the first held plane.
    const bool all = p.channels * p.pixels <= capacity;
    const int64_t held = all ? p.channels : (capacity - (V - 1)) / p.pixels;
    // Channels that wrap around are not a part of the run.
    return tile_in_registers('F', held, unit, pad, most_tile, plan) &&
           (t.tile == p.channels || !p.circular);
  }

  bool columns(int32_t depth, int32_t threads, int64_t most_tile, Plan* plan) const {
    *plan = {};
    Tiling& t = plan->tiling;
    if (planes || !access.aligned || pad > V) return false;
    // Backward 13 vectors of dy leave too few registers for x.
    if (backward) depth = std::min(depth, 7);
    t.depth = depth;
    t.threads = threads;
    const int64_t rows = ceil_div(p.pixels, depth), columns = threads / rows;
    return columns >= 1 && tile_in_registers('P', columns * V, V, V, most_tile, plan) &&
           threads / (t.held / V) * int64_t(depth) >= p.pixels;
  }

  // What K and S have in common.
  bool all_channels(char strategy, int32_t depth, Plan* plan) const {
    *plan = {};
    Tiling& t = plan->tiling;
    if (planes || !access.aligned || p.channels / V > kColumnThreads) return false;
    t.depth = depth;
    t.threads = kColumnThreads;
    t.exchange = Exchange::kNone;
    t.group = 1;
    t.vectors = true;
    t.tile = t.held = int32_t(p.channels);
    t.factor = 1 / float(p.pixels);
    t.pad = int32_t(pad);
    t.tiles = 1;
    t.chunk = p.samples;
    plan->strategy = strategy;
    plan->launches = backward ? 2 : 1;
    return true;
  }

  // A plan of K with this number of vectors in a thread; 0 takes what fits. `for_l1`: bytes of a
  // multiprocessor's memory that shared memory leaves free.
  bool kept(int64_t vectors, int64_t for_l1, Plan* plan) const {
    const int64_t depth = backward ? kKeptBackwardDepth : kKeptForwardDepth;
    if (!all_channels('K', int32_t(depth), plan)) return false;
    Tiling& t = plan->tiling;
    const int64_t threads = t.threads, blocks = resident_blocks(kept_blocks(backward));
    const int64_t reserved = gpu.capability >= 80 ? 1 << 10 : 0;
    const int64_t room = std::min(gpu.shared_per_block,
                                  (gpu.shared_per_multiprocessor - for_l1) / blocks - reserved) -
                         register_layout(p, pass, 'K', t).end;
    const int64_t most = depth + std::max<int64_t>(0, room / (threads * 16));
    const int64_t in_sample = ceil_div(p.pixels, threads / (p.channels / V));
    const int64_t parts = ceil_div(in_sample, std::min(vectors ? vectors : most, most));
    t.share = int32_t(ceil_div(in_sample, parts));
    t.spare = int32_t(std::max<int64_t>(0, t.share - depth));
    t.parts = int32_t(ceil_div(in_sample, t.share));
    plan->blocks = p.samples * t.parts;
    plan->shared_bytes = register_layout(p, pass, 'K', t).end;
    plan->occupancy = resident(*plan, kColumnThreads, kept_blocks(backward));
    // A sample's blocks wait for each other, and so may those of other streams.
    return t.share <= most && t.parts <= kMostParts && plan->blocks <= kMostBlocks &&
           plan->shared_bytes <= gpu.shared_per_block &&
           kStreams * t.parts <= plan->occupancy * int64_t(gpu.multiprocessors);
  }

  bool stream(Plan* plan) const {
    if (!all_channels('S', backward ? kStreamBackwardDepth : kStreamForwardDepth, plan))
      return false;
    Tiling& t = plan->tiling;
    const int64_t rows = t.threads / (p.channels / V);
    t.parts = int32_t(std::min<int64_t>(ceil_div(p.pixels, rows * t.depth), kMostParts + 1));
    const int64_t sample_bytes = p.channels * p.pixels * size * (backward ? 2 : 1);
    t.chunk = std::clamp<int64_t>(gpu.l2 / (backward ? 4 : 8) / sample_bytes, 1, p.samples);
    plan->blocks = 2 * (ceil_div(p.samples, t.chunk) + 1) * t.chunk * t.parts;
    plan->shared_bytes = register_layout(p, pass, 'S', t).end;
    return t.parts <= kMostParts && plan->blocks <= kMostBlocks &&
           plan->shared_bytes <= std::min<int64_t>(48 << 10, gpu.shared_per_block);
  }

  // As in cuda/device.h.
  int64_t resident_blocks(int64_t blocks) const {
    return gpu.capability >= 100 && blocks > 2 ? blocks - 1 : blocks;
  }

  // Blocks on a multiprocessor, of kernels with these launch bounds.
  int32_t resident(const Plan& plan, int64_t threads, int64_t blocks) const {
    const int64_t reserved = gpu.capability >= 80 ? 1 << 10 : 0;
    if (plan.strategy != 'F') blocks = resident_blocks(blocks);
    const int64_t registers = 65536 / (threads * blocks) / 8 * 8;
    const int64_t own = plan.tiling.threads;
    return int32_t(
        std::min({gpu.shared_per_multiprocessor / (plan.shared_bytes + reserved),
                  gpu.threads_per_multiprocessor / own, 65536 / (own * registers), int64_t(24)}));
  }

  // The slow-down by multiprocessors that are idle in the last wave of blocks, or that have one
  // block less than others where all have room at once.
  double idle_at_the_end(const Plan& plan) const {
    const double SMs = gpu.multiprocessors, blocks = double(plan.blocks);
    double rounds = blocks / (SMs * double(std::max(1, plan.occupancy)));
    if (rounds <= 1) rounds = blocks / SMs;
    return rounds > 1 ? 1 + kLastWave * (std::ceil(rounds) / rounds - 1) : 1;
  }

  // Of K and S, with the sums of the parts.
  void count_bytes_of_sample(Plan* plan) const {
    const int64_t maps = backward ? 2 : 1;
    const int64_t parts = 2 * p.samples * plan->tiling.parts * p.channels * accumulator;
    const int64_t shift = backward ? 2 * p.samples * p.channels * accumulator : 0;
    const int64_t small = small_bytes(*plan) + parts + shift;
    plan->dram_bytes = (maps + 1) * map_bytes + small;
    plan->l2_bytes = (maps + (plan->strategy == 'S' ? 2 : 1)) * map_bytes + small;
  }

  double cost_of_stream(Plan* plan) const {
    plan->occupancy = resident(*plan, kColumnThreads, stream_blocks(backward));
    count_bytes_of_sample(plan);
    const double idle =
        std::max(1.0, gpu.multiprocessors / kOneMultiprocessor / (double(plan->blocks) / 2));
    return double(plan->dram_bytes) / (backward ? kStreamBackwardSpeed : kStreamForwardSpeed) *
               idle +
           gates_of_sample();
  }

  // The wait for a sample's gates, in bytes as all costs.
  double gates_of_sample() const {
    return (kGatesOfSample + kGatesOfChannel * double(p.channels)) * kMicrosecond *
           gpu.multiprocessors;
  }

  double cost_of_kept(Plan* plan) const {
    count_bytes_of_sample(plan);
    const double SMs = gpu.multiprocessors;
    const double waves = double(plan->blocks) / (SMs * double(std::max(1, plan->occupancy)));
    const double last_wave = idle_at_the_end(*plan);
    const double block_bytes = double(plan->dram_bytes) / double(plan->blocks);
    const double busiest = double(ceil_div(plan->blocks, gpu.multiprocessors)) * block_bytes * SMs /
                           kOneMultiprocessor;
    return std::max(double(plan->dram_bytes) * last_wave, busiest) +
           std::ceil(waves) * gates_of_sample();
  }

  double cost_in_registers(Plan* plan) const {
    const Tiling& t = plan->tiling;
    const int64_t maps = backward ? 2 : 1;
    const int64_t blocks = plan->strategy == 'R'   ? row_blocks(t.depth)
                           : plan->strategy == 'F' ? run_blocks(t.depth)
                                                   : column_blocks(t.depth);
    const int64_t most = plan->strategy == 'R'   ? row_threads(t.depth)
                         : plan->strategy == 'F' ? kRunThreads
                                                 : kColumnThreads;
    plan->occupancy = resident(*plan, most, blocks);
    const int64_t held_bytes = p.samples * held_in_sample(t) * p.pixels * size * maps;
    plan->dram_bytes = (maps + 1) * map_bytes + small_bytes(*plan);
    plan->l2_bytes = held_bytes + map_bytes + small_bytes(*plan);
    const double SMs = gpu.multiprocessors;
    const double slots = double(plan->blocks) * t.threads * t.depth * 16;
    const double idle = 1 - double(held_bytes) / (slots * double(maps));
    const double in_flight = double(plan->occupancy) * t.threads * t.depth * 16;
    double halo_bytes = double(held_bytes - maps * map_bytes);
    // P's halo is half a sector on either side, of which whole ones move.
    if (plan->strategy == 'P') halo_bytes *= 2;
    const double last_wave = idle_at_the_end(*plan);
    const double halo_speed = plan->strategy == 'R'   ? kRowHaloSpeed
                              : plan->strategy == 'F' ? kRunHaloSpeed
                                                      : kColumnHaloSpeed;
    const bool columns = plan->strategy == 'P';
    const double wanted = columns ? kColumnInFlight : kInFlight;
    double speed = std::min(1.0, 0.6 + 0.4 * in_flight / wanted);
    if (plan->occupancy == 1) speed *= kAlone;
    const double streaming = (double(plan->dram_bytes) + halo_bytes / halo_speed) *
                             (1 + (columns ? kColumnIdle : kIdle) * idle) * last_wave / speed;
    const double busiest = double(ceil_div(plan->blocks, gpu.multiprocessors)) *
                           double(held_bytes + map_bytes) / double(plan->blocks) * SMs /
                           kOneMultiprocessor;
    return std::max(streaming, busiest);
  }

  bool in_registers(Plan* best) const {
    if (!registers_fit()) return false;
    double lowest = std::numeric_limits<double>::infinity();
    Plan plan{};
    const auto better = [&](double cost) {
      if (plan.occupancy > 0 && cost < lowest) lowest = cost, *best = plan;
    };
    const auto consider = [&](bool possible) {
      if (possible) better(cost_in_registers(&plan));
    };
    if (stream(&plan)) better(cost_of_stream(&plan));
    // Fewer vectors of a thread give more blocks.
    for (int64_t vectors : {0, 25, 20, 16, 12, 8, 4, 2})
      if (kept(vectors, kLeftToL1, &plan)) better(cost_of_kept(&plan));
    for (int32_t threads : {128, 256, 512}) {
      for (int32_t depth : kRowDepths) consider(rows(depth, threads, 0, &plan));
      if (threads > kColumnThreads) continue;
      for (int32_t depth : kRunDepths) {
        // A deep tile summed element by element is two planes for each thread. Backward, where
        // fewer blocks have room, that took 58 us instead of 50 (TUNING.md).
        if (backward && depth > 4 && size == 2 && run_granule(p.pixels, size) == 1) continue;
        consider(runs(depth, threads, 0, &plan));
      }
      for (int32_t depth : kColumnDepths) consider(columns(depth, threads, 0, &plan));
      // Narrower columns give more blocks.
      for (int64_t channels = V; channels < p.channels; channels *= 2)
        for (int32_t depth : kColumnDepths) consider(columns(depth, threads, channels, &plan));
    }
    return lowest < std::numeric_limits<double>::infinity();
  }

  double two_passes(Plan* plan) const {
    *plan = {};
    Tiling& t = plan->tiling;
    const int64_t maps = backward ? 2 : 1;
    const int64_t sample_bytes = std::max<int64_t>(1, p.channels * p.pixels * size);
    t.vectors = access.aligned;
    t.threads = kMostThreads;
    t.group = 1;
    t.tile = int32_t(std::min<int64_t>(p.channels, 256));  // only for small_bytes()
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
    plan->launches = 3 * ceil_div(p.samples, t.chunk) + (!backward            ? 0
                                                         : p.taps_per_channel ? 1
                                                                              : 2);
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

  Plan make(const Forced& forced) const {
    Plan plan{};
    const char s = forced.strategy;
    if (s == 'C') {
      two_passes(&plan);
      return plan;
    }
    if (s == 'A') {
      if (!can_hold() || !tile(forced.tile, forced.group, forced.threads, &plan) ||
          plan.shared_bytes > gpu.shared_per_block)
        throw std::invalid_argument("the kernels cannot run with a tile of " +
                                    std::to_string(forced.tile) + " channels and groups of " +
                                    std::to_string(forced.group) + " blocks");
      cost_on_chip(&plan);
      return plan;
    }
    const int32_t n = forced.threads, depth = forced.depth;
    const auto known = [&](const auto& depths) {
      return std::find(std::begin(depths), std::end(depths), depth) != std::end(depths);
    };
    const bool fits =
        registers_fit() && n <= (s == 'R' ? 512 : kColumnThreads) && n >= 32 && (n & (n - 1)) == 0;
    if (fits && s == 'S' && stream(&plan)) {
      cost_of_stream(&plan);
      return plan;
    }
    if (fits && s == 'K' && kept(depth, 0, &plan)) {
      cost_of_kept(&plan);
      return plan;
    }
    const bool can =
        fits && ((s == 'R' && known(kRowDepths) && rows(depth, n, forced.tile, &plan)) ||
                 (s == 'F' && known(kRunDepths) && runs(depth, n, forced.tile, &plan)) ||
                 (s == 'P' && known(kColumnDepths) && columns(depth, n, forced.tile, &plan)));
    if (!can)
      throw std::invalid_argument("the kernels cannot run " + std::string(strategy_name(s)) +
                                  " with a depth of " + std::to_string(depth) + " and " +
                                  std::to_string(n) + " threads");
    cost_in_registers(&plan);
    return plan;
  }

  Plan best() const {
    Plan plan{}, two{};
    if (in_registers(&plan)) return plan;
    const double two_cost = two_passes(&two);
    if (!on_chip(&plan) || two_cost < best_cost) return two;
    return plan;
  }

  Plan complete(Plan plan) const {
    const Tiling& t = plan.tiling;
    const bool global = t.exchange == Exchange::kGlobal;
    plan.dweight_parts = dweight_parts(plan);
    if (global) plan.counters = 1 + p.samples * t.tiles;
    else if (plan.strategy == 'K' || plan.strategy == 'S') plan.counters = 2 * p.samples;
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

Divisor divisor_of(int64_t divisor) {
  int32_t shift = 31;
  while (int64_t(1) << (shift - 31) < divisor) ++shift;
  return {uint32_t(((uint64_t(1) << shift) + uint64_t(divisor) - 1) / uint64_t(divisor)), shift};
}

Access dense_access(const Problem& p) {
  const int64_t length = p.layout == Layout::kPlanes ? p.pixels : p.channels;
  const bool samples = p.channels * p.pixels * size_of(p.dtype) % 16 == 0;
  return {length * size_of(p.dtype) % 16 == 0, true, samples, false};
}

const char* strategy_name(char letter) {
  for (const Strategy& s : kStrategies)
    if (s.letter == letter) return s.name;
  return "none";
}

char strategy_by_name(const std::string& name) {
  std::string known;
  for (const Strategy& s : kStrategies) {
    if (name == s.name) return s.letter;
    known += (known.empty() ? "" : ", ") + std::string(s.name);
  }
  throw std::invalid_argument("expected a strategy as one of " + known + ", got " + name);
}

Plan make_plan(const Problem& problem, Pass pass, const Access& access, const Gpu& gpu,
               const Forced* forced) {
  const Planner planner{problem, pass, access, gpu};
  return planner.complete(forced ? planner.make(*forced) : planner.best());
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

SharedLayout register_layout(const Problem& p, Pass pass, char strategy, const Tiling& t) {
  const int64_t accumulator = accumulator_size(p.dtype), V = 16 / size_of(p.dtype);
  SharedLayout s{};
  int64_t at = 0;
  const auto place = [&](int32_t* where, int64_t numbers) {
    *where = int32_t(at);
    at = std::min<int64_t>(round_up(at + numbers * accumulator, 16),
                           std::numeric_limits<int32_t>::max());
  };
  const int64_t rows =
      strategy == 'R' || strategy == 'F' ? 0 : t.threads / std::max<int64_t>(1, t.held / V);
  const int64_t reached = t.held + (t.halo ? 0 : 2 * int64_t(t.pad));
  place(&s.padded, reached);
  place(&s.means, pass == Pass::kBackward ? reached : 0);
  place(&s.taps, p.taps_per_channel ? 0 : p.kernel_size);
  // A gate beyond the last, for the last vector of a run.
  place(&s.gate, strategy == 'R' ? 0 : t.held + 1);
  place(&s.shift, strategy == 'R' ? 0 : t.tile + 1);
  place(&s.flag, 1);
  place(&s.scratch, strategy == 'R' ? t.threads / 32
                    : strategy == 'F'
                        ? V / run_granule(p.pixels, size_of(p.dtype)) * int64_t(t.depth) * t.threads
                        : rows * t.held);
  place(&s.held, ceil_div(int64_t(t.spare) * t.threads * 16, accumulator));
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
  const bool streamed = plan.strategy == 'K' || plan.strategy == 'S';
  place(&w.sums, two_passes || streamed            ? t.parts * per_channel
                 : t.exchange == Exchange::kGlobal ? groups * t.held * accumulator
                                                   : 0);
  place(&w.dz, backward && (two_passes || p.taps_per_channel) ? per_channel : 0);
  place(&w.shift, backward && (two_passes || streamed) ? per_channel : 0);
  place(&w.dweight, p.kernel_size * plan.dweight_parts * accumulator);
  place(&w.mean, !backward && (two_passes || streamed) ? per_channel : 0);
  place(&w.gate, !backward && (two_passes || streamed) ? per_channel : 0);
  return w;
}

}  // namespace eca
