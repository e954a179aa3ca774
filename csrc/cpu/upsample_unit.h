// A unit of work of upsample_loss.cpp: the cross-entropy of the target rows of a block of cell rows, and its gradient.
//
// Scores of a source pixel are taken from its largest one, times log2(e), when they are loaded: what is interpolated from them
// is then u less the interpolated maximum, an upper bound of max_c u that needs no pass of its own, and goes through 2^x as it
// is. An offset that all classes share is gone before anything is rounded.
// Source rows are blended into v [columns][width], a strip of columns at a time. Pixels between the same two columns go in
// groups through 2^x, and back into the gradient of v, which then goes to the gradients of both source rows. A pixel for which
// the bound is far too high gets its own maximum, and one with a NaN, an Inf or too wide a range goes class by class (`exact`).
#pragma once
#include "upsample_math.h"
#include "upsample_rows.h"

namespace dnc::cpu::DNC_ISA {

constexpr int kGroup = 4;  // pixels that go through exp2 together: four chains hide its latency

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Below this sum of exponentials the shift was too high, and small terms are lost: exp2 ends at 2^-126.
constexpr double kSmallestSum = 1e-25;

// What is the same for all units.
template <class T>
struct LossTables {
  const T* share;             // [W]
  const int64_t* first;       // [w+1] first target column of a cell column
  const T *on, *own, *kept;   // [C+1]: see above; kept = own / on; the last, of pixels that are left out, is 0
  const T* weight;            // [width], zero-padded: class weights; nullptr without smoothing
  double weight_sum, smooth;  // sum_c w_c; s / C
  const double* counted;      // [C+1] class weights, likewise
};

// The label pixels of a strip of one target row that count, side by side. `own` and `weighted` are in the unit of v, and taken
// from the same maximum as `sum`.
template <class T>
struct RowPixels {
  T *share, *sum;           // [W]: share of the next column, sum of the exponentials
  double *own, *weighted;   // [W]: score of the label; sum_c w_c score_c, with smoothing
  int64_t *label, *column;  // [W]
  int64_t* begin;           // [strip+1] first pixel of a cell column
};

struct UnitSums {
  double loss, weight;
  int64_t bad_index, bad_label;  // bad_index -1: none
};

// sum_c w_c (lse - u_c) from sum_c w_c u_c: infinite as soon as a weight is, and not 0 * inf.
template <class T>
DNC_INLINE double smoothed(const LossTables<T>& t, double lse, double all) {
  return t.weight_sum < INFINITY ? t.weight_sum * lse - all : t.weight_sum;
}
// Loss of a pixel of label y; own and all: u_y and sum_c w_c u_c in units of log2.
template <class T>
DNC_INLINE double pixel_loss(const LossTables<T>& t, int64_t y, double lse, double own, double all) {
  const double loss = double(t.own[y]) * (lse - kLn2 * own);
  return t.weight ? loss + t.smooth * smoothed(t, lse, kLn2 * all) : loss;
}

template <class T>
DNC_INLINE T mix(T low, T high, T share) {
  return share == 0 ? low : (1 - share) * low + share * high;
}

// A pixel from the scores as they were given, whatever they are: e[c] = exp(u_c - max u), their sum, and the score of label y
// and sum_c w_c u_c, both less the maximum and in units of log2. It lies at `down` between source rows r and r+1, and at
// `share` between source columns x and x+1.
template <class T>
struct ExactPixel {
  double own, weighted;
  T sum;
};
template <class T>
ExactPixel<T> exact_pixel(const View& scores, const LossTables<T>& tables, int64_t b, int64_t r, T down, int64_t x, T share,
                          int64_t y, T* e) {
  const int64_t C = scores.size[1];
  const auto blended = [&](int64_t c, int64_t column) {
    const T low = score_at<T>(scores, b, c, r, column);
    return down == 0 ? low : mix(low, score_at<T>(scores, b, c, r + 1, column), down);
  };
  T most = -INFINITY;
  for (int64_t c = 0; c < C; c++) {
    e[c] = blended(c, x);
    if (share != 0) e[c] = mix(e[c], blended(c, x + 1), share);
    if (e[c] > most || e[c] != e[c]) most = e[c];
  }
  const auto from_most = [&](int64_t c) { return kLog2e * (double(e[c]) - double(most)); };
  ExactPixel<T> found{from_most(y), 0, 0};
  for (int64_t c = 0; tables.weight && c < C; c++) found.weighted += tables.counted[c] * from_most(c);
  for (int64_t c = 0; c < C; c++) e[c] = std::exp(e[c] - most), found.sum += e[c];
  return found;
}

template <class T>
struct LossUnit {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  const UpsampleCrossEntropy& a;
  const UpsamplePlan<T>& plan;
  const LossTables<T>& tables;
  RowPair<T> rows;
  T* gradient[2];   // [w][width] of the same two source rows
  T* weighted[2];   // [w] sum_c w_c score_c of a pixel, with smoothing
  T* row;           // [strip+1][width] blended row
  T* row_gradient;  // likewise
  T* exps;          // [kGroup][width]
  T* row_weighted;  // [strip+1]: of the blended row
  T* on_weight;     // [strip+1]: how much of the class weights to take from the gradient of a column
  RowPixels<T> pixels;
  UnitSums sums;
  bool want;
  int64_t cell_row, column0;  // of the strip that is worked on
  T down;                     // share of row cell_row + 1 in it

