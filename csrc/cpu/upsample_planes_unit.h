// A unit of work of upsample_loss.cpp where classes are few: what upsample_unit.h does, with pixels in the vector lanes.
//
// Scores of a source pixel are taken from its largest one, times log2(e), as there. Two source rows [C][pitch], interpolated
// along their columns, and their gradients stay in L1, a strip of columns at a time, while the target rows of their cell are
// worked on. A vector of adjacent pixels goes through 2^x class by class, and back into the gradients of both rows. Ignored
// pixels are computed as well, and multiplied by 0. A vector with a pixel whose bound is far too high, or with a NaN, an Inf or
// too wide a range, is made again pixel by pixel (`again`).
#pragma once
#include "upsample_planes.h"
#include "upsample_unit.h"

namespace dnc::cpu::DNC_ISA {

template <class T>
struct PlanesUnit {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  static constexpr T kDone = -2;  // the label of a pixel whose loss has been added
  const UpsampleCrossEntropy& a;
  const UpsamplePlan<T>& plan;
  const LossTables<T>& tables;
  const PlaneColumns<T>& columns;
  const int64_t C, pitch;
  const bool want, weighted, smooth;
  int64_t strip;       // target columns that are worked on while they are in L1
  T* rows[2];          // [C][pitch] source rows r and r+1 at the target's columns
  T* gradient[2];      // likewise
  T* plane;            // [C][source_pitch] a source row, or its gradient
  T* scratch;          // [kTogether][2][pitch]
  T *label, *raw;      // [pitch] label or -1; lse(u) - u_y
  T *lse, *all;        // [pitch] with smoothing: lse(u) and sum_c w_c u_c, in units of ln and log2
  T *own, *on, *kept;  // [pitch] with class weights: those of the pixel's label
  T* grad_loss;        // [pitch], where one was given
  T *e, *u;            // [C][L]
  int64_t held[2];     // the source row in `rows`
  int64_t cell_row;    // that is worked on
  T down;              // share of row cell_row + 1
  UnitSums sums;

  static size_t row_size(const PlaneColumns<T>& p) { return size_t(p.C * p.source_pitch); }
  static size_t bytes(const PlaneColumns<T>& p) {
    return size_t(4 * p.C * p.pitch + p.C * p.source_pitch + (8 + 2 * p.kTogether) * p.pitch + 2 * p.C * L) * sizeof(T);
  }
  PlanesUnit(const UpsampleCrossEntropy& args, const PlaneColumns<T>& lanes, const LossTables<T>& t, void* memory)
      : a(args),
        plan(lanes.plan),
        tables(t),
        columns(lanes),
        C(lanes.C),
        pitch(lanes.pitch),
        want(args.grad_scores && C > 1),  // the gradient of one class is exactly 0
        weighted(bool(args.class_weight)),
        smooth(t.weight != nullptr) {
    T* next = static_cast<T*>(memory);
    const auto take = [&next](int64_t n) {
      T* at = next;
      next += n;
      return at;
    };
    for (int i = 0; i < 2; i++) rows[i] = take(C * pitch), gradient[i] = take(C * pitch);
    e = take(C * L), u = take(C * L);
    scratch = take(2 * lanes.kTogether * pitch), label = take(pitch), raw = take(pitch), lse = take(pitch), all = take(pitch);
    own = take(pitch), on = take(pitch), kept = take(pitch), grad_loss = take(pitch);
    plane = take(C * lanes.source_pitch);
    strip = 32768 / int64_t(4 * C * sizeof(T)) / L * L;
    strip = strip < L ? L : strip;
  }

  // Cell rows [r0,r1) of sample b (rows of the window). Row r1's gradient goes to `border`, where there is one.
  void run(int64_t b, int64_t r0, int64_t r1, T* border) {
    sums = {0, 0, -1, 0};
    held[0] = held[1] = -1;
    const size_t size = size_t(C * pitch) * sizeof(T);
    for (T* g : gradient) std::memset(g, 0, size);
    const int64_t end = plan.target_row0 + plan.H, top = plan.source_row0;
    int64_t i = plan.rows.first(r0 + top, plan.target_row0, end);
    for (int64_t r = r0; r < r1; r++) {
      const int64_t stop = plan.rows.first(r + 1 + top, i, end);
      for (int64_t j = 0; j < plan.W; j += strip)
        for (int64_t t = i; t < stop; t++) target_row(b, r, t, j, j + strip < plan.W ? j + strip : plan.W);
      i = stop;
      if (!a.grad_scores) continue;
      columns.gather(gradient[r & 1], plane, scratch);
      store_planes(a.grad_scores, b, r, columns.source_pitch, plane, false);
      std::memset(gradient[r & 1], 0, size);
    }
    if (border) columns.gather(gradient[r1 & 1], border, scratch);
  }
  static void add_border(const UpsampleCrossEntropy& a, const PlaneColumns<T>& p, int64_t b, int64_t r, const T* border) {
    store_planes(a.grad_scores, b, r, p.source_pitch, border, true);
  }

