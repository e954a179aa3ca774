// sums[m] = sum of x[n] over cluster[n] == m, counts[m] = how many;  p[m] <- unit(g * p[m] + (1 - g) * unit(sums[m])) (DNC, eq.
// 8).
//
// cluster_sums    reads x [N,D] or [B,D,H,W] (float32/float64/float16/bfloat16) once and cluster [N] int64; writes sums [M,D],
// counts [M].
//                 Bound by memory: N*D*sizeof(x) bytes.
//   channels adjacent (row-major, channels_last): the offsets of the pixels are sorted by cluster (a stable counting sort, 8 N
//   bytes),
//                 then each cluster's rows are gathered and added four at a time. No accumulator leaves L1, whatever M is.
//                 Parallel over units of at most kUnit pixels of one cluster; the units of a cluster are added in order.
//   pixels adjacent (NCHW and its crops): tasks of one vector of channels by one fixed chunk of pixels; tiles are transposed in
//                 registers and added to [M, lanes] accumulators, which live in L2. The chunks are added in order.
//   accuracy:     fp32 (fp64 for float64 x). Partial sums of at most kUnit pixels are added to totals, so the rounding error of
//   n pixels grows
//                 like kUnit + n / kUnit and not like n.
//   determinism:  units, chunks and orders depend on the shapes and the clusters alone: bit-equal for any number of threads.
//   non-finite:   the sums are made as if all pixels were finite. Only a NaN, an Inf or an overflow leaves a sum that is not
//   finite; in
//                 that case alone x is searched for such pixels, and the sums are made again without them.
// apply_momentum  reads and writes centroids [M,D], reads sums [M,D]; three passes over a row, in double. Parallel over rows.
// Reference: dnc_kernels/ops/momentum/reference.py.
#include "dnc/momentum.h"

#include <omp.h>

#include "simd.h"

