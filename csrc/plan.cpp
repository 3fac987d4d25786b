#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>
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

// {capability, multiprocessors, shared memory of a block, and of a multiprocessor, L2, threads} of
// the usual card. From the CUDA programming guide, "Compute capabilities", and
// the architecture white papers of T4, A100, RTX 3080 Ti, RTX 4090, H200, B200, RTX 5090.
constexpr Gpu kGpus[] = {
    {75, 40, 64 << 10, 64 << 10, 4 << 20, 1024},
    {80, 108, 163 << 10, 164 << 10, 40 << 20, 2048},
    {86, 80, 99 << 10, 100 << 10, 6 << 20, 1536},
    {89, 128, 99 << 10, 100 << 10, 72 << 20, 1536},
    {90, 132, 227 << 10, 228 << 10, 50 << 20, 2048},
    {100, 148, 227 << 10, 228 << 10, 126 << 20, 2048},
    {120, 170, 99 << 10, 100 << 10, 96 << 20, 1536},
};

// ---- costs ----

// A cost is a time, in bytes of DRAM traffic that would take as long. Only the ratios between plans
// count. Each constant was fitted to measured times on an H200 where TUNING.md has them, and is
// assumed otherwise.
constexpr double kOneMultiprocessor = 1.6;  // bandwidth of one alone, relative to its fair share
constexpr double kMicrosecond = 32e3;       // bytes of DRAM traffic, for one multiprocessor
constexpr double kLaunch = 2.0;             // microseconds
constexpr double kLastWave = 0.5;
constexpr double kAlone = 0.95;  // the speed of a block that is alone on its multiprocessor
// The speed of S, and of C without its launches, relative to a copy, which moves two thirds as
// much; backward three quarters.
constexpr double kStreamForwardSpeed = 0.74, kStreamBackwardSpeed = 0.66, kTwoPassSpeed = 0.47;
constexpr double kStreamInFlight = 48 << 10;  // S: bytes, as of R, F and P below
// K and S: microseconds from the last sum of a sample until its blocks go on, and what each channel
// adds to that. Each wave of blocks of K pays it, S pays it once.
constexpr double kGatesOfSample = 2.5, kGatesOfChannel = 1.0 / 128;

// R, F and P: how many threads and blocks the kernel is compiled for, and what its time depends on.
struct InRegisters {
  int64_t threads, blocks;  // of a block at most; on a multiprocessor at least
  double idle;              // the cost of an empty slot of a thread, as a share of a full one
  double in_flight;         // bytes that a multiprocessor must have under way for full speed
  double halo_speed;        // of halos, which neighbours read too, relative to DRAM
};

// R has instructions to spare for its halo, F has not, and P reads it in short pieces.
InRegisters in_registers(char strategy, int32_t depth) {
  switch (strategy) {
    case 'R': return {row_threads(depth), row_blocks(depth), 0.3, 64 << 10, 5};
    case 'F': return {kRunThreads, run_blocks(depth), 0.3, 64 << 10, 2.5};
    default: return {kColumnThreads, column_blocks(depth), 0.8, 96 << 10, 1.5};
  }
}

// Instructions of warps: each warp's own, those for each vector that its threads hold, and those of
// a block for each channel that it holds.
struct Count {
  double warp, vector, channel;
};

// Least squares through the counts of 500 plans, made as in tests/gpu_host/test_instructions.py;
// half of them are within 4 %, and all within 23 %. S: of a block that sums and one that rescales.
constexpr struct {
  char strategy;
  int32_t size;  // of an element, in bytes
  int32_t kind;  // F: granule; S: 0 for pixels, 1 for parts of planes, 2 for runs
  Count forward, backward;
} kCounts[] = {
    {'R', 4, 0, {211, 18, 17}, {330, 21, 16}},    {'R', 2, 0, {90, 50, 36}, {217, 62, 39}},
    {'F', 4, 1, {214, 31, 4.3}, {326, 35, 9.7}},  {'F', 2, 1, {183, 17, 16}, {284, 21, 24}},
    {'F', 2, 4, {177, 47, 11}, {272, 61, 17}},    {'P', 4, 0, {208, 27, 3.5}, {333, 27, 7.8}},
    {'P', 2, 0, {212, 53, 3.8}, {257, 77, 7.5}},  {'K', 4, 0, {520, 31, 1.2}, {178, 58, 0.9}},
    {'K', 2, 0, {1030, 51, 0.6}, {359, 84, 0.6}}, {'S', 4, 0, {715, 6, 0.9}, {677, 2, 0.9}},
    {'S', 2, 0, {809, 28, 0.8}, {790, 28, 0.8}},  {'S', 4, 1, {713, 0, 0}, {563, 0, 0}},
    {'S', 2, 1, {835, 23, 0}, {686, 24, 0}},      {'S', 4, 2, {670, 0, 0}, {800, 0, 0}},
    {'S', 2, 2, {767, 0, 7.1}, {919, 0, 10.3}},
};
// What the tail of a block adds for each element of a vector: assumed.
constexpr double kTailInstructions = 8;
// Warp instructions of one multiprocessor in a microsecond: of its 4 at 1.98 GHz, as on an H200,
// code that waits for memory as ours does issues six tenths.
constexpr double kIssued = 4 * 1980 * 0.6;

