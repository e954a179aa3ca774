// Rows of a score map with the classes of a pixel side by side, and where target pixels lie between them: what both upsample
// kernels are built on.
//
// A source row is turned into [w][width] once (width: classes rounded up to whole vectors) and serves all target rows of its
// cell. A cell is the square between source pixels r and r+1: the target rows of cell row r are those whose lower source row
// is r. Positions are ratios of integers, so every caller that cuts a map into windows finds the same cells.
#pragma once
#include "dnc/upsample.h"
#include "tile.h"

namespace dnc::cpu::DNC_ISA {

// One dimension of the grid: `target` positions over `source` pixels.
struct Axis {
  int64_t source, target;
  bool corners;
  DNC_INLINE int64_t numerator(int64_t i) const {
    if (corners) return target > 1 ? i * (source - 1) : 0;
    const int64_t n = (2 * i + 1) * source - target;
    return n > 0 ? n : 0;
  }
  DNC_INLINE int64_t denominator() const { return corners ? (target > 1 ? target - 1 : 1) : 2 * target; }
  // The source pixel at or before position i.
  DNC_INLINE int64_t lower(int64_t i) const { return numerator(i) / denominator(); }
  // Share of the pixel after it; 0 behind the last one.
  DNC_INLINE double share(int64_t i) const {
    if (lower(i) == source - 1) return 0;
    return double(numerator(i) % denominator()) / double(denominator());
  }
  // The first position in [begin,end) whose lower source pixel is `row` or later.
  DNC_INLINE int64_t first(int64_t row, int64_t begin, int64_t end) const {
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (lower(middle) < row)
        begin = middle + 1;
      else
        end = middle;
    }
    return begin;
  }
};

template <class T>
constexpr T kLowest = T(-__FLT_MAX__);
template <>
constexpr double kLowest<double> = -__DBL_MAX__;

// How a call is cut up. Depends on sizes only, never on the number of threads.
template <class T>
struct UpsamplePlan {
  static constexpr int L = Vec<T>::lanes;
  int64_t B, C, h, w, H, W;
  int64_t width;                     // C in whole vectors
  int64_t block, blocks;             // cell rows of a unit of work, units of a sample
  int64_t strip;                     // cell columns that are worked on while they are in L1
  int64_t source_row0, target_row0;  // of the window
  Axis rows, columns;
  UpsamplePlan(const View& scores, int64_t target_h, int64_t target_w, bool corners, int64_t all_source, int64_t source0,
               int64_t all_target, int64_t target0)
      : B(scores.size[0]),
        C(scores.size[1]),
        h(scores.size[2]),
        w(scores.size[3]),
        H(target_h),
        W(target_w),
        width((C + L - 1) / L * L),
        source_row0(source0),
        target_row0(target0),
        rows{all_source ? all_source : h, all_target ? all_target : H, corners},
        columns{w, W, corners} {
    block = (B * h + 127) / 128;  // 128 units, of at least 4 rows: a block reads one row more and hands one on
    block = block < 4 ? 4 : block > 16 ? 16 : block;
    blocks = (h + block - 1) / block;
    // six tiles of a strip share L1: two source rows, their gradients, the blended row and its gradient
    strip = 32768 / int64_t(6 * width * sizeof(T));
    strip = strip < 4 ? 4 : strip;
  }
  int64_t units() const { return B * blocks; }
  int threads(int wanted) const {
    const int64_t work = B * H * W * C, most = units() > 1 ? units() : 1;
    return work < 16384 ? 1 : int(wanted < most ? wanted : most);  // below: less work than waking a thread
  }
  // Columns: share[W], and the first target column of every cell column, first[w+1].
  void fill_columns(T* share, int64_t* first) const {
    int64_t next = 0;
    const int64_t whole = columns.denominator();
    for (int64_t j = 0; j < W; j++) {  // Axis::lower and Axis::share with one division
      const int64_t n = columns.numerator(j), l = n / whole;
      share[j] = T(l == w - 1 ? 0 : double(n - l * whole) / double(whole));
      for (; next <= l; next++) first[next] = j;
    }
    for (; next <= w; next++) first[next] = W;
  }
};

