// Sums of the pixels of each sub-centroid, deterministic, and with them the momentum update (formula: momentum.cu).
//
// Reads x [N,D] or [B,D,H,W] (float32/float16/bfloat16, any strides) and cluster [N] int64; writes sums [M,D] float32 and
// counts [M] int64, or reads and writes centroids [M,D] float32. Bytes: x once, cluster twice (once gathered), and beside them,
// mostly in L2: 8 N of sorting, 8 (M / 16) (N / tile) of the histogram, and 8 D (M + 16 N / tile) of partial sums; a tile has
// 512 pixels, or 256 in float32 where channels are not adjacent. N = 131072, D = 256, M = 1500, bfloat16: 67 + 15 MB;
// at 3.0 TB/s 26 us, plus five barriers of the grid at 1-2 us and three short phases at 2-3 us: 40-45 us are expected where
// momentum.cu takes 30.
// Plan, in one cooperative launch after one memset, a barrier of the grid between the steps:
//   1. every tile of neighbouring pixels is sorted in shared memory by bucket, which is 16 neighbouring sub-centroids: pixels
//      of a bucket are neighbours where classes are coherent, though the K sub-centroids of a class alternate
//   2. a warp a bucket: its pixels in each tile become the places before them
//   3. one block: where each bucket starts
//   4. the pixels of every tile to their places: a stable counting sort by bucket
//   5. tiles of that order: sorted by sub-centroid in shared memory, a run's sum goes to its own row of partial sums
//   6. a warp a sub-centroid: its rows in order, then as in momentum.cu
// Deterministic: tiles and rows depend on shapes alone, every sum has a fixed order, there are no atomics but the barrier's.
// Reference: dnc_kernels/ops/momentum/reference.py; the same on the CPU: csrc/cpu/momentum.cpp.
#include "momentum.h"

