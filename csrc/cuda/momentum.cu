// p[m] <- unit(g * p[m] + (1 - g) * unit(sum of x[n] over cluster[n] == m)) where a pixel was counted (DNC, eq. 8).
//
// Reads x [N,D] or [B,D,H,W] (float32/float16/bfloat16, any strides) and cluster [N] int64; reads and writes centroids [M,D]
// float32. Bytes: x once, cluster twice, and in the workspace 8 N + O(N M / kWarpPixels) for sorting and O((M + N / kUnit) D)
// for partial sums. Plan:  sort the pixels by cluster (a stable counting sort: a warp owns kWarpPixels pixels and a column of
// the histogram), so that a cluster
//        is a run of pixel offsets; a block sums a unit of at most kUnit pixels of one cluster; a block per cluster adds its
//        units in order, moves the sub-centroid and renormalises it. Six launches and a memset on the caller's stream, no host
//        synchronisation.
// Where channels are adjacent, lanes are channels; else lanes are pixels (NCHW: coalesced as far as neighbours share a
// cluster). fp32 sums, fp64 lengths. Deterministic: no atomics, every sum has a fixed order. Non-finite pixels: a cluster whose
// sum is not finite is summed again by its block without them. Clusters outside [0,M) are ignored. Reference:
// dnc_kernels/ops/momentum/reference.py; the same on the CPU: csrc/cpu/momentum.cpp.
#include "common.h"
#include "dnc/momentum.h"

