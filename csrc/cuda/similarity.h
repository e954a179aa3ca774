// What the CUDA similarity kernels share, whatever multiplies (similarity_sm90.h, similarity_sm80.h): where a thread's numbers
// lie, the max over K, the layout of pixels and sub-centroids in shared memory.
//
// A warp owns 16 pixels. In the accumulators of a product with kColumns packed sub-centroids a lane (g = lane / 4, q = lane %
// 4) holds, of the pixels g and g + 8 (`h` = 0 and 1), the columns 8 i + 2 q and the next: kOwn = kColumns / 4 of each pixel.
// Packing puts whole classes there: element e of lane q is sub-centroid e % K of class 4 slot + q, slot = tile * per_lane + e /
// K. So the max over K never leaves the thread, K needs no padding, and the classes of a quad of lanes are neighbours.
#pragma once
#include <cmath>
#include <type_traits>

#include "common.h"
#include "dnc/similarity.h"

namespace dnc {
namespace cuda {

// Packed sub-centroids of a lane, for each of its pixels: K = 1, 2, 4, 5, 10 and 20 leave none of them empty
constexpr int kOwn = similarity_limits::max_subcentroids;
constexpr int kColumns = 4 * kOwn;   // of a tile
constexpr int kSums = kColumns / 2;  // accumulators of a thread
constexpr int kFragments = kColumns / 16;
constexpr int kBox = 64;         // channels of a box: 128 bytes, one swizzle row
constexpr int kMaxWarps = 8;     // of a block, with pixels of their own
constexpr int kMaxBlocks = 192;  // blocks of a persistent launch; a shape's workspace does not depend on the device

// Where a group of pixels lies: `offset` within the run of pixels `image`.
struct Place {
  int image, offset;
};

// Pixels in memory: rows [N,D] with adjacent channels (one run of N pixels), or, as planes, [B,D,HW] with adjacent pixels (a
// run an image). Strides in elements, multiples of 8.
struct PixelRuns {
  void* data;
  int images, run;
  int64_t image_stride, stride;  // of a pixel, or as planes of a channel
  __device__ Place place(int group, int pixels) const {
    const int in_run = (run + pixels - 1) / pixels;
    return {group / in_run, group % in_run * pixels};
  }
  __device__ int groups(int pixels) const { return (run + pixels - 1) / pixels * images; }
};

// The product's shape and inputs, for every kernel.
struct Problem {
  int N, C, K, D;
  int boxes;              // of channels
  int per_lane;           // whole classes of a lane in a tile of sub-centroids
  unsigned begins, ends;  // bit e: element e of a lane is the first, the last sub-centroid of a class
  int tiles, slots;
  Metric metric;
  bool planes;
  PixelRuns x;        // 16-bit
  const void* rows;   // packed sub-centroids [tiles * kColumns, 64 boxes], of x's dtype
  const float* bias;  // [tiles * kColumns] -|p|^2, for sqeuclidean, else nullptr
  const int64_t* labels;
  float* own;  // out, optional: [N,K]
};

// What a thread knows of its two pixels.
struct Rows {
  int first;                // pixel g; the other is first + 8
  int end;                  // of their run
  int label[2];             // -1: none, or a label that does not count
  float alpha[2], beta[2];  // similarity = alpha * product + beta (+ bias); alpha is NaN for a pixel with a non-finite feature
  __device__ int64_t n(int h) const { return first + 8 * h; }
  __device__ bool inside(int h) const { return first + 8 * h < end; }
};

// A group of at most 64 pixels in shared memory, 16 of which are this warp's: boxes of 64 channels, rows of 128 bytes in the
// 128-byte swizzle. A row is a pixel, or with kPlanes a channel.
template <bool kPlanes>
struct PixelTile {
  unsigned char* base;  // 1024-byte aligned
  int box_stride;       // bytes
  int row;              // the warp's first pixel

  // 16 bytes: channels 8 c .. 8 c + 7 of pixel `r` of the warp.
  __device__ unsigned char* chunk(int r, int box, int c) const {
    static_assert(!kPlanes, "channels are not adjacent");
    return base + box * box_stride + (row + r) * 128 + (c ^ (r & 7)) * 16;
  }
  // 16 bytes: pixels 8 c .. 8 c + 7 of the group, of channel d of the box.
  __device__ unsigned char* plane(int d, int box, int c) const {
    return base + box * box_stride + d * 128 + (c ^ (d & 7)) * 16;
  }
  // One element.
  __device__ uint16_t* element(int r, int box, int d) const {
    if constexpr (kPlanes) {
      return reinterpret_cast<uint16_t*>(plane(d, box, (row + r) / 8)) + (row + r) % 8;
    } else {
      return reinterpret_cast<uint16_t*>(chunk(r, box, d / 8)) + d % 8;
    }
  }
};

// Pixels g and g + 8 of the warp: labels, row lengths, whether all features are finite.
template <class T, bool kPlanes>
__device__ inline Rows read_rows(const Problem& p, const PixelTile<kPlanes>& x, const Place& at, int64_t ignore_index) {
  const int lane = lane_here(), g = lane / 4, q = lane % 4;
  Rows r;
  r.first = at.image * p.x.run + at.offset + x.row + g, r.end = at.image < p.x.images ? (at.image + 1) * p.x.run : 0;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    r.label[h] = -1;
    if (p.labels != nullptr && r.inside(h)) {
      const int64_t y = p.labels[r.n(h)];
      if (y != ignore_index && y >= 0 && y < p.C) r.label[h] = int(y);
    }
    float square = 0, zero = 0;  // 0 * NaN and 0 * Inf are NaN
    const auto add = [&](uint16_t bits) {
      const float v = to_float(T{bits});
      square = fmaf(v, v, square);
      zero = fmaf(0.f, v, zero);
    };
    for (int box = 0; box < p.boxes; box++) {
      if constexpr (kPlanes) {
#pragma unroll 4
        for (int d = q; d < kBox; d += 4) add(*x.element(g + 8 * h, box, d));
      } else {
#pragma unroll
        for (int c = q; c < 8; c += 4) {
          const uint4 v = *reinterpret_cast<const uint4*>(x.chunk(g + 8 * h, box, c));
          const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int i = 0; i < 4; i++) add(uint16_t(word[i])), add(uint16_t(word[i] >> 16));
        }
      }
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      square += __shfl_xor_sync(~0u, square, step);
      zero += __shfl_xor_sync(~0u, zero, step);
    }
    r.alpha[h] = zero == 0.f ? p.metric == Metric::cosine ? 1.f / fmaxf(sqrtf(square), 1e-12f) : 1.f : NAN;
    r.beta[h] = p.metric == Metric::sqeuclidean ? -square : 0.f;
  }
  return r;
}