  static int64_t padded(int64_t n) { return (n + L - 1) / L * L; }
  static size_t bytes(const UpsamplePlan<T>& p) {
    return size_t(4 * p.w * p.width + (2 * (p.strip + 1) + kGroup) * p.width + 2 * p.w + 2 * (p.strip + 1) + 2 * padded(p.W)) *
               sizeof(T) +
           size_t(2 * p.W) * sizeof(double) + size_t(2 * p.W + p.strip + 1) * sizeof(int64_t);
  }
  static size_t row_size(const UpsamplePlan<T>& p) { return size_t(p.w * p.width); }
  LossUnit(const UpsampleCrossEntropy& args, const UpsamplePlan<T>& p, const LossTables<T>& t, void* memory)
      : a(args), plan(p), tables(t), want(bool(args.grad_scores)) {
    int64_t* indices = static_cast<int64_t*>(memory);
    pixels.label = indices, pixels.column = indices + p.W, pixels.begin = indices + 2 * p.W;
    double* numbers = reinterpret_cast<double*>(indices + 2 * p.W + p.strip + 1);
    pixels.own = numbers, pixels.weighted = numbers + p.W;
    T* next = reinterpret_cast<T*>(numbers + 2 * p.W);
    const auto take = [&next](int64_t n) {
      T* at = next;
      next += n;
      return at;
    };
    for (int i = 0; i < 2; i++) rows.data[i] = take(p.w * p.width), gradient[i] = take(p.w * p.width), weighted[i] = take(p.w);
    row = take((p.strip + 1) * p.width), row_gradient = take((p.strip + 1) * p.width), exps = take(kGroup * p.width);
    pixels.share = take(padded(p.W)), pixels.sum = take(padded(p.W));
    row_weighted = take(p.strip + 1), on_weight = take(p.strip + 1);
  }

  // Cell rows [r0,r1) of sample b (rows of the window). Row r1's gradient goes to `border` [w][width], where there is one.
  void run(int64_t b, int64_t r0, int64_t r1, T* border) {
    const int64_t row_size = plan.w * plan.width;
    sums = {0, 0, -1, 0};
    rows.held[0] = rows.held[1] = -1;
    if (want)
      for (T* g : gradient) std::memset(g, 0, size_t(row_size) * sizeof(T));
    const int64_t end = plan.target_row0 + plan.H, top = plan.source_row0;
    int64_t i = plan.rows.first(r0 + top, plan.target_row0, end);
    for (int64_t r = r0; r < r1; r++) {
      for (const int64_t stop = plan.rows.first(r + 1 + top, i, end); i < stop; i++) target_row(b, r, i);
      if (!want) continue;
      T* done = gradient[r & 1];
      store_classes(a.grad_scores, b, r, plan.width, done, false);
      std::memset(done, 0, size_t(row_size) * sizeof(T));
    }
    if (border) std::memcpy(border, gradient[r1 & 1], size_t(row_size) * sizeof(T));
  }
  static void add_border(const UpsampleCrossEntropy& a, const UpsamplePlan<T>& p, int64_t b, int64_t r, const T* border) {
    store_classes(a.grad_scores, b, r, p.width, border, true);
  }

