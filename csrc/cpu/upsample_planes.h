// Rows of a score map as planes, stretched to the columns of the target: what both upsample kernels are built on where classes
// are few, so that vector lanes are pixels.
//
// A source row is turned into [C][w] and interpolated along its columns once, [C][pitch], and serves all target rows of its
// cell. Gradients are collected at the target's columns and go back to the source's when a row is complete.
#pragma once
#include "upsample_rows.h"

namespace dnc::cpu::DNC_ISA {

// Up to so many classes planes are faster, by measurement on one thread: of the loss, of the argmax, and of either where a row
// is read for few target pixels, because the map shrinks or grows by less than 2 and unevenly.
template <class T>
struct FewClasses {
#if defined(DNC_ISA_AVX512)
  static constexpr int64_t loss = 40, argmax = 40, shrinking = 10;
#elif defined(DNC_ISA_AVX2)
  static constexpr int64_t loss = 12, argmax = 16, shrinking = 4;
#else
  static constexpr int64_t loss = 3, argmax = 12, shrinking = 2;
#endif
};
template <>
struct FewClasses<double> {
  static constexpr int64_t loss = Vec<double>::lanes / 2, argmax = 8, shrinking = 2;
};

// Whether a call has at most so many.
template <class T>
bool few_classes(const UpsamplePlan<T>& p, int64_t most) {
  const bool grows = p.rows.target >= p.rows.source && (p.W >= 2 * p.w || p.W % p.w == 0);
  return p.C <= (grows ? most : FewClasses<T>::shrinking) && p.w < INT32_MAX;
}

// out[i] = p[index[i]] for a vector of positions; the first is the lowest and the others are less than `lanes` behind it.
template <class T>
DNC_INLINE Vec<T> pick_near(const T* p, const int32_t* index) {
  T t[Vec<T>::lanes];
  for (int i = 0; i < Vec<T>::lanes; i++) t[i] = p[index[i]];
  return Vec<T>::load(t);
}
#if defined(DNC_ISA_AVX512)
template <>
DNC_INLINE Vec<float> pick_near<float>(const float* p, const int32_t* index) {
  const __m512i at = _mm512_sub_epi32(_mm512_loadu_si512(index), _mm512_set1_epi32(index[0]));
  return {_mm512_permutexvar_ps(at, _mm512_loadu_ps(p + index[0]))};
}
template <>
DNC_INLINE Vec<double> pick_near<double>(const double* p, const int32_t* index) {
  const __m256i at = _mm256_sub_epi32(_mm256_loadu_si256((const __m256i*)index), _mm256_set1_epi32(index[0]));
  return {_mm512_permutexvar_pd(_mm512_cvtepi32_epi64(at), _mm512_loadu_pd(p + index[0]))};
}
#elif defined(DNC_ISA_AVX2)
template <>
DNC_INLINE Vec<float> pick_near<float>(const float* p, const int32_t* index) {
  const __m256i at = _mm256_sub_epi32(_mm256_loadu_si256((const __m256i*)index), _mm256_set1_epi32(index[0]));
  return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(p + index[0]), at)};
}
#endif

// The columns of a plan as vectors see them. Padding lies between no two columns.
template <class T>
struct PlaneColumns {
  static constexpr int L = Vec<T>::lanes;
  static constexpr int kTogether = 4;  // rows that `gather` works on at a time
  const UpsamplePlan<T>& plan;
  int64_t C, w, W;
  int64_t pitch;         // of planes of target columns: W in whole vectors
  int64_t source_pitch;  // of planes of source columns: whole vectors may be read from any of them and the next
  T* share;              // [pitch] share of the source column after the lower one
  int64_t* first;        // [w+1] first target column of a cell column
  int32_t* lower;        // [pitch] source column at or before the target column
  int64_t step = 0;      // target columns of every cell column but the first and the last, where all have as many

