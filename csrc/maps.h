// What operators on several maps of one shape share: their maps in one layout, coefficients of
// planes and channels.
#pragma once

#include <optional>
#include <sstream>
#include <string>

#include "tensors.h"

namespace eca {

using OptionalTensor = std::optional<Tensor>;

// Whether t has these sizes and lies where x does.
inline bool has_sizes(const Tensor& t, const Tensor& x, const Sizes& sizes) {
  bool same = t.dim() == int64_t(sizes.size()) && device_of(t) == device_of(x);
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == sizes[i];
  return same;
}

inline std::string listed(const Sizes& sizes) {
  std::ostringstream text;
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  return text.str();
}

inline void check_coefficients(const Tensor& t, const char* name, const Tensor& x,
                               const Sizes& sizes) {
  if (has_sizes(t, x, sizes) && dtype_code(t) == accumulator_code(x) && t.is_contiguous()) return;
  check(false, "expected ", name, " contiguous, of shape (", listed(sizes), "), ",
        dtype{accumulator_code(x)}, ", on ", device_of(x), ", got ", shape{t}, ", ",
        dtype{dtype_code(t)}, ", on ", device_of(t));
}

// The k-th of some rows of `size` coefficients.
inline const void* row_of(const Tensor& t, int64_t k, int64_t size) {
  return static_cast<const char*>(t.data_ptr()) + k * size * t.element_size();
}

// Maps of one shape in one layout, copied where they cannot be read in it.
struct Maps {
  Problem problem;
  View view;
  Tensor x;
  OptionalTensor identity, dy;

  Maps(const Tensor& given_x, const OptionalTensor& given_identity, const OptionalTensor& given_dy,
       const Problem& p)
      : problem(p), view(view_of(given_x, p)), x(given_x) {
    problem.layout = view.layout;
    if (given_identity)
      check_same(*given_identity, "identity", given_x, given_x.dim(), dtype_code(given_x),
                 "both are added");
    if (given_dy) check_dy(*given_dy, given_x);
    if (is_empty()) return;
    x = in_layout(given_x);
    if (given_identity) identity = in_layout(*given_identity);
    if (given_dy) dy = in_layout(*given_dy);
  }
  bool is_empty() const { return problem.samples * problem.channels * problem.pixels == 0; }
  Tensor in_layout(const Tensor& t) const {
    return readable(t, view_of(t, problem), problem.layout);
  }
  Map of(const Tensor& t) const { return map_of(t, problem); }
  Map of(const OptionalTensor& t) const { return t ? map_of(*t, problem) : Map{nullptr, 0, 0}; }
};

inline Tensor empty_doubles(const Tensor& x, int64_t kinds) {
  const int64_t N = x.size(0), C = x.size(1);
  const int64_t sizes[] = {kinds, N, C}, strides[] = {N * C, C, 1};
  return empty(x, sizes, strides, 3, kFloat64Code);
}

inline Tensor zeroed(Tensor t) { return torch::stable::zero_(t); }

}  // namespace eca