namespace dnc {
namespace cuda {
namespace {

constexpr int kWarpPixels = 512;  // of a histogram column: M * 4 bytes of histogram for so many pixels
constexpr int kUnit = 256;        // pixels of a partial sum
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChannels = 8;                // a lane's channels in a pass of momentum_sum_kernel
constexpr int kSlice = 32 * kChannels;      // channels of a block of it
constexpr int64_t kMaxPixels = UINT32_MAX;  // of the histogram's counters
static_assert(kSlice == kThreads, "momentum_sum_kernel writes one channel a thread");

// The parts of the workspace.
struct Workspace {
  uint32_t* histogram;  // [M, columns]: counts, then each column's first position within the cluster
  int64_t* start;       // [M + 1] first position of a cluster in `offset`
  int64_t* unit_start;  // [M + 1] first unit of a cluster
  int64_t* offset;      // [N] element offsets of the kept pixels, by cluster; a bad pixel's is turned into -1
  float* partial;       // [units, D]
  float* sums;          // [M, D]
  int64_t columns, units;
  size_t bytes;
};

Workspace layout(void* base, int64_t M, int64_t D, int64_t N) {
  Workspace w{};
  w.columns = divide_up(N, kWarpPixels), w.units = M + N / kUnit;  // every cluster has at most one unit that is not full
  Parts parts(base);
  w.histogram = parts.take<uint32_t>(M * w.columns);
  w.start = parts.take<int64_t>(M + 1);
  w.unit_start = parts.take<int64_t>(M + 1);
  w.offset = parts.take<int64_t>(N);
  w.partial = parts.take<float>(w.units * D);
  w.sums = parts.take<float>(M * D);
  w.bytes = parts.bytes();
  return w;
}

// Shared memory of a block, of every kernel here.
struct Shared {
  int64_t of_warp[kWarps];
  double sum_of_warp[kWarps];
  float part[kWarps][kSlice];
};

// Inclusive sum over the threads of a block of kThreads; *total: over all of them.
template <class T>
__device__ inline T block_scan(T v, T* total) {
  int64_t* of_warp = shared_memory<Shared>()->of_warp;
  v = warp_scan(v);
  if (threadIdx.x % 32 == 31) of_warp[threadIdx.x / 32] = int64_t(v);
  __syncthreads();  // of_warp is complete
  T before = 0, all = 0;
  for (int w = 0; w < kWarps; w++) {
    if (w < int(threadIdx.x) / 32) before += T(of_warp[w]);
    all += T(of_warp[w]);
  }
  __syncthreads();  // of_warp has been read and may be written again
  *total = all;
  return before + v;
}

__device__ inline double block_sum(double v) { return cuda::block_sum<kWarps>(v, shared_memory<Shared>()->sum_of_warp); }

// Walks the pixels of a warp in steps of 32 and keeps a count for each cluster in the warp's own column of the histogram, which
// holds the number of pixels seen before. kScatter: the column starts at the positions, and the offsets of the pixels are
// written there.
template <bool kScatter>
__global__ void __launch_bounds__(kThreads)
    momentum_sort_kernel(PixelMap x, const int64_t* __restrict__ cluster, int64_t M, Workspace w) {
  const int lane = threadIdx.x % 32;
  const int64_t column = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (column >= w.columns) return;
  for (int64_t first = column * kWarpPixels; first < (column + 1) * kWarpPixels && first < x.N; first += 32) {
    const int64_t n = first + lane;
    int64_t m = n < x.N ? cluster[n] : -1;
    if (m < 0 || m >= M) m = -1;
    // peers: the lanes of this step with the same cluster, lane order is pixel order
    const unsigned peers = __match_any_sync(~0u, static_cast<unsigned long long>(m));
    const unsigned before = __popc(peers & ((1u << lane) - 1));
    uint32_t seen = 0;
    if (m >= 0) seen = w.histogram[m * w.columns + column];
    if (kScatter && m >= 0) w.offset[w.start[m] + seen + before] = x.offset(n);
    __syncwarp();  // all peers have read the count before one of them moves it
    if (m >= 0 && before == 0) w.histogram[m * w.columns + column] = seen + __popc(peers);
    __syncwarp();  // the next step sees it
  }
}

// A block per cluster: histogram[m, :] becomes its exclusive sum, start[m + 1] the cluster's pixels.
__global__ void __launch_bounds__(kThreads) momentum_columns_kernel(Workspace w) {
  const int64_t m = blockIdx.x;
  uint32_t before = 0;
  for (int64_t first = 0; first < w.columns; first += kThreads) {
    const int64_t c = first + threadIdx.x;
    const uint32_t count = c < w.columns ? w.histogram[m * w.columns + c] : 0;
    uint32_t total;
    const uint32_t upto = block_scan(count, &total);
    if (c < w.columns) w.histogram[m * w.columns + c] = before + upto - count;
    before += total;
  }
  if (threadIdx.x == 0) w.start[m + 1] = before;
}

// One block: start and unit_start from the clusters' pixels.
__global__ void __launch_bounds__(kThreads) momentum_starts_kernel(int64_t M, Workspace w) {
  int64_t pixels = 0, units = 0;
  for (int64_t first = 0; first < M; first += kThreads) {
    const int64_t m = first + threadIdx.x;
    const int64_t count = m < M ? w.start[m + 1] : 0;
    int64_t total_pixels, total_units;
    const int64_t upto_pixels = block_scan(count, &total_pixels);
    const int64_t upto_units = block_scan(divide_up(count, kUnit), &total_units);
    if (m < M) w.start[m + 1] = pixels + upto_pixels, w.unit_start[m + 1] = units + upto_units;
    pixels += total_pixels, units += total_units;
  }
  if (threadIdx.x == 0) w.start[0] = 0, w.unit_start[0] = 0;
}

// A block sums one unit over one slice of channels; grid (units at most, slices).
template <class S>
__global__ void __launch_bounds__(kThreads) momentum_sum_kernel(PixelMap x, int64_t M, Workspace w) {
  auto& part = shared_memory<Shared>()->part;
  const S* data = static_cast<const S*>(x.data);
  const int64_t unit = blockIdx.x, d0 = int64_t(blockIdx.y) * kSlice;
  if (unit >= w.unit_start[M]) return;
  int64_t m = 0;  // the last cluster whose first unit is not after this one: it owns the unit
  for (int64_t end = M; end - m > 1;) {
    const int64_t middle = m + (end - m) / 2;
    if (w.unit_start[middle] <= unit) {
      m = middle;
    } else {
      end = middle;
    }
  }
  const int64_t begin = w.start[m] + (unit - w.unit_start[m]) * kUnit;
  const int64_t end = begin + kUnit < w.start[m + 1] ? begin + kUnit : w.start[m + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* out = w.partial + unit * x.D;
  if (x.sd == 1) {
    float sum[kChannels] = {};  // channels d0 + lane, d0 + lane + 32, ...; pixels warp, warp + kWarps, ...
    for (int64_t i = begin + warp; i < end; i += kWarps) {
      const S* row = data + w.offset[i] + d0;
#pragma unroll
      for (int c = 0; c < kChannels; c++) {
        const int d = c * 32 + lane;
        if (d0 + d < x.D) sum[c] += to_float(row[d]);
      }
    }
#pragma unroll
    for (int c = 0; c < kChannels; c++) part[warp][c * 32 + lane] = sum[c];
    __syncthreads();  // the warps' sums are complete
    if (d0 + threadIdx.x < x.D) {
      float total = 0;
      for (int v = 0; v < kWarps; v++) total += part[v][threadIdx.x];
      out[d0 + threadIdx.x] = total;
    }
  } else {
    for (int64_t d = d0 + warp; d < d0 + kSlice && d < x.D; d += kWarps) {
      float sum = 0;
      for (int64_t i = begin + lane; i < end; i += 32) sum += to_float(data[w.offset[i] + d * x.sd]);
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) out[d] = sum;
    }
  }
}

// Sums of the finite pixels of cluster m, by a whole block; returns how many they are. A thread owns channels threadIdx.x, +
// kThreads, ...
template <class S>
__device__ int64_t sum_finite_pixels(const PixelMap& x, const Workspace& w, int64_t m) {
  const S* data = static_cast<const S*>(x.data);
  const int lane = threadIdx.x % 32;
  double bad = 0;
  for (int64_t i = w.start[m] + threadIdx.x / 32; i < w.start[m + 1]; i += kWarps) {
    const S* row = data + w.offset[i];
    float zero = 0;  // 0 * NaN and 0 * Inf are NaN
    for (int64_t d = lane; d < x.D; d += 32) zero += 0.f * to_float(row[d * x.sd]);
    if (__ballot_sync(~0u, !(zero == 0.f)) != 0) {
      if (lane == 0) w.offset[i] = -1, bad += 1;
    }
  }
  const int64_t kept =
      w.start[m + 1] - w.start[m] - int64_t(block_sum(bad));  // its barrier also publishes the offsets to the block
  for (int64_t d = threadIdx.x; d < x.D; d += kThreads) {
    float total = 0, sum = 0;
    int left = kUnit;
    for (int64_t i = w.start[m]; i < w.start[m + 1]; i++) {
      if (w.offset[i] < 0) continue;
      sum += to_float(data[w.offset[i] + d * x.sd]);
      if (--left == 0) total += sum, sum = 0, left = kUnit;
    }
    w.sums[m * x.D + d] = total + sum;
  }
  return kept;
}

__device__ inline bool usable(double squared) { return squared > 0 && squared <= 1.7976931348623157e308; }

// A block per cluster: adds its units in order, then EMA and renormalisation.
template <class S>
__global__ void __launch_bounds__(kThreads)
    momentum_update_kernel(float* __restrict__ centroids, PixelMap x, double momentum, Workspace w) {
  const int64_t m = blockIdx.x;
  if (w.start[m] == w.start[m + 1]) return;
  float* p = centroids + m * x.D;
  float* sums = w.sums + m * x.D;  // a thread reads back only what it wrote itself
  double squared = 0;
  for (int64_t d = threadIdx.x; d < x.D; d += kThreads) {
    float total = 0;
    for (int64_t u = w.unit_start[m]; u < w.unit_start[m + 1]; u++) total += w.partial[u * x.D + d];
    sums[d] = total;
    squared += double(total) * total;
  }
  squared = block_sum(squared);
  if (!(squared <= 1.7976931348623157e308)) {  // a bad pixel, or an overflow
    if (sum_finite_pixels<S>(x, w, m) == 0) return;
    squared = 0;
    for (int64_t d = threadIdx.x; d < x.D; d += kThreads) squared += double(sums[d]) * sums[d];
    squared = block_sum(squared);
  }
  if (!usable(squared)) return;
  const double c = (1 - momentum) / sqrt(squared);
  double updated = 0;
  for (int64_t d = threadIdx.x; d < x.D; d += kThreads) {
    const double u = momentum * p[d] + c * sums[d];
    updated += u * u;
  }
  updated = block_sum(updated);
  if (!usable(updated)) return;
  const double r = 1 / sqrt(updated);
  for (int64_t d = threadIdx.x; d < x.D; d += kThreads) p[d] = float((momentum * p[d] + c * sums[d]) * r);
}

template <class S>
Status update(const MomentumUpdate& a, const PixelMap& x, int64_t M, const Workspace& w, cudaStream_t stream) {
  const int64_t* cluster = a.cluster.as<int64_t>();
  const unsigned sorters = unsigned(divide_up(w.columns, kWarps)), clusters = unsigned(M);
  const auto grid = [&](dim3 blocks) { return Grid{blocks, kThreads, stream, sizeof(Shared)}; };
  DNC_CHECK(cudaMemsetAsync(w.histogram, 0, size_t(M * w.columns) * sizeof(uint32_t), stream));
  DNC_CHECK(launch(grid(sorters), momentum_sort_kernel<false>, x, cluster, M, w));
  DNC_CHECK(launch(grid(clusters), momentum_columns_kernel, w));
  DNC_CHECK(launch(grid(1), momentum_starts_kernel, M, w));
  DNC_CHECK(launch(grid(sorters), momentum_sort_kernel<true>, x, cluster, M, w));
  DNC_CHECK(launch(grid(dim3(unsigned(w.units), unsigned(divide_up(x.D, kSlice)))), momentum_sum_kernel<S>, x, M, w));
  DNC_CHECK(launch(grid(clusters), momentum_update_kernel<S>, a.centroids.as<float>(), x, a.momentum, w));
  return {};
}

}  // namespace

size_t momentum_update_workspace(const MomentumUpdate& a) {
  return layout(nullptr, a.centroids.size[0], a.centroids.size[1], a.cluster.size[0]).bytes;
}

Status momentum_update(const MomentumUpdate& a, const Launch& where) {
  const PixelMap x(a.x);
  const int64_t M = a.centroids.size[0];
  if (a.centroids.dtype != DType::float32) return bad_argument("centroids must be float32");
  if (x.N > kMaxPixels) return bad_argument("x must have fewer than 2^32 pixels");
  if (M > INT32_MAX || M + x.N / kUnit > INT32_MAX || divide_up(x.D, kSlice) > 65535) {
    return bad_argument("x and centroids must fit a launch grid: fewer than 2^31 sub-centroids and 2^24 channels");
  }
  if (x.N == 0 || M == 0) return {};
  if (!enough(where, momentum_update_workspace(a))) return too_small();
  const OnDevice device(where);
  DNC_CHECK(device.error());
  const Workspace w = layout(where.workspace, M, x.D, x.N);
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  switch (a.x.dtype) {
    case DType::float32: return update<float>(a, x, M, w, stream);
    case DType::float16: return update<Float16>(a, x, M, w, stream);
    case DType::bfloat16: return update<BFloat16>(a, x, M, w, stream);
    default: return bad_argument("x must be float32, float16 or bfloat16");
  }
}

}  // namespace cuda
}  // namespace dnc