// Where the classes of a lane begin and end among its elements: known when the kernel is compiled for K = kK, from the
// problem's bits for kK = 0.
template <int kK>
__device__ inline bool begins(const Problem& p, int e) {
  return kK > 0 ? e % kK == 0 && e + kK <= kOwn : (p.begins >> e & 1) != 0;
}
template <int kK>
__device__ inline bool ends(const Problem& p, int e) {
  return kK > 0 ? e % kK == kK - 1 : (p.ends >> e & 1) != 0;
}
// f with a constant: the K that DNC is published with, or 0 for any other.
template <class F>
__device__ inline void for_subcentroids(const Problem& p, F f) {
  if (p.K == 10) {
    f(std::integral_constant<int, 10>{});
  } else {
    f(std::integral_constant<int, 0>{});
  }
}

// Slots below this hold a class of this lane.
__device__ inline int slots_here(const Problem& p) { return (p.C + 3 - lane_here() % 4) / 4; }

// Scores of the labels' own sub-centroids in a tile's products to p.own; few lanes have any.
__device__ inline void store_own(const Problem& p, const Rows& r, const float (&s)[kSums], int tile) {
  if (p.own == nullptr) return;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int slot = r.label[h] / 4 - tile * p.per_lane;
    if (r.label[h] < 0 || r.label[h] % 4 != lane_here() % 4 || slot < 0 || slot >= p.per_lane) continue;
    const int first = slot * p.K;
    float* own = p.own + r.n(h) * p.K - first;
#pragma unroll
    for (int e = 0; e < kOwn; e++) {
      if (e >= first && e < first + p.K) own[e] = fmaf(s[e / 2 * 4 + 2 * h + e % 2], r.alpha[h], r.beta[h]);
    }
  }
}

// The max over K of every class in a tile's products: sink(h, slot, score, winner) for each class of this lane's pixels; scores
// of the label's sub-centroids go to p.own. Products are compared: a similarity grows with them, also when rounded.
template <class Sink>
__device__ inline void take_maxima(const Problem& p, const Rows& r, float (&s)[kSums], int tile, Sink& sink) {
  if (p.bias != nullptr) {
    const float* bias = p.bias + int64_t(tile) * kColumns + 2 * (lane_here() % 4);
#pragma unroll
    for (int e = 0; e < kOwn; e++) {
      const float b = __ldg(bias + e / 2 * 8 + e % 2);
      s[e / 2 * 4 + e % 2] += b, s[e / 2 * 4 + 2 + e % 2] += b;
    }
  }
  store_own(p, r, s, tile);
  for_subcentroids(p, [&](auto k) {
    constexpr int kK = decltype(k)::value;
    int slot = tile * p.per_lane, first = 0;
    const int end = slots_here(p);
    float best[2] = {0, 0};
    int winner[2] = {0, 0};
#pragma unroll
    for (int e = 0; e < kOwn; e++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float v = s[e / 2 * 4 + 2 * h + e % 2];
        const bool better = begins<kK>(p, e) || v > best[h];
        best[h] = better ? v : best[h];
        winner[h] = better ? e : winner[h];
      }
      if (ends<kK>(p, e)) {
        if (slot < end) {
#pragma unroll
          for (int h = 0; h < 2; h++) sink(h, slot, fmaf(best[h], r.alpha[h], r.beta[h]), winner[h] - first);
        }
        slot++, first = e + 1;
      }
    }
  });
}

// Own similarities of pixels without a label are zero.
__device__ inline void clear_own(const Problem& p, const Rows& r) {
  if (p.own == nullptr) return;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (!r.inside(h) || r.label[h] >= 0) continue;
    for (int k = lane_here() % 4; k < p.K; k += 4) p.own[r.n(h) * p.K + k] = 0;
  }
}

// ---- host

// Pixels that these kernels read or write in place; false: of no such layout.
bool runs_of(const View& x, PixelRuns* runs, bool* planes);
// What these kernels do not take: a sentence, else nullptr.
const char* refuses(const View& x, const View& centroids);

// Sub-centroids in the order of the products. rows and bias belong to the workspace.
struct Packed {
  int tiles, per_lane, boxes;
  void* rows;
  float* bias;
  Packed(Parts& parts, const View& centroids, Metric metric);
  cudaError_t pack(const View& centroids, Metric metric, DType dtype, cudaStream_t stream) const;
};

Problem problem_of(const View& x, const View& centroids, Metric metric, const Packed& packed);

}  // namespace cuda
}  // namespace dnc
