// Runs the CPU kernels, in every build that this processor can run, on buffers of exactly the size
// that they may touch. AddressSanitizer and UndefinedBehaviorSanitizer watch. Outputs start as NaN
// and lie between guard values, so an element never written, or one too many, is found too. Python
// tests check values; here the maps are ones, whose gate follows from the taps' sum.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/cpu.h"

using namespace eca;

// These replace dispatch.cpp's: with the small sizes, the maps are larger than the caches.
static bool small_caches = false;
int64_t eca::cpu::core_cache_bytes() { return small_caches ? 16 << 10 : 1 << 20; }
int64_t eca::cpu::last_level_cache_bytes() { return small_caches ? 1 : 32 << 20; }

namespace {

constexpr int64_t kThreads = 3;

// Splits like a thread pool of kThreads, one range after the other.
const cpu::ThreadPool pool{kThreads, [](int64_t begin, int64_t end, int64_t grain,
                                        cpu::ThreadPool::Body body, void* context) {
                             int64_t step = (end - begin + kThreads - 1) / kThreads;
                             step = step > grain ? step : grain;
                             for (int64_t i = begin; i < end; i += step)
                               body(i, i + step < end ? i + step : end, context);
                           }};

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// One and NaN in every dtype.
void put(void* p, Dtype dtype, bool one) {
  const double d = one ? 1 : NAN;
  const float f = one ? 1 : NAN;
  const uint16_t f16 = one ? 0x3c00 : 0x7e00, bf16 = one ? 0x3f80 : 0x7fc0;
  const void* from = dtype == Dtype::kFloat64   ? (const void*)&d
                     : dtype == Dtype::kFloat32 ? (const void*)&f
                     : dtype == Dtype::kFloat16 ? (const void*)&f16
                                                : (const void*)&bf16;
  std::memcpy(p, from, size_of(dtype));
}

double get(const void* p, Dtype dtype) {
  if (dtype == Dtype::kFloat64) return *(const double*)p;
  if (dtype == Dtype::kFloat32) return *(const float*)p;
  const uint16_t bits = *(const uint16_t*)p;
  if (dtype == Dtype::kBFloat16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  }
  const double magnitude = bits >> 10 & 31
                               ? std::ldexp(1024 + (bits & 1023), (bits >> 10 & 31) - 25)
                               : std::ldexp(bits & 1023, -24);
  return (bits >> 10 & 31) == 31 ? NAN : magnitude;
}

// A map in a buffer that ends with its last element; `gap` elements lie between its rows.
struct Buffer {
  Dtype dtype;
  int64_t samples, rows, length, gap, stride;
  char* memory;

  Buffer(const Problem& p, int64_t row_gap, bool one)
      : dtype(p.dtype), samples(p.samples),
        rows(p.layout == Layout::kPlanes ? p.channels : p.pixels),
        length(p.layout == Layout::kPlanes ? p.pixels : p.channels), gap(row_gap),
        stride(rows * (length + gap)) {
    memory = (char*)std::malloc(elements() * size_of(dtype));
    for (int64_t i = 0; i < elements(); ++i) put(memory + i * size_of(dtype), dtype, one);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(memory); }
  int64_t elements() const { return samples * stride - gap; }
  Map map() const { return {memory, stride, length + gap}; }