namespace dnc {
namespace cuda {
namespace {

using namespace momentum;

constexpr int kTile = 512;  // pixels at most: two blocks a multiprocessor have work from 135,000 pixels on
constexpr int kBucketBits = 4, kBucket = 1 << kBucketBits;  // sub-centroids of a bucket: about a class or two

// The parts of the workspace; `arrived`, `histogram` and `pixels` are zero at first.
struct Workspace {
  unsigned* arrived;    // of the grid's barriers
  uint32_t* histogram;  // [buckets, tiles]: pixels, then the bucket's pixels in the tiles before
  uint32_t* pixels;     // [rows] of a partial sum
  uint32_t* start;      // [buckets + 1] first place of a bucket; before step 3 its pixels
  uint32_t* sorted;     // [N] keys of step 1, tile by tile
  uint32_t* order;      // [N] pixels by bucket
  float* partial;       // [rows, pitch]: of tile t and cluster m at (t + bucket of m) * 16 + m % 16
  float* sums;          // [M, pitch], where the caller wants none
  uint32_t tile, tiles, buckets, M;
  int64_t pitch;
  size_t zeros, bytes;
};

Workspace layout(void* base, int64_t N, int64_t D, int64_t M, int64_t tile) {
  Workspace w{};
  const int64_t tiles = divide_up(N, tile), buckets = divide_up(M, kBucket);
  w.tile = uint32_t(tile), w.tiles = uint32_t(tiles), w.buckets = uint32_t(buckets), w.M = uint32_t(M);
  w.pitch = round_up(D, 8);
  const int64_t rows = (tiles + buckets) * kBucket;  // t + bucket never falls along the order, and rises with either
  Parts parts(base);
  w.arrived = parts.take<unsigned>(1);
  w.histogram = parts.take<uint32_t>(buckets * tiles);
  w.pixels = parts.take<uint32_t>(rows);
  w.zeros = parts.bytes();
  w.start = parts.take<uint32_t>(buckets + 1);
  w.sorted = parts.take<uint32_t>(N);
  w.order = parts.take<uint32_t>(N);
  w.partial = parts.take<float>(rows * w.pitch);
  w.sums = parts.take<float>(M * w.pitch);
  w.bytes = parts.bytes();
  return w;
}

// What the kernel makes of the sums: either of the two.
struct Result {
  float* centroids;
  double momentum;
  float* sums;
  int64_t* counts;
};

// Step 2: an exclusive sum over the tiles.
__device__ void scan_buckets(const Workspace& w) {
  const int lane = int(threadIdx.x) % 32;
  for (uint32_t b = blockIdx.x * kWarps + threadIdx.x / 32; b < w.buckets; b += gridDim.x * kWarps) {
    uint32_t* row = w.histogram + int64_t(b) * w.tiles;
    uint32_t before = 0;
    for (uint32_t first = 0; first < w.tiles; first += 32) {
      const uint32_t t = first + lane, pixels = t < w.tiles ? row[t] : 0, upto = warp_scan(pixels);
      if (t < w.tiles) row[t] = before + upto - pixels;
      before += __shfl_sync(~0u, upto, 31);
    }
    if (lane == 0) w.start[b] = before;
  }
}

// Step 3: an exclusive sum over the buckets, by one block.
__device__ void scan_starts(const Workspace& w, uint32_t* of_warp) {
  const int warp = int(threadIdx.x) / 32;
  uint32_t before = 0;
  for (uint32_t first = 0; first < w.buckets; first += kThreads) {
    const uint32_t b = first + threadIdx.x, pixels = b < w.buckets ? w.start[b] : 0, upto = warp_scan(pixels);
    if (threadIdx.x % 32 == 31) of_warp[warp] = upto;
    __syncthreads();  // of_warp is complete
    uint32_t at = before + upto - pixels;
    for (int v = 0; v < kWarps; v++) at += v < warp ? of_warp[v] : 0, before += of_warp[v];
    if (b < w.buckets) w.start[b] = at;
    __syncthreads();  // of_warp has been read
  }
  if (threadIdx.x == 0) w.start[w.buckets] = before;
}

// Step 6: w.sums of cluster m from its partial sums, in the order of tiles, by a warp; returns its pixels.
__device__ uint32_t add_rows(const Workspace& w, uint32_t m, int D) {
  const int lane = int(threadIdx.x) % 32;
  const uint32_t bucket = m >> kBucketBits, begin = w.start[bucket] / w.tile;
  const uint32_t end = uint32_t(divide_up(w.start[bucket + 1], w.tile));
  const auto row = [&](uint32_t tile) { return (tile + bucket) * kBucket + m % kBucket; };
  uint32_t count = 0;
  for (uint32_t tile = begin + lane; tile < end; tile += 32) count += w.pixels[row(tile)];
  for (int first = 4 * lane; first < D; first += 256) {
    float4 sum[2] = {};
#pragma unroll 2
    for (uint32_t tile = begin; tile < end; tile++) {
      const bool any = w.pixels[row(tile)] != 0;  // else the row was not written
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float4 v = {};
        if (any && first + 128 * c < D) v = *reinterpret_cast<const float4*>(w.partial + row(tile) * w.pitch + first + 128 * c);
        sum[c].x += v.x, sum[c].y += v.y, sum[c].z += v.z, sum[c].w += v.w;
      }
    }
#pragma unroll
    for (int c = 0; c < 2; c++) {
      if (first + 128 * c < D) *reinterpret_cast<float4*>(w.sums + m * w.pitch + first + 128 * c) = sum[c];
    }
  }
  __syncwarp();  // lanes read each other's sums from here on
  return warp_sum(count);
}

template <class S, Source kSource>
__global__ void __launch_bounds__(kThreads, 2)
    momentum_ordered_kernel(PixelMap x, const int64_t* __restrict__ cluster, Workspace w, Result result) {
  using T = Tile<S, kSource>;
  T& s = *shared_memory<T>();
  const uint32_t N = uint32_t(x.N);
  unsigned target = 0;
  for (uint32_t tile = blockIdx.x; tile < w.tiles; tile += gridDim.x) {
    const uint32_t first = tile * w.tile;
    const int pixels = int(min(w.tile, N - first));
    __syncthreads();  // the tile before has been read
    for (int i = int(threadIdx.x); i < pixels; i += kThreads) {
      const int64_t m = cluster[first + i];
      s.key[i] = m >= 0 && m < w.M ? uint32_t(m >> kBucketBits) << kIndexBits | uint32_t(i) : kLeftOut;
    }
    sort_keys(s, pixels);
    for_each_run(s, [&](uint32_t bucket, int length) { w.histogram[int64_t(bucket) * w.tiles + tile] = uint32_t(length); });
    for (int i = int(threadIdx.x); i < pixels; i += kThreads) w.sorted[first + i] = s.key[i];
  }
  grid_barrier(w.arrived, target);  // the histogram and the sorted tiles are complete
  scan_buckets(w);
  grid_barrier(w.arrived, target);  // so are the places within a bucket, and its pixels
  if (blockIdx.x == 0) scan_starts(w, s.scan);
  grid_barrier(w.arrived, target);  // so are the buckets' starts
  for (uint32_t tile = blockIdx.x; tile < w.tiles; tile += gridDim.x) {
    const uint32_t first = tile * w.tile;
    const int pixels = int(min(w.tile, N - first));
    __syncthreads();  // the tile before has been read
    for (int i = int(threadIdx.x); i < pixels; i += kThreads) s.key[i] = w.sorted[first + i];
    if (threadIdx.x == 0) s.kept = pixels;
    __syncthreads();  // the keys are there
    for (int i = int(threadIdx.x); i < pixels; i += kThreads) {
      if (s.key[i] == kLeftOut) continue;
      const uint32_t bucket = s.key[i] >> kIndexBits;
      const uint32_t before = uint32_t(i - first_not_below(s, bucket << kIndexBits, 0));  // of the bucket, in this tile
      w.order[w.start[bucket] + w.histogram[int64_t(bucket) * w.tiles + tile] + before] = first + (s.key[i] & kIndex);
    }
  }
  grid_barrier(w.arrived, target);  // the order is complete
  const uint32_t kept = w.start[w.buckets];
  for (uint32_t tile = blockIdx.x; tile * int64_t(w.tile) < kept; tile += gridDim.x) {
    const uint32_t first = tile * w.tile;
    const int pixels = int(min(w.tile, kept - first));
    const auto row = [&](uint32_t m) { return (tile + (m >> kBucketBits)) * kBucket + m % kBucket; };
    load_tile(s, x, cluster, w.M, pixels, [&](int i) { return w.order[first + i]; });
    for_each_run(s, [&](uint32_t m, int length) { w.pixels[row(m)] = uint32_t(length); });
    sum_tile<S, kSource>(s, x, pixels, [&](uint32_t m, int d, const auto& sum) {
#pragma unroll
      for (int c = 0; c < T::kChannels; c += 4) {
        *reinterpret_cast<float4*>(w.partial + row(m) * w.pitch + d + c) = float4{sum[c], sum[c + 1], sum[c + 2], sum[c + 3]};
      }
    });
  }
  grid_barrier(w.arrived, target);  // the partial sums are complete
  finish<S>(
      s, x, cluster, w.M, w.sums, w.pitch, [&](uint32_t m) { return add_rows(w, m, int(x.D)); },
      [&](uint32_t m, uint32_t count, const float* sum, double squared) {
        if (result.centroids != nullptr) {
          if (count > 0) move(result.centroids + m * x.D, sum, squared, result.momentum, int(x.D));
        } else {
          for (int d = threadIdx.x % 32; d < int(x.D); d += 32) result.sums[m * x.D + d] = sum[d];
          if (threadIdx.x % 32 == 0) result.counts[m] = count;
        }
      });
}

template <class S, Source kSource>
Status run(const PixelMap& x, const int64_t* cluster, int64_t M, const Result& result, const Launch& where) {
  using T = Tile<S, kSource>;
  const auto kernel = momentum_ordered_kernel<S, kSource>;
  const Workspace w = layout(where.workspace, x.N, x.D, M, min(T::kPixels, kTile));
  int processors, resident;
  DNC_CHECK(attribute(&processors, cudaDevAttrMultiProcessorCount));
  DNC_CHECK(resident_blocks(&resident, kernel, kThreads, sizeof(T)));
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  const int64_t blocks = max(int64_t(w.tiles), divide_up(M, kWarps));
  const Grid grid{unsigned(min(blocks, int64_t(processors) * min(resident, 2))), kThreads, stream, sizeof(T), 1, true};
  DNC_CHECK(cudaMemsetAsync(w.arrived, 0, w.zeros, stream));
  DNC_CHECK(launch(grid, kernel, x, cluster, w, result));
  return {};
}

template <class S>
Status run(const Pixels& x, const int64_t* cluster, int64_t M, const Result& result, const Launch& where) {
  switch (source_of(x, sizeof(S))) {
    case Source::vectors: return run<S, Source::vectors>(PixelMap(x), cluster, M, result, where);
    case Source::rows: return run<S, Source::rows>(PixelMap(x), cluster, M, result, where);
    default: return run<S, Source::planes>(PixelMap(x), cluster, M, result, where);
  }
}

}  // namespace

size_t ordered_workspace(const View& x, int64_t M) {
  const Pixels p(x);
  // for the smallest tiles: a size is a function of shapes, not of strides
  return layout(nullptr, p.N(), p.D, M,
                x.dtype == DType::float32 ? Tile<float, Source::planes>::kPixels : Tile<Float16, Source::planes>::kPixels)
      .bytes;
}

Status ordered_update(const View& x, const int64_t* cluster, float* centroids, double momentum, float* sums, int64_t* counts,
                      int64_t M, const Launch& where) {
  const Pixels p(x);
  const Status status = check_momentum(x.dtype, p.N(), p.D, M);
  if (!status.ok() || M == 0) return status;
  if (!enough(where, ordered_workspace(x, M))) return too_small();
  const OnDevice device(where);
  DNC_CHECK(device.error());
  if (p.N() == 0) {
    const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
    if (sums != nullptr) DNC_CHECK(cudaMemsetAsync(sums, 0, size_t(M * p.D) * sizeof(float), stream));
    if (counts != nullptr) DNC_CHECK(cudaMemsetAsync(counts, 0, size_t(M) * sizeof(int64_t), stream));
    return {};
  }
  const Result result{centroids, momentum, sums, counts};
  if (x.dtype == DType::float32) return run<float>(p, cluster, M, result, where);
  return x.dtype == DType::float16 ? run<Float16>(p, cluster, M, result, where) : run<BFloat16>(p, cluster, M, result, where);
}

size_t cluster_sums_workspace(const ClusterSums& a) { return ordered_workspace(a.x, a.sums.size[0]); }

Status cluster_sums(const ClusterSums& a, const Launch& where) {
  if (a.sums.dtype != DType::float32) return bad_argument("sums must be float32");
  return ordered_update(a.x, a.cluster.as<int64_t>(), nullptr, 0, a.sums.as<float>(), a.counts.as<int64_t>(), a.sums.size[0],
                        where);
}

}  // namespace cuda
}  // namespace dnc
