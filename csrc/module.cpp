// The Python module eca_fused._C: the planner. It needs neither torch nor the kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "plan.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

py::dict gpu_by_name(const std::string& name) {
  const eca::Gpu gpu = eca::gpu_by_name(name);
  return py::dict("capability"_a = gpu.capability, "multiprocessors"_a = gpu.multiprocessors,
                  "shared_per_block"_a = gpu.shared_per_block,
                  "shared_per_multiprocessor"_a = gpu.shared_per_multiprocessor, "l2"_a = gpu.l2,
                  "threads_per_multiprocessor"_a = gpu.threads_per_multiprocessor);
}

eca::Dtype dtype_by_name(const std::string& name) {
  if (name == "float32") return eca::Dtype::kFloat32;
  if (name == "float64") return eca::Dtype::kFloat64;
  if (name == "float16") return eca::Dtype::kFloat16;
  if (name == "bfloat16") return eca::Dtype::kBFloat16;
  throw std::invalid_argument("expected a dtype as float32, float64, float16 or bfloat16, got " +
                              name);
}

// From keyword arguments as native.force_plan() takes them.
eca::Forced to_forced(const py::dict& d) {
  const auto number = [&](const char* name, int32_t otherwise) {
    return d.contains(name) ? d[name].cast<int32_t>() : otherwise;
  };
  return {eca::strategy_by_name(d["strategy"].cast<std::string>()), number("tile", 0),
          number("threads", eca::Forced{}.threads), number("depth", 0)};
}

py::dict plan(bool backward, const std::string& dtype, bool channels_last, int64_t samples,
              int64_t channels, int64_t pixels, int64_t kernel_size, bool own_taps, bool circular,
              bool aligned, bool in_place, const py::dict& g,
              const std::optional<py::dict>& forced) {
  eca::Problem p{};
  p.dtype = p.taps_dtype = dtype_by_name(dtype);
  p.layout = channels_last ? eca::Layout::kPixels : eca::Layout::kPlanes;
  p.samples = samples, p.channels = channels, p.pixels = pixels;
  p.kernel_size = kernel_size, p.taps_per_channel = own_taps, p.circular = circular;
  eca::Gpu gpu{};
  gpu.capability = g["capability"].cast<int32_t>();
  gpu.multiprocessors = g["multiprocessors"].cast<int32_t>();
  gpu.shared_per_block = g["shared_per_block"].cast<int64_t>();
  gpu.shared_per_multiprocessor = g["shared_per_multiprocessor"].cast<int64_t>();
  gpu.l2 = g["l2"].cast<int64_t>();
  gpu.threads_per_multiprocessor = g["threads_per_multiprocessor"].cast<int32_t>();
  eca::Access access = eca::dense_access(p);
  if (!aligned) access.width = eca::size_of(p.dtype);
  access.samples_aligned = access.samples_aligned && aligned;
  access.sources_aligned = access.samples_aligned;
  access.in_place = in_place;
  const eca::Forced asked = forced ? to_forced(*forced) : eca::Forced{};
  const eca::Plan plan = eca::make_plan(p, backward ? eca::Pass::kBackward : eca::Pass::kForward,
                                        access, gpu, forced ? &asked : nullptr);
  const eca::Tiling& t = plan.tiling;
  return py::dict("strategy"_a = eca::strategy_name(plan.strategy), "vectors"_a = t.vectors,
                  "tile"_a = t.tile, "halo"_a = t.halo, "tiles"_a = t.tiles, "chunk"_a = t.chunk,
                  "parts"_a = t.parts, "threads"_a = t.threads, "depth"_a = t.depth,
                  "spare"_a = t.spare, "blocks"_a = plan.blocks, "launches"_a = plan.launches,
                  "shared_bytes"_a = plan.shared_bytes, "occupancy"_a = plan.occupancy,
                  "workspace_bytes"_a = plan.workspace, "map_bytes"_a = plan.map_bytes,
                  "dram_bytes"_a = plan.dram_bytes, "l2_bytes"_a = plan.l2_bytes,
                  "instructions"_a = plan.instructions);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The planner of eca_fused's CUDA kernels.";
  m.def("gpu_by_name", &gpu_by_name, "The limits of a GPU such as sm_90:132.");
  m.def("plan", &plan, py::kw_only(), "backward"_a, "dtype"_a, "channels_last"_a, "samples"_a,
        "channels"_a, "pixels"_a, "kernel_size"_a, "own_taps"_a, "circular"_a, "aligned"_a,
        "in_place"_a, "gpu"_a, "forced"_a = py::none(),
        "How the CUDA kernels run a problem on a GPU, and what that moves. With forced, a dict of "
        "native.force_plan()'s arguments: how they would run that plan.");
}