 private:
  // Source row r at the target's columns, each source pixel taken from its largest score.
  const T* source(int64_t b, int64_t r) {
    T* const row = rows[r & 1];
    if (held[r & 1] == r) return row;
    held[r & 1] = r;
    const int64_t size = columns.source_pitch;
    load_planes(a.scores, b, r, size, plane);
    for (int64_t c = 0; c < C; c++)
      for (int64_t x = plan.w; x < size; x++) plane[c * size + x] = 0;
    const V unit = V::splat(T(kLog2e));
    for (int64_t x = 0; x < plan.w; x += L) {
      V high = V::splat(kLowest<T>);
      for (int64_t c = 0; c < C; c++) high = max(V::load(plane + c * size + x), high);
      for (int64_t c = 0; c < C; c++) ((V::load(plane + c * size + x) - high) * unit).store(plane + c * size + x);
    }
    columns.stretch(plane, row);
    return row;
  }

  // Target columns [begin,end) of target row i of the whole map, whose lower source row is row r of the window.
  void target_row(int64_t b, int64_t r, int64_t i, int64_t begin, int64_t end) {
    cell_row = r, down = T(plan.rows.share(i));
    const T* low = source(b, r);
    const T* high = down == 0 ? low : source(b, r + 1);
    i -= plan.target_row0;
    const int64_t counted = read_pixels(b, i, begin, end);
    T* const out = a.loss ? a.loss.as<T>() + (b * plan.H + i) * plan.W : nullptr;
    if (counted == 0) {
      for (int64_t j = begin; out && j < end; j++) out[j] = 0;
      return;
    }
    switch (C) {
      case 2: row_of<2>(b, begin, end, low, high, out); break;
      case 3: row_of<3>(b, begin, end, low, high, out); break;
      case 4: row_of<4>(b, begin, end, low, high, out); break;
      default: row_of<0>(b, begin, end, low, high, out);
    }
    add_losses(begin, end, counted, out);
  }

  // Fills the rows of the pixels from their labels; returns how many count.
  int64_t read_pixels(int64_t b, int64_t i, int64_t begin, int64_t end) {
    switch (a.labels.dtype) {
      case DType::int32: return read_pixels<int32_t>(b, i, begin, end);
      case DType::uint8: return read_pixels<uint8_t>(b, i, begin, end);
      default: return read_pixels<int64_t>(b, i, begin, end);
    }
  }
  template <class I>
  int64_t read_pixels(int64_t b, int64_t i, int64_t begin, int64_t end) {
    const int64_t step = a.labels.stride[2];
    const I* in = a.labels.as<I>() + b * a.labels.stride[0] + i * a.labels.stride[1];
    bool bad = false;
    const int64_t counted = step == 1 ? read_labels(in, 1, begin, end, &bad) : read_labels(in, step, begin, end, &bad);
    for (int64_t j = end; j < columns.padded(end); j++) label[j] = -1;
    if (bad)
      for (int64_t j = begin; j < end; j++) {
        const int64_t y = in[j * step], at = (b * plan.H + i) * plan.W + j;
        if (y < C || y == a.ignore_index || (sums.bad_index >= 0 && sums.bad_index < at)) continue;
        sums.bad_index = at, sums.bad_label = y;
      }
    if (weighted) read_weights(begin, columns.padded(end));
    if (a.grad_loss) {
      const View& g = a.grad_loss;
      const T* from = g.as<T>() + b * g.stride[0] + i * g.stride[1];
      for (int64_t j = begin; j < end; j++) grad_loss[j] = from[j * g.stride[2]];
    }
    return counted;
  }
  template <class I>
  DNC_INLINE int64_t read_labels(const I* in, int64_t step, int64_t begin, int64_t end, bool* bad) const {
    T* const out = label;
    const int64_t most = C, ignored = a.ignore_index;
    int64_t counted = 0, wrong = 0;
    for (int64_t j = begin; j < end; j++) {
      const int64_t y = in[j * step];
      const bool counts = y >= 0 && y < most;
      out[j] = counts ? T(y) : T(-1);
      counted += counts, wrong += y >= most && y != ignored;
    }
    *bad = wrong > 0;
    return counted;
  }

  void read_weights(int64_t begin, int64_t end) {
    const LossTables<T> t = tables;
    const T* const from = label;
    T *const to_own = own, *const to_on = on, *const to_kept = kept;
    const int64_t none = C;
    double total[L] = {};
    for (int64_t j = begin; j < end; j += L)
      for (int k = 0; k < L; k++) {
        const T found = from[j + k];
        const int64_t y = found < 0 ? none : int64_t(found);
        to_own[j + k] = t.own[y], to_on[j + k] = t.on[y], to_kept[j + k] = t.kept[y], total[k] += t.counted[y];
      }
    for (double part : total) sums.weight += part;
  }

