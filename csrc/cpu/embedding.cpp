// The embedding of every pixel and its gradients.
//
//   xhat = (x - mean) * rstd,  z = xhat * weight + bias,  y = z / max(|z|, 1e-12)      over the D channels of a pixel
//
// Forward reads x once and writes y once (2*N*D elements, plus 3*N statistics); backward reads x and grad_y once and writes
// grad_x once. A tile of pixels stays in cache between the passes over its channels. Two layouts:
//   rows     channels lie side by side ([N,D], channels_last): vector lanes are channels, a pixel at a time, float32 and
//   float64 in place. columns  anything else (NCHW): vector lanes are pixels. A tile [D][P] is staged in scratch memory,
//   because the channels of a
//            pixel lie a power of two apart so often that a cache could not hold them where they are.
// Threads take chunks of pixels whose borders depend on N alone; the sums of grad_weight and grad_bias are kept per chunk and
// added in order, so that every result is bit-equal for any number of threads. The mean is taken in two passes and corrected by
// the mean of what is left, so an offset of the features costs no more than the rounding of the mean itself. Reference:
// dnc_kernels/ops/embedding/reference.py.
#include "dnc/embedding.h"

#include <omp.h>

#include "simd.h"

namespace dnc::cpu::DNC_ISA {
namespace {

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

constexpr int64_t kRows = 16;  // pixels of a tile of rows: one cache line where another tensor is NCHW
constexpr int kGroup = 2;      // vectors of pixels that a column kernel works on at a time
// Most pixels of a tile of columns, a multiple of every kGroup * lanes: a channel's piece of it is read at full speed. Halved,
// to 32 at least, while the tile takes more than kTileBytes: it must stay in L2.
constexpr int64_t kTile = 256, kTileBytes = 1 << 18;
// Elements between the channels of a tile of columns beyond its pixels: a power of two apart, the channels of the pixels that a
// kernel works on would share a few sets of L1. Where they take more than kGroupBytes L1 could not hold them anyway.
constexpr int64_t kApart = 16, kGroupBytes = 1 << 15;

// Element (p,d) of a tile lies at p*tp + d*td. Copies `count` pixels from n0 on.
template <class T, class S>
void load_tile(T* tile, int64_t tp, int64_t td, const Pixels& x, int64_t n0, int64_t count) {
  for (int64_t p = 0, run; p < count; p += run) {
    run = x.run(n0 + p, count - p);
    const S* in = reinterpret_cast<const S*>(x.data) + x.offset(n0 + p);
    T* out = tile + p * tp;
    if (x.sw == 1 && tp == 1) {
      for (int64_t d = 0; d < x.D; d++) read_n(out + d * td, in + d * x.sd, run);
    } else if (x.sd == 1 && td == 1) {
      for (int64_t i = 0; i < run; i++) read_n(out + i * tp, in + i * x.sw, x.D);
    } else if (x.sw == 1) {
      for (int64_t d = 0; d < x.D; d++)
        for (int64_t i = 0; i < run; i++) out[i * tp + d * td] = read<T>(in + i + d * x.sd);
    } else {
      for (int64_t i = 0; i < run; i++)
        for (int64_t d = 0; d < x.D; d++) out[i * tp + d * td] = read<T>(in + i * x.sw + d * x.sd);
    }
  }
}

template <class T, class S>
void store_tile(const T* tile, int64_t tp, int64_t td, const Pixels& y, int64_t n0, int64_t count) {
  for (int64_t p = 0, run; p < count; p += run) {
    run = y.run(n0 + p, count - p);
    S* out = reinterpret_cast<S*>(y.data) + y.offset(n0 + p);
    const T* in = tile + p * tp;
    if (y.sw == 1 && tp == 1) {
      for (int64_t d = 0; d < y.D; d++) write_n(out + d * y.sd, in + d * td, run);
    } else if (y.sd == 1 && td == 1) {
      for (int64_t i = 0; i < run; i++) write_n(out + i * y.sw, in + i * tp, y.D);
    } else if (y.sw == 1) {
      for (int64_t d = 0; d < y.D; d++)
        for (int64_t i = 0; i < run; i++) write(out + i + d * y.sd, in[i * tp + d * td]);
    } else {
      for (int64_t i = 0; i < run; i++)
        for (int64_t d = 0; d < y.D; d++) write(out + i * y.sw + d * y.sd, in[i * tp + d * td]);
    }
  }
}

// Rows of T that lie side by side are used where they are; all others go through `tile`.
template <class T>
void point_rows(T** row, bool in_place, const Pixels& x, int64_t n0, int64_t count, T* tile) {
  for (int64_t p = 0, run; p < count; p += run) {
    run = in_place ? x.run(n0 + p, count - p) : count;
    T* base = in_place ? reinterpret_cast<T*>(x.data) + x.offset(n0 + p) : tile;
    for (int64_t i = 0; i < run; i++) row[p + i] = base + i * (in_place ? x.sw : x.D);
  }
}

// The vectors of a row: whole ones, and the masked rest.
template <class T>
struct Whole {
  using V = Vec<T>;
  DNC_INLINE V load(const T* p) const { return V::load(p); }
  DNC_INLINE void store(T* p, V v) const { v.store(p); }
  DNC_INLINE V keep(V v) const { return v; }
};
template <class T>
struct Rest {
  using V = Vec<T>;
  int n;
  DNC_INLINE V load(const T* p) const { return V::load_n(p, n); }
  DNC_INLINE void store(T* p, V v) const { v.store_n(p, n); }
  DNC_INLINE V keep(V v) const { return V::select(V::first(n), v, V::splat(0)); }
};
template <class T, class F>
DNC_INLINE void each_vector(int64_t D, F f) {
  int64_t d = 0;
  for (; d + Vec<T>::lanes <= D; d += Vec<T>::lanes) f(Whole<T>{}, d);
  if (d < D) f(Rest<T>{int(D - d)}, d);
}

// 1 / sqrt(var + eps). Rounding may leave the variance of a constant pixel a hair below 0; NaN stays NaN.
template <class T>
DNC_INLINE T inverse_deviation(T var, T eps) {
  return T(1) / std::sqrt((var < 0 ? T(0) : var) + eps);
}
// 1 / max(|z|, 1e-12), F.normalize's bound; but 0 for z = 0, which makes y and its gradient 0. NaN stays NaN.
template <class T>
DNC_INLINE T inverse_length(T squares) {
  const T length = std::sqrt(squares);
  return length == 0 ? T(0) : T(1) / (length < T(1e-12) ? T(1e-12) : length);
}

// What a pixel's gradient needs beside its channels: dz = inv * g - along * z, and grad_x = rstd * (dz * w - level - xhat *
// slope).
template <class T>
struct Coefficients {
  T along, level, slope;
};
// From sums over channels: gz = <g,z>, gw = <g,w>, zw = <z,w>, gwx = <g*w,xhat>, zwx = <z*w,xhat>; to_rstd = grad_rstd * rstd,
// because d rstd / dx = -rstd^2 * xhat / D.
template <class T>
DNC_INLINE Coefficients<T> coefficients(T inv, T gz, T gw, T zw, T gwx, T zwx, T to_rstd, T per_channel) {
  // below the bound 1e-12 the length is a constant, and nothing is projected out
  const T along = inv < T(1e12) ? gz * inv * inv * inv : inv != inv ? inv : T(0);
  return {along, (inv * gw - along * zw) * per_channel, (inv * gwx - along * zwx + to_rstd) * per_channel};
}

template <class T>
DNC_INLINE void forward_row(const T* x, T* y, int64_t D, const T* w, const T* b, T eps, T* mean, T* rstd, T* inverse_norm) {
  using V = Vec<T>;
  const T per_channel = T(1) / T(D);
  V sum = V::splat(0), left = sum, squares = sum, length = sum;
  each_vector<T>(D, [&](auto part, int64_t d) { sum = sum + part.load(x + d); });
  const T first = sum.sum() * per_channel;
  const V center = V::splat(first);
  each_vector<T>(D, [&](auto part, int64_t d) {
    const V t = part.keep(part.load(x + d) - center);
    left = left + t, squares = fma(t, t, squares);
  });
  const T delta = left.sum() * per_channel;
  *mean = first + delta;
  *rstd = inverse_deviation(squares.sum() * per_channel - delta * delta, eps);
  const V m = V::splat(*mean), r = V::splat(*rstd);
  each_vector<T>(D, [&](auto part, int64_t d) {
    const V z = part.keep(fma((part.load(x + d) - m) * r, part.load(w + d), part.load(b + d)));
    length = fma(z, z, length);
    part.store(y + d, z);
  });
  *inverse_norm = inverse_length(length.sum());
  const V inv = V::splat(*inverse_norm);
  each_vector<T>(D, [&](auto part, int64_t d) { part.store(y + d, part.load(y + d) * inv); });
}

// sums [2][D]: grad_weight and grad_bias of the chunk; null where neither is wanted.
template <class T>
DNC_INLINE void backward_row(const T* x, const T* g, T* gx, int64_t D, const T* w, const T* b, T mean, T rstd, T inverse_norm,
                             T grad_rstd, T* sums) {
  using V = Vec<T>;
  const V m = V::splat(mean), r = V::splat(rstd), inv = V::splat(inverse_norm);
  V gz = V::splat(0), gw = gz, zw = gz, gwx = gz, zwx = gz;
  each_vector<T>(D, [&](auto part, int64_t d) {
    const V weight = part.load(w + d), grad = part.load(g + d);
    const V xhat = part.keep((part.load(x + d) - m) * r), z = fma(xhat, weight, part.load(b + d));
    const V a = grad * weight, c = z * weight;
    gz = fma(grad, z, gz), gw = gw + a, zw = zw + c, gwx = fma(a, xhat, gwx), zwx = fma(c, xhat, zwx);
  });
  const auto k = coefficients(inverse_norm, gz.sum(), gw.sum(), zw.sum(), gwx.sum(), zwx.sum(), grad_rstd * rstd, T(1) / T(D));
  const V along = V::splat(k.along), level = V::splat(k.level), slope = V::splat(k.slope);
  each_vector<T>(D, [&](auto part, int64_t d) {
    const V weight = part.load(w + d), xhat = (part.load(x + d) - m) * r, z = fma(xhat, weight, part.load(b + d));
    const V dz = inv * part.load(g + d) - along * z;
    if (sums) {
      part.store(sums + d, fma(dz, xhat, part.load(sums + d)));
      part.store(sums + D + d, part.load(sums + D + d) + dz);
    }
    part.store(gx + d, r * (dz * weight - level - xhat * slope));
  });
}

// t [D][ld]: kGroup * lanes pixels of it; x becomes y.
template <class T>
void forward_columns(T* t, int64_t ld, int64_t D, const T* w, const T* b, T eps, T* mean, T* rstd, T* inverse_norm) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const V per_channel = V::splat(T(1) / T(D));
  V center[kGroup], left[kGroup], squares[kGroup], m[kGroup], r[kGroup];
  for (int i = 0; i < kGroup; i++) center[i] = left[i] = squares[i] = V::splat(0);
  for (int64_t d = 0; d < D; d++)
    for (int i = 0; i < kGroup; i++) center[i] = center[i] + V::load(t + d * ld + i * L);
  for (int i = 0; i < kGroup; i++) center[i] = center[i] * per_channel;
  for (int64_t d = 0; d < D; d++)
    for (int i = 0; i < kGroup; i++) {
      const V e = V::load(t + d * ld + i * L) - center[i];
      left[i] = left[i] + e, squares[i] = fma(e, e, squares[i]);
    }
  for (int i = 0; i < kGroup; i++) {
    const V delta = left[i] * per_channel;
    m[i] = center[i] + delta;
    m[i].store(mean + i * L);
    (squares[i] * per_channel - delta * delta).store(rstd + i * L);
  }
  for (int p = 0; p < kGroup * L; p++) rstd[p] = inverse_deviation(rstd[p], eps);
  for (int i = 0; i < kGroup; i++) r[i] = V::load(rstd + i * L), squares[i] = V::splat(0);
  for (int64_t d = 0; d < D; d++) {
    const V weight = V::splat(w[d]), bias = V::splat(b[d]);
    for (int i = 0; i < kGroup; i++) {
      const V z = fma((V::load(t + d * ld + i * L) - m[i]) * r[i], weight, bias);
      squares[i] = fma(z, z, squares[i]);
      z.store(t + d * ld + i * L);
    }
  }
  for (int i = 0; i < kGroup; i++) squares[i].store(inverse_norm + i * L);
  for (int p = 0; p < kGroup * L; p++) inverse_norm[p] = inverse_length(inverse_norm[p]);
  for (int i = 0; i < kGroup; i++) r[i] = V::load(inverse_norm + i * L);
  for (int64_t d = 0; d < D; d++)
    for (int i = 0; i < kGroup; i++) (V::load(t + d * ld + i * L) * r[i]).store(t + d * ld + i * L);
}

// t, g [D][ld]: kGroup * lanes pixels of x and grad_y; x becomes grad_x. sums [2][D][lanes], or null.
template <class T>
void backward_columns(T* t, const T* g, int64_t ld, int64_t D, const T* w, const T* b, const T* mean, const T* rstd,
                      const T* inverse_norm, const T* grad_rstd, T* sums) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  V m[kGroup], r[kGroup], inv[kGroup], gz[kGroup], gw[kGroup], zw[kGroup], gwx[kGroup], zwx[kGroup];
  for (int i = 0; i < kGroup; i++) {
    m[i] = V::load(mean + i * L), r[i] = V::load(rstd + i * L), inv[i] = V::load(inverse_norm + i * L);
    gz[i] = gw[i] = zw[i] = gwx[i] = zwx[i] = V::splat(0);
  }
  for (int64_t d = 0; d < D; d++) {
    const V weight = V::splat(w[d]), bias = V::splat(b[d]);
    for (int i = 0; i < kGroup; i++) {
      const V grad = V::load(g + d * ld + i * L);
      const V xhat = (V::load(t + d * ld + i * L) - m[i]) * r[i], z = fma(xhat, weight, bias);
      const V a = grad * weight, c = z * weight;
      gz[i] = fma(grad, z, gz[i]), gw[i] = gw[i] + a, zw[i] = zw[i] + c;
      gwx[i] = fma(a, xhat, gwx[i]), zwx[i] = fma(c, xhat, zwx[i]);
    }
  }
  T s[5][kGroup * L];
  for (int i = 0; i < kGroup; i++) {
    gz[i].store(s[0] + i * L), gw[i].store(s[1] + i * L), zw[i].store(s[2] + i * L);
    gwx[i].store(s[3] + i * L), zwx[i].store(s[4] + i * L);
  }
  for (int p = 0; p < kGroup * L; p++) {
    const auto k =
        coefficients(inverse_norm[p], s[0][p], s[1][p], s[2][p], s[3][p], s[4][p], grad_rstd[p] * rstd[p], T(1) / T(D));
    s[0][p] = k.along, s[1][p] = k.level, s[2][p] = k.slope;
  }
  V along[kGroup], level[kGroup], slope[kGroup];
  for (int i = 0; i < kGroup; i++)
    along[i] = V::load(s[0] + i * L), level[i] = V::load(s[1] + i * L), slope[i] = V::load(s[2] + i * L);
  for (int64_t d = 0; d < D; d++) {
    const V weight = V::splat(w[d]), bias = V::splat(b[d]);
    V to_weight = V::splat(0), to_bias = to_weight;
    for (int i = 0; i < kGroup; i++) {
      const V xhat = (V::load(t + d * ld + i * L) - m[i]) * r[i], z = fma(xhat, weight, bias);
      const V dz = inv[i] * V::load(g + d * ld + i * L) - along[i] * z;
      to_weight = fma(dz, xhat, to_weight), to_bias = to_bias + dz;
      (r[i] * (dz * weight - level[i] - xhat * slope[i])).store(t + d * ld + i * L);
    }
    if (sums) {
      (V::load(sums + d * L) + to_weight).store(sums + d * L);
      (V::load(sums + (D + d) * L) + to_bias).store(sums + (D + d) * L);
    }
  }
}

