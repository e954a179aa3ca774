// sums[m] = sum of x[n] over cluster[n] == m, counts[m] = how many;  p[m] <- unit(g * p[m] + (1 - g) * unit(sums[m])) (DNC, eq.
// 8).
//
// cluster_sums    reads x [N,D] or [B,D,H,W] (float32/float64/float16/bfloat16) and cluster [N] int64; writes sums [M,D],
// counts [M].
//                 Bound by memory: x is read once, N*D*sizeof(x) bytes.
//   plan:         tasks of one chunk of pixels by one slice of channels, each with accumulators [M, slice] that fit L2. Where
//   channels
//                 are adjacent (row-major, channels_last) rows are added as they lie, four at a time where neighbours share a
//                 cluster. Where pixels are (NCHW, its crops) a slice is one vector wide, and tiles are transposed in
//                 registers.
//   accuracy:     fp32 (fp64 for float64 x). Partial sums of about kFlush pixels are added to totals: the rounding error of a
//   sum of n
//                 pixels grows like kFlush + n / kFlush and not like n.
//   determinism:  an element is summed in pixel order within a chunk, and over chunks in order. Chunks depend on N, M and the
//   layout alone,
//                 slices change no sum: bit-equal for any number of threads.
//   non-finite:   the sums are made as if all pixels were finite. Only a NaN, an Inf or an overflow leaves a sum that is not
//   finite; in
//                 that case alone x is searched for such pixels, and the sums are made again without them.
// apply_momentum  reads and writes centroids [M,D], reads sums [M,D]: three passes over a row, in double. Parallel over rows.
// Reference: dnc_kernels/ops/momentum/reference.py.
#include "dnc/momentum.h"

#include <omp.h>

#include "tile.h"

namespace dnc::cpu::DNC_ISA {
namespace {

constexpr int kFlush = 512;
constexpr int64_t kAccumulatorBytes = 2 << 20;  // of a task: 1.5 MB ran as fast as less on a core with 1 MB of L2
constexpr int64_t kPrefetchBytes = 8192;        // of rows ahead; flat from 4 to 12 KB
constexpr int64_t kChunks = 8;                  // at most; each holds its own sums [M,D]
constexpr int64_t kTile = 256;                  // pixels staged at once where planes cannot be read in place
constexpr int64_t kSerial = 1 << 15;            // elements below which starting threads costs more than the work

DNC_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
DNC_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
DNC_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Problem {
  Pixels x;
  const int64_t* cluster;
  int64_t N, D, M;
  void* sums;
  int64_t* counts;
  int threads;
};

// Part t of `parts` nearly equal parts of [0,n).
struct Part {
  int64_t begin, end;
  Part(int64_t n, int64_t t, int64_t parts)
      : begin(n / parts * t + min(t, n % parts)), end(n / parts * (t + 1) + min(t + 1, n % parts)) {}
};

// Checks the clusters and counts them.
Status count(const Problem& a) {
  Scratch memory(size_t(a.threads * (a.M + 1)) * sizeof(int64_t));
  if (!memory.data) return {Code::out_of_memory};
  int64_t *first_bad = memory.as<int64_t>(), *histograms = first_bad + a.threads;
#pragma omp parallel for num_threads(a.threads) schedule(static, 1)
  for (int64_t t = 0; t < a.threads; t++) {
    int64_t* h = histograms + t * a.M;
    std::memset(h, 0, size_t(a.M) * sizeof(int64_t));
    first_bad[t] = -1;
    const Part part(a.N, t, a.threads);
    for (int64_t n = part.begin; n < part.end; n++) {
      const int64_t m = a.cluster[n];
      if (uint64_t(m) < uint64_t(a.M)) {
        h[m]++;
      } else if (m >= 0) {
        first_bad[t] = n;
        break;
      }
    }
  }
  for (int64_t t = 0; t < a.threads; t++) {
    if (first_bad[t] >= 0)
      return {Code::bad_label, first_bad[t], a.cluster[first_bad[t]],
              "labels must be in [0,num_clusters), ignore_index or negative"};
  }
  std::memset(a.counts, 0, size_t(a.M) * sizeof(int64_t));
  for (int64_t t = 0; t < a.threads; t++) {
    for (int64_t m = 0; m < a.M; m++) a.counts[m] += histograms[t * a.M + m];
  }
  return {};
}

// Sums of one task: `part` collects about kFlush pixels of a cluster, then goes to its row of `out`.
template <class T>
struct Accumulators {
  T* part;          // [M, stride]
  uint16_t* state;  // [M] pixels in `part`; bit 15: the row of `out` holds earlier ones
  T* out;           // [M, D], from the first channel of the slice
  int64_t width, stride, D;

