// The kernels of residual tails with ECA's gate for bfloat16 maps.
#include "block_tail_launch.h"

namespace eca::cuda {

template void run_block_tail<bfloat16>(const BlockTail&, const Plan&, const Memory&);
template void run_block_tail_backward<bfloat16>(const BlockTailBackward&, const Plan&,
                                                const Memory&);

}  // namespace eca::cuda
