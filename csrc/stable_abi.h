// PyTorch's stable ABI under one name in every torch that the build accepts, and the namespace of
// the operators.
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

// The namespace of the operators in torch.ops. A build defines another one if its operators must not
// meet those of other builds in the same process, see tools/hub_layout.py.
#if !defined(ECA_FUSED_NAMESPACE)
#define ECA_FUSED_NAMESPACE eca_fused
#endif

// Torch's macros join the name to others, so a macro in its place has to be replaced before.
#define ECA_REPLACED(macro, ...) macro(__VA_ARGS__)
#define ECA_LIBRARY(m) ECA_REPLACED(STABLE_TORCH_LIBRARY, ECA_FUSED_NAMESPACE, m)
#define ECA_LIBRARY_FRAGMENT(m) ECA_REPLACED(STABLE_TORCH_LIBRARY_FRAGMENT, ECA_FUSED_NAMESPACE, m)
#define ECA_LIBRARY_IMPL(key, m) \
  ECA_REPLACED(STABLE_TORCH_LIBRARY_IMPL, ECA_FUSED_NAMESPACE, key, m)
