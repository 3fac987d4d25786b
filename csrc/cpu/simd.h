// Vectors of one instruction set: what the kernels need beyond the compiler's own vector types,
// which already give +, *, comparison and selection on every architecture.
//
// Included once per instruction set, inside its namespace, by isa_*.cpp, which defines
// ECA_LANE_BYTES (bytes of a vector) and, on x86-64, ECA_AVX2 or ECA_AVX512. Use no standard
// library template here: the linker could keep the copy compiled for a newer processor.

constexpr int kVectorBytes = ECA_LANE_BYTES;

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

typedef float Vf __attribute__((vector_size(kVectorBytes)));
typedef double Vd __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Vu __attribute__((vector_size(kVectorBytes)));
typedef int32_t Vi __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Vs __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Vh __attribute__((vector_size(kVectorBytes / 2)));

// Accumulator and vector type for each storage type: half precision computes in float.
template <class T>
struct Traits {
  using A = float;
  using V = Vf;
};
template <>
struct Traits<double> {
  using A = double;
  using V = Vd;
};
template <class T>
using Acc = typename Traits<T>::A;
template <class T>
using Vec = typename Traits<T>::V;
template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(Acc<T>);
// The elements of the vectors that hold n elements.
template <class T>
constexpr int64_t whole_vectors(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Same bits, another type (std::bit_cast is C++20).
template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// ---- half precision, one value: what a processor without conversion instructions does ----

inline float to_float(f16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude << 13));
  // The factor 2^112 moves the exponent from half's bias to float's and makes subnormals normal.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

inline f16 to_f16(float f) {
  const uint32_t bits = bit_cast<uint32_t>(f), sign = (bits >> 16) & 0x8000;
  const float magnitude = bit_cast<float>(bits & 0x7fffffff);
  uint32_t half;
  if (!(magnitude == magnitude)) {
    half = 0x7e00;
  } else if (magnitude >= 65520.0f) {  // rounds to 2^16, which half cannot hold
    half = 0x7c00;
  } else if (magnitude < 0x1p-14f) {  // subnormal: the addition aligns and rounds
    half = bit_cast<uint32_t>(magnitude + 0.5f) - 0x3f000000;
  } else {
    const uint32_t m = bit_cast<uint32_t>(magnitude);
    half = (m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13;
  }
  return f16{uint16_t(sign | half)};
}

inline float to_acc(float f) { return f; }
inline double to_acc(double d) { return d; }
inline float to_acc(f16 h) { return to_float(h); }
inline float to_acc(bf16 h) { return bit_cast<float>(uint32_t(h.bits) << 16); }

// ---- a vector's bits in memory and its values; float16 and bfloat16 round to nearest even ----

inline Vf unpacked(const float*, Vf v) { return v; }
inline Vd unpacked(const double*, Vd v) { return v; }
// h << 16, and u >> 16: a bfloat16 is the upper half of a float.
inline Vu as_upper(Vh h) {
#if defined(ECA_AVX512)
  Vs index;
  for (int i = 0; i < 32; ++i) index[i] = i / 2;
  return (Vu)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)index,
                                            _mm512_castsi256_si512(bit_cast<__m256i>(h)));
#elif defined(ECA_AVX2)
  return (Vu)_mm256_cvtepu16_epi32(bit_cast<__m128i>(h)) << 16;
#else
  return __builtin_convertvector(h, Vu) << 16;
#endif
}
inline Vh upper(Vu u) {
#if defined(ECA_AVX512)
  Vs index;
  for (int i = 0; i < 32; ++i) index[i] = (2 * i + 1) % 32;
  return bit_cast<Vh>(_mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)index, (__m512i)u)));
#elif defined(ECA_AVX2)
  u >>= 16;
  const __m256i pairs = _mm256_packus_epi32((__m256i)u, (__m256i)u);  // within each half
  return bit_cast<Vh>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
  return __builtin_convertvector(u >> 16, Vh);
#endif
}