  template <int NC>
  void row_of(int64_t b, int64_t begin, int64_t end, const T* low, const T* high, T* out) {
    const int64_t C = NC ? NC : this->C, pitch = this->pitch;
    const V zero = V::splat(0), one = V::splat(1), s = V::splat(down), rest = V::splat(1 - down), ln2 = V::splat(T(kLn2));
    const V on0 = V::splat(tables.on[0]), kept0 = V::splat(tables.kept[0]);
    T *const to_low = gradient[cell_row & 1], *const to_high = gradient[(cell_row + 1) & 1];
    V power[NC ? NC : 1];
    for (int64_t j = begin; j < end; j += L) {
      const V y = V::load(label + j);
      const auto counts = gt(y, V::splat(T(-0.5)));
      V total = zero, of_label = zero, sum = zero, id = zero;
      for (int64_t c = 0; c < C; c++, id = id + one) {
        const V from = V::load(low + c * pitch + j), x = fma(s, V::load(high + c * pitch + j) - from, from), p = exp2(x);
        total = total + p, of_label = V::select(eq(y, id), x, of_label);
        if (smooth) sum = fma(V::splat(tables.weight[c]), x, sum);
        if constexpr (NC > 0)
          power[c] = p;
        else
          p.store(e + c * L);
      }
      unsigned regular = V::bits(gt(total, V::splat(T(kSmallestSum)))) & V::bits(eq(of_label - of_label, zero));
      if (smooth) regular &= V::bits(eq(sum - sum, zero));
      if (__builtin_expect(regular != (1u << L) - 1, false)) {
        for (int64_t c = 0; NC && c < C; c++) power[c].store(e + c * L);
        again(b, j, regular, low, high, &total, &of_label, &sum, out);
        for (int64_t c = 0; NC && c < C; c++) power[c] = V::load(e + c * L);
      }
      const V log_total = log(total);
      V::select(counts, log_total - ln2 * of_label, zero).store(raw + j);
      if (smooth) log_total.store(lse + j), sum.store(all + j);
      if (!want) continue;
      const V keep = total * (weighted ? V::load(kept + j) : kept0);
      V factor = (weighted ? V::load(on + j) : on0) / total, spread = V::splat(T(tables.smooth));
      if (a.grad_loss) factor = factor * V::load(grad_loss + j), spread = spread * V::load(grad_loss + j);
      factor = V::select(counts, factor, zero), spread = V::select(counts, spread, zero);
      id = zero;
      for (int64_t c = 0; c < C; c++, id = id + one) {
        V p;
        if constexpr (NC > 0)
          p = power[c];
        else
          p = V::load(e + c * L);
        V g = V::select(eq(y, id), p - keep, p) * factor;
        if (smooth) g = g - spread * V::splat(tables.weight[c]);
        T *const l = to_low + c * pitch + j, *const h = to_high + c * pitch + j;
        fma(rest, g, V::load(l)).store(l);
        if (down != 0) fma(s, g, V::load(h)).store(h);
      }
    }
  }

  // The pixels of vector j that are not in `regular`: each from its own largest score, or from the scores as they were given.
  __attribute__((noinline)) void again(int64_t b, int64_t j, unsigned regular, const T* low, const T* high, V* total,
                                       V* of_label, V* sum, T* out) {
    V most = V::splat(kLowest<T>), second = V::splat(0);
    for (int64_t c = 0; c < C; c++) {
      const V from = V::load(low + c * pitch + j), x = fma(V::splat(down), V::load(high + c * pitch + j) - from, from);
      most = max(x, most), x.store(u + c * L);
    }
    for (int64_t c = 0; c < C; c++) {
      const V power = exp2(V::load(u + c * L) - most);
      second = second + power, power.store(u + c * L);
    }
    T first[L], own_most[L], of[L], all_of[L], own_total[L];
    total->store(first), most.store(own_most), of_label->store(of), sum->store(all_of), second.store(own_total);
    for (int k = 0; k < L; k++) {
      if (regular >> k & 1) continue;
      const int64_t at = j + k;
      const bool counts = label[at] >= 0;
      T* const mine = e + k;
      const T less = smooth ? T(tables.weight_sum) * own_most[k] : T(0);
      if (counts && own_most[k] > kLowest<T> / 2 && own_total[k] < T(INFINITY) && std::isfinite(of[k] - own_most[k]) &&
          std::isfinite(all_of[k] - less)) {
        for (int64_t c = 0; c < C; c++) mine[c * L] = u[c * L + k];
        first[k] = own_total[k], of[k] -= own_most[k], all_of[k] -= less;
        continue;
      }
      first[k] = 1, of[k] = all_of[k] = 0;  // adds nothing below
      for (int64_t c = 0; c < C; c++) mine[c * L] = 0;
      if (counts) exact(b, at, mine, out);
    }
    *total = V::load(first), *of_label = V::load(of), *sum = V::load(all_of);
  }

