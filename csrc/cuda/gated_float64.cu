// The kernels of attention after an activation for float64 maps.
#include "gated_launch.h"

namespace eca::cuda {

template void run_activated_sums<double>(const ActivatedSums&, const TailSumPlan&, const Memory&);
template void run_gated<double>(const Gated&, const TailPlan&, const Memory&);
template void run_gated_gradients<double>(const GatedGradients&, const TailPlan&, const Memory&);

}  // namespace eca::cuda