// Bytes of a multiprocessor's memory that K leaves to the L1 cache, which fills the registers.
constexpr int64_t kLeftToL1 = 32 << 10;

constexpr int64_t kStreams = 8;  // on which blocks of K may wait at the same time

constexpr int64_t kMostParts = 512;  // that a warp adds up for each channel

// K and S: numbers that a part leaves for the last block of its sample. A tail's gradients have two
// sums of each channel.
int64_t sums_of_part(int64_t channels, Pass pass) {
  return sums_of_channels(int32_t(channels)) * (pass == Pass::kTailBackward ? 2 : 1);
}

// ---- plans ----

struct Candidate {
  Plan plan;
  double cost;
};

struct Planner {
  const Problem& problem;
  const Pass pass;
  const Access& access;
  const Gpu& gpu;
  const int64_t size = size_of(problem.dtype), accumulator = accumulator_size(problem.dtype);
  const int64_t V = 16 / size;  // elements in a vector
  const bool planes = problem.layout == Layout::kPlanes;
  const bool backward = is_backward(pass), tail = is_tail(pass);
  // Taps further out than the number of channels reach none.
  const int64_t pad = std::min(problem.kernel_size / 2, problem.channels);
  const int64_t map_bytes = problem.samples * problem.channels * problem.pixels * size;
  const int64_t maps = backward ? 2 : 1;  // that are read
  // Of the tail's identity, or its gradient, and of the mask: one bit of each element.
  const int64_t more_bytes = tail ? map_bytes + map_bytes / size / 8 : 0;
  const double multiprocessors = gpu.multiprocessors;
  // Of each block's shared memory, by the driver.
  const int64_t reserved = gpu.capability >= 80 ? 1 << 10 : 0;

  // Parts that are added up where there is one set of taps.
  int64_t dweight_parts(const Plan& plan) const {
    if (!backward || problem.taps_per_channel) return 0;
    const char s = plan.strategy;
    const bool all = s == 'C' || s == 'K' || s == 'S';
    return problem.samples * (all ? ceil_div(problem.channels, kDweightTile) : plan.tiling.tiles);
  }

  // The bytes of the numbers per channel: mean and gate, taps, dweight, and what it is made from.
  int64_t small_bytes(const Plan& plan) const {
    const int64_t per_channel = problem.samples * problem.channels * accumulator;
    const int64_t taps = (problem.taps_per_channel ? problem.channels : 1) * problem.kernel_size *
                         (problem.taps_dtype == problem.dtype ? size : 4);
    // A tail's scales, and six numbers of each channel.
    const int64_t of_tail = tail ? (problem.samples + 6 * problem.channels) * accumulator : 0;
    if (!backward) return 2 * per_channel + taps + of_tail;
    const int64_t dz = plan.strategy == 'C' || problem.taps_per_channel ? 2 * per_channel : 0;
    return 2 * per_channel + 2 * taps + dz + (tail ? of_tail + 5 * per_channel : 0) +
           2 * dweight_parts(plan) * problem.kernel_size * accumulator;
  }

  // Channels held by all tiles of a sample, their halos included.
  int64_t held_in_sample(const Tiling& tiling) const {
    if (problem.circular) return problem.channels + tiling.tiles * 2 * tiling.halo;
    int64_t held = 0;
    for (int64_t begin = 0; begin < problem.channels; begin += tiling.tile)
      held += std::min(problem.channels, begin + tiling.tile + tiling.halo) -
              std::max<int64_t>(0, begin - tiling.halo);
    return held;
  }

  // ---- R, F, P, K and S ----

  // What holds for all of them.
  bool registers_fit() const {
    // Taps further out than all channels would need a place of their own.
    return problem.pixels > 0 && problem.dtype != Dtype::kFloat64 &&
           problem.kernel_size / 2 <= problem.channels && problem.kernel_size <= 255 &&
           problem.channels < kMostElements && problem.pixels < kMostElements;
  }

  // As in cuda/device.h.
  int64_t resident_blocks(int64_t blocks) const {
    return gpu.capability >= 100 && blocks > 2 ? blocks - 1 : blocks;
  }

