// subcentroid_cross_entropy on the CPU: softmax over all sub-centroids, its loss and gradient, class scores beside it.
//
//   s[n,m] = <x_n, p_m> / temperature;  loss = lse_m s - s[target];  dX = (sum_m softmax_m p_m - p_target) / temperature
//   reads x once [N,D], packed centroids twice a tile from L2/L3; writes loss [N], dX [N,D]; [N,C*K] lives a tile at a time.
//   floors: 4*N*C*K*D flop at FMA peak with dX (2 without); 2*N*D*4 bytes. Compute-bound from D = 32 on.
// Plan: the sweep of similarity_panels.h leaves a tile's similarities as [block][slot][row], the layout that it reads pixels
// in: after exp the tile is the left factor of a second sweep, over sub-centroids packed with channels as lanes. Every pixel's
// results depend on that pixel alone: bit-equal for any thread count. Reference: dnc_kernels/ops/similarity/reference.py.
#include <omp.h>

#include "dnc/similarity.h"
#include "similarity_gradient.h"
#include "similarity_scores.h"

namespace dnc::cpu::DNC_ISA {
namespace {

// Takes similarities as [block][slot][row], and class maxima too where they are wanted.
template <class T>
struct Similarities {
  static constexpr int L = Vec<T>::lanes;
  const PanelLayout<T>& lay;
  T* out;
  ClassMax<T>* maxima;
  DNC_INLINE void operator()(int b, int64_t j, const Vec<T> (&acc)[kRows]) {
    if (maxima) (*maxima)(b, j, acc);
    T rows[kRows][L];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) acc[r].store(rows[r]);
    T* o = out + (b * lay.slots() + j * L) * kRows;
    for (int l = 0; l < L; l++)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) o[l * kRows + r] = rows[r][l];
  }
};

// Takes rows [row][width] of the second product.
template <class T>
struct Rows {
  static constexpr int L = Vec<T>::lanes;
  int64_t width;
  T* out;
  DNC_INLINE void operator()(int b, int64_t j, const Vec<T> (&acc)[kRows]) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) acc[r].store(out + (int64_t(b) * kRows + r) * width + j * L);
  }
};

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

constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

// One block [slots][kRows] of similarities becomes exp((s - max) / temperature); a row of `skip` becomes zero.
template <class T>
void block_softmax(T* block, int64_t slots, T scale, const bool* skip, T* top, T* sum) {
  using V = Vec<T>;
  constexpr int L = V::lanes, cycle = kRows / gcd(kRows, L), length = cycle * L;  // vectors until lanes meet the same rows
  const int64_t count = slots * kRows;
  T lane[length];
  V most[cycle], total[cycle];
  for (int c = 0; c < cycle; c++) most[c] = V::splat(-INFINITY), total[c] = V::splat(0);
  for (int64_t i = 0; i < count; i += length)
#pragma GCC unroll 4
    for (int c = 0; c < cycle; c++) most[c] = max(V::load(block + i + c * L), most[c]);
  for (int c = 0; c < cycle; c++) most[c].store(lane + c * L);
  for (int r = 0; r < kRows; r++) {
    top[r] = lane[r];
    for (int i = r; i < length; i += kRows) top[r] = lane[i] > top[r] ? lane[i] : top[r];
  }
  // minus infinity goes through exp to an exact zero
  for (int i = 0; i < length; i++) lane[i] = skip[i % kRows] ? T(INFINITY) : top[i % kRows];
  for (int c = 0; c < cycle; c++) most[c] = V::load(lane + c * L);
  const V f = V::splat(scale);
  for (int64_t i = 0; i < count; i += length)
#pragma GCC unroll 4
    for (int c = 0; c < cycle; c++) {
      const V e = exp((V::load(block + i + c * L) - most[c]) * f);
      e.store(block + i + c * L);
      total[c] = total[c] + e;
    }
  for (int c = 0; c < cycle; c++) total[c].store(lane + c * L);
  for (int r = 0; r < kRows; r++) {
    sum[r] = 0;
    for (int i = r; i < length; i += kRows) sum[r] += lane[i];
  }
}

Status check_targets(const SubcentroidCrossEntropy& a, int64_t N, int64_t M) {
  for (int64_t n = 0; n < N; n++) {
    const int64_t m = a.target.as<int64_t>()[n];
    if (m >= M && m != a.ignore_index) return {Code::bad_label, n, m, "labels must be in [0,C*K), ignore_index or negative"};
  }
  return {};
}

