// Chooses the kernel and its sizes for a problem and a GPU, and models what it moves. Pure C++, so
// that a plan can be made, printed and tested on any machine.
//
// The strategies, by where a block keeps what it has read between the sums and the rescaling.
// In registers:
//   R  rows          planes: a team of threads for each plane of a tile and of its halo
//   F  runs          planes: those of a tile as one run, also where they are not 16-byte aligned
//   P  columns       pixels: the columns of a tile's channels and one more on either side
//   K  kept          pixels: a part of a sample, in shared memory too; the blocks add up their sums
// Nothing is kept; the rescaling reads x again, out of the L2 cache:
//   S  stream        blocks that sum and blocks that rescale, in one launch
//   C  two_pass      one pass sums and one rescales, over a few samples at a time. For whatever
//                    the others cannot do, and for float64
#pragma once

#include <cstdint>
#include <string>

#include "eca.h"

namespace eca {

struct Gpu {
  int32_t capability;  // compute capability, 90 for 9.0
  int32_t multiprocessors;
  int64_t shared_per_block;           // bytes, the most that a block can ask for
  int64_t shared_per_multiprocessor;  // bytes
  int64_t l2;                         // bytes
  int32_t threads_per_multiprocessor;
};

// A GPU by compute capability and number of multiprocessors: "sm_90:132", or "sm_90" for the usual
// number. Throws std::invalid_argument.
Gpu gpu_by_name(const std::string& name);

// Strategies R, F and P: vectors of 16 bytes that a thread holds (`depth`), most threads of a
// block, and fewest resident blocks, from which the registers of a thread follow.
constexpr int32_t kRowDepths[] = {7, 13}, kRunDepths[] = {2, 4, 8}, kColumnDepths[] = {4, 7, 13};
constexpr int32_t row_threads(int32_t depth) { return depth > 7 ? 512 : 256; }
constexpr int32_t row_blocks(int32_t depth) { return depth > 7 ? 1 : 3; }
constexpr int32_t kRunThreads = 128;
constexpr int32_t run_blocks(int32_t depth) { return depth > 4 ? 4 : 8; }
// Elements that surely belong to the same plane, where planes are multiples of so many.
inline int32_t run_granule(int64_t pixels, int32_t size) {
  return size == 2 && pixels % 4 == 0 ? 4 : 1;
}
constexpr int32_t kColumnThreads = 256;
constexpr int32_t column_blocks(int32_t depth) { return depth > 7 ? 2 : 3; }

// Strategy K: vectors in registers, as above. More of them are in shared memory.
constexpr int32_t kept_depth(bool backward, bool tail) {
  return backward ? (tail ? 10 : 7) : (tail ? 12 : 20);
}
constexpr int32_t kept_blocks(bool backward, bool tail) { return backward && !tail ? 3 : 2; }

// Strategy S: of pixels, of parts of planes, and of runs.
constexpr int32_t stream_pixel_depth(bool backward) { return backward ? 8 : 12; }
constexpr int32_t stream_plane_depth(bool backward) { return backward ? 8 : 13; }
constexpr int32_t kStreamRunDepth = 8;
constexpr int32_t stream_blocks(bool backward) { return backward ? 2 : 3; }

// Strategy C: threads of a block, and blocks that a multiprocessor holds.
constexpr int32_t kPassThreads = 256, kPassBlocks = 4;

// Threads of a block of the kernels that make dweight.
constexpr int32_t kDweightThreads = 1024, kOwnDweightThreads = 256;
constexpr int32_t kDweightTile = 64;  // C, K and S: channels of a part of dweight

// Divides by multiplying, in an eighth of the instructions of a division: the quotient of n is
// (n * multiplier) >> shift, for any n below 2^31. (Granlund and Montgomery, "Division by invariant
// integers using multiplication", 1994.)
struct Divisor {
  uint32_t multiplier;
  int32_t shift;
};

// 1 <= divisor < 2^31.
Divisor divisor_of(int64_t divisor);

// What the kernels need to know of a plan. "Held" is what a block has on chip: its tile and a halo.
struct Tiling {
  bool vectors;   // all accesses move 16 bytes: for who reads the plan
  int32_t width;  // C of pixels: bytes that one access moves
  int32_t tile;   // channels that a block stores; S of parts of planes: all
  int32_t halo;   // channels held on either side of them, 0 where a tile is all channels
  int32_t held;   // tile + 2 * halo
  int32_t pad;    // channels on either side whose sums the gates need
  int32_t share;  // F and S of runs: terms of a plane that a thread adds up; K: vectors that a
                  // thread holds; S of parts of planes: vectors of a part
  int32_t lanes;  // R, F and S of runs: threads that sum one plane, a power of two
  int32_t depth;  // vectors in a thread's registers; 0 for C
  int32_t spare;  // K: vectors of a thread in shared memory
  int64_t tiles;  // in a sample
  // By the blocks of a sample (not of K, nor those of S that rescale) and of a step of S, by the
  // vectors of `held`, by the pixels of a plane (F and S of runs), and by the parts of one (S)
  Divisor by_blocks, by_step, by_columns, by_pixels, by_parts;
  float factor;  // of a sum in a mean, 1 / pixels; not for C