  // Blocks on a multiprocessor, of a kernel that is compiled for so many threads and blocks.
  int32_t occupancy(const Plan& plan, int64_t threads, int64_t blocks) const {
    const int64_t registers = 65536 / (threads * blocks) / 8 * 8, own = plan.tiling.threads;
    return int32_t(std::min(
        {gpu.shared_per_multiprocessor / std::max<int64_t>(1, plan.shared_bytes + reserved),
         gpu.threads_per_multiprocessor / own, 65536 / (own * registers), int64_t(24)}));
  }

  // No more shared memory than a block has without asking for it.
  bool shares_little(const Plan& plan) const {
    return plan.shared_bytes <= std::min<int64_t>(48 << 10, gpu.shared_per_block);
  }

  // The slow-down by multiprocessors that are idle in the last wave of blocks, or that have one
  // block less than others where all have room at once.
  double idle_at_the_end(const Plan& plan) const {
    double rounds = double(plan.blocks) / (multiprocessors * plan.occupancy);
    if (rounds <= 1) rounds = double(plan.blocks) / multiprocessors;
    return rounds > 1 ? 1 + kLastWave * (std::ceil(rounds) / rounds - 1) : 1;
  }

  // C is counted as S, which is assumed, and so is what a tail adds for each element.
  int64_t instructions(const Plan& plan) const {
    const Tiling& tiling = plan.tiling;
    const char strategy = plan.strategy == 'C' ? 'S' : plan.strategy;
    const int32_t kind = strategy == 'F'   ? run_granule(problem.pixels, int32_t(size))
                         : strategy == 'S' ? (tiling.lanes ? 2 : int32_t(planes))
                                           : 0;
    const auto* const counts = std::find_if(std::begin(kCounts), std::end(kCounts), [&](auto& c) {
      return c.strategy == strategy && c.size == std::min<int64_t>(size, 4) && c.kind == kind;
    });
    const Count& count = backward ? counts->backward : counts->forward;
    const double more = tail ? kTailInstructions * double(V) : 0;
    if (plan.strategy == 'C')
      return int64_t(double(map_bytes) / 512 *
                     (count.warp / stream_pixel_depth(false) + count.vector + more));
    double blocks = double(plan.blocks), vectors = tiling.depth;  // of a thread
    if (strategy == 'K') vectors = tiling.share;
    double held = tiling.held;
    if (strategy == 'S') {
      blocks = double(problem.samples * tiling.parts *
                      (kind == 2   ? tiling.tiles
                       : kind == 1 ? problem.channels
                                   : 1));
      if (kind == 1) vectors = double(tiling.share) / tiling.threads;
      if (kind == 2) held = tiling.tile;
    }
    return int64_t(blocks *
                   (tiling.threads / 32.0 * (count.warp + (count.vector + more) * vectors) +
                    count.channel * held));
  }

  // The larger of a plan's time by its bytes and by its instructions.
  double slower(Plan* plan, double by_bytes) const {
    plan->instructions = instructions(*plan);
    return std::max(by_bytes, double(plan->instructions) / kIssued * kMicrosecond);
  }

  // The time of the multiprocessor that has most blocks, alone with its part of `bytes`.
  double busiest(const Plan& plan, double bytes) const {
    return double(ceil_div(plan.blocks, gpu.multiprocessors)) * bytes / double(plan.blocks) *
           multiprocessors / kOneMultiprocessor;
  }

  double stream_speed() const { return backward ? kStreamBackwardSpeed : kStreamForwardSpeed; }

  double microseconds(double time) const { return time * kMicrosecond * multiprocessors; }

  double gates_of_channels() const {
    return microseconds(kGatesOfChannel * double(problem.channels));
  }
  double gates_of_sample() const { return microseconds(kGatesOfSample) + gates_of_channels(); }

  // ---- R, F and P ----

  // The tile where `held` channels have room: all channels, or fewer and a halo on either side.
  std::optional<Candidate> tiled(char strategy, Tiling tiling, int64_t held, int64_t unit,
                                 int64_t halo, int64_t most_tile) const {
    const bool whole =
        held >= problem.channels && (most_tile == 0 || most_tile >= problem.channels);
    if (!whole && halo && access.in_place) return {};
    int64_t most =
        whole ? problem.channels : std::min(problem.channels, (held - 2 * halo) / unit * unit);
    if (!whole && most_tile) most = std::min(most, most_tile / unit * unit);
    if (most < 1) return {};
    tiling.tiles = ceil_div(problem.channels, most);
    const int64_t even = whole ? most : round_up(ceil_div(problem.channels, tiling.tiles), unit);
    tiling.vectors = true;
    tiling.tile = int32_t(even);
    tiling.halo = int32_t(whole ? 0 : halo);
    tiling.held = tiling.tile + 2 * tiling.halo;
    tiling.pad = int32_t(pad);
    tiling.chunk = problem.samples;
    tiling.parts = 1;
    tiling.by_blocks = divisor_of(tiling.tiles);
    if (!planes) tiling.by_columns = divisor_of(tiling.held / V);
    tiling.by_pixels = divisor_of(problem.pixels);
    tiling.factor = 1 / float(problem.pixels);
    Plan plan{strategy, tiling};
    plan.blocks = problem.samples * tiling.tiles;
    plan.launches = backward ? 2 : 1;
    plan.shared_bytes = shared_layout(problem, pass, strategy, tiling).end;
    if (plan.blocks > kMostBlocks || !shares_little(plan)) return {};
    return costed(plan);
  }

