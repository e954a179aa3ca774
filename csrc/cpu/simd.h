// Vectors of one instruction set, for kernel files that are compiled once per instruction set.
//
// CMake compiles every kernel file three times with DNC_ISA = avx512, avx2 or portable, and some once more with amx; all code
// here sits in dnc::cpu::DNC_ISA, so the copies never share a symbol. A kernel file must not use templates or inline functions
// of the standard library that the linker could merge across copies (an AVX-512 std::vector<float> picked for everyone would
// crash an older CPU): plain pointers, <cmath> scalar calls, and dnc::Scratch for memory.
//
// Vec<T>: `lanes` values of T (float or double). Comparisons give a Mask. Lane-wise unless named otherwise.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "dnc/common.h"

#if defined(DNC_ISA_AMX)  // AVX-512 and the tile registers, for the kernels that gain by them
#include <immintrin.h>
#define DNC_ISA amx
#define DNC_ISA_AVX512
#elif defined(DNC_ISA_AVX512)
#include <immintrin.h>
#define DNC_ISA avx512
#elif defined(DNC_ISA_AVX2)
#include <immintrin.h>
#define DNC_ISA avx2
#elif defined(DNC_ISA_PORTABLE)
#define DNC_ISA portable
#else
#error "define one of DNC_ISA_AMX, DNC_ISA_AVX512, DNC_ISA_AVX2, DNC_ISA_PORTABLE"
#endif

#define DNC_INLINE inline __attribute__((always_inline))

namespace dnc::cpu::DNC_ISA {

template <class T>
struct Vec;

#if defined(DNC_ISA_AVX512)

template <>
struct Vec<float> {
  static constexpr int lanes = 16;
  using Mask = __mmask16;
  __m512 v;
  static DNC_INLINE Vec splat(float a) { return {_mm512_set1_ps(a)}; }
  static DNC_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static DNC_INLINE Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  DNC_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  DNC_INLINE void store_n(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  static DNC_INLINE Mask first(int n) { return n >= 16 ? Mask(0xffff) : Mask((1u << n) - 1); }
  friend DNC_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend DNC_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend DNC_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend DNC_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend DNC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  friend DNC_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend DNC_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend DNC_INLINE Mask gt(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  friend DNC_INLINE Mask eq(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
  static DNC_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_mov_ps(no.v, m, yes.v)}; }
  DNC_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
  DNC_INLINE float max() const { return _mm512_reduce_max_ps(v); }
  static DNC_INLINE unsigned bits(Mask m) { return m; }
  // p[lane] = k where m
  static DNC_INLINE void store_index(uint8_t* p, Mask m, uint8_t k) { _mm_mask_storeu_epi8(p, m, _mm_set1_epi8((char)k)); }
  static DNC_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static DNC_INLINE Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n
};

template <>
struct Vec<double> {
  static constexpr int lanes = 8;
  using Mask = __mmask8;
  __m512d v;
  static DNC_INLINE Vec splat(double a) { return {_mm512_set1_pd(a)}; }
  static DNC_INLINE Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static DNC_INLINE Vec load_n(const double* p, int n) { return {_mm512_maskz_loadu_pd(first(n), p)}; }
  DNC_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  DNC_INLINE void store_n(double* p, int n) const { _mm512_mask_storeu_pd(p, first(n), v); }
  static DNC_INLINE Mask first(int n) { return n >= 8 ? Mask(0xff) : Mask((1u << n) - 1); }
  friend DNC_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend DNC_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend DNC_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend DNC_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_pd(a.v, b.v)}; }
  friend DNC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  friend DNC_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_pd(a.v, b.v)}; }
  friend DNC_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_pd(a.v, b.v)}; }
  friend DNC_INLINE Mask gt(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ); }
  friend DNC_INLINE Mask eq(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ); }
  static DNC_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_mov_pd(no.v, m, yes.v)}; }
  DNC_INLINE double sum() const { return _mm512_reduce_add_pd(v); }
  DNC_INLINE double max() const { return _mm512_reduce_max_pd(v); }
  static DNC_INLINE unsigned bits(Mask m) { return m; }
  static DNC_INLINE void store_index(uint8_t* p, Mask m, uint8_t k) { _mm_mask_storeu_epi8(p, m, _mm_set1_epi8((char)k)); }
};

#elif defined(DNC_ISA_AVX2)

