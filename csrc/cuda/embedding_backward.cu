// dz = inverse_norm * (g - y * <g,y>),  grad_x = rstd * (dz * weight - mean(dz * weight) - xhat * mean(dz * weight * xhat)),
// grad_weight = sum over pixels of dz * xhat,  grad_bias = sum of dz;  g: gradient of y (docs/embedding.md)
//
// Reads x and grad_y [N,D] or [B,D,H,W] (float32/float16/bfloat16, any strides, expanded ones too), weight and bias [D], mean,
// rstd, inverse_norm and grad_rstd [N] float32; writes grad_x like x, which may be grad_y itself, grad_weight and grad_bias
// [D] float32. Bytes: x, grad_y and grad_x once, 3*N*D elements, 12 a pixel, and 16*D a block for the sums over pixels. Floor
// for N = 131072, D = 256 in bfloat16 at 3.0 TB/s: 68 us; float32 136 us. About 30 instructions an element (28 T/s: 36 us).
//
// Plan:  the rows and tiles of embedding.cu, with x and grad_y of a pixel in registers (a warp: rows of up to 512 channels) or
//        shared memory. What fits neither is read a second time: the same rows; planes of more than about 3000 channels on an
//        H100, 2100 on an A100, 1200 on GPUs with 99 KB. One pass over a pixel makes five sums, from which follows all that its
//        gradient needs; the second makes dz and grad_x. Where grad_weight or grad_bias is wanted, as many blocks as run at a
//        time walk over the pixels and keep their sums (rows: in registers; tiles: in shared memory), which a second launch
//        adds in the order of the blocks.
// Deterministic: no atomics; bit-equal from run to run on GPUs of as many multiprocessors. Reference:
// dnc_kernels/ops/embedding/reference.py; the same on the CPU: csrc/cpu/embedding.cpp.
#include <algorithm>

#include "embedding_tiles.h"

namespace dnc {
namespace cuda {
namespace {

using namespace embedding;

constexpr int64_t kMostBlocks = 1024;  // with sums of their own: room for 7 on each of an H100's multiprocessors
constexpr int kSums = 5;               // <g,z>, <g,w>, <z,w>, <g*w,xhat>, <z*w,xhat>
constexpr int kAddWarps = 16;          // of normalize_add_kernel

struct Backward {
  Features x, grad_y, grad_x;
  const float *weight, *bias, *mean, *rstd, *inverse_norm, *grad_rstd;
  float* partial;     // [blocks,2,D], or null
  float per_channel;  // 1 / D
  bool to_x;
};

// What is known of a pixel, and what follows from its sums: dz = inverse_norm * g - along * z, grad_x = rstd * (dz * w - level
// - xhat * slope).
struct Pixel {
  float mean, rstd, inverse_norm, along, level, slope;