inline Vf unpacked(const bf16*, Vh h) { return (Vf)as_upper(h); }
inline Vf unpacked(const f16*, Vh h) {
#if defined(ECA_AVX512)
  return (Vf)_mm512_maskz_cvtph_ps(__mmask16(-1), bit_cast<__m256i>(h));
#elif defined(ECA_AVX2)
  return (Vf)_mm256_cvtph_ps(bit_cast<__m128i>(h));
#else
  Vf v;
  for (int i = 0; i < kLanes<f16>; ++i) v[i] = to_float(f16{h[i]});
  return v;
#endif
}

inline Vf packed(const float*, Vf v) { return v; }
inline Vd packed(const double*, Vd v) { return v; }
inline Vh packed(const bf16*, Vf v) {
  const Vu u = (Vu)v;
  // Rounding could turn a NaN into infinity, so a NaN is made quiet instead.
  return upper(v == v ? u + (0x7fff + ((u >> 16) & 1)) : u | 0x400000);
}
inline Vh packed(const f16*, Vf v) {
#if defined(ECA_AVX512)
  return bit_cast<Vh>(_mm512_maskz_cvtps_ph(__mmask16(-1), (__m512)v,
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(ECA_AVX2)
  return bit_cast<Vh>(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  Vh h;
  for (int i = 0; i < kLanes<f16>; ++i) h[i] = to_f16(v[i]).bits;
  return h;
#endif
}

// One value, rounded once, for values that are not part of a row.
template <class T>
inline T from_double(double d, const T* type) {
  const auto bits = packed(type, Vec<T>{} + Acc<T>(d));
  T value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
using Bits = decltype(packed((const T*)nullptr, Vec<T>()));

// ---- loads and stores of a whole vector ----

template <class T>
inline Bits<T> load_bits(const T* p) {
  Bits<T> bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits;
}

template <class T>
inline Vec<T> load(const T* p) {
  return unpacked(p, load_bits(p));
}

// The same for an address that is often no multiple of the vector's size. Zen 4 reads such a vector of
// 64 bytes, which lies in two lines of the cache, more slowly than its halves: sums of planes of 7x7
// and 14x14 made a pass 1.1 times as long.
template <class T>
inline Vec<T> load_anywhere(const T* p) {
#if defined(ECA_AVX512)
  if constexpr (sizeof(Bits<T>) == 64) {
    const __m256i lower = _mm256_loadu_si256((const __m256i*)p);
    const __m256i upper = _mm256_loadu_si256((const __m256i*)p + 1);
    return (Vec<T>)_mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
  }
#endif
  return load(p);
}

// kStream writes around the caches, for outputs that would only push everything else out of them.
// p is a multiple of the vector's size.
template <bool kStream, class T>
inline void store_bits(T* p, Bits<T> bits) {
#if defined(ECA_AVX512)
  if constexpr (kStream && sizeof bits == 64) {
    _mm512_stream_si512((__m512i*)p, bit_cast<__m512i>(bits));
    return;
  }
#endif
#if defined(ECA_AVX512) || defined(ECA_AVX2)
  if constexpr (kStream && sizeof bits == 32) {
    _mm256_stream_si256((__m256i*)p, bit_cast<__m256i>(bits));
    return;
  }
  if constexpr (kStream && sizeof bits == 16) {
    _mm_stream_si128((__m128i*)p, bit_cast<__m128i>(bits));
    return;
  }
#endif
  __builtin_memcpy(p, &bits, sizeof bits);
}

template <bool kStream, class T>
inline void store(T* p, Vec<T> v) {
  store_bits<kStream>(p, packed(p, v));
}

// Streamed lines become visible to other threads only after a fence.
inline void stream_fence() {
#if defined(ECA_AVX512) || defined(ECA_AVX2)
  _mm_sfence();
#endif
}

// ---- the first n elements of a vector, 0 < n < kLanes; the rest is zero, or not written ----

template <class T>
inline Vec<T> load_first(const T* p, int64_t n) {
#if defined(ECA_AVX512)
  if constexpr (sizeof(T) == 8) return (Vd)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
  else if constexpr (sizeof(T) == 4) return (Vf)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  else return unpacked(p, bit_cast<Vh>(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p)));
#else
  T buffer[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}

template <class T>
inline void store_first(T* p, Vec<T> v, int64_t n) {
  const Bits<T> bits = packed(p, v);
#if defined(ECA_AVX512)
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)bits);
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)bits);
  else _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), bit_cast<__m256i>(bits));
