// Torch's tensors as the kernels see them: validation, views, allocation.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "eca.h"
#include "stable_abi.h"

namespace eca {

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

inline std::ostream& operator<<(std::ostream& out, shape s) {
  const int64_t dims = s.dims < 0 ? s.tensor.dim() : s.dims;
  out << "(";
  for (int64_t i = 0; i < dims; ++i) out << (i ? ", " : "") << s.tensor.size(i);
  return out << (dims == 1 ? ",)" : ")");
}

// dtypes and devices as torch's integers: a comparison costs one call. With the enums of the stable
// headers it costs one for each of their values.
inline int32_t dtype_code(const Tensor& t) {
  int32_t code = 0;
  ECA_TORCH_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

struct Device {
  int32_t type = 0, index = 0;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

inline Device device_of(const Tensor& t) {
  Device device;
  ECA_TORCH_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
  ECA_TORCH_CHECK(aoti_torch_get_device_index(t.get(), &device.index));
  return device;
}

inline const int32_t kCudaType = aoti_torch_device_type_cuda();
inline const int32_t kFloat32Code = aoti_torch_dtype_float32(),
                     kFloat64Code = aoti_torch_dtype_float64(),
                     kFloat16Code = aoti_torch_dtype_float16(),
                     kBFloat16Code = aoti_torch_dtype_bfloat16();

// Prints a dtype or a device as Python does, where a message needs it.
struct dtype {
  int32_t code;
};

inline std::ostream& operator<<(std::ostream& out, dtype d) {
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

inline std::ostream& operator<<(std::ostream& out, Device d) {
  if (d.type == kCudaType) return out << "cuda:" << d.index;
  if (d.type == aoti_torch_device_type_cpu()) return out << "cpu";
  return out << "device type " << d.type;
}

// The messages below are those of ops/checks.py, for callers that skip eca().
inline Dtype dtype_of(const Tensor& t, const char* name) {
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
inline int32_t accumulator_code(const Tensor& x) {
  return dtype_code(x) == kFloat64Code ? kFloat64Code : kFloat32Code;
}

// The problem of a map alone, with one tap that nothing reads.
inline Problem problem_of(const Tensor& x) {
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

inline Problem problem_of(const Tensor& x, const Tensor& weight, bool circular) {
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

inline bool has_first_sizes(const Tensor& t, const Tensor& x, int64_t dims) {
  bool same = t.dim() == dims;
  for (int64_t i = 0; same && i < dims; ++i) same = t.size(i) == x.size(i);
  return same;
}

// A gradient of y, or what the forward operator returned for x: (N, C) or the shape of x.
inline void check_same(const Tensor& t, const char* name, const Tensor& x, int64_t dims,
                       int32_t code, const char* advice) {
  const bool same = has_first_sizes(t, x, dims) && dtype_code(t) == code;
  if (same && device_of(t) == device_of(x)) return;
  check(false, "expected ", name, " of shape ", shape{x, dims}, ", ", dtype{code}, ", on ",
        device_of(x), ", got ", shape{t}, ", ", dtype{dtype_code(t)}, ", on ", device_of(t), "; ",
        advice);
}

inline void check_dy(const Tensor& dy, const Tensor& x) {
  check_same(dy, "dy", x, x.dim(), dtype_code(x), "the gradient of a result is like the result");
}

inline void check_saved(const Tensor& t, const char* name, const Tensor& x) {
  check_same(t, name, x, 2, accumulator_code(x), "take what the forward operator returned for x");
}

inline void check_out(const Tensor& out, const char* name, const Tensor& x) {
  if (!has_first_sizes(out, x, x.dim()) || !(device_of(out) == device_of(x)))
    check(false, "expected ", name, " of the shape and on the device of x, ", shape{x}, " on ",
          device_of(x), ", got ", shape{out}, " on ", device_of(out),
          "; make it with torch.empty_like(x)");
  if (dtype_code(out) != dtype_code(x))
    check(false, "expected ", name, " of ", dtype{dtype_code(x)}, ", the dtype of x, got ",
          dtype{dtype_code(out)}, "; make it with torch.empty_like(x)");
}

// gate or shift (N, C)
inline void check_gate(const Tensor& t, const char* name, const Tensor& x) {
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
inline bool aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % uintptr_t(t.element_size()) == 0;
}

inline View view_by_strides(const Tensor& x, const Problem& p) {
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

inline View view_of(const Tensor& x, const Problem& p) {
  View view = view_by_strides(x, p);
  view.readable = view.readable && aligned(x);
  return view;
}

inline Sizes dense_strides(const Tensor& x, Layout layout) {
  const bool channels_inside = layout == Layout::kPixels;
  Sizes strides(x.dim());
  int64_t run = 1;
  if (channels_inside) strides[1] = 1, run = x.size(1);
  for (int64_t i = x.dim(); i-- > 2; run *= x.size(i)) strides[i] = run;
  if (!channels_inside) strides[1] = run, run *= x.size(1);
  strides[0] = run;
  return strides;
}

inline Tensor empty(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dims,
                    int32_t dtype) {
  const Device device = device_of(like);
  AtenTensorHandle handle = nullptr;
  ECA_TORCH_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device.type, device.index, &handle));
  return Tensor(handle);
}

inline Tensor empty_map(const Tensor& x, const Sizes& strides) {
  return empty(x, x.sizes().data(), strides.data(), x.dim(), dtype_code(x));
}

// A new tensor for a result that looks like x: the strides of x where x is dense.
inline Tensor empty_output(const Tensor& x, const View& view, const Problem& p) {
  if (view.dense) return empty(x, x.sizes().data(), x.strides().data(), x.dim(), dtype_code(x));
  return empty_map(x, dense_strides(x, p.pixels == 1 ? Layout::kPlanes : view.layout));
}

// (samples, channels)
inline Tensor empty_channels(const Tensor& x, int32_t dtype) {
  const int64_t sizes[] = {x.size(0), x.size(1)}, strides[] = {x.size(1), 1};
  return empty(x, sizes, strides, 2, dtype);
}

inline Tensor empty_channels(const Tensor& x) { return empty_channels(x, accumulator_code(x)); }

inline Tensor empty_unused(const Tensor& like) {
  const int64_t size = 0, stride = 1;
  return empty(like, &size, &stride, 1, dtype_code(like));
}

inline Tensor dense_copy(const Tensor& x, Layout layout) {
  Tensor copy = empty_map(x, dense_strides(x, layout));
  torch::stable::copy_(copy, x);
  return copy;
}

// x itself where the kernels can read it in this layout, else a copy.
inline Tensor readable(const Tensor& x, const View& view, Layout layout) {
  return view.readable && view.layout == layout ? x : dense_copy(x, layout);
}

// Asking first saves a call through the dispatcher.
inline Tensor as_contiguous(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::contiguous(t);
  return aligned(t) ? t : dense_copy(t, Layout::kPlanes);
}

// Contiguous from a multiple of 16 bytes on: CUDA kernels read vectors of it.
inline Tensor in_lines(const Tensor& t) {
  const Tensor found = as_contiguous(t);
  const bool begins = reinterpret_cast<uintptr_t>(found.data_ptr()) % 16 == 0;
  return begins ? found : dense_copy(found, Layout::kPlanes);
}

// A tensor (samples, channels), contiguous and in this dtype.
inline Tensor channels_in(const Tensor& t, int32_t dtype) {
  if (dtype_code(t) == dtype) return as_contiguous(t);
  Tensor copy = empty_channels(t, dtype);
  torch::stable::copy_(copy, t);
  return copy;
}

// A tensor that can be read in p.layout, as a map. Its own view may have the other layout: with one
// pixel or one channel, both fit.
inline Map map_of(const Tensor& x, const Problem& p) {
  const auto sizes = x.sizes(), strides = x.strides();
  const bool planes = p.layout == Layout::kPlanes;
  int64_t row = planes ? (p.channels == 1 ? p.pixels : strides[1]) : p.channels;
  for (int64_t i = 2; !planes && i < x.dim(); ++i)
    if (sizes[i] != 1) row = strides[i];
  return {x.data_ptr(), p.samples == 1 ? p.channels * p.pixels : strides[0], row};
}

}  // namespace eca
