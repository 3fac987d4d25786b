// The kernels of residual tails for bfloat16 maps.
#include "tail_launch.h"

namespace eca::cuda {

template void run_tail<bfloat16>(const eca::Tail&, const TailPlan&, const Memory&);
template void run_tail_gradients<bfloat16>(const TailGradients&, const TailPlan&, const Memory&);
template void run_moments<bfloat16>(const eca::Moments&, const TailSumPlan&, const Memory&);
template void run_tail_sums<bfloat16>(const TailSums&, const TailSumPlan&, const Memory&);

}  // namespace eca::cuda