  // Every element of the map has the value, and every other one is still NaN.
  bool holds(double value) const {
    bool ok = true;
    for (int64_t i = 0; i < elements(); ++i) {
      const double got = get(memory + i * size_of(dtype), dtype);
      const bool outside = i % (length + gap) >= length;
      ok = ok &&
           (outside ? std::isnan(got) : std::fabs(got - value) <= 0.01 * std::fabs(value) + 1e-3);
    }
    return ok;
  }
};

// Gates of a half and shifts of one, in float or double.
template <class A>
bool run_apart_as(const cpu::Kernels& kernels, const Problem& p, int64_t gap) {
  const int64_t n = p.samples * p.channels;
  const std::vector<A> gate(n, 0.5), shift(n, 1);
  std::vector<A> mean(n, NAN), dgate(n, NAN), alone(n, NAN);
  const Buffer x(p, gap, true), dy(p, gap, true), y(p, gap, false), z(p, gap, false),
      dx(p, gap, false);
  const Map none{nullptr, 0, 0};
  kernels.scale({p, x.map(), y.map(), gate.data(), nullptr}, pool);
  kernels.scale({p, x.map(), z.map(), gate.data(), shift.data()}, pool);
  kernels.reduce({p, x.map(), none, none, nullptr, mean.data()}, pool);
  kernels.reduce({p, x.map(), dy.map(), dx.map(), gate.data(), dgate.data()}, pool);
  kernels.reduce({p, x.map(), dy.map(), none, nullptr, alone.data()}, pool);
  bool ok = y.holds(0.5) && z.holds(1.5) && dx.holds(0.5);
  for (int64_t i = 0; i < n; ++i)
    ok = ok && std::fabs(mean[i] - 1) < 1e-5 && dgate[i] == p.pixels && alone[i] == p.pixels;
  return ok;
}

bool run_apart(const cpu::Kernels& kernels, const Problem& p, int64_t gap) {
  if (p.kernel_size > 1 || p.circular || p.taps_per_channel) return true;  // without taps: once
  return p.dtype == Dtype::kFloat64 ? run_apart_as<double>(kernels, p, gap)
                                    : run_apart_as<float>(kernels, p, gap);
}

// The tail of a block with ReLU or SiLU, an identity and both norms; v = 2 and dy = 1.
template <class A>
bool run_tail_as(const cpu::Kernels& kernels, const Problem& p, int64_t gap) {
  const int64_t C = p.channels, n = p.samples * C;
  const std::vector<A> one(C, 1), two(C, 2), three(C, 3), gate(n, 2), shift(n, 1);
  bool ok = true;
  for (Activation a : {Activation::kRelu, Activation::kSilu}) {
    const bool relu = a == Activation::kRelu;
    const double value = relu ? 2 : 1.761594, slope = relu ? 1 : 1.090784;
    const Buffer x(p, gap, true), identity(p, gap, true), dy(p, gap, true), y(p, gap, false),
        dx(p, gap, false), d_identity(p, gap, false);
    std::vector<uint8_t> mask(
        relu ? p.samples * (p.layout == Layout::kPlanes ? C : p.pixels) * mask_row_bytes(p) : 0);
    uint8_t* const bits = relu ? mask.data() : nullptr;
    // v = 2 (x - 1) + 2 + (identity - 1)
    const TailCoefficients k{gate.data(), gate.data(), one.data(), one.data(), one.data()};
    std::vector<double> sums(3 * n, NAN);
    kernels.tail({p, a, k, x.map(), identity.map(), y.map(), bits}, pool);
    kernels.tail_sums({p, a, k, dy.map(), x.map(), identity.map(), bits, sums.data(), true}, pool);
    kernels.tail_gradients(
        {p, a, k, dy.map(), x.map(), identity.map(), bits, dx.map(), d_identity.map(), gate.data(),
         one.data(), shift.data(), two.data(), one.data(), three.data()},
        pool);
    ok = ok && y.holds(value) && dx.holds(2 * slope + 1) && d_identity.holds(2 * slope + 3);
    const double want[] = {p.pixels * slope, 0, 0};
    for (int64_t i = 0; i < 3 * n; ++i)
      ok = ok && std::fabs(sums[i] - want[i / n]) <= 1e-4 * p.pixels;
  }
  return ok;
}

// Attention after an activation, with v = 1, dy = 1, gates of a half and shifts of one.
template <class A>
bool run_gated_as(const cpu::Kernels& kernels, const Problem& p, int64_t gap) {
  const double value[] = {1, 0.731059}, slope[] = {1, 0.927671};
  const Activation activations[] = {Activation::kRelu, Activation::kSilu};
  const int64_t C = p.channels, n = p.samples * C;
  const std::vector<A> one(C, 1), two(C, 2), gate(n, 0.5), shift(n, 1);
  const Map none{nullptr, 0, 0};
  bool ok = true;
  for (int a = 0; a < 2; ++a) {
    const Buffer x(p, gap, true), dy(p, gap, true), y(p, gap, false), dx(p, gap, false),
        alone(p, gap, false);
    // v = 2 (x - 1) + 1
    const Activated of{p, activations[a], two.data(), one.data(), one.data(), x.map()};
    std::vector<double> z(n, NAN), sums(5 * n, NAN);
    kernels.activated_sums({of, none, false, z.data()}, pool);
    kernels.activated_sums({of, dy.map(), true, sums.data()}, pool);
    kernels.gated({of, gate.data(), y.map()}, pool);
    kernels.gated_gradients(
        {of, dy.map(), gate.data(), shift.data(), one.data(), two.data(), dx.map()}, pool);
    kernels.gated_gradients(
        {of, dy.map(), gate.data(), shift.data(), nullptr, nullptr, alone.map()}, pool);
    ok = ok && y.holds(0.5 * value[a]) && dx.holds(3 * slope[a] + 2) && alone.holds(3 * slope[a]);
    const double S = p.pixels, want[] = {S * value[a], S * slope[a], 0, S * slope[a], 0};
    for (int64_t i = 0; i < 5 * n; ++i) ok = ok && std::fabs(sums[i] - want[i / n]) <= 1e-4 * S;
    for (double got : z) ok = ok && std::fabs(got - S * value[a]) <= 1e-4 * S;
  }
  return ok;
}

template <class A>
bool run_gated_block_as(const cpu::Kernels& kernels, const Problem& p, int64_t gap,
                        const std::vector<float>& weight) {
  const std::vector<A> one(p.channels, 1), zero(p.channels, 0);
  std::vector<A> mean(p.samples * p.channels, NAN), gate(p.samples * p.channels, NAN);
  const Buffer x(p, gap, true), y(p, gap, false);
  const Activated of{p, Activation::kRelu, one.data(), zero.data(), zero.data(), x.map()};
  kernels.gated_block({of, weight.data(), y.map(), mean.data(), gate.data()}, pool);
  bool ok = y.holds(1 / (1 + std::exp(-1.0)));
  for (A m : mean) ok = ok && std::fabs(m - 1) < 1e-5;
  return ok;
}

bool run_blocks(const cpu::Kernels& kernels, const Problem& p, int64_t gap,
                const std::vector<float>& weight) {
  const bool wide = p.dtype == Dtype::kFloat64;
  // The taps are applied by what the other passes apply them by.
  if (p.kernel_size > 3 || p.circular || p.taps_per_channel) return true;
  if (p.kernel_size == 3)
    return wide ? run_gated_block_as<double>(kernels, p, gap, weight)
                : run_gated_block_as<float>(kernels, p, gap, weight);
  return wide ? run_gated_as<double>(kernels, p, gap) && run_tail_as<double>(kernels, p, gap)
              : run_gated_as<float>(kernels, p, gap) && run_tail_as<float>(kernels, p, gap);
}

bool run(const cpu::Kernels& kernels, const Problem& p, int64_t gap) {
  const int64_t C = p.channels, k = p.kernel_size, rows = p.taps_per_channel ? C : 1;
  // Taps with the centre alone: every gate is sigmoid(1), and no boundary shows in the values.
  std::vector<float> weight(rows * k, 0.0f), dweight(rows * k, NAN);
  for (int64_t c = 0; c < rows; ++c) weight[c * k + k / 2] = 1;
  std::vector<double> mean(p.samples * C, NAN), gate(p.samples * C, NAN);
  const Buffer x(p, gap, true), dy(p, gap, true), y(p, gap, false), dx(p, gap, false);
  kernels.forward({p, x.map(), y.map(), weight.data(), mean.data(), gate.data()}, pool);
  kernels.backward(
      {p, dy.map(), x.map(), dx.map(), weight.data(), mean.data(), gate.data(), dweight.data()},
      pool);
  const double a = 1 / (1 + std::exp(-1.0));
  bool ok = y.holds(a) && dx.holds(a + a * (1 - a));
  for (float d : dweight) ok = ok && !std::isnan(d);
  // In place, and gradients one by one.
  kernels.forward({p, x.map(), x.map(), weight.data(), mean.data(), gate.data()}, pool);
  kernels.backward({p,
                    dy.map(),
                    x.map(),
                    {nullptr, 0, 0},
                    weight.data(),
                    mean.data(),
                    gate.data(),
                    dweight.data()},
                   pool);
  kernels.backward(
      {p, dy.map(), x.map(), dx.map(), weight.data(), mean.data(), gate.data(), nullptr}, pool);
  ok = ok && run_blocks(kernels, p, gap, weight);
  return ok && run_apart(kernels, p, gap) && (gap > 0 || x.holds(a));
}

}  // namespace

