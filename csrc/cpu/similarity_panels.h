// The product that every similarity kernel shares: a tile of pixels against all sub-centroids, with a functor taking each
// result while it is in registers.
//
// Lanes of a vector are classes: centroids are packed once into panels [D][lanes] of 16 classes (AVX-512) for one k, so the max
// over K is an element-wise max of accumulators. The last group of classes, when at most half full, is folded: a panel holds
// several k of its few classes (C = 19, K = 10: 12 panels and not 20). A tile is packed [block of R pixels][D][R], so one step
// reads R neighbouring values for 2 panels: R x 2 accumulators stay in registers. Large D is cut into blocks whose panels fit
// in L1; the partial sums of a run of panels then wait in L2.
#pragma once
#include <type_traits>

#include "tile.h"

namespace dnc::cpu::DNC_ISA {
namespace {

// Calls f with a null pointer of the element type.
template <class F>
DNC_INLINE void visit(DType t, F f) {
  switch (t) {
    case DType::float64: return f((double*)nullptr);
    case DType::float16: return f((Float16*)nullptr);
    case DType::bfloat16: return f((BFloat16*)nullptr);
    default: return f((float*)nullptr);
  }
}

DNC_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
DNC_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

#if defined(DNC_ISA_AVX512)
constexpr int kRows = 12;  // 24 accumulators + 2 panels + 1 broadcast of 32 registers
constexpr int kPanels = 2;
#elif defined(DNC_ISA_AVX2)
constexpr int kRows = 6;  // 12 + 2 + 1 of 16
constexpr int kPanels = 2;
#else
constexpr int kRows = 4;
constexpr int kPanels = 1;
#endif

// How C classes of K sub-centroids lie in panels.
template <class T>
struct PanelLayout {
  static constexpr int L = Vec<T>::lanes;
  int64_t C, K, D, groups, width;  // width = groups * L: a row of class maxima
  int tail;                        // classes in the last group
  int fold;                        // sub-centroids a panel of the last group holds (1: not folded)
  int64_t panels;
  PanelLayout(int64_t C_, int64_t K_, int64_t D_) : C(C_), K(K_), D(D_) {
    groups = (C + L - 1) / L;
    width = groups * L;
    tail = int(C - (groups - 1) * L);
    fold = int(min64(K, L / tail));
    panels = (groups - 1) * K + (K + fold - 1) / fold;
  }
  struct Panel {
    int64_t group, k;  // the first k of it
    int fold;
  };
  Panel panel(int64_t j) const {
    const int64_t full = (groups - 1) * K;
    if (j < full) return {j / K, j % K, 1};
    return {groups - 1, (j - full) * fold, fold};
  }
  // Class and sub-centroid in a lane of a panel; false for padding.
  bool entry(const Panel& p, int lane, int64_t* c, int64_t* k) const {
    const int classes = p.group == groups - 1 ? tail : L;
    *c = p.group * L + lane % classes;
    *k = p.k + lane / classes;
    return lane < classes * p.fold && *k < K;
  }
  // The place of a sub-centroid among all lanes of all panels: the inverse of `entry`.
  int64_t slot(int64_t c, int64_t k) const {
    const int64_t g = c / L;
    if (g < groups - 1) return (g * K + k) * L + c % L;
    return ((groups - 1) * K + k / fold) * L + k % fold * tail + c % L;
  }
  int64_t slots() const { return panels * L; }
  size_t bytes() const { return size_t(panels) * (D + 1) * L * sizeof(T); }
};

// Packed panels [panels][D][L], then biases [panels][L]: similarity up to what depends on the pixel alone is <x,q> + bias.
//   dot: q = p; cosine: q = p/|p|; sqeuclidean: q = 2p, bias = -|p|^2. Padding lanes have bias -inf: they never win.
template <class T>
void pack_panels(const PanelLayout<T>& lay, const View& centroids, Metric metric, T* out, int threads) {
  constexpr int L = PanelLayout<T>::L;
  T* bias = out + lay.panels * lay.D * L;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t j = 0; j < lay.panels; j++) {
    const auto p = lay.panel(j);
    T* q = out + j * lay.D * L;
    for (int lane = 0; lane < L; lane++) {
      int64_t c, k;
      if (!lay.entry(p, lane, &c, &k)) {
        for (int64_t d = 0; d < lay.D; d++) q[d * L + lane] = 0;
        bias[j * L + lane] = -INFINITY;
        continue;
      }
      visit(centroids.dtype, [&](auto* type) {
        using S = std::remove_pointer_t<decltype(type)>;
        const S* row = centroids.as<S>() + (c * lay.K + k) * lay.D;
        double square = 0;
        if (metric != Metric::dot)
          for (int64_t d = 0; d < lay.D; d++) {
            const double v = read<T>(row + d);
            square += v * v;
          }
        const double length = std::sqrt(square);
        const T factor = T(metric == Metric::cosine        ? 1 / (length > 1e-12 ? length : 1e-12)
                           : metric == Metric::sqeuclidean ? 2
                                                           : 1);
        for (int64_t d = 0; d < lay.D; d++) q[d * L + lane] = factor * read<T>(row + d);
        bias[j * L + lane] = metric == Metric::sqeuclidean ? T(-square) : T(0);
      });
    }
  }
}

// Reads `rows` pixels from n0 as [block][D][R]; rows past the end are zero.
template <class T>
void pack_tile(const Pixels& x, int64_t n0, int rows, T* out) {
  constexpr int R = kRows;
  const int64_t D = x.D;
  const int blocks = (rows + R - 1) / R;
  for (int r = rows; r < blocks * R; r++)
    for (int64_t d = 0; d < D; d++) out[(r / R) * D * R + d * R + r % R] = 0;
  visit(x.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* data = reinterpret_cast<const S*>(x.data);
    if (x.sw == 1 && x.sd != 1) {  // NCHW: a channel of neighbouring pixels is contiguous
      for (int r = 0; r < rows;) {
        const int run = int(x.run(n0 + r, rows - r));
        const S* base = data + x.offset(n0 + r);
        for (int64_t d = 0; d < D; d++)
          for (int i = 0; i < run;) {
            const int q = r + i, row = q % R, piece = int(min64(R - row, run - i));
            T* o = out + (q / R * D + d) * R + row;
            if (piece == R)  // nearly always: a constant count is unrolled
              read_n(o, base + d * x.sd + i, R);
            else
              read_n(o, base + d * x.sd + i, piece);
            i += piece;
          }
        r += run;
      }
      return;
    }
    for (int r = 0; r < rows; r++) {
      const S* row = data + x.offset(n0 + r);
      T* o = out + (r / R) * D * R + r % R;
      for (int64_t d = 0; d < D; d++) o[d * R] = read<T>(row + d * x.sd);
    }
  });
}

