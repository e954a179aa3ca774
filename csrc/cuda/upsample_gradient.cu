// Gradient of the cross-entropy of bilinearly interpolated scores.
//
//   d loss / d u_c = (own + smooth * W) * exp(u_c - lse) - own * [c = y] - smooth * w_c        (names: upsample_loss.cu)
//   grad_scores[b,c,r,x] = sum over target pixels (i,j) of their share of (r,x) * grad_loss * d loss / d u_c
//
// Reads scores [B,C,h,w] (each four times, three of these from L1 and L2), labels, lse and, if given, grad_loss [B,H,W] once
// for kClasses classes; writes grad_scores [B,C,h,w] float32. [B,C,H,W] never exists; nothing is kept in global memory. Floors
// on an H100 for [8,150,128,128] float32 -> 512^2 (rates: upsample_loss.cu): 2 * 79 + 12 * 2.1 MB 61 us; with 8 rows and 31
// columns a block 1.16 * 5.5 * E operations 72 us; 1.16 * E / 4 exponentials 26 us.
//
// Plan: gathers, without atomics. A thread owns a cell (upsample_cells.h). A block owns some rows of source pixels, 31 wide, of
// at most kClasses classes, and walks down their cells; its warps share the pixels of a row of cells and split the classes.
// Labels, lse and factors of a row of cells go through shared memory once; then each thread has in registers, for each pixel of
// its cell, the factor g of the class's power and h, the same times the pixel's share of the lower corners. The powers of a
// column of pixels are first * down^ky (upsample_cells.h), so that its two sums are polynomials in `down` with coefficients g
// and h, by Horner's rule: no power is made by itself. What a cell gives to its right corners goes to the lane to the right;
// what it gives to its lower corners waits in shared memory for the next row of cells. The label's own term is not compared for
// each class but added once for each label of a cell, by the warp that owns the class. Where a class is steep in a cell, or its
// pixels' lse are far apart or not finite, the warp takes an exponential a pixel.
// Deterministic: every sum has a fixed order that depends on sizes only; cutting rows otherwise does not change it.
// Reference: dnc_kernels/ops/upsample/reference.py, csrc/cpu/upsample_unit.h.
#include "upsample_loss.h"