  DNC_INLINE void added(int64_t m, int pixels) {
    state[m] = uint16_t(state[m] + pixels);
    if ((state[m] & 0x7fff) >= kFlush) flush(m);
  }
  // Adds n <= lanes vectors; a run of one cluster stays in a register, which spares it the latency of memory.
  DNC_INLINE void add(const int64_t* cluster, const Vec<T>* v, int64_t n) {
    constexpr int64_t L = Vec<T>::lanes;
    Vec<T> sum = v[0];
    int64_t m = -1;
    int pixels = 0;
#pragma GCC unroll 16  // v[j] stays in registers
    for (int64_t j = 0; j < n; j++) {
      if (cluster[j] != m) {
        if (m >= 0) {
          sum.store(part + m * L);
          added(m, pixels);
        }
        m = cluster[j], pixels = 0;
        if (m >= 0) sum = Vec<T>::load(part + m * L);
      }
      sum = sum + v[j];
      pixels++;
    }
    if (m >= 0) {
      sum.store(part + m * L);
      added(m, pixels);
    }
  }
  void flush(int64_t m) {
    T *p = part + m * stride, *o = out + m * D;
    const bool first = !(state[m] & 0x8000);
    for (int64_t d = 0; d < width; d++) o[d] = first ? p[d] : o[d] + p[d];
    std::memset(p, 0, size_t(stride) * sizeof(T));
    state[m] = 0x8000;
  }
};

// out [width] += a row of x, and fetches the row at `ahead`.
template <class T, class S>
DNC_INLINE void add_row(T* out, const S* x, int64_t width, const S* ahead) {
  constexpr int64_t L = Vec<T>::lanes;
  constexpr int64_t line =
      L * int64_t(sizeof(S)) >= 64 ? L : 64 / int64_t(sizeof(S));  // elements of a cache line, whole vectors
  int64_t d = 0;
  for (; d + line <= width; d += line) {
    __builtin_prefetch(ahead + d);
    for (int64_t e = d; e < d + line; e += L) (Vec<T>::load(out + e) + Load<T, S>::at(x + e)).store(out + e);
  }
  for (; d + L <= width; d += L) (Vec<T>::load(out + d) + Load<T, S>::at(x + d)).store(out + d);
  for (; d < width; d++) out[d] += read<T>(x + d);
}

// One task where channels are adjacent (or no axis is): pixels [begin,end), channels from d0.
template <class T, class S>
void sum_rows(const Problem& a, const Part& pixels, int64_t d0, Accumulators<T>& acc) {
  const Pixels& x = a.x;
  const int64_t distance = max(4, kPrefetchBytes / (a.D * int64_t(sizeof(S))));
  for (int64_t n = pixels.begin; n < pixels.end;) {
    const int64_t run = x.run(n, pixels.end - n);
    const S* p = reinterpret_cast<const S*>(x.data) + x.offset(n) + d0 * x.sd;
    const int64_t* cluster = a.cluster + n;
    for (int64_t i = 0; i < run; i++) {
      const int64_t m = cluster[i];
      if (m < 0) continue;
      const S* row = p + i * x.sw;
      T* out = acc.part + m * acc.stride;
      if (x.sd == 1) {
        add_row(out, row, acc.width, i + distance < run && cluster[i + distance] >= 0 ? row + distance * x.sw : row);
      } else {
        for (int64_t d = 0; d < acc.width; d++) out[d] += read<T>(row + d * x.sd);
      }
      acc.added(m, 1);
    }
    n += run;
  }
}

// One task where pixels are adjacent: pixels [begin,end), at most one vector of channels from d0.
template <class T, class S>
void sum_planes(const Problem& a, const Part& pixels, int64_t d0, Accumulators<T>& acc) {
  constexpr int64_t L = Vec<T>::lanes;
  const Pixels& x = a.x;
  alignas(64) T staged[L * kTile] = {};  // [lanes, pixels] of a tile that is not read in place; absent channels stay zero
  for (int64_t n = pixels.begin; n < pixels.end;) {
    const int64_t run = x.run(n, min(kTile, pixels.end - n));
    const S* in = reinterpret_cast<const S*>(x.data) + x.offset(n) + d0 * x.sd;
    const T* from = staged;
    int64_t stride = kTile;
    if constexpr (sizeof(S) == sizeof(T)) {
      if (acc.width == L && run % L == 0) from = in, stride = x.sd;
    }
    if (from == staged) {
      for (int64_t c = 0; c < acc.width; c++) read_n(staged + c * kTile, in + c * x.sd, run);
    }
    for (int64_t i = 0; i < run; i += L) {
      Vec<T> r[L];
      for (int64_t c = 0; c < L; c++) r[c] = Vec<T>::load(from + c * stride + i);
      transpose(r);
      const int64_t* cluster = a.cluster + n + i;
      if (i + L <= run) {
        acc.add(cluster, r, L);
      } else {
        acc.add(cluster, r, run - i);
      }
    }
    n += run;
  }
}

template <class T, class S>
Status sum_all(const Problem& a) {
  constexpr int64_t L = Vec<T>::lanes;
  const bool planes = a.x.sw == 1 && a.x.sd != 1;
  T* sums = static_cast<T*>(a.sums);
  // a chunk's own sums cost a thirty-second of its pixels, or less
  const int64_t chunks = max(1, min(kChunks, a.N / (32 * a.M)));
  int64_t width = L;
  if (!planes) {
    const int64_t fit = max(64, kAccumulatorBytes / (a.M * int64_t(sizeof(T)))), slices = divide_up(a.threads, chunks);
    width = divide_up(max(64, min(fit, divide_up(a.D, slices))), L) * L;
    width = divide_up(divide_up(a.D, divide_up(a.D, width)), L) * L;  // slices of equal width
  }
  const int64_t slices = divide_up(a.D, width), part_bytes = a.M * width * int64_t(sizeof(T));
  const int64_t own_bytes = part_bytes + divide_up(a.M, 32) * 64;
  Scratch memory(size_t(own_bytes) * size_t(a.threads)), others(size_t((chunks - 1) * a.M * a.D) * sizeof(T));
  if (!memory.data || !others.data) return {Code::out_of_memory};
  T* other = others.as<T>();  // sums of the chunks after the first
#pragma omp parallel num_threads(a.threads)
  {
    char* own = memory.as<char>() + own_bytes * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < slices * chunks; task++) {
      const int64_t chunk = task / slices, d0 = task % slices * width;
      T* out = chunk == 0 ? sums : other + (chunk - 1) * a.M * a.D;
      std::memset(own, 0, size_t(own_bytes));
      Accumulators<T> acc{
          reinterpret_cast<T*>(own), reinterpret_cast<uint16_t*>(own + part_bytes), out + d0, min(width, a.D - d0), width, a.D};
      const Part pixels(a.N, chunk, chunks);
      planes ? sum_planes<T, S>(a, pixels, d0, acc) : sum_rows<T, S>(a, pixels, d0, acc);
      for (int64_t m = 0; m < a.M; m++) acc.flush(m);
    }
    if (chunks > 1) {
#pragma omp for schedule(static)
      for (int64_t m = 0; m < a.M; m++) {
        for (int64_t chunk = 0; chunk < chunks - 1; chunk++) {
          for (int64_t d = 0; d < a.D; d++) sums[m * a.D + d] += other[(chunk * a.M + m) * a.D + d];
        }
      }
    }
  }
  return {};
}

template <class T>
bool finite(const T* p, int64_t n) {
  constexpr int64_t L = Vec<T>::lanes;
  Vec<T> v = Vec<T>::splat(0);
  int64_t i = 0;
  for (; i + L <= n; i += L) v = fma(Vec<T>::load(p + i), Vec<T>::splat(0), v);  // 0 * Inf and 0 * NaN are NaN
  T s = v.sum();
  for (; i < n; i++) s += p[i] * T(0);
  return s == 0;
}

// cluster [N], with -1 for the pixels that have a NaN or Inf. Only clusters whose sum is not finite can own one. True: there
// are some.
template <class T, class S>
bool without_bad_pixels(const Problem& a, int64_t* cluster) {
  const Pixels& x = a.x;
  const T* sums = static_cast<const T*>(a.sums);
  constexpr int64_t block = 256;
  const int64_t blocks = divide_up(a.N, block);
  bool found = false;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1) reduction(|| : found)
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t end = min(a.N, (b + 1) * block);
    for (int64_t n = b * block; n < end;) {
      const int64_t run = x.run(n, end - n);
      const S* in = reinterpret_cast<const S*>(x.data) + x.offset(n);
      T zero[block];  // 0 where a pixel is finite, else NaN
      std::memset(zero, 0, sizeof(zero));
      if (x.sw == 1 && x.sd != 1) {
        for (int64_t d = 0; d < a.D; d++) {
          for (int64_t i = 0; i < run; i++) zero[i] += T(0) * read<T>(in + d * x.sd + i);
        }
      } else {
        for (int64_t i = 0; i < run; i++) {
          const int64_t m = a.cluster[n + i];
          if (m < 0 || finite(sums + m * a.D, a.D)) continue;
          for (int64_t d = 0; d < a.D; d++) zero[i] += T(0) * read<T>(in + i * x.sw + d * x.sd);
        }
      }
      for (int64_t i = 0; i < run; i++) {
        const bool bad = a.cluster[n + i] >= 0 && !(zero[i] == 0);
        cluster[n + i] = bad ? -1 : a.cluster[n + i];
        found = found || bad;
      }
      n += run;
    }
  }
  return found;
}

