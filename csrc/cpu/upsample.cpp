// upsample_argmax on the CPU: the class of the largest bilinearly interpolated score of every target pixel.
//
//   u_c = interpolated scores, the same operations for every class: equal scores stay equal;  label = argmax_c u_c
//   reads scores [B,C,h,w] (one row in 4 twice), writes label [B,H,W]; [B,C,H,W] never exists. Compute-bound: 4 vector
//   operations for `lanes` classes of a pixel, or for a class of `lanes` pixels.
// Plan: as in upsample_loss.cpp: a unit is a block of cell rows of one sample. Vector lanes are classes (ArgmaxUnit: rows are
// interpolated first, pixels between the same two columns go in groups) or, where those are few, pixels (PlanesArgmaxUnit:
// columns first, once for a source row). Pixels that touch a NaN, an Inf or a score beyond half of the largest number take a
// scalar path. Deterministic: every label depends on its own scores only. Reference: dnc_kernels/ops/upsample/reference.py.
#include <omp.h>

#include "upsample_planes.h"

namespace dnc::cpu::DNC_ISA {
namespace {

constexpr int kGroup = 4;

template <class T>
struct ArgmaxUnit {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  const UpsampleArgmax& a;
  const UpsamplePlan<T>& plan;
  const T* share;        // [W]
  const int64_t* first;  // [w+1]
  RowPair<T> rows;
  T* row;        // [strip+1][width] blended row
  T* poison[2];  // [w] of the source rows: 0, or NaN for a pixel with a NaN, an Inf or a score from which a step may overflow

  static size_t bytes(const PlaneColumns<T>& shape) {
    const UpsamplePlan<T>& p = shape.plan;
    return size_t(2 * p.w * p.width + (p.strip + 1) * p.width + 2 * p.w) * sizeof(T);
  }
  ArgmaxUnit(const UpsampleArgmax& args, const PlaneColumns<T>& shape, void* memory)
      : a(args), plan(shape.plan), share(shape.share), first(shape.first) {
    const UpsamplePlan<T>& p = plan;
    T* next = static_cast<T*>(memory);
    for (T*& data : rows.data) data = next, next += p.w * p.width;
    row = next, next += (p.strip + 1) * p.width;
    for (T*& data : poison) data = next, next += p.w;
  }

  void run(int64_t b, int64_t r0, int64_t r1) {
    rows.held[0] = rows.held[1] = -1;
    int64_t i = plan.rows.first(r0, 0, plan.H);
    for (int64_t r = r0; r < r1; r++)
      for (const int64_t stop = plan.rows.first(r + 1, i, plan.H); i < stop; i++) target_row(b, r, i);
  }

 private:
  const T* source(int64_t b, int64_t r) {
    bool fresh;
    const T* data = rows.get(a.scores, b, r, plan.width, &fresh);
    if (!fresh) return data;
    for (int64_t x = 0; x < plan.w; x++) {
      V sum = V::splat(0);
      for (int64_t c = 0; c < plan.width; c += L) {
        const V score = V::load(data + x * plan.width + c), twice = score + score;
        sum = fma(c + L <= plan.C ? twice : V::select(V::first(int(plan.C - c)), twice, V::splat(0)), V::splat(0), sum);
      }
      poison[r & 1][x] = sum.sum();
    }
    return data;
  }

  void target_row(int64_t b, int64_t r, int64_t i) {
    const T down = T(plan.rows.share(i));
    const T* low = source(b, r);
    const T* high = down == 0 ? low : source(b, r + 1);
    const T *bad0 = poison[r & 1], *bad1 = poison[(r + (down != 0)) & 1];
    int64_t* out = a.label.as<int64_t>() + (b * plan.H + i) * plan.W;
    for (int64_t x0 = 0; x0 < plan.w; x0 += plan.strip) {
      const int64_t x1 = x0 + plan.strip < plan.w ? x0 + plan.strip : plan.w;
      if (first[x0] == first[x1]) continue;
      const int64_t columns = (x1 < plan.w ? x1 + 1 : x1) - x0;
      const T* v = blend(low + x0 * plan.width, high + x0 * plan.width, down, columns * plan.width, row);
      for (int64_t x = x0; x < x1; x++) {
        const int64_t next = x + 1 < plan.w ? x + 1 : x;
        const T *left = v + (x - x0) * plan.width, *right = v + (next - x0) * plan.width;
        int64_t j = first[x];
        const int64_t end = first[x + 1];
        if (bad0[x] + bad1[x] + bad0[next] + bad1[next] != 0) {  // NaN differs from 0
          for (; j < end; j++) out[j] = exact(left, right, share[j]);
          continue;
        }
        for (; j + kGroup <= end; j += kGroup) group<kGroup>(left, right, share + j, out + j);
        for (; j + 2 <= end; j += 2) group<2>(left, right, share + j, out + j);
        if (j < end) group<1>(left, right, share + j, out + j);
      }
    }
  }

