// The product of bfloat16 pixels on AMX tiles, accumulated in float32.
//
// A step multiplies 2 x 16 pixels by 2 panels of 16 sub-centroids over 32 channels: 4 accumulators and 2 operands of either
// side are the 8 tile registers. Pixels lie as rows [pixel][ld]; a panel as [32 channels][part][16 pairs of channels][lane][2].
// float32 sub-centroids are sums of 2 or 3 bfloat16 parts, and every part is multiplied, so a similarity is about as exact as
// in float32: 2 parts leave at most 2^-17 of a sub-centroid's channel.
#pragma once
#include "similarity_layout.h"

namespace dnc::cpu::DNC_ISA {
namespace {

// The tile registers of this thread, configured while the object lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" ::"r"(&config) : "memory");  // the intrinsics do not say that they read memory
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// 3 parts are exact. The error of 2 averages out over channels, so that it is far below that of a float32 sum of many.
DNC_INLINE int operand_parts(const View& centroids, Metric metric) {
  if (centroids.dtype == DType::bfloat16 && metric != Metric::cosine) return 1;
  return centroids.size[2] <= kStep ? 3 : 2;
}

// 32 adjacent channels of a sub-centroid as bfloat16; what they lack stays behind in v.
DNC_INLINE __m512i next_part(__m512 (&v)[2]) {
  const __m512i part = (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]);
  const __m512 value[2] = {
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(part)), 16)),
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(part, 1)), 16))};
  for (int i = 0; i < 2; i++) {
    const __m512 rest = _mm512_sub_ps(v[i], value[i]);
    // nothing is left of Inf and NaN
    v[i] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_sub_ps(rest, rest), _mm512_setzero_ps(), _CMP_EQ_OQ), rest);
  }
  return part;
}

// Packed panels, then biases [panels][L]. Padding lanes have bias -inf: they never win.
template <class T>
void pack_panels(const PanelLayout<T>& lay, const View& centroids, Metric metric, BFloat16* out, int threads) {
  constexpr int L = PanelLayout<T>::L;
  static_assert(L == 16);
  T* bias = lay.bias(out);
  const int64_t D = lay.D;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t j = 0; j < lay.panels; j++)
    visit(centroids.dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      const auto p = lay.panel(j);
      const S* row[L];
      T scale[L];
      for (int lane = 0; lane < L; lane++) {
        int64_t c, k;
        row[lane] = lay.entry(p, lane, &c, &k) ? centroids.as<S>() + (c * lay.K + k) * D : nullptr;
        const Factor<T> f = row[lane] ? factor<T>(row[lane], D, metric) : Factor<T>{0, -INFINITY};
        scale[lane] = f.scale, bias[j * L + lane] = f.bias;
      }
      BFloat16* o = out + j * lay.depth * lay.parts * L;
      for (int64_t d = 0; d < lay.depth; d += kStep) {
        __m512 channels[L][2];
        for (int lane = 0; lane < L; lane++) {
          T v[kStep] = {};
          if (row[lane]) read_n(v, row[lane] + d, min64(kStep, D - d));
          for (int i = 0; i < 2; i++)
            channels[lane][i] = _mm512_mul_ps(_mm512_loadu_ps(v + i * L), _mm512_set1_ps(scale[lane]));
        }
        for (int part = 0; part < lay.parts; part++, o += kStep * L) {
          Vec<float> pairs[L];
          for (int lane = 0; lane < L; lane++) pairs[lane].v = _mm512_castsi512_ps(next_part(channels[lane]));
          transpose<float>(pairs);
          for (int pair = 0; pair < L; pair++) pairs[pair].store(reinterpret_cast<float*>(o) + pair * L);
        }
      }
    });
}

// 32 channels of 16 neighbouring pixels of planes, as rows.
DNC_INLINE void load_square(const BFloat16* x, int64_t sd, BFloat16* out, int64_t ld) {
  Vec<float> pairs[16];
  for (int i = 0; i < 16; i++) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + 2 * i * sd))),
                  odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + (2 * i + 1) * sd)));
    pairs[i].v = _mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
  transpose<float>(pairs);
  for (int r = 0; r < 16; r++) _mm512_storeu_ps(out + r * ld, pairs[r].v);
}

