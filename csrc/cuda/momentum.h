// What the momentum kernels share: tiles of pixels sorted by sub-centroid in shared memory, the sums of their runs, and the
// end: EMA, renormalisation, and sums made again without pixels that are not finite. Used by momentum.cu and
// momentum_ordered.cu alone, which say what moves and when.
#pragma once
#include "common.h"
#include "dnc/momentum.h"

namespace dnc {
namespace cuda {
namespace momentum {

constexpr int kThreads = 512, kWarps = kThreads / 32;
// A key: what to sort by, then the pixel's index in its tile. Equal pixels keep their order.
constexpr int kIndexBits = 10;
constexpr uint32_t kIndex = (1u << kIndexBits) - 1;
constexpr uint32_t kLeftOut = ~0u;                                       // sorts behind every key
constexpr int64_t kMaxClusters = (int64_t(1) << (32 - kIndexBits)) - 1;  // below the key of what is left out
constexpr int64_t kMaxPixels = UINT32_MAX;

// Where channels are adjacent a group of lanes takes a pixel: `vectors` by loads of 16 bytes, `rows` element by element where
// alignment forbids that. Else `planes`: lanes are pixels (coalesced in NCHW), four channels are staged in shared memory.
enum class Source { vectors, rows, planes };

// What neither kernel takes.
inline Status check_momentum(DType x, int64_t N, int64_t D, int64_t M) {
  if (x != DType::float32 && x != DType::float16 && x != DType::bfloat16) {
    return bad_argument("x must be float32, float16 or bfloat16");
  }
  if (N > kMaxPixels || D > INT32_MAX - 1024 || M > kMaxClusters) {
    return bad_argument("there must be fewer than 2^32 pixels, 2^22 sub-centroids and 2^31 - 1024 channels");
  }
  return {};
}

inline Source source_of(const Pixels& x, int64_t element) {
  if (x.sd != 1) return Source::planes;
  const bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.sb * element % 16 == 0 && x.sh * element % 16 == 0 &&
                       x.sw * element % 16 == 0 && x.D * element % 16 == 0;
  return aligned ? Source::vectors : Source::rows;
}

// 32-bit words of `kBytes` adjacent elements, for one load or store.
template <int kBytes>
struct alignas(kBytes) Words {
  uint32_t word[kBytes / 4];
};
template <class S, int kBytes>
__device__ inline float unpack(const Words<kBytes>& v, int i) {
  if constexpr (sizeof(S) == 4) {
    return __uint_as_float(v.word[i]);
  } else {
    return to_float(S{uint16_t(v.word[i / 2] >> 16 * (i % 2))});
  }
}
template <class S, int kBytes>
__device__ inline void set(Words<kBytes>& v, int i, S value) {  // of words that were zero
  if constexpr (sizeof(S) == 4) {
    v.word[i] = __float_as_uint(value);
  } else {
    v.word[i / 2] |= uint32_t(value.bits) << 16 * (i % 2);
  }
}

// Shared memory of a block. A tile of planes is smaller: 16 warps stage four channels of it, 64 KB.
template <class S, Source kSource>
struct Tile {
  using Element = S;
  static constexpr bool kPlanes = kSource == Source::planes;
  static constexpr int kPixels = kPlanes ? 1024 / int(sizeof(S)) : 1024;
  static constexpr int kChannels = kPlanes ? 4 : 16 / int(sizeof(S));  // of a thread
  static_assert(kPixels <= int(kIndex) + 1, "an index fits its bits");

