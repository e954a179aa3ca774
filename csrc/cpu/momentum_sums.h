// Sums of the pixels of each cluster, task by task: what momentum.cpp and the second pass of a head (head_second.cpp) share.
//
// A task is a chunk of pixels by a slice of channels, with accumulators [M, slice] that fit L2. Where channels are adjacent
// rows are added as they lie, four at a time where neighbours share a cluster. Where pixels are a slice is one vector wide, and
// tiles are transposed in registers. A source says what is added: the elements themselves (`Plain`), or the embedding of a
// pixel made of them on the way (`Embedded`), which then needs no memory.
#pragma once
#include "dnc/momentum.h"
#include "tile.h"

namespace dnc::cpu::DNC_ISA {
namespace {

constexpr int kFlush = 512;
constexpr int64_t kAccumulatorBytes = 2 << 20;  // of a task: 1.5 MB ran as fast as less on a core with 1 MB of L2
constexpr int64_t kPrefetchBytes = 8192;        // of rows ahead; flat from 4 to 12 KB
constexpr int64_t kSumChunks = 8;               // at most; each holds its own sums [M,D]
constexpr int64_t kTile = 256;                  // pixels staged at once where planes cannot be read in place

DNC_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
DNC_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
DNC_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Problem {
  Pixels x;
  const int64_t* cluster;
  int64_t N, D, M;
  void* sums;
  int64_t* counts;
  int threads;
};

// Part t of `parts` nearly equal parts of [0,n).
struct Part {
  int64_t begin, end;
  Part(int64_t n, int64_t t, int64_t parts)
      : begin(n / parts * t + min(t, n % parts)), end(n / parts * (t + 1) + min(t + 1, n % parts)) {}
};

// Sums of one task: `part` collects about kFlush pixels of a cluster, then goes to its row of `out`.
template <class T>
struct Accumulators {
  T* part;          // [M, stride]
  uint16_t* state;  // [M] pixels in `part`; bit 15: the row of `out` holds earlier ones
  T* out;           // [M, D], from the first channel of the slice
  int64_t width, stride, D;

  DNC_INLINE void added(int64_t m, int pixels) {
    state[m] = uint16_t(state[m] + pixels);
    if ((state[m] & 0x7fff) >= kFlush) flush(m);
  }
  // Adds n <= lanes vectors; a run of one cluster stays in a register, which spares it the latency of memory.
  DNC_INLINE void add(const int64_t* cluster, const Vec<T>* v, int64_t n) {
    constexpr int64_t L = Vec<T>::lanes;
    Vec<T> sum = v[0];
    int64_t m = -1;
    int pixels = 0;
#pragma GCC unroll 16  // v[j] stays in registers
    for (int64_t j = 0; j < n; j++) {
      if (cluster[j] != m) {
        if (m >= 0) {
          sum.store(part + m * L);
          added(m, pixels);
        }
        m = cluster[j], pixels = 0;
        if (m >= 0) sum = Vec<T>::load(part + m * L);
      }
      sum = sum + v[j];
      pixels++;
    }
    if (m >= 0) {
      sum.store(part + m * L);
      added(m, pixels);
    }
  }
  void flush(int64_t m) {
    T *p = part + m * stride, *o = out + m * D;
    const bool first = !(state[m] & 0x8000);
    for (int64_t d = 0; d < width; d++) o[d] = first ? p[d] : o[d] + p[d];
    std::memset(p, 0, size_t(stride) * sizeof(T));
    state[m] = 0x8000;
  }
};

// The elements as they are.
template <class T>
struct Plain {
  static constexpr bool plain = true;
};

// (x - mean) * rstd * weight + bias, times inverse_norm: the operations of embedding.cpp, in its order.
template <class T>
struct Embedded {
  static constexpr bool plain = false;
  using V = Vec<T>;
  const T *mean, *rstd, *inverse_norm;  // [N]
  const T *weight, *bias;               // [D]

