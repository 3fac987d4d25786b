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

// ---- the tail of a residual block ----
//
// y = act(v),  v = p * (x - centre) + q + identity_scale * (identity - identity_centre)
//
// Batch norms, a gate and a factor of each sample all end up in these coefficients. The centres are
// the batch norms' means: sums about them lose no digits, however far the means are from zero.

// A tail has the first four.
enum class Activation { kNone, kRelu, kSilu, kGelu, kHardSwish };

// Each is float, or double for float64 maps.
struct TailCoefficients {
  const void* p;                // (samples, channels)
  const void* q;                // (samples, channels)
  const void* centre;           // (channels)
  const void* identity_scale;   // (channels)
  const void* identity_centre;  // (channels)
};

// ReLU's gradient needs one bit of each element: whether v > 0, or v is NaN. Each row of a map, a
// plane or a pixel, begins with a new byte, and bit j of byte i is for element 8 i + j of the row.
inline int64_t mask_row_bytes(const Problem& p) {
  return ((p.layout == Layout::kPlanes ? p.pixels : p.channels) + 7) / 8;
}

// The mean and the sum of the squared distances from it, of each plane.
struct Moments {
  Problem problem;  // without taps
  Map x;            // (samples, channels, pixels)
  double* mean;     // (samples, channels), written
  double* squares;  // (samples, channels), written
};

struct Tail {
  Problem problem;  // without taps
  Activation activation;
  TailCoefficients coefficients;
  Map x;          // (samples, channels, pixels)
  Map identity;   // (samples, channels, pixels), or a null pointer
  Map y;          // (samples, channels, pixels), written
  uint8_t* mask;  // rows of mask_row_bytes(), written, or null
};

// With g = dy * act'(v), the sums over the pixels of g, g * (x - centre) and
// g * (identity - identity_centre).
struct TailSums {
  Problem problem;  // without taps
  Activation activation;
  TailCoefficients coefficients;
  Map dy;               // (samples, channels, pixels)
  Map x;                // (samples, channels, pixels)
  Map identity;         // (samples, channels, pixels), or a null pointer
  const uint8_t* mask;  // of the forward pass; read for ReLU
  double* sums;         // (2, or 3 with an identity norm, samples, channels), written
  bool identity_sum;    // whether the third is asked for
};

// dx = p * g + q * (x - centre) + r, and the same for the identity with its own coefficients.
struct TailGradients {
  Problem problem;  // without taps
  Activation activation;
  TailCoefficients coefficients;
  Map dy;                  // (samples, channels, pixels)
  Map x;                   // (samples, channels, pixels)
  Map identity;            // (samples, channels, pixels), or a null pointer
  const uint8_t* mask;     // of the forward pass; read for ReLU
  Map dx;                  // (samples, channels, pixels), written, or a null pointer
  Map d_identity;          // (samples, channels, pixels), written, or a null pointer
  const void* p;           // (samples, channels)
  const void* q;           // (channels), or null for zero, and x is not read
  const void* r;           // (samples, channels)
  const void* identity_p;  // (channels)
  const void* identity_q;  // (channels), or null for zero, and the identity is not read
  const void* identity_r;  // (channels), or null with identity_q
};

// The tail with ECA's gate and no statistics of the batch, in one pass:
//
// u = alpha * (x - centre) + beta,  gate = sigmoid(conv(mean(u))),
// v = gate * scale * u + shift + identity_scale * (identity - identity_centre)
struct BlockTail {
  Problem problem;  // with taps
  Activation activation;
  const void* weight;     // (1 or channels, k)
  const void* scale;      // (samples), or null for 1; this and the next three float or double
  const void* alpha;      // (channels)
  const void* beta;       // (channels)
  const void* shift;      // (channels)
  TailCoefficients rest;  // without p and q
  Map x;                  // (samples, channels, pixels)
  Map identity;           // (samples, channels, pixels), or a null pointer
  Map y;                  // (samples, channels, pixels), written
  uint8_t* mask;          // rows of mask_row_bytes(), written, or null
  void* distance;         // (samples, channels), the mean of x - centre, written
  void* gate;             // (samples, channels), written
};

// Its gradients; d_identity = identity_scale * g. The sums are those of TailSums. The gates and, where
// channels are whole vectors, the centres begin at a multiple of 16 bytes.
struct BlockTailBackward {
  BlockTail forward;  // y is not read
  Map dy;             // (samples, channels, pixels)
  Map dx;             // (samples, channels, pixels), written, or a null pointer
  Map d_identity;     // (samples, channels, pixels), written, or a null pointer
  double* sums;       // (2, or 3 where the identity's is asked for, samples, channels), written
  bool identity_sum;
  void* dmean;    // (samples, channels) of the loss for mean, written
  void* dweight;  // (1 or channels, k), written, or null
};

// ---- attention after the activation ----
//
// z = act(v),  v = p * (x - centre) + q,  y = gate * z
//
// p, q and centre are a batch norm. z is never stored: each pass computes it from x.

struct Activated {
  Problem problem;  // with taps for GatedBlock alone
  Activation activation;
  const void* p;       // (channels), this and the next two float, or double for float64 maps
  const void* q;       // (channels)
  const void* centre;  // (channels)
  Map x;               // (samples, channels, pixels)
};

// The sums over the pixels of z or, with dy, of dy * z. A norm's gradients need four more, with
// g = dy * act'(v): those of g, g * (x - centre), act'(v) and act'(v) * (x - centre).
struct ActivatedSums {
  Activated of;
  Map dy;         // (samples, channels, pixels), or a null pointer
  bool for_norm;  // whether the four are asked for
  double* sums;   // (1 or 5, samples, channels), written
};

struct Gated {
  Activated of;
  const void* gate;  // (samples, channels), of the type of p
  Map y;             // (samples, channels, pixels), written
};

// dx = p * (gate * dy + shift) * act'(v) + slope * (x - centre) + offset
struct GatedGradients {
  Activated of;
  Map dy;              // (samples, channels, pixels)
  const void* gate;    // (samples, channels)
  const void* shift;   // (samples, channels), of the loss for z through the gates
  const void* slope;   // (channels), or null for zero
  const void* offset;  // (channels), or null with slope
  Map dx;              // (samples, channels, pixels), written
};

// The same as Gated with ECA's gate, sigmoid(conv(mean(z))), in one pass.
struct GatedBlock {
  Activated of;
  const void* weight;  // (1 or channels, k)
  Map y;               // (samples, channels, pixels), written
  void* mean;          // (samples, channels) of z, written
  void* gate;          // (samples, channels), written
};

}  // namespace eca
