// What the forward and backward Sinkhorn kernels share: rows of any dtype and strides, fixed chunks of pixels, sums per group.
#pragma once
#include <omp.h>

#include "simd.h"

namespace dnc::cpu::DNC_ISA {

// Limits that keep every exponent finite whatever epsilon is: a difference of similarities over epsilon is cut at -far, and the
// sum of a few such numbers stays far from overflow. exp has been exactly 0 long before.
template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float far = 1e30f, largest = 3.40282347e38f;
};
template <>
struct Limits<double> {
  static constexpr double far = 1e300, largest = 1.7976931348623157e308;
};
template <class T>
inline T inverse_epsilon(double epsilon) {
  return T(1 / epsilon > Limits<T>::far ? Limits<T>::far : 1 / epsilon);
}
// (x - shift)/epsilon, never below -far and never NaN
template <class T>
DNC_INLINE Vec<T> scaled(Vec<T> x, Vec<T> shift, Vec<T> inverse) {
  using V = Vec<T>;
  return max(max(x - shift, V::splat(-Limits<T>::largest)) * inverse, V::splat(-Limits<T>::far));
}

template <class T, class S>
struct Same {
  static constexpr bool value = false;
};
template <class T>
struct Same<T, T> {
  static constexpr bool value = true;
};

// A matrix [N,K] of any dtype and strides whose rows are read as T.
template <class T>
struct Rows {
  const char* data;
  DType dtype;
  int64_t N, K, sn, sk;
  explicit Rows(const View& v)
      : data(static_cast<const char*>(v.data)), dtype(v.dtype), N(v.size[0]), K(v.size[1]), sn(v.stride[0]), sk(v.stride[1]) {}

  // Row n: in place where it lies as K contiguous values of T, else a copy in buffer [K].
  DNC_INLINE const T* row(int64_t n, T* buffer) const {
    switch (dtype) {
      case DType::float32: return read_row<float>(n, buffer);
      case DType::float64: return read_row<double>(n, buffer);
      case DType::float16: return read_row<Float16>(n, buffer);
      default: return read_row<BFloat16>(n, buffer);
    }
  }

 private:
  template <class S>
  DNC_INLINE const T* read_row(int64_t n, T* buffer) const {
    const S* p = reinterpret_cast<const S*>(data) + n * sn;
    if constexpr (Same<S, T>::value) {
      if (sk == 1) return p;
    }
    if (sk == 1) {
      read_n(buffer, p, K);
    } else {
      for (int64_t k = 0; k < K; k++) buffer[k] = read<T>(p + k * sk);
    }
    return buffer;
  }
};

// Pixels in at most 16 chunks that depend on N and the number of groups alone: partial sums [chunk,group,K] added in chunk
// order are the same for every number of threads, and take at most a quarter of [N,K] (or one [G,K]).
struct Chunks {
  int64_t N, count, size;
  Chunks(int64_t N, int64_t groups) : N(N) {
    const int64_t least = groups > 256 ? 4 * groups : 1024;  // pixels a chunk
    count = N / least < 1 ? 1 : N / least > 16 ? 16 : N / least;
    size = (N + count - 1) / count;
  }
  // Calls body(chunk, first pixel, last pixel + 1).
  template <class F>
  void each(int threads, F body) const {
#pragma omp parallel for num_threads(threads < count ? threads : int(count)) schedule(static)
    for (int64_t c = 0; c < count; c++) {
      const int64_t begin = c * size < N ? c * size : N;
      body(c, begin, begin + size < N ? begin + size : N);
    }
  }
};

// K values as vectors: NV of them, known at compile time, or any number (NV = 0). Rows of the tables [group,width] are padded.
template <class T, int NV>
struct Lanes {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  static constexpr unsigned all = (1u << L) - 1;
  int64_t K, width;
  explicit Lanes(int64_t K) : K(K), width((K + L - 1) / L * L) {}
  DNC_INLINE int64_t count() const { return NV ? NV : width / L; }
  DNC_INLINE int used(int64_t j) const { return int(K - j * L < L ? K - j * L : L); }
  DNC_INLINE V load(const T* row, int64_t j) const { return V::load_n(row + j * L, used(j)); }
  DNC_INLINE V load_or(const T* row, int64_t j, V other) const { return V::select(V::first(used(j)), load(row, j), other); }
  DNC_INLINE void store(T* row, int64_t j, V x) const { x.store_n(row + j * L, used(j)); }

  DNC_INLINE bool finite(const T* row) const {
    bool ok = true;
    for (int64_t j = 0; j < count(); j++) {
      const V x = load(row, j);
      ok &= V::bits(eq(x - x, V::splat(T(0)))) == all;
    }
    return ok;
  }
  DNC_INLINE T largest(const T* row) const {
    V m = load_or(row, 0, V::splat(-INFINITY));
    for (int64_t j = 1; j < count(); j++) m = max(m, load_or(row, j, V::splat(-INFINITY)));
    return m.max();
  }
  // Lowest k of the largest value(j); padding lanes must hold less.
  template <class F>
  DNC_INLINE int64_t argmax(F value) const {
    T best = -INFINITY;
    int64_t at = 0;
    for (int64_t j = 0; j < count(); j++) {
      const V w = value(j);
      const T m = w.max();
      if (m > best) best = m, at = j * L + __builtin_ctz(V::bits(eq(w, V::splat(m))));
    }
    return at;
  }
};

// Adds rows to a table [group,width], zeroed first. Neighbouring pixels mostly share a group, so its row stays in registers
// while they do: a load and a store for every pixel would wait for each other.
template <class T, int NV>
struct GroupSums {
  using V = Vec<T>;
  static constexpr int L = V::lanes;
  T* const table;
  const int64_t width;
  T* row;
  V sum[NV ? NV : 1];
  GroupSums(T* table, int64_t groups, int64_t width) : table(table), width(width), row(table) {
    std::memset(table, 0, sizeof(T) * groups * width);
    for (V& s : sum) s = V::splat(T(0));
  }
  DNC_INLINE void select(int64_t g) {
    T* const next = table + g * width;
    if constexpr (NV > 0) {
      if (next == row) return;
      flush();
      for (int j = 0; j < NV; j++) sum[j] = V::load(next + j * L);
    }
    row = next;
  }
  DNC_INLINE void add(int64_t j, V a, V b) {  // a * b
    if constexpr (NV > 0) {
      sum[j] = fma(a, b, sum[j]);
    } else {
      fma(a, b, V::load(row + j * L)).store(row + j * L);
    }
  }
  DNC_INLINE void flush() {
    if constexpr (NV > 0)
      for (int j = 0; j < NV; j++) sum[j].store(row + j * L);
  }
};

}  // namespace dnc::cpu::DNC_ISA
