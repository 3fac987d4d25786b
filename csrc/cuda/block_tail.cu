// The tail of a residual block with ECA's gate on CUDA: on chip where a plan has it there, else the
// passes of tail.cu with the arithmetic of coefficients.cu between them. Those read x twice forward,
// and backward dy, x and the mask twice.
#include <algorithm>

#include "cuda.h"
#include "visit.h"

namespace eca::cuda {

template <class T>
void run_block_tail(const BlockTail& b, const Plan& plan, const Memory& memory);
template <class T>
void run_block_tail_backward(const BlockTailBackward& b, const Plan& plan, const Memory& memory);

// ---- on chip ----

bool fits_on_chip(const BlockTail& b) { return b.activation <= Activation::kRelu; }

// The identity itself is not read there.
bool fits_on_chip(const BlockTailBackward& b) { return fits_on_chip(b.forward) && !b.identity_sum; }

Access access_of(const BlockTail& b) {
  const Problem& p = b.problem;
  const Access x = access_of(p, b.x);
  return both(b.identity.data ? both(x, access_of(p, b.identity)) : x, access_of(p, b.y));
}

// Of maps that are not wanted, those of another one.
Access access_of(const BlockTailBackward& b) {
  const Problem& p = b.forward.problem;
  Access access = both(access_of(p, b.dy), access_of(p, b.forward.x));
  for (const Map* const written : {&b.dx, &b.d_identity})
    if (written->data) access = both(access, access_of(p, *written));
  return access;
}

void block_tail(const BlockTail& b, const Plan& plan, const Memory& memory) {
  visit(b.problem.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    if constexpr (!std::is_same_v<T, double>) run_block_tail<T>(b, plan, memory);
  });
}

void block_tail_backward(const BlockTailBackward& b, const Plan& plan, const Memory& memory) {
  visit(b.forward.problem.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    if constexpr (!std::is_same_v<T, double>) run_block_tail_backward<T>(b, plan, memory);
  });
}

// ---- in passes ----

namespace {

// What lies between the passes: numbers of planes and channels, in bytes from the workspace's
// beginning on.
struct Numbers {
  int64_t planes, channels, moments, totals, own, end;  // `own`: of a pass itself

  // All kinds have their place, however many a direction uses.
  Numbers(const Problem& p, int64_t workspace_of_passes) {
    const int64_t size = accumulator_size(p.dtype), planes_of_map = p.samples * p.channels;
    const auto place = [&](int64_t bytes) {
      const int64_t at = end;
      end += ceil_div(bytes, 16) * 16;
      return at;
    };
    end = 0;
    planes = place(2 * planes_of_map * size);
    channels = place(6 * p.channels * size);
    moments = place(2 * planes_of_map * int64_t(sizeof(double)));
    totals = place(4 * p.channels * int64_t(sizeof(double)));
    own = place(workspace_of_passes);
  }
};

struct Norms {
  NormValues own, identity;
  Values gate, scale;

  // What the coefficients are made of is made of them again: u = alpha * (x - centre) + beta is a
  // norm with a variance of 0 and an eps of 1.
  explicit Norms(const BlockTail& b) {
    const Dtype dtype = b.problem.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    const auto values = [&](const void* data) { return Values{data, dtype}; };
    own = {values(b.rest.centre), values(nullptr), values(b.alpha), values(b.beta), 1};
    identity = {values(b.rest.identity_centre), values(nullptr), values(b.rest.identity_scale),
                values(b.shift), 1};
    gate = values(b.gate);
    scale = values(b.scale);
  }
};

TailCoefficients with_planes(TailCoefficients k, const Problem& p, char* planes) {
  k.p = planes;
  k.q = planes + p.samples * p.channels * accumulator_size(p.dtype);
  return k;
}

Tail tail_of(const BlockTail& b, char* planes) {
  return {b.problem, b.activation, with_planes(b.rest, b.problem, planes), b.x, b.identity,
          b.y,       b.mask};
}

Moments moments_of(const BlockTail& b, double* found) {
  return {b.problem, b.x, found, found + b.problem.samples * b.problem.channels};
}

TailSums sums_of(const BlockTailBackward& b, char* planes) {
  const BlockTail& f = b.forward;
  return {f.problem, f.activation, with_planes(f.rest, f.problem, planes),
          b.dy,      f.x,          f.identity,
          f.mask,    b.sums,       b.identity_sum};
}

TailGradients gradients_of(const BlockTailBackward& b, char* planes, char* gradient_planes) {
  const BlockTail& f = b.forward;
  const TailCoefficients by = with_planes({}, f.problem, gradient_planes);
  return {f.problem,
          f.activation,
          with_planes(f.rest, f.problem, planes),
          b.dy,
          f.x,
          f.identity,
          f.mask,
          b.dx,
          b.d_identity,
          by.p,
          nullptr,
          by.q,
          f.rest.identity_scale,
          nullptr,
          nullptr};
}

Totals totals_of(const BlockTailBackward& b, const Norms& norms, double* totals) {
  const BlockTail& f = b.forward;
  return {f.problem,  norms.own,  b.sums,      b.identity_sum,
          f.weight,   norms.gate, norms.scale, {nullptr, norms.gate.dtype},
          f.distance, totals,     nullptr,     nullptr,
          b.dmean,    b.dweight};
}

}  // namespace

