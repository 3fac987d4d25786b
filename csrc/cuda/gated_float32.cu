// The kernels of attention after an activation for float32 maps.
#include "gated_launch.h"

namespace eca::cuda {

template void run_activated_sums<float>(const ActivatedSums&, const TailSumPlan&, const Memory&);
template void run_gated<float>(const Gated&, const TailPlan&, const Memory&);
template void run_gated_gradients<float>(const GatedGradients&, const TailPlan&, const Memory&);

}  // namespace eca::cuda
