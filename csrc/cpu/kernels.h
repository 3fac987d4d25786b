// Fused ECA on the CPU. Each byte of x (and dy) is read from memory once, each byte of y (dx) is
// written once: the second read of x or dy finds the data in a cache.
//
// Forward reduces x to its mean, filters it with the taps and multiplies x by the sigmoid. Backward
// reduces dy * x to dz, filters it with the transposed taps, and adds that to gate * dy. Both give
// their own functions to the same two walks, over planes (NCHW) and over pixels (NHWC).
//
// Included once per instruction set, after simd.h, inside its namespace.

#include "rows.h"
#include "common.h"
#include "taps.h"
#include "planes.h"
#include "pixels.h"
#include "apart.h"
#include "tail_rows.h"
#include "tail.h"
#include "moments.h"
#include "coefficients.h"
#include "gated_rows.h"
#include "gated.h"

template <class T>
void forward_as(const Forward& f, const ThreadPool& pool) {
  using A = Acc<T>;
  const Problem& p = f.problem;
  const int64_t C = p.channels, S = p.pixels;
  const Taps<A> taps(p, f.weight, false);
  A *mean = (A*)f.mean, *gate = (A*)f.gate;
  const bool stream = streams<T>(p, f.y, f.x);
  if (p.layout == Layout::kPlanes) {
    walk_planes<A>(
        p, taps, pieces_in_cache(S * sizeof(T)), f.x.data == f.y.data, pool,
        [&](int64_t n, int64_t c, int64_t count, A* out) {
          reduce_planes<false, T>(out, f.x, f.x, n, c, count, S, true);
          for (int64_t i = 0; i < count; ++i) out[i] /= S;
        },
        [&](int64_t n, int64_t c, int64_t count, const A* values, A* filtered) {
          __builtin_memcpy(mean + n * C + c, values, count * sizeof(A));
          sigmoid_row(filtered, filtered, whole_vectors<A>(count));
          __builtin_memcpy(gate + n * C + c, filtered, count * sizeof(A));
          rescale_planes<false, T>(f.y, f.x, n, c, count, S, filtered, filtered, stream);
        });
    return;
  }
  const PixelRows g(p, f.x.row_stride == C && f.y.row_stride == C);
  walk_pixels<A>(
      p, g, sizeof(T), pool,
      [&](int64_t n, int64_t first, int64_t end, double* total) {
        reduce_pixels<false, T>(g, f.x, f.x, n, first, end, total);
      },
      [&](int64_t n, const double* sums, A* scale, A*) {
        for (int64_t c = 0; c < C; ++c) mean[n * C + c] = sums[c] / S;
        filter_sample(taps, scale, mean + n * C);
        sigmoid_row(scale, scale, C);
        __builtin_memcpy(gate + n * C, scale, C * sizeof(A));
      },
      [&](int64_t n, int64_t first, int64_t end, const A* scale, const A*) {
        rescale_pixels<false, T>(g, f.y, f.x, n, first, end, scale, scale, stream);
      });
}

template <class T>
void backward_as(const Backward& b, const ThreadPool& pool) {
  using A = Acc<T>;
  const Problem& p = b.problem;
  const int64_t C = p.channels, S = p.pixels;
  const Taps<A> taps(p, b.weight, true);
  const A *mean = (const A*)b.mean, *gate = (const A*)b.gate;
  Array<A> dz(p.samples * C);
  const bool stream = b.dx.data && streams<T>(p, b.dx, b.dy);
  if (p.layout == Layout::kPlanes) {
    walk_planes<A>(
        p, taps, pieces_in_cache(2 * S * sizeof(T)), false, pool,
        [&](int64_t n, int64_t c, int64_t count, A* out) {
          reduce_planes<true, T>(out, b.dy, b.x, n, c, count, S, true);
          const A* a = gate + n * C + c;
          for (int64_t i = 0; i < count; ++i) out[i] *= a[i] * (1 - a[i]);
        },
        [&](int64_t n, int64_t c, int64_t count, const A* values, A* filtered) {
          __builtin_memcpy(dz + (n * C + c), values, count * sizeof(A));
          for (int64_t i = 0; i < count; ++i) filtered[i] /= S;
          if (b.dx.data)
            rescale_planes<true, T>(b.dx, b.dy, n, c, count, S, gate + n * C + c, filtered, stream);
        });
  } else {
    const bool dense = b.dy.row_stride == C && b.x.row_stride == C;
    const PixelRows g(p, dense && (!b.dx.data || b.dx.row_stride == C));
    walk_pixels<A>(
        p, g, 2 * sizeof(T), pool,
        [&](int64_t n, int64_t first, int64_t end, double* total) {
          reduce_pixels<true, T>(g, b.dy, b.x, n, first, end, total);
        },
        [&](int64_t n, const double* sums, A* scale, A* shift) {
          A* own = dz + n * C;
          for (int64_t c = 0; c < C; ++c) {
            scale[c] = gate[n * C + c];
            own[c] = sums[c] * scale[c] * (1 - scale[c]);
          }
          filter_sample(taps, shift, own);
          for (int64_t c = 0; c < C; ++c) shift[c] /= S;
        },
        [&](int64_t n, int64_t first, int64_t end, const A* scale, const A* shift) {
          if (b.dx.data)
            rescale_pixels<true, T>(g, b.dx, b.dy, n, first, end, scale, shift, stream);
        });
  }
  if (b.dweight) taps_gradient<A>(p, taps, dz, mean, b.dweight, pool);
}

inline void forward(const Forward& f, const ThreadPool& pool) {
  visit(f.problem.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    forward_as<T>(f, pool);
  });
}

inline void backward(const Backward& b, const ThreadPool& pool) {
  visit(b.problem.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    backward_as<T>(b, pool);
  });
}

constexpr Kernels all_kernels(const char* name) {
  return {name,
          forward,
          backward,
          reduce,
          scale,
          moments,
          tail,
          tail_sums,
          tail_gradients,
          block_tail,
          block_tail_backward,
          batch_statistics,
          coefficients,
          totals,
          gradient_coefficients,
          activated_sums,
          gated,
          gated_gradients,
          gated_block};
}
