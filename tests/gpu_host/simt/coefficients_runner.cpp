// Runs the CUDA kernels of the arithmetic between the passes on the host, for
// tests/helpers/gpu_host_coefficients.py. Every buffer has exactly the size that the kernels may
// touch, and what they write starts as NaN.
#include <memory>
#include <stdexcept>

#include "../../../csrc/cuda/cuda.h"
#include "requests.h"

using namespace eca;

namespace {

enum Operation : int64_t { kStatistics, kCoefficients, kTotals, kGradientCoefficients };

// The fields of tests/helpers/gpu_host_coefficients.py's request, in its order. Then come so many
// inputs and outputs, each as its dtype and bytes; inputs with their content.
struct Request {
  int64_t operation;  // an Operation
  int64_t dtype, samples, channels, pixels, taps_dtype, kernel_size, own_taps, circular;
  int64_t identity_sum, seed, inputs, outputs;
  double eps, identity_eps, values, identity_values;
};

struct Part {
  int64_t dtype, bytes;
};

// The tensors of a request; those of no bytes are absent.
class Tensors {
 public:
  Tensors(int64_t count, bool given) {
    for (int64_t i = 0; i < count; ++i) {
      Part part;
      read_all(&part, sizeof part);
      dtypes_.push_back(Dtype(part.dtype));
      const std::string name = (given ? "input " : "output ") + std::to_string(i);
      names_.push_back(std::make_unique<std::string>(name));
      buffers_.push_back(part.bytes ? std::make_unique<Buffer>(names_.back()->c_str(), part.bytes)
                                    : nullptr);
      if (given && buffers_.back()) buffers_.back()->read();
    }
  }
  Values values(int i) const { return {data(i), dtypes_[i]}; }
  template <class A = void>
  A* data(int i) const {
    return buffers_[i] ? reinterpret_cast<A*>(buffers_[i]->data()) : nullptr;
  }
  NormValues norm(int first, double eps) const {
    return {values(first), values(first + 1), values(first + 2), values(first + 3), eps};
  }
  void write() const {
    for (const auto& buffer : buffers_)
      if (buffer) buffer->write();
  }

 private:
  std::vector<Dtype> dtypes_;
  std::vector<std::unique_ptr<std::string>> names_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
};

void compute(const Request& r, const Problem& p, const Tensors& in, const Tensors& out) {
  cuda::Memory memory{nullptr, nullptr, nullptr};
  if (r.operation == kStatistics) {
    Running running{};
    if (r.inputs > 1) running = {in.values(1), in.values(2), out.data(2), out.data(3), r.values};
    cuda::batch_statistics({p.samples, p.channels, p.pixels, in.data<double>(0),
                            out.data<double>(0), out.data<double>(1), running},
                           memory);
  } else if (r.operation == kCoefficients) {
    cuda::coefficients(
        {p, in.norm(4, r.eps), in.norm(8, r.identity_eps), in.data(0), in.values(1), in.values(2),
         in.values(3), out.data(0), out.data(1), out.data(2), out.data(3)},
        memory);
  } else if (r.operation == kTotals) {
    const Totals t{p,           in.norm(6, r.eps),   in.data<double>(0), r.identity_sum != 0,
                   in.data(1),  in.values(2),        in.values(3),       in.values(4),
                   in.data(5),  out.data<double>(0), out.data(1),        out.data(2),
                   out.data(3), out.data(4)};
    Buffer workspace("workspace", cuda::workspace_of(t));
    memory.workspace = workspace.data();
    cuda::totals(t, memory);
  } else {
    cuda::gradient_coefficients(
        {p, in.norm(5, r.eps), in.norm(9, r.identity_eps), in.data<double>(0), in.data<double>(1),
         r.values, r.identity_values, in.values(2), in.values(3), in.values(4), out.data(0),
         out.data(1), out.data(2), out.data(3), out.data(4), out.data(5)},
        memory);
  }
}

bool answer_one() {
  Request r;
  read_all(&r, sizeof r);
  const Problem p{Dtype(r.dtype),      Layout::kPlanes, r.samples,       r.channels,     r.pixels,
                  Dtype(r.taps_dtype), r.kernel_size,   r.own_taps != 0, r.circular != 0};
  simt::settings.seed = uint64_t(r.seed);
  simt::settings.count = false;
  simt::forget_buffers();
  simt::reset_traffic();
  const Tensors in(r.inputs, true), out(r.outputs, false);
  try {
    compute(r, p, in, out);
    write_text("ok");
    out.write();
  } catch (const std::exception& error) {
    write_text(std::string("error: ") + error.what());
  }
  std::fflush(stdout);
  return true;
}

}  // namespace

int main() {
  while (answer_one()) {
  }
}