namespace dnc {
namespace cuda {
namespace {

constexpr int kClasses = 160;  // of a block; 40 KB of planes
constexpr int kMostWarps = 8;
// Log-sum-exp of a pixel that does not count: whatever its scores, its probabilities are 0.
constexpr float kNoLse = 3e38f;
// Powers are those of u - lse of the cell's lowest pixel; where others are up to 2^kSpread above, pixels that do not count stay
// below 2^(24 + 91) (kSteep).
constexpr float kSpread = 24.f;
constexpr float kMostExponent = 120.f;

struct Plan {
  int lanes;            // cells of a row of cells, over all samples, cell -1 included
  int blocks_x;         // blocks of 31 source columns each
  int strips, rows;     // of source pixels
  int chunks, classes;  // of a block
};

// The pixels of a row of cells. Behind it: two planes [classes][32], what the upper and the lower source row have got so far.
template <int K>
struct Shared {
  float lse[K * K][32];
  float own[K * K][32];     // factor of the label's one, grad_loss included
  float factor[K * K][32];  // grad_loss, 0 where the pixel does not count
  int label[K * K][32];     // -1: does not count
};

// What a cell gives to its four corners.
struct Gift {
  float top, bottom, top_right, bottom_right;  // the first two: to all corners of the row
};

template <int K>
struct Cell {
  float g[K * K], h[K * K];  // factor of the power, the same times the share of the lower corners
  float right[K];            // shares of the right corners
  float reference;           // subtracted from the exponents
  bool tame;                 // so for all pixels; else for each its own lse
  bool counts;               // some pixel does
};

// Shares that a pixel gives to the lower, or right, corners. Cell -1 gives all to its far end, the source pixel 0.
__device__ inline float share_given(const Span& s, int k, int cell) {
  return cell < 0 ? 1.f : fmaf(float(k), s.stride, s.first);
}

// Reads the pixels of the calling lane's cell (y,x).
template <int K>
__device__ inline void read_cell(const Shared<K>& in, float all_smooth, const Span& across, const Span& along, int x, int y,
                                 Cell<K>& cell) {
  const int lane = threadIdx.x % 32;
  float low = kNoLse, high = kLowest;
  bool usual = true;
  cell.counts = false;
#pragma unroll
  for (int k = 0; k < K * K; k++) {
    const float lse = in.lse[k][lane], on = fmaf(in.factor[k][lane], all_smooth, in.own[k][lane]);
    if (lse != kNoLse) {  // so is NaN
      cell.counts = true, usual = usual && fabsf(lse) < 1e30f && fabsf(on) < 1e30f;
      low = fminf(low, lse), high = fmaxf(high, lse);
    }
    cell.g[k] = on;
  }
  cell.tame = usual && (!cell.counts || high - low <= kSpread);
  cell.reference = low;  // kNoLse where no pixel counts: powers are 0 then
#pragma unroll
  for (int k = 0; k < K * K; k++) {
    if (cell.tame && cell.g[k] != 0) cell.g[k] *= exp2_approximate(cell.reference - in.lse[k][lane]);
    cell.h[k] = cell.g[k] * share_given(along, k % K, y);
  }
#pragma unroll
  for (int kx = 0; kx < K; kx++) cell.right[kx] = share_given(across, kx, x);
}

// Gift of a class whose powers are products.
template <int K>
__device__ inline Gift give(const Cell<K>& cell, const Slopes& s, const Span& across, const Span& along) {
  const Powers p = powers_of(s, across, along, -cell.reference);
  float first = p.first, down = p.down;
  Gift gift{0, 0, 0, 0};
#pragma unroll
  for (int kx = 0; kx < K; kx++) {
    float all = cell.g[kx * K + K - 1], low = cell.h[kx * K + K - 1];
#pragma unroll
    for (int ky = K - 2; ky >= 0; ky--) all = fmaf(all, down, cell.g[kx * K + ky]), low = fmaf(low, down, cell.h[kx * K + ky]);
    const float to_right = first * cell.right[kx];
    gift.top = fmaf(first, all, gift.top), gift.bottom = fmaf(first, low, gift.bottom);
    gift.top_right = fmaf(to_right, all, gift.top_right), gift.bottom_right = fmaf(to_right, low, gift.bottom_right);
    first *= p.right, down *= p.both;
  }
  gift.top -= gift.bottom, gift.top_right -= gift.bottom_right;
  return gift;
}

// Gift of any class. A pixel with a share of a NaN or +inf is known by its log-sum-exp, NaN; no other one may see them.
template <int K>
__device__ inline Gift give_each(const Cell<K>& cell, const Corners& raw, const Span& across, const Span& along, int y,
                                 const Shared<K>& in) {
  const Corners c = finite(raw);
  Gift gift{0, 0, 0, 0};
#pragma unroll
  for (int kx = 0; kx < K; kx++) {
    const float right = fmaf(float(kx), across.stride, across.first);
    const float left_end = blend(c.s00, c.s01, right), right_end = blend(c.s10, c.s11, right);
    float all = 0, low = 0;
#pragma unroll
    for (int ky = 0; ky < K; ky++) {
      const int k = kx * K + ky;
      const float u = blend(left_end, right_end, fmaf(float(ky), along.stride, along.first));
      float exponent = fmaf(u, kLog2e, -(cell.tame ? cell.reference : in.lse[k][threadIdx.x % 32]));
      exponent = exponent > kMostExponent ? kMostExponent : exponent;  // of a pixel that does not count; NaN stays
      const float p = cell.g[k] * exp2_approximate(exponent);
      all += p;
      const float down = share_given(along, ky, y);
      if (down != 0) low = fmaf(p, down, low);
    }
    gift.top += all - low, gift.bottom += low;
    if (cell.right[kx] != 0) {
      gift.top_right = fmaf(all - low, cell.right[kx], gift.top_right);
      gift.bottom_right = fmaf(low, cell.right[kx], gift.bottom_right);
    }
  }
  return gift;
}

// Takes the right corners' part to the lane to the right: what a source column gets from the cells to its left and right.
__device__ inline void pass_on(Gift& gift) {
  const float top = __shfl_up_sync(~0u, gift.top_right, 1), bottom = __shfl_up_sync(~0u, gift.bottom_right, 1);
  gift.top += top - gift.top_right, gift.bottom += bottom - gift.bottom_right;
}

template <class I, int K>
__device__ inline void read_pixels(const UpsampleCall& a, const UpsampleGradient& out, int b, const Span& across,
                                   const Span& along, bool here, Shared<K>* to) {
  const int lane = threadIdx.x % 32;
  for (int k = threadIdx.x / 32; k < K * K; k += blockDim.x / 32) {
    const int i = along.begin + k % K, j = across.begin + k / K, row = i - a.rows.target0;
    int label = -1;
    float lse = kNoLse, factor = 0, own = 0;
    if (here && i < along.end && j < across.end) label = a.labels.at<I>(a.labels.offset(b, row, j), a.C, a.ignored);
    if (label >= 0) {
      lse = a.lse[(int64_t(b) * a.rows.targets + row) * a.columns.targets + j];
      factor = out.grad_loss == nullptr ? 1.f : out.grad_loss[b * out.lb + row * out.lh + j * out.lw];
      own = factor * ((1 - a.smoothing) * (a.weight == nullptr ? 1.f : a.weight[label]));
    }
    to->lse[k][lane] = lse, to->own[k][lane] = own, to->factor[k][lane] = factor, to->label[k][lane] = label;
  }
}

// One pixel's gift; corners without a share do not see a NaN.
__device__ inline void add_pixel(float value, float right, float down, Gift& gift) {
  const float low = down == 0 ? 0.f : value * down, high = value - low;
  gift.top += high, gift.bottom += low;
  if (right != 0) gift.top_right = fmaf(high, right, gift.top_right), gift.bottom_right = fmaf(low, right, gift.bottom_right);
}

// What every class gets times its weight, with smoothing: the sum over pixels of smooth * grad_loss.
template <int K>
__device__ inline Gift level_of(const Shared<K>& in, float smooth, const Span& across, const Span& along, int x, int y) {
  Gift level{0, 0, 0, 0};
  for (int k = 0; k < K * K; k++) {
    add_pixel(in.factor[k][threadIdx.x % 32] * smooth, share_given(across, k / K, x), share_given(along, k % K, y), level);
  }
  pass_on(level);
  return level;
}

// Subtracts `own` of the pixels with label y from a class's two planes, for every label whose class this warp owns.
template <int K, int kTogether>
__device__ inline void subtract_own(const Shared<K>& in, int class0, int classes, const Span& across, const Span& along, int x,
                                    int y, float* top, float* bottom) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  unsigned left = 0;
#pragma unroll
  for (int k = 0; k < K * K; k++) {
    const int c = in.label[k][lane] - class0;
    left |= unsigned(c >= 0 && c < classes && c / kTogether % warps == warp) << k;
  }
  while (__any_sync(~0u, left != 0)) {
    Gift gift{0, 0, 0, 0};
    const bool has = left != 0;
    const int label = has ? in.label[__ffs(int(left)) - 1][lane] : 0;
    for (unsigned rest = left; rest != 0; rest &= rest - 1) {
      const int k = __ffs(int(rest)) - 1;
      if (in.label[k][lane] != label) continue;
      left &= ~(1u << k);
      add_pixel(in.own[k][lane], share_given(across, k / K, x), share_given(along, k % K, y), gift);
    }
    const int at = (label - class0) * 32 + lane;
    if (has) top[at] -= gift.top - gift.top_right, bottom[at] -= gift.bottom - gift.bottom_right;
    __syncwarp();  // a column gets its left pixels' part from the lane before, after its own
    if (has && lane < 31) top[at + 1] -= gift.top_right, bottom[at + 1] -= gift.bottom_right;
    __syncwarp();  // the next label's come after these
  }
}

// Keeps the sum of class c in place of the scores that its lane has read; the last class of a run writes all of them, so that
// the classes of a pixel go to memory together. `to`: of the run's first class, or null: not written.
__device__ inline void write_run(ClassRun& run, float sum, int c, int classes, bool done, float* to, int64_t oc) {
  const int lane = threadIdx.x % 32;
  run.at[c % kRun][0][lane] = sum;
  if (!done || ((c + 1) % kRun != 0 && c + 1 != classes)) return;
  __syncwarp();  // all lanes have kept theirs
  for (int i = 0; i < kRun; i++) {
    const int of = i * (32 / kRun) + lane / kRun;
    float* there = reinterpret_cast<float*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(to), of));
    if (there != nullptr && lane % kRun <= c % kRun) there[lane % kRun * oc] = run.at[lane % kRun][0][of];
  }
  __syncwarp();  // they have been read and may be written again
}

