// upsample_cross_entropy on the CPU: cross-entropy of bilinearly interpolated scores and the scores' gradient in one pass.
//
//   u_c = interpolated scores;  loss = on * lse(u) - own * u_y - s/C sum_c w_c u_c,   own = (1-s) w_y,  on = own + s/C sum_c
//   w_c reads scores [B,C,h,w] (one row in 4 twice) and labels [B,H,W] once; writes grad_scores once (one row in 4 twice), loss
//   [B,H,W] if asked. [B,C,H,W] never exists: a group of 4 pixels x C lives in L1. Compute-bound: B*H*W*C exponentials.
// Plan: a unit is a block of cell rows of one sample; vector lanes are classes. Each target row: source rows are blended into
// v [columns][C] once; pixels between the same two columns go in groups through exp and back into the gradient of v, which
// then goes to the gradients of both source rows. The shift of the exponentials is the interpolated maximum of the source
// pixels, an upper bound of max_c u that needs no pass of its own; a pixel for which it is far too high, or which has a NaN
// or Inf, takes the exact path (`exact`).
// Deterministic: blocks depend on sizes alone. A block hands the gradient of the first row behind it to a border buffer that
// is added afterwards; sums of blocks are added in order. Reference: dnc_kernels/ops/upsample/reference.py.
#include <omp.h>

#include "upsample_rows.h"

namespace dnc::cpu::DNC_ISA {
namespace {

constexpr int kGroup = 4;  // pixels that go through exp together: four chains hide its latency

// Below this sum of exponentials the shift was too high, and small terms are lost: exp gives 0 below e^-87.
constexpr double kSmallestSum = 1e-25;

// Label pixels between two source columns that count.
template <class T>
struct Group {
  T share[kGroup], high[kGroup], sum[kGroup], coefficient[kGroup];
  int64_t label[kGroup], column[kGroup];
};

// What is the same for all units.
template <class T>
struct LossTables {
  const T* share;             // [W]
  const int64_t* first;       // [w+1] first target column of a cell column
  const T *on, *own, *kept;   // [C]: see above; kept = own / on
  const T* weight;            // [width], zero-padded: class weights; nullptr without smoothing
  double weight_sum, smooth;  // sum_c w_c; s / C
  const double* counted;      // [C] class weights
};

// What is kept of a source or blended row beside its scores.
template <class T>
struct Extremes {
  T* high;      // [w] largest score of a pixel
  T* weighted;  // [w] sum_c w_c score_c, with smoothing
};

struct UnitSums {
  double loss, weight;
  int64_t bad_index, bad_label;  // bad_index -1: none
};

template <class T>
struct LossUnit {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  const UpsampleCrossEntropy& a;
  const UpsamplePlan<T>& plan;
  const LossTables<T>& tables;
  RowPair<T> rows;
  T* gradient[2];  // [w][width] of the same two source rows
  Extremes<T> extremes[2];
  T* row;               // [strip+1][width] blended row
  T* row_gradient;      // likewise
  Extremes<T> blended;  // [strip+1]
  T* on_weight;         // [strip+1]: how much of the class weights to take from the gradient of a column
  T* exps;              // [kGroup][width]
  int64_t* labels;      // [W] of the row at hand
  UnitSums sums;
  bool want;

