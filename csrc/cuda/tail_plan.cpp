#include "tail_plan.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace eca::cuda {
namespace {

constexpr int64_t kTile = 16 << 10;          // bytes of x that a block writes
constexpr int64_t kSmallTile = 12 << 10;     // bytes of x that a block sums in shared memory
constexpr int64_t kSmallPlane = 1 << 10;     // bytes; larger ones have a warp each
constexpr int64_t kMostSmall = 20 << 10;     // bytes of planes that only together are whole vectors
constexpr int64_t kPartOfPlane = 1 << 14;    // elements that a warp sums
constexpr int64_t kFewestInPlane = 1 << 10;  // however small the batch
constexpr int64_t kPartOfPixels = 256 << 10;  // bytes that a block of sum_tail_columns reads of x
constexpr int64_t kFewestPixels = 32;         // of a part, however small the batch

// The maps of a call, and whether vectors of them can be read.
class Maps {
 public:
  Maps(const Problem& p, std::initializer_list<Map> maps)
      : planes(p.layout == Layout::kPlanes), rows(planes ? p.channels : p.pixels),
        length(planes ? p.pixels : p.channels), all_rows(p.samples * rows), size(size_of(p.dtype)),
        V(16 / size), whole(p.dtype != Dtype::kFloat64), dense(true), bases(true) {
    // 64-bit numbers are for checking gradients: single ones are enough.
    for (const Map& map : maps) {
      if (!map.data) continue;
      const int64_t row = rows > 1 ? map.row_stride : length,
                    sample = p.samples > 1 ? map.sample_stride : rows * length;
      bases = bases && reinterpret_cast<uintptr_t>(map.data) % 16 == 0;
      whole = whole && row % V == 0 && sample % V == 0;
      dense = dense && row == length && sample == rows * length;
    }
    whole = whole && bases && length % V == 0;
    count(all_rows, "rows");
    count(p.samples * p.channels, "planes");
    count(length, "elements of a row");
    count(all_rows * ((length + 7) / 8), "bytes of the mask");
  }

  TailShape shape(const Problem& p) const {
    return {planes, int(p.channels), int(rows), int(length), int(mask_row_bytes(p))};
  }

  // Rows that together are whole vectors, where they are not one by one; 0 if they cannot be used.
  int64_t together(const Problem& p) const {
    const int64_t all = all_rows * length;
    if (!planes || p.dtype == Dtype::kFloat64 || !dense || !bases || all % V != 0) return 0;
    return V / std::gcd(length, int64_t(V));
  }

  bool planes;
  int64_t rows, length, all_rows;  // `rows` of a sample
  int64_t size, V;                 // bytes of an element, elements of a vector
  bool whole;                      // rows are whole vectors, in all maps
  bool dense, bases;               // without gaps; beginning with a whole vector

