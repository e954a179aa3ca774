// Cross-entropy of bilinearly interpolated scores, and the log-sum-exp that its gradient (upsample_gradient.cu) needs.
//
//   u_c = interpolated scores;  lse = log sum_c exp u_c;  own = (1-s) w_y;  smooth = s/C;  W = sum_c w_c
//   loss = own * (lse - u_y) + smooth * (W * lse - sum_c w_c u_c)         (s: label smoothing; w: class weights)
//
// Reads scores [B,C,h,w] (float32/float16/bfloat16, any strides; each four times, three of these from L1 and L2), labels
// [B,H,W] and the labels' scores once more; writes lse [B,H,W] float32 in powers of 2 where a gradient follows, loss [B,H,W]
// where asked, and two doubles a block, which a second launch adds in order. [B,C,H,W] never exists. Floors on an H100 for
// [8,150,128,128] float32 -> 512^2, E = B*C*H*W = 315 M (3.0 TB/s; a cycle of a processor is 16 exponentials or 4 instructions
// for 32 lanes, 132 processors at 1.7 GHz): 79 + 8 * 2.1 + 8 MB 35 us; E / 4 exponentials 22 us; 3.9 * E operations 43 us.
//
// Plan: a warp owns 32 cells of a row of cells (upsample_cells.h; samples follow each other), a thread one, a block four rows
// of cells, whose common source rows meet in L1. A thread walks over the classes, the next class being loaded meanwhile, and
// keeps a sum of exponentials for each of its pixels in registers. All are shifted by the highest score that the corners have
// shown, which is raised only when it is passed by kSlack. Where a class is steep in a cell, its warp takes an exponential a
// pixel; where a sum is lost (the shift was far too high, or NaN or Inf), the pixel is summed again with its own maximum.
// Deterministic: blocks and orders of summation depend on sizes only. Reference: dnc_kernels/ops/upsample/reference.py.
#include "upsample_loss.h"

namespace dnc {
namespace cuda {
namespace {

constexpr int kWarps = kCellWarps, kThreads = 32 * kWarps;
// A pixel's sum is of powers of 2 of its scores over the shift, times 2^kRaise: exp2 ends at 2^-126, and terms that matter
// (2^-30 of the sum) are products that begin 3 * kSteep = 2^52 lower in a sum of kSmallestSum. At most 2^(64+29) times C.
constexpr float kRaise = 64.f, kSlack = 20.f, kSmallestSum = 1e-12f;
constexpr float kFloor = -1e30f;  // where the highest score starts: far from kLowest

struct Loss {
  float* loss;      // [B,H,W] or null
  double* partial;  // [blocks,2] sums of losses and class weights, or null
  CellBlocks blocks;
};

// Behind it, where classes are adjacent: a ClassRun for each warp.
template <int K>
struct Shared {
  double of_warp[kWarps];
  float lse[K * K][kThreads];  // of a thread, where pixels are summed again
};

// Sums of the pixels of a cell over classes.
template <int K>
struct Sums {
  float sum[K * K];
  float highest = kFloor, shift = 0;

  // Whole warps call it.
  __device__ void add(const Corners& c, const Span& across, const Span& along) {
    const Slopes s = slopes_of(c, across, along);
    const float high = highest_of(c);
    if (__any_sync(~0u, !(gentle(s) & (high <= highest + kSlack)))) {
      raise(high);
      add_each(bounded(c), across, along);
      return;
    }
    const Powers p = powers_of(s, across, along, shift);
    float first = p.first, down = p.down;
#pragma unroll
    for (int kx = 0; kx < K; kx++) {
      float power = first;
#pragma unroll
      for (int ky = 0; ky < K; ky++) sum[kx * K + ky] += power, power *= down;
      first *= p.right, down *= p.both;
    }
  }

