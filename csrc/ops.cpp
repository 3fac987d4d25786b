// The operators torch.ops.eca_fused.*: schema, validation, allocation, dispatch to the kernels.
// Torch types stop here.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/cpu.h"
#include "eca.h"
#include "gpu.h"
#include "stable_abi.h"

namespace eca {
namespace {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// ---- validation ----

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  ((message << parts), ...);
  throw std::runtime_error("eca_fused: " + message.str());
}

// Prints a shape, or the first `dims` sizes of it, where a message needs it.
struct shape {
  const Tensor& tensor;
  int64_t dims = -1;
};

std::ostream& operator<<(std::ostream& out, shape s) {
  const int64_t dims = s.dims < 0 ? s.tensor.dim() : s.dims;
  out << "(";
  for (int64_t i = 0; i < dims; ++i) out << (i ? ", " : "") << s.tensor.size(i);
  return out << (dims == 1 ? ",)" : ")");
}

// dtypes and devices as torch's integers: a comparison costs one call. With the enums of the stable
// headers it costs one for each of their values.
int32_t dtype_code(const Tensor& t) {
  int32_t code = 0;
  ECA_TORCH_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

struct Device {
  int32_t type = 0, index = 0;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

Device device_of(const Tensor& t) {
  Device device;
  ECA_TORCH_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
  ECA_TORCH_CHECK(aoti_torch_get_device_index(t.get(), &device.index));
  return device;
}

const int32_t kCudaType = aoti_torch_device_type_cuda();
const int32_t kFloat32Code = aoti_torch_dtype_float32(), kFloat64Code = aoti_torch_dtype_float64(),
              kFloat16Code = aoti_torch_dtype_float16(),
              kBFloat16Code = aoti_torch_dtype_bfloat16();

// Prints a dtype or a device as Python does, where a message needs it.
struct dtype {
  int32_t code;
};

std::ostream& operator<<(std::ostream& out, dtype d) {
  static const std::map<int32_t, const char*> names = {
      {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
      {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
      {kFloat16Code, "float16"},
      {kBFloat16Code, "bfloat16"},
      {kFloat32Code, "float32"},
      {kFloat64Code, "float64"}};
  const auto found = names.find(d.code);
  if (found == names.end()) return out << "dtype number " << d.code;
  return out << "torch." << found->second;
}

std::ostream& operator<<(std::ostream& out, Device d) {
  if (d.type == kCudaType) return out << "cuda:" << d.index;
  if (d.type == aoti_torch_device_type_cpu()) return out << "cpu";
  return out << "device type " << d.type;
}

// The messages below are those of ops/checks.py, for callers that skip eca().
Dtype dtype_of(const Tensor& t, const char* name) {
  const int32_t code = dtype_code(t);
  if (code == kFloat32Code) return Dtype::kFloat32;
  if (code == kFloat64Code) return Dtype::kFloat64;
  if (code == kFloat16Code) return Dtype::kFloat16;
  check(code == kBFloat16Code, "expected ", name,
        " of dtype float32, float64, float16 or bfloat16, got ", dtype{code},
        "; convert it, for example with ", name, ".float()");
  return Dtype::kBFloat16;
}

// The dtype of mean and gate.
int32_t accumulator_code(const Tensor& x) {
  return dtype_code(x) == kFloat64Code ? kFloat64Code : kFloat32Code;
}

// The problem of a map alone, with one tap that nothing reads.
Problem problem_of(const Tensor& x) {
  check(x.dim() >= 2 && x.dim() <= 5,
        "expected x of shape (N, C, *spatial) with 0 to 3 spatial dimensions, got ", shape{x},
        "; add or merge dimensions with reshape()");
  int64_t pixels = 1;
  for (int64_t i = 2; i < x.dim(); ++i) pixels *= x.size(i);
  return {dtype_of(x, "x"),
          Layout::kPlanes,
          x.size(0),
          x.size(1),
          pixels,
          Dtype::kFloat32,
          1,
          false,
          false};
}

Problem problem_of(const Tensor& x, const Tensor& weight, bool circular) {
  Problem p = problem_of(x);
  const int64_t C = p.channels;
  check(weight.dim() == 3 && weight.size(1) == 1 && (weight.size(0) == 1 || weight.size(0) == C),
        "expected taps of shape (1, 1, k), or (C, 1, k) = (", C,
        ", 1, k) for separate taps per channel, got ", shape{weight},
        "; bring them to one of these with reshape()");
  const int64_t k = weight.size(2);
  check(k % 2 == 1, "expected an odd number of taps k, got ", k, " in a weight of shape ",
        shape{weight}, ": the kernel is centred on its channel; use ", k + 1);
  const int32_t x_code = dtype_code(x), code = dtype_code(weight);
  if (code != kFloat32Code && code != x_code) {
    std::ostringstream own;
    if (x_code != kFloat32Code) own << " or " << dtype{x_code} << ", the dtype of x";
    check(false, "expected taps of dtype torch.float32", own.str(), ", got ", dtype{code},
          "; convert them, for example with layer.to(x.dtype)");
  }
  if (!(device_of(weight) == device_of(x)))
    check(false, "expected the taps on the device of x, ", device_of(x), ", got ",
          device_of(weight), "; move them, for example with layer.to(x.device)");
  check(!circular || k / 2 <= C, "circular padding would wrap around more than once: k = ", k,
        " needs ", k / 2, " channels or more, x has ", C,
        "; use fewer taps or padding_mode='zeros'");
  p.taps_dtype = code == kFloat32Code ? Dtype::kFloat32 : p.dtype;
  p.kernel_size = k;
  p.taps_per_channel = weight.size(0) != 1;
  p.circular = circular;
  return p;
}

bool has_first_sizes(const Tensor& t, const Tensor& x, int64_t dims) {
  bool same = t.dim() == dims;
  for (int64_t i = 0; same && i < dims; ++i) same = t.size(i) == x.size(i);
  return same;
}

// A gradient of y, or what the forward operator returned for x: (N, C) or the shape of x.
void check_same(const Tensor& t, const char* name, const Tensor& x, int64_t dims, int32_t code,
                const char* advice) {
  const bool same = has_first_sizes(t, x, dims) && dtype_code(t) == code;
  if (same && device_of(t) == device_of(x)) return;
  check(false, "expected ", name, " of shape ", shape{x, dims}, ", ", dtype{code}, ", on ",
        device_of(x), ", got ", shape{t}, ", ", dtype{dtype_code(t)}, ", on ", device_of(t), "; ",
        advice);
}

void check_dy(const Tensor& dy, const Tensor& x) {
  check_same(dy, "dy", x, x.dim(), dtype_code(x), "the gradient of a result is like the result");
}

void check_saved(const Tensor& t, const char* name, const Tensor& x) {
  check_same(t, name, x, 2, accumulator_code(x), "take what the forward operator returned for x");
}

void check_out(const Tensor& out, const char* name, const Tensor& x) {
  if (!has_first_sizes(out, x, x.dim()) || !(device_of(out) == device_of(x)))
    check(false, "expected ", name, " of the shape and on the device of x, ", shape{x}, " on ",
          device_of(x), ", got ", shape{out}, " on ", device_of(out),
          "; make it with torch.empty_like(x)");
  if (dtype_code(out) != dtype_code(x))
    check(false, "expected ", name, " of ", dtype{dtype_code(x)}, ", the dtype of x, got ",
          dtype{dtype_code(out)}, "; make it with torch.empty_like(x)");
}

// gate or shift (N, C)
void check_gate(const Tensor& t, const char* name, const Tensor& x) {
  check(has_first_sizes(t, x, 2), "expected a ", name, " of shape (N, C) = ", shape{x, 2},
        " for x ", shape{x}, ", got ", shape{t}, "; bring it to that with flatten(1) or expand()");
  dtype_of(t, name);
  if (!(device_of(t) == device_of(x)))
    check(false, "expected the ", name, " on the device of x, ", device_of(x), ", got ",
          device_of(t), "; move it with ", name, ".to(x.device)");
}

// ---- layouts; ops/results.py has the same rules, for the strides that fake tensors report ----

// How the kernels see a tensor, if they can read it in place.
struct View {
  bool readable;
  bool dense;
  Layout layout;  // of the copy, if it is not readable
  int64_t sample_stride;
  int64_t row_stride;
};

// Whether the memory begins at a multiple of an element's size. A view of raw bytes may not. The
// kernels would fault on it, on a GPU and in vector stores on a CPU, so they get a copy.
bool aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % uintptr_t(t.element_size()) == 0;
}

View view_by_strides(const Tensor& x, const Problem& p) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t C = p.channels, S = p.pixels;
  int64_t pixel_stride = -1, run = 0;
  bool even = true;  // the pixels lie at equal distances, in their order
  for (int64_t i = x.dim(); i-- > 2;) {
    if (sizes[i] == 1) continue;
    if (pixel_stride < 0) pixel_stride = strides[i];
    else even = even && strides[i] == run;
    run = strides[i] * sizes[i];
  }
  if (pixel_stride < 0) pixel_stride = C;  // one pixel
  const int64_t sample = p.samples == 1 ? C * S : strides[0];
  const bool channels_inside = strides[1] == 1 && (S == 1 || C > 1);
  if (channels_inside && even && pixel_stride >= C)
    return {true, pixel_stride == C && sample == C * S, Layout::kPixels, sample, pixel_stride};
  if (even && (S == 1 || pixel_stride == 1)) {
    const int64_t row = C == 1 ? S : strides[1];
    return {true, row == S && sample == C * S, Layout::kPlanes, sample, row};
  }
  return {false, false, channels_inside ? Layout::kPixels : Layout::kPlanes, 0, 0};
}

View view_of(const Tensor& x, const Problem& p) {
  View view = view_by_strides(x, p);
  view.readable = view.readable && aligned(x);
  return view;
}

Sizes dense_strides(const Tensor& x, Layout layout) {
  const bool channels_inside = layout == Layout::kPixels;
  Sizes strides(x.dim());
  int64_t run = 1;
  if (channels_inside) strides[1] = 1, run = x.size(1);
  for (int64_t i = x.dim(); i-- > 2; run *= x.size(i)) strides[i] = run;
  if (!channels_inside) strides[1] = run, run *= x.size(1);
  strides[0] = run;
  return strides;
}

Tensor empty(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dims,
             int32_t dtype) {
  const Device device = device_of(like);
  AtenTensorHandle handle = nullptr;
  ECA_TORCH_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device.type, device.index, &handle));
  return Tensor(handle);
}

Tensor empty_map(const Tensor& x, const Sizes& strides) {
  return empty(x, x.sizes().data(), strides.data(), x.dim(), dtype_code(x));
}

// A new tensor for a result that looks like x: the strides of x where x is dense.
Tensor empty_output(const Tensor& x, const View& view, const Problem& p) {
  if (view.dense) return empty(x, x.sizes().data(), x.strides().data(), x.dim(), dtype_code(x));
  return empty_map(x, dense_strides(x, p.pixels == 1 ? Layout::kPlanes : view.layout));
}

// (samples, channels)
Tensor empty_channels(const Tensor& x, int32_t dtype) {
  const int64_t sizes[] = {x.size(0), x.size(1)}, strides[] = {x.size(1), 1};
  return empty(x, sizes, strides, 2, dtype);
}

Tensor empty_channels(const Tensor& x) { return empty_channels(x, accumulator_code(x)); }

Tensor empty_unused(const Tensor& like) {
  const int64_t size = 0, stride = 1;
  return empty(like, &size, &stride, 1, dtype_code(like));
}

Tensor dense_copy(const Tensor& x, Layout layout) {
  Tensor copy = empty_map(x, dense_strides(x, layout));
  torch::stable::copy_(copy, x);
  return copy;
}

// x itself where the kernels can read it in this layout, else a copy.
Tensor readable(const Tensor& x, const View& view, Layout layout) {
  return view.readable && view.layout == layout ? x : dense_copy(x, layout);
}

// Asking first saves a call through the dispatcher.
Tensor as_contiguous(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::contiguous(t);
  return aligned(t) ? t : dense_copy(t, Layout::kPlanes);
}

// A tensor (samples, channels), contiguous and in this dtype.
Tensor channels_in(const Tensor& t, int32_t dtype) {
  if (dtype_code(t) == dtype) return as_contiguous(t);
  Tensor copy = empty_channels(t, dtype);
  torch::stable::copy_(copy, t);
  return copy;
}

// A tensor that can be read in p.layout, as a map. Its own view may have the other layout: with one
// pixel or one channel, both fit.
Map map_of(const Tensor& x, const Problem& p) {
  const auto sizes = x.sizes(), strides = x.strides();
  const bool planes = p.layout == Layout::kPlanes;
  int64_t row = planes ? (p.channels == 1 ? p.pixels : strides[1]) : p.channels;
  for (int64_t i = 2; !planes && i < x.dim(); ++i)
    if (sizes[i] != 1) row = strides[i];
  return {x.data_ptr(), p.samples == 1 ? p.channels * p.pixels : strides[0], row};
}

// ---- the operators ----
// x, y, dy, dx, out (N, C, *spatial); weight, dweight (1 or C, 1, k); mean, gate, shift (N, C)

const cpu::ThreadPool& thread_pool() {
  // Per thread, because the number of threads is a setting of the calling thread.
  static thread_local cpu::ThreadPool pool;
  pool.threads = torch::stable::get_num_threads();
  pool.run = [](int64_t begin, int64_t end, int64_t grain, cpu::ThreadPool::Body body,
                void* context) {
    if (end - begin <= grain || pool.threads == 1) {
      if (begin < end) body(begin, end, context);
      return;
    }
    ECA_TORCH_CHECK(torch_parallel_for(begin, end, grain, body, context));
  };
  return pool;
}

// Runs work that the C++ library allocates memory for: the library's own error says nothing.
template <class Work>
void on_cpu(const Work& work) {
  bool enough = true;
  try {
    work();
  } catch (const std::bad_alloc&) {
    enough = false;
  }
  check(enough, "can't allocate memory for the sums and gates of x; use a smaller batch");
}

// The kernels for the device. On CUDA, mean and gate may be null.
void run_kernels(const Forward& f, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return gpu::forward(f, device.index);
#endif
  on_cpu([&] { cpu::kernels().forward(f, thread_pool()); });
}

void run_kernels(const Backward& b, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return gpu::backward(b, device.index);
#endif
  on_cpu([&] { cpu::kernels().backward(b, thread_pool()); });
}

void run_kernels(const Reduce& r, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return gpu::reduce(r, device.index);
#endif
  on_cpu([&] { cpu::kernels().reduce(r, thread_pool()); });
}

void run_kernels(const Scale& s, const Device& device) {
#if defined(ECA_FUSED_WITH_CUDA)
  if (device.type == kCudaType) return gpu::scale(s, device.index);
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
  const Tensor taps = as_contiguous(weight), means = as_contiguous(mean),
               gates = as_contiguous(gate);
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

STABLE_TORCH_LIBRARY(eca_fused, m) {
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

STABLE_TORCH_LIBRARY_IMPL(eca_fused, CPU, m) { implement(m); }

#if defined(ECA_FUSED_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(eca_fused, CUDA, m) { implement(m); }
#endif
