// class_scores, its gradients, and nearest_centroid on the CPU.
//
//   scores[n,c] = max_k <x_n, p_ck> (or cosine, or -|x-p|^2); nearest = argmax over c and k
//   reads x once [N,D], packed centroids once a tile from L2/L3; writes scores [N,C], winner u8 [N,C], own similarities [N,K]
//   floors: 2*N*C*K*D flop at FMA peak; N*(D + C)*4 bytes. Compute-bound from D = 32 on.
//   bfloat16 on AMX: 16 times the FMA peak, at 2 products a sub-centroid (similarity_amx.h).
// Plan: similarity_panels.h. Threads take chunks of tiles. Deterministic for any thread count. Ties: the lowest k, the lowest
// c*K+k. Reference: dnc_kernels/ops/similarity/reference.py.
#include "dnc/similarity.h"

#include <omp.h>

#include "similarity_gradient.h"
#include "similarity_scores.h"

namespace dnc::cpu::DNC_ISA {
namespace {

template <class T>
Status scores(const ClassScores& a) {
  const Pixels x(a.x);
  const int64_t N = x.N();
  const PanelLayout<T> lay(a.centroids.size[0], a.centroids.size[1], x.D, operand_parts(a.centroids, a.metric));
  if (N == 0) return {};
  Scratch panels(lay.bytes());
  if (!panels.data) return out_of_memory();
  pack_panels(lay, a.centroids, a.metric, panels.as<Operand<T>>(), a.threads);
  const int rows = tile_rows(x.D, lay.width * (sizeof(T) + 1), N, sizeof(T)), blocks = rows / kRows;
  const int64_t tiles = (N + rows - 1) / rows;
  int failed = 0;
#pragma omp parallel num_threads(a.threads) reduction(| : failed)
  {
    Scratch memory((size_t(rows) * x.D + partial_size(lay, blocks)) * sizeof(T)), results(ScoreTile<T>::bytes(lay, rows));
    failed = !memory.data || !results.data;
    [[maybe_unused]] const Tiles registers;
    auto* tile = memory.as<Operand<T>>();
    ScoreTile<T> score(a, lay, rows, results.data);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tiles; t++) {
      if (failed) continue;
      const int64_t n0 = t * rows;
      const int n = int(min64(rows, N - n0)), used = (n + kRows - 1) / kRows;
      pack_tile(x, n0, n, tile);
      score.begin(n0, n);
      auto take = score.take();
      sweep(lay, panels.as<Operand<T>>(), tile, used, memory.as<T>() + rows * x.D, take);
      score.finish(n0, n, tile);
    }
  }
  return failed ? out_of_memory() : Status{};
}

template <class T>
Status scores_backward(const ClassScoresBackward& a) {
  const Pixels x(a.x), win(a.winner ? a.winner : a.x);
  const int64_t N = x.N();
  const PanelLayout<T> lay(a.centroids.size[0], a.centroids.size[1], x.D);
  const bool to_centroids = bool(a.grad_centroids), own = bool(a.grad_own_similarity), indexed = lay.K > 1;
  CentroidRows<T> centroids(a.centroids, a.metric, a.threads);
  const WinnerSum<T> winners(lay, centroids.rows, a.grad_x && a.grad_scores, a.threads);
  const int rows = tile_rows(2 * x.D, lay.width * (sizeof(T) + 1), N > 0 ? N : 1, sizeof(T));
  const int64_t tiles = (N + rows - 1) / rows, part = to_centroids ? CentroidGradient<T>::size(lay) : 0;
  const int64_t chunks = chunk_count(tiles, part * sizeof(T));
  Scratch parts(part * chunks * sizeof(T));
  if (!centroids.rows || !winners.ok() || !parts.data) return out_of_memory();
  int failed = 0;
#pragma omp parallel num_threads(a.threads) reduction(| : failed)
  {
    const size_t scratch = winners.scratch(rows);
    Scratch memory((size_t(rows) * (2 * x.D + lay.width + 1 + lay.K) + scratch) * sizeof(T) +
                   size_t(rows) * (lay.width + sizeof(int64_t)));
    failed = !memory.data;
    [[maybe_unused]] const Tiles registers;
    T* tile = memory.as<T>();
    T* gradient = tile + rows * x.D;
    T* g = gradient + rows * x.D;
    T* terms = g + rows * lay.width;
    T* own_g = terms + rows;
    T* spare = own_g + rows * lay.K;
    int64_t* label = reinterpret_cast<int64_t*>(spare + scratch);
    uint8_t* winner = reinterpret_cast<uint8_t*>(label + rows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      if (failed) continue;
      T* sums = parts.as<T>() + chunk * part;
      if (to_centroids) std::memset(sums, 0, part * sizeof(T));
      for (int64_t t = chunk * tiles / chunks; t < (chunk + 1) * tiles / chunks; t++) {
        const int64_t n0 = t * rows;
        const int n = int(min64(rows, N - n0));
        if (a.grad_scores)
          load_tile(Pixels(a.grad_scores), n0, n, g, lay.width);
        else
          std::memset(g, 0, size_t(n) * lay.width * sizeof(T));
        for (int r = 0; r < n; r++) {
          if (a.grad_scores) {
            const uint8_t* w = reinterpret_cast<const uint8_t*>(win.data) + win.offset(n0 + r);
            if (win.sd == 1)
              std::memcpy(winner + r * lay.width, w, size_t(lay.C));
            else
              for (int64_t c = 0; c < lay.C; c++) winner[r * lay.width + c] = w[c * win.sd];
          }
          if (!own) continue;
          const int64_t y = a.labels.as<int64_t>()[n0 + r];
          label[r] = y >= 0 && y < lay.C ? y : -1;
          for (int64_t k = 0; k < lay.K; k++) own_g[r * lay.K + k] = a.grad_own_similarity.as<T>()[(n0 + r) * lay.K + k];
        }
        const TileGradient<T> tg{lay, n, g, indexed ? winner : nullptr, own ? own_g : nullptr, label};
        if (to_centroids || a.metric != Metric::dot) {
          load_tile(x, n0, n, tile, x.D);
          if (a.metric == Metric::cosine)
            for (int r = 0; r < n; r++) {
              T square = 0;
              for (int64_t d = 0; d < x.D; d++) square += tile[r * x.D + d] * tile[r * x.D + d];
              terms[r] = 1 / (std::sqrt(square) > T(1e-12) ? std::sqrt(square) : T(1e-12));
            }
        }
        if (to_centroids) CentroidGradient<T>(lay, sums).add(tg, a.metric, tile, terms);
        if (a.grad_x) {
          if (a.grad_scores)
            winners(tg, spare, gradient);
          else
            std::memset(gradient, 0, size_t(n) * x.D * sizeof(T));
          gather_own(tg, centroids.rows, gradient);
          finish_pixel_gradient(tg, a.metric, tile, terms, gradient);
          if (a.accumulate) {
            load_tile(Pixels(a.grad_x), n0, n, tile, x.D);
            for (int64_t i = 0; i < n * x.D; i++) gradient[i] += tile[i];
          }
          store_tile(Pixels(a.grad_x), n0, n, gradient, x.D);
        }
      }
    }
  }
  if (failed) return out_of_memory();
  if (to_centroids)
    CentroidGradient<T>::reduce(lay, parts.as<T>(), chunks, a.centroids, a.metric, a.grad_centroids.as<T>(), a.threads);
  return {};
}

// Takes the best panel of every lane; with K = 1 and all sub-centroids as classes, lane l of panel j is sub-centroid j*L + l.
template <class T>
struct LaneMax {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  T* best;   // [rows][L]
  T* panel;  // [rows][L], as T: exact far beyond any number of panels
  DNC_INLINE void operator()(int b, int64_t j, const Vec<T> (&acc)[kRows]) {
    const V index = V::splat(T(j));
    T* const most = best + int64_t(b) * kRows * L;
    T* const which = panel + int64_t(b) * kRows * L;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      if (j == 0) {
        acc[r].store(most + r * L);
        index.store(which + r * L);
      } else {
        const V old = V::load(most + r * L);
        const auto better = gt(acc[r], old);
        V::select(better, acc[r], old).store(most + r * L);
        V::select(better, index, V::load(which + r * L)).store(which + r * L);
      }
    }
  }
};

