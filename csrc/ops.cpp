// The operators torch.ops.eca_fused.*: schema, checks, dispatch to the kernels. Torch types stop
// here.
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "cuda/call.h"
#include "run.h"
#include "stable_abi.h"
#include "tensors.h"

namespace eca {
namespace {

// ---- the operators ----
// x, y, dy, dx, out (N, C, *spatial); weight, dweight (1 or C, 1, k); mean, gate, shift (N, C)

// The kernels for the device. On CUDA, mean and gate may be null.
void run_kernels(const Forward& f, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::forward(f, device.index);
#endif
  on_cpu([&] { cpu::kernels().forward(f, thread_pool()); });
}

void run_kernels(const Backward& b, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::backward(b, device.index);
#endif
  on_cpu([&] { cpu::kernels().backward(b, thread_pool()); });
}

void run_kernels(const Reduce& r, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::reduce(r, device.index);
#endif
  on_cpu([&] { cpu::kernels().reduce(r, thread_pool()); });
}

void run_kernels(const Scale& s, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return cuda_call::scale(s, device.index);
#endif
  on_cpu([&] { cpu::kernels().scale(s, thread_pool()); });
}

void run_forward(Problem p, const Tensor& x, const View& view, const Tensor& y,
                 const Tensor& weight, void* mean, void* gate) {
  if (p.samples == 0 || p.channels == 0) return;
  p.layout = view.layout;
  run_kernels(Forward{p, map_of(x, p), map_of(y, p), weight.data_ptr(), mean, gate}, device_of(x));
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, bool circular) {
  const Problem p = problem_of(x, weight, circular);
  const View view = view_of(x, p);
  const Tensor source = readable(x, view, view.layout);
  Tensor y = empty_output(x, view, p), mean = empty_channels(x), gate = empty_channels(x);
  run_forward(p, source, view, y, as_contiguous(weight), mean.data_ptr(), gate.data_ptr());
  return {y, mean, gate};
}

// Without mean and gate, which only a gradient needs: two tensors less to create.
void run_inference(const Problem& p, const Tensor& x, const View& view, const Tensor& y,
                   const Tensor& weight) {
  // Maps without pixels may have more channels than there is memory for gates.
  if (p.pixels == 0) return;
  if (device_of(x).type == kCudaType)
    return run_forward(p, x, view, y, as_contiguous(weight), nullptr, nullptr);
  const int64_t size = p.samples * p.channels * (p.dtype == Dtype::kFloat64 ? 8 : 4);
  std::vector<double> scratch;  // aligned for either dtype of the sums
  on_cpu([&] { scratch.resize(size / 4 + 1); });
  char* const mean = reinterpret_cast<char*>(scratch.data());
  run_forward(p, x, view, y, as_contiguous(weight), mean, mean + size);
}

Tensor inference(const Tensor& x, const Tensor& weight, bool circular) {
  const Problem p = problem_of(x, weight, circular);
  const View view = view_of(x, p);
  Tensor y = empty_output(x, view, p);
  run_inference(p, readable(x, view, view.layout), view, y, weight);
  return y;
}

// Whether the rows of a map that can be read share no memory, so that they can be written too.
bool apart(const View& view, const Problem& p) {
  const bool planes = view.layout == Layout::kPlanes;
  const int64_t rows = planes ? p.channels : p.pixels, length = planes ? p.pixels : p.channels;
  return (rows <= 1 || view.row_stride >= length) &&
         (p.samples <= 1 || view.sample_stride >= (rows - 1) * view.row_stride + length);
}

// Whether they are the same elements in the same order.
bool same_memory(const Tensor& a, const Tensor& b) {
  bool same = a.data_ptr() == b.data_ptr();
  for (int64_t i = 0; i < a.dim(); ++i)
    same = same && (a.size(i) == 1 || a.stride(i) == b.stride(i));
  return same;
}

// Whether the memory from the first to the last element of one reaches into the other's.
bool overlap(const Tensor& a, const Tensor& b) {
  const auto range = [](const Tensor& t) {
    int64_t end = 1;
    for (int64_t i = 0; i < t.dim(); ++i) end += (t.size(i) - 1) * t.stride(i);
    const char* begin = static_cast<const char*>(t.data_ptr());
    return std::pair(begin, begin + end * t.element_size());
  };
  const auto [a_begin, a_end] = range(a);
  const auto [b_begin, b_end] = range(b);
  return std::less<>()(a_begin, b_end) && std::less<>()(b_begin, a_end);
}

// Writes y into out, which may be x; `name` is what the caller calls out. If the kernels cannot
// write it, or x has a part of its memory, they write new memory, which is then copied.
void write_inference(const Tensor& x, const Tensor& weight, const Tensor& out, bool circular,
                     const char* name) {
  const Problem p = problem_of(x, weight, circular);
  check_out(out, name, x);
  if (p.samples * p.channels * p.pixels == 0) return;
  const View view = view_of(x, p), target = view_of(out, p);
  const Tensor source = readable(x, view, view.layout);
  // Kernels may write some of y before they read the last of the taps.
  const Tensor taps = overlap(weight, out) ? dense_copy(weight, Layout::kPlanes) : weight;
  const bool writable = target.readable && target.layout == view.layout && apart(target, p) &&
                        (same_memory(source, out) || !overlap(source, out));
  if (writable) return run_inference(p, source, view, out, taps);
  for (int64_t i = 0; i < out.dim(); ++i)
    check(out.size(i) == 1 || out.stride(i) != 0, "more than one element of ", name,
          " refers to the same memory, as after expand(), so it cannot be written in place; "
          "clone() it first");
  const Tensor y = view.readable ? empty_output(x, view, p) : source;
  run_inference(p, source, view, y, taps);
  Tensor copied = out;
  torch::stable::copy_(copied, y);
}

void inference_into(const Tensor& x, const Tensor& weight, const Tensor& out, bool circular) {
  write_inference(x, weight, out, circular, "out");
}

void inference_(const Tensor& x, const Tensor& weight, bool circular) {
  write_inference(x, weight, x, circular, "x");
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                    const Tensor& mean, const Tensor& gate, bool circular,
                                    bool need_dx, bool need_dweight) {
  Problem p = problem_of(x, weight, circular);
  check_dy(dy, x);
  check_saved(mean, "mean", x);
  check_saved(gate, "gate", x);
  const View view = view_of(x, p);
  p.layout = view.layout;
  Tensor dx = need_dx ? empty_output(x, view, p) : empty_unused(x);
  const int64_t k = weight.size(2), weight_strides[] = {k, k, 1};
  Tensor dweight = need_dweight
                       ? empty(weight, weight.sizes().data(), weight_strides, 3, dtype_code(weight))
                       : empty_unused(weight);
  if (p.samples == 0 || p.channels == 0) {
    if (need_dweight) torch::stable::zero_(dweight);
    return {dx, dweight};
  }
  const Tensor source = readable(x, view, p.layout),
               gradient = readable(dy, view_of(dy, p), p.layout);
  const Tensor taps = as_contiguous(weight), means = as_contiguous(mean), gates = in_lines(gate);
  const Backward b{p,
                   map_of(gradient, p),
                   map_of(source, p),
                   need_dx ? map_of(dx, p) : Map{nullptr, 0, 0},
                   taps.data_ptr(),
                   means.data_ptr(),
                   gates.data_ptr(),
                   need_dweight ? dweight.data_ptr() : nullptr};
  run_kernels(b, device_of(x));
  return {dx, dweight};
}

constexpr Map kNoMap{nullptr, 0, 0};

Tensor pool(const Tensor& x) {
  Problem p = problem_of(x);
  const View view = view_of(x, p);
  p.layout = view.layout;
  const Tensor mean = empty_channels(x);
  if (p.samples == 0 || p.channels == 0) return channels_in(mean, dtype_code(x));
  const Tensor source = readable(x, view, p.layout);
  run_kernels(Reduce{p, map_of(source, p), kNoMap, kNoMap, nullptr, mean.data_ptr()}, device_of(x));
  return channels_in(mean, dtype_code(x));
}

Tensor rescale(const Tensor& x, const Tensor& gate, const std::optional<Tensor>& shift) {
  Problem p = problem_of(x);
  check_gate(gate, "gate", x);
  if (shift) check_gate(*shift, "shift", x);
  const View view = view_of(x, p);
  p.layout = view.layout;
  Tensor y = empty_output(x, view, p);
  if (p.samples * p.channels * p.pixels == 0) return y;
  const Tensor source = readable(x, view, p.layout), a = channels_in(gate, accumulator_code(x)),
               b = shift ? channels_in(*shift, accumulator_code(x)) : a;
  run_kernels(
      Scale{p, map_of(source, p), map_of(y, p), a.data_ptr(), shift ? b.data_ptr() : nullptr},
      device_of(x));
  return y;
}

std::tuple<Tensor, Tensor> rescale_backward(const Tensor& dy, const Tensor& x, const Tensor& gate,
                                            bool need_dx) {
  Problem p = problem_of(x);
  check_dy(dy, x);
  check_gate(gate, "gate", x);
  const View view = view_of(x, p);
  p.layout = view.layout;
  const Tensor dx = need_dx ? empty_output(x, view, p) : empty_unused(x);
  Tensor dgate = empty_channels(x);
  if (p.samples * p.channels * p.pixels == 0) {
    torch::stable::zero_(dgate);
  } else {
    const Tensor source = readable(x, view, p.layout),
                 gradient = readable(dy, view_of(dy, p), p.layout),
                 a = channels_in(gate, accumulator_code(x));
    run_kernels(Reduce{p, map_of(source, p), map_of(gradient, p), need_dx ? map_of(dx, p) : kNoMap,
                       a.data_ptr(), dgate.data_ptr()},
                device_of(x));
  }
  return {dx, channels_in(dgate, dtype_code(gate))};
}

}  // namespace
}  // namespace eca

