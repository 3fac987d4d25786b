// The kernels for bfloat16 maps.
#include "launch.h"

namespace eca::cuda {

template void run_forward<bfloat16>(Forward, const Plan&, const Memory&);
template void run_backward<bfloat16>(const Backward&, const Plan&, const Memory&);
template void run_reduce<bfloat16>(const Reduce&, const Plan&, const Memory&);
template void run_scale<bfloat16>(const Scale&, const Plan&, const Memory&);

}  // namespace eca::cuda