// Reads `rows` pixels from n0 as rows [pixel][depth]; channels and rows past the end are zero.
inline void pack_tile(const Pixels& x, int64_t n0, int rows, BFloat16* out) {
  const int64_t D = x.D, ld = (D + kStep - 1) / kStep * kStep;
  const BFloat16* data = reinterpret_cast<const BFloat16*>(x.data);
  const int all = (rows + kRows - 1) / kRows * kRows;
  if (D < ld)
    for (int r = 0; r < rows; r++) std::memset(out + r * ld + D, 0, size_t(ld - D) * sizeof(BFloat16));
  std::memset(out + rows * ld, 0, size_t(all - rows) * ld * sizeof(BFloat16));
  for (int r = 0; r < rows;) {
    const int run = int(x.run(n0 + r, rows - r));
    const BFloat16* base = data + x.offset(n0 + r);
    if (x.sd == 1) {
      for (int i = 0; i < run; i++) std::memcpy(out + (r + i) * ld, base + i * x.sw, size_t(D) * sizeof(BFloat16));
    } else {
      const int squares = x.sw == 1 ? run / 16 * 16 : 0;
      const int64_t whole = squares ? D / kStep * kStep : 0;
      for (int64_t d = 0; d < whole; d += kStep)
        for (int i = 0; i < squares; i += 16) load_square(base + d * x.sd + i, x.sd, out + (r + i) * ld + d, ld);
      for (int64_t d = 0; d < D; d++)
        for (int i = d < whole ? squares : 0; i < run; i++) out[(r + i) * ld + d] = base[d * x.sd + i * x.sw];
    }
    r += run;
  }
}

// Sub-centroids as panels whose lanes are channels and whose depth runs over the slots of `lay`, once or twice; slots without
// one are zero.
template <class T>
void pack_channels(const PanelLayout<T>& lay, const PanelLayout<T>& channels, const T* rows, BFloat16* out, int threads) {
  constexpr int L = Vec<T>::lanes;
  alignas(64) uint16_t order[2 * L];  // the halves of a vector interleaved
  for (int i = 0; i < 2 * L; i++) order[i] = uint16_t(i / 2 + i % 2 * L);
  const __m512i interleave = _mm512_load_si512(order);
  const int64_t once = (lay.slots() + kStep - 1) / kStep * kStep;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t place = 0; place < channels.depth; place += 2) {
    const int64_t slot = place % once;
    const T* row[2] = {};
    for (int i = 0; i < 2; i++) {
      int64_t c, k;
      if (slot < lay.slots() && lay.entry(lay.panel(slot / L), int(slot % L + i), &c, &k))
        row[i] = rows + (c * lay.K + k) * lay.D;
    }
    for (int64_t j = 0; j < channels.panels; j++) {
      __m512 v[2];
      for (int i = 0; i < 2; i++)
        v[i] = row[i] ? Vec<T>::load_n(row[i] + j * L, int(min64(L, lay.D - j * L))).v : _mm512_setzero_ps();
      BFloat16* o = out + ((j * channels.depth + place / kStep * kStep) * channels.parts + place % kStep) * L;
      for (int part = 0; part < channels.parts; part++)
        _mm512_storeu_si512(o + part * kStep * L, _mm512_permutexvar_epi16(interleave, next_part(v)));
    }
  }
  T* bias = channels.bias(out);
  for (int64_t i = 0; i < channels.slots(); i++) bias[i] = 0;
}

// 1/|x| (cosine) or |x|^2 (sqeuclidean) of every row of a packed tile.
template <class T>
void row_terms(const BFloat16* tile, int64_t D, int rows, Metric metric, T* out) {
  using V = Vec<T>;
  const int64_t ld = (D + kStep - 1) / kStep * kStep;
  for (int r = 0; r < rows; r++) {
    V sum = V::splat(0);
    for (int64_t d = 0; d < ld; d += V::lanes) {
      const V v = Load<T, BFloat16>::at(tile + r * ld + d);
      sum = fma(v, v, sum);
    }
    out[r] = row_term(sum.sum(), metric);
  }
}

// Tile registers 0 .. 3 belong to block i and panel p as 2i + p, and go to `to(i, p)` with rows of `bytes`.
template <int NB, int NP, class To>
DNC_INLINE void store_tiles(To to, int64_t bytes) {
  _tile_stored(0, to(0, 0), bytes);
  if constexpr (NP == 2) _tile_stored(1, to(0, 1), bytes);
  if constexpr (NB == 2) _tile_stored(2, to(1, 0), bytes);
  if constexpr (NB == 2 && NP == 2) _tile_stored(3, to(1, 1), bytes);
}

