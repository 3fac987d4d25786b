// The passes of attention after an activation, see eca.h: sums, result, gradients. Each reads every
// map once and writes every result once.
// Included once per instruction set by kernels.h, inside its namespace.

// What the passes share. Maps that a pass does not have are kNoMap.
template <class T>
struct GatedPlan {
  using A = Acc<T>;
  const Activated& of;
  Map dy;
  PixelRows g;
  TailRows rows;
  Written<T> results[1];
  int64_t stride;
  const GatedFunctions<T>& functions;

  GatedPlan(const Activated& activated, const Map& dy_map, const Map& out)
      : of(activated), dy(dy_map),
        g(of.problem,
          is_dense(of.problem, of.x) && is_dense(of.problem, dy) && is_dense(of.problem, out)),
        rows(of.problem, g), results{Written<T>(of.problem, out, dy.data ? dy : of.x, of.x)},
        stride(least_stride(rows, of.x, dy, kNoMap)), functions(gated_functions<T>(of)) {}

  // The row of a sample's channels, each with its own coefficients.
  struct Values {
    RowValues<A> p, q, centre;
  };
  RowValues<A> values(const void* of_channels, int64_t place, A* scratch) const {
    return RowValues<A>(rows, g, of_channels, of.problem.channels, scratch + place * g.length);
  }
  Values values(A* scratch) const {
    return {values(of.p, 0, scratch), values(of.q, 1, scratch), values(of.centre, 2, scratch)};
  }
  ActivatedRow<T> row(const Values& k, int64_t n, int64_t at) const {
    return {row_of<const T>(of.x, n, at), dy.data ? row_of<const T>(dy, n, at) : nullptr,
            k.p.of_row(at), k.q.of_row(at), k.centre.of_row(at)};
  }
  RowStrides strides() const { return strides_of(rows, of.x, kNoMap, dy, false); }

  void sum_planes(SumsOf kind, int64_t n, int64_t c, int64_t count, double* result,
                  int64_t distance) const {
    const Values k = values(nullptr);
    const auto sum = functions.sum_planes[int(kind)];
    sums_of_planes<5, T>(rows, stride, c, count, kinds_of(kind), result, distance,
                         [&](int64_t plane, RowPart part, Vec<T>* lanes) {
                           sum(row(k, n, plane), strides(), part, lanes);
                         });
  }

  void sum_pixels(SumsOf kind, int64_t n, int64_t first, int64_t end, double* total) const {
    Array<A> scratch(kScratch * g.length);
    const Values k = values(scratch);
    const auto add = functions.add_pixels[int(kind)];
    sums_of_pixels<T>(g, first, end, kinds_of(kind), total,
                      [&](int64_t at, RowPart part, A* lanes, int64_t width) {
                        add(row(k, n, at), strides(), part, lanes, width);
                      });
  }

  // y; gate is that of all samples
  void write(const A* gate, int64_t n, int64_t first, int64_t count, int64_t length,
             A* scratch) const {
    const Values k = values(scratch);
    const RowValues<A> gates = values(gate + n * of.problem.channels, 3, scratch);
    write_rows<1, T>(rows, results, n, first, count, length, stride,
                     [&](int64_t at, RowPart part, const RowOut<T>* out) {
                       functions.write(row(k, n, at), strides(), part, gates.of_row(at), out[0]);
                     });
  }
};

template <class T>
void activated_sums_as(const ActivatedSums& t, const ThreadPool& pool) {
  using A = Acc<T>;
  const Problem& p = t.of.problem;
  const int64_t C = p.channels, distance = p.samples * C;
  const GatedPlan<T> plan(t.of, t.dy, kNoMap);
  const SumsOf kind = !t.dy.data ? SumsOf::kValue : t.for_norm ? SumsOf::kAll : SumsOf::kProduct;
  const int64_t bytes = (t.dy.data ? 2 : 1) * sizeof(T);
  if (p.layout == Layout::kPlanes) {
    each_rows<A>(p, plan.g, bytes, false, pool,
                 [&](int64_t n, int64_t c, int64_t count, int64_t, A*) {
                   plan.sum_planes(kind, n, c, count, t.sums + n * C + c, distance);
                 });
    return;
  }
  walk_pixels<A>(
      p, plan.g, bytes, pool,
      [&](int64_t n, int64_t first, int64_t end, double* total) {
        plan.sum_pixels(kind, n, first, end, total);
      },
      [&](int64_t n, const double* sums, A*, A*) {
        for (int i = 0; i < kinds_of(kind); ++i)
          for (int64_t c = 0; c < C; ++c) t.sums[i * distance + n * C + c] = sums[i * C + c];
      },
      [](int64_t, int64_t, int64_t, const A*, const A*) {}, kinds_of(kind));
}