  std::optional<Candidate> costed(Plan plan) const {
    const Tiling& tiling = plan.tiling;
    const InRegisters how = in_registers(plan.strategy, tiling.depth);
    plan.occupancy = occupancy(plan, how.threads,
                               plan.strategy == 'F' ? how.blocks : resident_blocks(how.blocks));
    if (plan.occupancy < 1) return {};
    const int64_t held_bytes =
        problem.samples * held_in_sample(tiling) * problem.pixels * size * maps;
    plan.dram_bytes = (maps + 1) * map_bytes + more_bytes + small_bytes(plan);
    plan.l2_bytes = held_bytes + map_bytes + more_bytes + small_bytes(plan);
    const double slots = double(plan.blocks) * tiling.threads * tiling.depth * 16;
    const double idle = 1 - double(held_bytes) / (slots * double(maps));
    // P's halo is half a sector on either side, of which whole ones move.
    const double halo_bytes =
        double(held_bytes - maps * map_bytes) * (plan.strategy == 'P' ? 2 : 1);
    const double in_flight = double(plan.occupancy) * tiling.threads * tiling.depth * 16;
    double speed = std::min(1.0, 0.6 + 0.4 * in_flight / how.in_flight);
    if (plan.occupancy == 1) speed *= kAlone;
    const double streaming = (double(plan.dram_bytes) + halo_bytes / how.halo_speed) *
                             (1 + how.idle * idle) * idle_at_the_end(plan) / speed;
    const double by_bytes =
        std::max(streaming, busiest(plan, double(held_bytes + map_bytes + more_bytes)));
    const double cost = slower(&plan, by_bytes);
    return Candidate{plan, cost};
  }

  std::optional<Candidate> rows(int32_t depth, int32_t threads, int64_t most_tile) const {
    if (!planes || !access.aligned() || threads > row_threads(depth)) return {};
    const int64_t vectors = problem.pixels / V;
    Tiling tiling{};
    tiling.depth = depth;
    tiling.threads = threads;
    tiling.lanes = 8;
    while (tiling.lanes * int64_t(depth) < vectors && tiling.lanes < threads) tiling.lanes *= 2;
    if (tiling.lanes * int64_t(depth) < vectors) return {};
    return tiled('R', tiling, threads / tiling.lanes, 1, pad, most_tile);
  }

  std::optional<Candidate> runs(int32_t depth, int32_t threads, int64_t most_tile) const {
    const auto found = runs_with(pad, depth, threads, most_tile);
    if (!found || !access.sources_aligned || !access.samples_aligned) return {};
    // Others would overwrite the halo, and channels that wrap around are not a part of the run.
    const bool whole = found->plan.tiling.tile == problem.channels;
    return whole || (!access.in_place && !problem.circular) ? found : std::nullopt;
  }

  std::optional<Candidate> runs_with(int64_t halo, int32_t depth, int32_t threads,
                                     int64_t most_tile) const {
    if (!planes || !access.dense || problem.pixels < V) return {};
    if (threads != kRunThreads || problem.channels * problem.pixels > kMostElements) return {};
    int64_t unit = 1;  // planes that together are whole vectors
    while (unit * problem.pixels % V != 0) unit *= 2;
    const int64_t terms = problem.pixels / run_granule(problem.pixels, int32_t(size));
    Tiling tiling{};
    tiling.depth = depth;
    tiling.threads = threads;
    tiling.lanes = power_of_two_up_to(std::clamp<int64_t>((terms + 14) / 32, 1, 32));
    tiling.share = int32_t(ceil_div(terms, tiling.lanes) | 1);
    const int64_t capacity = int64_t(threads) * depth * V;
    // The first vector may begin before the first held plane.
    const bool all = problem.channels * problem.pixels <= capacity;
    const int64_t held = all ? problem.channels : (capacity - (V - 1)) / problem.pixels;
    return tiled('F', tiling, held, unit, halo, most_tile);
  }

  std::optional<Candidate> columns(int32_t depth, int32_t threads, int64_t most_tile) const {
    if (planes || !access.aligned() || pad > V) return {};
    // Backward 13 vectors of dy leave too few registers for x, and so do those of x for a tail.
    if (backward || tail) depth = std::min(depth, 7);
    const int64_t rows = ceil_div(problem.pixels, depth), columns = threads / rows;
    if (columns < 1) return {};
    Tiling tiling{};
    tiling.depth = depth;
    tiling.threads = threads;
    const auto found = tiled('P', tiling, columns * V, V, V, most_tile);
    if (found && threads / (found->plan.tiling.held / V) * int64_t(depth) < problem.pixels)
      return {};
    return found;
  }

