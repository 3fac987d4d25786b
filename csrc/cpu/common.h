// What the walks share: memory, dtypes, rows of a map, threads.
// Included once per instruction set by kernels.h, inside its namespace.

template <class A>
class Array {
 public:
  explicit Array(int64_t n) : data_(new A[n > 0 ? n : 1]()) {}
  ~Array() { delete[] data_; }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  operator A*() const { return data_; }

 private:
  A* data_;
};

// Calls f with a null pointer of the type that stands for the dtype.
template <class F>
auto visit(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat64: return f((double*)nullptr);
    case Dtype::kFloat16: return f((f16*)nullptr);
    case Dtype::kBFloat16: return f((bf16*)nullptr);
    default: return f((float*)nullptr);
  }
}

template <class T>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};

// A value as a type, for a function that is compiled for it.
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// How many pieces of `bytes` to read before reading them again out of a core's cache: what fills a
// quarter of it. Measured with 1 MB: a half or an eighth costs up to 10 %.
inline int64_t pieces_in_cache(int64_t bytes) {
  return max_of(core_cache_bytes() / 4 / max_of(bytes, 1), 1);
}

template <class T>
T* row_of(const Map& map, int64_t sample, int64_t row) {
  return (T*)map.data + sample * map.sample_stride + row * map.row_stride;
}

// pool.run for a body that captures.
template <class F>
void parallel(const ThreadPool& pool, int64_t count, int64_t grain, const F& body) {
  pool.run(
      0, count, grain, [](int64_t begin, int64_t end, void* f) { (*(const F*)f)(begin, end); },
      (void*)&body);
}

// Fewer elements than this are not worth a second thread (PyTorch's own limit).
constexpr int64_t kGrain = 32768;

// Streaming stores pay only where input and output together do not fit into the caches, and never
// in place, where the lines that are written are in a cache already.
template <class T>
bool streams(const Problem& p, const Map& out, const Map& in) {
  const int64_t bytes = p.samples * p.channels * p.pixels * (int64_t)sizeof(T);
  // Vectors can only begin at multiples of their size if elements begin at multiples of theirs.
  const bool aligned = (uintptr_t)out.data % sizeof(T) == 0;
  return aligned && out.data != in.data && 2 * bytes > last_level_cache_bytes();
}