 private:
  __device__ void raise(float high) {
    const float seen = fmaxf(highest, high), keep = exp2_approximate((highest - seen) * kLog2e);
#pragma unroll
    for (int k = 0; k < K * K; k++) sum[k] *= keep;
    highest = seen, shift = kRaise - seen * kLog2e;
  }
  __device__ void add_each(const Corners& c, const Span& across, const Span& along) {
#pragma unroll
    for (int kx = 0; kx < K; kx++) {
      const float right = fmaf(float(kx), across.stride, across.first);
      const float top = blend(c.s00, c.s01, right), bottom = blend(c.s10, c.s11, right);
#pragma unroll
      for (int ky = 0; ky < K; ky++) {
        const float u = blend(top, bottom, fmaf(float(ky), along.stride, along.first));
        sum[kx * K + ky] += exp2_approximate(fmaf(u, kLog2e, shift));
      }
    }
  }
};

// Log-sum-exp of one pixel in powers of 2, shifted by its own maximum.
template <class S>
__device__ float log_sum_exp_of_pixel(const char* row, int64_t sc, int classes, const uint32_t (&offset)[4], float right,
                                      float down) {
  float high = kLowest, sum = 0;
  for (int c = 0; c < classes; c++, row += sc) {
    const Corners s = bounded(load_corners<S>(row, offset));
    const float u = blend(blend(s.s00, s.s01, right), blend(s.s10, s.s11, right), down);
    const float seen = fmaxf(high, u);  // not NaN: that comes from u
    sum = sum * exp2_approximate((high - seen) * kLog2e) + exp2_approximate((u - seen) * kLog2e);
    high = seen;
  }
  return fmaf(high, kLog2e, log2f(sum));
}

template <class I, int K>
__device__ inline void load_labels(const UpsampleCall& a, const CellPlace& place, int (&label)[K * K]) {
#pragma unroll
  for (int k = 0; k < K * K; k++) {
    const int i = place.along.begin + k % K - a.rows.target0, j = place.across.begin + k / K;
    label[k] = place.inside(k % K, k / K) ? a.labels.at<I>(a.labels.offset(place.b, i, j), a.C, a.ignored) : -1;
  }
}

template <class S, int K, bool kAdjacent>
__global__ void __launch_bounds__(kThreads, 4) upsample_loss_kernel(UpsampleCall a, Loss out) {
  Shared<K>* shared = shared_memory<Shared<K>>();
  const Axis &rows = a.rows, &columns = a.columns;
  const CellPlace place = place_of(a.scores, rows, columns, out.blocks);
  const Span &across = place.across, &along = place.along;

  Sums<K> sums;
#pragma unroll
  for (int k = 0; k < K * K; k++) sums.sum[k] = 0;
  const bool smooth = a.smoothing > 0 && (out.loss != nullptr || out.partial != nullptr);
  Corners weighted{0, 0, 0, 0};  // sum_c w_c s_c
  ClassReader<S, kAdjacent> scores(a.scores.data, a.scores.sc, place.offset, 0, a.C,
                                   reinterpret_cast<ClassRun*>(shared + 1) + threadIdx.x / 32);
  for (int c = 0; c < a.C; c++) {
    const Corners now = scores.read(c, c + 1);
    sums.add(now, across, along);
    if (smooth) {
      const float w = a.weight == nullptr ? 1.f : a.weight[c];
      weighted.s00 = fmaf(fmaxf(now.s00, kLowest), w, weighted.s00);
      weighted.s01 = fmaf(fmaxf(now.s01, kLowest), w, weighted.s01);
      weighted.s10 = fmaf(fmaxf(now.s10, kLowest), w, weighted.s10);
      weighted.s11 = fmaf(fmaxf(now.s11, kLowest), w, weighted.s11);
    }
  }

  float (&lse)[K * K] = sums.sum;
  bool lost = false;
#pragma unroll
  for (int k = 0; k < K * K; k++) {
    const bool usable = sums.sum[k] > kSmallestSum && sums.sum[k] < INFINITY;
    lost = lost || (place.inside(k % K, k / K) && !usable);
    lse[k] = usable ? fmaf(sums.highest, kLog2e, log2f(sums.sum[k]) - kRaise) : NAN;
  }
  if (lost) {
    auto& slot = shared->lse;  // only this thread's own: no barrier
#pragma unroll
    for (int k = 0; k < K * K; k++) slot[k][threadIdx.x] = lse[k];
#pragma unroll 1
    for (int k = 0; k < K * K; k++) {
      if (!place.inside(k % K, k / K) || slot[k][threadIdx.x] == slot[k][threadIdx.x]) continue;
      slot[k][threadIdx.x] =
          log_sum_exp_of_pixel<S>(a.scores.data, a.scores.sc, a.C, place.offset, share(columns, across.begin + k / K, place.x),
                                  share(rows, along.begin + k % K, place.y));
    }
#pragma unroll
    for (int k = 0; k < K * K; k++) lse[k] = slot[k][threadIdx.x];
  }

  if (a.lse != nullptr) {
#pragma unroll
    for (int k = 0; k < K * K; k++) {
      if (place.inside(k % K, k / K)) a.lse[place.pixel(rows, columns, k % K, k / K)] = lse[k];
    }
  }
  if (out.loss == nullptr && out.partial == nullptr) return;

  int label[K * K];
  switch (a.labels.dtype) {
    case DType::int32: load_labels<int32_t, K>(a, place, label); break;
    case DType::uint8: load_labels<uint8_t, K>(a, place, label); break;
    default: load_labels<int64_t, K>(a, place, label);
  }
  const float all_weights = smooth ? sum_of_weights(a.weight, a.C) : 0.f;
  float rights[K], downs[K];
#pragma unroll
  for (int k = 0; k < K; k++) {
    rights[k] = share(columns, across.begin + k, place.x), downs[k] = share(rows, along.begin + k, place.y);
  }
  double total = 0, total_weight = 0;
#pragma unroll
  for (int k = 0; k < K * K; k++) {
    const float right = rights[k / K], down = downs[k % K];
    float loss = 0;
    if (label[k] >= 0) {
      const Corners s = load_corners<S>(a.scores.data + label[k] * a.scores.sc, place.offset);
      const float u = blend_exact(blend_exact(s.s00, s.s01, right), blend_exact(s.s10, s.s11, right), down);
      const float weight = a.weight == nullptr ? 1.f : a.weight[label[k]];
      loss = weight * (1 - a.smoothing) * (lse[k] * kLn2 - u);
      if (smooth) {
        const float mean = blend(blend(weighted.s00, weighted.s01, right), blend(weighted.s10, weighted.s11, right), down);
        loss += a.smoothing / float(a.C) * (all_weights * (lse[k] * kLn2) - mean);
      }
      total += loss, total_weight += weight;
    }
    if (out.loss != nullptr && place.inside(k % K, k / K)) out.loss[place.pixel(rows, columns, k % K, k / K)] = loss;
  }
  if (out.partial == nullptr) return;
  total = block_sum<kWarps>(total, shared->of_warp);
  total_weight = block_sum<kWarps>(total_weight, shared->of_warp);
  if (threadIdx.x == 0) out.partial[2 * int64_t(blockIdx.x)] = total, out.partial[2 * int64_t(blockIdx.x) + 1] = total_weight;
}

// sums [2] from partial [blocks,2]: each thread its blocks in order, then the threads as a tree.
constexpr int kAddThreads = 256;
struct AddShared {
  double of_warp[kAddThreads / 32];
};
__global__ void __launch_bounds__(kAddThreads) upsample_add_sums_kernel(const double* partial, int64_t blocks, double* sums) {
  double* of_warp = shared_memory<AddShared>()->of_warp;
  double total[2] = {0, 0};
  for (int64_t n = threadIdx.x; n < blocks; n += kAddThreads) total[0] += partial[2 * n], total[1] += partial[2 * n + 1];
  for (double& t : total) t = block_sum<kAddThreads / 32>(t, of_warp);
  if (threadIdx.x == 0) sums[0] = total[0], sums[1] = total[1];
}

struct Workspace {
  float* lse;
  double* partial;
  size_t bytes;
};
Workspace layout(void* base, const UpsampleCrossEntropy& a, const Axis& rows, const Axis& columns) {
  Workspace w{};
  Parts parts(base);
  const int64_t B = a.labels.size[0];
  if (a.grad_scores && a.scores.size[1] > 1) w.lse = parts.take<float>(a.labels.numel());
  if (a.sums) w.partial = parts.take<double>(2 * B * CellBlocks(rows, columns, 1).count());  // enough for samples one by one
  w.bytes = parts.bytes();
  return w;
}

Status axes_of(const UpsampleCrossEntropy& a, Axis* rows, Axis* columns) {
  return axes_of(a.scores, a.labels.size[1], a.labels.size[2], a.align_corners, a.source_rows, a.source_row0, a.target_rows,
                 a.target_row0, rows, columns);
}

template <class S>
Status launch_loss(const UpsampleCall& call, const Loss& out, cudaStream_t stream) {
  const unsigned blocks = unsigned(out.blocks.count());
  return with_pixels(call.rows, call.columns, [&](auto k) -> Status {
    constexpr int K = decltype(k)::value;
    const size_t runs = call.adjacent ? kWarps * sizeof(ClassRun) : 0;
    const Grid grid{blocks, kThreads, stream, sizeof(Shared<K>) + runs};
    const auto kernel = call.adjacent ? upsample_loss_kernel<S, K, true> : upsample_loss_kernel<S, K, false>;
    DNC_CHECK(launch(grid, kernel, call, out));
    return {};
  });
}

Status check(const UpsampleCrossEntropy& a) {
  if (a.class_weight && a.class_weight.dtype != DType::float32) return bad_argument("class_weight must be float32");
  if (a.grad_loss && a.grad_loss.dtype != DType::float32) return bad_argument("grad_loss must be float32");
  if (a.loss && a.loss.dtype != DType::float32) return bad_argument("loss must be float32");
  if (a.grad_scores && a.grad_scores.dtype != DType::float32) return bad_argument("grad_scores must be float32");
  const bool half = a.scores.dtype == DType::float16 || a.scores.dtype == DType::bfloat16;
  if (a.scores.dtype != DType::float32 && !half) return bad_argument("scores must be float32, float16 or bfloat16");
  return {};
}

}  // namespace

size_t upsample_cross_entropy_workspace(const UpsampleCrossEntropy& a) {
  Axis rows, columns;
  return !axes_of(a, &rows, &columns).ok() ? 0 : layout(nullptr, a, rows, columns).bytes;
}

Status upsample_cross_entropy(const UpsampleCrossEntropy& a, const Launch& where) {
  if (const Status s = check(a); !s.ok()) return s;
  const OnDevice device(where);
  DNC_CHECK(device.error());
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  UpsampleCall call{};
  if (const Status s = axes_of(a, &call.rows, &call.columns); !s.ok()) return s;
  if (!enough(where, upsample_cross_entropy_workspace(a))) return too_small();
  const Workspace w = layout(where.workspace, a, call.rows, call.columns);
  const bool pixels = a.labels.numel() > 0;
  if (a.sums && !pixels) DNC_CHECK(cudaMemsetAsync(a.sums.data, 0, 2 * sizeof(double), stream));
  const int64_t B = a.scores.size[0], size = bytes_of(a.scores.dtype);
  if (a.scores.numel() == 0) return {};
  const bool gradient = a.grad_scores && a.scores.size[1] > 1 && pixels;
  call.weight = a.class_weight.as<float>(), call.C = int(a.scores.size[1]);
  call.adjacent = adjacent_classes(a.scores);
  call.ignored = a.ignore_index, call.smoothing = float(a.label_smoothing);
  const int64_t most = samples_of_launch(a.scores);
  if (most == 0) return bad_argument(kTooLarge);
  int64_t partials = 0;
  for (int64_t b = 0; b < B; b += most) {
    call.B = int(b + most < B ? most : B - b);
    call.scores = Source(a.scores, size), call.scores.data += b * call.scores.sb;
    call.labels = Labels(a.labels);
    call.labels.data = static_cast<const char*>(a.labels.data) + b * a.labels.stride[0] * bytes_of(a.labels.dtype);
    const int64_t first = b * a.labels.size[1] * a.labels.size[2];
    call.lse = gradient ? w.lse + first : nullptr;
    if (pixels && (gradient || a.sums || a.loss)) {
      const CellBlocks blocks(call.rows, call.columns, call.B);
      if (!blocks.fit()) return bad_argument("scores must have fewer than 2^31 cells");
      const Loss out{a.loss ? a.loss.as<float>() + first : nullptr, a.sums ? w.partial + 2 * partials : nullptr, blocks};
      Status s;
      switch (a.scores.dtype) {
        case DType::float32: s = launch_loss<float>(call, out, stream); break;
        case DType::float16: s = launch_loss<Float16>(call, out, stream); break;
        default: s = launch_loss<BFloat16>(call, out, stream);
      }
      if (!s.ok()) return s;
      partials += blocks.count();
    }
    if (!a.grad_scores) continue;
    UpsampleGradient g{};
    const int64_t* stride = a.grad_loss.stride;
    if (a.grad_loss) g = {a.grad_loss.as<float>() + b * stride[0], stride[0], stride[1], stride[2]};
    stride = a.grad_scores.stride;
    g.out = a.grad_scores.as<float>() + b * stride[0];
    g.ob = stride[0], g.oc = stride[1], g.oh = stride[2], g.ow = stride[3];
    UpsampleCall of_gradient = call;
    if (!gradient) of_gradient.rows.targets = 0;  // no pixel, or one class: probability 1, whatever rounding says
    if (const Status s = upsample_gradient(of_gradient, g, a.scores.dtype, stream); !s.ok()) return s;
  }
  if (a.sums && pixels) {
    DNC_CHECK(launch(Grid{1, kAddThreads, stream, sizeof(AddShared)}, upsample_add_sums_kernel, w.partial, partials,
                     a.sums.as<double>()));
  }
  return {};
}

}  // namespace cuda
}  // namespace dnc