  // n: behind the last pixel all is 0, and so is what it adds to the sums.
  __device__ void load(const Backward& a, int64_t n) {
    const bool here = n < a.x.N;
    mean = here ? a.mean[n] : 0.f, rstd = here ? a.rstd[n] : 0.f, inverse_norm = here ? a.inverse_norm[n] : 0.f;
  }
  __device__ void finish(const Backward& a, int64_t n, const float* sum) {
    const float inv = inverse_norm;
    // below the bound 1e-12 the length is a constant, and nothing is projected out; NaN stays NaN
    along = inv < 1e12f ? sum[0] * inv * inv * inv : inv != inv ? inv : 0.f;
    // d rstd / dx = -rstd^2 * xhat / D
    const float to_rstd = a.grad_rstd != nullptr && n < a.x.N ? a.grad_rstd[n] * rstd : 0.f;
    level = (inv * sum[1] - along * sum[2]) * a.per_channel;
    slope = (inv * sum[3] - along * sum[4] + to_rstd) * a.per_channel;
  }
  __device__ void add(float* sum, float x, float g, float weight, float bias) const {
    const float xhat = (x - mean) * rstd, z = xhat * weight + bias, gw = g * weight, zw = z * weight;
    sum[0] += g * z, sum[1] += gw, sum[2] += zw, sum[3] += gw * xhat, sum[4] += zw * xhat;
  }
  // grad_x; adds to the sums over pixels.
  __device__ float gradient(float x, float g, float weight, float bias, float& to_weight, float& to_bias) const {
    const float xhat = (x - mean) * rstd, dz = inverse_norm * g - along * (xhat * weight + bias);
    to_weight += dz * xhat, to_bias += dz;
    return rstd * (dz * weight - level - xhat * slope);
  }
};

// Shared memory of a block of rows; behind it [kWarps][D] floats, unless the block owns a row.
struct alignas(16) RowShared {
  float sums[2][kSums][32];  // of rows in turn
};

// As normalize_rows_kernel.
template <class S, int kWidth, int kChannels, bool kBlock>
__global__ void __launch_bounds__(kBlock ? kRowThreads : kThreads, kBlock ? 1 : 2)
    normalize_backward_rows_kernel(Backward a, int lanes) {
  constexpr int kPieces = kChannels / kWidth, kRows = kBlock ? 1 : kRowChannels<kWidth> / kChannels;
  RowShared& shared = *shared_memory<RowShared>();
  const int team = kBlock ? int(blockDim.x) : lanes, teams = int(blockDim.x) / team;
  const int lane = int(threadIdx.x) % team, row = int(threadIdx.x) / team, D = int(a.x.D);
  const auto channel = [&](int j) { return (j * team + lane) * kWidth; };
  float to_weight[kPieces][kWidth] = {}, to_bias[kPieces][kWidth] = {};
  int turn = 0;
  for (int64_t first = int64_t(blockIdx.x) * teams * kRows; first < a.x.N; first += int64_t(gridDim.x) * teams * kRows) {
    float x[kRows][kPieces][kWidth] = {}, g[kRows][kPieces][kWidth] = {};
    Pixel pixel[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int64_t n = first + r * teams + row;
      const bool here = n < a.x.N;
      const S* from = static_cast<const S*>(a.x.data) + (here ? a.x.offset(n) : 0);
      const S* grad = static_cast<const S*>(a.grad_y.data) + (here ? a.grad_y.offset(n) : 0);
#pragma unroll
      for (int j = 0; j < kPieces; j++) {
        if (!here || channel(j) >= D) continue;
        load_channels<kWidth>(x[r][j], from, a.x, channel(j));
        load_foreign<kWidth>(g[r][j], grad, a.grad_y, channel(j));
      }
      pixel[r].load(a, n);
    }
    float sum[kRows * kSums] = {};
#pragma unroll
    for (int j = 0; j < kPieces; j++) {
      if (channel(j) >= D) continue;
      float weight[kWidth], bias[kWidth];
      load_parameter(weight, a.weight, channel(j), 1.f), load_parameter(bias, a.bias, channel(j), 0.f);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
#pragma unroll
        for (int i = 0; i < kWidth; i++) pixel[r].add(sum + r * kSums, x[r][j][i], g[r][j][i], weight[i], bias[i]);
      }
    }
    row_sums<kBlock>(sum, lanes, shared.sums[turn]);
#pragma unroll
    for (int r = 0; r < kRows; r++) pixel[r].finish(a, first + r * teams + row, sum + r * kSums);
    turn ^= 1;
#pragma unroll
    for (int j = 0; j < kPieces; j++) {
      if (channel(j) >= D) continue;
      float weight[kWidth], bias[kWidth];
      load_parameter(weight, a.weight, channel(j), 1.f), load_parameter(bias, a.bias, channel(j), 0.f);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const int64_t n = first + r * teams + row;
#pragma unroll
        for (int i = 0; i < kWidth; i++) {
          x[r][j][i] = pixel[r].gradient(x[r][j][i], g[r][j][i], weight[i], bias[i], to_weight[j][i], to_bias[j][i]);
        }
        if (a.to_x && n < a.x.N) store_channels<kWidth>(a.grad_x.at<S>(n), a.grad_x, channel(j), x[r][j]);
      }
    }
  }
  if (a.partial == nullptr) return;
  float* out = a.partial + int64_t(blockIdx.x) * 2 * D;
  float* of_warp = reinterpret_cast<float*>(&shared + 1);
  const auto write = [&](float* to, const float (&mine)[kPieces][kWidth]) {
#pragma unroll
    for (int j = 0; j < kPieces; j++) {
#pragma unroll
      for (int i = 0; i < kWidth; i++) {
        float sum = mine[j][i];
        if constexpr (!kBlock) {  // the rows of a warp
          for (int step = lanes; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
        }
        const int d = channel(j) + i;
        if (d >= D) continue;
        if constexpr (kBlock) {
          to[d] = sum;
        } else if (int(threadIdx.x) % 32 < lanes) {
          of_warp[int(threadIdx.x) / 32 * D + d] = sum;
        }
      }
    }
    if constexpr (!kBlock) {
      __syncthreads();  // of_warp is complete
      for (int d = int(threadIdx.x); d < D; d += kThreads) {
        float sum = 0;
        for (int w = 0; w < kWarps; w++) sum += of_warp[w * D + d];
        to[d] = sum;
      }
      __syncthreads();  // of_warp has been read and may be written again
    }
  };
  write(out, to_weight);
  write(out + D, to_bias);
}

// Shared memory of a tile's block; behind it, if they are staged, the tiles [D][P] of x and grad_y and the sums [2][D].
struct alignas(16) TileShared {
  float sums[kWarps][kSums][kTilePixels];
  Pixel pixel[kTilePixels];
};

// Blocks walk over tiles. Not kStaged: pixels are read where they are, and the block's sums are kept in the workspace.
template <class S, bool kStaged>
__global__ void __launch_bounds__(kThreads, 3) normalize_backward_tile_kernel(Backward a, int P) {
  constexpr int K = kPack<S, kStaged>;
  TileShared& shared = *shared_memory<TileShared>();
  const Tile tile{P / K, kThreads / (P / K)};
  const int D = int(a.x.D), q = tile.word() * K, slice = tile.slice(), t = int(threadIdx.x);
  S *x_tile = reinterpret_cast<S*>(&shared + 1), *g_tile = x_tile + int64_t(D) * P;
  float* out = a.partial != nullptr ? a.partial + int64_t(blockIdx.x) * 2 * D : nullptr;
  float* sums = kStaged ? reinterpret_cast<float*>(g_tile + int64_t(D) * P) : out;
  if (out != nullptr) {
    for (int i = t; i < 2 * D; i += kThreads) sums[i] = 0;
  }
  for (int64_t first = int64_t(blockIdx.x) * P; first < a.x.N; first += int64_t(gridDim.x) * P) {
    if (kStaged) {
      load_tile(x_tile, P, a.x, first);
      load_tile(g_tile, P, a.grad_y, first);
    }
    if (t < P) shared.pixel[t].load(a, first + t);
    if (kStaged) copy_async_wait<0>();
    __syncthreads();  // tiles, pixels and, the first time, the zeros of the sums are complete
    const auto column = [&](S* staged, const Features& f) {
      if constexpr (kStaged) {
        return Column<S, true>(staged, tile);
      } else {
        return Column<S, false>(f, first + q);
      }
    };
    const auto x_column = column(x_tile, a.x), g_column = column(g_tile, a.grad_y);
    const auto grad_column = kStaged ? x_column : column(nullptr, a.grad_x);
    float x[K], g[K];
    {
      Pixel pixel[K];
#pragma unroll
      for (int k = 0; k < K; k++) pixel[k] = shared.pixel[q + k];
      float of_pixel[K][kSums] = {}, v[kSums][K], sum[kSums];
      for (int d = slice; d < D; d += tile.slices) {
        const float weight = a.weight != nullptr ? a.weight[d] : 1.f, bias = a.bias != nullptr ? a.bias[d] : 0.f;
        x_column.load(x, d), g_column.load(g, d);
#pragma unroll
        for (int k = 0; k < K; k++) pixel[k].add(of_pixel[k], x[k], g[k], weight, bias);
      }
#pragma unroll
      for (int k = 0; k < K; k++) {
#pragma unroll
        for (int i = 0; i < kSums; i++) v[i][k] = of_pixel[k][i];
      }
      tile_sums(v, tile, shared.sums);
      if (t < P) {
        add_warps(sum, t, shared.sums);
        shared.pixel[t].finish(a, first + t, sum);
      }
      __syncthreads();  // the pixels know what follows from their sums
    }
    Pixel pixel[K];
#pragma unroll
    for (int k = 0; k < K; k++) pixel[k] = shared.pixel[q + k];
    for (int start = 0; start < D; start += tile.slices) {  // all lanes of a warp: they add up their pixels
      const int d = start + slice;
      float to_weight = 0, to_bias = 0;
      if (d < D) {
        const float weight = a.weight != nullptr ? a.weight[d] : 1.f, bias = a.bias != nullptr ? a.bias[d] : 0.f;
        x_column.load(x, d), g_column.load(g, d);
#pragma unroll
        for (int k = 0; k < K; k++) x[k] = pixel[k].gradient(x[k], g[k], weight, bias, to_weight, to_bias);
        if (a.to_x) grad_column.store(d, x);
      }
      if (out == nullptr) continue;
      for (int step = tile.words / 2; step > 0; step /= 2) {
        to_weight += __shfl_xor_sync(~0u, to_weight, step);
        to_bias += __shfl_xor_sync(~0u, to_bias, step);
      }
      if (d < D && tile.word() == 0) sums[d] += to_weight, sums[D + d] += to_bias;
    }
    __syncthreads();  // grad_x lies in the tile where x was; the pixels have been read
    if (kStaged) {
      if (a.to_x) store_tile(x_tile, P, a.grad_x, first);
      __syncthreads();  // the tile has been read and may be loaded again
    }
  }
  if (kStaged && out != nullptr) {
    for (int i = t; i < 2 * D; i += kThreads) out[i] = sums[i];
  }
}

// grad_weight and grad_bias, those given, from partial [blocks,2,D], 32 of its columns a block. In double, in a fixed order.
__global__ void __launch_bounds__(32 * kAddWarps)
    normalize_add_kernel(const float* __restrict__ partial, int64_t blocks, int64_t D, float* grad_weight, float* grad_bias) {
  double* of_warp = shared_memory<double>();  // [kAddWarps][32]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * 32 + lane;
  double sum = 0;
  if (column < 2 * D) {
#pragma unroll 8
    for (int64_t b = warp; b < blocks; b += kAddWarps) sum += partial[b * 2 * D + column];
  }
  of_warp[threadIdx.x] = sum;
  __syncthreads();  // of_warp is complete
  if (warp > 0 || column >= 2 * D) return;
  for (int w = 1; w < kAddWarps; w++) sum += of_warp[w * 32 + lane];
  float* out = column < D ? grad_weight : grad_bias;
  if (out != nullptr) out[column < D ? column : column - D] = float(sum);
}

// How many blocks of a kernel: one for each of `parts`, or as many as run at a time where they have sums of their own.
template <class K>
cudaError_t count_blocks(int64_t* blocks, const Backward& a, int64_t parts, K kernel, unsigned threads, size_t shared) {
  *blocks = parts;
  if (a.partial == nullptr) return cudaSuccess;
  int resident = 0, processors = 0;
  cudaError_t error = resident_blocks(&resident, kernel, threads, shared);
  if (error == cudaSuccess) error = attribute(&processors, cudaDevAttrMultiProcessorCount);
  *blocks = std::min({parts, std::max<int64_t>(int64_t(resident) * processors, 1), kMostBlocks});
  return error;
}

template <class S, int kWidth>
cudaError_t launch_rows(const Backward& a, cudaStream_t stream, int64_t* blocks) {
  constexpr int kMost = kRowChannels<kWidth>;
  const RowPlan plan(a.x.D, kWidth, kMost);
  const auto run = [&](auto channels, auto block) {
    constexpr int kRows = block ? 1 : kMost / channels;
    const int64_t rows = block ? 1 : int64_t(plan.threads) / plan.lanes * kRows;
    const auto kernel = normalize_backward_rows_kernel<S, kWidth, channels, block>;
    const size_t shared = sizeof(RowShared) + (block ? 0 : size_t(a.x.D) * kWarps * sizeof(float));
    const cudaError_t error = count_blocks(blocks, a, divide_up(a.x.N, rows), kernel, plan.threads, shared);
    return error != cudaSuccess ? error : launch(Grid{unsigned(*blocks), plan.threads, stream, shared}, kernel, a, plan.lanes);
  };
  switch (plan.channels) {
    case 8: return run(std::integral_constant<int, 8>{}, std::false_type{});
    case 16: return run(std::integral_constant<int, kMost>{}, std::false_type{});
    default: return run(std::integral_constant<int, kMost>{}, std::true_type{});
  }
}

template <class S>
Status backward(const Backward& a, const NormalizeEmbeddingBackward& f, bool planes, cudaStream_t stream) {
  const bool wide = a.x.wide && (a.grad_x.wide || !a.to_x) && aligned(a.weight) && aligned(a.bias);
  int64_t blocks = 0;
  if (!planes && a.x.D <= largest_row(wide)) {
    DNC_CHECK((wide ? launch_rows<S, kPiece<S>> : launch_rows<S, 1>)(a, stream, &blocks));
  } else {
    int limit = 0, pixels = 0;
    size_t shared = 0;
    DNC_CHECK(attribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin));
    if (planes) pixels = tile_pixels(a.x.D, sizeof(S), 2, 2 * sizeof(float), sizeof(TileShared), limit, &shared);
    const auto kernel = pixels > 0 ? normalize_backward_tile_kernel<S, true> : normalize_backward_tile_kernel<S, false>;
    if (pixels == 0) pixels = planes ? 32 : 1, shared = sizeof(TileShared);
    DNC_CHECK(count_blocks(&blocks, a, divide_up(a.x.N, pixels), kernel, kThreads, shared));
    DNC_CHECK(launch(Grid{unsigned(blocks), kThreads, stream, shared}, kernel, a, pixels));
  }
  if (a.partial == nullptr) return {};
  DNC_CHECK(launch(Grid{unsigned(divide_up(2 * a.x.D, 32)), 32 * kAddWarps, stream, 32 * kAddWarps * sizeof(double)},
                   normalize_add_kernel, a.partial, blocks, a.x.D, f.grad_weight.as<float>(), f.grad_bias.as<float>()));
  return {};
}

}  // namespace