  static size_t bytes(const UpsamplePlan<T>& p) {
    return size_t(4 * p.w * p.width + 4 * p.w + (p.strip + 1) * (2 * p.width + 3) + kGroup * p.width) * sizeof(T) +
           size_t(p.W) * sizeof(int64_t);
  }
  LossUnit(const UpsampleCrossEntropy& args, const UpsamplePlan<T>& p, const LossTables<T>& t, void* memory)
      : a(args), plan(p), tables(t), want(bool(args.grad_scores)) {
    T* next = static_cast<T*>(memory);
    const auto take = [&next](int64_t n) {
      T* at = next;
      next += n;
      return at;
    };
    // whole vectors first: they stay aligned
    for (int i = 0; i < 2; i++) rows.data[i] = take(p.w * p.width), gradient[i] = take(p.w * p.width);
    row = take((p.strip + 1) * p.width), row_gradient = take((p.strip + 1) * p.width), exps = take(kGroup * p.width);
    labels = reinterpret_cast<int64_t*>(next), next += p.W * sizeof(int64_t) / sizeof(T);
    for (int i = 0; i < 2; i++) extremes[i] = {take(p.w), take(p.w)};
    blended = {take(p.strip + 1), take(p.strip + 1)}, on_weight = take(p.strip + 1);
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

 private:
  const T* source(int64_t b, int64_t r) {
    bool fresh;
    const T* data = rows.get(a.scores, b, r, plan.width, &fresh);
    if (!fresh) return data;
    const Extremes<T>& e = extremes[r & 1];
    for (int64_t x = 0; x < plan.w; x++) {
      const T* pixel = data + x * plan.width;
      V high = V::splat(kLowest<T>), weighted = V::splat(0);
      for (int64_t c = 0; c < plan.width; c += L) high = max(V::load(pixel + c), high);
      e.high[x] = high.max();
      if (!tables.weight) continue;
      // 0 * score: a class of weight 0 counts for nothing unless its score is not finite, as in torch
      for (int64_t c = 0; c < plan.width; c += L) weighted = fma(V::load(pixel + c), V::load(tables.weight + c), weighted);
      e.weighted[x] = weighted.sum();
    }
    return data;
  }

  // Target row i of the whole map, whose lower source row is row r of the window.
  void target_row(int64_t b, int64_t r, int64_t i) {
    const T share = T(plan.rows.share(i));
    const T* low = source(b, r);
    const T* high = share == 0 ? low : source(b, r + 1);
    const Extremes<T>&e0 = extremes[r & 1], &e1 = extremes[(r + (share != 0)) & 1];
    i -= plan.target_row0;
    for (int64_t x0 = 0; x0 < plan.w; x0 += plan.strip) {
      const int64_t x1 = x0 + plan.strip < plan.w ? x0 + plan.strip : plan.w, j0 = tables.first[x0], j1 = tables.first[x1];
      if (j0 == j1 || !read_labels(b, i, j0, j1)) continue;
      const int64_t columns = (x1 < plan.w ? x1 + 1 : x1) - x0, size = columns * plan.width;
      const T* v = blend(low + x0 * plan.width, high + x0 * plan.width, share, size, row);
      for (int64_t x = 0; x < columns; x++) {
        blended.high[x] = mix(e0.high[x0 + x], e1.high[x0 + x], share);
        if (tables.weight) blended.weighted[x] = mix(e0.weighted[x0 + x], e1.weighted[x0 + x], share);
      }
      if (want) {
        std::memset(row_gradient, 0, size_t(size) * sizeof(T));
        for (int64_t x = 0; x < columns; x++) on_weight[x] = 0;
      }
      for (int64_t x = x0; x < x1; x++) cell(b, i, x, x - x0, v);
      if (want) spread_rows(r, x0, columns, share);
    }
  }

  static DNC_INLINE T mix(T low, T high, T share) { return share == 0 ? low : (1 - share) * low + share * high; }

  // Labels [j0,j1) of target row i; a label that does not count becomes -1. False: none counts, and their losses are written.
  bool read_labels(int64_t b, int64_t i, int64_t j0, int64_t j1) {
    const int64_t base = b * a.labels.stride[0] + i * a.labels.stride[1], step = a.labels.stride[2];
    bool any = false;
    for (int64_t j = j0; j < j1; j++) {
      const int64_t at = base + j * step;
      int64_t y = a.labels.dtype == DType::int64   ? a.labels.as<int64_t>()[at]
                  : a.labels.dtype == DType::int32 ? a.labels.as<int32_t>()[at]
                                                   : a.labels.as<uint8_t>()[at];
      if (y == a.ignore_index) {
        y = -1;
      } else if (y < 0 || y >= plan.C) {
        if (sums.bad_index < 0) sums.bad_index = (b * plan.H + i) * plan.W + j, sums.bad_label = y;
        y = -1;
      }
      labels[j] = y;
      any |= y >= 0;
      if (y < 0 && a.loss) a.loss.as<T>()[(b * plan.H + i) * plan.W + j] = 0;
    }
    return any;
  }

  // The target pixels between source columns x and x+1; `at` is x in the strip.
  void cell(int64_t b, int64_t i, int64_t x, int64_t at, const T* v) {
    const int64_t next = x + 1 < plan.w ? at + 1 : at;
    Group<T> g;
    int n = 0;
    for (int64_t j = tables.first[x]; j < tables.first[x + 1]; j++) {
      if (labels[j] < 0) continue;
      g.share[n] = tables.share[j], g.label[n] = labels[j], g.column[n] = j;
      if (++n < kGroup) continue;
      group<kGroup>(b, i, g, at, next, v);
      n = 0;
    }
    if (n == 3)
      group<3>(b, i, g, at, next, v);
    else if (n == 2)
      group<2>(b, i, g, at, next, v);
    else if (n == 1)
      group<1>(b, i, g, at, next, v);
  }

  template <int G>
  void group(int64_t b, int64_t i, Group<T>& g, int64_t at, int64_t next, const T* v) {
    const int64_t width = plan.width;
    const T *left = v + at * width, *right = v + next * width;
    for (int k = 0; k < G; k++) g.high[k] = blended.high[at] + g.share[k] * (blended.high[next] - blended.high[at]);
    softmax<G>(left, right, g);
    T own_score[G];
    for (int k = 0; k < G; k++) own_score[k] = left[g.label[k]] + g.share[k] * (right[g.label[k]] - left[g.label[k]]);
    bool regular = true;
    for (int k = 0; k < G; k++) {
      if (g.sum[k] > T(kSmallestSum) && g.sum[k] < T(INFINITY)) continue;
      regular = false;
      own_score[k] = exact(left, right, g.share[k], g.label[k], exps + k * width, &g.high[k], &g.sum[k]);
    }
    for (int k = 0; k < G; k++) {
      const int64_t y = g.label[k];
      double loss = double(tables.on[y]) * std::log(double(g.sum[k])) +
                    double(tables.own[y]) * (double(g.high[k]) - double(own_score[k]));
      if (tables.weight)
        loss += tables.smooth *
                (tables.weight_sum * double(g.high[k]) - double(mix(blended.weighted[at], blended.weighted[next], g.share[k])));
      sums.loss += loss;
      sums.weight += tables.counted[y];
      if (a.loss) a.loss.as<T>()[(b * plan.H + i) * plan.W + g.column[k]] = T(loss);
    }
    if (!want || plan.C == 1) return;  // the gradient of one class is exactly 0
    for (int k = 0; k < G; k++) {
      const View& in = a.grad_loss;
      const T grad = in ? in.as<T>()[b * in.stride[0] + i * in.stride[1] + g.column[k] * in.stride[2]] : T(1);
      exps[k * width + g.label[k]] -= g.sum[k] * tables.kept[g.label[k]];
      g.coefficient[k] = grad * tables.on[g.label[k]] / g.sum[k];
      if (tables.weight) {
        const T all = grad * T(tables.smooth);
        on_weight[at] += (1 - g.share[k]) * all;
        if (g.share[k] != 0) on_weight[next] += g.share[k] * all;
      }
    }
    if (regular) {
      spread<G>(g, exps, row_gradient + at * width, row_gradient + next * width);
      return;
    }
    for (int k = 0; k < G; k++) {  // one at a time: a column of share 0 must not see a NaN
      Group<T> one = g;
      one.share[0] = g.share[k], one.coefficient[0] = g.coefficient[k];
      spread<1>(one, exps + k * width, row_gradient + at * width, g.share[k] == 0 ? nullptr : row_gradient + next * width);
    }
  }

  // exps[k] = exp(u - high), sum[k] their sums.
  template <int G>
  DNC_INLINE void softmax(const T* left, const T* right, Group<T>& g) {
    V share[G], high[G], sum[G];
    for (int k = 0; k < G; k++) share[k] = V::splat(g.share[k]), high[k] = V::splat(g.high[k]), sum[k] = V::splat(0);
    for (int64_t c = 0; c < plan.width; c += L) {
      const V from = V::load(left + c), step = V::load(right + c) - from;
      for (int k = 0; k < G; k++) {
        const V e = exp(fma(share[k], step, from) - high[k]);
        sum[k] = sum[k] + e;
        e.store(exps + k * plan.width + c);
      }
    }
    for (int k = 0; k < G; k++) g.sum[k] = sum[k].sum();
  }

  // Gradients of the two columns: (1-share) and share of coefficient * exps.
  template <int G>
  DNC_INLINE void spread(const Group<T>& g, const T* from, T* left, T* right) {
    V to_left[G], to_right[G];
    for (int k = 0; k < G; k++) {
      to_right[k] = V::splat(g.share[k] * g.coefficient[k]);
      to_left[k] = V::splat((1 - g.share[k]) * g.coefficient[k]);
    }
    for (int64_t c = 0; c < plan.width; c += L) {
      V l = V::load(left + c);
      for (int k = 0; k < G; k++) l = fma(V::load(from + k * plan.width + c), to_left[k], l);
      l.store(left + c);
    }
    if (!right) return;
    for (int64_t c = 0; c < plan.width; c += L) {
      V r = V::load(right + c);
      for (int k = 0; k < G; k++) r = fma(V::load(from + k * plan.width + c), to_right[k], r);
      r.store(right + c);
    }
  }

  // One pixel with its own maximum, whatever its scores; returns u_y.
  T exact(const T* left, const T* right, T share, int64_t y, T* e, T* high, T* sum) {
    T most = -INFINITY, total = 0;
    for (int64_t c = 0; c < plan.C; c++) {
      e[c] = mix(left[c], right[c], share);
      if (e[c] > most || e[c] != e[c]) most = e[c];
    }
    const T own = e[y];
    for (int64_t c = 0; c < plan.C; c++) e[c] = std::exp(e[c] - most), total += e[c];
    for (int64_t c = plan.C; c < plan.width; c++) e[c] = 0;
    *high = most, *sum = total;
    return own;
  }

  // The gradient of the blended row goes to both source rows.
  void spread_rows(int64_t r, int64_t x0, int64_t columns, T share) {
    T* low = gradient[r & 1] + x0 * plan.width;
    T* high = gradient[(r + 1) & 1] + x0 * plan.width;
    const V to_low = V::splat(1 - share), to_high = V::splat(share);
    for (int64_t x = 0; x < columns; x++) {
      const V less = V::splat(on_weight[x]);
      for (int64_t c = 0; c < plan.width; c += L) {
        const int64_t at = x * plan.width + c;
        V g = V::load(row_gradient + at);
        if (tables.weight) g = g - less * V::load(tables.weight + c);
        fma(g, to_low, V::load(low + at)).store(low + at);
        if (share != 0) fma(g, to_high, V::load(high + at)).store(high + at);
      }
    }
  }
};

template <class T>
Status loss(const UpsampleCrossEntropy& a) {
  const Status out_of_memory{Code::out_of_memory, 0, 0, "not enough memory"};
  const UpsamplePlan<T> plan(a.scores, a.labels.size[1], a.labels.size[2], a.align_corners, a.source_rows, a.source_row0,
                             a.target_rows, a.target_row0);
  const int64_t last = plan.target_row0 + plan.H - 1, bottom = plan.source_row0 + plan.h - 1;
  if (plan.source_row0 < 0 || bottom >= plan.rows.source || plan.target_row0 < 0 || last >= plan.rows.target)
    return bad_argument("the window lies outside the map");
  if (plan.H > 0 &&
      (plan.rows.lower(plan.target_row0) < plan.source_row0 || plan.rows.lower(last) + (plan.rows.share(last) > 0) > bottom))
    return bad_argument("the window lacks source rows of its labels");

  // columns, class weights
  const int64_t C = plan.C, width = plan.width;
  Scratch grid(size_t(plan.W) * sizeof(T) + size_t(plan.w + 1) * sizeof(int64_t)),
      classes(size_t(3 * C + width) * sizeof(T) + size_t(C) * sizeof(double));
  // without blended rows nothing is handed on
  const bool handed = a.grad_scores && plan.rows.source != plan.rows.target && plan.blocks > 1;
  const int64_t units = plan.units(), row_size = plan.w * width;
  Scratch border(handed ? size_t(units * row_size) * sizeof(T) : 0), unit_sums(size_t(units) * sizeof(UnitSums));
  if (!grid.data || !classes.data || !border.data || !unit_sums.data) return out_of_memory;
  int64_t* first = grid.as<int64_t>();
  T* share = reinterpret_cast<T*>(first + plan.w + 1);
  plan.fill_columns(share, first);
  double* counted = classes.as<double>();
  T* on = reinterpret_cast<T*>(counted + C);
  T *own = on + C, *kept = own + C, *weight = kept + C;
  double weight_sum = 0;
  for (int64_t c = 0; c < C; c++) weight_sum += counted[c] = a.class_weight ? double(a.class_weight.as<T>()[c]) : 1.0;
  const double smooth = a.label_smoothing / double(C);
  for (int64_t c = 0; c < width; c++) weight[c] = c < C ? T(counted[c]) : T(0);
  for (int64_t c = 0; c < C; c++) {
    const double mine = (1 - a.label_smoothing) * counted[c], all = mine + smooth * weight_sum;
    own[c] = T(mine), on[c] = T(all), kept[c] = all != 0 ? T(mine / all) : T(1);
  }
  const LossTables<T> tables{share, first, on, own, kept, smooth > 0 ? weight : nullptr, weight_sum, smooth, counted};

  const int threads = plan.threads(a.threads);
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Scratch memory(LossUnit<T>::bytes(plan));
    failed = !memory.data;
    LossUnit<T> unit(a, plan, tables, memory.data);
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < units; u++) {
      if (failed) continue;
      const int64_t r0 = u % plan.blocks * plan.block, r1 = r0 + plan.block < plan.h ? r0 + plan.block : plan.h;
      unit.run(u / plan.blocks, r0, r1, handed && r1 < plan.h ? border.as<T>() + u * row_size : nullptr);
      unit_sums.as<UnitSums>()[u] = unit.sums;
    }
    if (handed) {
#pragma omp for schedule(static)
      for (int64_t u = 0; u < units; u++)
        if (!failed && (u + 1) % plan.blocks != 0)
          store_classes(a.grad_scores, u / plan.blocks, (u % plan.blocks + 1) * plan.block, width,
                        border.as<T>() + u * row_size, true);
    }
  }
  if (failed) return out_of_memory;
  double total[2] = {0, 0};
  for (int64_t u = 0; u < units; u++) {
    const UnitSums& s = unit_sums.as<UnitSums>()[u];
    if (s.bad_index >= 0) return {Code::bad_label, s.bad_index, s.bad_label, "labels must be in [0,C) or ignore_index"};
    total[0] += s.loss, total[1] += s.weight;
  }
  if (a.sums) std::memcpy(a.sums.data, total, sizeof total);
  return {};
}

}  // namespace

Status upsample_cross_entropy(const UpsampleCrossEntropy& a) {
  switch (a.scores.dtype) {
    case DType::float64: return loss<double>(a);
    case DType::float32:
    case DType::float16:
    case DType::bfloat16: return loss<float>(a);
    default: return bad_argument("scores must be float32, float64, float16 or bfloat16");
  }
}

}  // namespace dnc::cpu::DNC_ISA
