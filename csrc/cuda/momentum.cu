// p[m] <- unit(g * p[m] + (1 - g) * unit(sum of x[n] over cluster[n] == m)) where a pixel was counted (DNC, eq. 8).
//
// momentum_update_kernel  reads x [N,D] or [B,D,H,W] (float32/float16/bfloat16, any strides) and cluster [N] int64; reads and
//     writes centroids [M,D] float32. Bytes: x once, cluster once, sums and centroids [M,D] 4 times. Floor for N = 131072,
//     D = 256, M = 1500 on H100 (3.0 TB/s): 67 MB of bfloat16 in 22 us; 6 MB of sums and centroids stay in L2.
//     Plan: a block sorts 500 to 1,000 neighbouring pixels by sub-centroid in shared memory (bitonic: 55 steps on 1,024 keys,
//     about 1.5 us), sums each run in fp32, and adds it to [M,D] by one vector reduction for four channels. Two blocks a
//     multiprocessor, whose 32 warps have four loads of 512 bytes each on their way. Lanes are channels, 16 bytes each, where
//     channels are adjacent; else they are pixels, and a tile has at most 512 (256 in float32), since shared memory stages it.
//     Then a barrier of the grid, then a warp a sub-centroid over all blocks. One cooperative launch and one memset. The end is
//     not left to the last block: it moves 3 M D 4 = 4.6 MB (ADE20K), and one multiprocessor moves 25-100 GB/s, so it alone
//     would take 46-180 us; over all blocks it takes about 2 us beside 1-2 us of the barrier. Reductions: D / 4 a run. Where
//     neighbours share sub-centroids (40 in a tile of 500) 11 MB beside x's 67; without any coherence 1.2 pixels make a run and
//     they are 1.7 times x: then momentum_ordered.cu is the faster one. Not deterministic: tiles reach a sum in any order.
//     Deterministic: momentum_ordered.cu.
// apply_momentum_kernel   the same from sums [M,D] and counts [M]: a warp a sub-centroid, 3 M D 4 bytes, deterministic.
// Lengths are fp64. Non-finite pixels: only a NaN, an Inf or an overflow leaves a sum that is not finite; a block sums that
// sub-centroid again without them. Clusters outside [0,M) are left out. Reference: dnc_kernels/ops/momentum/reference.py; the
// same on the CPU: csrc/cpu/momentum.cpp.
#include "momentum.h"

