// y = z / max(|z|, 1e-12),  z = (x - mean) * rstd * weight + bias      over the D channels of a pixel
//
// Reads x [N,D] or [B,D,H,W] (float32/float16/bfloat16, any strides), weight and bias [D] float32; writes y like x and mean,
// rstd, inverse_norm [N] float32. Bytes: x and y once, 2*N*D elements, and 12 a pixel. Floor for N = 131072, D = 256 in
// bfloat16 at 3.0 TB/s: 45 us; float32 90 us. About 20 instructions an element for tiles, 12 for rows (28 T/s: 24 and 14 us).
//
// Plan:  rows    channels adjacent ([N,D], channels_last): 1 to 32 lanes of a warp own a row (of up to 1024 channels in 16
//                bits, 512 in float32; short rows several at a time), longer ones a block. The row stays in registers from the
//                load to the store. 16-byte accesses where addresses and D allow; else neighbouring lanes take neighbours.
//        planes  pixels adjacent (NCHW): a block owns a tile of 8 to 64 pixels, all channels of it in shared memory, where
//                cp.async brings it and y replaces it before it is stored. Lanes are pixels, warps share the channels.
// What fits neither is read from global memory four times instead of once (normalize_tile_kernel, not kStaged): rows of more
// than 6144 channels, 3072 where they are accessed one by one; planes of more than about 7000 channels on an H100, 5000 on an
// A100, 2900 on GPUs with 99 KB.
//
// The mean is taken in two passes, the second of which corrects the first (a quotient, so that it is exact for equal channels);
// the variance is that of the differences. A bad pixel
// (NaN, Inf) is NaN in all channels and touches no other. Deterministic: every sum has a fixed order. Reference:
// dnc_kernels/ops/embedding/reference.py; the same on the CPU: csrc/cpu/embedding.cpp.
#include <algorithm>

#include "embedding_tiles.h"

namespace dnc {
namespace cuda {
namespace {

using namespace embedding;

struct Forward {
  Features x, y;
  const float *weight, *bias;
  float *mean, *rstd, *inverse_norm;
  float eps, channels, per_channel;  // D, 1 / D
};

// 1 / sqrt(variance + eps). Rounding may leave the variance of a constant pixel a hair below 0; NaN stays NaN.
__device__ inline float inverse_deviation(float squares, float left, const Forward& a) {
  const float variance = squares * a.per_channel - left * left;
  return 1.f / sqrtf((variance < 0 ? 0.f : variance) + a.eps);
}
// 1 / max(|z|, 1e-12); but 0 for z = 0, which makes y and its gradient 0. NaN stays NaN.
__device__ inline float inverse_length(float squares) {
  const float length = sqrtf(squares);
  return length == 0 ? 0.f : 1.f / (length < 1e-12f ? 1e-12f : length);
}

// Channels that a lane holds, of one row or of several: 64 bytes of x. Fewer where each has an address of its own.
template <class S, int kWidth>
constexpr int kHeld = kWidth == 1 ? 8 : 64 / int(sizeof(S));

// Shared memory of a block that owns a row: a part for each of the row's sums, so that none waits for another to be read.
struct RowShared {
  float sum[1][32], moments[2][32], length[1][32];
};

// kChannels of a thread, in pieces of kWidth. kBlock: a block for a row, else `lanes` lanes for each of kRows rows.
template <class S, int kWidth, int kChannels, bool kBlock>
__global__ void __launch_bounds__(kBlock ? kRowThreads : kThreads, kBlock           ? 1
                                                                   : kChannels < 32 ? 3
                                                                                    : 2)
    normalize_rows_kernel(Forward a, int lanes) {
  constexpr int kPieces = kChannels / kWidth, kRows = kBlock ? 1 : kHeld<S, kWidth> / kChannels;
  RowShared& shared = *shared_memory<RowShared>();
  const int team = kBlock ? int(blockDim.x) : lanes, teams = int(blockDim.x) / team;  // threads of a row, rows at a time
  const int lane = int(threadIdx.x) % team, row = int(threadIdx.x) / team;
  const int64_t first = int64_t(blockIdx.x) * teams * kRows;
  float x[kRows][kPieces][kWidth], sum[kRows] = {}, moments[2 * kRows] = {}, length[kRows] = {};
  float mean[kRows], rstd[kRows];  // of x - center: moments [r] sum, [kRows + r] sum of squares
  const auto channel = [&](int j) { return (j * team + lane) * kWidth; };
  const auto pixel = [&](int r) { return first + r * teams + row; };
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const bool here = pixel(r) < a.x.N;
    const S* p = static_cast<const S*>(a.x.data) + (here ? a.x.offset(pixel(r)) : 0);
#pragma unroll
    for (int j = 0; j < kPieces; j++) {
#pragma unroll
      for (int i = 0; i < kWidth; i++) x[r][j][i] = 0;
      if (here && channel(j) < a.x.D) load_channels<kWidth>(x[r][j], p, a.x, channel(j));
#pragma unroll
      for (int i = 0; i < kWidth; i++) sum[r] += x[r][j][i];
    }
  }
  row_sums<kBlock>(sum, lanes, shared.sum);
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const float center = sum[r] / a.channels;
#pragma unroll
    for (int j = 0; j < kPieces; j++) {
      const bool exists = channel(j) < a.x.D;
#pragma unroll
      for (int i = 0; i < kWidth; i++) {
        const float t = exists ? x[r][j][i] - center : 0.f;
        moments[r] += t, moments[kRows + r] += t * t;
      }
    }
    mean[r] = center;
  }
  row_sums<kBlock>(moments, lanes, shared.moments);
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const float left = moments[r] * a.per_channel;
    mean[r] += left, rstd[r] = inverse_deviation(moments[kRows + r], left, a);
  }
#pragma unroll
  for (int j = 0; j < kPieces; j++) {  // x becomes z; weight and bias serve all rows
    if (channel(j) >= a.x.D) continue;
    float weight[kWidth], bias[kWidth];
    load_parameter(weight, a.weight, channel(j), 1.f), load_parameter(bias, a.bias, channel(j), 0.f);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
#pragma unroll
      for (int i = 0; i < kWidth; i++) {
        x[r][j][i] = (x[r][j][i] - mean[r]) * rstd[r] * weight[i] + bias[i];
        length[r] += x[r][j][i] * x[r][j][i];
      }
    }
  }
  row_sums<kBlock>(length, lanes, shared.length);
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int64_t n = pixel(r);
    if (n >= a.x.N) continue;
    const float inverse_norm = inverse_length(length[r]);
    S* p = a.y.at<S>(n);
