// Launchers of the kernels of a residual block's tail. Instantiated once for each dtype.
#pragma once

#include <type_traits>

#include "cuda.h"
#include "tail_small.h"

namespace eca::cuda {

// Float64 is for checking gradients: its kernels move single elements.
template <class T>
constexpr bool kTailVectors = !std::is_same_v<T, double>;

// body(kSmooth, kIdentity): whether the activation is SiLU or GELU, whose gradients need v, and
// whether the identity is read, which single elements ask at run time.
template <class T, class Body>
void with_kind(Activation activation, bool vectors, bool reads_identity, Body body) {
  const auto choose = [&](auto smooth) {
    if constexpr (kTailVectors<T>)
      if (vectors && !reads_identity) return body(smooth, std::false_type{});
    body(smooth, std::true_type{});
  };
  if (activation > Activation::kRelu) choose(std::true_type{});
  else choose(std::false_type{});
}

template <class T, bool kSmooth, bool kIdentity>
TailGradientMaps<T, kSmooth, kIdentity> gradient_maps(const Problem& p, const Map& dy, const Map& x,
                                                      const Map& identity, const uint8_t* mask,
                                                      const TailCoefficients& k,
                                                      Activation activation, bool reads_x,
                                                      bool reads_identity) {
  const int64_t rows = p.samples * (p.layout == Layout::kPlanes ? p.channels : p.pixels);
  return {dy,
          x,
          identity,
          activation == Activation::kRelu ? mask : nullptr,
          k,
          activation,
          reads_x,
          reads_identity,
          rows * mask_row_bytes(p) - 1};
}

// ---- passes that write ----

// With kSingles also the kernels that move single elements.
template <class T, bool kSingles, class Pass>
void write_tail(const TailPlan& plan, const Pass& pass, const Memory& memory) {
  constexpr int V = kVector<T>;
  const auto start = [&](auto kernel, int ring) {
    launch({plan.blocks, kTailThreads, pass.mask ? ring : 0, static_cast<Stream>(memory.stream)},
           kernel, plan.grid, pass);
  };
  if constexpr (kTailVectors<T>) {
    if (plan.way == TailWay::kColumns)
      return start(tail_columns<T, Pass>, kMaskRing<Pass::kColumnsAtOnce>);
    if (plan.vectors) return start(tail_flat<T, V, Pass>, kMaskRing<kTailAtOnce<V>>);
  }
  if constexpr (kSingles) start(tail_flat<T, 1, Pass>, kMaskRing<kTailAtOnce<1>>);
}

template <class T>
void run_tail(const eca::Tail& t, const TailPlan& plan, const Memory& memory) {
  with_kind<T>(t.activation, plan.vectors, t.identity.data, [&](auto smooth, auto identity) {
    constexpr bool kSmooth = decltype(smooth)::value, kIdentity = decltype(identity)::value;
    write_tail<T, kIdentity>(
        plan,
        TailForward<T, kSmooth, kIdentity>{t.x, t.identity, t.y, t.mask, t.coefficients,
                                           t.activation == Activation::kRelu, t.activation},
        memory);
  });
}

template <class T>
void run_tail_gradients(const TailGradients& t, const TailPlan& plan, const Memory& memory) {
  const bool by_x = t.q && t.dx.data, by_identity = t.identity_q && t.d_identity.data,
             for_v = t.activation > Activation::kRelu && t.identity.data;
  with_kind<T>(t.activation, plan.vectors, by_identity || for_v, [&](auto smooth, auto identity) {
    constexpr bool kSmooth = decltype(smooth)::value, kIdentity = decltype(identity)::value;
    write_tail<T, kIdentity>(
        plan,
        TailBackward<T, kSmooth, kIdentity>{
            gradient_maps<T, kSmooth, kIdentity>(t.problem, t.dy, t.x, t.identity, t.mask,
                                                 t.coefficients, t.activation, by_x, by_identity),
            t.dx, t.d_identity, t.p, by_x ? t.q : nullptr, t.r, t.identity_p,
            by_identity ? t.identity_q : nullptr, t.identity_r},
        memory);
  });
}

// ---- passes that sum ----

// Likewise, and with kSmall those for small planes.
template <class T, bool kSingles, bool kSmall, class Sum>
void sum_tail(const TailSumPlan& plan, const Sum& sum, const TailTotals& totals,
              const Memory& memory) {
  constexpr int V = kVector<T>;
  const auto stream = static_cast<Stream>(memory.stream);
  TailTotals parts = totals;
  const int64_t in_sum = plan.grid.parts * plan.grid.all_planes;
  if (plan.grid.parts > 1)
    for (int s = 0; s < totals.kinds; ++s)
      parts.to[s] = static_cast<double*>(memory.workspace) + s * in_sum;
  const auto start = [&](auto elements) {
    constexpr int kElements = decltype(elements)::value;
    launch({plan.blocks, kTailThreads, plan.shared_bytes, stream},
           plan.way == TailWay::kColumns ? sum_tail_columns<T, kElements, Sum>
                                         : sum_tail_rows<T, kElements, Sum>,
           plan.grid, sum, parts);
  };
  if constexpr (kTailVectors<T>) {
    if (plan.vectors) start(std::integral_constant<int, V>{});
    if (plan.way == TailWay::kSmall)
      if constexpr (kSmall)
        launch({plan.blocks, kTailThreads, plan.shared_bytes, stream}, sum_tail_small<T, Sum>,
               plan.grid, plan.small, sum, parts);
  }
  if constexpr (kSingles)
    if (!plan.vectors && plan.way != TailWay::kSmall) start(std::integral_constant<int, 1>{});
  if (plan.grid.parts > 1)
    launch({ceil_div(plan.grid.all_planes, kTailThreads), kTailThreads, 0, stream},
           Sum::kHasPivot ? merge_tail_moments : add_tail_sums, plan.grid, parts, totals);
}

template <class T>
void run_moments(const eca::Moments& t, const TailSumPlan& plan, const Memory& memory) {
  sum_tail<T, true, true>(plan, TailMoments<T>{t.x}, {{t.mean, t.squares}, 2}, memory);
}

template <class T>
void run_tail_sums(const TailSums& t, const TailSumPlan& plan, const Memory& memory) {
  const int64_t in_sum = t.problem.samples * t.problem.channels;
  TailTotals totals{{}, t.identity_sum ? 3 : 2};
  for (int s = 0; s < totals.kinds; ++s) totals.to[s] = t.sums + s * in_sum;
  const bool for_v = t.activation > Activation::kRelu && t.identity.data;
  with_kind<T>(
      t.activation, plan.vectors, t.identity_sum || for_v, [&](auto smooth, auto identity) {
        constexpr bool kSmooth = decltype(smooth)::value, kIdentity = decltype(identity)::value;
        sum_tail<T, kIdentity, kIdentity>(
            plan,
            TailGradientSums<T, kSmooth, kIdentity>{gradient_maps<T, kSmooth, kIdentity>(
                t.problem, t.dy, t.x, t.identity, t.mask, t.coefficients, t.activation, true,
                t.identity_sum)},
            totals, memory);
      });
}

}  // namespace eca::cuda
