// The product by FMA, in the compute type: panels [D][lanes] and tiles [block of R pixels][D][R], so one step reads R
// neighbouring values for 2 panels, and R x 2 accumulators stay in registers.
#pragma once
#include "similarity_layout.h"

namespace dnc::cpu::DNC_ISA {
namespace {

struct Tiles {};  // no tile registers to configure
constexpr int operand_parts(const View&, Metric) { return 1; }

// Packed panels [panels][D][L], then biases [panels][L]. Padding lanes have bias -inf: they never win.
template <class T>
void pack_panels(const PanelLayout<T>& lay, const View& centroids, Metric metric, T* out, int threads) {
  constexpr int L = PanelLayout<T>::L;
  T* bias = lay.bias(out);
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
        const auto f = factor<T>(row, lay.D, metric);
        for (int64_t d = 0; d < lay.D; d++) q[d * L + lane] = f.scale * read<T>(row + d);
        bias[j * L + lane] = f.bias;
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

// One block b of R pixels against NP panels, channels [d0, d0+depth): from the bias or the waiting partial sums, to partial
// sums or `take`.
template <int NP, class T, class Take>
DNC_INLINE void block(const PanelLayout<T>& lay, const T* panels, const T* tile, int64_t j, int64_t d0, int64_t depth,
                      T* partial, int b, Take& take) {
  using V = Vec<T>;
  constexpr int R = kRows, L = V::lanes;
  const T* q[NP];
  V acc[NP][R];
#pragma GCC unroll 2
  for (int p = 0; p < NP; p++) {
    q[p] = panels + (j + p) * lay.D * L + d0 * L;
    const V bias = V::load(lay.bias(panels) + (j + p) * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) acc[p][r] = d0 == 0 ? bias : V::load(partial + (p * R + r) * L);
  }
  multiply<T, R, NP>(tile + (b * lay.D + d0) * R, q, depth, acc);
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

// Sub-centroids as panels whose lanes are channels and whose depth runs over the slots of `lay`; slots without one are zero.
template <class T>
void pack_channels(const PanelLayout<T>& lay, const PanelLayout<T>& channels, const T* rows, T* out, int threads) {
  constexpr int L = Vec<T>::lanes;
  std::memset(out, 0, channels.bytes());
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t j = 0; j < channels.panels; j++)
    for (int64_t c = 0; c < lay.C; c++)
      for (int64_t k = 0; k < lay.K; k++)
        std::memcpy(out + (j * channels.D + lay.slot(c, k)) * L, rows + (c * lay.K + k) * lay.D + j * L,
                    size_t(min64(L, lay.D - j * L)) * sizeof(T));
}

// NP panels from j on against every block of a tile.
template <int NP, class T, class Take>
void columns(const PanelLayout<T>& lay, const T* panels, const T* tile, int blocks, int64_t j, int64_t d0, int64_t depth,
             T* partial, Take& take) {
  for (int b = 0; b < blocks; b++)
    block<NP>(lay, panels, tile, j, d0, depth, partial + b * NP * kRows * Vec<T>::lanes, b, take);
}

// 1/|x| (cosine) or |x|^2 (sqeuclidean) of every row of a packed tile.
template <class T>
void row_terms(const T* tile, int64_t D, int rows, Metric metric, T* out) {
  for (int r = 0; r < rows; r++) {
    const T* x = tile + (r / kRows) * D * kRows + r % kRows;
    T square = 0;
    for (int64_t d = 0; d < D; d++) square += x[d * kRows] * x[d * kRows];
    out[r] = row_term(square, metric);
  }
}
}  // namespace
}  // namespace dnc::cpu::DNC_ISA
