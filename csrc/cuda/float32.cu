// The kernels for float32 maps.
#include "launch.h"

namespace eca::cuda {

template void run_forward<float>(Forward, const Plan&, const Memory&);
template void run_backward<float>(const Backward&, const Plan&, const Memory&);
template void run_reduce<float>(const Reduce&, const Plan&, const Memory&);
template void run_scale<float>(const Scale&, const Plan&, const Memory&);

}  // namespace eca::cuda