template <class S, int K, bool kAdjacent>
__global__ void __launch_bounds__(32 * kMostWarps, 2)
    upsample_gradient_kernel(UpsampleCall a, UpsampleGradient out, Plan plan) {
  Shared<K>* shared = shared_memory<Shared<K>>();
  float* planes = reinterpret_cast<float*>(shared + 1);
  const Axis &rows = a.rows, &columns = a.columns;
  const int class0 = blockIdx.z * plan.classes, classes = min(plan.classes, a.C - class0);
  // from a lane to the others: the compiler then knows that it is the same for the whole warp
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, int(threadIdx.x / 32), 0), warps = blockDim.x / 32;
  // cells of a sample, from -1 on; the first one of a block only hands on to the second
  const int cell = int(blockIdx.x) * 31 - 1 + lane, of_sample = columns.sources + 1;
  const bool here = cell >= 0 && cell < plan.lanes;
  const int inside = min(max(cell, 0), plan.lanes - 1);
  const int b = inside / of_sample, x = inside % of_sample - 1;
  const bool writes = here && x >= 0 && lane > 0;
  const int first = blockIdx.y * plan.rows, last = min(first + plan.rows, rows.sources);
  const int j_from = first_target(columns, x), j_to = first_target(columns, x + 1);
  const float all_smooth = a.smoothing > 0 ? a.smoothing / float(a.C) * sum_of_weights(a.weight, a.C) : 0.f;
  const float smooth = a.smoothing / float(a.C);
  const int64_t left = b * a.scores.sb + source_at(columns, x) * a.scores.sw;
  const int64_t right = b * a.scores.sb + source_at(columns, x + 1) * a.scores.sw;
  float* to = out.out + b * out.ob + max(x, 0) * out.ow;

  // a warp owns kTogether classes, leaves those of the other warps out, and so on
  constexpr int kTogether = kAdjacent ? kRun : 1;
  const int leap = (warps - 1) * kTogether + 1, class_first = warp * kTogether;
  const auto after = [leap](int c) { return c + ((c + 1) % kTogether == 0 ? leap : 1); };
  ClassRun* run = reinterpret_cast<ClassRun*>(planes + 2 * plan.classes * 32) + warp;
  for (int c = class_first; c < classes; c = after(c)) {
    planes[c * 32 + lane] = 0, planes[(plan.classes + c) * 32 + lane] = 0;
  }

  for (int local = first - 1; local < last; local++) {  // row of the cells' upper corners, of those at hand
    const int y = local + rows.source0;
    const int i_from = first_target(rows, y), i_to = first_target(rows, y + 1);
    const int64_t above = source_at(rows, y) * a.scores.sh, below = source_at(rows, y + 1) * a.scores.sh;
    const uint32_t offset[4] = {uint32_t(above + left), uint32_t(above + right), uint32_t(below + left),
                                uint32_t(below + right)};
    float* top = planes + (local + 1) % 2 * (plan.classes * 32);
    float* bottom = planes + (local + 2) % 2 * (plan.classes * 32);
    const int parts = rows.parts * columns.parts;
    for (int part = 0; part < parts; part++) {
      const Span across = span_of(columns, x, j_from, j_to, part % columns.parts);
      const Span along = span_of(rows, y, i_from, i_to, part / columns.parts);
      __syncthreads();  // all warps have read the pixels before, and written their planes
      switch (a.labels.dtype) {
        case DType::int32: read_pixels<int32_t, K>(a, out, b, across, along, here, shared); break;
        case DType::uint8: read_pixels<uint8_t, K>(a, out, b, across, along, here, shared); break;
        default: read_pixels<int64_t, K>(a, out, b, across, along, here, shared);
      }
      __syncthreads();  // the pixels are complete
      Cell<K> cells;
      read_cell(*shared, all_smooth, across, along, x, y, cells);
      const bool done = part == parts - 1, output = done && writes && local >= first;
      // where this thread's class is: in both planes, and in the result
      const int at = class_first * 32 + lane;
      float *upper = top + at, *lower = bottom + at, *result = to + local * out.oh + (class0 + class_first) * out.oc;
      const auto hand_on = [&](int c, float to_top, float to_bottom) {
        const float sum = *upper + to_top;
        *upper = done ? 0.f : sum, *lower += to_bottom;
        if (kAdjacent) {
          write_run(*run, sum, c, classes, done, output ? result - c % kRun * out.oc : nullptr, out.oc);
        } else if (output) {
          *result = sum;
        }
        const int step = after(c) - c;
        upper += step * 32, lower += step * 32, result += step * out.oc;
      };
      if (!__any_sync(~0u, cells.counts)) {
        for (int c = class_first; c < classes && done; c = after(c)) hand_on(c, 0, 0);
        continue;
      }
      subtract_own<K, kTogether>(*shared, class0, classes, across, along, x, y, top, bottom);
      Gift level{0, 0, 0, 0};
      if (a.smoothing > 0) level = level_of(*shared, smooth, across, along, x, y);
      const float steepest = cells.tame ? kSteep : -1.f;
      ClassReader<S, kAdjacent> scores(a.scores.data + class0 * a.scores.sc, a.scores.sc, offset, class_first, classes, run);
      for (int c = class_first; c < classes; c = after(c)) {
        const Corners now = scores.read(c, after(c));
        const Slopes slopes = slopes_of(now, across, along);
        Gift gift;
        if (__all_sync(~0u, gentle(slopes, steepest))) {
          gift = give(cells, slopes, across, along);
        } else {
          gift = give_each(cells, now, across, along, y, *shared);
        }
        pass_on(gift);
        if (a.smoothing > 0) {
          const float w = a.weight == nullptr ? 1.f : a.weight[class0 + c];
          gift.top = fmaf(-w, level.top, gift.top), gift.bottom = fmaf(-w, level.bottom, gift.bottom);
        }
        hand_on(c, gift.top, gift.bottom);
      }
    }
  }
}

