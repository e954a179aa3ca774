// centroid_cross_entropy on the CPU: max over K, LayerNorm over C, cross-entropy and all gradients in one pass over tiles of
// pixels.
//
//   r[c] = max_k similarity(x, p_ck);  o = (r - mean r) * rstd * w + b, or r;  z = o * scale / temperature
//   loss = (1-s) w_y (lse z - z_y) + s/C sum_c w_c (lse z - z_c)        (s: label smoothing; w: class weights)
//   reads x once, packed centroids once a tile; writes dX [N,D], own similarities [N,K], prediction [N]. [N,C] lives a tile at
//   a time in L2. floors: 2*N*C*K*D (forward) + 2*N*C*D (gather of winners) flop at FMA peak; 2*N*D*4 bytes. Compute-bound from
//   D = 32 on.
// Plan: similarity_panels.h, similarity_gradient.h. Deterministic for any thread count. Reference:
// dnc_kernels/ops/similarity/reference.py.
#include <omp.h>

#include "dnc/similarity.h"
#include "similarity_gradient.h"

namespace dnc::cpu::DNC_ISA {
namespace {

using Reduction = CentroidCrossEntropy::Reduction;

// Sums over pixels of a chunk.
template <class T>
struct LossSums {
  double loss, scale;
  T* weight;  // [width], gradient of the norm's weight
  T* bias;    // [width]
};

// One row of class maxima in, its loss out, and the maxima's gradient in place of the maxima.
template <class T>
struct LossRow {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  const CentroidCrossEntropy& a;
  const PanelLayout<T>& lay;
  const T* class_weight;  // [width] zero-padded, or nullptr
  const T* norm_weight;   // likewise
  const T* norm_bias;
  T factor;                 // scale / temperature
  double class_weight_sum;  // C without class weights
  T* z;                     // scratch [width]: the logits
  T* e;                     // scratch [width]: exp of the logits from their maximum

  DNC_INLINE int valid(int64_t c) const { return int(min64(lay.C - c, L)); }

  // Returns the loss (NaN for a pixel with a non-finite similarity); *prediction = argmax z or -1.
  // coefficient: the loss's incoming gradient; gradients are left alone if !want.
  double operator()(T* r, int64_t y, double coefficient, bool want, LossSums<T>& sums, int64_t* prediction) const {
    const int64_t C = lay.C, W = lay.width;
    for (int64_t c = C; c < W; c++) r[c] = 0;
    const V zero = V::splat(0);
    V total = zero, poison = zero;  // the second stays 0 unless one is NaN or Inf: a sum of finite ones may overflow
    for (int64_t c = 0; c < W; c += L) {
      const V score = V::load(r + c);
      total = total + score, poison = fma(score, zero, poison);
    }
    const T sum = total.sum();
    T mean = 0, rstd = 1;
    if (norm_weight) {
      mean = sum / T(C);
      V square = zero;
      const V m = V::splat(mean);
      for (int64_t c = 0; c < W; c += L) {
        const V d = V::select(V::first(valid(c)), V::load(r + c) - m, zero);
        square = fma(d, d, square);
      }
      rstd = T(1 / std::sqrt(double(square.sum()) / double(C) + a.norm_eps));
    }
    const V m = V::splat(mean), s = V::splat(rstd), f = V::splat(factor);
    V top = V::splat(-INFINITY);
    for (int64_t c = 0; c < W; c += L) {
      V o = V::load(r + c);
      if (norm_weight) {
        o = (o - m) * s * V::load(norm_weight + c);
        if (norm_bias) o = o + V::load(norm_bias + c);
      }
      o = V::select(V::first(valid(c)), o * f, V::splat(-INFINITY));
      o.store(z + c);
      top = max(o, top);
    }
    const T most = top.max();
    // every similarity of a pixel with a NaN or Inf feature is itself NaN or Inf
    const bool finite = poison.sum() == 0 && std::isfinite(most);
    *prediction = -1;
    if (finite)
      for (int64_t c = 0;; c += L)
        if (const unsigned hit = V::bits(eq(V::load(z + c), V::splat(most)))) {
          *prediction = c + __builtin_ctz(hit);
          break;
        }
    if (y < 0) return 0;
    V exps = zero, weighted = zero;
    const V high = V::splat(most);
    for (int64_t c = 0; c < W; c += L) {
      const V logit = V::load(z + c) - high;  // taken from the maximum first: an offset of all classes must not cost digits
      const V power = exp(logit);
      power.store(e + c);
      exps = exps + power;
      if (a.label_smoothing > 0)
        weighted = weighted + V::select(V::first(valid(c)), class_weight ? logit * V::load(class_weight + c) : logit, zero);
    }
    const double sum_exp = double(exps.sum()), lse = std::log(sum_exp);
    const double smooth = a.label_smoothing / double(C),
                 wy = (1 - a.label_smoothing) * (class_weight ? double(class_weight[y]) : 1.0);
    double loss = wy * (lse + (double(most) - double(z[y]))), spread = 0;
    if (a.label_smoothing > 0) {
      // infinite as soon as a weight is, and not 0 * inf
      loss += smooth * (class_weight_sum < INFINITY ? class_weight_sum * lse - double(weighted.sum()) : class_weight_sum);
      spread = smooth * class_weight_sum;
    }
    if (!finite) loss = NAN;
    if (!want) return loss;
    if (!finite) coefficient = NAN;
    gradient(r, y, coefficient / sum_exp * (wy + spread), coefficient * smooth, coefficient * wy, mean, rstd, sums);
    return loss;
  }

