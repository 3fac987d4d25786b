// The kernels of residual tails with ECA's gate for float16 maps.
#include "block_tail_launch.h"

namespace eca::cuda {

template void run_block_tail<half>(const BlockTail&, const Plan&, const Memory&);
template void run_block_tail_backward<half>(const BlockTailBackward&, const Plan&, const Memory&);

}  // namespace eca::cuda