template <class T, class S>
Status sum_pixels(Problem a) {
  const auto sum = [&] {
    Status s = count(a);
    return s.ok() ? sum_all<T, S>(a) : s;
  };
  Status s = sum();
  if (!s.ok() || finite(static_cast<const T*>(a.sums), a.M * a.D)) return s;
  Scratch copy(size_t(a.N) * sizeof(int64_t));
  if (!copy.data) return {Code::out_of_memory};
  if (!without_bad_pixels<T, S>(a, copy.as<int64_t>())) return {};  // the pixels are finite, their sum overflows
  a.cluster = copy.as<int64_t>();
  return sum();
}

// <u,u> of u = g * p + c * s.
template <class P, class S>
double squared_length(const P* p, const S* s, double g, double c, int64_t D) {
  using V = Vec<double>;
  constexpr int64_t L = V::lanes;
  V total = V::splat(0);
  int64_t d = 0;
  for (; d + L <= D; d += L) {
    const V u = fma(V::splat(g), Load<double, P>::at(p + d), V::splat(c) * Load<double, S>::at(s + d));
    total = fma(u, u, total);
  }
  double sum = total.sum();
  for (; d < D; d++) {
    const double u = g * double(p[d]) + c * double(s[d]);
    sum += u * u;
  }
  return sum;
}

