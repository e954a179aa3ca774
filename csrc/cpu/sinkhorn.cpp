// Sinkhorn forward: see dnc/sinkhorn.h for the formulas, dnc_kernels/ops/sinkhorn/reference.py for the reference.
//
// Reads similarity [N,K] and group [N] once, then a copy of [N,K] (E or Z below) and 4 bytes a pixel every iteration; writes
// [N] or [N,K]. The vector lanes are sub-centroids; pixels are not sorted: every chunk of pixels adds into its own sums [G,K],
// which are added in chunk order. So the result does not depend on the number of threads.
//
// Linear form, taken when R = (largest - smallest similarity in use)/epsilon <= 50: E = exp((s - s0)/epsilon), s0 any
// similarity in use. It is safe in float32 (1e-38..3e38, e^50 = 5e21):
//   E in [e^-50, e^50], so the first column sums of n pixels lie in n * [e^-50, e^50];
//   columns: any two entries of a row of E differ by a factor of at most e^50, and c[k] = sum_n E[n,k] w[n] with w > 0 inherits
//   that, so a[k] = min(c)/c[k] is in [e^-50, 1] with some a[k0] = 1. (A common factor of a does not change the plan, so the
//   iteration is rescaled every time and nothing drifts.) rows: r[n] = sum_k E[n,k] a[k] >= E[n,k0] >= e^-50, and <= K e^50;
//   products that underflow are below 1e-16 of r; w[n] = 1/r[n]: E[n,k] w[n] <= E[n,k]/E[n,k0] <= e^50 and >= e^-50/K, so c[k]
//   is in n * [e^-50/K, e^50]. Nothing overflows while n < 6e16, nothing that counts underflows, and max_k E[n,k] a[k] > 0
//   gives the argmax.
// Cosines at epsilon >= 0.04 always qualify (R <= 2/epsilon).
//
// Log form otherwise: Z = (s - row maximum)/epsilon with the row maximum moved into v, and a column's logsumexp in two passes,
// its maximum first. Exponents are at most 0, sums at least 1.
#include "dnc/sinkhorn.h"

#include "sinkhorn_rows.h"

namespace dnc::cpu::DNC_ISA {
namespace {

constexpr double kLinearRange = 50;
constexpr int64_t kSerial = 1 << 19;  // similarities
constexpr int32_t kLeftOut = -1, kNotFinite = -2;

template <class T, int NV>
struct Solver {
  using V = Vec<T>;
  const Sinkhorn& a;
  const Rows<T> s;
  const Lanes<T, NV> lanes;
  const Chunks chunks;
  const int64_t N, K, G, width;
  const T inverse;
  bool linear = true;

  const Scratch ids, matrix, buffers, partial, counted, tables, group_info;
  int32_t* const id;          // [N] group, or why left out
  T* const values;            // [N,K] E or Z; the plan's own memory where there is one
  T* const part;              // [chunk,G,width] partial column sums or maxima
  int32_t* const part_count;  // [chunk,G]
  T* const potential;         // [G,width] linear: a (0 in padding); log: u - max u (-inf in padding)
  T* const top;               // [G,width] log form: column maxima
  T* const origin;            // [G] what Z of the first step is measured from
  int64_t* const count;       // [G] pixels
  int64_t* const steps;       // [G]
  uint8_t* const done;        // [G]

  explicit Solver(const Sinkhorn& a)
      : a(a),
        s(a.similarity),
        lanes(s.K),
        chunks(s.N, a.groups),
        N(s.N),
        K(s.K),
        G(a.groups),
        width(lanes.width),
        inverse(inverse_epsilon<T>(a.epsilon)),
        ids(sizeof(int32_t) * N),
        matrix(a.plan ? 0 : sizeof(T) * (N * K + V::lanes)),
        buffers(sizeof(T) * chunks.count * width),
        partial(sizeof(T) * chunks.count * G * width),
        counted(sizeof(int32_t) * chunks.count * G),
        tables(sizeof(T) * G * (2 * width + 1)),
        group_info(G * (2 * sizeof(int64_t) + 1)),
        id(ids.as<int32_t>()),
        values(a.plan ? a.plan.as<T>() : matrix.as<T>()),
        part(partial.as<T>()),
        part_count(counted.as<int32_t>()),
        potential(tables.as<T>()),
        top(potential + G * width),
        origin(top + G * width),
        count(group_info.as<int64_t>()),
        steps(count + G),
        done(reinterpret_cast<uint8_t*>(steps + G)) {}

