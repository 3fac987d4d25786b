// What operators of a tail call besides the passes over its maps.
#pragma once

#include <tuple>

#include "maps.h"

namespace eca {

// The operator of this name, see coefficients.h: planes, channels, the gate of taps, distance.
std::tuple<Tensor, Tensor, Tensor, Tensor> tail_coefficients(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& means,
    const OptionalTensor& gate, const OptionalTensor& scale, const OptionalTensor& mean,
    const OptionalTensor& variance, const OptionalTensor& gamma, const OptionalTensor& beta,
    double eps, const OptionalTensor& identity_mean, const OptionalTensor& identity_variance,
    const OptionalTensor& identity_gamma, const OptionalTensor& identity_beta, double identity_eps,
    bool circular, bool need_planes);

}  // namespace eca