  template <int G>
  DNC_INLINE void group(const T* left, const T* right, const T* shares, int64_t* out) {
    V best[G], index[G], s[G];
    for (int k = 0; k < G; k++) best[k] = V::splat(-INFINITY), index[k] = V::splat(0), s[k] = V::splat(shares[k]);
    for (int64_t c = 0; c < plan.width; c += L) {
      const V from = V::load(left + c), step = V::load(right + c) - from, base = V::splat(T(c));
      for (int k = 0; k < G; k++) {
        const V u = fma(s[k], step, from);
        index[k] = V::select(gt(u, best[k]), base, index[k]);  // the first of a lane wins a tie
        best[k] = max(u, best[k]);
      }
    }
    for (int k = 0; k < G; k++) {
      T base[L];
      index[k].store(base);
      unsigned hits = V::bits(eq(best[k], V::splat(best[k].max())));
      int64_t label = INT64_MAX;
      for (; hits; hits &= hits - 1) {
        const int lane = __builtin_ctz(hits);
        const int64_t c = int64_t(base[lane]) + lane;
        if (c < label) label = c;
      }
      out[k] = label;
    }
  }

  // Any scores. The first NaN wins; a column of share 0 is not read.
  int64_t exact(const T* left, const T* right, T s) const {
    int64_t label = 0;
    T best = -INFINITY;
    for (int64_t c = 0; c < plan.C; c++) {
      const T u = s == 0 ? left[c] : (1 - s) * left[c] + s * right[c];
      if (u != u) return c;
      if (u > best) best = u, label = c;
    }
    return label;
  }
};

// Where classes are few: lanes are pixels. Columns are interpolated first, once for a source row, and then rows.
template <class T>
struct PlanesArgmaxUnit {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  const UpsampleArgmax& a;
  const UpsamplePlan<T>& plan;
  const PlaneColumns<T>& columns;
  T* rows[2];  // [C][pitch] source rows r and r+1 at the target's columns
  T* plane;    // [C][source_pitch] a source row
  T* label;    // [pitch]
  int64_t held[2];

  static size_t bytes(const PlaneColumns<T>& p) { return size_t(p.C * (2 * p.pitch + p.source_pitch) + p.pitch) * sizeof(T); }
  PlanesArgmaxUnit(const UpsampleArgmax& args, const PlaneColumns<T>& shape, void* memory)
      : a(args), plan(shape.plan), columns(shape) {
    T* next = static_cast<T*>(memory);
    for (T*& row : rows) row = next, next += plan.C * columns.pitch;
    label = next, next += columns.pitch;
    plane = next;
  }

  void run(int64_t b, int64_t r0, int64_t r1) {
    held[0] = held[1] = -1;
    int64_t i = plan.rows.first(r0, 0, plan.H);
    for (int64_t r = r0; r < r1; r++)
      for (const int64_t stop = plan.rows.first(r + 1, i, plan.H); i < stop; i++) target_row(b, r, i);
  }

 private:
  const T* source(int64_t b, int64_t r) {
    T* const row = rows[r & 1];
    if (held[r & 1] == r) return row;
    held[r & 1] = r;
    const int64_t size = columns.source_pitch;
    load_planes(a.scores, b, r, size, plane);
    for (int64_t c = 0; c < plan.C; c++)
      for (int64_t x = plan.w; x < size; x++) plane[c * size + x] = 0;
    columns.stretch(plane, row);
    return row;
  }

