// Operators that compute a whole direction of a residual block's tail, with those of tail_ops.h. A
// call from Python costs as much as a pass over a small map.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "maps.h"
#include "stable_abi.h"
#include "tail_ops.h"

namespace eca {
namespace {

// The last rows of channels (6, C): centre, identity_scale and identity_centre.
Tensor of_pass(Tensor& channels) { return torch::stable::narrow(channels, 0, 3, 3); }

// The means of the planes and their squared distances (2, N, C), mean and variance (C,). Running
// statistics become factor * those of the batch + (1 - factor) * themselves.
std::tuple<Tensor, Tensor, Tensor> batch_moments(const Tensor& x,
                                                 const OptionalTensor& running_mean,
                                                 const OptionalTensor& running_variance,
                                                 double factor) {
  const Tensor planes = moments(x);
  const auto [mean, variance] =
      batch_statistics(planes, problem_of(x).pixels, running_mean, running_variance, factor);
  return {planes, mean, variance};
}

// y alone, for calls that need no gradient.
Tensor tail_inference(const Tensor& x, const OptionalTensor& identity, const OptionalTensor& weight,
                      const OptionalTensor& means, const OptionalTensor& gate,
                      const OptionalTensor& scale, const OptionalTensor& mean,
                      const OptionalTensor& variance, const OptionalTensor& gamma,
                      const OptionalTensor& beta, double eps, const OptionalTensor& identity_mean,
                      const OptionalTensor& identity_variance, const OptionalTensor& identity_gamma,
                      const OptionalTensor& identity_beta, double identity_eps, bool circular,
                      int64_t activation) {
  check(!weight || !gate, "expected taps or a gate, got both");
  const bool in_one_pass = weight && !means;
  auto [planes, channels, made, distance] =
      tail_coefficients(x, in_one_pass ? OptionalTensor() : weight, means, gate, scale, mean,
                        variance, gamma, beta, eps, identity_mean, identity_variance,
                        identity_gamma, identity_beta, identity_eps, circular, !in_one_pass);
  if (in_one_pass)
    return std::get<0>(
        block_tail(x, identity, *weight, scale, channels, circular, activation, false));
  return std::get<0>(tail(x, identity, planes, of_pass(channels), activation, false));
}

// y, the mask, and what tail_backward takes: planes, channels (3, C), the gate of taps, and the
// means of x - centre.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tail_training(
    const Tensor& x, const OptionalTensor& identity, const OptionalTensor& weight,
    const OptionalTensor& means, const OptionalTensor& gate, const OptionalTensor& scale,
    const OptionalTensor& mean, const OptionalTensor& variance, const OptionalTensor& gamma,
    const OptionalTensor& beta, double eps, const OptionalTensor& identity_mean,
    const OptionalTensor& identity_variance, const OptionalTensor& identity_gamma,
    const OptionalTensor& identity_beta, double identity_eps, bool circular, int64_t activation) {
  auto [planes, channels, made, distance] = tail_coefficients(
      x, weight, means, gate, scale, mean, variance, gamma, beta, eps, identity_mean,
      identity_variance, identity_gamma, identity_beta, identity_eps, circular, true);
  const Tensor rest = of_pass(channels);
  const auto [y, mask] = tail(x, identity, planes, rest, activation, true);
  return {y, mask, planes, rest, made, distance};
}

// Which gradients are needed, a bit each, in the order in which tail_backward returns them.
enum Gradient {
  kX,
  kIdentity,
  kWeight,
  kGate,
  kScale,
  kGamma,
  kBeta,
  kIdentityGamma,
  kIdentityBeta,
  kGradients
};

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The gradients; some of those that are not needed are empty. values and identity_values say how
// many values of a channel the statistics are of, 0 for running statistics.
Gradients tail_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& identity,
                        const Tensor& mask, const Tensor& planes, const Tensor& channels,
                        const OptionalTensor& weight, const OptionalTensor& gate,
                        const OptionalTensor& scale, const OptionalTensor& distance,
                        const OptionalTensor& mean, const OptionalTensor& variance,
                        const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
                        const OptionalTensor& identity_mean,
                        const OptionalTensor& identity_variance,
                        const OptionalTensor& identity_gamma, const OptionalTensor& identity_beta,
                        double identity_eps, double values, double identity_values, bool circular,
                        int64_t activation, int64_t needed) {
  check(needed >= 0 && needed < (int64_t(1) << kGradients), "expected needed as ", int(kGradients),
        " bits, got ", needed);
  const auto need = [&](Gradient g) { return (needed >> g & 1) != 0; };
  const bool by_x = values > 0, by_identity = identity_values > 0;
  const bool identity_sum = identity_mean && (by_identity || need(kIdentityGamma));
  OptionalTensor totals, dmean;
  Tensor dweight = empty_unused(x), dgate = empty_unused(x), dscale = empty_unused(x);
  if (by_x || by_identity || weight || needed >> kGate) {
    const Tensor sums =
        tail_sums(dy, x, identity, mask, planes, channels, activation, identity_sum);
    auto found =
        tail_totals(x, sums, weight, gate, scale, {}, weight ? distance : OptionalTensor(), mean,
                    variance, gamma, beta, eps, circular, need(kGate), need(kScale), need(kWeight));
    totals = std::get<0>(found);
    if (weight) dmean = std::get<3>(found);
    dgate = std::get<1>(found), dscale = std::get<2>(found), dweight = std::get<4>(found);
  }
  const auto [gradient_planes, gradient_channels, dgamma, dbeta, identity_dgamma, identity_dbeta] =
      tail_gradient_coefficients(x, totals, {}, values, identity_values, gate, scale, dmean, mean,
                                 variance, gamma, beta, eps, identity_mean, identity_variance,
                                 identity_gamma, identity_beta, identity_eps, true);
  const auto [dx, d_identity] =
      tail_gradients(dy, x, identity, mask, planes, channels, gradient_planes, gradient_channels,
                     activation, by_x, by_identity, need(kX), need(kIdentity));
  return {dx, d_identity, dweight, dgate, dscale, dgamma, dbeta, identity_dgamma, identity_dbeta};
}

}  // namespace
}  // namespace eca

