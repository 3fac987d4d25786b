// The kernels of attention after an activation for bfloat16 maps.
#include "gated_launch.h"

namespace eca::cuda {

template void run_activated_sums<bfloat16>(const ActivatedSums&, const TailSumPlan&, const Memory&);
template void run_gated<bfloat16>(const Gated&, const TailPlan&, const Memory&);
template void run_gated_gradients<bfloat16>(const GatedGradients&, const TailPlan&, const Memory&);

}  // namespace eca::cuda
