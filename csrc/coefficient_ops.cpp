// The operators of the arithmetic between the passes over a tail's maps: schema, checks, dispatch.
// What they compute is in coefficients.h.
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "coefficients.h"
#include "cuda/call.h"
#include "maps.h"
#include "run.h"
#include "stable_abi.h"
#include "tail_ops.h"

namespace eca {
namespace {

// ---- the kernels for the device ----

void run(const BatchStatistics& t, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::batch_statistics(t, device.index);
#endif
  on_cpu([&] { cpu::kernels().batch_statistics(t, thread_pool()); });
}

void run(const Coefficients& t, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::coefficients(t, device.index);
#endif
  on_cpu([&] { cpu::kernels().coefficients(t, thread_pool()); });
}

void run(const Totals& t, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::totals(t, device.index);
#endif
  on_cpu([&] { cpu::kernels().totals(t, thread_pool()); });
}

void run(const GradientCoefficients& t, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::gradient_coefficients(t, device.index);
#endif
  on_cpu([&] { cpu::kernels().gradient_coefficients(t, thread_pool()); });
}

void check_sizes(const Tensor& t, const char* name, const Tensor& x, const Sizes& sizes) {
  if (has_sizes(t, x, sizes)) return;
  check(false, "expected ", name, " of shape (", listed(sizes), ") on ", device_of(x), ", got ",
        shape{t}, " on ", device_of(t));
}

// Small tensors as the kernels read them; keeps copies of those that are not contiguous.
class Inputs {
 public:
  explicit Inputs(const Tensor& x) : x_(x) {}

  Values of(const OptionalTensor& t, const char* name, const Sizes& sizes) {
    if (!t) return {nullptr, Dtype::kFloat32};
    check_sizes(*t, name, x_, sizes);
    const Dtype dtype = dtype_of(*t, name);
    held_.push_back(as_contiguous(*t));
    return {held_.back().data_ptr(), dtype};
  }
  const double* doubles(const OptionalTensor& t, const char* name, const Sizes& sizes) {
    const Values v = of(t, name, sizes);
    check(!v.data || v.dtype == Dtype::kFloat64, "expected ", name, " of dtype torch.float64");
    return static_cast<const double*>(v.data);
  }
  // (N, C) in the dtype of the coefficients
  const void* sums(const OptionalTensor& t, const char* name, const Sizes& sizes) {
    const Values v = of(t, name, sizes);
    check(!t || dtype_code(*t) == accumulator_code(x_), "expected ", name, " of dtype ",
          dtype{accumulator_code(x_)});
    return v.data;
  }
  NormValues norm(const OptionalTensor& mean, const OptionalTensor& variance,
                  const OptionalTensor& gamma, const OptionalTensor& beta, double eps) {
    check(bool(mean) == bool(variance), "expected a mean and a variance, or neither");
    const Sizes sizes = {x_.size(1)};
    return {of(mean, "mean", sizes), of(variance, "variance", sizes), of(gamma, "gamma", sizes),
            of(beta, "beta", sizes), eps};
  }

