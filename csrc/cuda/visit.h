// From a dtype to the type that stands for it in kernels.
#pragma once

#include <type_traits>

#include "../eca.h"
#include "device.h"

namespace eca::cuda {

// Calls f with a null pointer of the type that stands for the dtype.
template <class F>
void visit(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(static_cast<float*>(nullptr));
    case Dtype::kFloat64: return f(static_cast<double*>(nullptr));
    case Dtype::kFloat16: return f(static_cast<half*>(nullptr));
    case Dtype::kBFloat16: return f(static_cast<bfloat16*>(nullptr));
  }
}

template <class T>
using Pointee = std::remove_pointer_t<T>;

}  // namespace eca::cuda
