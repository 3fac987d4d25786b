// The operators of a residual block's tail that whole_tail_ops.cpp puts together, by their names.
// Their arguments are described where they are defined, tail_ops.cpp and coefficient_ops.cpp.
#pragma once

#include <tuple>

#include "maps.h"

// A norm's arguments in the schema of an operator.
#define ECA_NORM "Tensor? mean, Tensor? variance, Tensor? gamma, Tensor? beta, float eps, "
#define ECA_IDENTITY_NORM                                                              \
  "Tensor? identity_mean, Tensor? identity_variance, Tensor? identity_gamma, Tensor? " \
  "identity_beta, float identity_eps, "

namespace eca {

// ---- passes over the maps ----

Tensor moments(const Tensor& x);

std::tuple<Tensor, Tensor> tail(const Tensor& x, const OptionalTensor& identity,
                                const Tensor& planes, const Tensor& channels, int64_t activation,
                                bool need_mask);

Tensor tail_sums(const Tensor& dy, const Tensor& x, const OptionalTensor& identity,
                 const Tensor& mask, const Tensor& planes, const Tensor& channels,
                 int64_t activation, bool identity_sum);

std::tuple<Tensor, Tensor> tail_gradients(const Tensor& dy, const Tensor& x,
                                          const OptionalTensor& identity, const Tensor& mask,
                                          const Tensor& planes, const Tensor& channels,
                                          const Tensor& gradient_planes,
                                          const Tensor& gradient_channels, int64_t activation,
                                          bool by_x, bool by_identity, bool need_dx,
                                          bool need_d_identity);

std::tuple<Tensor, Tensor, Tensor, Tensor> block_tail(const Tensor& x,
                                                      const OptionalTensor& identity,
                                                      const Tensor& weight,
                                                      const OptionalTensor& scale,
                                                      const Tensor& channels, bool circular,
                                                      int64_t activation, bool need_mask);

// ---- between the passes, see coefficients.h ----

// Updates running statistics, if there are any.
std::tuple<Tensor, Tensor> batch_statistics(const Tensor& planes, int64_t pixels,
                                            const OptionalTensor& running_mean,
                                            const OptionalTensor& running_variance, double factor);

std::tuple<Tensor, Tensor, Tensor, Tensor> tail_coefficients(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& means,
    const OptionalTensor& gate, const OptionalTensor& scale, const OptionalTensor& mean,
    const OptionalTensor& variance, const OptionalTensor& gamma, const OptionalTensor& beta,
    double eps, const OptionalTensor& identity_mean, const OptionalTensor& identity_variance,
    const OptionalTensor& identity_gamma, const OptionalTensor& identity_beta, double identity_eps,
    bool circular, bool need_planes);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tail_totals(
    const Tensor& x, const Tensor& sums, const OptionalTensor& weight, const OptionalTensor& gate,
    const OptionalTensor& scale, const OptionalTensor& dmean, const OptionalTensor& distance,
    const OptionalTensor& mean, const OptionalTensor& variance, const OptionalTensor& gamma,
    const OptionalTensor& beta, double eps, bool circular, bool need_dgate, bool need_dscale,
    bool need_dweight);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tail_gradient_coefficients(
    const Tensor& x, const OptionalTensor& totals, const OptionalTensor& shares, double values,
    double identity_values, const OptionalTensor& gate, const OptionalTensor& scale,
    const OptionalTensor& dmean, const OptionalTensor& mean, const OptionalTensor& variance,
    const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
    const OptionalTensor& identity_mean, const OptionalTensor& identity_variance,
    const OptionalTensor& identity_gamma, const OptionalTensor& identity_beta, double identity_eps,
    bool need_planes);

}  // namespace eca
