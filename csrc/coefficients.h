// The contract for the arithmetic between the passes over a block's maps: numbers of planes and
// channels. The maps' side of it is in eca.h, the formulas are in eca_fused/ops/tail.py, and those
// of the norms' gradients in cpu/coefficients.h.
#pragma once

#include "eca.h"

namespace eca {

// A small contiguous tensor; a null pointer if it is absent.
struct Values {
  const void* data;
  Dtype dtype;
};

// A batch norm: u = gamma * (x - mean) / sqrt(variance + eps) + beta, all (channels). Absent
// without a mean. As the tail computes it, u = alpha * (x - centre) + beta', with a centre that has
// the dtype of the coefficients.
struct NormValues {
  Values mean, variance, gamma, beta;
  double eps;
};

// A batch norm's running statistics (channels), and where they go: there too, or elsewhere. Those
// with a null pointer are not updated.
struct Running {
  Values mean, variance;
  void *new_mean, *new_variance;
  double factor;  // of the batch; that of the old ones is 1 - factor
};

// The mean and variance of a batch from the moments of its planes.
struct BatchStatistics {
  int64_t samples, channels, pixels;
  const double* planes;  // (2, samples, channels), of Moments
  double* mean;          // (channels), written
  double* variance;      // (channels), written: what batch norm divides by
  Running running;
};

// Before the pass of Tail or BlockTail. The problem has the dtype of the maps and the taps. What is
// written is float, or double for float64 maps.
struct Coefficients {
  Problem problem;
  NormValues norm, identity_norm;
  const void* weight;  // (1 or channels, k), or null
  Values means;        // (samples, channels) of x; needed by taps, and for distance
  Values gate;         // (samples, channels), without taps
  Values scale;        // (samples)
  void* planes;        // (2, samples, channels): p and q, written, or null
  void* channels;      // (6, channels): shift, alpha, beta', centre, identity_scale,
                       // identity_centre, written; shift is beta' of the identity's norm
  void* made_gate;     // (samples, channels), written with taps
  void* distance;      // (samples, channels), the mean of x - centre, written, or null
};

// After the pass of TailSums: the gradients of gates, scales and taps, and the sums over channels
// that the norms' gradients are made of. With du for the gradient of u, those of du,
// du * (x - centre), g and g * (identity - identity_centre).
struct Totals {
  Problem problem;
  NormValues norm;
  const double* sums;  // of TailSums
  bool identity_sum;
  const void* weight;    // (1 or channels, k), or null
  Values gate;           // (samples, channels)
  Values scale;          // (samples)
  Values given_dmean;    // (samples, channels), the gradient of mean(u), without taps
  const void* distance;  // (samples, channels), with either
  double* totals;        // (4, channels), written
  void* dgate;           // (samples, channels), written, or null; as gate
  void* dscale;          // (samples), written, or null; as scale
  void* dmean;    // (samples, channels), written with taps; float, or double for float64 maps
  void* dweight;  // (1 or channels, k), written, or null
};

// Before the pass of TailGradients: its coefficients, and the gradients of the norms' parameters.
struct GradientCoefficients {
  Problem problem;
  NormValues norm, identity_norm;
  const double* totals;    // (4, channels) of Totals; null without sums
  const double* shares;    // (4, channels), over all processes and divided by their values, or null
  double values;           // of a channel in the batch; 0 for running statistics
  double identity_values;  // likewise
  Values gate;             // (samples, channels)
  Values scale;            // (samples)
  Values dmean;            // (samples, channels)
  void* planes;            // (2, samples, channels): p and r, written, or null
  void* channels;          // (4, channels): q, and p, q and r of the identity, written, or null
  void* dgamma;            // (channels), written, or null, as its parameter; so are the next
  void* dbeta;
  void* identity_dgamma;
  void* identity_dbeta;
};

}  // namespace eca