#define ECA_GATE "Tensor? weight, Tensor? means, Tensor? gate, Tensor? scale, "

ECA_LIBRARY_FRAGMENT(m) {
  m.def(
      "batch_moments(Tensor x, Tensor(a!)? running_mean=None, Tensor(b!)? running_variance=None, "
      "float factor=0.0) -> (Tensor planes, Tensor mean, Tensor variance)");
  m.def("tail_inference(Tensor x, Tensor? identity, " ECA_GATE ECA_NORM ECA_IDENTITY_NORM
        "bool circular, int activation) -> Tensor");
  m.def("tail_training(Tensor x, Tensor? identity, " ECA_GATE ECA_NORM ECA_IDENTITY_NORM
        "bool circular, int activation) -> (Tensor y, Tensor mask, Tensor planes, Tensor channels, "
        "Tensor gate, Tensor distance)");
  m.def(
      "tail_backward(Tensor dy, Tensor x, Tensor? identity, Tensor mask, Tensor planes, Tensor "
      "channels, Tensor? weight, Tensor? gate, Tensor? scale, Tensor? "
      "distance, " ECA_NORM ECA_IDENTITY_NORM
      "float values, float identity_values, bool circular, int activation, int needed) -> (Tensor "
      "dx, Tensor d_identity, Tensor dweight, Tensor dgate, Tensor dscale, Tensor dgamma, Tensor "
      "dbeta, Tensor identity_dgamma, Tensor identity_dbeta)");
}

template <class Library>
static void implement_whole(Library& m) {
  m.impl("batch_moments", TORCH_BOX(&eca::batch_moments));
  m.impl("tail_inference", TORCH_BOX(&eca::tail_inference));
  m.impl("tail_training", TORCH_BOX(&eca::tail_training));
  m.impl("tail_backward", TORCH_BOX(&eca::tail_backward));
}

ECA_LIBRARY_IMPL(CPU, m) { implement_whole(m); }

#if defined(ECA_FUSED_WITH_CUDA)
ECA_LIBRARY_IMPL(CUDA, m) { implement_whole(m); }
#endif