  Status run() {
    if (!ids.data || !matrix.data || !buffers.data || !partial.data || !counted.data || !tables.data || !group_info.data)
      return {Code::out_of_memory};
    if (Status status = read(); !status.ok()) return status;
    const Scratch rows(linear ? 0 : sizeof(T) * N);
    if (!rows.data) return {Code::out_of_memory};
    T* const v = rows.as<T>();  // [N] log form: the pixel's potential
    if (!linear) shift_rows(v);
    keep_origin();
    for (int t = 1; t <= a.iterations; t++) {
      if (t > 1 && linear) sum_columns();
      if (!linear) log_sum_columns(t, v);
      if (!update(t)) break;
    }
    if (a.steps)
      for (int64_t g = 0; g < G; g++) a.steps.as<int64_t>()[g] = steps[g];
    if (a.assignment) linear ? assign<true>() : assign<false>();
    if (a.plan) linear ? plan<true>() : plan<false>();
    return {};
  }

  // Pass 1: group and finiteness of every pixel, E and its column sums, and whether E may be used.
  Status read() {
    const int64_t* const group = a.group ? a.group.as<int64_t>() : nullptr;
    int64_t first = 0;  // pixel in use, for s0
    while (first < N && ((group && (group[first] < 0 || group[first] >= G)) || !lanes.finite(s.row(first, buffers.as<T>()))))
      first++;
    const T s0 = first < N ? s.row(first, buffers.as<T>())[0] : T(0);
    for (int64_t g = 0; g < G; g++) origin[g] = s0;

    int64_t bad[16];
    T low[16], high[16];
    chunks.each(a.threads, [&](int64_t c, int64_t begin, int64_t end) {
      const Lanes<T, NV> lanes = this->lanes;
      const Rows<T> s = this->s;
      T* const E = values;
      int32_t* const id = this->id;
      T* const buffer = buffers.as<T>() + c * width;
      int32_t* const pixels = part_count + c * G;
      const V shift = V::splat(s0), scale = V::splat(inverse), most = V::splat(T(kLinearRange + 10)), one = V::splat(T(1));
      GroupSums<T, NV> sums(part + c * G * width, G, width);
      std::memset(pixels, 0, sizeof(int32_t) * G);
      V lowest = V::splat(INFINITY), highest = V::splat(-INFINITY);
      bad[c] = -1;
      for (int64_t n = begin; n < end; n++) {
        const int64_t g = group ? group[n] : 0;
        if (g < 0 || g >= G) {
          id[n] = kLeftOut;
          if (g >= G && bad[c] < 0) bad[c] = n;
          continue;
        }
        const T* const row = s.row(n, buffer);
        if (!lanes.finite(row)) {
          id[n] = kNotFinite;
          continue;
        }
        id[n] = int32_t(g);
        pixels[g]++;
        sums.select(g);
        T* const out = E + n * K;
        const bool inside = n * K + width <= end * K;  // a whole vector spills into rows written later by this thread
        for (int64_t j = 0; j < lanes.count(); j++) {
          lowest = min(lowest, lanes.load_or(row, j, lowest));
          highest = max(highest, lanes.load_or(row, j, highest));
          const V e = exp(min((lanes.load(row, j) - shift) * scale, most));
          inside ? e.store(out + j * V::lanes) : lanes.store(out, j, e);
          sums.add(j, e, one);
        }
      }
      sums.flush();
      low[c] = -(V::splat(T(0)) - lowest).max(), high[c] = highest.max();
    });
    T lowest = INFINITY, highest = -INFINITY;
    for (int64_t c = 0; c < chunks.count; c++) {
      if (bad[c] >= 0)
        return {Code::bad_label, bad[c], group[bad[c]], "labels must be in [0,num_classes), ignore_index or negative"};
      lowest = low[c] < lowest ? low[c] : lowest;
      highest = high[c] > highest ? high[c] : highest;
    }
    linear = highest < lowest || (highest - lowest) * inverse <= T(kLinearRange);
    for (int64_t g = 0; g < G; g++) {
      count[g] = steps[g] = 0;
      for (int64_t c = 0; c < chunks.count; c++) count[g] += part_count[c * G + g];
      done[g] = count[g] == 0;
      for (int64_t k = 0; k < width; k++) potential[g * width + k] = k < K ? T(linear) : linear ? T(0) : T(-INFINITY);
    }
    return {};
  }

  // Log form: Z; v = the row maximum for now; origin = the largest similarity of the group.
  void shift_rows(T* v) {
    chunks.each(a.threads, [&](int64_t c, int64_t begin, int64_t end) {
      T* const buffer = buffers.as<T>() + c * width;
      T* const largest = part + c * G * width;
      for (int64_t g = 0; g < G; g++) largest[g] = -INFINITY;
      for (int64_t n = begin; n < end; n++) {
        if (id[n] < 0) continue;
        const T* const row = s.row(n, buffer);
        const T m = lanes.largest(row);
        for (int64_t j = 0; j < lanes.count(); j++)
          lanes.store(values + n * K, j, scaled(lanes.load(row, j), V::splat(m), V::splat(inverse)));
        v[n] = m;
        if (m > largest[id[n]]) largest[id[n]] = m;
      }
    });
    for (int64_t g = 0; g < G; g++) {
      if (!count[g]) continue;
      origin[g] = -INFINITY;
      for (int64_t c = 0; c < chunks.count; c++)
        if (const T m = part[c * G * width + g]; m > origin[g]) origin[g] = m;
    }
  }