template <class T>
Status nearest(const NearestCentroid& a) {
  constexpr int L = Vec<T>::lanes;
  const Pixels x(a.x);
  const int64_t N = x.N(), K = a.centroids.size[1], M = a.centroids.size[0] * K;
  const PanelLayout<T> lay(M, 1, x.D, operand_parts(a.centroids, a.metric));
  const int lanes = int(min64(L, M));
  if (N == 0) return {};
  Scratch panels(lay.bytes());
  if (!panels.data) return out_of_memory();
  pack_panels(lay, a.centroids, a.metric, panels.as<Operand<T>>(), a.threads);
  const int rows = tile_rows(x.D, 2 * L * sizeof(T), N, sizeof(T)), blocks = rows / kRows;
  const int64_t tiles = (N + rows - 1) / rows;
  int failed = 0;
#pragma omp parallel num_threads(a.threads) reduction(| : failed)
  {
    Scratch memory((size_t(rows) * (x.D + 2 * L + 1) + partial_size(lay, blocks)) * sizeof(T));
    failed = !memory.data;
    [[maybe_unused]] const Tiles registers;
    auto* tile = memory.as<Operand<T>>();
    T* best = memory.as<T>() + rows * x.D;
    LaneMax<T> take{best, best + rows * L};
    T* terms = best + 2 * rows * L;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tiles; t++) {
      if (failed) continue;
      const int64_t n0 = t * rows;
      const int n = int(min64(rows, N - n0)), used = (n + kRows - 1) / kRows;
      pack_tile(x, n0, n, tile);
      sweep(lay, panels.as<Operand<T>>(), tile, used, terms + rows, take);
      if (a.metric != Metric::dot) row_terms(tile, x.D, n, a.metric, terms);
      for (int r = 0; r < n; r++) {
        const T* best = take.best + r * L;
        const T* panel = take.panel + r * L;
        T top = best[0];
        int64_t m = int64_t(panel[0]) * L;
        for (int l = 1; l < lanes; l++) {
          const int64_t candidate = int64_t(panel[l]) * L + l;
          if (best[l] > top || (best[l] == top && candidate < m)) top = best[l], m = candidate;
        }
        const T score = finish_similarity(top, terms[r], a.metric);
        const bool finite = std::isfinite(score);
        a.label.as<int64_t>()[n0 + r] = finite ? m / K : -1;
        a.sub.as<int64_t>()[n0 + r] = finite ? m % K : -1;
        a.score.as<T>()[n0 + r] = finite ? score : T(NAN);
      }
    }
  }
  return failed ? out_of_memory() : Status{};
}

}  // namespace

Status class_scores(const ClassScores& a) {
  if (a.own_similarity && !a.labels) return bad_argument("own_similarity needs labels");
  if (a.labels)
    for (int64_t n = 0; n < a.labels.size[0]; n++) {
      const int64_t y = a.labels.as<int64_t>()[n];
      if (y >= a.centroids.size[0]) return {Code::bad_label, n, y, "labels must be in [0,C), ignore_index or negative"};
    }
  return with_compute_type(a.scores.dtype == DType::float64, [&](auto type) { return scores<decltype(type)>(a); });
}
Status class_scores_backward(const ClassScoresBackward& a) {
  const bool wide = a.x.dtype == DType::float64 || a.centroids.dtype == DType::float64;
  return with_compute_type(wide, [&](auto type) { return scores_backward<decltype(type)>(a); });
}
Status nearest_centroid(const NearestCentroid& a) {
  return with_compute_type(a.score.dtype == DType::float64, [&](auto type) { return nearest<decltype(type)>(a); });
}

}  // namespace dnc::cpu::DNC_ISA