#pragma unroll
    for (int j = 0; j < kPieces; j++) {
#pragma unroll
      for (int i = 0; i < kWidth; i++) x[r][j][i] *= inverse_norm;
      if (channel(j) < a.x.D) store_channels<kWidth>(p, a.y, channel(j), x[r][j]);
    }
    if (lane == 0) a.mean[n] = mean[r], a.rstd[n] = rstd[r], a.inverse_norm[n] = inverse_norm;
  }
}

// Shared memory of a tile's block; behind it the tile [D][P], if it is staged.
struct alignas(16) TileShared {
  float sums[kWarps][1][kTilePixels], moments[kWarps][2][kTilePixels];
  float center[kTilePixels], mean[kTilePixels], rstd[kTilePixels], inverse_norm[kTilePixels];
};

// A block per tile. Not kStaged: its pixels are read where they are, every time.
template <class S, bool kStaged>
__global__ void __launch_bounds__(kThreads) normalize_tile_kernel(Forward a, int P) {
  constexpr int K = kPack<S, kStaged>;
  TileShared& shared = *shared_memory<TileShared>();
  S* staged = reinterpret_cast<S*>(&shared + 1);
  const Tile tile{P / K, kThreads / (P / K)};
  const int D = int(a.x.D), q = tile.word() * K, slice = tile.slice(), t = int(threadIdx.x);
  const int64_t first = int64_t(blockIdx.x) * P;
  const Column<S, kStaged> in = [&] {
    if constexpr (kStaged) {
      load_tile(staged, P, a.x, first);
      copy_async_wait<0>();
      __syncthreads();  // the tile is complete
      return Column<S, true>(staged, tile);
    } else {
      return Column<S, false>(a.x, first + q);
    }
  }();
  Column<S, kStaged> out = in;
  if constexpr (!kStaged) out = Column<S, false>(a.y, first + q);

  float x[K];
  {
    float v[1][K] = {}, sum[1];
    for (int d = slice; d < D; d += tile.slices) {
      in.load(x, d);
#pragma unroll
      for (int k = 0; k < K; k++) v[0][k] += x[k];
    }
    tile_sums(v, tile, shared.sums);
    if (t < P) {
      add_warps(sum, t, shared.sums);
      shared.center[t] = sum[0] / a.channels;
    }
    __syncthreads();  // center is complete
  }
  {
    float v[2][K] = {}, sum[2];
    for (int d = slice; d < D; d += tile.slices) {
      in.load(x, d);
#pragma unroll
      for (int k = 0; k < K; k++) {
        const float e = x[k] - shared.center[q + k];
        v[0][k] += e, v[1][k] += e * e;
      }
    }
    tile_sums(v, tile, shared.moments);
    if (t < P) {
      add_warps(sum, t, shared.moments);
      const float left = sum[0] * a.per_channel;
      shared.mean[t] = shared.center[t] + left, shared.rstd[t] = inverse_deviation(sum[1], left, a);
    }
    __syncthreads();  // mean and rstd are complete
  }
  float mean[K], rstd[K], inverse_norm[K];
#pragma unroll
  for (int k = 0; k < K; k++) mean[k] = shared.mean[q + k], rstd[k] = shared.rstd[q + k];
  const auto embed = [&](int d) {  // x becomes z
    const float weight = a.weight != nullptr ? a.weight[d] : 1.f, bias = a.bias != nullptr ? a.bias[d] : 0.f;
    in.load(x, d);
#pragma unroll
    for (int k = 0; k < K; k++) x[k] = (x[k] - mean[k]) * rstd[k] * weight + bias;
  };
  {
    float v[1][K] = {}, sum[1];
    for (int d = slice; d < D; d += tile.slices) {
      embed(d);
#pragma unroll
      for (int k = 0; k < K; k++) v[0][k] += x[k] * x[k];
    }
    tile_sums(v, tile, shared.sums);  // the first use of it was read before the barrier behind it
    if (t < P) {
      add_warps(sum, t, shared.sums);
      const float inverse = shared.inverse_norm[t] = inverse_length(sum[0]);
      const int64_t n = first + t;
      if (n < a.x.N) a.mean[n] = shared.mean[t], a.rstd[n] = shared.rstd[t], a.inverse_norm[n] = inverse;
    }
    __syncthreads();  // inverse_norm is complete
  }
#pragma unroll
  for (int k = 0; k < K; k++) inverse_norm[k] = shared.inverse_norm[q + k];
  for (int d = slice; d < D; d += tile.slices) {
    embed(d);
#pragma unroll
    for (int k = 0; k < K; k++) x[k] *= inverse_norm[k];
    out.store(d, x);
  }
  if constexpr (kStaged) {
    __syncthreads();  // y lies in the tile where x was
    store_tile(staged, P, a.y, first);
  }
}