  void target_row(int64_t b, int64_t r, int64_t i) {
    const int64_t C = plan.C, pitch = columns.pitch;
    const T down = T(plan.rows.share(i));
    const T* low = source(b, r);
    const T* high = down == 0 ? low : source(b, r + 1);
    const V s = V::splat(down), zero = V::splat(0), one = V::splat(1);
    int64_t* const out = a.label.as<int64_t>() + (b * plan.H + i) * plan.W;
    for (int64_t j = 0; j < plan.W; j += L) {
      V best = V::splat(-INFINITY), index = zero, poison = zero, id = zero;
      for (int64_t c = 0; c < C; c++, id = id + one) {
        const V from = V::load(low + c * pitch + j), u = fma(s, V::load(high + c * pitch + j) - from, from);
        poison = fma(u, zero, poison);
        index = V::select(gt(u, best), id, index), best = max(u, best);
      }
      index.store(label + j);
      const unsigned finite = V::bits(eq(poison, zero));
      if (__builtin_expect(finite == (1u << L) - 1, true)) continue;
      for (int k = 0; k < L && j + k < plan.W; k++)
        if (!(finite >> k & 1)) label[j + k] = T(exact(b, r, down, j + k));
    }
    const T* const from = label;
    for (int64_t j = 0; j < plan.W; j++) out[j] = int64_t(from[j]);
  }

  // Any scores. The first NaN wins; a row or column of share 0 is not read.
  int64_t exact(int64_t b, int64_t r, T down, int64_t j) const {
    const auto mix = [](T share, T low, T high) { return (1 - share) * low + share * high; };
    const auto blended = [&](int64_t c, int64_t x) {
      const T low = score_at<T>(a.scores, b, c, r, x);
      return down == 0 ? low : mix(down, low, score_at<T>(a.scores, b, c, r + 1, x));
    };
    const int64_t x = columns.lower[j];
    const T share = columns.share[j];
    int64_t found = 0;
    T best = -INFINITY;
    for (int64_t c = 0; c < plan.C; c++) {
      T u = blended(c, x);
      if (share != 0) u = mix(share, u, blended(c, x + 1));
      if (u != u) return c;
      if (u > best) best = u, found = c;
    }
    return found;
  }
};

template <class Unit, class T>
Status run(const UpsampleArgmax& a, const PlaneColumns<T>& shape) {
  const UpsamplePlan<T>& plan = shape.plan;
  const int threads = plan.threads(a.threads);
  const int64_t units = plan.units();
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Scratch memory(Unit::bytes(shape));
    failed = !memory.data;
    Unit unit(a, shape, memory.data);
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < units; u++) {
      if (failed) continue;
      const int64_t r0 = u % plan.blocks * plan.block, r1 = r0 + plan.block < plan.h ? r0 + plan.block : plan.h;
      unit.run(u / plan.blocks, r0, r1);
    }
  }
  return failed ? Status{Code::out_of_memory, 0, 0, "not enough memory"} : Status{};
}

template <class T>
Status argmax(const UpsampleArgmax& a) {
  const UpsamplePlan<T> plan(a.scores, a.label.size[1], a.label.size[2], a.align_corners, 0, 0, 0, 0);
  Scratch grid(PlaneColumns<T>::bytes(plan));
  if (!grid.data) return {Code::out_of_memory, 0, 0, "not enough memory"};
  const PlaneColumns<T> shape(plan, grid.data);
  return few_classes(plan, FewClasses<T>::argmax) ? run<PlanesArgmaxUnit<T>>(a, shape) : run<ArgmaxUnit<T>>(a, shape);
}

}  // namespace

Status upsample_argmax(const UpsampleArgmax& a) {
  switch (a.scores.dtype) {
    case DType::float64: return argmax<double>(a);
    case DType::float32:
    case DType::float16:
    case DType::bfloat16: return argmax<float>(a);
    default: return bad_argument("scores must be float32, float64, float16 or bfloat16");
  }
}

}  // namespace dnc::cpu::DNC_ISA
