// The product that every similarity kernel shares: a tile of pixels against all sub-centroids, with a functor taking each
// result while it is in registers.
//
// Lanes of a vector are classes: centroids are packed once into panels [D][lanes] of 16 classes (AVX-512) for one k, so the max
// over K is an element-wise max of accumulators. The last group of classes, when at most half full, is folded: a panel holds
// several k of its few classes (C = 19, K = 10: 12 panels and not 20). Large D is cut into blocks whose panels fit in L1; the
// partial sums of a run of panels then wait in L2. The product itself has two forms: similarity_fma.h and similarity_amx.h.
#pragma once
#if defined(DNC_ISA_AMX)
#include "similarity_amx.h"
#else
#include "similarity_fma.h"
#endif

namespace dnc::cpu::DNC_ISA {
namespace {

constexpr int64_t kDeep = 1024;       // more channels than this are cut into blocks of
constexpr int64_t kDepth = 256;       // these: 2 panels x 256 x 64 B = 32 KB, the L1 of a small core
constexpr int64_t kPanelsInRun = 16;  // panels whose partial sums wait together

// Channels [d0, d0+depth) of panels j0 .. j1 against every block of a packed tile.
template <class T, class Take>
void sweep_depth(const PanelLayout<T>& lay, const Operand<T>* panels, const Operand<T>* tile, int blocks, int64_t j0,
                 int64_t j1, int64_t d0, int64_t depth, T* partial, Take& take) {
  int64_t j = j0;
  auto waiting = [&] { return partial + (j - j0) * blocks * kRows * Vec<T>::lanes; };
  for (; j + kPanels <= j1; j += kPanels) columns<kPanels>(lay, panels, tile, blocks, j, d0, depth, waiting(), take);
  for (; j < j1; j++) columns<1>(lay, panels, tile, blocks, j, d0, depth, waiting(), take);
}

// Every panel against every block of a packed tile. partial: partial_size(blocks) elements, unused for D <= kDeep.
template <class T, class Take>
void sweep(const PanelLayout<T>& lay, const Operand<T>* panels, const Operand<T>* tile, int blocks, T* partial, Take& take) {
  const bool deep = lay.depth > kDeep;
  const int64_t depth = deep ? kDepth : lay.depth, run = deep ? kPanelsInRun : lay.panels;
  for (int64_t j0 = 0; j0 < lay.panels; j0 += run)
    for (int64_t d0 = 0; d0 < lay.depth; d0 += depth)
      sweep_depth(lay, panels, tile, blocks, j0, min64(j0 + run, lay.panels), d0, min64(depth, lay.depth - d0), partial, take);
}
template <class T>
size_t partial_size(const PanelLayout<T>& lay, int blocks) {
  return lay.depth > kDeep ? size_t(kPanelsInRun) * blocks * kRows * Vec<T>::lanes : 0;
}

// Takes rows [row][ld], `width` elements of each.
template <class T>
struct Rows {
  static constexpr int L = Vec<T>::lanes;
  int64_t width, ld;
  T* out;
  DNC_INLINE T* direct(int b, int64_t j) const { return width % L == 0 ? out + int64_t(b) * kRows * ld + j * L : nullptr; }
  DNC_INLINE void operator()(int b, int64_t j, const Vec<T> (&acc)[kRows]) {
    const int64_t left = width - j * L, step = ld;
    T* const o = out + b * kRows * step + j * L;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      if (left >= L)
        acc[r].store(o + r * step);
      else
        acc[r].store_n(o + r * step, int(left));
    }
  }
};

// Which of kRows labels are among `classes` from `first` on.
DNC_INLINE unsigned labelled(const int64_t* label, int64_t first, int classes) {
  unsigned rows = 0;
#if defined(DNC_ISA_AVX512)
  const __m512i from = _mm512_set1_epi64(first), count = _mm512_set1_epi64(classes);
  for (int r = 0; r < kRows; r += 8) {
    const __mmask8 there = kRows - r >= 8 ? 0xff : (1 << (kRows - r)) - 1;
    const __m512i c = _mm512_sub_epi64(_mm512_maskz_loadu_epi64(there, label + r), from);
    rows |= unsigned(_mm512_mask_cmplt_epu64_mask(there, c, count)) << r;
  }
#else
  for (int r = 0; r < kRows; r++) rows |= unsigned(label[r] >= first && label[r] < first + classes) << r;
#endif
  return rows;
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
    const int64_t at = p.group * L, ld = lay.width;
    // names of their own: for all the compiler knows, a stored vector overwrites the members
    T* const most = best + b * kRows * ld + at;
    uint8_t* const which = winner ? winner + b * kRows * ld + at : nullptr;
    if (p.k == 0) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) acc[r].store(most + r * ld);
      for (int r = 0; which && r < kRows; r++) std::memset(which + r * ld, 0, L);
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) {
        const V old = V::load(most + r * ld);
        const auto better = gt(acc[r], old);
        V::select(better, acc[r], old).store(most + r * ld);
        V::store_index(which + r * ld, better, uint8_t(p.k));
      }
    }
    if (label) {
      const int classes = p.group == lay.groups - 1 ? lay.tail : L;
      for (unsigned rows = labelled(label + b * kRows, at, classes); rows; rows &= rows - 1) {
        const int r = __builtin_ctz(rows);
        const int64_t row = b * kRows + r, c = label[row] - at;
        T lanes[L];
        acc[r].store(lanes);
        for (int s = 0; s < p.fold && p.k + s < lay.K; s++) own[row * lay.K + p.k + s] = lanes[s * classes + c];
      }
    }
  }
  // Folds the last group's lanes together: lane s*tail + c holds the best of k = s, s + fold, ... of class c.
  void finish(int rows) const {
    if (lay.fold == 1) return;
#if defined(DNC_ISA_AVX512)
    if constexpr (L == 16) return fold_lanes(rows);
#endif
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
#if defined(DNC_ISA_AVX512)
  // The same with all classes of the group at once: each s brings its lanes to the front.
  void fold_lanes(int rows) const {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int r = 0; r < rows; r++) {
      T* m = best + r * lay.width + (lay.groups - 1) * L;
      uint8_t* w = winner + r * lay.width + (lay.groups - 1) * L;
      const __m512 all = _mm512_loadu_ps(m);
      const __m512i which = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)w));
      __m512 top = all;
      __m512i first = which;
      for (int s = 1; s < lay.fold; s++) {
        const __m512i from = _mm512_add_epi32(lane, _mm512_set1_epi32(s * lay.tail));
        const __m512 v = _mm512_permutexvar_ps(from, all);
        const __m512i k = _mm512_add_epi32(_mm512_permutexvar_epi32(from, which), _mm512_set1_epi32(s));
        const __mmask16 better = _mm512_cmp_ps_mask(v, top, _CMP_GT_OQ) |
                                 _mm512_mask_cmplt_epi32_mask(_mm512_cmp_ps_mask(v, top, _CMP_EQ_OQ), k, first);
        top = _mm512_mask_mov_ps(top, better, v), first = _mm512_mask_mov_epi32(first, better, k);
      }
      _mm512_mask_storeu_ps(m, V::first(lay.tail), top);
      _mm512_mask_cvtepi32_storeu_epi8(w, V::first(lay.tail), first);
    }
  }
#endif
};

template <class T>
DNC_INLINE T finish_similarity(T v, T term, Metric metric) {
  return metric == Metric::cosine ? v * term : metric == Metric::sqeuclidean ? v - term : v;
}

// What a thread touches again and again stays in this much of L2. Processors with AMX have 2 MB of it a core, and multiply so
// fast that panels, which come from L3 once a tile, want large tiles.
#if defined(DNC_ISA_AMX)
constexpr int64_t kTileBytes = 1280 << 10;
#else
constexpr int64_t kTileBytes = 640 << 10;
#endif

// Pixels a tile holds.
DNC_INLINE int tile_rows(int64_t D, int64_t bytes_per_row, int64_t N, size_t element) {
  const int64_t channels = D > kDeep ? kDepth + kPanelsInRun * (64 / int64_t(element)) : D;
  int64_t rows = kTileBytes / (channels * int64_t(element) + bytes_per_row) / kRows * kRows;
  rows = max64(2 * kRows, min64(rows, 384 / kRows * kRows));
  return int(min64(rows, (N + kRows - 1) / kRows * kRows));
}

}  // namespace
}  // namespace dnc::cpu::DNC_ISA