  // Linear form: part = sums of E[n,k]/r[n].
  void sum_columns() {
    chunks.each(a.threads, [&](int64_t c, int64_t begin, int64_t end) {
      const Lanes<T, NV> lanes = this->lanes;
      const T* const E = values;
      const T* const potential = this->potential;
      const int32_t* const id = this->id;
      const uint8_t* const done = this->done;
      const int64_t K = this->K, width = this->width;
      GroupSums<T, NV> sums(part + c * G * width, G, width);
      for (int64_t n = begin; n < end; n++) {
        const int64_t g = id[n];
        if (g < 0 || done[g]) continue;
        const T *const e = E + n * K, *const u = potential + g * width;
        V r = lanes.load(e, 0) * V::load(u);
        for (int64_t j = 1; j < lanes.count(); j++) r = fma(lanes.load(e, j), V::load(u + j * V::lanes), r);
        const V w = V::splat(T(1) / r.sum());
        sums.select(g);
        for (int64_t j = 0; j < lanes.count(); j++) sums.add(j, lanes.load(e, j), w);
      }
      sums.flush();
    });
  }

  // Log form: v, then top = column maxima of Z + v and part = sums of exp(Z + v - top).
  void log_sum_columns(int t, T* v) {
    chunks.each(a.threads, [&](int64_t c, int64_t begin, int64_t end) {
      T* const table = part + c * G * width;
      for (int64_t i = 0; i < G * width; i++) table[i] = -INFINITY;
      for (int64_t n = begin; n < end; n++) {
        const int64_t g = id[n];
        if (g < 0 || done[g]) continue;
        const T* const z = values + n * K;
        v[n] = t > 1 ? -std::log(T(count[g])) - log_sum_row(z, potential + g * width)
                     : scaled(V::splat(v[n]), V::splat(origin[g]), V::splat(inverse)).max();
        T* const most = table + g * width;
        for (int64_t j = 0; j < lanes.count(); j++)
          max(V::load(most + j * V::lanes), lanes.load(z, j) + V::splat(v[n])).store(most + j * V::lanes);
      }
    });
    for (int64_t i = 0; i < G * width; i++) {
      top[i] = -INFINITY;
      for (int64_t c = 0; c < chunks.count; c++)
        if (const T m = part[c * G * width + i]; m > top[i]) top[i] = m;
    }
    chunks.each(a.threads, [&](int64_t c, int64_t begin, int64_t end) {
      GroupSums<T, NV> sums(part + c * G * width, G, width);
      for (int64_t n = begin; n < end; n++) {
        const int64_t g = id[n];
        if (g < 0 || done[g]) continue;
        sums.select(g);
        for (int64_t j = 0; j < lanes.count(); j++) {
          const V x = lanes.load(values + n * K, j) + V::splat(v[n]) - V::load(top + g * width + j * V::lanes);
          sums.add(j, exp(x), V::splat(T(1)));
        }
      }
      sums.flush();
    });
  }

  DNC_INLINE T log_sum_row(const T* z, const T* u) const {
    V m = lanes.load(z, 0) + V::load(u);
    for (int64_t j = 1; j < lanes.count(); j++) m = max(m, lanes.load(z, j) + V::load(u + j * V::lanes));
    const T most = m.max();
    V r = V::splat(T(0));
    for (int64_t j = 0; j < lanes.count(); j++) r = r + exp(lanes.load(z, j) + V::load(u + j * V::lanes) - V::splat(most));
    return most + std::log(r.sum());
  }

  // Column sums -> potential of step t, unless the coupling of step t-1, whose column sums they are, is close enough.
  // Returns whether any group goes on.
  bool update(int t) {
    bool more = false;
#pragma omp parallel for num_threads(a.threads) schedule(static) reduction(|| : more) if (G * width > 4096)
    for (int64_t g = 0; g < G; g++) {
      if (done[g]) continue;
      T *const u = potential + g * width, *const c = part + g * width;  // chunk 0's sums become the total
      for (int64_t b = 1; b < chunks.count; b++)
        for (int64_t k = 0; k < K; k++) c[k] += part[(b * G + g) * width + k];
      // v of the first step is 0; later r lacks the factor n_g
      const T share = T(1) / (linear && t > 1 ? T(count[g]) : T(1)), log_K = std::log(T(K));
      if (!linear)
        for (int64_t k = 0; k < K; k++) c[k] = -log_K - (top[g * width + k] + std::log(c[k]));
      if (t > 1 && a.tolerance >= 0) {
        T error = 0;
        for (int64_t k = 0; k < K; k++) {
          const T e = std::fabs((linear ? T(K) * u[k] * c[k] * share : std::exp(u[k] - c[k])) - T(1));
          if (e > error) error = e;
        }
        if (double(error) <= a.tolerance) {
          done[g] = 1;
          keep(t, g);
          continue;
        }
      }
      if (a.history) {
        T* const u_t = a.history.as<T>() + (t * G + g) * K;
        for (int64_t k = 0; k < K; k++) u_t[k] = linear ? -log_K - std::log(c[k] * share) : c[k];
      }
      T best = c[0];
      for (int64_t k = 1; k < K; k++) best = (linear ? c[k] < best : c[k] > best) ? c[k] : best;
      for (int64_t k = 0; k < K; k++) u[k] = linear ? best / c[k] : c[k] - best;
      steps[g] = t;
      more = true;
    }
    return more;
  }