  uint32_t key[kPixels];    // sorted
  int64_t offset[kPixels];  // of channel 0, by index; -1: left out
  float carry[kChannels][kThreads];
  Words<int(sizeof(S)) * 4> stage[kPlanes ? kWarps : 1][kPlanes ? kPixels : 1];
  uint32_t scan[kWarps];
  // in finish(), of a warp's cluster: squared length and pixels; the cluster itself where that is not finite, else kLeftOut
  double squared[kWarps];
  uint32_t count[kWarps], again[kWarps];
  int kept;  // pixels of the tile that are not left out; in sum_finite_pixels: of a cluster
};

// Sorts s.key[0, pixels), by a whole block; bitonic, padded to a power of two. A warp owns 64 neighbours while partners are
// at most 32 apart. s.kept: how many are not left out.
template <class T>
__device__ void sort_keys(T& s, int pixels) {
  int size = 64;
  while (size < pixels) size *= 2;
  for (int i = pixels + int(threadIdx.x); i < size; i += kThreads) s.key[i] = kLeftOut;
  if (threadIdx.x == 0) s.kept = 0;
  int before = size;  // how far apart the partners of the step before were; at first: keys come from any thread
  const int t = int(threadIdx.x);
  for (int run = 2; run <= size; run *= 2) {
    for (int apart = run / 2; apart > 0; apart /= 2) {
      if (apart > 32 || before > 32) {
        __syncthreads();  // the keys of other warps are those of the step before
      } else {
        __syncwarp();  // the same among the lanes
      }
      before = apart;
      if (t >= size / 2) continue;
      const int i = ((t & ~(apart - 1)) << 1) | (t & (apart - 1)), j = i + apart;
      const uint32_t a = s.key[i], b = s.key[j];
      if ((a > b) == ((i & run) == 0)) s.key[i] = b, s.key[j] = a;
    }
  }
  __syncthreads();  // the keys are sorted, kept is zero
  for (int i = t; i < pixels; i += kThreads) {
    if (s.key[i] != kLeftOut && (i + 1 == pixels || s.key[i + 1] == kLeftOut)) s.kept = i + 1;
  }
  __syncthreads();  // kept is known
}

// Keys by cluster and offsets of a tile, then sorted: pixel(i) is the i-th of it.
template <class T, class Pixel>
__device__ void load_tile(T& s, const PixelMap& x, const int64_t* __restrict__ cluster, uint32_t M, int pixels, Pixel pixel) {
  __syncthreads();  // the tile before has been read
  for (int i = int(threadIdx.x); i < pixels; i += kThreads) {
    const int64_t n = pixel(i), m = cluster[n];
    const bool keep = m >= 0 && m < M;
    s.offset[i] = keep ? x.offset(n) : -1;
    s.key[i] = keep ? uint32_t(m) << kIndexBits | uint32_t(i) : kLeftOut;
  }
  sort_keys(s, pixels);
}

// The first place from `begin` whose key is not below `key`.
template <class T>
__device__ inline int first_not_below(const T& s, uint32_t key, int begin) {
  int end = s.kept;
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (s.key[middle] < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// f(what the keys of a run share, its length) once a run, each by some thread of the block.
template <class T, class F>
__device__ void for_each_run(const T& s, F f) {
  for (int i = int(threadIdx.x); i < s.kept; i += kThreads) {
    const uint32_t m = s.key[i] >> kIndexBits;
    if (i == 0 || s.key[i - 1] >> kIndexBits != m) f(m, first_not_below(s, (m + 1) << kIndexBits, i) - i);
  }
}

// The threads that sum the same channels of a tile: member `piece` of `pieces`; the carry of member p is at first + p * step.
struct Team {
  int pieces, piece, first, step;
};

// Sums of the runs of a sorted tile, a piece of equal length for each member. A run that ends in the piece where it began is
// given to sink(m, sum) at once; of others the later pieces leave their sums in `carry`, and the first adds them in order: one
// call a run, in a fixed order of addition. kAhead loads are in flight. sync(): a barrier for the team.
template <int kAhead, class T, class Load, class Sink, class Sync>
__device__ __forceinline__ void sum_runs(T& s, const Team& team, int kept, Load load, Sink sink, Sync sync) {
  using Element = typename T::Element;
  constexpr int kChannels = T::kChannels;
  const int length = int(divide_up(kept, team.pieces));
  const int begin = min(kept, team.piece * length), end = min(kept, begin + length), mine = team.first + team.piece * team.step;
  float sum[kChannels] = {};
  uint32_t m = 0;
  bool continued = false;  // the run began in an earlier piece
  if (begin < end) {
    m = s.key[begin] >> kIndexBits;
    continued = begin > 0 && s.key[begin - 1] >> kIndexBits == m;
  }
  const auto leave = [&] {
#pragma unroll
    for (int c = 0; c < kChannels; c++) s.carry[c][mine] = sum[c];
  };
  for (int i = begin; i < end; i += kAhead) {
    decltype(load(0)) v[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      v[a] = {};  // behind the end zeros are added to the last run
      if (i + a < end) v[a] = load(int(s.key[i + a] & kIndex));
    }
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const uint32_t here = s.key[min(i + a, end - 1)] >> kIndexBits;
      if (here != m) {
        if (continued) {
          leave();
        } else {
          sink(m, sum);
        }
        continued = false, m = here;
#pragma unroll
        for (int c = 0; c < kChannels; c++) sum[c] = 0;
      }
#pragma unroll
      for (int c = 0; c < kChannels; c++) sum[c] += unpack<Element>(v[a], c);
    }
  }
  if (begin < end && continued) leave();
  sync();  // the carries are complete
  if (begin < end && !continued) {
    for (int piece = team.piece + 1; piece < team.pieces && piece * length < kept; piece++) {
      if (s.key[piece * length] >> kIndexBits != m) break;
#pragma unroll
      for (int c = 0; c < kChannels; c++) sum[c] += s.carry[c][team.first + piece * team.step];
    }
    sink(m, sum);
  }
  sync();  // the carries have been read, and what was staged
}

// sink(m, d, sum) for each run of a loaded tile and each slice of its channels: sum[c] belongs to channel d + c; those from D
// on are zeros.
template <class S, Source kSource, class Sink>
__device__ void sum_tile(Tile<S, kSource>& s, const PixelMap& x, int pixels, Sink sink) {
  using T = Tile<S, kSource>;
  const S* data = static_cast<const S*>(x.data);
  if constexpr (!T::kPlanes) {
    const int D = int(x.D), vectors = int(divide_up(D, T::kChannels));
    const int group = vectors > 16 ? 32 : vectors > 8 ? 16 : 8;  // lanes of a pixel
    const int lane = int(threadIdx.x) % group;
    const Team team{kThreads / group, int(threadIdx.x) / group, lane, group};
    for (int first = 0; first < vectors; first += group) {
      const int d = (first + lane) * T::kChannels;
      const auto load = [&](int i) {
        const S* from = data + s.offset[i] + d;
        Words<16> v = {};
        if constexpr (kSource == Source::vectors) {
          v = *reinterpret_cast<const Words<16>*>(from);
        } else {
#pragma unroll
          for (int c = 0; c < T::kChannels; c++) {
            if (d + c < D) set(v, c, from[c]);
          }
        }
        return v;
      };
      sum_runs<kSource == Source::vectors ? 4 : 2>(
          s, team, d < D ? s.kept : 0, load, [&](uint32_t m, const auto& sum) { sink(m, d, sum); }, [] { __syncthreads(); });
    }
  } else {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    auto& stage = s.stage[warp];
    const int D = int(x.D);
    for (int d = warp * T::kChannels; d < D; d += kWarps * T::kChannels) {
      constexpr int kAhead = 8 / int(sizeof(S));
      for (int first = lane; first < pixels; first += kAhead * 32) {
        S v[kAhead][T::kChannels];
#pragma unroll
        for (int a = 0; a < kAhead; a++) {
          const int i = first + a * 32;
          const int64_t offset = i < pixels ? s.offset[i] : -1;
#pragma unroll
          for (int c = 0; c < T::kChannels; c++) {
            v[a][c] = {};
            if (offset >= 0 && d + c < D) v[a][c] = data[offset + (d + c) * x.sd];
          }
        }
#pragma unroll
        for (int a = 0; a < kAhead; a++) {
          Words<int(sizeof(S)) * 4> words = {};
#pragma unroll
          for (int c = 0; c < T::kChannels; c++) set(words, c, v[a][c]);
          if (first + a * 32 < pixels) stage[first + a * 32] = words;
        }
      }
      __syncwarp();  // the stage is complete
      sum_runs<4>(
          s, Team{32, lane, warp * 32, 1}, s.kept, [&](int i) { return stage[i]; },
          [&](uint32_t m, const auto& sum) { sink(m, d, sum); }, [] { __syncwarp(); });
    }
  }
}

// sum [D] of the finite pixels of cluster m, by a whole block, in the order of pixels; returns how many they are. Reads all
// clusters: only for what is not finite.
template <class S, class T>
__device__ uint32_t sum_finite_pixels(T& s, const PixelMap& x, const int64_t* __restrict__ cluster, uint32_t m, float* sum) {
  constexpr int kPart = T::kPixels < kThreads ? T::kPixels : kThreads;  // pixels looked at in a step
  const S* data = static_cast<const S*>(x.data);
  const int D = int(x.D);
  const int t = int(threadIdx.x), lane = t % 32, warp = t / 32;
  uint32_t count = 0;
  for (int d = t; d < D; d += kThreads) sum[d] = 0;
  for (int64_t first = 0; first < x.N; first += kPart) {
    const bool found = t < kPart && first + t < x.N && cluster[first + t] == m;
    const unsigned lanes = __ballot_sync(~0u, found);
    if (lane == 0) s.scan[warp] = __popc(lanes);
    __syncthreads();  // scan is complete
    int at = __popc(lanes & ((1u << lane) - 1)), all = 0;
    for (int w = 0; w < kWarps; w++) at += w < warp ? s.scan[w] : 0, all += s.scan[w];
    if (found) s.offset[at] = x.offset(first + t);
    __syncthreads();  // the offsets are listed; scan may be written again
    for (int i = warp; i < all; i += kWarps) {
      const S* pixel = data + s.offset[i];
      float zero = 0;  // 0 * NaN and 0 * Inf are NaN
#pragma unroll 1
      for (int d = lane; d < D; d += 32) zero += 0.f * to_float(pixel[d * x.sd]);
      const bool bad = __ballot_sync(~0u, !(zero == 0.f)) != 0;  // every lane has read the offset
      if (lane == 0 && bad) s.offset[i] = -1;
    }
    __syncthreads();  // what is left out is marked
#pragma unroll 1
    for (int i = 0; i < all; i++) count += s.offset[i] >= 0;
    for (int d = t; d < D; d += kThreads) {
      float part = 0;
#pragma unroll 1
      for (int i = 0; i < all; i++) part += s.offset[i] >= 0 ? to_float(data[s.offset[i] + d * x.sd]) : 0.f;
      sum[d] += part;
    }
    __syncthreads();  // the offsets have been read; after the last step: the sum is complete
  }
  return count;
}

constexpr double kLargestSquare = std::numeric_limits<double>::max();
__device__ inline bool usable(double squared) { return squared > 0 && squared <= kLargestSquare; }

// p [D] <- unit(g * p + (1 - g) * unit(sum)), by a warp; `squared` is <sum, sum>. What has no direction changes nothing.
__device__ inline void move(float* p, const float* sum, double squared, double g, int D) {
  const int lane = int(threadIdx.x) % 32;
  if (!usable(squared)) return;
  const double c = (1 - g) / sqrt(squared);
  double updated = 0;
  for (int d = lane; d < D; d += 32) {
    const double u = g * p[d] + c * sum[d];
    updated += u * u;
  }
  updated = warp_sum(updated);
  if (!usable(updated)) return;
  const double r = 1 / sqrt(updated);
  for (int d = lane; d < D; d += 32) p[d] = float((g * p[d] + c * sum[d]) * r);
}

__device__ inline double squared_length(const float* v, int D) {
  double squared = 0;
  for (int d = int(threadIdx.x) % 32; d < D; d += 32) squared += double(v[d]) * v[d];
  return warp_sum(squared);
}

// The end, a warp a sub-centroid: total(m) makes the row sums + m * pitch, visible to the warp, and
// returns the pixels of it; then those whose sum is not finite are summed again, by the whole block; then done(m, count, sum,
// squared) by the warp.
template <class S, class T, class Total, class Done>
__device__ void finish(T& s, const PixelMap& x, const int64_t* __restrict__ cluster, uint32_t M, float* sums, int64_t pitch,
                       Total total, Done done) {
  const int warp = int(threadIdx.x) / 32;
  const auto note = [&](uint32_t count, double squared) {
    if (threadIdx.x % 32 == 0) s.count[warp] = count, s.squared[warp] = squared;
  };
  for (uint32_t first = blockIdx.x * kWarps; first < M; first += gridDim.x * kWarps) {
    {
      const uint32_t m = first + warp, count = m < M ? total(m) : 0;
      const double squared = count > 0 ? squared_length(sums + m * pitch, int(x.D)) : 0;
      note(count, squared);
      if (threadIdx.x % 32 == 0) s.again[warp] = squared <= kLargestSquare ? kLeftOut : m;
    }
    __syncthreads();  // again is complete
    for (int w = 0; w < kWarps; w++) {
      const uint32_t m = s.again[w];
      if (m == kLeftOut) continue;
      const uint32_t finite = sum_finite_pixels<S>(s, x, cluster, m, sums + m * pitch);
      if (w == warp) note(finite, squared_length(sums + m * pitch, int(x.D)));
    }
    __syncwarp();  // what lane 0 noted is there
    const uint32_t m = first + warp;
    if (m < M) done(m, s.count[warp], sums + m * pitch, s.squared[warp]);
    __syncthreads();  // again has been read
  }
}

}  // namespace momentum

// The deterministic kernel (momentum_ordered.cu): `centroids` null: sums and counts alone.
size_t ordered_workspace(const View& x, int64_t M);
Status ordered_update(const View& x, const int64_t* cluster, float* centroids, double momentum, float* sums, int64_t* counts,
                      int64_t M, const Launch& where);

}  // namespace cuda
}  // namespace dnc