#else
  T buffer[kLanes<T>];
  __builtin_memcpy(buffer, &bits, sizeof bits);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

// ---- arithmetic ----

template <class V>
inline V broadcast(decltype(V()[0] + 0) value) {
  return V{} + value;
}

// The lanes' sum, pairwise, so that the error grows with the logarithm of the lanes.
template <class V>
inline double sum(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  decltype(v[0] + 0) lane[n];
  __builtin_memcpy(lane, &v, sizeof v);
  for (int width = n / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// The sums of neighbouring lanes: those of a, then those of b.
template <class V>
inline V add_neighbours(V a, V b) {
  typedef decltype(a < b) I;
  constexpr int n = sizeof(V) / sizeof(a[0]);
  I even, odd;
  for (int i = 0; i < n; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
#if defined(__clang__)
  V lower, upper;
  for (int i = 0; i < n; ++i) {
    lower[i] = even[i] < n ? a[even[i]] : b[even[i] - n];
    upper[i] = odd[i] < n ? a[odd[i]] : b[odd[i] - n];
  }
  return lower + upper;
#else
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}

// The sums of kLanes vectors, one in each lane: a tree of kLanes - 1 additions for all of them.
template <class V>
inline V sums(V* v) {
  for (int n = sizeof(V) / sizeof(v[0][0]); n > 1; n /= 2)
    for (int i = 0; i < n / 2; ++i) v[i] = add_neighbours(v[2 * i], v[2 * i + 1]);
  return v[0];
}

// What comparing two V gives: all bits of a lane are set, or none.
template <class V>
struct Comparison {
  typedef decltype(V() < V()) type;
};
template <class V>
using Lanes = typename Comparison<V>::type;

// true in the first n lanes
template <class V>
inline Lanes<V> first_lanes(int64_t n) {
  Lanes<V> index;
  constexpr int lanes = sizeof(index) / sizeof(index[0]);
  for (int i = 0; i < lanes; ++i) index[i] = i;
  return index < (Lanes<V>{} + (decltype(index[0] + 0))n);
}

// exp(x) for x <= 0, within 1.5 units in the last place, subnormal results included.
// 2^n * exp(r), |r| <= ln(2)/2, with the Taylor polynomial of degree 7 in Horner form.
inline Vf exp_nonpositive(Vf x) {
  const Vf floor = broadcast<Vf>(-110.0f);  // exp(-110) rounds to zero in float
  x = x < floor ? floor : x;
  const float shift = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  const Vf shifted = x * 1.44269504f + shift;
  const Vf n = shifted - shift;
  // ln(2) in two parts, the first with 16 bits, so that its product with n is exact.
  const Vf r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Vf p = broadcast<Vf>(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(ECA_AVX512)
  return (Vf)_mm512_maskz_scalef_ps(__mmask16(-1), (__m512)p, (__m512)n);
#else
  // Two factors, because 2^exponent alone may be below the smallest normal number.
  const Vi exponent = (Vi)shifted - bit_cast<int32_t>(shift), half = exponent >> 1;
  const Vf scale1 = (Vf)((Vu)(half + 127) << 23), scale2 = (Vf)((Vu)(exponent - half + 127) << 23);
  return p * scale1 * scale2;
#endif
}

// 1 / (1 + exp(-z)) without overflow; NaN stays NaN.
inline Vf sigmoid(Vf z) {
  const Vf negative = z < 0.0f ? z : -z;
  const Vf e = exp_nonpositive(negative);
  const Vf s = 1.0f / (1.0f + e);
  const Vf gate = z < 0.0f ? e / (1.0f + e) : s;
  return z == z ? gate : z;
}
inline Vd sigmoid(Vd z) {
  for (int i = 0; i < kLanes<double>; ++i) {
    const double e = __builtin_exp(z[i] < 0 ? z[i] : -z[i]);
    z[i] = z[i] < 0 ? e / (1 + e) : 1 / (1 + e);
  }
  return z;
}
