// The Python module eca_fused._C: importing it registers the operators of ops.cpp.
#include <pybind11/pybind11.h>

#include "cpu/cpu.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of eca_fused; the operators are torch.ops.eca_fused.*.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["cpu_capability"] = eca::cpu::kernels().name;
#if defined(ECA_FUSED_WITH_CUDA)
        info["cuda"] = true;
#else
        info["cuda"] = false;
#endif
        return info;
      },
      "Instruction set of the CPU kernels in use, and whether CUDA kernels were compiled.");
}
