// What the embedding kernels share, forward and backward: who owns which channels of which pixels, accesses of 8 and 16 bytes,
// tiles of pixels in shared memory, and sums over the channels of a pixel.
#pragma once
#include <cstring>
#include <type_traits>

#include "common.h"
#include "dnc/embedding.h"

namespace dnc {
namespace cuda {
namespace embedding {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRowThreads = 384;  // most threads of a block that owns a row
template <int kWidth>
constexpr int kRowChannels = kWidth == 1 ? 8 : 16;  // of each of them
constexpr int kTilePixels = 64;                     // most pixels of a tile

template <class S>
constexpr int kPiece = 16 / int(sizeof(S));  // elements of a 16-byte access
template <class S, bool kStaged>
constexpr int kPack = kStaged ? 8 / int(sizeof(S)) : 1;  // pixels of a thread of a tile: 8 bytes of a channel

// K elements side by side, on a border of their size: one access.
template <class S, int K>
struct alignas(K * sizeof(S)) Pack {
  S at[K];
};
template <class S, int K>
__device__ inline void load_pack(float (&v)[K], const S* p) {
  const Pack<S, K> pack = *reinterpret_cast<const Pack<S, K>*>(p);
#pragma unroll
  for (int i = 0; i < K; i++) v[i] = to_float(pack.at[i]);
}
template <class S, int K>
__device__ inline void store_pack(S* p, const float (&v)[K]) {
  Pack<S, K> pack;
  if constexpr (sizeof(S) == 2 && K > 1) {
    uint32_t words[K / 2];
#pragma unroll
    for (int i = 0; i < K / 2; i++) words[i] = pack_pair<S>(v[2 * i], v[2 * i + 1]);
    memcpy(&pack, words, sizeof pack);
  } else {
#pragma unroll
    for (int i = 0; i < K; i++) pack.at[i] = from_float<S>(v[i]);
  }
  *reinterpret_cast<Pack<S, K>*>(p) = pack;
}

// A [N,D] or [B,D,H,W] array and whether its 16-byte pieces may be accessed whole: pieces of channels for kernels of rows, of
// pixels for kernels of tiles.
struct Features : PixelMap {
  bool wide = false;
};

// K elements of channels d, d + 1, ... of the pixel at `row`: one access.
template <int K, class S>
__device__ inline void load_channels(float (&v)[K], const S* row, const Features& f, int64_t d) {
  load_pack<S, K>(v, row + d * (K == 1 ? f.sd : 1));
}
template <int K, class S>
__device__ inline void store_channels(S* row, const Features& f, int64_t d, const float (&v)[K]) {
  store_pack<S, K>(row + d * (K == 1 ? f.sd : 1), v);
}
// The same where f may have another layout than the features whose pieces are whole.
template <int K, class S>
__device__ inline void load_foreign(float (&v)[K], const S* row, const Features& f, int64_t d) {
  if (K == 1 || f.wide) {
    load_channels<K>(v, row, f, d);
  } else {
#pragma unroll
    for (int i = 0; i < K; i++) v[i] = to_float(row[(d + i) * f.sd]);
  }
}
// K elements of weight or bias; `other` where it is not given.
template <int K>
__device__ inline void load_parameter(float (&v)[K], const float* p, int64_t d, float other) {
  constexpr int kPart = K < 4 ? K : 4;
#pragma unroll
  for (int i = 0; i < K; i += kPart) {
    float part[kPart];
    if (p != nullptr) load_pack<float, kPart>(part, p + d + i);
#pragma unroll
    for (int j = 0; j < kPart; j++) v[i + j] = p != nullptr ? part[j] : other;
  }
}

// Sums over the threads of a row, which all get them: `lanes` lanes of a warp (a power of two), or with kBlock the block.
// of_warp [kSums][32]: must not be in use by a sum before the last one (that sum's barrier is what frees it).
template <bool kBlock, int kSums>
__device__ inline void row_sums(float (&v)[kSums], int lanes, float (*of_warp)[32]) {
  for (int step = (kBlock ? 32 : lanes) / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < kSums; i++) v[i] += __shfl_xor_sync(~0u, v[i], step);
  }
  if constexpr (kBlock) {
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < kSums; i++) of_warp[i][threadIdx.x / 32] = v[i];
    }
    __syncthreads();  // of_warp is complete
#pragma unroll
    for (int i = 0; i < kSums; i++) v[i] = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) {
#pragma unroll
      for (int i = 0; i < kSums; i++) v[i] += of_warp[i][w];
    }
  }
}