// How a call is cut up: tiles of P pixels, chunks of whole tiles. Depends on sizes and layout only, never on the threads.
struct Plan {
  int64_t N, D, P, pitch, chunk, chunks;
  bool rows;
  int threads;
  Plan(const Pixels& x, int wanted, int lanes, size_t element) : N(x.N()), D(x.D) {
    rows = x.sd == 1 && x.sw != 1;
    P = rows ? kRows : kTile;
    while (!rows && P > 32 && D * P * int64_t(element) > kTileBytes) P /= 2;
    pitch = rows || D * kGroup * lanes * int64_t(element) > kGroupBytes ? P : P + kApart;
    const int64_t share = (N + 63) / 64;  // 64 chunks, of at most 512 pixels
    chunk = ((share < 512 ? share : 512) + P - 1) / P * P;
    chunks = (N + chunk - 1) / chunk;
    threads = N * D < 16384 ? 1 : int(wanted < chunks ? wanted : chunks);  // below: less work than waking a thread
  }
};

template <class T>
void fill_affine(T* out, const View& weight, const View& bias, int64_t D) {
  for (int64_t d = 0; d < D; d++) out[d] = weight ? weight.as<T>()[d] : T(1);
  for (int64_t d = 0; d < D; d++) out[D + d] = bias ? bias.as<T>()[d] : T(0);
}