template <class T>
Status contrast(const SubcentroidCrossEntropy& a) {
  const ClassScores& s = a.scores;
  const Pixels x(s.x);
  const int64_t N = x.N(), K = s.centroids.size[1];
  const PanelLayout<T> lay(s.centroids.size[0], K, x.D), channels(x.D, 1, lay.slots());
  if (N == 0) return {};
  if (a.target)
    if (const Status bad = check_targets(a, N, lay.C * K); !bad.ok()) return bad;
  const bool gradient = bool(a.grad_x), scored = bool(s.scores);
  Scratch panels(lay.bytes()), channel_panels(gradient ? channels.bytes() : 0);
  CentroidRows<T> centroids(s.centroids, Metric::dot, s.threads);
  if (!panels.data || !channel_panels.data || !centroids.rows) return out_of_memory();
  pack_panels(lay, s.centroids, Metric::dot, panels.as<T>(), s.threads);
  if (gradient) pack_channels(lay, channels, centroids.rows, channel_panels.as<T>(), s.threads);
  const int64_t wide = lay.slots() + (gradient ? channels.width + (lay.slots() > kDeep ? kPanelsInRun * Vec<T>::lanes : 0) : 0);
  const int rows = tile_rows(x.D, wide * sizeof(T) + (scored ? lay.width * (sizeof(T) + 1) : 0), N, sizeof(T));
  const int blocks = rows / kRows;
  const int64_t tiles = (N + rows - 1) / rows;
  const T scale = T(1 / a.temperature), coefficient = scale * (a.scale ? a.scale.as<T>()[0] : T(1));
  int failed = 0;
#pragma omp parallel num_threads(s.threads) reduction(| : failed)
  {
    const size_t partial = size_t(max64(partial_size(lay, blocks), gradient ? partial_size(channels, blocks) : 0));
    Scratch memory((size_t(rows) * (x.D + lay.slots() + channels.width + 3) + partial) * sizeof(T) + rows);
    Scratch results(scored ? ScoreTile<T>::bytes(lay, rows) : 0);
    failed = !memory.data || !results.data;
    T* tile = memory.as<T>();
    T* weights = tile + rows * x.D;  // [block][slot][kRows]
    T* mean = weights + rows * lay.slots();
    T* partials = mean + rows * channels.width;
    T* top = partials + partial;
    T* sum = top + rows;
    T* own = sum + rows;  // of the target
    bool* skip = reinterpret_cast<bool*>(own + rows);
    ScoreTile<T> score(s, lay, rows, results.data);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tiles; t++) {
      if (failed) continue;
      const int64_t n0 = t * rows;
      const int n = int(min64(rows, N - n0)), used = (n + kRows - 1) / kRows;
      auto target = [&](int r) { return a.target.as<int64_t>()[n0 + r]; };
      for (int r = 0; r < used * kRows; r++) {
        skip[r] = r >= n;
        if (r < n && a.target) skip[r] = target(r) < 0 || target(r) == a.ignore_index;
        if (r < n && !a.target && s.labels) {
          const int64_t y = s.labels.as<int64_t>()[n0 + r];
          skip[r] = y < 0 || y >= lay.C;
        }
      }
      pack_tile(x, n0, n, tile);
      if (scored) score.begin(n0, n);
      auto maxima = score.take();
      Similarities<T> take{lay, weights, scored ? &maxima : nullptr};
      sweep(lay, panels.as<T>(), tile, used, partials, take);
      if (scored) score.finish(n0, n, tile);
      if (a.target)
        for (int r = 0; r < n; r++) {
          if (skip[r]) continue;
          const int64_t slot = lay.slot(target(r) / K, target(r) % K);
          own[r] = weights[(r / kRows * lay.slots() + slot) * kRows + r % kRows];
        }
      for (int b = 0; b < used; b++)
        block_softmax(weights + b * lay.slots() * kRows, lay.slots(), scale, skip + b * kRows, top + b * kRows,
                      sum + b * kRows);
      for (int r = 0; r < n; r++) {
        // the target is taken from the maximum first: both can be large where their difference is not
        const double from_top = double(top[r]) - (a.target && !skip[r] ? double(own[r]) : 0.0);
        a.loss.as<T>()[n0 + r] = skip[r] ? T(0) : T(from_top * double(scale) + std::log(double(sum[r])));
      }
      if (!gradient) continue;
      Rows<T> into{channels.width, mean};
      sweep(channels, channel_panels.as<T>(), weights, used, partials, into);
      for (int r = 0; r < n; r++) {
        T* g = mean + r * channels.width;
        if (skip[r]) {
          std::memset(g, 0, size_t(x.D) * sizeof(T));
          continue;
        }
        const T factor = coefficient / sum[r];
        if (a.target) {
          const T* p = centroids.rows + target(r) * x.D;
          for (int64_t d = 0; d < x.D; d++) g[d] = g[d] * factor - p[d] * coefficient;
        } else {
          for (int64_t d = 0; d < x.D; d++) g[d] *= factor;
        }
      }
      store_tile(Pixels(a.grad_x), n0, n, mean, channels.width);
    }
  }
  return failed ? out_of_memory() : Status{};
}

}  // namespace

Status subcentroid_cross_entropy(const SubcentroidCrossEntropy& a) {
  if (a.scores.metric != Metric::dot) return bad_argument("the metric must be dot");
  if (a.scores.own_similarity && !a.scores.labels) return bad_argument("own_similarity needs labels");
  return a.loss.dtype == DType::float64 ? contrast<double>(a) : contrast<float>(a);
}

}  // namespace dnc::cpu::DNC_ISA