  // g_z[c] = on_p * exp(z - max) - on_w * w_c - [c == y] * on_y, carried back through factor and norm into r.
  DNC_INLINE void gradient(T* r, int64_t y, double on_p, double on_w, double on_y, T mean, T rstd, LossSums<T>& sums) const {
    const int64_t C = lay.C, W = lay.width;
    const V p = V::splat(T(on_p)), w = V::splat(T(on_w)), f = V::splat(factor), m = V::splat(mean), s = V::splat(rstd);
    const V zero = V::splat(0);
    const bool smooth = on_w != 0;
    const T zy = T(on_p) * e[y] - T(on_y) - (smooth ? T(on_w) * (class_weight ? class_weight[y] : T(1)) : T(0));
    V along_z = zero;
    for (int64_t c = 0; c < W; c += L) {
      const V logit = V::load(z + c);
      V g = p * V::load(e + c);
      if (smooth) g = g - (class_weight ? w * V::load(class_weight + c) : w);
      g = V::select(V::first(valid(c)), g, zero);
      if (y >= c && y < c + L)  // the label's own entry, in one lane
        g = V::select(V::first(int(y - c)), g, V::select(V::first(int(y - c) + 1), V::splat(zy), g));
      if (a.grad_scale) along_z = along_z + V::select(V::first(valid(c)), g * logit, zero);
      (g * f).store(z + c);
    }
    if (a.grad_scale) sums.scale += double(along_z.sum());
    if (!norm_weight) {
      std::memcpy(r, z, size_t(W) * sizeof(T));
      return;
    }
    V sum_g = zero, sum_gx = zero;
    for (int64_t c = 0; c < W; c += L) {
      const V g = V::load(z + c), xhat = (V::load(r + c) - m) * s, gx = g * V::load(norm_weight + c);
      if (sums.weight) fma(g, xhat, V::load(sums.weight + c)).store(sums.weight + c);
      if (sums.bias) (g + V::load(sums.bias + c)).store(sums.bias + c);
      sum_g = sum_g + gx;
      sum_gx = fma(gx, xhat, sum_gx);
    }
    const V mean_g = V::splat(sum_g.sum() / T(C)), mean_gx = V::splat(sum_gx.sum() / T(C));
    for (int64_t c = 0; c < W; c += L) {
      const V xhat = (V::load(r + c) - m) * s, gx = V::load(z + c) * V::load(norm_weight + c);
      (s * (gx - mean_g - xhat * mean_gx)).store(r + c);
    }
  }
};

// Sum of the class weights of the pixels that count; or the first bad label.
template <class T>
Status label_weight(const CentroidCrossEntropy& a, int64_t N, int64_t C, double* weight) {
  const int64_t* labels = a.labels.as<int64_t>();
  const T* w = a.class_weight ? a.class_weight.as<T>() : nullptr;
  double sum = 0;
  for (int64_t n = 0; n < N; n++) {
    const int64_t y = labels[n];
    if (y < 0 || y == a.ignore_index) continue;
    if (y >= C) return {Code::bad_label, n, y, "labels must be in [0,C), ignore_index or negative"};
    sum += w ? double(w[y]) : 1.0;
  }
  *weight = sum;
  return {};
}

template <class T>
Status loss(const CentroidCrossEntropy& a) {
  const Status out_of_memory{Code::out_of_memory, 0, 0, "not enough memory"};
  const Pixels x(a.x);
  const int64_t N = x.N();
  const PanelLayout<T> lay(a.centroids.size[0], a.centroids.size[1], x.D, operand_parts(a.centroids, a.metric));
  double weight = 0;
  if (const Status s = label_weight<T>(a, N, lay.C, &weight); !s.ok()) return s;
  const bool each = a.reduction == Reduction::none, to_centroids = bool(a.grad_centroids), norm = bool(a.norm_weight);
  const bool indexed = lay.K > 1, own = bool(a.own_similarity);
  const bool want = a.grad_x || to_centroids || a.grad_norm_weight || a.grad_norm_bias || a.grad_scale;
  const double mean = a.reduction == Reduction::mean ? 1 / weight : 1;  // no pixel counts: 0 * inf = NaN loss, as in torch
  const double common = std::isfinite(mean) ? mean * (a.grad_loss && !each ? double(a.grad_loss.as<T>()[0]) : 1.0) : 0;

  // padded copies, so that rows of whole vectors never read past the end
  const int64_t W = lay.width;
  Scratch vectors(3 * W * sizeof(T)), panels(lay.bytes());
  CentroidRows<T> centroids(a.centroids, a.metric, a.threads);
  const WinnerSum<T> winners(lay, centroids.rows, bool(a.grad_x), a.threads);
  const int rows = tile_rows((1 + (a.metric != Metric::dot)) * x.D, W * (sizeof(T) + 1), max64(N, 1), sizeof(T)),
            blocks = rows / kRows;
  const int64_t tiles = (N + rows - 1) / rows, part = to_centroids ? CentroidGradient<T>::size(lay) : 0;
  const int64_t chunks = chunk_count(tiles, part * sizeof(T));
  Scratch parts(part * chunks * sizeof(T)), row_sums(size_t(chunks) * 2 * W * sizeof(T)),
      scalar_sums(size_t(chunks) * 2 * sizeof(double));
  if (!vectors.data || !panels.data || !centroids.rows || !winners.ok() || !parts.data || !row_sums.data || !scalar_sums.data)
    return out_of_memory;
  T* padded = vectors.as<T>();
  const View* sources[3] = {&a.class_weight, &a.norm_weight, &a.norm_bias};
  double class_weight_sum = double(lay.C);
  for (int i = 0; i < 3; i++)
    for (int64_t c = 0; c < W; c++) padded[i * W + c] = *sources[i] && c < lay.C ? sources[i]->as<T>()[c] : T(0);
  if (a.class_weight) {
    class_weight_sum = 0;
    for (int64_t c = 0; c < lay.C; c++) class_weight_sum += double(padded[c]);
  }
  pack_panels(lay, a.centroids, a.metric, panels.as<Operand<T>>(), a.threads);
  const T factor = T((a.scale ? double(a.scale.as<T>()[0]) : 1.0) / a.temperature);

  int failed = 0;
#pragma omp parallel num_threads(a.threads) reduction(| : failed)
  {
    const bool reread = to_centroids || a.metric != Metric::dot;  // the pixel itself is needed again, as rows
    const size_t partial = partial_size(lay, blocks), scratch = winners.scratch(rows);
    Scratch memory((size_t(rows) * (x.D * (1 + reread) + W + 1 + lay.K) + 2 * W + partial + scratch) * sizeof(T) +
                   size_t(rows) * (W + sizeof(int64_t)));
    failed = !memory.data;
    [[maybe_unused]] const Tiles registers;
    auto* tile = memory.as<Operand<T>>();  // packed pixels, then their gradient
    T* tile_gradient = memory.as<T>();
    T* pixels = tile_gradient + rows * x.D;
    T* best = pixels + (reread ? rows * x.D : 0);
    T* terms = best + rows * W;
    T* own_tile = terms + rows;
    T* z = own_tile + rows * lay.K;
    T* partials = z + 2 * W;
    int64_t* label = reinterpret_cast<int64_t*>(partials + partial + scratch);
    uint8_t* winner = reinterpret_cast<uint8_t*>(label + rows);
    const LossRow<T> row{a,
                         lay,
                         a.class_weight ? padded : nullptr,
                         norm ? padded + W : nullptr,
                         a.norm_bias ? padded + 2 * W : nullptr,
                         factor,
                         class_weight_sum,
                         z,
                         z + W};
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      if (failed) continue;
      T* weight_sums = row_sums.as<T>() + chunk * 2 * W;
      std::memset(weight_sums, 0, size_t(2 * W) * sizeof(T));
      LossSums<T> sums{0, 0, a.grad_norm_weight ? weight_sums : nullptr, a.grad_norm_bias ? weight_sums + W : nullptr};
      T* part_sums = parts.as<T>() + chunk * part;
      if (to_centroids) std::memset(part_sums, 0, part * sizeof(T));
      for (int64_t t = chunk * tiles / chunks; t < (chunk + 1) * tiles / chunks; t++) {
        const int64_t n0 = t * rows;
        const int n = int(min64(rows, N - n0)), used = (n + kRows - 1) / kRows;
        pack_tile(x, n0, n, tile);
        for (int r = 0; r < used * kRows; r++) {
          const int64_t y = r < n ? a.labels.as<int64_t>()[n0 + r] : -1;
          label[r] = y < 0 || y == a.ignore_index ? -1 : y;
          if (own && label[r] < 0) std::memset(own_tile + r * lay.K, 0, lay.K * sizeof(T));
        }
        ClassMax<T> take{lay, best, indexed ? winner : nullptr, own ? label : nullptr, own_tile};
        sweep(lay, panels.as<Operand<T>>(), tile, used, partials, take);
        take.finish(n);
        if (a.metric != Metric::dot) row_terms(tile, x.D, n, a.metric, terms);
        for (int r = 0; r < n; r++) {
          T* maxima = best + r * W;
          if (a.metric != Metric::dot) {
            for (int64_t c = 0; c < lay.C; c++) maxima[c] = finish_similarity(maxima[c], terms[r], a.metric);
            if (own && label[r] >= 0)
              for (int64_t k = 0; k < lay.K; k++)
                own_tile[r * lay.K + k] = finish_similarity(own_tile[r * lay.K + k], terms[r], a.metric);
          }
          const double coefficient = each && a.grad_loss ? double(a.grad_loss.as<T>()[n0 + r]) : common;
          int64_t prediction;
          const double l = row(maxima, label[r], coefficient, want, sums, &prediction);
          if (label[r] < 0 && want) std::memset(maxima, 0, size_t(W) * sizeof(T));
          sums.loss += l;
          if (a.prediction) a.prediction.as<int64_t>()[n0 + r] = prediction;
          if (a.loss && each) a.loss.as<T>()[n0 + r] = T(l);
        }
        if (own) std::memcpy(a.own_similarity.as<T>() + n0 * lay.K, own_tile, size_t(n) * lay.K * sizeof(T));
        const TileGradient<T> gradient{lay, n, best, indexed ? winner : nullptr, nullptr, nullptr};
        if (reread && want) load_tile(x, n0, n, pixels, x.D);
        if (a.grad_x) {
          const Pixels out(a.grad_x);
          // contiguous rows of the compute type are written where they belong, without a stop in the tile
          const bool direct = out.dtype == CentroidRows<T>::own_dtype() && out.sd == 1 && out.sw == out.D && out.B * out.H == 1;
          T* rows_out = direct ? reinterpret_cast<T*>(out.data) + n0 * out.D : tile_gradient;
          winners(gradient, partials + partial, rows_out);
          finish_pixel_gradient(gradient, a.metric, pixels, terms, rows_out);
          // an ignored pixel's gradient is exactly zero, whatever its features
          if (a.metric != Metric::dot)
            for (int r = 0; r < n; r++)
              if (label[r] < 0) std::memset(rows_out + r * x.D, 0, size_t(x.D) * sizeof(T));
          if (!direct) store_tile(out, n0, n, tile_gradient, x.D);
        }
        if (to_centroids) CentroidGradient<T>(lay, part_sums).add(gradient, a.metric, pixels, terms);
      }
      scalar_sums.as<double>()[2 * chunk] = sums.loss;
      scalar_sums.as<double>()[2 * chunk + 1] = sums.scale;
    }
  }
  if (failed) return out_of_memory;

