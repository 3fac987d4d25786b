// The kernels for float16 maps.
#include "launch.h"

namespace eca::cuda {

template void run_forward<half>(Forward, const Plan&, const Memory&);
template void run_backward<half>(const Backward&, const Plan&, const Memory&);
template void run_reduce<half>(const Reduce&, const Plan&, const Memory&);
template void run_scale<half>(const Scale&, const Plan&, const Memory&);

}  // namespace eca::cuda