namespace dnc::cpu::DNC_ISA {
namespace {

constexpr int64_t kUnit = 512;            // pixels added to one partial sum
constexpr int64_t kPrefetchBytes = 8192;  // of rows ahead; measured flat from 4 to 12 KB
constexpr int64_t kSerial = 1 << 15;      // elements below which starting threads costs more than the work

// A vector of T from `lanes` adjacent elements of type S.
template <class T, class S>
struct Load {
  static DNC_INLINE Vec<T> at(const S* p) {
    T t[Vec<T>::lanes];
    read_n(t, p, Vec<T>::lanes);
    return Vec<T>::load(t);
  }
};
template <class T>
struct Load<T, T> {
  static DNC_INLINE Vec<T> at(const T* p) { return Vec<T>::load(p); }
};
#if defined(DNC_ISA_AVX512)
template <>
struct Load<float, BFloat16> {
  static DNC_INLINE Vec<float> at(const BFloat16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
  }
};
template <>
struct Load<float, Float16> {
  static DNC_INLINE Vec<float> at(const Float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
};
template <>
struct Load<double, float> {
  static DNC_INLINE Vec<double> at(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
};
#elif defined(DNC_ISA_AVX2)
template <>
struct Load<float, BFloat16> {
  static DNC_INLINE Vec<float> at(const BFloat16* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
  }
};
template <>
struct Load<float, Float16> {
  static DNC_INLINE Vec<float> at(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
};
template <>
struct Load<double, float> {
  static DNC_INLINE Vec<double> at(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
};
#endif

// r[channel] holds pixels -> r[pixel] holds channels.
template <class T>
DNC_INLINE void transpose(Vec<T>* r) {
  constexpr int L = Vec<T>::lanes;
  T t[L][L];
  for (int i = 0; i < L; i++) r[i].store(t[i]);
  for (int i = 0; i < L; i++) {
    T column[L];
    for (int j = 0; j < L; j++) column[j] = t[j][i];
    r[i] = Vec<T>::load(column);
  }
}
#if defined(DNC_ISA_AVX512)
template <>
DNC_INLINE void transpose<float>(Vec<float>* r) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // r[4a + b], 128-bit lane c: channels 4a.. of pixel 4c + b
    for (int h = 0; h < 2; h++) {
      const __m512d lo = _mm512_castps_pd(t[i + h]), hi = _mm512_castps_pd(t[i + 2 + h]);
      r[i + 2 * h].v = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      r[i + 2 * h + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
  }
  for (int b = 0; b < 4; b++) {  // a 4 x 4 transpose of 128-bit lanes
    const __m512 p = _mm512_shuffle_f32x4(r[b].v, r[4 + b].v, 0x44), q = _mm512_shuffle_f32x4(r[b].v, r[4 + b].v, 0xee);
    const __m512 s = _mm512_shuffle_f32x4(r[8 + b].v, r[12 + b].v, 0x44),
                 u = _mm512_shuffle_f32x4(r[8 + b].v, r[12 + b].v, 0xee);
    t[b] = _mm512_shuffle_f32x4(p, s, 0x88), t[4 + b] = _mm512_shuffle_f32x4(p, s, 0xdd);
    t[8 + b] = _mm512_shuffle_f32x4(q, u, 0x88), t[12 + b] = _mm512_shuffle_f32x4(q, u, 0xdd);
  }
  for (int i = 0; i < 16; i++) r[i].v = t[i];
}
#elif defined(DNC_ISA_AVX2)
template <>
DNC_INLINE void transpose<float>(Vec<float>* r) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {  // r[4a + b], 128-bit lane c: channels 4a.. of pixel 4c + b
    for (int h = 0; h < 2; h++) {
      r[i + 2 * h].v = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
      r[i + 2 * h + 1].v = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0xee);
    }
  }
  for (int b = 0; b < 4; b++) {
    t[b] = _mm256_permute2f128_ps(r[b].v, r[4 + b].v, 0x20);
    t[4 + b] = _mm256_permute2f128_ps(r[b].v, r[4 + b].v, 0x31);
  }
  for (int i = 0; i < 8; i++) r[i].v = t[i];
}
#endif

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

// Part t of `parts` equal parts of [0,n).
struct Part {
  int64_t begin, end;
  Part(int64_t n, int64_t t, int64_t parts)
      : begin(n / parts * t + min(t, n % parts)), end(n / parts * (t + 1) + min(t + 1, n % parts)) {}
};

// counts, and histogram[t,m] = pixels of cluster m in part t.
Status count(const Problem& a, int64_t* histogram, int64_t* first_bad) {
#pragma omp parallel for num_threads(a.threads) schedule(static, 1)
  for (int64_t t = 0; t < a.threads; t++) {
    int64_t* h = histogram + t * a.M;
    std::memset(h, 0, size_t(a.M) * sizeof(int64_t));
    first_bad[t] = -1;
    const Part part(a.N, t, a.threads);
    for (int64_t n = part.begin; n < part.end; n++) {
      const int64_t m = a.cluster[n];
      if (uint64_t(m) < uint64_t(a.M)) {
        h[m]++;
      } else if (m != -1) {
        first_bad[t] = n;
        break;
      }
    }
  }
  for (int64_t t = 0; t < a.threads; t++) {
    if (first_bad[t] >= 0) return {Code::bad_label, first_bad[t], a.cluster[first_bad[t]], "cluster must be in [-1,M)"};
  }
  for (int64_t m = 0; m < a.M; m++) {
    a.counts[m] = 0;
    for (int64_t t = 0; t < a.threads; t++) a.counts[m] += histogram[t * a.M + m];
  }
  return {};
}

// out [D] += the rows at offset[0], ..., offset[n - 1], in this order. `ahead` offsets beyond may be read, up to `last`.
template <class T, class S>
void add_rows(T* out, const S* x, int64_t D, const int64_t* offset, int64_t n, int64_t ahead, const int64_t* last) {
  constexpr int64_t L = Vec<T>::lanes;
  constexpr int64_t line =
      L * int64_t(sizeof(S)) >= 64 ? L : 64 / int64_t(sizeof(S));  // elements of a cache line, whole vectors
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const S *p[4], *next[4];
    for (int j = 0; j < 4; j++) {
      const int64_t* o = offset + i + ahead + j;
      p[j] = x + offset[i + j], next[j] = x + *(o < last ? o : last);
    }
    int64_t d = 0;
    for (; d + line <= D; d += line) {
      for (int j = 0; j < 4; j++) __builtin_prefetch(next[j] + d, 0, 2);
      for (int64_t e = d; e < d + line; e += L) {
        Vec<T> v = Vec<T>::load(out + e);
        for (int j = 0; j < 4; j++) v = v + Load<T, S>::at(p[j] + e);
        v.store(out + e);
      }
    }
    for (; d + L <= D; d += L) {
      Vec<T> v = Vec<T>::load(out + d);
      for (int j = 0; j < 4; j++) v = v + Load<T, S>::at(p[j] + d);
      v.store(out + d);
    }
    for (; d < D; d++) {
      for (int j = 0; j < 4; j++) out[d] += read<T>(p[j] + d);
    }
  }
  for (; i < n; i++) {
    const S* p = x + offset[i];
    int64_t d = 0;
    for (; d + L <= D; d += L) (Vec<T>::load(out + d) + Load<T, S>::at(p + d)).store(out + d);
    for (; d < D; d++) out[d] += read<T>(p + d);
  }
}

// At most kUnit pixels of one cluster: where their offsets begin, and the row they are summed into.
template <class T>
struct Unit {
  int64_t begin, size;
  T* out;
};

template <class T, class S>
Status sum_rows(const Problem& a, int64_t* histogram) {
  const Pixels& x = a.x;
  const S* data = reinterpret_cast<const S*>(x.data);
  T* sums = static_cast<T*>(a.sums);
  int64_t kept = 0, units = 0, partials = 0;
  for (int64_t m = 0; m < a.M; m++) {  // the histogram becomes the position of each part's first pixel of a cluster
    for (int64_t t = 0; t < a.threads; t++) {
      const int64_t h = histogram[t * a.M + m];
      histogram[t * a.M + m] = kept;
      kept += h;
    }
    const int64_t u = divide_up(a.counts[m], kUnit);
    units += u;
    partials += u > 1 ? u : 0;
  }
  Scratch offsets(size_t(kept) * sizeof(int64_t)), unit_memory(size_t(units) * sizeof(Unit<T>));
  Scratch partial_memory(size_t(partials * a.D) * sizeof(T));
  if (!offsets.data || !unit_memory.data || !partial_memory.data) return {Code::out_of_memory};
  int64_t* offset = offsets.as<int64_t>();
  Unit<T>* unit = unit_memory.as<Unit<T>>();
  T* partial = partial_memory.as<T>();
  for (int64_t m = 0, u = 0, p = 0, begin = 0; m < a.M; m++) {
    for (int64_t b = 0; b < a.counts[m]; b += kUnit) {
      T* out = a.counts[m] > kUnit ? partial + p++ * a.D : sums + m * a.D;
      unit[u++] = {begin + b, min(kUnit, a.counts[m] - b), out};
    }
    begin += a.counts[m];
  }
  const int64_t rows = max(4, kPrefetchBytes / (a.D * int64_t(sizeof(S)))) & ~int64_t(3);
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static, 1)
    for (int64_t t = 0; t < a.threads; t++) {
      int64_t* position = histogram + t * a.M;
      const Part part(a.N, t, a.threads);
      for (int64_t n = part.begin; n < part.end;) {
        const int64_t run = x.run(n, part.end - n);
        int64_t o = x.offset(n);
        for (int64_t i = 0; i < run; i++, o += x.sw) {
          const int64_t m = a.cluster[n + i];
          if (m >= 0) offset[position[m]++] = o;
        }
        n += run;
      }
    }
#pragma omp for schedule(dynamic, 4)
    for (int64_t u = 0; u < units; u++) {
      const Unit<T>& w = unit[u];
      std::memset(w.out, 0, size_t(a.D) * sizeof(T));
      if (x.sd == 1) {
        add_rows(w.out, data, a.D, offset + w.begin, w.size, rows, offset + kept - 1);
      } else {
        for (int64_t i = 0; i < w.size; i++) {
          const S* p = data + offset[w.begin + i];
          for (int64_t d = 0; d < a.D; d++) w.out[d] += read<T>(p + d * x.sd);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t d = 0; d < a.D; d += 16) {  // slices of channels: one cluster may own all partial sums
      const size_t bytes = size_t(min(16, a.D - d)) * sizeof(T);
      for (int64_t m = 0, p = 0; m < a.M; m++) {
        T* out = sums + m * a.D + d;
        if (a.counts[m] == 0) std::memset(out, 0, bytes);
        if (a.counts[m] <= kUnit) continue;
        T total[16] = {};
        for (int64_t b = 0; b < a.counts[m]; b += kUnit, p++) {
          for (int64_t e = 0; e < min(16, a.D - d); e++) total[e] += partial[p * a.D + d + e];
        }
        std::memcpy(out, total, bytes);
      }
    }
  }
  return {};
}

// The accumulators of a task: [M, lanes], in a register while the cluster stays the same.
template <class T>
struct Accumulators {
  T *part, *total;   // [M, lanes] each
  int32_t* pending;  // [M] pixels in `part`
  Vec<T> sum = Vec<T>::splat(0);
  int64_t m = -1;
  int32_t left = 0;  // pixels that `sum` may still take