bool usable(double squared) { return squared > 0 && squared <= 1.7976931348623157e308; }

template <class P, class S>
Status apply(const ApplyMomentum& a) {
  const int64_t M = a.centroids.size[0], D = a.centroids.size[1];
  const double g = a.momentum;
  [[maybe_unused]] const int threads = M * D < kSerial ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t m = 0; m < M; m++) {
    if (a.counts.as<int64_t>()[m] <= 0) continue;
    P* p = a.centroids.as<P>() + m * D;
    const S* s = a.sums.as<S>() + m * D;
    const double length = squared_length(s, s, 1, 0, D);
    if (!usable(length)) continue;
    const double c = (1 - g) / std::sqrt(length), updated = squared_length(p, s, g, c, D);
    if (!usable(updated)) continue;
    const double r = 1 / std::sqrt(updated), gr = g * r, cr = c * r;
    for (int64_t d = 0; d < D; d++) p[d] = P(gr * double(p[d]) + cr * double(s[d]));
  }
  return {};
}

}  // namespace

Status cluster_sums(const ClusterSums& a) {
  const Pixels x(a.x);
  Problem p{x, a.cluster.as<int64_t>(), x.N(), x.D, a.sums.size[0], a.sums.data, a.counts.as<int64_t>(), a.threads};
  if (p.threads < 1 || p.N * p.D < kSerial) p.threads = 1;
  switch (a.x.dtype) {
    case DType::float32: return sum_pixels<float, float>(p);
    case DType::float64: return sum_pixels<double, double>(p);
    case DType::float16: return sum_pixels<float, Float16>(p);
    case DType::bfloat16: return sum_pixels<float, BFloat16>(p);
    default: return bad_argument("x must be float32, float64, float16 or bfloat16");
  }
}

Status apply_momentum(const ApplyMomentum& a) {
  const bool wide = a.centroids.dtype == DType::float64, wide_sums = a.sums.dtype == DType::float64;
  if ((!wide && a.centroids.dtype != DType::float32) || (!wide_sums && a.sums.dtype != DType::float32)) {
    return bad_argument("centroids and sums must be float32 or float64");
  }
  if (wide) return wide_sums ? apply<double, double>(a) : apply<double, float>(a);
  return wide_sums ? apply<float, double>(a) : apply<float, float>(a);
}

}  // namespace dnc::cpu::DNC_ISA