namespace dnc {
namespace cuda {
namespace {

using namespace momentum;

constexpr int64_t kLeastTile = 128;  // pixels: with fewer, more blocks would have work, and runs would be shorter

// The parts of the workspace; all zero at first.
struct Workspace {
  unsigned* arrived;  // of the grid's barrier
  unsigned* counts;   // [M]
  float* sums;        // [M, pitch]
  int64_t pitch;
  size_t bytes;
};

Workspace layout(void* base, int64_t M, int64_t D) {
  Workspace w{};
  Parts parts(base);
  w.pitch = round_up(D, 8);  // vectors of every slice are aligned
  w.arrived = parts.take<unsigned>(1);
  w.counts = parts.take<unsigned>(M);
  w.sums = parts.take<float>(M * w.pitch);
  w.bytes = parts.bytes();
  return w;
}

template <class S, Source kSource>
__global__ void __launch_bounds__(kThreads, 2)
    momentum_update_kernel(float* centroids, PixelMap x, const int64_t* __restrict__ cluster, uint32_t M, double momentum,
                           Workspace w, int tile) {
  using T = Tile<S, kSource>;
  T& s = *shared_memory<T>();
  for (int64_t first = int64_t(blockIdx.x) * tile; first < x.N; first += int64_t(gridDim.x) * tile) {
    const int pixels = int(min(int64_t(tile), x.N - first));
    load_tile(s, x, cluster, M, pixels, [&](int i) { return first + i; });
    for_each_run(s, [&](uint32_t m, int length) { atomicAdd(w.counts + m, unsigned(length)); });
    sum_tile<S, kSource>(s, x, pixels, [&](uint32_t m, int d, const auto& sum) {
#pragma unroll
      for (int c = 0; c < T::kChannels; c += 4) {
        add_vector(w.sums + m * w.pitch + d + c, float4{sum[c], sum[c + 1], sum[c + 2], sum[c + 3]});
      }
    });
  }
  unsigned target = 0;
  grid_barrier(w.arrived, target);  // the sums are complete
  finish<S>(
      s, x, cluster, M, w.sums, w.pitch, [&](uint32_t m) { return w.counts[m]; },
      [&](uint32_t m, uint32_t count, const float* sum, double squared) {
        if (count > 0) move(centroids + m * x.D, sum, squared, momentum, int(x.D));
      });
}

__global__ void __launch_bounds__(kThreads, 2)
    apply_momentum_kernel(float* centroids, const float* __restrict__ sums, const int64_t* __restrict__ counts, int64_t M,
                          int64_t D, double momentum) {
  const int64_t m = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (m >= M || counts[m] <= 0) return;
  const float* sum = sums + m * D;
  move(centroids + m * D, sum, squared_length(sum, int(D)), momentum, int(D));
}

template <class S, Source kSource>
Status update(const MomentumUpdate& a, const PixelMap& x, int64_t M, const Workspace& w, cudaStream_t stream) {
  using T = Tile<S, kSource>;
  const auto kernel = momentum_update_kernel<S, kSource>;
  int processors, resident;
  DNC_CHECK(attribute(&processors, cudaDevAttrMultiProcessorCount));
  DNC_CHECK(resident_blocks(&resident, kernel, kThreads, sizeof(T)));
  // equal tiles, as many as blocks that run together take in whole rounds; a multiple of 16 pixels keeps their sectors apart
  const int64_t together = int64_t(processors) * min(resident, 2), rounds = divide_up(x.N, together * T::kPixels);
  const int64_t tile = min(max(round_up(divide_up(x.N, together * rounds), 16), kLeastTile), int64_t(T::kPixels));
  const int64_t blocks = max(divide_up(x.N, tile), divide_up(M, kWarps));
  const Grid grid{unsigned(min(blocks, together)), kThreads, stream, sizeof(T), 1, true};
  DNC_CHECK(cudaMemsetAsync(w.arrived, 0, w.bytes, stream));
  DNC_CHECK(launch(grid, kernel, a.centroids.as<float>(), x, a.cluster.as<int64_t>(), uint32_t(M), a.momentum, w, int(tile)));
  return {};
}

template <class S>
Status update(const MomentumUpdate& a, int64_t M, const Workspace& w, cudaStream_t stream) {
  const Pixels x(a.x);
  switch (source_of(x, sizeof(S))) {
    case Source::vectors: return update<S, Source::vectors>(a, PixelMap(x), M, w, stream);
    case Source::rows: return update<S, Source::rows>(a, PixelMap(x), M, w, stream);
    default: return update<S, Source::planes>(a, PixelMap(x), M, w, stream);
  }
}

}  // namespace

size_t momentum_update_workspace(const MomentumUpdate& a) {
  const int64_t M = a.centroids.size[0];
  return a.deterministic ? ordered_workspace(a.x, M) : layout(nullptr, M, a.centroids.size[1]).bytes;
}

Status momentum_update(const MomentumUpdate& a, const Launch& where) {
  const int64_t M = a.centroids.size[0], N = a.cluster.size[0];
  if (a.centroids.dtype != DType::float32) return bad_argument("centroids must be float32");
  if (a.deterministic) {
    return ordered_update(a.x, a.cluster.as<int64_t>(), a.centroids.as<float>(), a.momentum, nullptr, nullptr, M, where);
  }
  const Status status = check_momentum(a.x.dtype, N, a.centroids.size[1], M);
  if (!status.ok() || N == 0 || M == 0) return status;
  if (!enough(where, momentum_update_workspace(a))) return too_small();
  const OnDevice device(where);
  DNC_CHECK(device.error());
  const Workspace w = layout(where.workspace, M, a.centroids.size[1]);
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  if (a.x.dtype == DType::float32) return update<float>(a, M, w, stream);
  return a.x.dtype == DType::float16 ? update<Float16>(a, M, w, stream) : update<BFloat16>(a, M, w, stream);
}

size_t apply_momentum_workspace(const ApplyMomentum&) { return 0; }

Status apply_momentum(const ApplyMomentum& a, const Launch& where) {
  const int64_t M = a.centroids.size[0], D = a.centroids.size[1];
  if (a.centroids.dtype != DType::float32 || a.sums.dtype != DType::float32) {
    return bad_argument("centroids and sums must be float32");
  }
  if (divide_up(M, kWarps) > INT32_MAX || D > INT32_MAX - 32) {
    return bad_argument("there must be fewer than 2^35 sub-centroids and 2^31 - 32 channels");
  }
  if (M == 0) return {};
  const OnDevice device(where);
  DNC_CHECK(device.error());
  const Grid grid{unsigned(divide_up(M, kWarps)), kThreads, static_cast<cudaStream_t>(where.stream)};
  DNC_CHECK(launch(grid, apply_momentum_kernel, a.centroids.as<float>(), a.sums.as<float>(), a.counts.as<int64_t>(), M, D,
                   a.momentum));
  return {};
}

}  // namespace cuda
}  // namespace dnc