int main() {
  std::vector<const cpu::Kernels*> builds{&cpu::baseline::kernels};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    builds.push_back(&cpu::avx2::kernels);
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    builds.push_back(&cpu::avx512::kernels);
#endif
  const int64_t shapes[][3] = {{1, 1, 1},    {2, 1, 3},     {3, 5, 2},    {2, 9, 16},
                               {2, 40, 49},  {1, 7, 65},    {2, 3, 1000}, {1, 65, 196},
                               {4, 33, 31},  {1, 2, 40000}, {2, 300, 1},  {1, 4, 511},
                               {40, 3, 513}, {1, 300, 400}, {2, 33, 5003}};
  int failures = 0, runs = 0;
  for (const cpu::Kernels* kernels : builds)
    for (bool small : {false, true})
      for (const auto& s : shapes)
        for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kFloat16, Dtype::kBFloat16})
          for (Layout layout : {Layout::kPlanes, Layout::kPixels})
            for (int64_t k : {1, 3, 7})
              for (int64_t gap : {0, 5})
                for (int flags = 0; flags < 4; ++flags) {
                  const bool circular = flags & 1, own = flags & 2;
                  if (circular && k / 2 > s[1]) continue;
                  // Taps concern channels alone, so large maps need not try them all.
                  const bool large = s[0] * s[1] * s[2] > 50000;
                  if (large && (k != 3 || circular != own)) continue;
                  const Problem p{dtype,           layout, s[0], s[1],    s[2],
                                  Dtype::kFloat32, k,      own,  circular};
                  ++runs;
                  small_caches = small;
                  if (run(*kernels, p, gap)) continue;
                  ++failures;
                  std::printf(
                      "FAILED %s dtype %d layout %d N %d C %d S %d k %d gap %d circular %d own "
                      "%d\n",
                      kernels->name, int(dtype), int(layout), int(s[0]), int(s[1]), int(s[2]),
                      int(k), int(gap), circular, own);
                }
  std::printf("%d runs on %d builds, %d failures\n", runs, int(builds.size()), failures);
  return failures != 0;
}