template <class T>
void gated_as(const Gated& t, const ThreadPool& pool) {
  const GatedPlan<T> plan(t.of, kNoMap, t.y);
  each_rows<Acc<T>>(t.of.problem, plan.g, 2 * sizeof(T), true, pool,
                    [&](int64_t n, int64_t row, int64_t count, int64_t length, Acc<T>* scratch) {
                      plan.write((const Acc<T>*)t.gate, n, row, count, length, scratch);
                    });
}

template <class T>
void gated_gradients_as(const GatedGradients& t, const ThreadPool& pool) {
  using A = Acc<T>;
  const GatedPlan<T> plan(t.of, t.dy, t.dx);
  const int64_t C = t.of.problem.channels;
  each_rows<A>(t.of.problem, plan.g, 3 * sizeof(T), true, pool,
               [&](int64_t n, int64_t first, int64_t count, int64_t length, A* scratch) {
                 const auto k = plan.values(scratch);
                 const auto values = [&](const void* of, int64_t place) {
                   return of ? plan.values(of, place, scratch) : RowValues<A>();
                 };
                 const RowValues<A> gate = values((const A*)t.gate + n * C, 3),
                                    shift = values((const A*)t.shift + n * C, 4),
                                    slope = values(t.slope, 5), offset = values(t.offset, 6);
                 write_rows<1, T>(plan.rows, plan.results, n, first, count, length, plan.stride,
                                  [&](int64_t at, RowPart part, const RowOut<T>* out) {
                                    plan.functions.gradients(
                                        plan.row(k, n, at), plan.strides(), part,
                                        {gate.of_row(at), shift.of_row(at), slope.of_row(at),
                                         offset.of_row(at), out[0]});
                                  });
               });
}

template <class T>
void gated_block_as(const GatedBlock& t, const ThreadPool& pool) {
  using A = Acc<T>;
  const Problem& p = t.of.problem;
  const int64_t C = p.channels, S = p.pixels;
  const Taps<A> taps(p, t.weight, false);
  A *mean = (A*)t.mean, *gate = (A*)t.gate;
  const GatedPlan<T> plan(t.of, kNoMap, t.y);
  if (p.layout == Layout::kPlanes) {
    walk_planes<A>(
        p, taps, pieces_in_cache(2 * S * sizeof(T)), false, pool,
        [&](int64_t n, int64_t c, int64_t count, A* out) {
          Array<double> sums(count);
          plan.sum_planes(SumsOf::kValue, n, c, count, sums, count);
          for (int64_t i = 0; i < count; ++i) {
            out[i] = sums[i] / S;
            store_shared(mean + n * C + c + i, out[i]);
          }
        },
        [&](int64_t n, int64_t c, int64_t count, const A*, const A* filtered) {
          sigmoid_row(gate + n * C + c, filtered, count);
          plan.write(gate, n, c, count, S, nullptr);
        });
    return;
  }
  walk_pixels<A>(
      p, plan.g, 2 * sizeof(T), pool,
      [&](int64_t n, int64_t first, int64_t end, double* total) {
        plan.sum_pixels(SumsOf::kValue, n, first, end, total);
      },
      [&](int64_t n, const double* sums, A* z, A*) {
        for (int64_t c = 0; c < C; ++c) mean[n * C + c] = sums[c] / S;
        filter_sample(taps, z, mean + n * C);
        sigmoid_row(gate + n * C, z, C);
      },
      [&](int64_t n, int64_t first, int64_t end, const A*, const A*) {
        Array<A> scratch(kScratch * plan.g.length);
        each_block(plan.g, 2 * sizeof(T), first, end,
                   [&](int64_t row, int64_t count, int64_t length) {
                     plan.write(gate, n, row, count, length, scratch);
                   });
      });
}

// ---- for each dtype ----

inline void activated_sums(const ActivatedSums& t, const ThreadPool& pool) {
  visit(t.of.problem.dtype,
        [&](auto* type) { activated_sums_as<typename Pointee<decltype(type)>::type>(t, pool); });
}

inline void gated(const Gated& t, const ThreadPool& pool) {
  visit(t.of.problem.dtype,
        [&](auto* type) { gated_as<typename Pointee<decltype(type)>::type>(t, pool); });
}

inline void gated_gradients(const GatedGradients& t, const ThreadPool& pool) {
  visit(t.of.problem.dtype,
        [&](auto* type) { gated_gradients_as<typename Pointee<decltype(type)>::type>(t, pool); });
}

inline void gated_block(const GatedBlock& t, const ThreadPool& pool) {
  visit(t.of.problem.dtype,
        [&](auto* type) { gated_block_as<typename Pointee<decltype(type)>::type>(t, pool); });
}