// NB blocks from b on against NP panels, channels [d0, d0+depth): from the bias or the waiting partial sums, in tile registers.
template <int NB, int NP, class T>
DNC_INLINE void multiply(const PanelLayout<T>& lay, const BFloat16* panels, const BFloat16* tile, int64_t j, int64_t d0,
                         int64_t depth, const T* partial, int b) {
  constexpr int L = PanelLayout<T>::L, area = kRows * L;
  const int64_t panel = lay.depth * lay.parts * L, ld = lay.ld;
  const BFloat16* x = tile + b * kRows * ld + d0;
  const BFloat16* q = panels + j * panel + d0 * lay.parts * L;
  const T* start = d0 == 0 ? lay.bias(panels) + j * L : partial;
  const int64_t next_panel = d0 == 0 ? L : area, next_block = d0 == 0 ? 0 : NP * area, row = d0 == 0 ? 0 : L * sizeof(T);
  asm volatile("" ::: "memory");  // the intrinsics do not say that they read memory
  _tile_loadd(0, start, row);
  if constexpr (NP == 2) _tile_loadd(1, start + next_panel, row);
  if constexpr (NB == 2) _tile_loadd(2, start + next_block, row);
  if constexpr (NB == 2 && NP == 2) _tile_loadd(3, start + next_block + next_panel, row);
  for (int64_t d = 0; d < depth; d += kStep) {
    _tile_loadd(4, x + d, ld * 2);
    if constexpr (NB == 2) _tile_loadd(5, x + d + kRows * ld, ld * 2);
    for (int part = 0; part < lay.parts; part++, q += kStep * L) {
      _tile_loadd(6, q, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (NP == 2) {
        _tile_loadd(7, q + panel, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (NB == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (NB == 2 && NP == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// Hands NB x NP accumulators in memory to `take`.
template <int NB, int NP, class T, class Take>
DNC_INLINE void hand_over(const T* done, int64_t j, int b, Take& take) {
  constexpr int L = PanelLayout<T>::L, area = kRows * L;
  for (int i = 0; i < NB; i++)
#pragma GCC unroll 2
    for (int p = 0; p < NP; p++) {
      Vec<T> acc[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) acc[r] = Vec<T>::load(done + (i * NP + p) * area + r * L);
      take(b + i, j + p, acc);
    }
}

// NP panels from j on against every block of a tile. While tile registers multiply, vectors take what they multiplied before.
template <int NP, class T, class Take>
void columns(const PanelLayout<T>& lay, const BFloat16* panels, const BFloat16* tile, int blocks, int64_t j, int64_t d0,
             int64_t depth, T* partial, Take& take) {
  constexpr int L = PanelLayout<T>::L, area = kRows * L;
  constexpr int64_t bytes = L * sizeof(T);
  const bool last = d0 + depth >= lay.depth;
  alignas(64) T done[2][kBlocks * NP * area];
  int taken = -1;  // the block, if any, whose results wait to be taken
  int turn = 0;
  auto step = [&](auto nb, int b) {
    constexpr int NB = decltype(nb)::value;
    T* waiting = partial + b * NP * area;
    multiply<NB, NP>(lay, panels, tile, j, d0, depth, waiting, b);
    if (taken >= 0) hand_over<kBlocks, NP>(done[turn ^ 1], j, taken, take);
    taken = -1;
    T* to = last ? done[turn] : waiting;
    if constexpr (requires { take.direct(b, j); })
      if (last && take.direct(b, j))
        return store_tiles<NB, NP>([&](int i, int p) { return take.direct(b + i, j + p); }, take.ld * int64_t(sizeof(T)));
    store_tiles<NB, NP>([&](int i, int p) { return to + (i * NP + p) * area; }, bytes);
    if (!last) return;
    if (NB < kBlocks) return hand_over<NB, NP>(done[turn], j, b, take);
    taken = b, turn ^= 1;
  };
  int b = 0;
  for (; b + kBlocks <= blocks; b += kBlocks) step(std::integral_constant<int, kBlocks>{}, b);
  for (; b < blocks; b++) step(std::integral_constant<int, 1>{}, b);
  if (taken >= 0) hand_over<kBlocks, NP>(done[turn ^ 1], j, taken, take);
}

}  // namespace
}  // namespace dnc::cpu::DNC_ISA