  static int64_t padded(int64_t n) { return (n + L - 1) / L * L; }
  // An odd number of vectors: planes that lie a power of two apart would share a few sets of L1.
  static int64_t apart(int64_t n) { return padded(n) + (padded(n) / L % 2 ? 0 : L); }
  static size_t bytes(const UpsamplePlan<T>& p) {
    return size_t(p.w + 1) * sizeof(int64_t) + size_t(apart(p.W)) * (sizeof(T) + sizeof(int32_t));
  }
  PlaneColumns(const UpsamplePlan<T>& p, void* memory)
      : plan(p), C(p.C), w(p.w), W(p.W), pitch(apart(p.W)), source_pitch(apart(p.w + L)) {
    first = static_cast<int64_t*>(memory);
    if (first == nullptr) return;  // the caller has not got it, and sees that
    share = reinterpret_cast<T*>(first + w + 1);
    lower = reinterpret_cast<int32_t*>(share + pitch);
    p.fill_columns(share, first);
    for (int64_t x = 0; x < w; x++)
      for (int64_t j = first[x]; j < first[x + 1]; j++) lower[j] = int32_t(x);
    for (int64_t j = W; j < pitch; j++) share[j] = 0, lower[j] = W > 0 ? lower[W - 1] : 0;
    if (w > 2) step = first[2] - first[1];
    for (int64_t x = 1; x + 1 < w; x++)
      if (first[x + 1] - first[x] != step) step = 0;
  }

  // out [C][pitch] = the row `in` [C][source_pitch] at the target's columns. A column of share 0 is not read: its NaN or Inf
  // does not spread.
  void stretch(const T* in, T* out) const { w <= W ? stretch<true>(in, out) : stretch<false>(in, out); }

  // out [C][source_pitch] = the gradient of the source columns, from that of the target's, [C][pitch].
  // `scratch`: [kTogether][2][pitch].
  void gather(const T* in, T* out, T* scratch) const {
    for (int64_t c = 0; c < C; c += kTogether, in += kTogether * pitch, out += kTogether * source_pitch) {
      const int together = C - c < kTogether ? int(C - c) : kTogether;
      split(in, together, scratch);
      for (int k = 0; k < together; k++) {
        const T *to_lower = scratch + 2 * k * pitch, *to_next = to_lower + pitch;
        T* const row = out + k * source_pitch;
        switch (step) {
          case 1: gather_even<1>(to_lower, to_next, row); break;
          case 2: gather_even<2>(to_lower, to_next, row); break;
          case 4: gather_even<4>(to_lower, to_next, row); break;
          case 8: gather_even<8>(to_lower, to_next, row); break;
          default:
            if (w > W) {  // most source columns get nothing
              std::memset(row, 0, size_t(source_pitch) * sizeof(T));
              for (int64_t j = 0; j < W; j++) row[lower[j]] += to_lower[j], row[lower[j] + 1] += to_next[j];
            } else {
              switch (together) {
                case 1: gather_cells<1>(scratch, out); break;
                case 2: gather_cells<2>(scratch, out); break;
                case 3: gather_cells<3>(scratch, out); break;
                default: gather_cells<kTogether>(scratch, out);
              }
              k = together;
            }
        }
      }
    }
  }

 private:
  template <bool near>
  void stretch(const T* in, T* out) const {
    using V = Vec<T>;
    const V zero = V::splat(0);
    for (int64_t j = 0; j < W; j += L) {
      const V s = V::load(share + j);
      const auto between = gt(s, zero);
      const int32_t* const at = lower + j;
      for (int64_t c = 0; c < C; c++) {
        const T* const row = in + c * source_pitch;
        V left, right;
        if constexpr (near) {
          left = pick_near(row, at), right = pick_near(row + 1, at);
        } else {
          T l[L], r[L];
          for (int i = 0; i < L; i++) l[i] = row[at[i]], r[i] = row[at[i] + 1];
          left = V::load(l), right = V::load(r);
        }
        V::select(between, fma(s, right - left, left), left).store(out + c * pitch + j);
      }
    }
  }