 private:
  // Source row r, each pixel taken from its largest score.
  const T* source(int64_t b, int64_t r) {
    bool fresh;
    const T* data = rows.get(a.scores, b, r, plan.width, &fresh);
    if (!fresh) return data;
    const V unit = V::splat(T(kLog2e));
    for (int64_t x = 0; x < plan.w; x++) {
      T* pixel = rows.data[r & 1] + x * plan.width;
      V high = V::splat(kLowest<T>), sum = V::splat(0);
      for (int64_t c = 0; c < plan.width; c += L) high = max(V::load(pixel + c), high);
      high = V::splat(high.max());
      for (int64_t c = 0; c < plan.width; c += L) ((V::load(pixel + c) - high) * unit).store(pixel + c);
      for (int64_t c = plan.C; c < plan.width; c++) pixel[c] = kLowest<T>;
      if (!tables.weight) continue;
      for (int64_t c = 0; c < plan.width; c += L) sum = fma(V::load(pixel + c), V::load(tables.weight + c), sum);
      weighted[r & 1][x] = sum.sum();
    }
    return data;
  }

  // Target row i of the whole map, whose lower source row is row r of the window.
  void target_row(int64_t b, int64_t r, int64_t i) {
    const T share = T(plan.rows.share(i));
    const T* low = source(b, r);
    const T* high = share == 0 ? low : source(b, r + 1);
    const T *weighted0 = weighted[r & 1], *weighted1 = weighted[(r + (share != 0)) & 1];
    i -= plan.target_row0, cell_row = r, down = share;
    for (int64_t x0 = 0; x0 < plan.w; x0 += plan.strip) {
      const int64_t x1 = x0 + plan.strip < plan.w ? x0 + plan.strip : plan.w;
      const int64_t n = read_pixels(b, i, x0, x1);
      if (n == 0) continue;
      const int64_t columns = (x1 < plan.w ? x1 + 1 : x1) - x0, size = columns * plan.width;
      const T* v = blend(low + x0 * plan.width, high + x0 * plan.width, share, size, row);
      column0 = x0;
      if (tables.weight)
        for (int64_t x = 0; x < columns; x++) row_weighted[x] = mix(weighted0[x0 + x], weighted1[x0 + x], share);
      if (want) {
        std::memset(row_gradient, 0, size_t(size) * sizeof(T));
        for (int64_t x = 0; x < columns; x++) on_weight[x] = 0;
      }
      for (int64_t x = 0; x < x1 - x0; x++) {
        const int64_t next = x + 1 < columns ? x + 1 : x, end = pixels.begin[x + 1];
        int64_t p = pixels.begin[x];
        for (; p + kGroup <= end; p += kGroup) group<kGroup>(b, i, p, x, next, v);
        if (end - p == 3) group<3>(b, i, p, x, next, v);
        if (end - p == 2) group<2>(b, i, p, x, next, v);
        if (end - p == 1) group<1>(b, i, p, x, next, v);
      }
      add_losses(b, i, n);
      if (want) spread_rows(r, x0, columns, share);
    }
  }

  // Fills `pixels` from the labels of cell columns [x0,x1) of target row i; returns how many count.
  int64_t read_pixels(int64_t b, int64_t i, int64_t x0, int64_t x1) {
    switch (a.labels.dtype) {
      case DType::int32: return read_pixels<int32_t>(b, i, x0, x1);
      case DType::uint8: return read_pixels<uint8_t>(b, i, x0, x1);
      default: return read_pixels<int64_t>(b, i, x0, x1);
    }
  }
  template <class I>
  int64_t read_pixels(int64_t b, int64_t i, int64_t x0, int64_t x1) {
    const int64_t step = a.labels.stride[2], C = plan.C, ignored = a.ignore_index;
    const I* in = a.labels.as<I>() + b * a.labels.stride[0] + i * a.labels.stride[1];
    const RowPixels<T> out = pixels;
    int64_t n = 0;
    for (int64_t x = x0; x < x1; x++) {
      out.begin[x - x0] = n;
      for (int64_t j = tables.first[x]; j < tables.first[x + 1]; j++) {
        const int64_t y = in[j * step];
        const bool counts = y >= 0 && y < C;
        if (y >= C && y != ignored && sums.bad_index < 0) sums.bad_index = (b * plan.H + i) * plan.W + j, sums.bad_label = y;
        out.label[n] = y, out.column[n] = j, out.share[n] = tables.share[j];
        n += counts;
      }
    }
    out.begin[x1 - x0] = n;
    if (a.loss) {
      T* loss = a.loss.as<T>() + (b * plan.H + i) * plan.W;
      for (int64_t j = tables.first[x0]; j < tables.first[x1]; j++) loss[j] = 0;
    }
    return n;
  }