  // ---- K and S ----

  // What they have in common: the last block of a sample makes the gates of all its channels.
  std::optional<Plan> all_channels(char strategy, int32_t depth) const {
    if (!access.aligned() || (!planes && problem.channels / V > kColumnThreads)) return {};
    Plan plan{strategy, {}};
    Tiling& tiling = plan.tiling;
    tiling.vectors = true;
    tiling.tile = tiling.held = int32_t(problem.channels);
    tiling.pad = int32_t(pad);
    tiling.depth = depth;
    tiling.tiles = 1;
    tiling.factor = 1 / float(problem.pixels);
    tiling.chunk = problem.samples;
    tiling.threads = kColumnThreads;
    if (!planes) tiling.by_columns = divisor_of(tiling.held / V);
    plan.launches = backward ? 2 : 1;
    return plan;
  }

  // With the sums of the parts.
  void count_bytes_of_sample(Plan* plan) const {
    const int64_t parts = 2 * problem.samples * plan->tiling.parts *
                          sums_of_part(problem.channels, pass) * accumulator;
    // Written and read; of a tail's, the gradients of means, small_bytes() counts the first.
    const int64_t moves = backward ? (tail ? 1 : 2) : 0;
    const int64_t shift = moves * problem.samples * problem.channels * accumulator;
    const int64_t small = small_bytes(*plan) + parts + shift + more_bytes;
    plan->dram_bytes = (maps + 1) * map_bytes + small;
    plan->l2_bytes = (maps + (plan->strategy == 'S' ? 2 : 1)) * map_bytes + small;
  }

  // K with this number of vectors in a thread; 0 takes what fits. `for_l1`: bytes of a
  // multiprocessor's memory that shared memory leaves free.
  std::optional<Candidate> kept(int64_t vectors, int64_t for_l1) const {
    const int64_t depth = kept_depth(backward, tail);
    if (planes) return {};
    std::optional<Plan> plan = all_channels('K', int32_t(depth));
    if (!plan) return {};
    Tiling& tiling = plan->tiling;
    const int64_t threads = tiling.threads, blocks = resident_blocks(kept_blocks(backward, tail));
    const int64_t room = std::min(gpu.shared_per_block,
                                  (gpu.shared_per_multiprocessor - for_l1) / blocks - reserved) -
                         shared_layout(problem, pass, 'K', tiling).end;
    const int64_t most = depth + std::max<int64_t>(0, room / (threads * 16));
    const int64_t in_sample = ceil_div(problem.pixels, threads / (problem.channels / V));
    const int64_t parts = ceil_div(in_sample, std::min(vectors ? vectors : most, most));
    tiling.share = int32_t(ceil_div(in_sample, parts));
    tiling.spare = int32_t(std::max<int64_t>(0, tiling.share - depth));
    tiling.parts = int32_t(ceil_div(in_sample, tiling.share));
    plan->blocks = problem.samples * tiling.parts;
    plan->shared_bytes = shared_layout(problem, pass, 'K', tiling).end;
    plan->occupancy = occupancy(*plan, kColumnThreads, blocks);
    // A sample's blocks wait for each other, and so may those of other streams.
    if (tiling.share > most || tiling.parts > kMostParts || plan->blocks > kMostBlocks ||
        plan->shared_bytes > gpu.shared_per_block ||
        kStreams * tiling.parts > plan->occupancy * int64_t(gpu.multiprocessors))
      return {};
    count_bytes_of_sample(&*plan);
    const double bytes = double(plan->dram_bytes);
    const double waves = double(plan->blocks) / (multiprocessors * plan->occupancy);
    const double cost =
        slower(&*plan, std::max(bytes * idle_at_the_end(*plan), busiest(*plan, bytes)));
    return Candidate{*plan, cost + std::ceil(waves) * gates_of_sample()};
  }

