// The kernels of residual tails for float16 maps.
#include "tail_launch.h"

namespace eca::cuda {

template void run_tail<half>(const eca::Tail&, const TailPlan&, const Memory&);
template void run_tail_gradients<half>(const TailGradients&, const TailPlan&, const Memory&);
template void run_moments<half>(const eca::Moments&, const TailSumPlan&, const Memory&);
template void run_tail_sums<half>(const TailSums&, const TailSumPlan&, const Memory&);

}  // namespace eca::cuda