// A tile: P pixels, all D channels. Thread t owns pixels t % words * K, + 1, ..., K of them, and channels t / words, + slices,
// ...; words * K = P and words * slices = kThreads.
struct Tile {
  int words, slices;
  __device__ int word() const { return int(threadIdx.x) % words; }
  __device__ int slice() const { return int(threadIdx.x) / words; }
};

// The sums of each warp, of K pixels a thread, into of_warp [kWarps][kSums][kTilePixels]. Ends with a barrier.
template <int kSums, int K>
__device__ inline void tile_sums(float (&v)[kSums][K], const Tile& tile, float (*of_warp)[kSums][kTilePixels]) {
  for (int step = 16; step >= tile.words; step /= 2) {
#pragma unroll
    for (int i = 0; i < kSums; i++) {
#pragma unroll
      for (int k = 0; k < K; k++) v[i][k] += __shfl_xor_sync(~0u, v[i][k], step);
    }
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane < tile.words) {
#pragma unroll
    for (int i = 0; i < kSums; i++) {
#pragma unroll
      for (int k = 0; k < K; k++) of_warp[warp][i][lane * K + k] = v[i][k];
    }
  }
  __syncthreads();  // of_warp is complete
}
// Of pixel p over the warps, in order.
template <int kSums>
__device__ inline void add_warps(float (&sum)[kSums], int p, const float (*of_warp)[kSums][kTilePixels]) {
#pragma unroll
  for (int i = 0; i < kSums; i++) sum[i] = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
#pragma unroll
    for (int i = 0; i < kSums; i++) sum[i] += of_warp[w][i][p];
  }
}

// Pixels first ... first + P of x into tile [D][P], zeros behind the last one. They arrive with copy_async_wait<0>.
template <class S>
__device__ inline void load_tile(S* tile, int P, const Features& x, int64_t first) {
  const int width = x.wide ? kPiece<S> : 1, pieces = P / width;
  const int p = int(threadIdx.x) % pieces * width, d0 = int(threadIdx.x) / pieces, step = kThreads / pieces;
  const bool here = first + p < x.N;
  const S* from = static_cast<const S*>(x.data) + (here ? x.offset(first + p) : 0);
  if (x.wide) {
    for (int d = d0; d < x.D; d += step) copy16_async(tile + d * P + p, here ? from + d * x.sd : from, here ? 16 : 0);
    copy_async_commit();
  } else {
#pragma unroll 4
    for (int d = d0; d < x.D; d += step) tile[d * P + p] = here ? from[d * x.sd] : S{};
  }
}
// And back.
template <class S>
__device__ inline void store_tile(const S* tile, int P, const Features& y, int64_t first) {
  const int width = y.wide ? kPiece<S> : 1, pieces = P / width;
  const int p = int(threadIdx.x) % pieces * width, d0 = int(threadIdx.x) / pieces, step = kThreads / pieces;
  if (first + p >= y.N) return;
  S* to = static_cast<S*>(y.data) + y.offset(first + p);
  using Piece = Pack<S, kPiece<S>>;
  for (int d = d0; d < y.D; d += step) {
    if (y.wide) {
      *reinterpret_cast<Piece*>(to + d * y.sd) = *reinterpret_cast<const Piece*>(tile + d * P + p);
    } else {
      to[d * y.sd] = tile[d * P + p];
    }
  }
}

