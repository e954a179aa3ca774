// The backward half that class_scores and centroid_cross_entropy share. Only the winner of a class carries its gradient, so a
// pixel gathers C rows of centroids and not C*K, and scatters C rows into their gradient. On AMX a product with all of them is
// faster where K is small.
#pragma once
#include "similarity_panels.h"

namespace dnc::cpu::DNC_ISA {
namespace {

// Sub-centroids as rows [C*K][D] of T, scaled as the packed panels are. Points into the caller's memory where nothing changes.
template <class T>
struct CentroidRows {
  Scratch copy;
  const T* rows;
  CentroidRows(const View& centroids, Metric metric, int threads)
      : copy(metric == Metric::dot && centroids.dtype == own_dtype() ? 0 : size_t(centroids.numel()) * sizeof(T)),
        rows(nullptr) {
    if (!copy.data) return;
    const int64_t M = centroids.size[0] * centroids.size[1], D = centroids.size[2];
    if (metric == Metric::dot && centroids.dtype == own_dtype()) {
      rows = centroids.as<T>();
      return;
    }
    T* out = copy.as<T>();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t m = 0; m < M; m++)
      visit(centroids.dtype, [&](auto* type) {
        using S = std::remove_pointer_t<decltype(type)>;
        const S* p = centroids.as<S>() + m * D;
        const T factor = T(metric == Metric::cosine ? 1 / length(p, D) : metric == Metric::sqeuclidean ? 2 : 1);
        for (int64_t d = 0; d < D; d++) out[m * D + d] = factor * read<T>(p + d);
      });
    rows = out;
  }
  static constexpr DType own_dtype() { return sizeof(T) == 8 ? DType::float64 : DType::float32; }
  template <class S>
  static double length(const S* p, int64_t D) {
    double square = 0;
    for (int64_t d = 0; d < D; d++) {
      const double v = read<T>(p + d);
      square += v * v;
    }
    const double l = std::sqrt(square);
    return l > 1e-12 ? l : 1e-12;
  }
};

// Gradients of a tile's scores: g[rows][width], winner[rows][width] (nullptr: K = 1), and optionally own_g[rows][K] for rows
// with a label.
template <class T>
struct TileGradient {
  const PanelLayout<T>& lay;
  int rows;
  const T* g;
  const uint8_t* winner;
  const T* own_g;        // optional
  const int64_t* label;  // with own_g
  DNC_INLINE int64_t centroid(int64_t r, int64_t c) const { return c * lay.K + (winner ? winner[r * lay.width + c] : 0); }
};

// out[r][d0 .. d0+NV*L) += sum over classes c0..c1 of g[r][c] * rows[winner][d]
template <int NV, class T>
DNC_INLINE void gather_block(const TileGradient<T>& t, const T* rows, int64_t c0, int64_t c1, int64_t d0, bool first, T* out) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  for (int64_t r = 0; r < t.rows; r++) {
    T* o = out + r * t.lay.D + d0;
    V acc[NV];
#pragma GCC unroll 16
    for (int i = 0; i < NV; i++) acc[i] = first ? V::splat(0) : V::load(o + i * L);
    for (int64_t c = c0; c < c1; c++) {
      const V g = V::splat(t.g[r * t.lay.width + c]);
      const T* p = rows + t.centroid(r, c) * t.lay.D + d0;
#pragma GCC unroll 16
      for (int i = 0; i < NV; i++) acc[i] = fma(g, V::load(p + i * L), acc[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < NV; i++) acc[i].store(o + i * L);
  }
}

// out[rows][D] = sum over classes of g * winning centroid. Classes go in blocks whose sub-centroids'
// channels fit in L1, since every pixel of the tile picks among them.
template <class T>
void gather(const TileGradient<T>& t, const T* rows, T* out) {
  using V = Vec<T>;
  constexpr int L = V::lanes, NV = 8;
  const int64_t D = t.lay.D, C = t.lay.C, K = t.lay.K;
  const int64_t step = max64(4, (32 << 10) / (K * NV * L * int64_t(sizeof(T))));
  for (int64_t c0 = 0; c0 < C; c0 += step) {
    const int64_t c1 = min64(c0 + step, C);
    int64_t d = 0;
    for (; d + NV * L <= D; d += NV * L) gather_block<NV>(t, rows, c0, c1, d, c0 == 0, out);
    for (; d + 2 * L <= D; d += 2 * L) gather_block<2>(t, rows, c0, c1, d, c0 == 0, out);
    for (; d + L <= D; d += L) gather_block<1>(t, rows, c0, c1, d, c0 == 0, out);
    for (; d < D; d++)
      for (int64_t r = 0; r < t.rows; r++) {
        T a = c0 == 0 ? T(0) : out[r * D + d];
        for (int64_t c = c0; c < c1; c++) a += t.g[r * t.lay.width + c] * rows[t.centroid(r, c) * D + d];
        out[r * D + d] = a;
      }
  }
}

#if defined(DNC_ISA_AMX)
// The gradients of a tile's scores as a dense operand: [row][ld], slots of panels j0 .. j1, 0 where a sub-centroid did not win.
// rest: what bfloat16 lacks of them.
template <class T>
void spread_winners(const TileGradient<T>& t, int64_t j0, int64_t j1, bool rest, int64_t ld, BFloat16* out) {
  constexpr int L = Vec<T>::lanes;
  const PanelLayout<T>& lay = t.lay;
  const int64_t full = (lay.groups - 1) * lay.K;
  // lane s*tail + c of a folded panel holds the s-th k of class c
  alignas(16) uint8_t lane_class[L], lane_k[L];
  alignas(64) int32_t lane_index[L];
  for (int lane = 0; lane < L; lane++) {
    lane_class[lane] = uint8_t(lane % lay.tail), lane_index[lane] = lane % lay.tail;
    lane_k[lane] = uint8_t(lane / lay.tail);
  }
  const __m128i fold_class = _mm_load_si128((const __m128i*)lane_class), fold_k = _mm_load_si128((const __m128i*)lane_k);
  const __m512i fold_index = _mm512_load_si512(lane_index);
  const __mmask16 folded = Vec<T>::first(lay.tail * lay.fold);
  for (int64_t r = 0; r < t.rows; r++)
    for (int64_t j = j0; j < j1;) {
      const bool last = j >= full;
      const int64_t group = last ? lay.groups - 1 : j / lay.K, first = last ? full : group * lay.K;
      const int64_t end = min64(j1, last ? lay.panels : first + lay.K);
      __m512 g = _mm512_loadu_ps(t.g + r * lay.width + group * L);
      __m128i winner = t.winner ? _mm_loadu_si128((const __m128i*)(t.winner + r * lay.width + group * L)) : _mm_setzero_si128();
      __mmask16 valid = 0xffff;
      if (last) {
        g = _mm512_permutexvar_ps(fold_index, g), valid = folded;
        winner = _mm_sub_epi8(_mm_shuffle_epi8(winner, fold_class), fold_k);
      }
      __m512 pair[2] = {g, _mm512_setzero_ps()};
      __m512i value = next_part(pair);
      if (rest) value = next_part(pair);
      for (; j < end; j++) {
        const int64_t k = (j - first) * (last ? lay.fold : 1);
        const __mmask16 won = _mm_mask_cmpeq_epi8_mask(valid, winner, _mm_set1_epi8(char(k)));
        _mm256_storeu_si256((__m256i*)(out + r * ld + (j - j0) * L),
                            _mm256_maskz_mov_epi16(won, _mm512_castsi512_si256(value)));
      }
    }
}

// out[rows][D] = sum over classes of g * winning centroid. With few sub-centroids a class it is a product with all of them,
// both factors in two parts, so as exact as in float32: that costs 4*C*K products of an AMX tile a channel, and gathering the
// winners C products of a vector, which are 16 times as slow and wait for their operands.
template <class T>
struct WinnerSum {
  static constexpr int64_t kSlots = 256;  // slots whose gradients are spread at a time: 512 B a pixel
  const T* rows;
  const bool dense;
  const int64_t half;       // slots, in whole steps
  PanelLayout<T> channels;  // all slots for the gradients, then all for what they lack
  Scratch panels;
  WinnerSum(const PanelLayout<T>& lay, const T* centroid_rows, bool wanted, int threads)
      : rows(centroid_rows),
        dense(wanted && rows && lay.slots() <= 5 * lay.C),
        half((lay.slots() + kStep - 1) / kStep * kStep),
        channels(lay.D, 1, 2 * half, 2),
        panels(dense ? channels.bytes() : 0) {
    channels.ld = min64(kSlots, half);
    if (dense && panels.data) pack_channels(lay, channels, rows, panels.as<BFloat16>(), threads);
  }
  bool ok() const { return panels.data; }
  size_t scratch(int most) const { return dense ? size_t(most) * (channels.ld / 2 + channels.width) : 0; }
  void operator()(const TileGradient<T>& t, T* memory, T* out) const {
    if (!dense) return gather(t, rows, out);
    constexpr int L = Vec<T>::lanes;
    const int blocks = (t.rows + kRows - 1) / kRows;
    BFloat16* g = reinterpret_cast<BFloat16*>(memory);
    T* partial = memory + blocks * kRows * channels.ld / 2;
    std::memset(g, 0, size_t(blocks) * kRows * channels.ld * sizeof(BFloat16));
    Rows<T> into{t.lay.D, t.lay.D, out};
    for (int64_t start = 0; start < 2 * half; start += half)
      for (int64_t d = 0; d < half; d += kSlots) {
        const int64_t n = min64(kSlots, half - d), j0 = d / L, j1 = min64(j0 + n / L, t.lay.panels), d0 = start + d;
        spread_winners(t, j0, j1, start > 0, channels.ld, g);
        sweep_depth(channels, panels.as<BFloat16>(), g - d0, blocks, 0, channels.panels, d0, n, partial, into);
      }
  }
};
#else
// out[rows][D] = sum over classes of g * winning centroid.
template <class T>
struct WinnerSum {
  const T* rows;
  WinnerSum(const PanelLayout<T>&, const T* centroid_rows, bool, int) : rows(centroid_rows) {}
  bool ok() const { return true; }
  size_t scratch(int) const { return 0; }
  void operator()(const TileGradient<T>& t, T*, T* out) const { gather(t, rows, out); }
};
#endif

// out[rows][D] += sum over k of own_g * own centroids, for rows with a label.
template <class T>
void gather_own(const TileGradient<T>& t, const T* rows, T* out) {
  const int64_t D = t.lay.D, K = t.lay.K;
  if (!t.own_g) return;
  for (int64_t r = 0; r < t.rows; r++) {
    if (t.label[r] < 0) continue;
    for (int64_t k = 0; k < K; k++) {
      const T g = t.own_g[r * K + k];
      if (g == 0) continue;
      const T* p = rows + (t.label[r] * K + k) * D;
      for (int64_t d = 0; d < D; d++) out[r * D + d] += g * p[d];
    }
  }
}

// Sum of all score gradients of a row: what -|x|^2 receives.
template <class T>
T total_gradient(const TileGradient<T>& t, int64_t r) {
  T s = 0;
  for (int64_t c = 0; c < t.lay.C; c++) s += t.g[r * t.lay.width + c];
  if (t.own_g && t.label[r] >= 0)
    for (int64_t k = 0; k < t.lay.K; k++) s += t.own_g[r * t.lay.K + k];
  return s;
}

// From u = sum g q to the gradient of x, in place. cosine: (u - xn <xn,u>) / |x| with xn = x/|x|; sqeuclidean: u - 2 x sum(g).
// A pixel that is sent nothing gets exactly 0, whatever its features.
template <class T>
void finish_pixel_gradient(const TileGradient<T>& t, Metric metric, const T* x, const T* terms, T* u) {
  const int64_t D = t.lay.D;
  if (metric == Metric::dot) return;
  for (int64_t r = 0; r < t.rows; r++) {
    T* o = u + r * D;
    const T* v = x + r * D;
    if (metric == Metric::cosine) {
      const T inverse = terms[r];
      T along = 0, sent = 0;
      for (int64_t d = 0; d < D; d++) along += v[d] * o[d], sent += std::fabs(o[d]);
      if (sent == 0) continue;
      along *= inverse * inverse;
      if (inverse >= T(1e12)) along = 0;  // |x| was clamped: a constant
      for (int64_t d = 0; d < D; d++) o[d] = (o[d] - along * v[d]) * inverse;
    } else {
      const T s = 2 * total_gradient(t, r);
      if (s == 0) continue;
      for (int64_t d = 0; d < D; d++) o[d] -= s * v[d];
    }
  }
}

// Partial gradients of the sub-centroids: [M][D] of sum g * x (x/|x| for cosine, 2x for sqeuclidean) and [M] of sum g.
template <class T>
struct CentroidGradient {
  T* sum;    // [M][D]
  T* total;  // [M]
  static size_t size(const PanelLayout<T>& lay) { return size_t(lay.C * lay.K) * (lay.D + 1); }
  CentroidGradient(const PanelLayout<T>& lay, T* memory) : sum(memory), total(memory + lay.C * lay.K * lay.D) {}

  void add(const TileGradient<T>& t, Metric metric, const T* x, const T* terms) const {
    using V = Vec<T>;
    constexpr int L = V::lanes;
    const int64_t D = t.lay.D, K = t.lay.K;
    // the same class blocks as gather: their rows of `sum` stay in cache while the tile goes by
    const int64_t step = max64(1, (256 << 10) / (K * D * int64_t(sizeof(T))));
    auto add_row = [&](int64_t m, T g, const T* v) {
      T* o = sum + m * D;
      const V gv = V::splat(g);
      int64_t d = 0;
      for (; d + L <= D; d += L) fma(gv, V::load(v + d), V::load(o + d)).store(o + d);
      for (; d < D; d++) o[d] += g * v[d];
      total[m] += g;
    };
    auto factor = [&](int64_t r) { return metric == Metric::cosine ? terms[r] : metric == Metric::sqeuclidean ? T(2) : T(1); };
    for (int64_t c0 = 0; c0 < t.lay.C; c0 += step)
      for (int64_t r = 0; r < t.rows; r++)
        for (int64_t c = c0; c < min64(c0 + step, t.lay.C); c++) {
          const T g = t.g[r * t.lay.width + c];  // a pixel that sends nothing must not send 0 * NaN
          if (g != 0) add_row(t.centroid(r, c), g * factor(r), x + r * D);
        }
    if (t.own_g)
      for (int64_t r = 0; r < t.rows; r++)
        if (t.label[r] >= 0)
          for (int64_t k = 0; k < K; k++)
            if (const T g = t.own_g[r * K + k]; g != 0) add_row(t.label[r] * K + k, g * factor(r), x + r * D);
  }

  // Sums `parts` partial gradients in order into out [M][D] and applies what depends on the centroid alone.
  // cosine: (s - pn <pn,s>) / |p|; sqeuclidean: s - 2 p sum(g) (`total` there counts 2g).
  static void reduce(const PanelLayout<T>& lay, const T* memory, int64_t parts, const View& centroids, Metric metric, T* out,
                     int threads) {
    const int64_t M = lay.C * lay.K, D = lay.D;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t m = 0; m < M; m++) {
      T* o = out + m * D;
      T total = 0;
      for (int64_t d = 0; d < D; d++) o[d] = 0;
      for (int64_t i = 0; i < parts; i++) {
        const T* s = memory + i * int64_t(size(lay));
        for (int64_t d = 0; d < D; d++) o[d] += s[m * D + d];
        total += s[M * D + m];
      }
      if (metric == Metric::dot) continue;
      visit(centroids.dtype, [&](auto* type) {
        using S = std::remove_pointer_t<decltype(type)>;
        const S* p = centroids.as<S>() + m * D;
        if (metric == Metric::sqeuclidean) {
          for (int64_t d = 0; d < D; d++) o[d] -= total * read<T>(p + d);
          return;
        }
        const T inverse = T(1 / CentroidRows<T>::length(p, D));
        T along = 0;
        for (int64_t d = 0; d < D; d++) along += read<T>(p + d) * o[d];
        along *= inverse * inverse;
        if (inverse >= T(1e12)) along = 0;
        for (int64_t d = 0; d < D; d++) o[d] = (o[d] - along * read<T>(p + d)) * inverse;
      });
    }
  }
};

// Pixels are handled in a fixed number of chunks, whatever the number of threads, and partial sums are added in chunk order:
// results are bit-equal for any thread count. Gradients of centroids need [M,D] a chunk, so there are fewer chunks then.
constexpr int64_t kChunks = 64;
DNC_INLINE int64_t chunk_count(int64_t tiles, size_t bytes_per_chunk) {
  int64_t most = kChunks;
  if (bytes_per_chunk) most = max64(2, min64(16, (64 << 20) / int64_t(bytes_per_chunk)));
  return min64(most, tiles);
}

}  // namespace
}  // namespace dnc::cpu::DNC_ISA
