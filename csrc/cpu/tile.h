// Vectors from and to elements of another type, and transposes of square tiles, for kernel files compiled once per instruction
// set.
#pragma once
#include "simd.h"

namespace dnc::cpu::DNC_ISA {

// A vector of T from `lanes` adjacent elements of type S.
template <class T, class S>
struct Load {
  static DNC_INLINE Vec<T> at(const S* p) {
    T t[Vec<T>::lanes];
    read_n(t, p, Vec<T>::lanes);
    return Vec<T>::load(t);
  }
};
template <class T>
struct Load<T, T> {
  static DNC_INLINE Vec<T> at(const T* p) { return Vec<T>::load(p); }
};
#if defined(DNC_ISA_AVX512)
template <>
struct Load<float, BFloat16> {
  static DNC_INLINE Vec<float> at(const BFloat16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
  }
};
template <>
struct Load<float, Float16> {
  static DNC_INLINE Vec<float> at(const Float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
};
template <>
struct Load<double, float> {
  static DNC_INLINE Vec<double> at(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
};
#elif defined(DNC_ISA_AVX2)
template <>
struct Load<float, BFloat16> {
  static DNC_INLINE Vec<float> at(const BFloat16* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
  }
};
template <>
struct Load<float, Float16> {
  static DNC_INLINE Vec<float> at(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
};
template <>
struct Load<double, float> {
  static DNC_INLINE Vec<double> at(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
};
#endif

// `lanes` adjacent elements of type S from a vector of T.
template <class T, class S>
struct Store {
  static DNC_INLINE void at(Vec<T> v, S* p) {
    T t[Vec<T>::lanes];
    v.store(t);
    write_n(p, t, Vec<T>::lanes);
  }
};
template <class T>
struct Store<T, T> {
  static DNC_INLINE void at(Vec<T> v, T* p) { v.store(p); }
};
#if defined(DNC_ISA_AMX)
template <>
struct Store<float, BFloat16> {
  static DNC_INLINE void at(Vec<float> v, BFloat16* p) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v.v)); }
};
#elif defined(DNC_ISA_AVX512)
template <>
struct Store<float, BFloat16> {
  static DNC_INLINE void at(Vec<float> v, BFloat16* p) { _mm256_storeu_si256((__m256i*)p, to_bfloat16(v.v)); }
};
#endif

// r[channel] holds pixels -> r[pixel] holds channels.
template <class T>
DNC_INLINE void transpose(Vec<T>* r) {
  constexpr int L = Vec<T>::lanes;
  T t[L][L];
  for (int i = 0; i < L; i++) r[i].store(t[i]);
  for (int i = 0; i < L; i++) {
    T column[L];
    for (int j = 0; j < L; j++) column[j] = t[j][i];
    r[i] = Vec<T>::load(column);
  }
}
#if defined(DNC_ISA_AVX512)
template <>
DNC_INLINE void transpose<float>(Vec<float>* r) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // r[4a + b], 128-bit lane c: channels 4a.. of pixel 4c + b
    for (int h = 0; h < 2; h++) {
      const __m512d lo = _mm512_castps_pd(t[i + h]), hi = _mm512_castps_pd(t[i + 2 + h]);
      r[i + 2 * h].v = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      r[i + 2 * h + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
  }
  for (int b = 0; b < 4; b++) {  // a 4 x 4 transpose of 128-bit lanes
    const __m512 p = _mm512_shuffle_f32x4(r[b].v, r[4 + b].v, 0x44), q = _mm512_shuffle_f32x4(r[b].v, r[4 + b].v, 0xee);
    const __m512 s = _mm512_shuffle_f32x4(r[8 + b].v, r[12 + b].v, 0x44),
                 u = _mm512_shuffle_f32x4(r[8 + b].v, r[12 + b].v, 0xee);
    t[b] = _mm512_shuffle_f32x4(p, s, 0x88), t[4 + b] = _mm512_shuffle_f32x4(p, s, 0xdd);
    t[8 + b] = _mm512_shuffle_f32x4(q, u, 0x88), t[12 + b] = _mm512_shuffle_f32x4(q, u, 0xdd);
  }
  for (int i = 0; i < 16; i++) r[i].v = t[i];
}
#elif defined(DNC_ISA_AVX2)
template <>
DNC_INLINE void transpose<float>(Vec<float>* r) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {  // r[4a + b], 128-bit lane c: channels 4a.. of pixel 4c + b
    for (int h = 0; h < 2; h++) {
      r[i + 2 * h].v = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
      r[i + 2 * h + 1].v = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0xee);
    }
  }
  for (int b = 0; b < 4; b++) {
    t[b] = _mm256_permute2f128_ps(r[b].v, r[4 + b].v, 0x20);
    t[4 + b] = _mm256_permute2f128_ps(r[b].v, r[4 + b].v, 0x31);
  }
  for (int i = 0; i < 8; i++) r[i].v = t[i];
}
#endif

}  // namespace dnc::cpu::DNC_ISA