// The pixels of a thread, channel by channel: of a tile in shared memory, or (not kStaged) of one pixel where it lies.
template <class S, bool kStaged>
struct Column {
  static constexpr int K = kPack<S, kStaged>;
  S* at;
  int64_t stride;
  bool here = true;
  Column(const Column&) = default;
  __device__ Column(S* tile, const Tile& shape) : at(tile + shape.word() * K), stride(shape.words * K) {}
  __device__ Column(const Features& x, int64_t n)
      : at(static_cast<S*>(x.data) + (n < x.N ? x.offset(n) : 0)), stride(x.sd), here(n < x.N) {}
  __device__ void load(float (&v)[K], int d) const {
    if (here) {
      load_pack<S, K>(v, at + d * stride);
    } else {
#pragma unroll
      for (int k = 0; k < K; k++) v[k] = 0;
    }
  }
  __device__ void store(int d, const float (&v)[K]) const {
    if (here) store_pack<S, K>(at + d * stride, v);
  }
};

// ---- on the host: who owns what

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
// Pixel n + 1 lies so far from pixel n.
inline int64_t pixel_step(const PixelMap& x) { return x.W > 1 ? x.sw : x.HW > x.W ? x.sh : x.sb; }
// NCHW and its like: pixels lie closer to each other than channels do. A repeated pixel is a row.
inline bool is_planes(const PixelMap& x) { return pixel_step(x) != 0 && x.sd > pixel_step(x); }

inline Features features(const View& v, bool planes) {
  Features f;
  static_cast<PixelMap&>(f) = PixelMap(v);
  const int64_t piece = v.dtype == DType::float32 ? 4 : 8;
  const bool maps = f.flat || (f.sb % piece == 0 && f.sh % piece == 0);
  f.wide = aligned(v.data) && maps &&
           (planes ? f.sw == 1 && f.W % piece == 0 && f.sd % piece == 0 : f.sd == 1 && f.D % piece == 0 && f.sw % piece == 0);
  return f;
}

// Rows: a row's lanes of a warp, and how many channels each of them has; or a block for a row.
struct RowPlan {
  int lanes, channels;  // channels: 8, 16 or 32 of a lane; 0: a block for a row
  unsigned threads;
  RowPlan(int64_t D, int width, int most) {
    const int64_t pieces = divide_up(D, width);
    lanes = 1;
    while (lanes < 32 && lanes < pieces) lanes *= 2;
    channels = 8, threads = kThreads;
    while (channels < most && lanes * int64_t(channels) < D) channels *= 2;
    if (lanes * int64_t(channels) >= D) return;
    channels = 0, threads = unsigned(round_up(divide_up(pieces, (width == 1 ? kRowChannels<1> : kRowChannels<2>) / width), 32));
  }
};

// Channels of the longest row that registers hold.
inline int largest_row(bool wide) { return kRowThreads * (wide ? kRowChannels<2> : kRowChannels<1>); }

// Tiles of planes: pixels of a tile, 0 where not even the smallest fits into a block's `limit` bytes of shared memory. A
// channel's piece of a tile is a line of 128 bytes where a multiprocessor then holds four blocks (one loads while others
// compute), else half a line where it holds two, else a sector of 32 bytes. Bytes of shared memory: `fixed`, and for a channel
// those of `tiles` pieces and `per_channel`.
inline int tile_pixels(int64_t D, int element, int tiles, int per_channel, size_t fixed, int limit, size_t* shared) {
  constexpr int kReserved = 1024;  // of every block, for the system; `limit` is a multiprocessor's memory less this
  for (int bytes = 128, blocks = 4; blocks > 0; bytes /= 2, blocks /= 2) {
    const int64_t needed = int64_t(fixed) + D * (bytes * tiles + per_channel);
    if (needed > (limit + kReserved) / blocks - kReserved) continue;
    *shared = size_t(needed);
    return bytes / element;
  }
  return 0;
}

}  // namespace embedding
}  // namespace cuda
}  // namespace dnc
