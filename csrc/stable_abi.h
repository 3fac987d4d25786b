// PyTorch's stable ABI under one name in every torch that the build accepts.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

// A call of the C interface that throws where it fails. torch 2.13 and later put torch's own text
// into the message; 2.11 and 2.12 have the check without it, under the older name.
#if defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define ECA_TORCH_CHECK(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define ECA_TORCH_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