template <class S, int kWidth>
cudaError_t launch_rows(const Forward& a, cudaStream_t stream) {
  const RowPlan plan(a.x.D, kWidth, kHeld<S, kWidth>);
  constexpr int kMost = kHeld<S, kWidth>;
  const auto run = [&](auto channels, auto block) {
    constexpr int kRows = block ? 1 : kMost / channels;
    const int64_t rows = block ? 1 : int64_t(plan.threads) / plan.lanes * kRows;
    return launch(Grid{unsigned(divide_up(a.x.N, rows)), plan.threads, stream, block ? sizeof(RowShared) : 0},
                  normalize_rows_kernel<S, kWidth, channels, block>, a, plan.lanes);
  };
  switch (plan.channels) {
    case 8: return run(std::integral_constant<int, 8>{}, std::false_type{});
    case 16: return run(std::integral_constant<int, std::min(kMost, 16)>{}, std::false_type{});
    case 32: return run(std::integral_constant<int, std::min(kMost, 32)>{}, std::false_type{});
    default: return run(std::integral_constant<int, kRowChannels<kWidth>>{}, std::true_type{});
  }
}

template <class S>
Status forward(const Forward& a, bool planes, cudaStream_t stream) {
  const bool wide = a.x.wide && a.y.wide && aligned(a.weight) && aligned(a.bias);
  if (!planes && a.x.D <= largest_row(wide)) {
    DNC_CHECK((wide ? launch_rows<S, kPiece<S>> : launch_rows<S, 1>)(a, stream));
    return {};
  }
  int limit = 0, pixels = 0;
  size_t shared = 0;
  DNC_CHECK(attribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin));
  if (planes) pixels = tile_pixels(a.x.D, sizeof(S), 1, 0, sizeof(TileShared), limit, &shared);
  const bool staged = pixels > 0;
  if (!staged) pixels = planes ? 32 : 1, shared = sizeof(TileShared);
  const Grid grid{unsigned(divide_up(a.x.N, pixels)), kThreads, stream, shared};
  DNC_CHECK(launch(grid, staged ? normalize_tile_kernel<S, true> : normalize_tile_kernel<S, false>, a, pixels));
  return {};
}

}  // namespace

size_t normalize_embedding_workspace(const NormalizeEmbedding&) { return 0; }

Status normalize_embedding(const NormalizeEmbedding& f, const Launch& where) {
  if (f.y.dtype != f.x.dtype) return bad_argument("y must have the dtype of x");
  const PixelMap x(f.x);
  if (x.D > INT32_MAX) return bad_argument("x must have fewer than 2^31 channels");
  if (x.N > INT32_MAX) return bad_argument("x must have fewer than 2^31 pixels");
  if (x.N == 0) return {};
  const OnDevice device(where);
  DNC_CHECK(device.error());
  const bool planes = is_planes(x);
  const Forward a{.x = features(f.x, planes),
                  .y = features(f.y, planes),
                  .weight = f.weight.as<const float>(),
                  .bias = f.bias.as<const float>(),
                  .mean = f.mean.as<float>(),
                  .rstd = f.rstd.as<float>(),
                  .inverse_norm = f.inverse_norm.as<float>(),
                  .eps = float(f.eps),
                  .channels = float(x.D),
                  .per_channel = 1 / float(x.D)};
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  switch (f.x.dtype) {
    case DType::float32: return forward<float>(a, planes, stream);
    case DType::float16: return forward<Float16>(a, planes, stream);
    case DType::bfloat16: return forward<BFloat16>(a, planes, stream);
    default: return bad_argument("x must be float32, float16 or bfloat16");
  }
}

}  // namespace cuda
}  // namespace dnc