template <>
struct Vec<float> {
  static constexpr int lanes = 8;
  using Mask = __m256;  // all bits of a lane set, or none
  __m256 v;
  static DNC_INLINE __m256i lane_ids() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static DNC_INLINE __m256i first_i(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane_ids()); }
  static DNC_INLINE Vec splat(float a) { return {_mm256_set1_ps(a)}; }
  static DNC_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static DNC_INLINE Vec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first_i(n))}; }
  DNC_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  DNC_INLINE void store_n(float* p, int n) const { _mm256_maskstore_ps(p, first_i(n), v); }
  static DNC_INLINE Mask first(int n) { return _mm256_castsi256_ps(first_i(n)); }
  friend DNC_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend DNC_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend DNC_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend DNC_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend DNC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend DNC_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend DNC_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend DNC_INLINE Mask gt(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
  friend DNC_INLINE Mask eq(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
  static DNC_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m)}; }
  DNC_INLINE float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  DNC_INLINE float max() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  static DNC_INLINE unsigned bits(Mask m) { return (unsigned)_mm256_movemask_ps(m); }
  static DNC_INLINE void store_index(uint8_t* p, Mask m, uint8_t k) {
    const __m128i w =
        _mm_packs_epi32(_mm256_castsi256_si128(_mm256_castps_si256(m)), _mm256_extracti128_si256(_mm256_castps_si256(m), 1));
    const __m128i byte = _mm_packs_epi16(w, w), old = _mm_loadl_epi64((const __m128i*)p);
    _mm_storel_epi64((__m128i*)p, _mm_blendv_epi8(old, _mm_set1_epi8((char)k), byte));
  }
  static DNC_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // a * 2^n in two steps, so that n = 128 (a just below 1) and n = -126 stay exact
  static DNC_INLINE Vec scale2(Vec a, Vec n) {
    __m256i i = _mm256_cvtps_epi32(n.v), h = _mm256_srai_epi32(i, 1), r = _mm256_sub_epi32(i, h), bias = _mm256_set1_epi32(127);
    __m256 p = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(h, bias), 23));
    __m256 q = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(r, bias), 23));
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, p), q)};
  }
};

template <>
struct Vec<double> {
  static constexpr int lanes = 4;
  using Mask = __m256d;
  __m256d v;
  static DNC_INLINE __m256i first_i(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
  static DNC_INLINE Vec splat(double a) { return {_mm256_set1_pd(a)}; }
  static DNC_INLINE Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static DNC_INLINE Vec load_n(const double* p, int n) { return {_mm256_maskload_pd(p, first_i(n))}; }
  DNC_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  DNC_INLINE void store_n(double* p, int n) const { _mm256_maskstore_pd(p, first_i(n), v); }
  static DNC_INLINE Mask first(int n) { return _mm256_castsi256_pd(first_i(n)); }
  friend DNC_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend DNC_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend DNC_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend DNC_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_pd(a.v, b.v)}; }
  friend DNC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  friend DNC_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_pd(a.v, b.v)}; }
  friend DNC_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_pd(a.v, b.v)}; }
  friend DNC_INLINE Mask gt(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ); }
  friend DNC_INLINE Mask eq(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ); }
  static DNC_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_pd(no.v, yes.v, m)}; }
  DNC_INLINE double sum() const {
    __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
  DNC_INLINE double max() const {
    __m128d s = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
  }
  static DNC_INLINE unsigned bits(Mask m) { return (unsigned)_mm256_movemask_pd(m); }
  static DNC_INLINE void store_index(uint8_t* p, Mask m, uint8_t k) {
    const unsigned b = bits(m);
    for (int i = 0; i < lanes; i++)
      if (b >> i & 1) p[i] = k;
  }
};

#else  // portable: plain loops over a small array, vectorised by the compiler where it can