  void keep_origin() {
    if (!a.history) return;
    for (int64_t g = 0; g < G; g++)
      for (int64_t k = 0; k < K; k++) a.history.as<T>()[g * K + k] = count[g] ? origin[g] : T(0);
    for (int64_t g = 0; g < G; g++)
      if (!count[g]) keep(1, g);
  }

  // Rows t.. of a group that has stopped: its last potential.
  void keep(int t, int64_t g) const {
    if (!a.history) return;
    T* const u = a.history.as<T>();
    for (int64_t i = t; i <= a.iterations; i++)
      for (int64_t k = 0; k < K; k++) u[(i * G + g) * K + k] = u[((i - 1) * G + g) * K + k];
  }

  template <bool linear>
  DNC_INLINE V weight(const T* value, const T* u, int64_t j) const {
    const V x = lanes.load(value, j), p = V::load(u + j * V::lanes);
    return linear ? x * p : x + p;
  }

  template <bool linear>
  void assign() const {
    int64_t* const out = a.assignment.as<int64_t>();
    chunks.each(a.threads, [&](int64_t c, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const int64_t g = id[n];
        if (g < 0) {
          out[n] = -1;
        } else if (count[g] == 1 || a.iterations == 0) {
          const T* const row = s.row(n, buffers.as<T>() + c * width);
          out[n] = lanes.argmax([&](int64_t j) { return lanes.load_or(row, j, V::splat(-INFINITY)); });
        } else {
          out[n] = lanes.argmax([&](int64_t j) { return weight<linear>(values + n * K, potential + g * width, j); });
        }
      }
    });
  }

  template <bool linear>
  void plan() const {
    chunks.each(a.threads, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        T* const p = values + n * K;
        const int64_t g = id[n];
        if (g < 0) {
          for (int64_t k = 0; k < K; k++) p[k] = g == kLeftOut ? T(0) : T(NAN);
          continue;
        }
        const T* const u = potential + g * width;
        V most = weight<linear>(p, u, 0), r = V::splat(T(0));
        for (int64_t j = 1; !linear && j < lanes.count(); j++) most = max(most, weight<linear>(p, u, j));
        const V m = V::splat(linear ? T(0) : most.max());
        for (int64_t j = 0; j < lanes.count(); j++) {
          V w = weight<linear>(p, u, j);
          if (!linear) w = exp(w - m);
          lanes.store(p, j, w);
          r = r + w;
        }
        const V total = V::splat(r.sum());
        for (int64_t j = 0; j < lanes.count(); j++) lanes.store(p, j, lanes.load(p, j) / total);
      }
    });
  }
};

template <class T>
Status solve(const Sinkhorn& a) {
  const int64_t K = a.similarity.size[1];
  if (K <= Vec<T>::lanes) return Solver<T, 1>(a).run();
  if (K <= 2 * Vec<T>::lanes) return Solver<T, 2>(a).run();
  return Solver<T, 0>(a).run();
}

}  // namespace

Status sinkhorn(const Sinkhorn& a) {
  if (a.similarity.ndim != 2 || a.similarity.size[1] < 1) return bad_argument("similarity must be [N,K] with K > 0");
  if (!(a.epsilon > 0) || !(a.epsilon <= Limits<double>::largest)) return bad_argument("epsilon must be finite and positive");
  if (a.iterations < 0) return bad_argument("iterations must not be negative");
  if (a.groups < 1 || a.groups > INT32_MAX) return bad_argument("num_groups must be in [1, 2^31)");
  // a pass of fewer numbers takes a fraction of a millisecond, less than threads may wait for each other at the end of every
  // one
  Sinkhorn b = a;
  if (a.similarity.size[0] * a.similarity.size[1] < kSerial) b.threads = 1;
  return a.similarity.dtype == DType::float64 ? solve<double>(b) : solve<float>(b);
}

}  // namespace dnc::cpu::DNC_ISA
