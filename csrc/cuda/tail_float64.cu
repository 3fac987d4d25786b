// The kernels of residual tails for float64 maps.
#include "tail_launch.h"

namespace eca::cuda {

template void run_tail<double>(const eca::Tail&, const TailPlan&, const Memory&);
template void run_tail_gradients<double>(const TailGradients&, const TailPlan&, const Memory&);
template void run_moments<double>(const eca::Moments&, const TailSumPlan&, const Memory&);
template void run_tail_sums<double>(const TailSums&, const TailSumPlan&, const Memory&);

}  // namespace eca::cuda