  DNC_INLINE T at(T x, int64_t n, int64_t d) const {
    return ((x - mean[n]) * rstd[n] * weight[d] + bias[d]) * inverse_norm[n];  // contracted, as the vectors are
  }
  // One pixel, neighbouring channels.
  DNC_INLINE V row(V x, int64_t n, int64_t d) const {
    const V z = fma((x - V::splat(mean[n])) * V::splat(rstd[n]), V::load(weight + d), V::load(bias + d));
    return z * V::splat(inverse_norm[n]);
  }
  // Neighbouring pixels, `width` channels from d0: columns[channel].
  DNC_INLINE void columns(V* columns, int64_t n, int count, int64_t d0, int64_t width) const {
    const V m = V::load_n(mean + n, count), r = V::load_n(rstd + n, count), inverse = V::load_n(inverse_norm + n, count);
    for (int64_t c = 0; c < width; c++)
      columns[c] = fma((columns[c] - m) * r, V::splat(weight[d0 + c]), V::splat(bias[d0 + c])) * inverse;
  }
};

// out [width] += a row of x, and fetches the row at `ahead`.
template <class T, class S>
DNC_INLINE void add_row(T* out, const S* x, int64_t width, const S* ahead) {
  constexpr int64_t L = Vec<T>::lanes;
  constexpr int64_t line =
      L * int64_t(sizeof(S)) >= 64 ? L : 64 / int64_t(sizeof(S));  // elements of a cache line, whole vectors
  int64_t d = 0;
  for (; d + line <= width; d += line) {
    __builtin_prefetch(ahead + d);
    for (int64_t e = d; e < d + line; e += L) (Vec<T>::load(out + e) + Load<T, S>::at(x + e)).store(out + e);
  }
  for (; d + L <= width; d += L) (Vec<T>::load(out + d) + Load<T, S>::at(x + d)).store(out + d);
  for (; d < width; d++) out[d] += read<T>(x + d);
}

// out [width] += the embedding of a row of x, which is pixel n, from channel d0.
template <class T, class S>
DNC_INLINE void add_embedded(T* out, const S* x, int64_t width, const Embedded<T>& source, int64_t n, int64_t d0) {
  constexpr int64_t L = Vec<T>::lanes;
  int64_t d = 0;
  for (; d + L <= width; d += L) (Vec<T>::load(out + d) + source.row(Load<T, S>::at(x + d), n, d0 + d)).store(out + d);
  for (; d < width; d++) out[d] += source.at(read<T>(x + d), n, d0 + d);
}

// One task where channels are adjacent (or no axis is): pixels [begin,end), channels from d0.
template <class T, class S, class Source>
void sum_rows(const Problem& a, const Source& source, const Part& pixels, int64_t d0, Accumulators<T>& acc) {
  const Pixels& x = a.x;
  [[maybe_unused]] const int64_t distance = max(4, kPrefetchBytes / (a.D * int64_t(sizeof(S))));
  for (int64_t n = pixels.begin; n < pixels.end;) {
    const int64_t run = x.run(n, pixels.end - n);
    const S* p = reinterpret_cast<const S*>(x.data) + x.offset(n) + d0 * x.sd;
    const int64_t* cluster = a.cluster + n;
    for (int64_t i = 0; i < run; i++) {
      const int64_t m = cluster[i];
      if (m < 0) continue;
      const S* row = p + i * x.sw;
      T* out = acc.part + m * acc.stride;
      if constexpr (Source::plain) {
        if (x.sd == 1) {
          add_row(out, row, acc.width, i + distance < run && cluster[i + distance] >= 0 ? row + distance * x.sw : row);
        } else {
          for (int64_t d = 0; d < acc.width; d++) out[d] += read<T>(row + d * x.sd);
        }
      } else if (x.sd == 1) {
        add_embedded(out, row, acc.width, source, n + i, d0);
      } else {
        for (int64_t d = 0; d < acc.width; d++) out[d] += source.at(read<T>(row + d * x.sd), n + i, d0 + d);
      }
      acc.added(m, 1);
    }
    n += run;
  }
}

// One task where pixels are adjacent: pixels [begin,end), at most one vector of channels from d0.
template <class T, class S, class Source>
void sum_planes(const Problem& a, const Source& source, const Part& pixels, int64_t d0, Accumulators<T>& acc) {
  constexpr int64_t L = Vec<T>::lanes;
  const Pixels& x = a.x;
  alignas(64) T staged[L * kTile] = {};  // [lanes, pixels] of a tile that is not read in place; absent channels stay zero
  for (int64_t n = pixels.begin; n < pixels.end;) {
    const int64_t run = x.run(n, min(kTile, pixels.end - n));
    const S* in = reinterpret_cast<const S*>(x.data) + x.offset(n) + d0 * x.sd;
    const T* from = staged;
    int64_t stride = kTile;
    if constexpr (sizeof(S) == sizeof(T)) {
      if (acc.width == L && run % L == 0) from = in, stride = x.sd;
    }
    if (from == staged) {
      for (int64_t c = 0; c < acc.width; c++) read_n(staged + c * kTile, in + c * x.sd, run);
    }
    for (int64_t i = 0; i < run; i += L) {
      Vec<T> r[L];
      for (int64_t c = 0; c < L; c++) r[c] = Vec<T>::load(from + c * stride + i);
      if constexpr (!Source::plain) source.columns(r, n + i, int(min(L, run - i)), d0, acc.width);
      transpose(r);
      const int64_t* cluster = a.cluster + n + i;
      if (i + L <= run) {
        acc.add(cluster, r, L);
      } else {
        acc.add(cluster, r, run - i);
      }
    }
    n += run;
  }
}

// How the sums are cut into tasks. Chunks depend on N, M and the layout alone, so that an element is summed in pixel order
// within a chunk and over chunks in order; slices, which follow the threads, change no sum.
template <class T>
struct SumPlan {
  bool planes;
  int64_t chunks, width, slices, part_bytes;
  explicit SumPlan(const Problem& a) : planes(a.x.sw == 1 && a.x.sd != 1) {
    constexpr int64_t L = Vec<T>::lanes;
    // a chunk's own sums cost a thirty-second of its pixels, or less
    chunks = max(1, min(kSumChunks, a.N / (32 * a.M)));
    width = L;
    if (!planes) {
      const int64_t fit = max(64, kAccumulatorBytes / (a.M * int64_t(sizeof(T)))), wanted = divide_up(a.threads, chunks);
      width = divide_up(max(64, min(fit, divide_up(a.D, wanted))), L) * L;
      width = divide_up(divide_up(a.D, divide_up(a.D, width)), L) * L;  // slices of equal width
    }
    slices = divide_up(a.D, width), part_bytes = a.M * width * int64_t(sizeof(T));
  }
  int64_t tasks() const { return slices * chunks; }
  int64_t own_bytes(const Problem& a) const { return part_bytes + divide_up(a.M, 32) * 64; }           // of a thread
  size_t other_bytes(const Problem& a) const { return size_t((chunks - 1) * a.M * a.D) * sizeof(T); }  // of later chunks