template <class T, class S>
Status forward(const NormalizeEmbedding& a) {
  const Pixels x(a.x), y(a.y);
  if (x.N() == 0) return {};
  const Plan plan(x, a.threads, Vec<T>::lanes, sizeof(T));
  const int64_t N = plan.N, D = plan.D, P = plan.P, pitch = plan.pitch;
  const bool x_in_place = same<S, T> && x.sd == 1, y_in_place = same<S, T> && y.sd == 1;
  T *mean = a.mean.as<T>(), *rstd = a.rstd.as<T>(), *inverse_norm = a.inverse_norm.as<T>();
  Scratch affine(2 * D * sizeof(T)), tiles(size_t(plan.threads) * 2 * pitch * D * sizeof(T));
  if (!affine.data || !tiles.data) return {Code::out_of_memory, 0, 0, "not enough memory"};
  fill_affine(affine.as<T>(), a.weight, a.bias, D);
  const T *w = affine.as<T>(), *b = w + D, eps = T(a.eps);
#pragma omp parallel for num_threads(plan.threads) schedule(dynamic)
  for (int64_t c = 0; c < plan.chunks; c++) {
    T* tile = tiles.as<T>() + omp_get_thread_num() * 2 * pitch * D;
    const int64_t end = (c + 1) * plan.chunk < N ? (c + 1) * plan.chunk : N;
    for (int64_t n = c * plan.chunk; n < end; n += P) {
      const int64_t count = end - n < P ? end - n : P;
      if (plan.rows) {
        T *in[kRows], *out[kRows];
        point_rows(in, x_in_place, x, n, count, tile);
        point_rows(out, y_in_place, y, n, count, tile + P * D);
        if (!x_in_place) load_tile<T, S>(tile, D, 1, x, n, count);
        for (int64_t p = 0; p < count; p++)
          forward_row(in[p], out[p], D, w, b, eps, mean + n + p, rstd + n + p, inverse_norm + n + p);
        if (!y_in_place) store_tile<T, S>(tile + P * D, D, 1, y, n, count);
      } else {
        constexpr int64_t step = kGroup * Vec<T>::lanes;
        T stat[3][kTile];
        if (count < P) std::memset(tile, 0, pitch * D * sizeof(T));
        load_tile<T, S>(tile, 1, pitch, x, n, count);
        for (int64_t p = 0; p < count; p += step)
          forward_columns(tile + p, pitch, D, w, b, eps, stat[0] + p, stat[1] + p, stat[2] + p);
        std::memcpy(mean + n, stat[0], count * sizeof(T));
        std::memcpy(rstd + n, stat[1], count * sizeof(T));
        std::memcpy(inverse_norm + n, stat[2], count * sizeof(T));
        store_tile<T, S>(tile, 1, pitch, y, n, count);
      }
    }
  }
  return {};
}