  // S with so many blocks in a sample, each for a part of it, and so many for which the kernel is
  // compiled. `bytes`: that a block has under way.
  std::optional<Candidate> streamed(Plan plan, int64_t sample_blocks, int64_t compiled_for,
                                    int64_t bytes) const {
    Tiling& tiling = plan.tiling;
    tiling.chunk = std::clamp<int64_t>(gpu.l2 / 4 / (problem.channels * problem.pixels * size), 1,
                                       problem.samples);
    plan.blocks = 2 * (ceil_div(problem.samples, tiling.chunk) + 1) * tiling.chunk * sample_blocks;
    plan.shared_bytes = shared_layout(problem, pass, 'S', tiling).end;
    plan.occupancy = occupancy(plan, tiling.threads, compiled_for);
    if (tiling.parts > kMostParts || plan.blocks > kMostBlocks || plan.occupancy < 1 ||
        !shares_little(plan))
      return {};
    tiling.by_blocks = divisor_of(sample_blocks);
    tiling.by_step = divisor_of(2 * tiling.chunk * sample_blocks);
    tiling.by_parts = divisor_of(tiling.parts);
    count_bytes_of_sample(&plan);
    const double idle =
        std::max(1.0, multiprocessors / kOneMultiprocessor / (double(plan.blocks) / 2));
    const double under_way = double(plan.occupancy) * double(bytes);
    const double speed = stream_speed() * std::min(1.0, under_way / kStreamInFlight);
    const double cost = slower(&plan, double(plan.dram_bytes) / speed * idle);
    return Candidate{plan, cost + gates_of_sample()};
  }

  std::optional<Candidate> stream_pixels() const {
    const int32_t depth = stream_pixel_depth(backward);
    const int64_t blocks = resident_blocks(stream_blocks(backward)), held = int64_t(depth) * 16;
    std::optional<Plan> plan = all_channels('S', depth);
    if (planes || !plan) return {};
    Tiling& tiling = plan->tiling;
    const int64_t rows = tiling.threads / (problem.channels / V);
    tiling.parts =
        int32_t(std::min<int64_t>(ceil_div(problem.pixels, rows * depth), kMostParts + 1));
    return streamed(*plan, tiling.parts, blocks, tiling.threads * held);
  }

  std::optional<Candidate> stream_parts_of_planes() const {
    const int32_t depth = stream_plane_depth(backward);
    std::optional<Plan> plan = all_channels('S', depth);
    if (!planes || !plan) return {};
    Tiling& tiling = plan->tiling;
    const int64_t vectors = problem.pixels / V,
                  parts = ceil_div(vectors, int64_t(tiling.threads) * depth);
    tiling.parts = int32_t(std::min<int64_t>(parts, kMostParts + 1));
    tiling.share = int32_t(ceil_div(vectors, tiling.parts));
    return streamed(*plan, problem.channels * tiling.parts,
                    resident_blocks(stream_blocks(backward)), int64_t(tiling.share) * 16);
  }

  std::optional<Candidate> stream_runs() const {
    // The tile of F where it needs no halo.
    const auto tile = runs_with(0, kStreamRunDepth, kRunThreads, 0);
    if (!tile) return {};
    Plan plan = tile->plan;
    Tiling& tiling = plan.tiling;
    plan.strategy = 'S';
    tiling.vectors = access.samples_aligned;
    tiling.held = int32_t(problem.channels);
    return streamed(plan, tiling.tiles, run_blocks(tiling.depth),
                    int64_t(tiling.tile) * problem.pixels * size);
  }

  // The best way to split what a sample has.
  std::optional<Candidate> stream() const {
    std::optional<Candidate> found;
    for (const auto& way : {stream_pixels(), stream_parts_of_planes(), stream_runs()})
      if (way && (!found || way->cost < found->cost)) found = way;
    return found;
  }

  // ---- C ----

  Candidate two_passes() const {
    Plan plan{'C', {}};
    Tiling& tiling = plan.tiling;
    const int64_t sample_bytes = std::max<int64_t>(1, problem.channels * problem.pixels * size);
    tiling.vectors = access.aligned();
    tiling.width = access.width;
    tiling.threads = kPassThreads;
    tiling.tile = int32_t(problem.channels);
    tiling.tiles = 1;
    tiling.chunk = std::clamp<int64_t>(gpu.l2 / 2 / (sample_bytes * maps), 1, problem.samples);
    const int64_t in_sample = planes ? problem.channels : 1;  // rows of blocks or warps
    tiling.chunk = std::min(tiling.chunk, std::max<int64_t>(1, kMostBlocks / 64 / in_sample));
    // Two waves of blocks, and no third: it would be one with few of them.
    const int64_t wanted = gpu.multiprocessors * 2 * kPassBlocks * (planes ? kPassThreads / 32 : 1);
    const int64_t smallest = planes ? 4 << 10 : 16 << 10;  // bytes of a part
    const int64_t most = std::min<int64_t>(kMostParts, 1 + sample_bytes / in_sample / smallest);
    tiling.parts = int32_t(std::clamp<int64_t>(wanted / (tiling.chunk * in_sample), 1, most));
    tiling.parts =
        int32_t(std::max<int64_t>(tiling.parts, ceil_div(problem.pixels, kMostElements)));
    const int64_t rows = tiling.chunk * in_sample * tiling.parts;
    plan.blocks = planes ? ceil_div(rows, tiling.threads / 32) : rows;
    plan.launches = 3 * ceil_div(problem.samples, tiling.chunk) + (!backward                  ? 0
                                                                   : problem.taps_per_channel ? 1
                                                                                              : 2);
    plan.shared_bytes = planes ? 0 : tiling.threads * V * accumulator;
    plan.occupancy = occupancy(plan, kPassThreads, kPassBlocks);
    const bool reused = tiling.chunk * sample_bytes * maps <= gpu.l2 / 2;
    plan.l2_bytes = (maps + 2) * map_bytes + more_bytes + small_bytes(plan);
    // The passes of a tail are over all samples.
    const int64_t moved = tail ? 2 * maps + 1 : maps + (reused ? 1 : 2);
    plan.dram_bytes = moved * map_bytes + more_bytes + small_bytes(plan);
    const double idle = std::max(1.0, multiprocessors / kOneMultiprocessor / double(plan.blocks));
    const double cost = slower(&plan, double(plan.dram_bytes) / kTwoPassSpeed * idle);
    return {plan, cost + gates_of_channels()};
  }

