// From class scores to logits and back, a pixel at a time: rows [width] of classes side by side; scores are zero beyond C.
//
//   logit = s * scale * length / temperature, or gain * (s - mean) * rstd + shift over the C scores of the pixel
// Reference: Logits in dnc_kernels/ops/head/bands.py.
#pragma once
#include "simd.h"

namespace dnc::cpu::DNC_ISA {
namespace {

// What the gradients of a run of pixels add up to, in their order.
template <class T>
struct LogitSums {
  double scale = 0;
  T *gain = nullptr, *shift = nullptr;  // [width] each, with a norm
};

template <class T>
struct LogitRows {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  const int64_t C, width;
  const double temperature;
  const T factor;         // scale / temperature
  const T pull;           // what gradients of the logits are multiplied by first
  const T *gain, *shift;  // [width], zero beyond C; nullptr: no norm
  const T eps;

  // The lanes of a vector at c that are classes: what lies beyond them may be anything after a pixel with a NaN.
  DNC_INLINE V classes(V v, int64_t c) const { return c + L <= C ? v : V::select(V::first(int(C - c)), v, V::splat(0)); }

  DNC_INLINE void moments(const T* s, T* mean, T* rstd) const {
    V sum = V::splat(0), squares = sum;
    for (int64_t c = 0; c < width; c += L) sum = sum + V::load(s + c);
    *mean = sum.sum() / T(C);
    for (int64_t c = 0; c < width; c += L) {
      const V d = classes(V::load(s + c) - V::splat(*mean), c);
      squares = fma(d, d, squares);
    }
    *rstd = T(1) / std::sqrt(squares.sum() / T(C) + eps);
  }

  DNC_INLINE void forward(const T* s, T length, T* out) const {
    if (gain == nullptr) {
      const V f = V::splat(factor * length);
      for (int64_t c = 0; c < width; c += L) (V::load(s + c) * f).store(out + c);
      return;
    }
    T mean, rstd;
    moments(s, &mean, &rstd);
    for (int64_t c = 0; c < width; c += L) {
      const V xhat = (V::load(s + c) - V::splat(mean)) * V::splat(rstd);
      classes(fma(xhat, V::load(gain + c), V::load(shift + c)), c).store(out + c);
    }
  }

  // The class of the largest logit, the lowest on ties; the first NaN, if there is one.
  DNC_INLINE int64_t largest(const T* logits) const {
    V most = V::splat(-INFINITY), poison = V::splat(0);
    for (int64_t c = 0; c < width; c += L) {
      const V v = c + L <= C ? V::load(logits + c) : V::select(V::first(int(C - c)), V::load(logits + c), most);
      most = max(v, most), poison = fma(classes(v, c), V::splat(0), poison);
    }
    if (poison.sum() != 0) {  // a NaN or an Inf
      int64_t at = 0;
      for (int64_t c = 0; c < C; c++) {
        if (logits[c] != logits[c]) return c;
        if (logits[c] > logits[at]) at = c;
      }
      return at;
    }
    const V top = V::splat(most.max());
    for (int64_t c = 0;; c += L)
      if (const unsigned hits = V::bits(eq(V::load(logits + c), top)); hits) return c + __builtin_ctz(hits);
  }

  // g: gradient of the logits before `pull`, becomes that of the scores. Returns that of the length.
  DNC_INLINE T backward(const T* s, T length, T* g, LogitSums<T>& sums) const {
    if (gain == nullptr) {
      V along = V::splat(0);
      const V f = V::splat(factor * length);
      for (int64_t c = 0; c < width; c += L) {
        const V v = classes(V::load(g + c) * V::splat(pull), c);
        along = fma(v, V::load(s + c), along);
        (v * f).store(g + c);
      }
      const T a = along.sum();
      sums.scale += double(a) * double(length) / temperature;
      return a * factor;
    }
    T mean, rstd;
    moments(s, &mean, &rstd);
    V level = V::splat(0), slope = level;
    const V m = V::splat(mean), r = V::splat(rstd);
    for (int64_t c = 0; c < width; c += L) {
      const V v = classes(V::load(g + c) * V::splat(pull), c), xhat = (V::load(s + c) - m) * r, d = v * V::load(gain + c);
      v.store(g + c);
      level = level + d, slope = fma(d, xhat, slope);
      fma(v, xhat, V::load(sums.gain + c)).store(sums.gain + c);
      (V::load(sums.shift + c) + v).store(sums.shift + c);
    }
    const V mean_level = V::splat(level.sum() / T(C)), mean_slope = V::splat(slope.sum() / T(C));
    for (int64_t c = 0; c < width; c += L) {
      const V xhat = (V::load(s + c) - m) * r, d = V::load(g + c) * V::load(gain + c);
      classes(r * (d - mean_level - xhat * mean_slope), c).store(g + c);
    }
    return 0;
  }
};

}  // namespace
}  // namespace dnc::cpu::DNC_ISA