// out[x*width + c] = scores[b,c,r,x]; classes beyond C are lower than any.
template <class T, class S>
void load_classes(const View& v, int64_t b, int64_t r, int64_t width, T* out) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const int64_t C = v.size[1], w = v.size[3], sc = v.stride[1], sw = v.stride[3];
  const S* in = static_cast<const S*>(v.data) + b * v.stride[0] + r * v.stride[2];
  if (sw == 1 && C > 1) {
    for (int64_t c = 0; c < width; c += L) {  // along a few channels: their planes may lie a power of two apart
      for (int64_t x = 0; x < w; x += L) {
        const int64_t n = w - x < L ? w - x : L;
        V tile[L];
        for (int k = 0; k < L; k++) {
          if (c + k >= C) {
            tile[k] = V::splat(kLowest<T>);
          } else if (n == L) {
            tile[k] = Load<T, S>::at(in + (c + k) * sc + x);
          } else {
            T t[L] = {};
            read_n(t, in + (c + k) * sc + x, n);
            tile[k] = V::load(t);
          }
        }
        transpose<T>(tile);
        for (int i = 0; i < n; i++) tile[i].store(out + (x + i) * width + c);
      }
    }
    return;
  }
  for (int64_t x = 0; x < w; x++) {
    T* pixel = out + x * width;
    if (sc == 1)
      read_n(pixel, in + x * sw, C);
    else
      for (int64_t c = 0; c < C; c++) pixel[c] = read<T>(in + x * sw + c * sc);
    for (int64_t c = C; c < width; c++) pixel[c] = kLowest<T>;
  }
}
template <class T>
void load_classes(const View& v, int64_t b, int64_t r, int64_t width, T* out) {
  switch (v.dtype) {
    case DType::float64: return load_classes<T, double>(v, b, r, width, out);
    case DType::float16: return load_classes<T, Float16>(v, b, r, width, out);
    case DType::bfloat16: return load_classes<T, BFloat16>(v, b, r, width, out);
    default: return load_classes<T, float>(v, b, r, width, out);
  }
}

// scores[b,c,r,x].
template <class T>
T score_at(const View& v, int64_t b, int64_t c, int64_t r, int64_t x) {
  const int64_t at = b * v.stride[0] + c * v.stride[1] + r * v.stride[2] + x * v.stride[3];
  switch (v.dtype) {
    case DType::float64: return read<T>(v.as<double>() + at);
    case DType::float16: return read<T>(v.as<Float16>() + at);
    case DType::bfloat16: return read<T>(v.as<BFloat16>() + at);
    default: return read<T>(v.as<float>() + at);
  }
}

// grad[b,c,r,x] = in[x*width + c], or that much more.
template <class T>
void store_classes(const View& v, int64_t b, int64_t r, int64_t width, const T* in, bool add) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const int64_t C = v.size[1], w = v.size[3], sc = v.stride[1], sw = v.stride[3];
  T* out = static_cast<T*>(v.data) + b * v.stride[0] + r * v.stride[2];
  if (sw == 1 && C > 1) {
    for (int64_t c = 0; c < C; c += L) {
      for (int64_t x = 0; x < w; x += L) {
        const int n = int(w - x < L ? w - x : L);
        V tile[L];
        for (int i = 0; i < L; i++) tile[i] = i < n ? V::load(in + (x + i) * width + c) : V::splat(0);
        transpose<T>(tile);
        for (int k = 0; k < L && c + k < C; k++) {
          T* p = out + (c + k) * sc + x;
          const V value = add ? tile[k] + V::load_n(p, n) : tile[k];
          value.store_n(p, n);
        }
      }
    }
    return;
  }
  if (sc == 1 && !add) {
    for (int64_t x = 0; x < w; x++) write_n(out + x * sw, in + x * width, C);
    return;
  }
  for (int64_t x = 0; x < w; x++)
    for (int64_t c = 0; c < C; c++) {
      T* p = out + x * sw + c * sc;
      *p = add ? *p + in[x * width + c] : in[x * width + c];
    }
}

// The row at `share` of the way from `low` to `high`: n numbers, in `out` or, where nothing is to blend, where they are. A
// row of share 0 is not read: its NaN or Inf does not spread.
template <class T>
DNC_INLINE const T* blend(const T* low, const T* high, T share, int64_t n, T* out) {
  using V = Vec<T>;
  if (share == 0) return low;
  const V to_low = V::splat(1 - share), to_high = V::splat(share);
  for (int64_t i = 0; i < n; i += V::lanes) fma(V::load(high + i), to_high, V::load(low + i) * to_low).store(out + i);
  return out;
}

// Source rows r and r+1 as [w][width], each loaded once while a unit moves down.
template <class T>
struct RowPair {
  T* data[2];
  int64_t held[2] = {-1, -1};
  // Returns the row; *fresh: it was loaded now.
  const T* get(const View& scores, int64_t b, int64_t r, int64_t width, bool* fresh) {
    const int slot = int(r & 1);
    *fresh = held[slot] != r;
    if (*fresh) load_classes(scores, b, r, width, data[slot]);
    held[slot] = r;
    return data[slot];
  }
};

}  // namespace dnc::cpu::DNC_ISA