  // Pixel j from the scores as they were given: its probabilities, and its loss, which may be too large for T, in double.
  void exact(int64_t b, int64_t j, T* power, T* out) {
    const int64_t y = int64_t(label[j]);
    T* const pixel = plane;  // [C]
    const ExactPixel<T> found = exact_pixel(a.scores, tables, b, cell_row, down, columns.lower[j], columns.share[j], y, pixel);
    for (int64_t c = 0; c < C; c++) power[c * L] = pixel[c] / found.sum;
    const double loss = pixel_loss(tables, y, std::log(double(found.sum)), found.own, found.weighted);
    sums.loss += loss;
    if (out) out[j] = T(loss);
    label[j] = kDone;
    if (weighted) own[j] = 0;
  }

  // With class weights or smoothing: `raw` becomes the loss, and is added to `total`.
  template <bool weighted, bool smooth>
  void add_all(int64_t begin, int64_t end, double* total) const {
    const T *const y = label, *const own = this->own, *const lse = this->lse, *const all = this->all;
    T* const raw = this->raw;
    const LossTables<T> t = tables;
    const double own0 = double(t.own[0]);
    for (int64_t j = begin; j < end; j += L)
      for (int k = 0; k < L; k++) {
        double loss = (weighted ? double(own[j + k]) : own0) * double(raw[j + k]);
        if (smooth) loss += t.smooth * smoothed(t, double(lse[j + k]), kLn2 * double(all[j + k]));
        loss = y[j + k] < 0 ? 0 : loss;
        raw[j + k] = T(loss), total[k] += loss;
      }
  }

  // Losses of target columns [begin,end), but of those that are done.
  void add_losses(int64_t begin, int64_t end, int64_t counted, T* out) {
    double total[L] = {};
    const double own0 = double(tables.own[0]);
    if (!weighted && !smooth) {
      const T* const raw = this->raw;
      for (int64_t j = begin; j < end; j += L)
        for (int k = 0; k < L; k++) total[k] += double(raw[j + k]);
      for (double& part : total) part *= own0;
    } else {
      weighted ? smooth ? add_all<true, true>(begin, end, total) : add_all<true, false>(begin, end, total)
               : add_all<false, true>(begin, end, total);
    }
    for (double part : total) sums.loss += part;
    if (!weighted) sums.weight += double(counted);
    if (!out) return;
    const T scale = weighted || smooth ? T(1) : tables.own[0];
    for (int64_t j = begin; j < end; j++)
      if (label[j] != kDone) out[j] = label[j] < 0 ? T(0) : scale * raw[j];
  }
};

// The tables of calls on maps of one width, and what they lie in.
template <class T>
struct LossTableMemory {
  Scratch grid, classes;
  PlaneColumns<T> columns;
  LossTables<T> tables{};
  LossTableMemory(const UpsamplePlan<T>& plan, const View& class_weight, double label_smoothing)
      : grid(PlaneColumns<T>::bytes(plan)),
        classes(size_t(3 * (plan.C + 1) + plan.width) * sizeof(T) + size_t(plan.C + 1) * sizeof(double)),
        columns(plan, grid.data) {
    if (!ok()) return;
    const int64_t C = plan.C;
    double* counted = classes.as<double>();
    T* on = reinterpret_cast<T*>(counted + C + 1);
    T *own = on + C + 1, *kept = own + C + 1, *weight = kept + C + 1;
    double weight_sum = 0;
    for (int64_t c = 0; c < C; c++) weight_sum += counted[c] = class_weight ? double(class_weight.as<T>()[c]) : 1.0;
    const double smooth = label_smoothing / double(C);
    counted[C] = 0, on[C] = own[C] = kept[C] = 0;  // of a pixel that is left out
    for (int64_t c = 0; c < plan.width; c++) weight[c] = c < C ? T(counted[c]) : T(0);
    for (int64_t c = 0; c < C; c++) {
      // without smoothing an infinite weight of another class is no business of this one
      const double mine = (1 - label_smoothing) * counted[c], all = smooth > 0 ? mine + smooth * weight_sum : mine;
      own[c] = T(mine), on[c] = T(all), kept[c] = mine == all ? T(1) : T(mine / all);
    }
    tables = {columns.share, columns.first, on, own, kept, smooth > 0 ? weight : nullptr, weight_sum, smooth, counted};
  }
  bool ok() const { return grid.data && classes.data; }
};

}  // namespace dnc::cpu::DNC_ISA
