// Sub-centroids as the rows that the similarity kernels multiply by.
//
//   rows[slot] = p[c,k], p / max(|p|, 1e-12) for cosine, 2 p for sqeuclidean; bias[slot] = -|rounded p|^2
// reads centroids [C,K,D] (any float dtype, contiguous) twice, the second time from L2; writes rows [tiles * kColumns, 64
// boxes] in the dtype of x, in the order of similarity.h; what holds no sub-centroid is zero. C*K*D*6 bytes for float32
// centroids: 2.3 MB, 0.8 us for ADE20K. Plan: a warp a row. One writer an element: deterministic. Reference:
// dnc_kernels/ops/similarity/reference.py.
#include "similarity.h"

namespace dnc {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct Source {
  const void* data;
  DType dtype;
  __device__ float operator[](int64_t i) const {
    switch (dtype) {
      case DType::float16: return to_float(static_cast<const Float16*>(data)[i]);
      case DType::bfloat16: return to_float(static_cast<const BFloat16*>(data)[i]);
      default: return static_cast<const float*>(data)[i];
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_centroids_kernel(Source centroids, T* __restrict__ rows, float* __restrict__ bias, int C, int K, int D, int width,
                          int per_lane, int64_t total, Metric metric) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= total) return;
  const int column = int(row % kColumns), e = column / 8 * 2 + column % 2, q = column % 8 / 2;
  const int64_t c = 4 * (row / kColumns * per_lane + e / K) + q;
  const bool real = e / K < per_lane && c < C;
  const int64_t from = (c * K + e % K) * D;
  float length = 1;
  if (real && metric == Metric::cosine) {
    float square = 0;
    for (int d = lane; d < D; d += 32) square += centroids[from + d] * centroids[from + d];
    length = fmaxf(sqrtf(warp_sum(square)), 1e-12f);
  }
  float square = 0;
  for (int d = lane; d < width; d += 32) {
    const T v = from_float<T>(real && d < D ? centroids[from + d] / length : 0.f);
    square = fmaf(to_float(v), to_float(v), square);
    // doubling is exact
    rows[row * width + d] = metric == Metric::sqeuclidean ? from_float<T>(2 * to_float(v)) : v;
  }
  if (bias != nullptr) {
    square = warp_sum(square);
    if (lane == 0) bias[row] = -square;
  }
}

}  // namespace

bool runs_of(const View& x, PixelRuns* runs, bool* planes) {
  const Pixels at(x);
  const auto even = [](int64_t stride) { return stride % 8 == 0; };
  if (reinterpret_cast<uintptr_t>(at.data) % 16 != 0) return false;
  *runs = {at.data, 1, int(at.N()), 0, at.sw};
  *planes = false;
  if (at.sd == 1 && at.B == 1 && at.H == 1 && even(at.sw) && (at.sw >= at.D || at.W <= 1)) return true;
  *runs = {at.data, int(at.B), int(at.W), at.sb, at.sd};
  *planes = true;
  // an image's pixels are one run; of an only image, or a single channel, the stride says nothing
  return at.sw == 1 && at.H == 1 && even(at.sd) && at.sd >= at.W && (at.B == 1 || (even(at.sb) && at.sb > 0));
}

const char* refuses(const View& x, const View& centroids) {
  PixelRuns runs;
  bool planes;
  const int64_t N = Pixels(x).N(), D = Pixels(x).D;
  if (x.dtype != DType::float16 && x.dtype != DType::bfloat16) return "x must be float16 or bfloat16";
  if (centroids.dtype == DType::float64) return "centroids must not be float64";
  if (D % similarity_limits::channel_multiple != 0 || D > similarity_limits::max_channels) {
    return "channels of x must be within cuda::similarity_limits";
  }
  if (centroids.size[1] > similarity_limits::max_subcentroids) return "sub-centroids a class exceed cuda::similarity_limits";
  if (N > INT32_MAX - 1024 || centroids.numel() / D > INT32_MAX / 4 || centroids.size[0] > INT32_MAX / 64) {
    return "x must have fewer than 2^31 pixels, and centroids fewer than 2^25 classes";
  }
  if (!runs_of(x, &runs, &planes)) {
    return "x must be 16-byte aligned, with adjacent channels ([N,D], channels_last) or adjacent pixels ([B,D,H,W]) and its "
           "other strides multiples of 8";
  }
  return nullptr;
}

Problem problem_of(const View& x, const View& centroids, Metric metric, const Packed& packed) {
  Problem p{};
  p.N = int(Pixels(x).N()), p.C = int(centroids.size[0]), p.K = int(centroids.size[1]), p.D = int(centroids.size[2]);
  p.boxes = packed.boxes, p.per_lane = packed.per_lane, p.tiles = packed.tiles, p.slots = int(divide_up(p.C, 4));
  for (int e = 0; e < p.per_lane * p.K; e += p.K) p.begins |= 1u << e, p.ends |= 1u << (e + p.K - 1);
  p.metric = metric, p.rows = packed.rows, p.bias = packed.bias;
  runs_of(x, &p.x, &p.planes);
  return p;
}

Packed::Packed(Parts& parts, const View& centroids, Metric metric) {
  const int64_t C = centroids.size[0], K = centroids.size[1], D = centroids.size[2];
  per_lane = int(kOwn / K);
  tiles = int(divide_up(divide_up(C, 4), per_lane)), boxes = int(divide_up(D, kBox));
  rows = parts.take<uint16_t>(int64_t(tiles) * kColumns * boxes * kBox);
  bias = metric == Metric::sqeuclidean ? parts.take<float>(int64_t(tiles) * kColumns) : nullptr;
}

cudaError_t Packed::pack(const View& centroids, Metric metric, DType dtype, cudaStream_t stream) const {
  const int64_t total = int64_t(tiles) * kColumns;
  const Grid grid{unsigned(divide_up(total, kThreads / 32)), kThreads, stream};
  const int C = int(centroids.size[0]), K = int(centroids.size[1]), D = int(centroids.size[2]);
  const Source source{centroids.data, centroids.dtype};
  if (dtype == DType::float16) {
    return launch(grid, pack_centroids_kernel<Float16>, source, static_cast<Float16*>(rows), bias, C, K, D, boxes * kBox,
                  per_lane, total, metric);
  }
  return launch(grid, pack_centroids_kernel<BFloat16>, source, static_cast<BFloat16*>(rows), bias, C, K, D, boxes * kBox,
                per_lane, total, metric);
}

}  // namespace cuda
}  // namespace dnc
