// A tile's class maxima, winners and own-class similarities, from the registers of the sweep to the caller's tensors.
#pragma once
#include "dnc/similarity.h"
#include "similarity_panels.h"

namespace dnc::cpu::DNC_ISA {
namespace {

DNC_INLINE Status out_of_memory() { return {Code::out_of_memory, 0, 0, "not enough memory"}; }

template <class T>
struct ScoreTile {
  const ClassScores& a;
  const PanelLayout<T>& lay;
  const Pixels scores, winners;
  const bool own, indexed;
  const int rows;
  T* best;          // [rows][width]
  T* terms;         // [rows]
  T* own_tile;      // [rows][K]
  int64_t* label;   // [rows], -1 for none
  uint8_t* winner;  // [rows][width]

  static size_t bytes(const PanelLayout<T>& lay, int rows) {
    return size_t(rows) * ((lay.width + 1 + lay.K) * sizeof(T) + sizeof(int64_t) + lay.width);
  }
  ScoreTile(const ClassScores& args, const PanelLayout<T>& layout, int most, void* memory)
      : a(args),
        lay(layout),
        scores(a.scores),
        winners(a.winner ? a.winner : a.scores),
        own(a.own_similarity),
        indexed(lay.K > 1),
        rows(most),
        best(static_cast<T*>(memory)),
        terms(best + rows * lay.width),
        own_tile(terms + rows),
        label(reinterpret_cast<int64_t*>(own_tile + rows * lay.K)),
        winner(reinterpret_cast<uint8_t*>(label + rows)) {}

  // Labels of pixels n0 .. n0+n; rows beyond them have none.
  void begin(int64_t n0, int n) {
    if (!own) return;
    for (int r = 0; r < rows; r++) {
      const int64_t y = r < n ? a.labels.as<int64_t>()[n0 + r] : -1;
      label[r] = y >= 0 && y < lay.C ? y : -1;
      if (label[r] < 0) std::memset(own_tile + r * lay.K, 0, lay.K * sizeof(T));
    }
  }
  ClassMax<T> take() const { return {lay, best, indexed ? winner : nullptr, own ? label : nullptr, own_tile}; }

  DNC_INLINE bool all_finite(const T* s) const {
    using V = Vec<T>;
    V poison = V::splat(0);  // 0 * NaN and 0 * Inf are NaN
    int64_t c = 0;
    for (; c + V::lanes <= lay.C; c += V::lanes) poison = fma(V::load(s + c), V::splat(0), poison);
    if (c < lay.C) poison = fma(V::load_n(s + c, int(lay.C - c)), V::splat(0), poison);
    return poison.sum() == 0;
  }

  // From maxima to scores, NaN for a pixel with a non-finite feature, and out.
  void finish(int64_t n0, int n, const Operand<T>* tile) {
    take().finish(n);
    if (a.metric != Metric::dot) row_terms(tile, lay.D, n, a.metric, terms);
    for (int r = 0; r < n; r++) {
      T* s = best + r * lay.width;
      if (a.metric != Metric::dot)
        for (int64_t c = 0; c < lay.C; c++) s[c] = finish_similarity(s[c], terms[r], a.metric);
      const bool finite = all_finite(s);
      if (a.distance)
        for (int64_t c = 0; c < lay.C; c++) s[c] = a.metric == Metric::cosine ? 1 - s[c] : -s[c];
      if (!finite) {
        for (int64_t c = 0; c < lay.C; c++) s[c] = NAN;
        if (indexed) std::memset(winner + r * lay.width, 0, lay.width);
      }
      if (own && label[r] >= 0 && a.metric != Metric::dot)
        for (int64_t k = 0; k < lay.K; k++)
          own_tile[r * lay.K + k] = finish_similarity(own_tile[r * lay.K + k], terms[r], a.metric);
    }
    store_tile(scores, n0, n, best, lay.width);
    if (own) std::memcpy(a.own_similarity.as<T>() + n0 * lay.K, own_tile, size_t(n) * lay.K * sizeof(T));
    if (!a.winner) return;
    if (!indexed) std::memset(winner, 0, size_t(rows) * lay.width);
    for (int r = 0; r < n; r++) {
      uint8_t* w = reinterpret_cast<uint8_t*>(winners.data) + winners.offset(n0 + r);
      if (winners.sd == 1)
        std::memcpy(w, winner + r * lay.width, size_t(lay.C));
      else
        for (int64_t c = 0; c < lay.C; c++) w[c * winners.sd] = winner[r * lay.width + c];
    }
  }
};

}  // namespace
}  // namespace dnc::cpu::DNC_ISA
