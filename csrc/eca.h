// The contract between the operator layer (ops.cpp) and the kernels (cpu/ and cuda/):
// plain structs and raw pointers, no torch type.
//
// A feature map has `samples` samples, each a set of rows of consecutive elements:
//   planes (contiguous, NCHW): one row per channel, `pixels` elements long
//   pixels (channels_last, NHWC): one row per pixel, `channels` elements long
// Slices of a batch or of the channels only change the strides, so they are read in place.
#pragma once

#include <cstdint>

namespace eca {

enum class Dtype { kFloat32, kFloat64, kFloat16, kBFloat16 };

enum class Layout { kPlanes, kPixels };

struct Problem {
  Dtype dtype;    // of the feature maps
  Layout layout;  // of the feature maps, all of them
  int64_t samples;
  int64_t channels;
  int64_t pixels;
  Dtype taps_dtype;       // of weight and dweight: kFloat32, kFloat64 or `dtype`
  int64_t kernel_size;    // k, odd
  bool taps_per_channel;  // weight is (channels, k) instead of (1, k)
  bool circular;          // wrap around at the first and last channel instead of padding with zeros
};

// Strides count elements. row_stride is that of a channel (planes) or of a pixel (pixels).
struct Map {
  void* data;
  int64_t sample_stride;
  int64_t row_stride;
};

// y = sigmoid(conv(mean(x))) * x. mean and gate are float, or double for float64 maps.
// x and y may be the same memory.
struct Forward {
  Problem problem;
  Map x;               // (samples, channels, pixels)
  Map y;               // (samples, channels, pixels)
  const void* weight;  // (1 or channels, k)
  void* mean;          // (samples, channels), written
  void* gate;          // (samples, channels), written
};

// Gradients for x and the taps; a null dx.data or dweight skips that gradient.
struct Backward {
  Problem problem;
  Map dy;              // (samples, channels, pixels)
  Map x;               // (samples, channels, pixels)
  Map dx;              // (samples, channels, pixels), written
  const void* weight;  // (1 or channels, k)
  const void* mean;    // (samples, channels), from the forward pass
  const void* gate;    // (samples, channels), from the forward pass
  void* dweight;       // (1 or channels, k), written
};

// Sums over the pixels: the means of x or, with dy, dgate = sum(dy * x). A rescaling's backward
// also needs dx = gate * dy, which is written while dy is at hand; a null dx.data skips it.
struct Reduce {
  Problem problem;   // without taps
  Map x;             // (samples, channels, pixels)
  Map dy;            // (samples, channels, pixels), or a null pointer
  Map dx;            // (samples, channels, pixels), written
  const void* gate;  // (samples, channels), read where dx is written
  void* result;      // (samples, channels), written; float, or double for float64 maps, as gate
};

// y = gate * x, plus shift unless that is null.
struct Scale {
  Problem problem;    // without taps
  Map x;              // (samples, channels, pixels)
  Map y;              // (samples, channels, pixels), written
  const void* gate;   // (samples, channels), float, or double for float64 maps
  const void* shift;  // (samples, channels), likewise
};

}  // namespace eca