  DNC_INLINE void add(int64_t cluster, Vec<T> v) {
    if (cluster < 0) return;
    if (cluster != m || left == 0) {
      flush();
      m = cluster;
      sum = Vec<T>::load(part + m * Vec<T>::lanes);
      left = int32_t(kUnit) - pending[m];
    }
    sum = sum + v;
    left--;
  }
  DNC_INLINE void flush() {
    if (m < 0) return;
    T* p = part + m * Vec<T>::lanes;
    if (left > 0) {
      sum.store(p);
      pending[m] = int32_t(kUnit) - left;
    } else {
      T* t = total + m * Vec<T>::lanes;
      (Vec<T>::load(t) + sum).store(t);
      Vec<T>::splat(0).store(p);
      pending[m] = 0;
    }
  }
};

template <class T, class S>
Status sum_planes(const Problem& a) {
  constexpr int64_t L = Vec<T>::lanes, tile = 64;
  const Pixels& x = a.x;
  T* sums = static_cast<T*>(a.sums);
  // 32 tasks keep 16 cores busy; a chunk's partial sums cost at most a sixteenth of its pixels
  const int64_t slices = divide_up(a.D, L), chunks = max(1, min(divide_up(32, slices), a.N / (16 * a.M)));
  const size_t accumulators = size_t(a.M * L) * sizeof(T), each = 2 * accumulators + size_t(divide_up(a.M, 16) * 64);
  Scratch memory(each * size_t(a.threads)), partial_memory(chunks > 1 ? size_t(chunks * a.M * a.D) * sizeof(T) : 0);
  if (!memory.data || !partial_memory.data) return {Code::out_of_memory};
  T* partial = chunks > 1 ? partial_memory.as<T>() : sums;
#pragma omp parallel num_threads(a.threads)
  {
    char* own = memory.as<char>() + each * size_t(omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < slices * chunks; task++) {
      const int64_t chunk = task / slices, d0 = task % slices * L, channels = min(L, a.D - d0);
      std::memset(own, 0, each);
      Accumulators<T> acc{reinterpret_cast<T*>(own), reinterpret_cast<T*>(own + accumulators),
                          reinterpret_cast<int32_t*>(own + 2 * accumulators)};
      T staged[L * tile] = {};  // a tile [lanes, 64 pixels] that cannot be read in place; absent channels stay zero
      const Part part(a.N, chunk, chunks);
      for (int64_t n = part.begin; n < part.end;) {
        const int64_t pixels = x.run(n, min(tile, part.end - n));
        const S* in = reinterpret_cast<const S*>(x.data) + x.offset(n) + d0 * x.sd;
        const T* from = staged;
        int64_t stride = tile;
        if (sizeof(S) == sizeof(T) && channels == L && pixels % L == 0) {
          from = reinterpret_cast<const T*>(in), stride = x.sd;
        } else {
          for (int64_t c = 0; c < channels; c++) read_n(staged + c * tile, in + c * x.sd, pixels);
        }
        for (int64_t i = 0; i < pixels; i += L) {
          Vec<T> r[L];
          for (int64_t c = 0; c < L; c++) r[c] = Vec<T>::load(from + c * stride + i);
          transpose(r);
          const int64_t* m = a.cluster + n + i;
          if (i + L <= pixels) {
            for (int64_t j = 0; j < L; j++) acc.add(m[j], r[j]);
          } else {
            for (int64_t j = 0; j < pixels - i; j++) acc.add(m[j], r[j]);
          }
        }
        n += pixels;
      }
      acc.flush();
      for (int64_t m = 0; m < a.M; m++) {
        T* out = partial + (chunk * a.M + m) * a.D + d0;
        for (int64_t c = 0; c < channels; c++) out[c] = acc.total[m * L + c] + acc.part[m * L + c];
      }
    }
    if (chunks > 1) {
#pragma omp for schedule(static)
      for (int64_t m = 0; m < a.M; m++) {
        T* out = sums + m * a.D;
        std::memcpy(out, partial + m * a.D, size_t(a.D) * sizeof(T));
        for (int64_t chunk = 1; chunk < chunks; chunk++) {
          const T* in = partial + (chunk * a.M + m) * a.D;
          for (int64_t d = 0; d < a.D; d++) out[d] += in[d];
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
  Scratch memory(size_t(a.threads * (a.M + 1)) * sizeof(int64_t));
  if (!memory.data) return {Code::out_of_memory};
  int64_t* histogram = memory.as<int64_t>();
  const bool planes = a.x.sw == 1 && a.x.sd != 1;
  const auto sum = [&] {
    Status s = count(a, histogram, histogram + a.threads * a.M);
    if (!s.ok()) return s;
    return planes ? sum_planes<T, S>(a) : sum_rows<T, S>(a, histogram);
  };
  Status s = sum();
  if (!s.ok() || finite(static_cast<const T*>(a.sums), a.M * a.D)) return s;
  Scratch copy(size_t(a.N) * sizeof(int64_t));
  if (!copy.data) return {Code::out_of_memory};
  if (!without_bad_pixels<T, S>(a, copy.as<int64_t>())) return {};  // finite pixels, but their sum overflows
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
    case DType::float32:
      return sum_pixels<float, float>(p);
    case DType::float64:
      return sum_pixels<double, double>(p);
    case DType::float16:
      return sum_pixels<float, Float16>(p);
    case DType::bfloat16:
      return sum_pixels<float, BFloat16>(p);
    default:
      return bad_argument("x must be float32, float64, float16 or bfloat16");
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