 private:
  static void count(int64_t number, const char* of) {
    if (number > std::numeric_limits<int32_t>::max())
      throw std::runtime_error("eca_fused: expected fewer than 2^31 " + std::string(of) + ", got " +
                               std::to_string(number) + "; use a smaller batch");
  }
};

bool in_lines(std::initializer_list<const void*> coefficients) {
  return std::all_of(coefficients.begin(), coefficients.end(),
                     [](const void* of) { return reinterpret_cast<uintptr_t>(of) % 16 == 0; });
}

TailPlan plan_of(const Problem& p, const Maps& maps, bool coefficients_in_lines) {
  const int64_t V = maps.V, tile = kTile / maps.size, L = maps.length;
  TailPlan plan{TailWay::kRows, false, {}, 0};
  TailGrid& grid = plan.grid;
  grid.shape = maps.shape(p);
  grid.all_rows = int(maps.all_rows);
  grid.parts = 1;
  grid.by_length = divisor_of(L);
  grid.by_sample = divisor_of(maps.rows);
  grid.by_octets = divisor_of(std::max(L / 8, int64_t(1)));
  if (!maps.planes && maps.whole && coefficients_in_lines) {
    plan.way = TailWay::kColumns;
    plan.vectors = true;
    grid.part = int(std::min(L, kTailThreads * V));
    grid.parts = int(ceil_div(L, grid.part));
    // Four vectors of each thread are a tile.
    grid.rows = int(4 * (kTailThreads * V / grid.part));
    grid.tiles = int(ceil_div(maps.rows, grid.rows));
    plan.blocks = p.samples * grid.tiles * grid.parts;
    return plan;
  }
  const int64_t together = maps.together(p);
  // A vector has elements of two planes at most, and there are enough blocks for all processors.
  const bool broken = together > 0 && L >= V && together * L <= 4 * tile;
  plan.vectors = maps.planes && (maps.whole || broken);
  if (L % 8 == 0) {
    grid.octets = tile / 8;
    plan.blocks = ceil_div(maps.all_rows * (L / 8), grid.octets);
    return plan;
  }
  const int64_t least = plan.vectors ? std::max(together, int64_t(1)) : 1;
  grid.rows = int(std::max(tile / L / least, int64_t(1)) * least);
  if (least == 1 && L > tile) {
    grid.part = int(ceil_div(ceil_div(L, ceil_div(L, tile)), 8) * 8);
    grid.parts = int(ceil_div(L, grid.part));
    grid.rows = 1;
  }
  plan.blocks = ceil_div(maps.all_rows, grid.rows) * grid.parts;
  return plan;
}

// `read` maps, `kinds` of sums.
TailSumPlan plan_of(const Problem& p, const Maps& maps, bool coefficients_in_lines, int read,
                    bool masked, int kinds, const Gpu& gpu) {
  const int64_t S = p.pixels, all = p.samples * p.channels, plane_bytes = S * maps.size;
  TailSumPlan plan{};
  TailSumGrid& grid = plan.grid;
  grid.shape = maps.shape(p);
  grid.pixels = int(S);
  grid.all_planes = all;
  grid.parts = 1;
  grid.part = int(S);
  const int64_t together = maps.together(p);
  const bool broken = maps.planes && !maps.whole && together * plane_bytes <= kMostSmall;
  if (together && (broken || plane_bytes < kSmallPlane)) {
    plan.way = TailWay::kSmall;
    TailSmallGrid& small = plan.small;
    small.planes = int(std::max(kSmallTile / plane_bytes / together, int64_t(1)) * together);
    small.lanes = 32;
    while (small.lanes > 1 && int64_t(small.lanes) * small.planes > kTailThreads) small.lanes /= 2;
    const int64_t map = small.planes * plane_bytes;
    small.dy = int(map);
    small.identity = int(2 * map);
    small.mask = int(read * map);
    plan.shared_bytes = read * map + (masked ? int64_t(small.planes) * grid.shape.row_bytes : 0);
    plan.blocks = ceil_div(all, small.planes);
    return plan;
  }
  plan.vectors = maps.whole && (maps.planes || coefficients_in_lines);
  const auto split = [&](int64_t parts, int64_t unit) {
    grid.part = int(ceil_div(ceil_div(S, parts), unit) * unit);
    grid.parts = int(ceil_div(S, grid.part));
  };
  if (maps.planes) {
    plan.way = TailWay::kRows;
    const int64_t wanted = ceil_div(16 * gpu.multiprocessors, all);
    split(std::max(ceil_div(S, kPartOfPlane), std::min(wanted, ceil_div(S, kFewestInPlane))), 8);
    plan.blocks = ceil_div(all * grid.parts, kTailThreads / 32);
  } else {
    plan.way = TailWay::kColumns;
    const int64_t columns = plan.vectors ? kTailSumColumns * maps.V : kTailSumColumns;
    grid.groups = int(ceil_div(p.channels, columns));
    const int64_t pixels = kPartOfPixels / (std::min(columns, p.channels) * maps.size),
                  wanted = ceil_div(4 * gpu.multiprocessors, p.samples * grid.groups);
    const int64_t most = std::max(S / kFewestPixels, int64_t(1));
    split(std::max(ceil_div(S, pixels), std::min(wanted, most)), 1);
    plan.blocks = p.samples * grid.parts * grid.groups;
    plan.shared_bytes =
        int64_t(kTailThreads) * (plan.vectors ? maps.V : 1) * accumulator_size(p.dtype);
  }
  if (grid.parts > 1) plan.workspace = int64_t(sizeof(double)) * kinds * grid.parts * all;
  return plan;
}

bool in_lines(const TailCoefficients& k) {
  return in_lines({k.p, k.q, k.centre, k.identity_scale, k.identity_centre});
}

bool in_lines(const Activated& of) { return in_lines({of.p, of.q, of.centre}); }

}  // namespace

TailPlan plan_of(const Tail& t, const Gpu&) {
  return plan_of(t.problem, Maps(t.problem, {t.x, t.identity, t.y}), in_lines(t.coefficients));
}

TailPlan plan_of(const TailGradients& t, const Gpu&) {
  const bool lines = in_lines(t.coefficients) &&
                     in_lines({t.p, t.q, t.r, t.identity_p, t.identity_q, t.identity_r});
  return plan_of(t.problem, Maps(t.problem, {t.dy, t.x, t.identity, t.dx, t.d_identity}), lines);
}

TailSumPlan plan_of(const Moments& t, const Gpu& gpu) {
  return plan_of(t.problem, Maps(t.problem, {t.x}), true, 1, false, 2, gpu);
}

TailSumPlan plan_of(const TailSums& t, const Gpu& gpu) {
  const bool reads_identity =
      t.identity.data && (t.identity_sum || t.activation > Activation::kRelu);
  return plan_of(t.problem, Maps(t.problem, {t.dy, t.x, t.identity}), in_lines(t.coefficients),
                 reads_identity ? 3 : 2, t.activation == Activation::kRelu, t.identity_sum ? 3 : 2,
                 gpu);
}

TailSumPlan plan_of(const ActivatedSums& t, const Gpu& gpu) {
  return plan_of(t.of.problem, Maps(t.of.problem, {t.of.x, t.dy}), in_lines(t.of),
                 t.dy.data ? 2 : 1, false, t.for_norm ? 5 : 1, gpu);
}

TailPlan plan_of(const Gated& t, const Gpu&) {
  return plan_of(t.of.problem, Maps(t.of.problem, {t.of.x, t.y}),
                 in_lines(t.of) && in_lines({t.gate}));
}

TailPlan plan_of(const GatedGradients& t, const Gpu&) {
  return plan_of(t.of.problem, Maps(t.of.problem, {t.dy, t.of.x, t.dx}),
                 in_lines(t.of) && in_lines({t.gate, t.shift, t.slope, t.offset}));
}

}  // namespace eca::cuda
