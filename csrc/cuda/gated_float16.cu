// The kernels of attention after an activation for float16 maps.
#include "gated_launch.h"

namespace eca::cuda {

template void run_activated_sums<half>(const ActivatedSums&, const TailSumPlan&, const Memory&);
template void run_gated<half>(const Gated&, const TailPlan&, const Memory&);
template void run_gated_gradients<half>(const GatedGradients&, const TailPlan&, const Memory&);

}  // namespace eca::cuda