constexpr int kRun = 128;  // pixels whose channels are read one after the other: pieces of several cache lines

// Channels of `run` neighbouring pixels, to and from rows [run][ld]; squares of lanes are transposed in registers.
template <class T, class S>
void load_columns(const Pixels& x, const S* base, int run, T* out, int64_t ld) {
  constexpr int L = Vec<T>::lanes;
  const int64_t whole = x.sw == 1 ? x.D / L * L : 0;
  const int squares = x.sw == 1 ? run / L * L : 0;
  for (int64_t d = 0; d < whole; d += L)
    for (int i = 0; i < squares; i += L) {
      Vec<T> v[L];
      for (int j = 0; j < L; j++) v[j] = Load<T, S>::at(base + (d + j) * x.sd + i);
      transpose<T>(v);
      for (int j = 0; j < L; j++) v[j].store(out + (i + j) * ld + d);
    }
  for (int64_t d = 0; d < x.D; d++)
    for (int i = d < whole ? squares : 0; i < run; i++) out[i * ld + d] = read<T>(base + d * x.sd + i * x.sw);
}
template <class T, class S>
void store_columns(const Pixels& x, S* base, int run, const T* in, int64_t ld) {
  constexpr int L = Vec<T>::lanes;
  const int64_t whole = x.sw == 1 ? x.D / L * L : 0;
  const int squares = x.sw == 1 ? run / L * L : 0;
  for (int64_t d = 0; d < whole; d += L)
    for (int i = 0; i < squares; i += L) {
      Vec<T> v[L];
      for (int j = 0; j < L; j++) v[j] = Vec<T>::load(in + (i + j) * ld + d);
      transpose<T>(v);
      for (int j = 0; j < L; j++) {
        T lane[L];
        v[j].store(lane);
        write_n(base + (d + j) * x.sd + i, lane, L);
      }
    }
  for (int64_t d = 0; d < x.D; d++)
    for (int i = d < whole ? squares : 0; i < run; i++) write(base + d * x.sd + i * x.sw, in[i * ld + d]);
}