template <class T>
struct PortableVec {
  static constexpr int lanes = 32 / sizeof(T);
  struct Mask {
    bool b[lanes];
  };
  using V = Vec<T>;
  T v[lanes];
  template <class F>
  static DNC_INLINE V make(F f) {
    V r;
    for (int i = 0; i < lanes; i++) r.v[i] = f(i);
    return r;
  }
  template <class F>
  static DNC_INLINE Mask mask(F f) {
    Mask r;
    for (int i = 0; i < lanes; i++) r.b[i] = f(i);
    return r;
  }
  static DNC_INLINE V splat(T a) {
    return make([&](int) { return a; });
  }
  static DNC_INLINE V load(const T* p) {
    return make([&](int i) { return p[i]; });
  }
  static DNC_INLINE V load_n(const T* p, int n) {
    return make([&](int i) { return i < n ? p[i] : T(0); });
  }
  DNC_INLINE void store(T* p) const {
    for (int i = 0; i < lanes; i++) p[i] = v[i];
  }
  DNC_INLINE void store_n(T* p, int n) const {
    for (int i = 0; i < lanes && i < n; i++) p[i] = v[i];
  }
  static DNC_INLINE Mask first(int n) {
    return mask([&](int i) { return i < n; });
  }
  friend DNC_INLINE V operator+(V a, V b) {
    return make([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend DNC_INLINE V operator-(V a, V b) {
    return make([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend DNC_INLINE V operator*(V a, V b) {
    return make([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend DNC_INLINE V operator/(V a, V b) {
    return make([&](int i) { return a.v[i] / b.v[i]; });
  }
  friend DNC_INLINE V fma(V a, V b, V c) {
    return make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  friend DNC_INLINE V max(V a, V b) {
    return make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  friend DNC_INLINE V min(V a, V b) {
    return make([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  friend DNC_INLINE Mask gt(V a, V b) {
    return mask([&](int i) { return a.v[i] > b.v[i]; });
  }
  friend DNC_INLINE Mask eq(V a, V b) {
    return mask([&](int i) { return a.v[i] == b.v[i]; });
  }
  static DNC_INLINE V select(Mask m, V yes, V no) {
    return make([&](int i) { return m.b[i] ? yes.v[i] : no.v[i]; });
  }
  DNC_INLINE T sum() const {
    T s = 0;
    for (int i = 0; i < lanes; i++) s += v[i];
    return s;
  }
  DNC_INLINE T max() const {
    T s = v[0];
    for (int i = 1; i < lanes; i++) s = v[i] > s ? v[i] : s;
    return s;
  }
  static DNC_INLINE unsigned bits(Mask m) {
    unsigned r = 0;
    for (int i = 0; i < lanes; i++) r |= unsigned(m.b[i]) << i;
    return r;
  }
  static DNC_INLINE void store_index(uint8_t* p, Mask m, uint8_t k) {
    for (int i = 0; i < lanes; i++) p[i] = m.b[i] ? k : p[i];
  }
  static DNC_INLINE V round(V a) {
    return make([&](int i) { return std::nearbyint(a.v[i]); });
  }
  // a * 2^n in two steps, so that n = 128 (a just below 1) and n = -126 stay exact; a NaN in n means a NaN in a
  static DNC_INLINE V scale2(V a, V n) {
    return make([&](int i) {
      const int e = n.v[i] == n.v[i] ? int(n.v[i]) : 0, h = e / 2;
      const uint32_t p = uint32_t(h + 127) << 23, q = uint32_t(e - h + 127) << 23;
      float fp, fq;
      std::memcpy(&fp, &p, 4);
      std::memcpy(&fq, &q, 4);
      return T(a.v[i] * fp * fq);
    });
  }
};
template <>
struct Vec<float> : PortableVec<float> {};
template <>
struct Vec<double> : PortableVec<double> {};

#endif

// exp(a) for a <= 88: |relative error| < 2 ulp (Cephes expf: 2^n times a degree-6 polynomial on [-ln2/2, ln2/2]);
// below -87.3, -inf included, exactly 0; NaN stays NaN.
DNC_INLINE Vec<float> exp(Vec<float> a) {
  using V = Vec<float>;
  const V low = V::splat(-87.33654f);
  V x = max(low, a);  // this operand order lets a NaN through on x86
  V n = V::round(x * V::splat(1.44269504f));
  V r = fma(n, V::splat(-0.693359375f), x);
  r = fma(n, V::splat(2.12194440e-4f), r);
  V p = V::splat(1.9875691500e-4f);
  p = fma(p, r, V::splat(1.3981999507e-3f));
  p = fma(p, r, V::splat(8.3334519073e-3f));
  p = fma(p, r, V::splat(4.1665795894e-2f));
  p = fma(p, r, V::splat(1.6666665459e-1f));
  p = fma(p, r, V::splat(5.0000001201e-1f));
  p = fma(p, r * r, r + V::splat(1.f));
  return V::select(gt(low, a), V::splat(0.f), V::scale2(p, n));
}
DNC_INLINE Vec<double> exp(Vec<double> a) {
  double t[Vec<double>::lanes];
  a.store(t);
  for (double& e : t) e = std::exp(e);
  return Vec<double>::load(t);
}

// 16-bit floats. Stores round to nearest even.
DNC_INLINE float to_float(BFloat16 h) {
  uint32_t u = uint32_t(h.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
DNC_INLINE BFloat16 to_bfloat16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t(u >> 16 | 0x40)};  // NaN stays NaN
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
#if defined(DNC_ISA_PORTABLE)
DNC_INLINE float to_float(Float16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, e = h.bits >> 10 & 31, m = h.bits & 1023;
  if (e == 0) {  // zero and subnormals: m * 2^-24
    const float f = float(m) * 5.9604644775390625e-08f;
    return sign ? -f : f;
  }
  const uint32_t u = sign | (e == 31 ? 0x7f800000u | m << 13 : (e + 112) << 23 | m << 13);
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
DNC_INLINE Float16 to_float16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint16_t sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (u >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (u < 0x38800000) {                                   // subnormal: adding 0.5 aligns the mantissa so that hardware rounds
    float a;
    std::memcpy(&a, &u, 4);
    a += 0.5f;
    std::memcpy(&u, &a, 4);
    return {uint16_t(sign | (u - 0x3f000000))};
  }
  return {uint16_t(sign | (u + 0xc8000fffu + (u >> 13 & 1)) >> 13)};
}
#else
DNC_INLINE float to_float(Float16 h) { return _cvtsh_ss(h.bits); }
DNC_INLINE Float16 to_float16(float f) { return {uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT))}; }
#endif

// Reads one element as T, writes one element from T.
DNC_INLINE float to_float(float f) { return f; }
template <class T, class S>
DNC_INLINE T read(const S* p) {
  return T(to_float(*p));
}
template <>
DNC_INLINE double read<double, double>(const double* p) {
  return *p;
}
template <>
DNC_INLINE float read<float, double>(const double* p) {
  return float(*p);
}
DNC_INLINE void write(float* p, double a) { *p = float(a); }
DNC_INLINE void write(double* p, double a) { *p = a; }
DNC_INLINE void write(BFloat16* p, double a) { *p = to_bfloat16(float(a)); }
DNC_INLINE void write(Float16* p, double a) { *p = to_float16(float(a)); }

// Converts n contiguous elements to T / from T; the compiler vectorises these loops (F16C, shifts).
template <class T, class S>
DNC_INLINE void read_n(T* out, const S* in, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = read<T>(in + i);
}
template <class T, class S>
DNC_INLINE void write_n(S* out, const T* in, int64_t n) {
  for (int64_t i = 0; i < n; i++) write(out + i, in[i]);
}

#if defined(DNC_ISA_AMX)  // AVX512-BF16 comes with it; what is subnormal becomes zero
template <>
DNC_INLINE void write_n<float, BFloat16>(BFloat16* out, const float* in, int64_t n) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(in + i + 16), _mm512_loadu_ps(in + i)));
  for (; i < n; i++) out[i] = to_bfloat16(in[i]);
}
#elif defined(DNC_ISA_AVX512)  // compilers do not vectorise what `to_bfloat16` does with a NaN
DNC_INLINE __m256i to_bfloat16(__m512 v) {
  const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i bits = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}
template <>
DNC_INLINE void write_n<float, BFloat16>(BFloat16* out, const float* in, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i*)(out + i), to_bfloat16(_mm512_loadu_ps(in + i)));
  for (; i < n; i++) out[i] = to_bfloat16(in[i]);
}
#endif
#if !defined(DNC_ISA_PORTABLE)  // compilers do not vectorise the scalar F16C intrinsics
template <>
DNC_INLINE void read_n<float, Float16>(float* out, const Float16* in, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
  for (; i < n; i++) out[i] = to_float(in[i]);
}
template <>
DNC_INLINE void write_n<float, Float16>(Float16* out, const float* in, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; i++) out[i] = to_float16(in[i]);
}
#endif

}  // namespace dnc::cpu::DNC_ISA