  // Pixels p to p + G - 1, which lie between the columns `at` and `next` of the strip.
  template <int G>
  DNC_INLINE void group(int64_t b, int64_t i, int64_t p, int64_t at, int64_t next, const T* v) {
    const int64_t width = plan.width;
    const T *left = v + at * width, *right = v + next * width;
    T* const e = exps;
    const int64_t* label = pixels.label + p;
    const T* share = pixels.share + p;
    T* sum = pixels.sum + p;
    double *own = pixels.own + p, *all = pixels.weighted + p;
    softmax<G>(left, right, share, width, e, sum);
    bool regular = true;
    for (int k = 0; k < G; k++) {
      own[k] = left[label[k]] + share[k] * (right[label[k]] - left[label[k]]);
      all[k] = tables.weight ? mix(row_weighted[at], row_weighted[next], share[k]) : T(0);
      regular &= usable(sum[k]) && std::isfinite(own[k]) && std::isfinite(all[k]);
    }
    if (__builtin_expect(!regular, false))
      for (int k = 0; k < G; k++) {
        if (usable(sum[k]) && std::isfinite(own[k]) && std::isfinite(all[k])) continue;
        T most;
        if (own_softmax(left, right, share[k], width, e + k * width, &most, sum + k) && std::isfinite(all[k]))
          own[k] -= double(most), all[k] -= tables.weight ? tables.weight_sum * double(most) : 0;
        else
          exact(b, at, p + k, e + k * width);
      }
    if (!want || plan.C == 1) return;  // the gradient of one class is exactly 0
    T coefficient[G];
    for (int k = 0; k < G; k++) {
      const View& in = a.grad_loss;
      const T grad = in ? in.as<T>()[b * in.stride[0] + i * in.stride[1] + pixels.column[p + k] * in.stride[2]] : T(1);
      e[k * width + label[k]] -= sum[k] * tables.kept[label[k]];
      coefficient[k] = grad * tables.on[label[k]] / sum[k];
      if (tables.weight) {
        const T all = grad * T(tables.smooth);
        on_weight[at] += (1 - share[k]) * all;
        if (share[k] != 0) on_weight[next] += share[k] * all;
      }
    }
    T *to_left = row_gradient + at * width, *to_right = row_gradient + next * width;
    if (__builtin_expect(regular, true)) {
      spread<G>(e, width, share, coefficient, to_left, to_right);
      return;
    }
    for (int k = 0; k < G; k++)  // one at a time: a column of share 0 must not see a NaN
      spread<1>(e + k * width, width, share + k, coefficient + k, to_left, share[k] == 0 ? nullptr : to_right);
  }

  static DNC_INLINE bool usable(T sum) { return sum > T(kSmallestSum) && sum < T(INFINITY); }

  // e = 2^(u - max u), the maximum and *sum of a pixel that lies far below its bound. False: it is no number for this.
  static bool own_softmax(const T* left, const T* right, T share, int64_t width, T* e, T* high, T* sum) {
    V most = V::splat(kLowest<T>), poison = V::splat(0), total = V::splat(0);
    for (int64_t c = 0; c < width; c += L) {
      const V from = V::load(left + c), u = fma(V::splat(share), V::load(right + c) - from, from);
      most = max(u, most), poison = fma(u, V::splat(0), poison);
      u.store(e + c);
    }
    *high = most.max();
    if (poison.sum() != 0 || *high < kLowest<T> / 2) return false;
    for (int64_t c = 0; c < width; c += L) {
      const V power = exp2(V::load(e + c) - V::splat(*high));
      total = total + power;
      power.store(e + c);
    }
    *sum = total.sum();
    return usable(*sum);
  }