  // ---- choices ----

  std::optional<Candidate> forced(const Forced& f) const {
    if (f.strategy == 'C') return two_passes();
    const auto known = [&](const auto& depths) {
      return std::find(std::begin(depths), std::end(depths), f.depth) != std::end(depths);
    };
    const int32_t most = f.strategy == 'R' ? 512 : kColumnThreads;
    if (!registers_fit() || f.depth < 0 || f.threads < 32 || f.threads > most ||
        (f.threads & (f.threads - 1)) != 0 || (tail && (f.strategy == 'S' || !tail_fits())))
      return {};
    switch (f.strategy) {
      case 'S': return stream();
      case 'K': return kept(f.depth, 0);
      case 'R': return known(kRowDepths) ? rows(f.depth, f.threads, f.tile) : std::nullopt;
      case 'F': return known(kRunDepths) ? runs(f.depth, f.threads, f.tile) : std::nullopt;
      case 'P': return known(kColumnDepths) ? columns(f.depth, f.threads, f.tile) : std::nullopt;
      default: return {};
    }
  }

  // Where a vector has four channels of a pixel, two threads would write a byte of the mask. Backward
  // the means for the taps of each channel are not there, only their distances. There a tail has its
  // passes.
  bool tail_fits() const { return backward ? !problem.taps_per_channel : planes || size == 2; }

  Candidate best() const {
    Candidate best = two_passes();
    const auto consider = [&](const std::optional<Candidate>& c) {
      const auto time = [&](const Candidate& of) {
        return of.cost + microseconds(kLaunch * double(of.plan.launches));
      };
      if (c && time(*c) < time(best)) best = *c;
    };
    if (!registers_fit() || (tail && !tail_fits())) return best;
    if (!tail) consider(stream());
    // Fewer vectors of a thread give more blocks.
    for (int64_t vectors : {0, 25, 20, 16, 12, 8, 4, 2}) consider(kept(vectors, kLeftToL1));
    for (int32_t threads : {128, 256, 512}) {
      for (int32_t depth : kRowDepths) consider(rows(depth, threads, 0));
      if (threads > kColumnThreads) continue;
      for (int32_t depth : kRunDepths) {
        // A deep tile summed element by element is two planes for each thread. Backward, where
        // fewer blocks have room, that took 58 us instead of 50 (TUNING.md).
        if (backward && depth > 4 && size == 2 && run_granule(problem.pixels, int32_t(size)) == 1)
          continue;
        consider(runs(depth, threads, 0));
      }
      // Narrower columns give more blocks.
      for (int64_t channels = 0; channels < problem.channels;
           channels = channels ? 2 * channels : V)
        for (int32_t depth : kColumnDepths) consider(columns(depth, threads, channels));
    }
    return best;
  }