// How a call is cut into blocks. The fewest rounds of blocks on the processors, counted in rows of cells: few rows make many
// blocks, and each block works on one row of cells more than it owns.
Status plan_of(const UpsampleCall& a, Plan* plan, unsigned* warps) {
  int processors;
  DNC_CHECK(attribute(&processors, cudaDevAttrMultiProcessorCount));
  plan->chunks = int(divide_up(a.C, kClasses)), plan->classes = int(divide_up(a.C, plan->chunks));
  *warps = plan->classes >= 64 ? kMostWarps : plan->classes >= 32 ? 4 : 2;
  const int64_t lanes = int64_t(a.B) * (a.columns.sources + 1);
  plan->lanes = int(lanes), plan->blocks_x = int(divide_up(lanes, 31));
  const int64_t busy = 16 / *warps;  // blocks that a processor needs to be busy
  int64_t best = INT64_MAX;
  for (int rows = 1; rows <= 64; rows++) {
    const int64_t strips = divide_up(a.rows.sources, rows), all = plan->blocks_x * strips * plan->chunks;
    const int64_t rounds = divide_up(all, processors), cost = (rows + 1) * (rounds > busy ? rounds : busy);
    if (cost < best) best = cost, plan->rows = rows, plan->strips = int(strips);
  }
  if (lanes > INT32_MAX - 32 || plan->strips > 65535) return bad_argument("scores must have fewer than 2^31 cells in a row");
  return {};
}

