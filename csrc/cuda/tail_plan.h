// The sizes of the kernels of a residual block's tail, and of attention after an activation, which
// are the same kernels. Pure C++. They are those that were fastest for tails on an H200 (TUNING.md);
// nothing is searched.
#pragma once

#include "../plan.h"

namespace eca::cuda {

constexpr int kTailThreads = 256;

// Vectors of V elements that a thread of tail_flat asks for, of each map, before it uses the first.
template <int V>
constexpr int kTailAtOnce = V == 1 ? 4 : 2;

// Vectors whose bits of the mask there is room for. A byte has bits of the vectors that a block has
// at a time and of those before. With room for more, threads that are ahead overwrite nothing that
// others still read.
template <int kAtOnce>
constexpr int kMaskRing = 4 * kTailThreads * kAtOnce;

constexpr int kTailSumColumns = 32;  // vectors of a pixel that a block of sum_tail_columns takes

// ---- what kernels get ----

// Of all maps of a call.
struct TailShape {
  bool planes;
  int channels;
  int rows_of_sample, length;  // channels and pixels, or pixels and channels
  int row_bytes;               // of the mask
};

// How passes that write take maps apart. Numbers are of elements but for `octets`.
struct TailGrid {
  TailShape shape;
  int all_rows;
  // Tiles of tail_flat: so many octets, where rows are multiples of eight; else `rows` rows, or, if
  // parts > 1, a part of one. Tiles of tail_columns: some rows of a sample, in a part of its columns.
  int64_t octets;  // of a tile, 0 for rows
  int rows, parts, part;
  int tiles;                     // of a sample
  Divisor by_length, by_sample;  // length, rows_of_sample
  Divisor by_octets;             // of a row
};

// How sums take maps apart: parts of planes, or of a sample's pixels.
struct TailSumGrid {
  TailShape shape;
  int pixels;
  int64_t all_planes;  // samples * channels
  int parts, part;     // `part` pixels each, the last one fewer
  int groups;          // of columns
};

// sum_tail_small, too.
struct TailSmallGrid {
  int planes;              // of a block
  int lanes;               // of a team, a power of two
  int dy, identity, mask;  // where these begin in shared memory, in bytes; x begins at 0
};

// ---- plans ----

enum class TailWay { kRows, kColumns, kSmall };

struct TailPlan {
  TailWay way;
  bool vectors;  // of 16 bytes; else single elements
  TailGrid grid;
  int64_t blocks;
};

struct TailSumPlan {
  TailWay way;
  bool vectors;
  TailSumGrid grid;
  TailSmallGrid small;
  int64_t blocks, shared_bytes;
  int64_t workspace;  // bytes
};

// Throws std::runtime_error where a number is more than the kernels can count.
TailPlan plan_of(const eca::Tail& t, const Gpu& gpu);
TailPlan plan_of(const TailGradients& t, const Gpu& gpu);
TailSumPlan plan_of(const Moments& t, const Gpu& gpu);
TailSumPlan plan_of(const TailSums& t, const Gpu& gpu);
TailSumPlan plan_of(const ActivatedSums& t, const Gpu& gpu);
TailPlan plan_of(const Gated& t, const Gpu& gpu);
TailPlan plan_of(const GatedGradients& t, const Gpu& gpu);

}  // namespace eca::cuda
