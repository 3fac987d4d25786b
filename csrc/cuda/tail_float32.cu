// The kernels of residual tails for float32 maps.
#include "tail_launch.h"

namespace eca::cuda {

template void run_tail<float>(const eca::Tail&, const TailPlan&, const Memory&);
template void run_tail_gradients<float>(const TailGradients&, const TailPlan&, const Memory&);
template void run_moments<float>(const eca::Moments&, const TailSumPlan&, const Memory&);
template void run_tail_sums<float>(const TailSums&, const TailSumPlan&, const Memory&);

}  // namespace eca::cuda