// Reads `rows` pixels from n0 as rows [rows][ld].
template <class T>
void load_tile(const Pixels& x, int64_t n0, int rows, T* out, int64_t ld) {
  visit(x.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* data = reinterpret_cast<const S*>(x.data);
    for (int r = 0; r < rows;) {
      if (x.sd == 1) {
        read_n(out + r * ld, data + x.offset(n0 + r), x.D);
        r++;
        continue;
      }
      const int run = int(x.run(n0 + r, min64(rows - r, kRun)));
      load_columns(x, data + x.offset(n0 + r), run, out + r * ld, ld);
      r += run;
    }
  });
}

// Writes rows [rows][ld] to pixels n0, n0+1, ...
template <class T>
void store_tile(const Pixels& x, int64_t n0, int rows, const T* in, int64_t ld) {
  visit(x.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    S* data = reinterpret_cast<S*>(x.data);
    for (int r = 0; r < rows;) {
      if (x.sd == 1) {
        write_n(data + x.offset(n0 + r), in + r * ld, x.D);
        r++;
        continue;
      }
      const int run = int(x.run(n0 + r, min64(rows - r, kRun)));
      store_columns(x, data + x.offset(n0 + r), run, in + r * ld, ld);
      r += run;
    }
  });
}

// acc[p][r] (R x NP vectors) += sum over `depth` channels of x[d][r] * q[p][d]
template <class T, int R, int NP>
DNC_INLINE void multiply(const T* x, const T* const* q, int64_t depth, Vec<T> (&acc)[NP][R]) {
  using V = Vec<T>;
  for (int64_t d = 0; d < depth; d++) {
    V b[NP];
#pragma GCC unroll 2
    for (int p = 0; p < NP; p++) b[p] = V::load(q[p] + d * V::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const V a = V::splat(x[d * R + r]);
#pragma GCC unroll 2
      for (int p = 0; p < NP; p++) acc[p][r] = fma(a, b[p], acc[p][r]);
    }
  }
}

// One block of R pixels against NP panels, channels [d0, d0+depth): from the bias or the waiting partial sums, to partial sums
// or `take`.
template <class T, int NP, class Take>
DNC_INLINE void block(const PanelLayout<T>& lay, const T* panels, const T* x, int64_t j, int64_t d0, int64_t depth, T* partial,
                      int b, Take& take) {
  using V = Vec<T>;
  constexpr int R = kRows, L = V::lanes;
  const T* q[NP];
  V acc[NP][R];
#pragma GCC unroll 2
  for (int p = 0; p < NP; p++) {
    q[p] = panels + (j + p) * lay.D * L + d0 * L;
    const V bias = V::load(panels + lay.panels * lay.D * L + (j + p) * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) acc[p][r] = d0 == 0 ? bias : V::load(partial + (p * R + r) * L);
  }
  multiply<T, R, NP>(x + d0 * R, q, depth, acc);
#pragma GCC unroll 2
  for (int p = 0; p < NP; p++) {
    if (d0 + depth < lay.D) {
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[p][r].store(partial + (p * R + r) * L);
    } else {
      take(b, j + p, acc[p]);
    }
  }
}

constexpr int64_t kDeep = 1024;       // more channels than this are cut into blocks of
constexpr int64_t kDepth = 256;       // these: 2 panels x 256 x 64 B = 32 KB, the L1 of a small core
constexpr int64_t kPanelsInRun = 16;  // panels whose partial sums wait together

// Every panel against every block of a packed tile. partial: partial_size(blocks) elements, unused for D <= kDeep.
template <class T, class Take>
void sweep(const PanelLayout<T>& lay, const T* panels, const T* tile, int blocks, T* partial, Take& take) {
  constexpr int R = kRows, L = Vec<T>::lanes;
  const int64_t depth = lay.D > kDeep ? kDepth : lay.D, run = lay.D > kDeep ? kPanelsInRun : lay.panels;
  for (int64_t j0 = 0; j0 < lay.panels; j0 += run) {
    const int64_t j1 = min64(j0 + run, lay.panels);
    for (int64_t d0 = 0; d0 < lay.D; d0 += depth) {
      const int64_t n = min64(depth, lay.D - d0);
      int64_t j = j0;
      for (; j + kPanels <= j1; j += kPanels)
        for (int b = 0; b < blocks; b++)
          block<T, kPanels>(lay, panels, tile + b * lay.D * R, j, d0, n, partial + ((j - j0) * blocks + b * kPanels) * R * L, b,
                            take);
      for (; j < j1; j++)
        for (int b = 0; b < blocks; b++)
          block<T, 1>(lay, panels, tile + b * lay.D * R, j, d0, n, partial + ((j - j0) * blocks + b) * R * L, b, take);
    }
  }
}
template <class T>
size_t partial_size(const PanelLayout<T>& lay, int blocks) {
  return lay.D > kDeep ? size_t(kPanelsInRun) * blocks * kRows * Vec<T>::lanes : 0;
}