  template <class S, class Source>
  void run(const Problem& a, const Source& source, int64_t task, char* own, T* other) const {
    const int64_t chunk = task / slices, d0 = task % slices * width;
    T* out = chunk == 0 ? static_cast<T*>(a.sums) : other + (chunk - 1) * a.M * a.D;
    std::memset(own, 0, size_t(own_bytes(a)));
    Accumulators<T> acc{
        reinterpret_cast<T*>(own), reinterpret_cast<uint16_t*>(own + part_bytes), out + d0, min(width, a.D - d0), width, a.D};
    const Part pixels(a.N, chunk, chunks);
    planes ? sum_planes<T, S>(a, source, pixels, d0, acc) : sum_rows<T, S>(a, source, pixels, d0, acc);
    for (int64_t m = 0; m < a.M; m++) acc.flush(m);
  }
  // Adds the later chunks to row m of the first.
  void add_chunks(const Problem& a, int64_t m, const T* other) const {
    T* sums = static_cast<T*>(a.sums) + m * a.D;
    for (int64_t chunk = 0; chunk < chunks - 1; chunk++)
      for (int64_t d = 0; d < a.D; d++) sums[d] += other[(chunk * a.M + m) * a.D + d];
  }
};

}  // namespace
}  // namespace dnc::cpu::DNC_ISA