template <class T, class S>
Status backward(const NormalizeEmbeddingBackward& a) {
  const Pixels x(a.x), g(a.grad_y), gx(a.grad_x ? a.grad_x : a.x);  // without grad_x: its shape only, never written
  constexpr int L = Vec<T>::lanes;
  const int64_t D = x.D;
  const bool affine_grad = a.grad_weight || a.grad_bias;
  if (x.N() == 0) {
    if (a.grad_weight) std::memset(a.grad_weight.data, 0, D * sizeof(T));
    if (a.grad_bias) std::memset(a.grad_bias.data, 0, D * sizeof(T));
    return {};
  }
  const Plan plan(x, a.threads, L, 2 * sizeof(T));
  const int64_t N = plan.N, P = plan.P, pitch = plan.pitch;
  const bool x_in_place = same<S, T> && x.sd == 1, g_in_place = same<S, T> && g.sd == 1;
  const bool gx_in_place = same<S, T> && gx.sd == 1 && a.grad_x;
  const T *mean = a.mean.as<T>(), *rstd = a.rstd.as<T>(), *inverse_norm = a.inverse_norm.as<T>();
  const T* grad_rstd = a.grad_rstd ? a.grad_rstd.as<T>() : nullptr;
  const int64_t lane_sums = affine_grad && !plan.rows ? 2 * D * L : 0, private_size = 3 * pitch * D + lane_sums;
  Scratch affine(2 * D * sizeof(T)), tiles(size_t(plan.threads) * private_size * sizeof(T));
  Scratch partial(affine_grad ? plan.chunks * 2 * D * sizeof(T) : 0), total(2 * D * sizeof(double));
  if (!affine.data || !tiles.data || !partial.data || !total.data) return {Code::out_of_memory, 0, 0, "not enough memory"};
  fill_affine(affine.as<T>(), a.weight, a.bias, D);
  const T *w = affine.as<T>(), *b = w + D;
#pragma omp parallel for num_threads(plan.threads) schedule(dynamic)
  for (int64_t c = 0; c < plan.chunks; c++) {
    T* tile = tiles.as<T>() + omp_get_thread_num() * private_size;
    T *g_tile = tile + pitch * D, *gx_tile = g_tile + pitch * D, *lanes = lane_sums ? gx_tile + pitch * D : nullptr;
    T* sums = affine_grad ? partial.as<T>() + c * 2 * D : nullptr;
    if (sums) std::memset(sums, 0, 2 * D * sizeof(T));
    if (lanes) std::memset(lanes, 0, lane_sums * sizeof(T));
    const int64_t end = (c + 1) * plan.chunk < N ? (c + 1) * plan.chunk : N;
    for (int64_t n = c * plan.chunk; n < end; n += P) {
      const int64_t count = end - n < P ? end - n : P;
      if (plan.rows) {
        T *in[kRows], *grad[kRows], *out[kRows];
        point_rows(in, x_in_place, x, n, count, tile);
        point_rows(grad, g_in_place, g, n, count, g_tile);
        point_rows(out, gx_in_place, gx, n, count, gx_tile);
        if (!x_in_place) load_tile<T, S>(tile, D, 1, x, n, count);
        if (!g_in_place) load_tile<T, S>(g_tile, D, 1, g, n, count);
        for (int64_t p = 0; p < count; p++)
          backward_row(in[p], grad[p], out[p], D, w, b, mean[n + p], rstd[n + p], inverse_norm[n + p],
                       grad_rstd ? grad_rstd[n + p] : T(0), sums);
        if (a.grad_x && !gx_in_place) store_tile<T, S>(gx_tile, D, 1, gx, n, count);
      } else {
        constexpr int64_t step = kGroup * L;
        T stat[4][kTile] = {};  // zero statistics: pixels past the end add exactly 0 to the sums
        if (count < P) std::memset(tile, 0, 2 * pitch * D * sizeof(T));
        load_tile<T, S>(tile, 1, pitch, x, n, count);
        load_tile<T, S>(g_tile, 1, pitch, g, n, count);
        std::memcpy(stat[0], mean + n, count * sizeof(T));
        std::memcpy(stat[1], rstd + n, count * sizeof(T));
        std::memcpy(stat[2], inverse_norm + n, count * sizeof(T));
        if (grad_rstd) std::memcpy(stat[3], grad_rstd + n, count * sizeof(T));
        for (int64_t p = 0; p < count; p += step)
          backward_columns(tile + p, g_tile + p, pitch, D, w, b, stat[0] + p, stat[1] + p, stat[2] + p, stat[3] + p, lanes);
        if (a.grad_x) store_tile<T, S>(tile, 1, pitch, gx, n, count);
      }
    }
    if (lanes)
      for (int64_t i = 0; i < 2 * D; i++) sums[i] = Vec<T>::load(lanes + i * L).sum();
  }
  if (affine_grad) {
    double* sum = total.as<double>();
    std::memset(sum, 0, 2 * D * sizeof(double));
    for (int64_t c = 0; c < plan.chunks; c++)
      for (int64_t i = 0; i < 2 * D; i++) sum[i] += partial.as<T>()[c * 2 * D + i];
    if (a.grad_weight)
      for (int64_t d = 0; d < D; d++) a.grad_weight.as<T>()[d] = T(sum[d]);
    if (a.grad_bias)
      for (int64_t d = 0; d < D; d++) a.grad_bias.as<T>()[d] = T(sum[D + d]);
  }
  return {};
}

}  // namespace

Status normalize_embedding(const NormalizeEmbedding& a) {
  if (a.y.dtype != a.x.dtype) return bad_argument("y must have the dtype of x");
  switch (a.x.dtype) {
    case DType::float32: return forward<float, float>(a);
    case DType::float64: return forward<double, double>(a);
    case DType::float16: return forward<float, Float16>(a);
    case DType::bfloat16: return forward<float, BFloat16>(a);
    default: return bad_argument("x must be float32, float64, float16 or bfloat16");
  }
}

Status normalize_embedding_backward(const NormalizeEmbeddingBackward& a) {
  if (a.grad_y.dtype != a.x.dtype || (a.grad_x && a.grad_x.dtype != a.x.dtype))
    return bad_argument("grad_y and grad_x must have the dtype of x");
  switch (a.x.dtype) {
    case DType::float32: return backward<float, float>(a);
    case DType::float64: return backward<double, double>(a);
    case DType::float16: return backward<float, Float16>(a);
    case DType::bfloat16: return backward<float, BFloat16>(a);
    default: return bad_argument("x must be float32, float64, float16 or bfloat16");
  }
}

}  // namespace dnc::cpu::DNC_ISA
