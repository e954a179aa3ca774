// Exponentials, logarithms and sums of small batches for upsample_loss.cpp, for kernel files compiled once per instruction set.
#pragma once
#include "simd.h"

namespace dnc::cpu::DNC_ISA {

// 2^a: |relative error| < 0.7 ulp (Cephes exp2f: 2^n times a degree-6 polynomial on [-1/2, 1/2]). Below -126 a normal result
// ends: AVX-512 gives subnormals, the others 0. NaN stays NaN; -inf gives NaN or 0.
DNC_INLINE Vec<float> exp2(Vec<float> a) {
  using V = Vec<float>;
#if defined(DNC_ISA_AVX512)
  const V x = a;  // scalef takes any exponent
#else
  const V low = V::splat(-126.f), x = max(low, a);  // this operand order lets a NaN through on x86
#endif
  const V n = V::round(x), r = x - n;
  V p = fma(V::splat(1.535336188319500e-4f), r, V::splat(1.339887440266574e-3f));
  p = fma(p, r, V::splat(9.618437357674640e-3f));
  p = fma(p, r, V::splat(5.550332471162809e-2f));
  p = fma(p, r, V::splat(2.402264791363012e-1f));
  p = fma(p, r, V::splat(6.931472028550421e-1f));
  p = V::scale2(fma(p, r, V::splat(1.f)), n);
#if defined(DNC_ISA_AVX512)
  return p;
#else
  return V::select(gt(low, a), V::splat(0.f), p);
#endif
}
DNC_INLINE Vec<double> exp2(Vec<double> a) {
  double t[Vec<double>::lanes];
  a.store(t);
  for (double& e : t) e = std::exp2(e);
  return Vec<double>::load(t);
}

// x = m * 2^e with m in [1,2), for positive normal x; NaN stays NaN in m.
DNC_INLINE void split(Vec<float> x, Vec<float>* m, Vec<float>* e) {
#if defined(DNC_ISA_AVX512)
  m->v = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  e->v = _mm512_getexp_ps(x.v);
#elif defined(DNC_ISA_AVX2)
  const __m256i bits = _mm256_castps_si256(x.v);
  e->v = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127)));
  const __m256i one = _mm256_set1_epi32(0x3f800000), mantissa = _mm256_set1_epi32(0x007fffff);
  m->v = _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(bits, mantissa), one));
  *m = *m + (x - x);
#else
  for (int i = 0; i < Vec<float>::lanes; i++) {
    uint32_t bits;
    std::memcpy(&bits, &x.v[i], 4);
    e->v[i] = float(int(bits >> 23) - 127);
    bits = (bits & 0x007fffff) | 0x3f800000;
    std::memcpy(&m->v[i], &bits, 4);
    m->v[i] += x.v[i] - x.v[i];
  }
#endif
}

// Natural logarithm of positive normal numbers, |error| < 1.3 * 2^-24 of the result or of 1 (Cephes logf); NaN stays NaN.
DNC_INLINE Vec<float> log(Vec<float> x) {
  using V = Vec<float>;
  const V half = V::splat(0.5f), one = V::splat(1.f);
  V m, e;
  split(x, &m, &e);
  const auto big = gt(m, V::splat(1.41421356f));
  m = V::select(big, m * half, m), e = V::select(big, e + one, e);
  const V f = m - one, z = f * f;
  V p = fma(V::splat(7.0376836292e-2f), f, V::splat(-1.1514610310e-1f));
  p = fma(p, f, V::splat(1.1676998740e-1f));
  p = fma(p, f, V::splat(-1.2420140846e-1f));
  p = fma(p, f, V::splat(1.4249322787e-1f));
  p = fma(p, f, V::splat(-1.6668057665e-1f));
  p = fma(p, f, V::splat(2.0000714765e-1f));
  p = fma(p, f, V::splat(-2.4999993993e-1f));
  p = fma(p, f, V::splat(3.3333331174e-1f));
  // ln 2 in two parts, of which the first has zeros enough to be multiplied exactly
  p = fma(e, V::splat(-2.12194440e-4f), p * f * z) - half * z;
  return fma(e, V::splat(0.693359375f), f + p);
}
DNC_INLINE Vec<double> log(Vec<double> a) {
  double t[Vec<double>::lanes];
  a.store(t);
  for (double& x : t) x = std::log(x);
  return Vec<double>::load(t);
}
// In place; reads and writes whole vectors.
template <class T>
DNC_INLINE void log_n(T* x, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec<T>::lanes) log(Vec<T>::load(x + i)).store(x + i);
}

// out[k] = sum of the lanes of v[k].
template <class T, int G>
DNC_INLINE void lane_sums(const Vec<T> (&v)[G], T* out) {
  for (int k = 0; k < G; k++) out[k] = v[k].sum();
}
#if defined(DNC_ISA_AVX512)
DNC_INLINE void lane_sums(const Vec<float> (&v)[4], float* out) {
  const auto fold = [](__m512 a, __m512 b) {  // 128-bit lanes: a0+a1, a2+a3, b0+b1, b2+b3
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  __m512 s = fold(fold(v[0].v, v[1].v), fold(v[2].v, v[3].v));  // one lane for each
  s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
  s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, s)));
}
#elif defined(DNC_ISA_AVX2)
DNC_INLINE void lane_sums(const Vec<float> (&v)[4], float* out) {
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(v[0].v, v[1].v), _mm256_hadd_ps(v[2].v, v[3].v));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
#endif

}  // namespace dnc::cpu::DNC_ISA