  // Strategies C, K and S
  int64_t chunk;  // samples in one pair of passes (C), or that are summed before others (S)
  int32_t parts;  // of a plane, or of the pixels of a sample, summed by different blocks

  int32_t threads;  // in a block
};

struct Plan {
  char strategy;  // of kStrategies
  Tiling tiling;
  int64_t blocks = 0;  // of one launch
  int64_t launches = 0;
  int64_t shared_bytes = 0;   // of a block
  int32_t occupancy = 0;      // blocks on a multiprocessor
  int64_t counters = 0;       // words through which blocks meet; zero before and after a launch
  int64_t workspace = 0;      // bytes
  int64_t dweight_parts = 0;  // that are added up where there is one set of taps, backward
  // Modelled:
  int64_t map_bytes = 0;     // of the feature maps alone, each read or written once
  int64_t dram_bytes = 0;    // read and written, each byte of a launch once
  int64_t l2_bytes = 0;      // asked for, halos and second passes included
  int64_t instructions = 0;  // of warps, in the kernels that read and write the maps
};

// What the addresses of a call's maps allow.
struct Access {
  // Every row of every map begins and ends at a multiple of so many bytes: a power of two, at most
  // 16.
  int32_t width;
  bool dense;            // the rows of a sample follow one another without a gap, in every map
  bool samples_aligned;  // every sample of the result begins and ends at a multiple of 16 bytes
  bool sources_aligned;  // and so does every sample of what is read
  bool in_place;         // the result is written over what is read

  bool aligned() const { return width == 16; }
};

// The largest power of two that divides a number of bytes, at most 16.
inline int32_t access_width(int64_t bytes) { return int32_t((bytes | 16) & -(bytes | 16)); }

// The access of contiguous memory, of a map, and of a source and a result.
Access dense_access(const Problem& problem);
Access access_of(const Problem& problem, const Map& map);
Access both(const Access& source, const Access& result);

// Of ECA, and of a residual block's tail with ECA's gate (BlockTail of eca.h). A tail also reads the
// identity and writes a mask; backward it reads that and writes the identity's gradient. It has R, F,
// P and K. C stands for the passes of cuda/tail_plan.h.
enum class Pass { kForward, kBackward, kTailForward, kTailBackward };

constexpr bool is_backward(Pass pass) {
  return pass == Pass::kBackward || pass == Pass::kTailBackward;
}
constexpr bool is_tail(Pass pass) { return pass >= Pass::kTailForward; }

// The strategies, by the names that users see.
struct Strategy {
  char letter;
  const char* name;
};

constexpr Strategy kStrategies[] = {{'R', "rows"}, {'F', "runs"},   {'P', "columns"},
                                    {'K', "kept"}, {'S', "stream"}, {'C', "two_pass"}};

const char* strategy_name(char letter);
// Throws std::invalid_argument for another name.
char strategy_by_name(const std::string& name);

// A plan to make instead of the planner's choice, for tests and for tuning.
struct Forced {
  char strategy = 'C';
  int32_t tile = 0;  // R, F and P: channels; 0 is as many as fit
  int32_t threads = 256;
  int32_t depth = 0;  // vectors of a thread: in registers; with K in all, and 0 is as many as fit
};

// Throws std::invalid_argument where the kernels cannot run the forced plan.
Plan make_plan(const Problem& problem, Pass pass, const Access& access, const Gpu& gpu,
               const Forced* forced = nullptr);

// Byte offsets in a block's shared memory, which the kernels and the planner have in common.
struct SharedLayout {
  int32_t flag, padded, means, taps, gate, shift, scratch, terms, held, tail, end;
};

// Numbers from one column of a tail's terms to the next: five for each of eight channels.
constexpr int32_t kTailColumnTerms = 44;

// Of all strategies but C.
SharedLayout shared_layout(const Problem& problem, Pass pass, char strategy, const Tiling& tiling);

// K and S: numbers from one row of sums to the next, which begin at multiples of 16 bytes.
constexpr int32_t sums_of_channels(int32_t channels) { return (channels + 3) & ~3; }

// S, planes: numbers that the last block of a sample adds up at a time.
constexpr int64_t scratch_of_planes(const Tiling& tiling) {
  const int64_t channels = sums_of_channels(tiling.held), at_once = 4 * int64_t(tiling.threads);
  return channels > at_once ? channels : at_once;
}

// Byte offsets in a call's workspace.
struct WorkspaceLayout {
  int64_t sums, dz, shift, dweight, mean, gate, end;
};

WorkspaceLayout workspace_layout(const Problem& problem, Pass pass, const Plan& plan);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int32_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Bytes of a sum, a mean or a gate.
inline int32_t accumulator_size(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

}  // namespace eca