  double total[2] = {0, 0};
  for (int64_t i = 0; i < 2 * chunks; i++) total[i % 2] += scalar_sums.as<double>()[i];
  if (a.loss && !each) a.loss.as<T>()[0] = T(total[0] * mean);
  // z = o * scale / temperature, so d loss / d scale = sum g_z * z / scale; scale 0 leaves z = 0 and no direction
  if (a.grad_scale) a.grad_scale.as<T>()[0] = a.scale.as<T>()[0] == 0 ? T(0) : T(total[1] / double(a.scale.as<T>()[0]));
  const View* outs[2] = {&a.grad_norm_weight, &a.grad_norm_bias};
  for (int i = 0; i < 2; i++)
    for (int64_t c = 0; *outs[i] && c < lay.C; c++) {
      double s = 0;
      for (int64_t chunk = 0; chunk < chunks; chunk++) s += double(row_sums.as<T>()[(chunk * 2 + i) * W + c]);
      outs[i]->as<T>()[c] = T(s);
    }
  if (to_centroids)
    CentroidGradient<T>::reduce(lay, parts.as<T>(), chunks, a.centroids, a.metric, a.grad_centroids.as<T>(), a.threads);
  return {};
}

}  // namespace

Status centroid_cross_entropy(const CentroidCrossEntropy& a) {
  const bool wide = a.x.dtype == DType::float64 || a.centroids.dtype == DType::float64;
  return with_compute_type(wide, [&](auto type) { return loss<decltype(type)>(a); });
}

}  // namespace dnc::cpu::DNC_ISA