size_t normalize_embedding_backward_workspace(const NormalizeEmbeddingBackward& f) {
  const PixelMap x(f.x);
  if (!f.grad_weight && !f.grad_bias) return 0;
  return size_t(std::min(x.N, kMostBlocks) * 2 * x.D) * sizeof(float);
}

Status normalize_embedding_backward(const NormalizeEmbeddingBackward& f, const Launch& where) {
  if (f.grad_y.dtype != f.x.dtype || (f.grad_x && f.grad_x.dtype != f.x.dtype)) {
    return bad_argument("grad_y and grad_x must have the dtype of x");
  }
  const PixelMap x(f.x);
  if (x.D > INT32_MAX) return bad_argument("x must have fewer than 2^31 channels");
  if (x.N > INT32_MAX) return bad_argument("x must have fewer than 2^31 pixels");
  const OnDevice device(where);
  DNC_CHECK(device.error());
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  if (x.N == 0) {
    if (f.grad_weight) DNC_CHECK(cudaMemsetAsync(f.grad_weight.data, 0, size_t(x.D) * sizeof(float), stream));
    if (f.grad_bias) DNC_CHECK(cudaMemsetAsync(f.grad_bias.data, 0, size_t(x.D) * sizeof(float), stream));
    return {};
  }
  if (!enough(where, normalize_embedding_backward_workspace(f))) return too_small();
  const bool planes = is_planes(x), sums = f.grad_weight || f.grad_bias;
  const Backward a{.x = features(f.x, planes),
                   .grad_y = features(f.grad_y, planes),
                   .grad_x = features(f.grad_x ? f.grad_x : f.x, planes),
                   .weight = f.weight.as<const float>(),
                   .bias = f.bias.as<const float>(),
                   .mean = f.mean.as<const float>(),
                   .rstd = f.rstd.as<const float>(),
                   .inverse_norm = f.inverse_norm.as<const float>(),
                   .grad_rstd = f.grad_rstd.as<const float>(),
                   .partial = sums ? static_cast<float*>(where.workspace) : nullptr,
                   .per_channel = 1 / float(x.D),
                   .to_x = bool(f.grad_x)};
  switch (f.x.dtype) {
    case DType::float32: return backward<float>(a, f, planes, stream);
    case DType::float16: return backward<Float16>(a, f, planes, stream);
    case DType::bfloat16: return backward<BFloat16>(a, f, planes, stream);
    default: return bad_argument("x must be float32, float16 or bfloat16");
  }
}

}  // namespace cuda
}  // namespace dnc
