// Launchers of the kernels of attention after an activation. Instantiated once for each dtype.
#pragma once

#include "gated_element.h"
#include "tail_launch.h"

namespace eca::cuda {

// body(kSmooth), see ActivatedMaps. Single elements have the kernels for any activation.
template <class T, class Body>
void with_curve(Activation activation, bool singles, Body body) {
  const bool smooth = activation == Activation::kSilu || activation == Activation::kGelu;
  if constexpr (kTailVectors<T>)
    if (!singles && !smooth) return body(std::false_type{});
  body(std::true_type{});
}

template <class T, bool kSmooth, bool kGradient>
ActivatedMaps<T, kSmooth, kGradient> activated_maps(const Activated& of, const Map& dy) {
  return {of.x, dy, of.p, of.q, of.centre, of.activation};
}

template <class T>
void run_activated_sums(const ActivatedSums& t, const TailSumPlan& plan, const Memory& memory) {
  const Problem& p = t.of.problem;
  TailTotals totals{{}, t.for_norm ? 5 : 1};
  for (int s = 0; s < totals.kinds; ++s) totals.to[s] = t.sums + s * p.samples * p.channels;
  const bool singles = !plan.vectors && plan.way != TailWay::kSmall;
  with_curve<T>(t.of.activation, singles, [&](auto smooth) {
    constexpr bool kSmooth = decltype(smooth)::value;
    const auto sum = [&](auto gradient) {
      constexpr bool kGradient = decltype(gradient)::value;
      sum_tail<T, kSmooth, true>(
          plan,
          ActivatedSum<T, kSmooth, kGradient>{activated_maps<T, kSmooth, kGradient>(t.of, t.dy)},
          totals, memory);
    };
    if (t.dy.data) sum(std::true_type{});
    else sum(std::false_type{});
  });
}

template <class T>
void run_gated(const Gated& t, const TailPlan& plan, const Memory& memory) {
  with_curve<T>(t.of.activation, !plan.vectors, [&](auto smooth) {
    constexpr bool kSmooth = decltype(smooth)::value;
    write_tail<T, kSmooth>(
        plan, GatedForward<T, kSmooth>{activated_maps<T, kSmooth, false>(t.of, {}), t.gate, t.y},
        memory);
  });
}

template <class T>
void run_gated_gradients(const GatedGradients& t, const TailPlan& plan, const Memory& memory) {
  with_curve<T>(t.of.activation, !plan.vectors, [&](auto smooth) {
    constexpr bool kSmooth = decltype(smooth)::value;
    write_tail<T, kSmooth>(plan,
                           GatedBackward<T, kSmooth>{activated_maps<T, kSmooth, true>(t.of, t.dy),
                                                     t.gate, t.shift, t.slope, t.offset, t.dx},
                           memory);
  });
}

}  // namespace eca::cuda