 private:
  const Tensor& x_;
  std::vector<Tensor> held_;
};

Tensor empty_rows(const Tensor& x, const Sizes& sizes, int32_t dtype) {
  Sizes strides(sizes.size());
  int64_t run = 1;
  for (size_t i = sizes.size(); i-- > 0; run *= sizes[i]) strides[i] = run;
  return empty(x, sizes.data(), strides.data(), sizes.size(), dtype);
}

Tensor empty_like(const OptionalTensor& t, const Tensor& x, bool needed) {
  if (!needed || !t) return empty_unused(x);
  const auto sizes = t->sizes();
  return empty_rows(x, Sizes(sizes.begin(), sizes.end()), dtype_code(*t));
}

void* data_of(const Tensor& t) { return t.numel() ? t.data_ptr() : nullptr; }

Problem problem_with(const Tensor& x, const OptionalTensor& weight, bool circular) {
  return weight ? problem_of(x, *weight, circular) : problem_of(x);
}

const void* taps_of(const OptionalTensor& weight, OptionalTensor& held) {
  if (!weight) return nullptr;
  held = as_contiguous(*weight);
  return held->data_ptr();
}

}  // namespace

std::tuple<Tensor, Tensor> batch_statistics(const Tensor& planes, int64_t pixels,
                                            const OptionalTensor& running_mean,
                                            const OptionalTensor& running_variance, double factor) {
  check(planes.dim() == 3 && planes.size(0) == 2 && dtype_code(planes) == kFloat64Code &&
            planes.is_contiguous() && planes.size(1) > 0 && pixels > 0,
        "expected planes (2, N, C) as moments() returns them for a map with elements, got ",
        shape{planes}, ", ", dtype{dtype_code(planes)});
  const int64_t N = planes.size(1), C = planes.size(2);
  const auto values = [&](const OptionalTensor& t, const char* name) {
    if (!t) return Values{nullptr, Dtype::kFloat32};
    check_sizes(*t, name, planes, {C});
    check(t->is_contiguous(), "expected ", name, " contiguous");
    return Values{t->data_ptr(), dtype_of(*t, name)};
  };
  const Values old_mean = values(running_mean, "running_mean"),
               old_variance = values(running_variance, "running_variance");
  Tensor mean = empty_rows(planes, {C}, kFloat64Code),
         variance = empty_rows(planes, {C}, kFloat64Code);
  const BatchStatistics t{N,
                          C,
                          pixels,
                          static_cast<const double*>(planes.data_ptr()),
                          static_cast<double*>(mean.data_ptr()),
                          static_cast<double*>(variance.data_ptr()),
                          {old_mean, old_variance, const_cast<void*>(old_mean.data),
                           const_cast<void*>(old_variance.data), factor}};
  if (C > 0) run(t, device_of(planes));
  return {mean, variance};
}

static std::tuple<Tensor, Tensor> statistics_of_batch(const Tensor& planes, int64_t pixels) {
  return batch_statistics(planes, pixels, {}, {}, 0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tail_coefficients(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& means,
    const OptionalTensor& gate, const OptionalTensor& scale, const OptionalTensor& mean,
    const OptionalTensor& variance, const OptionalTensor& gamma, const OptionalTensor& beta,
    double eps, const OptionalTensor& identity_mean, const OptionalTensor& identity_variance,
    const OptionalTensor& identity_gamma, const OptionalTensor& identity_beta, double identity_eps,
    bool circular, bool need_planes) {
  const Problem p = problem_with(x, weight, circular);
  const int64_t N = p.samples, C = p.channels;
  const int32_t sums = accumulator_code(x);
  check(!weight || !need_planes || (means && !gate), "expected the means of x for taps, no gate");
  Inputs inputs(x);
  OptionalTensor taps;
  Tensor planes = need_planes ? empty_rows(x, {2, N, C}, sums) : empty_unused(x),
         channels = empty_rows(x, {6, C}, sums),
         made = weight && need_planes ? empty_channels(x) : empty_unused(x),
         distance = means ? empty_channels(x) : empty_unused(x);
  const Coefficients t{
      p,
      inputs.norm(mean, variance, gamma, beta, eps),
      inputs.norm(identity_mean, identity_variance, identity_gamma, identity_beta, identity_eps),
      need_planes ? taps_of(weight, taps) : nullptr,
      inputs.of(means, "means", {N, C}),
      inputs.of(gate, "gate", {N, C}),
      inputs.of(scale, "scale", {N}),
      data_of(planes),
      channels.data_ptr(),
      data_of(made),
      data_of(distance)};
  if (C > 0) run(t, device_of(x));
  return {planes, channels, made, distance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tail_totals(
    const Tensor& x, const Tensor& sums, const OptionalTensor& weight, const OptionalTensor& gate,
    const OptionalTensor& scale, const OptionalTensor& dmean, const OptionalTensor& distance,
    const OptionalTensor& mean, const OptionalTensor& variance, const OptionalTensor& gamma,
    const OptionalTensor& beta, double eps, bool circular, bool need_dgate, bool need_dscale,
    bool need_dweight) {
  const Problem p = problem_with(x, weight, circular);
  const int64_t N = p.samples, C = p.channels;
  const bool identity_sum = sums.dim() == 3 && sums.size(0) == 3;
  check(!weight || gate, "expected the gate that the taps made");
  check(!(weight || dmean) || distance, "expected distance, as the forward operator returned it");
  check(!weight || !dmean, "expected taps or dmean, got both");
  Inputs inputs(x);
  OptionalTensor taps;
  Tensor totals = empty_rows(x, {4, C}, kFloat64Code), dgate = empty_like(gate, x, need_dgate),
         dscale = empty_like(scale, x, need_dscale),
         made = weight ? empty_channels(x) : empty_unused(x),
         dweight = empty_like(weight, x, need_dweight);
  const Totals t{p,
                 inputs.norm(mean, variance, gamma, beta, eps),
                 inputs.doubles(sums, "sums", {identity_sum ? 3 : 2, N, C}),
                 identity_sum,
                 taps_of(weight, taps),
                 inputs.of(gate, "gate", {N, C}),
                 inputs.of(scale, "scale", {N}),
                 inputs.of(dmean, "dmean", {N, C}),
                 inputs.sums(distance, "distance", {N, C}),
                 static_cast<double*>(totals.data_ptr()),
                 data_of(dgate),
                 data_of(dscale),
                 data_of(made),
                 data_of(dweight)};
  if (C > 0) run(t, device_of(x));
  return {totals, dgate, dscale, made, dweight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tail_gradient_coefficients(
    const Tensor& x, const OptionalTensor& totals, const OptionalTensor& shares, double values,
    double identity_values, const OptionalTensor& gate, const OptionalTensor& scale,
    const OptionalTensor& dmean, const OptionalTensor& mean, const OptionalTensor& variance,
    const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
    const OptionalTensor& identity_mean, const OptionalTensor& identity_variance,
    const OptionalTensor& identity_gamma, const OptionalTensor& identity_beta, double identity_eps,
    bool need_planes) {
  const Problem p = problem_of(x);
  const int64_t N = p.samples, C = p.channels;
  const int32_t sums = accumulator_code(x);
  Inputs inputs(x);
  Tensor planes = need_planes ? empty_rows(x, {2, N, C}, sums) : empty_unused(x),
         channels = need_planes ? empty_rows(x, {4, C}, sums) : empty_unused(x);
  const auto gradient = [&](const OptionalTensor& t) { return empty_like(t, x, bool(totals)); };
  Tensor dgamma = gradient(gamma), dbeta = gradient(beta),
         identity_dgamma = gradient(identity_gamma), identity_dbeta = gradient(identity_beta);
  const NormValues own = inputs.norm(mean, variance, gamma, beta, eps),
                   other = inputs.norm(identity_mean, identity_variance, identity_gamma,
                                       identity_beta, identity_eps);
  const GradientCoefficients t{p,
                               own,
                               other,
                               inputs.doubles(totals, "totals", {4, C}),
                               inputs.doubles(shares, "shares", {4, C}),
                               values,
                               identity_values,
                               inputs.of(gate, "gate", {N, C}),
                               inputs.of(scale, "scale", {N}),
                               inputs.of(dmean, "dmean", {N, C}),
                               data_of(planes),
                               data_of(channels),
                               data_of(dgamma),
                               data_of(dbeta),
                               data_of(identity_dgamma),
                               data_of(identity_dbeta)};
  if (C > 0) run(t, device_of(x));
  return {planes, channels, dgamma, dbeta, identity_dgamma, identity_dbeta};
}

}  // namespace eca

ECA_LIBRARY_FRAGMENT(m) {
  m.def("batch_statistics(Tensor planes, SymInt pixels) -> (Tensor mean, Tensor variance)");
  m.def(
      "tail_coefficients(Tensor x, Tensor? weight, Tensor? means, Tensor? gate, Tensor? "
      "scale, " ECA_NORM ECA_IDENTITY_NORM
      "bool circular, bool need_planes) -> (Tensor planes, Tensor channels, Tensor gate, Tensor "
      "distance)");
  m.def(
      "tail_totals(Tensor x, Tensor sums, Tensor? weight, Tensor? gate, Tensor? scale, Tensor? "
      "dmean, Tensor? distance, " ECA_NORM
      "bool circular, bool need_dgate, bool need_dscale, bool need_dweight) -> (Tensor totals, "
      "Tensor dgate, Tensor dscale, Tensor dmean, Tensor dweight)");
  m.def(
      "tail_gradient_coefficients(Tensor x, Tensor? totals, Tensor? shares, float values, float "
      "identity_values, Tensor? gate, Tensor? scale, Tensor? dmean, " ECA_NORM ECA_IDENTITY_NORM
      "bool need_planes) -> (Tensor planes, Tensor channels, Tensor dgamma, Tensor dbeta, Tensor "
      "identity_dgamma, Tensor identity_dbeta)");
}

template <class Library>
static void implement(Library& m) {
  m.impl("batch_statistics", TORCH_BOX(&eca::statistics_of_batch));
  m.impl("tail_coefficients", TORCH_BOX(&eca::tail_coefficients));
  m.impl("tail_totals", TORCH_BOX(&eca::tail_totals));
  m.impl("tail_gradient_coefficients", TORCH_BOX(&eca::tail_gradient_coefficients));
}

ECA_LIBRARY_IMPL(CPU, m) { implement(m); }

#if defined(ECA_FUSED_WITH_CUDA)
ECA_LIBRARY_IMPL(CUDA, m) { implement(m); }
#endif