  Plan complete(Plan plan) const {
    plan.dweight_parts = dweight_parts(plan);
    if (plan.strategy == 'K' || plan.strategy == 'S') plan.counters = 2 * problem.samples;
    plan.map_bytes = (maps + 1) * map_bytes + more_bytes;
    plan.workspace = workspace_layout(problem, pass, plan).end;
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

Access dense_access(const Problem& problem) {
  const int64_t length = problem.layout == Layout::kPlanes ? problem.pixels : problem.channels;
  const bool samples = problem.channels * problem.pixels * size_of(problem.dtype) % 16 == 0;
  return {access_width(length * size_of(problem.dtype)), true, samples, samples, false};
}

Access access_of(const Problem& p, const Map& map) {
  const int64_t size = size_of(p.dtype), rows = p.layout == Layout::kPlanes ? p.channels : p.pixels,
                length = p.layout == Layout::kPlanes ? p.pixels : p.channels;
  const int64_t row_stride = rows <= 1 ? 0 : map.row_stride,
                sample_stride = p.samples <= 1 ? 0 : map.sample_stride;
  // Divides the map's address and each of the numbers of elements that | joins.
  const auto width = [&](int64_t elements) {
    return access_width(int64_t(reinterpret_cast<uintptr_t>(map.data)) | elements * size);
  };
  const bool samples_aligned = width(rows * length | sample_stride) == 16;
  return {width(length | row_stride | sample_stride), rows <= 1 || map.row_stride == length,
          samples_aligned, samples_aligned, false};
}

Access both(const Access& source, const Access& result) {
  return {std::min(source.width, result.width), source.dense && result.dense,
          result.samples_aligned, source.samples_aligned && source.sources_aligned,
          source.in_place || result.in_place};
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
  if (!forced) return planner.complete(planner.best().plan);
  const std::optional<Candidate> found = planner.forced(*forced);
  if (!found)
    throw std::invalid_argument(
        "the kernels cannot run " + std::string(strategy_name(forced->strategy)) +
        " with a tile of " + std::to_string(forced->tile) + ", a depth of " +
        std::to_string(forced->depth) + " and " + std::to_string(forced->threads) + " threads");
  return planner.complete(found->plan);
}

SharedLayout shared_layout(const Problem& problem, Pass pass, char strategy, const Tiling& tiling) {
  const int64_t accumulator = accumulator_size(problem.dtype), V = 16 / size_of(problem.dtype);
  SharedLayout shared{};
  int64_t at = 0;
  const auto place = [&](int32_t* where, int64_t numbers) {
    *where = int32_t(at);
    at = std::min<int64_t>(round_up(at + numbers * accumulator, 16),
                           std::numeric_limits<int32_t>::max());
  };
  const bool planes = problem.layout == Layout::kPlanes;
  const int64_t rows = planes ? 0 : tiling.threads / std::max<int64_t>(1, tiling.held / V);
  const int64_t reached = tiling.held + (tiling.halo ? 0 : 2 * int64_t(tiling.pad));
  place(&shared.padded, reached);
  place(&shared.means, is_backward(pass) ? reached : 0);
  place(&shared.taps, problem.taps_per_channel ? 0 : problem.kernel_size);
  // A gate beyond the last, for the last vector of a run.
  place(&shared.gate, strategy == 'R' ? 0 : tiling.held + 1);
  place(&shared.shift, strategy == 'R' ? 0 : tiling.tile + 1);
  place(&shared.flag, 1);
  place(&shared.scratch, strategy == 'R'   ? tiling.threads / 32
                         : strategy == 'F' ? 0
                         : planes          ? scratch_of_planes(tiling)
                                           : rows * tiling.held);
  const bool runs = strategy == 'F' || (strategy == 'S' && tiling.lanes);
  const int64_t terms = runs ? V / run_granule(problem.pixels, size_of(problem.dtype)) *
                                   int64_t(tiling.depth) * tiling.threads
                             : 0;
  if (strategy == 'S') at = std::max(at, terms * accumulator);  // all else comes after their use
  else place(&shared.terms, terms);
  place(&shared.held, ceil_div(int64_t(tiling.spare) * tiling.threads * 16, accumulator));
  place(&shared.tail, pass == Pass::kTailForward && !planes
                          ? ceil_div(tiling.tile, 8) * int64_t(kTailColumnTerms)
                      : pass != Pass::kTailBackward ? 0
                      : !planes                     ? tiling.tile
                      : strategy == 'F'             ? tiling.held + 2
                                                    : 0);
  shared.end = int32_t(at);
  return shared;
}

WorkspaceLayout workspace_layout(const Problem& problem, Pass pass, const Plan& plan) {
  const Tiling& tiling = plan.tiling;
  const int64_t accumulator = accumulator_size(problem.dtype);
  const bool two_passes = plan.strategy == 'C', backward = is_backward(pass);
  const int64_t per_channel = problem.samples * problem.channels * accumulator;
  WorkspaceLayout w{};
  const auto place = [&](int64_t* where, int64_t bytes) {
    *where = w.end;
    w.end += round_up(bytes, 16);
  };
  const bool streamed = plan.strategy == 'K' || plan.strategy == 'S';
  place(&w.sums, two_passes ? tiling.parts * per_channel
                 : streamed ? problem.samples * tiling.parts *
                                  sums_of_part(problem.channels, pass) * accumulator
                            : 0);
  place(&w.dz, backward && (two_passes || problem.taps_per_channel) ? per_channel : 0);
  place(&w.shift, backward && !is_tail(pass) && (two_passes || streamed) ? per_channel : 0);
  place(&w.dweight, problem.kernel_size * plan.dweight_parts * accumulator);
  place(&w.mean, !backward && (two_passes || streamed) ? per_channel : 0);
  place(&w.gate, !backward && (two_passes || streamed) ? per_channel : 0);
  return w;
}

}  // namespace eca