// Takes class maxima: best[rows][width] and winner[rows][width] over k, and the own-class similarities of pixels with a label.
template <class T>
struct ClassMax {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  const PanelLayout<T>& lay;
  T* best;
  uint8_t* winner;       // nullptr where K == 1
  const int64_t* label;  // of the tile's rows, -1 for none; nullptr: no own similarities wanted
  T* own;                // [rows][K]
  DNC_INLINE void operator()(int b, int64_t j, const Vec<T> (&acc)[kRows]) {
    const auto p = lay.panel(j);
    const int64_t at = p.group * L;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      const int64_t row = b * kRows + r;
      T* m = best + row * lay.width + at;
      if (p.k == 0) {
        acc[r].store(m);
        if (winner) std::memset(winner + row * lay.width + at, 0, L);
      } else {
        const V old = V::load(m);
        const auto better = gt(acc[r], old);
        V::select(better, acc[r], old).store(m);
        V::store_index(winner + row * lay.width + at, better, uint8_t(p.k));
      }
    }
    if (label)
      for (int r = 0; r < kRows; r++) {
        const int64_t row = b * kRows + r, c = label[row] - at;
        const int classes = p.group == lay.groups - 1 ? lay.tail : L;
        if (c < 0 || c >= classes) continue;
        T lanes[L];
        acc[r].store(lanes);
        for (int s = 0; s < p.fold && p.k + s < lay.K; s++) own[row * lay.K + p.k + s] = lanes[s * classes + c];
      }
  }
  // Folds the last group's lanes together: lane s*tail + c holds the best of k = s, s + fold, ... of class c.
  void finish(int rows) const {
    if (lay.fold == 1) return;
    for (int r = 0; r < rows; r++) {
      T* m = best + r * lay.width + (lay.groups - 1) * L;
      uint8_t* w = winner + r * lay.width + (lay.groups - 1) * L;
      for (int s = 1; s < lay.fold; s++)
        for (int c = 0; c < lay.tail; c++) {
          const T v = m[s * lay.tail + c];
          const int k = w[s * lay.tail + c] + s;
          if (v > m[c] || (v == m[c] && k < w[c])) m[c] = v, w[c] = uint8_t(k);
        }
    }
  }
};

// 1/|x| (cosine) or |x|^2 (sqeuclidean) of every row of a packed tile.
template <class T>
void row_terms(const T* tile, int64_t D, int rows, Metric metric, T* out) {
  for (int r = 0; r < rows; r++) {
    const T* x = tile + (r / kRows) * D * kRows + r % kRows;
    T square = 0;
    for (int64_t d = 0; d < D; d++) square += x[d * kRows] * x[d * kRows];
    const T length = std::sqrt(square);
    out[r] = metric == Metric::cosine ? 1 / (length > T(1e-12) || length != length ? length : T(1e-12)) : square;
  }
}
template <class T>
DNC_INLINE T finish_similarity(T v, T term, Metric metric) {
  return metric == Metric::cosine ? v * term : metric == Metric::sqeuclidean ? v - term : v;
}

// Pixels a tile holds, so that what a thread touches again and again stays in about 640 KB of L2.
DNC_INLINE int tile_rows(int64_t D, int64_t bytes_per_row, int64_t N, size_t element) {
  const int64_t channels = D > kDeep ? kDepth + kPanelsInRun * (64 / int64_t(element)) : D;
  int64_t rows = (640 << 10) / (channels * int64_t(element) + bytes_per_row) / kRows * kRows;
  rows = max64(2 * kRows, min64(rows, 384 / kRows * kRows));
  return int(min64(rows, (N + kRows - 1) / kRows * kRows));
}

}  // namespace
}  // namespace dnc::cpu::DNC_ISA
