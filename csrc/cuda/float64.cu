// The kernels for float64 maps.
#include "launch.h"

namespace eca::cuda {

template void run_forward<double>(Forward, const Plan&, const Memory&);
template void run_backward<double>(const Backward&, const Plan&, const Memory&);
template void run_reduce<double>(const Reduce&, const Plan&, const Memory&);
template void run_scale<double>(const Scale&, const Plan&, const Memory&);

}  // namespace eca::cuda