TailPasses passes_of(const BlockTail& b, const Gpu& gpu) {
  TailPasses passes{plan_of(moments_of(b, nullptr), gpu), plan_of(tail_of(b, nullptr), gpu), 0};
  passes.workspace = Numbers(b.problem, passes.sums.workspace).end;
  return passes;
}

TailPasses passes_of(const BlockTailBackward& b, const Gpu& gpu) {
  TailPasses passes{plan_of(sums_of(b, nullptr), gpu),
                    plan_of(gradients_of(b, nullptr, nullptr), gpu), 0};
  const int64_t of_totals = workspace_of(totals_of(b, Norms(b.forward), nullptr));
  passes.workspace = Numbers(b.forward.problem, std::max(passes.sums.workspace, of_totals)).end;
  return passes;
}

void block_tail(const BlockTail& b, const TailPasses& passes, const Memory& memory) {
  const Problem& p = b.problem;
  const Numbers at(p, passes.sums.workspace);
  const Norms norms(b);
  char* const base = static_cast<char*>(memory.workspace);
  const Memory own{base + at.own, nullptr, memory.stream};
  auto* const means = reinterpret_cast<double*>(base + at.moments);
  moments(moments_of(b, means), passes.sums, own);
  coefficients({p,
                norms.own,
                norms.identity,
                b.weight,
                {means, Dtype::kFloat64},
                {nullptr, Dtype::kFloat32},
                norms.scale,
                base + at.planes,
                base + at.channels,
                b.gate,
                b.distance},
               own);
  tail(tail_of(b, base + at.planes), passes.maps, own);
}

void block_tail_backward(const BlockTailBackward& b, const TailPasses& passes,
                         const Memory& memory) {
  const BlockTail& f = b.forward;
  const Problem& p = f.problem;
  const Norms norms(f);
  const int64_t of_totals = workspace_of(totals_of(b, norms, nullptr));
  const Numbers at(p, std::max(passes.sums.workspace, of_totals));
  char* const base = static_cast<char*>(memory.workspace);
  const Memory own{base + at.own, nullptr, memory.stream};
  // v is computed again where the activation's slope depends on it.
  if (f.activation > Activation::kRelu)
    coefficients({p,
                  norms.own,
                  norms.identity,
                  nullptr,
                  {nullptr, Dtype::kFloat32},
                  norms.gate,
                  norms.scale,
                  base + at.planes,
                  base + at.channels,
                  nullptr,
                  nullptr},
                 own);
  tail_sums(sums_of(b, base + at.planes), passes.sums, own);
  totals(totals_of(b, norms, reinterpret_cast<double*>(base + at.totals)), own);
  if (!b.dx.data && !b.d_identity.data) return;
  // In the place of the moments, which are of the forward pass.
  char* const gradient_planes = base + at.moments;
  GradientCoefficients numbers{};
  numbers.problem = p;
  numbers.norm = norms.own;
  numbers.identity_norm = norms.identity;
  numbers.gate = norms.gate;
  numbers.scale = norms.scale;
  numbers.dmean = {b.dmean, norms.gate.dtype};
  numbers.planes = gradient_planes;
  gradient_coefficients(numbers, own);
  tail_gradients(gradients_of(b, base + at.planes, gradient_planes), passes.maps, own);
}

}  // namespace eca::cuda