  // The gradients that the target's columns have for their lower source column and for the one after it.
  void split(const T* in, int together, T* out) const {
    using V = Vec<T>;
    const V zero = V::splat(0), one = V::splat(1);
    for (int64_t j = 0; j < W; j += L) {
      const V s = V::load(share + j);
      const auto between = gt(s, zero);
      for (int k = 0; k < together; k++) {
        const V g = V::load(in + k * pitch + j);
        ((one - s) * g).store(out + 2 * k * pitch + j);
        V::select(between, s * g, zero).store(out + (2 * k + 1) * pitch + j);
      }
    }
  }
  // Rows of several classes: cells of uneven length are guessed wrong once for all.
  template <int together>
  void gather_cells(const T* in, T* out) const {
    for (int64_t x = 0, j = first[0]; x < w; x++) {
      T sum[together];
      for (T& s : sum) s = 0;
      for (int64_t i = x > 0 ? first[x - 1] : j; i < j; i++)
        for (int k = 0; k < together; k++) sum[k] += in[(2 * k + 1) * pitch + i];
      for (; j < first[x + 1]; j++)
        for (int k = 0; k < together; k++) sum[k] += in[2 * k * pitch + j];
      for (int k = 0; k < together; k++) out[k * source_pitch + x] = sum[k];
    }
  }
  DNC_INLINE T cell(const T* to_lower, const T* to_next, int64_t x) const {
    T sum = 0;
    for (int64_t j = x > 0 ? first[x - 1] : first[x]; j < first[x]; j++) sum += to_next[j];
    for (int64_t j = first[x]; j < first[x + 1]; j++) sum += to_lower[j];
    return sum;
  }
  template <int step>
  void gather_even(const T* to_lower, const T* to_next, T* out) const {
    out[0] = cell(to_lower, to_next, 0), out[1] = cell(to_lower, to_next, 1), out[w - 1] = cell(to_lower, to_next, w - 1);
    const T *a = to_lower + first[1], *b = to_next + first[1];
    for (int64_t x = 0; x < w - 3; x++) {
      T sum = 0;
      for (int k = 0; k < step; k++) sum += b[x * step + k];
      for (int k = 0; k < step; k++) sum += a[(x + 1) * step + k];
      out[x + 2] = sum;
    }
  }
};

// out[c*pitch + x] = scores[b,c,r,x].
template <class T, class S>
void load_planes(const View& v, int64_t b, int64_t r, int64_t pitch, T* out) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const int64_t C = v.size[1], w = v.size[3], sc = v.stride[1], sw = v.stride[3];
  const S* in = static_cast<const S*>(v.data) + b * v.stride[0] + r * v.stride[2];
  if (sw == 1 || sc != 1) {
    for (int64_t c = 0; c < C; c++, in += sc, out += pitch) {
      if (sw == 1)
        read_n(out, in, w);
      else
        for (int64_t x = 0; x < w; x++) out[x] = read<T>(in + x * sw);
    }
    return;
  }
  for (int64_t x = 0; x < w; x += L) {
    const int64_t n = w - x < L ? w - x : L;
    for (int64_t c = 0; c < C; c += L) {
      const int64_t some = C - c < L ? C - c : L;
      V tile[L];
      for (int i = 0; i < L; i++) {
        const S* const pixel = in + (x + (i < n ? i : 0)) * sw + c;
        if constexpr (sizeof(S) == sizeof(T)) {
          tile[i] = V::load_n(pixel, int(some));
        } else {
          T t[L] = {};
          read_n(t, pixel, some);
          tile[i] = V::load(t);
        }
      }
      transpose<T>(tile);
      for (int k = 0; k < some; k++) tile[k].store_n(out + (c + k) * pitch + x, int(n));
    }
  }
}
template <class T>
void load_planes(const View& v, int64_t b, int64_t r, int64_t pitch, T* out) {
  switch (v.dtype) {
    case DType::float64: return load_planes<T, double>(v, b, r, pitch, out);
    case DType::float16: return load_planes<T, Float16>(v, b, r, pitch, out);
    case DType::bfloat16: return load_planes<T, BFloat16>(v, b, r, pitch, out);
    default: return load_planes<T, float>(v, b, r, pitch, out);
  }
}

// grad[b,c,r,x] = in[c*pitch + x], or that much more.
template <class T>
void store_planes(const View& v, int64_t b, int64_t r, int64_t pitch, const T* in, bool add) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const int64_t C = v.size[1], w = v.size[3], sc = v.stride[1], sw = v.stride[3];
  T* out = static_cast<T*>(v.data) + b * v.stride[0] + r * v.stride[2];
  if (sw == 1 || sc != 1) {
    for (int64_t c = 0; c < C; c++, in += pitch, out += sc)
      for (int64_t x = 0; x < w; x++) out[x * sw] = add ? out[x * sw] + in[x] : in[x];
    return;
  }
  for (int64_t x = 0; x < w; x += L) {
    const int64_t n = w - x < L ? w - x : L;
    for (int64_t c = 0; c < C; c += L) {
      const int some = int(C - c < L ? C - c : L);
      V tile[L];
      for (int k = 0; k < L; k++) tile[k] = k < some ? V::load(in + (c + k) * pitch + x) : V::splat(0);
      transpose<T>(tile);
      for (int i = 0; i < n; i++) {
        T* p = out + (x + i) * sw + c;
        (add ? tile[i] + V::load_n(p, some) : tile[i]).store_n(p, some);
      }
    }
  }
}

}  // namespace dnc::cpu::DNC_ISA