template <class S>
Status launch_gradient(const UpsampleCall& call, const UpsampleGradient& out, cudaStream_t stream) {
  Plan plan{};
  unsigned warps = 0;
  if (const Status s = plan_of(call, &plan, &warps); !s.ok()) return s;
  const dim3 blocks(unsigned(plan.blocks_x), unsigned(plan.strips), unsigned(plan.chunks));
  return with_pixels(call.rows, call.columns, [&](auto k) -> Status {
    constexpr int K = decltype(k)::value;
    const size_t runs = call.adjacent ? warps * sizeof(ClassRun) : 0;
    const size_t bytes = sizeof(Shared<K>) + size_t(plan.classes) * 2 * 32 * sizeof(float) + runs;
    const auto kernel = call.adjacent ? upsample_gradient_kernel<S, K, true> : upsample_gradient_kernel<S, K, false>;
    DNC_CHECK(launch(Grid{blocks, 32 * warps, stream, bytes}, kernel, call, out, plan));
    return {};
  });
}

}  // namespace

Status upsample_gradient(const UpsampleCall& call, const UpsampleGradient& out, DType scores, cudaStream_t stream) {
  switch (scores) {
    case DType::float32: return launch_gradient<float>(call, out, stream);
    case DType::float16: return launch_gradient<Float16>(call, out, stream);
    default: return launch_gradient<BFloat16>(call, out, stream);
  }
}

}  // namespace cuda
}  // namespace dnc