ECA_LIBRARY(m) {
  m.def(
      "forward(Tensor x, Tensor weight, bool circular=False) -> (Tensor y, Tensor mean, Tensor "
      "gate)");
  m.def("inference(Tensor x, Tensor weight, bool circular=False) -> Tensor");
  m.def("inference_(Tensor(a!) x, Tensor weight, bool circular=False) -> ()");
  m.def("inference_into(Tensor x, Tensor weight, Tensor(a!) out, bool circular=False) -> ()");
  // For callers that have checked that no gradient is needed, and that count the write.
  m.def("_inference_(Tensor(a!) x, Tensor weight, bool circular=False) -> ()");
  m.def("_inference_into(Tensor x, Tensor weight, Tensor(a!) out, bool circular=False) -> ()");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor gate, bool circular=False, "
      "bool need_dx=True, bool need_dweight=True) -> (Tensor dx, Tensor dweight)");
  m.def("pool(Tensor x) -> Tensor");
  m.def("rescale(Tensor x, Tensor gate, Tensor? shift=None) -> Tensor");
  m.def(
      "rescale_backward(Tensor dy, Tensor x, Tensor gate, bool need_dx=True) -> (Tensor dx, Tensor "
      "dgate)");
}

template <class Library>
static void implement(Library& m) {
  m.impl("forward", TORCH_BOX(&eca::forward));
  m.impl("inference", TORCH_BOX(&eca::inference));
  m.impl("inference_", TORCH_BOX(&eca::inference_));
  m.impl("inference_into", TORCH_BOX(&eca::inference_into));
  m.impl("_inference_", TORCH_BOX(&eca::inference_));
  m.impl("_inference_into", TORCH_BOX(&eca::inference_into));
  m.impl("backward", TORCH_BOX(&eca::backward));
  m.impl("pool", TORCH_BOX(&eca::pool));
  m.impl("rescale", TORCH_BOX(&eca::rescale));
  m.impl("rescale_backward", TORCH_BOX(&eca::rescale_backward));
}

ECA_LIBRARY_IMPL(CPU, m) { implement(m); }

#if defined(ECA_FUSED_WITH_CUDA)
ECA_LIBRARY_IMPL(CUDA, m) { implement(m); }
#endif