  // e[k] = 2^u, sum[k] their sums.
  template <int G>
  static DNC_INLINE void softmax(const T* left, const T* right, const T* share, int64_t width, T* e, T* sum) {
    V s[G], total[G];
    for (int k = 0; k < G; k++) s[k] = V::splat(share[k]), total[k] = V::splat(0);
    for (int64_t c = 0; c < width; c += L) {
      const V from = V::load(left + c), step = V::load(right + c) - from;
      for (int k = 0; k < G; k++) {
        const V power = exp2(fma(s[k], step, from));
        total[k] = total[k] + power;
        power.store(e + k * width + c);
      }
    }
    lane_sums(total, sum);
  }

  // Gradients of the two columns: (1-share) and share of coefficient * e.
  template <int G>
  static DNC_INLINE void spread(const T* e, int64_t width, const T* share, const T* coefficient, T* left, T* right) {
    V to_left[G], to_right[G];
    for (int k = 0; k < G; k++) {
      to_right[k] = V::splat(share[k] * coefficient[k]);
      to_left[k] = V::splat((1 - share[k]) * coefficient[k]);
    }
    if (left == right) right = nullptr;  // behind the last column: its share is 0
    for (int64_t c = 0; c < width; c += L) {
      V l = V::load(left + c), r = right ? V::load(right + c) : l;
      for (int k = 0; k < G; k++) {
        const V power = V::load(e + k * width + c);
        l = fma(power, to_left[k], l), r = fma(power, to_right[k], r);
      }
      l.store(left + c);
      if (right) r.store(right + c);
    }
  }

  // Pixel p from the scores as they were given, whatever they are.
  void exact(int64_t b, int64_t at, int64_t p, T* e) {
    const ExactPixel<T> found =
        exact_pixel(a.scores, tables, b, cell_row, down, column0 + at, pixels.share[p], pixels.label[p], e);
    for (int64_t c = plan.C; c < plan.width; c++) e[c] = 0;
    pixels.own[p] = found.own, pixels.weighted[p] = found.weighted, pixels.sum[p] = found.sum;
  }

  // Losses of the first n pixels, from their sums.
  void add_losses(int64_t b, int64_t i, int64_t n) {
    const RowPixels<T> in = pixels;
    for (int64_t p = n; p < padded(n); p++) in.sum[p] = 1;
    log_n(in.sum, n);
    T* out = a.loss ? a.loss.as<T>() + (b * plan.H + i) * plan.W : nullptr;
    double total = 0, weight = 0;
    for (int64_t p = 0; p < n; p++) {
      const int64_t y = in.label[p];
      const double loss = pixel_loss(tables, y, double(in.sum[p]), in.own[p], in.weighted[p]);
      total += loss, weight += tables.counted[y];
      if (out) out[in.column[p]] = T(loss);
    }
    sums.loss += total, sums.weight += weight;
  }

  // The gradient of the blended row goes to both source rows.
  void spread_rows(int64_t r, int64_t x0, int64_t columns, T share) {
    const int64_t width = plan.width;
    const T *weight = tables.weight, *from = row_gradient;
    T* low = gradient[r & 1] + x0 * width;
    T* high = gradient[(r + 1) & 1] + x0 * width;
    const V to_low = V::splat(1 - share), to_high = V::splat(share);
    if (weight)
      for (int64_t x = 0; x < columns; x++) {
        const V less = V::splat(on_weight[x]);
        for (int64_t c = 0; c < width; c += L) {
          T* g = row_gradient + x * width + c;
          (V::load(g) - less * V::load(weight + c)).store(g);
        }
      }
    for (int64_t k = 0; k < columns * width; k += L) fma(V::load(from + k), to_low, V::load(low + k)).store(low + k);
    if (share == 0) return;
    for (int64_t k = 0; k < columns * width; k += L) fma(V::load(from + k), to_high, V::load(high + k)).store(high + k);
  }
};

}  // namespace dnc::cpu::DNC_ISA
