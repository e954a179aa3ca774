// How sub-centroids lie in panels, and pixels in tiles of rows: what the two forms of the product share.
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

// A step of the product: kBlocks blocks of kRows pixels against kPanels panels, over a multiple of kStep channels.
#if defined(DNC_ISA_AMX)
constexpr int kRows = 16;  // 4 accumulators + 2 operands of either side: all 8 tile registers
constexpr int kPanels = 2, kBlocks = 2, kStep = 32;
#elif defined(DNC_ISA_AVX512)
constexpr int kRows = 12;  // 24 accumulators + 2 panels + 1 broadcast of 32 registers
constexpr int kPanels = 2, kBlocks = 1, kStep = 1;
#elif defined(DNC_ISA_AVX2)
constexpr int kRows = 6;  // 12 + 2 + 1 of 16
constexpr int kPanels = 2, kBlocks = 1, kStep = 1;
#else
constexpr int kRows = 4;
constexpr int kPanels = 1, kBlocks = 1, kStep = 1;
#endif

// What panels and packed tiles hold.
#if defined(DNC_ISA_AMX)
template <class T>
using Operand = BFloat16;
#else
template <class T>
using Operand = T;
#endif

// Calls f with a value of the compute type. The copy for AMX is never called for float64.
template <class F>
Status with_compute_type([[maybe_unused]] bool wide, F f) {
#if !defined(DNC_ISA_AMX)
  if (wide) return f(double{});
#endif
  return f(float{});
}

// How C classes of K sub-centroids lie in panels.
template <class T>
struct PanelLayout {
  static constexpr int L = Vec<T>::lanes;
  int64_t C, K, D, groups, width;  // width = groups * L: a row of class maxima
  int64_t depth;                   // D rounded up to whole steps of the product
  int64_t ld;                      // elements from a pixel of a packed tile to the next, where a tile holds rows
  int parts;                       // operands whose sum is a sub-centroid
  int tail;                        // classes in the last group
  int fold;                        // sub-centroids a panel of the last group holds (1: not folded)
  int64_t panels;
  PanelLayout(int64_t C_, int64_t K_, int64_t D_, int parts_ = 1) : C(C_), K(K_), D(D_), parts(parts_) {
    depth = ld = (D + kStep - 1) / kStep * kStep;
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
  size_t bytes() const { return size_t(panels) * L * (depth * parts * sizeof(Operand<T>) + sizeof(T)); }
  // The biases [panels][L] behind packed panels.
  template <class O>
  auto* bias(O* packed) const {
    using Bias = std::conditional_t<std::is_const_v<O>, const T, T>;
    return reinterpret_cast<Bias*>(packed + panels * depth * parts * L);
  }
};

// Similarity up to what depends on the pixel alone is <x,q> + bias, with q = scale * p.
//   dot: q = p; cosine: q = p/|p|; sqeuclidean: q = 2p, bias = -|p|^2.
template <class T>
struct Factor {
  T scale, bias;
};
template <class T, class S>
Factor<T> factor(const S* p, int64_t D, Metric metric) {
  double square = 0;
  if (metric != Metric::dot)
    for (int64_t d = 0; d < D; d++) {
      const double v = read<T>(p + d);
      square += v * v;
    }
  const double length = std::sqrt(square);
  return {T(metric == Metric::cosine        ? 1 / (length > 1e-12 ? length : 1e-12)
            : metric == Metric::sqeuclidean ? 2
                                            : 1),
          metric == Metric::sqeuclidean ? T(-square) : T(0)};
}

template <class T>
DNC_INLINE T row_term(T square, Metric metric) {
  const T length = std::sqrt(square);
  return metric == Metric::cosine ? 1 / (length > T(1e-12) || length != length ? length : T(1e-12)) : square;
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
      for (int j = 0; j < L; j++) Store<T, S>::at(v[j], base + (d + j) * x.sd + i);
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

}  // namespace
}  // namespace dnc::cpu::DNC_ISA
