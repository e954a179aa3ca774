// The class of the highest bilinearly interpolated score of every target pixel.
//
//   label[b,i,j] = argmax_c u[b,c,i,j],  u: scores interpolated at (i,j); ties: the lowest class; NaN: the highest score
//
// Reads scores [B,C,h,w] (float32/float16/bfloat16, any strides; each four times, three of these from L1 and L2); writes label
// [B,H,W] int64. [B,C,H,W] never exists. Floors on an H100 for [8,150,128,128] float32 -> 512^2, E = 315 M (3.0 TB/s; a cycle
// of a processor is 4 instructions for 32 lanes, 132 processors at 1.7 GHz): 79 + 17 MB 32 us; 4.2 * E instructions 46 us.
//
// Plan: a thread owns a cell (upsample_cells.h) and keeps the best score of each of its pixels in registers while it walks over
// the classes, and which group of kGroup classes it came from: one maximum a class, one comparison a group. Then it looks for
// the class in the groups that won, mostly one a cell. A block owns 32 cells of four rows of cells. All classes are rounded
// alike, so equal scores stay equal. The pixels of a cell with a NaN or Inf take a careful path, one by one.
// Deterministic: a label depends on its own scores only. Reference: dnc_kernels/ops/upsample/reference.py.
#include "upsample_classes.h"

namespace dnc {
namespace cuda {
namespace {

constexpr int kThreads = 32 * kCellWarps;

struct Argmax {
  Source scores;
  int64_t* label;  // [B,H,W]
  Axis rows, columns;
  int C;
  CellBlocks blocks;
  bool adjacent;  // classes are neighbours in memory
};

constexpr int kGroup = 8;  // classes

// Shares of the far source pixels in the pixels of a cell.
template <int K>
struct Shares {
  float right[K], down[K];
};

// Scores of a class at the pixels of a cell, the same operations for every class.
template <int K>
__device__ inline void interpolate(const Corners& s, const Shares<K>& at, float (&u)[K * K]) {
  const float above = s.s01 - s.s00, below = s.s11 - s.s10;
#pragma unroll
  for (int kx = 0; kx < K; kx++) {
    const float top = fmaf(at.right[kx], above, s.s00), step = fmaf(at.right[kx], below, s.s10) - top;
#pragma unroll
    for (int ky = 0; ky < K; ky++) u[kx * K + ky] = fmaf(at.down[ky], step, top);
  }
}

// Labels of a cell without NaN and Inf; false: it has one. Keeps the best score and its group of classes, which takes one
// comparison a class, and then looks for the class in the groups that won.
template <class S, int K, bool kAdjacent>
__device__ inline bool find_labels(const Argmax& a, const CellPlace& place, const Shares<K>& at, int (&label)[K * K]) {
  float best[K * K], u[K * K];
  int group[K * K];
#pragma unroll
  for (int k = 0; k < K * K; k++) best[k] = -INFINITY, group[k] = 0, label[k] = 0;
  float poison = 0;  // NaN once a NaN or Inf was met
  ClassReader<S, kAdjacent> scores(a.scores.data, a.scores.sc, place.offset, 0, a.C,
                                   shared_memory<ClassRun>() + threadIdx.x / 32);
  for (int first = 0; first < a.C; first += kGroup) {
    float before[K * K];
#pragma unroll
    for (int k = 0; k < K * K; k++) before[k] = best[k];
    const int end = min(first + kGroup, a.C);
    for (int c = first; c < end; c++) {
      const Corners s = scores.read(c, c + 1);
      poison = fmaf((s.s11 - s.s10) - (s.s01 - s.s00), 0.f, poison);
      interpolate(s, at, u);
#pragma unroll
      for (int k = 0; k < K * K; k++) best[k] = fmaxf(best[k], u[k]);
    }
#pragma unroll
    for (int k = 0; k < K * K; k++) group[k] = best[k] > before[k] ? first : group[k];  // the first of equal scores stays
  }
  if (poison != poison) return false;

  unsigned left = 0;
#pragma unroll
  for (int k = 0; k < K * K; k++) left |= unsigned(place.inside(k % K, k / K)) << k;
  while (left != 0) {
    int first = 0;  // group of one of the pixels that are left
#pragma unroll
    for (int k = 0; k < K * K; k++) first = left >> k & 1 ? group[k] : first;
    unsigned won = 0;
#pragma unroll
    for (int k = 0; k < K * K; k++) won |= unsigned(group[k] == first) << k;
    left &= ~won;
    for (int c = min(first + kGroup, a.C) - 1; c >= first; c--) {  // downwards: the lowest of equal scores is the last
      interpolate(load_corners<S>(a.scores.data + c * a.scores.sc, place.offset), at, u);
#pragma unroll
      for (int k = 0; k < K * K; k++) label[k] = (won >> k & 1) != 0 && u[k] == best[k] ? c : label[k];
    }
  }
  return true;
}

// Label of one pixel of any scores: the first NaN stays, a neighbour without a share is not seen.
template <class S>
__device__ int label_of_pixel(const Argmax& a, const uint32_t (&offset)[4], float right, float down) {
  float best = -INFINITY;
  int label = 0;
  const char* plane = a.scores.data;
  for (int c = 0; c < a.C; c++, plane += a.scores.sc) {
    const Corners s = load_corners<S>(plane, offset);
    const float u = blend_exact(blend_exact(s.s00, s.s01, right), blend_exact(s.s10, s.s11, right), down);
    if (u != u) return c;
    if (u > best) best = u, label = c;
  }
  return label;
}

template <class S, int K, bool kAdjacent>
__global__ void __launch_bounds__(kThreads) upsample_argmax_kernel(Argmax a) {
  const CellPlace place = place_of(a.scores, a.rows, a.columns, a.blocks);
  const int i = place.along.begin, j = place.across.begin;
  Shares<K> at;
#pragma unroll
  for (int k = 0; k < K; k++) at.right[k] = share(a.columns, j + k, place.x), at.down[k] = share(a.rows, i + k, place.y);
  int label[K * K];
  if (find_labels<S, K, kAdjacent>(a, place, at, label)) {
#pragma unroll
    for (int k = 0; k < K * K; k++) {
      if (place.inside(k % K, k / K)) a.label[place.pixel(a.rows, a.columns, k % K, k / K)] = label[k];
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < K * K; k++) {
      if (!place.inside(k % K, k / K)) continue;
      a.label[place.pixel(a.rows, a.columns, k % K, k / K)] =
          label_of_pixel<S>(a, place.offset, share(a.columns, j + k / K, place.x), share(a.rows, i + k % K, place.y));
    }
  }
}

template <class S>
Status launch_argmax(const Argmax& a, cudaStream_t stream) {
  const unsigned blocks = unsigned(a.blocks.count());
  return with_pixels(a.rows, a.columns, [&](auto k) -> Status {
    constexpr int K = decltype(k)::value;
    const Grid grid{blocks, kThreads, stream, a.adjacent ? kCellWarps * sizeof(ClassRun) : 0};
    DNC_CHECK(launch(grid, a.adjacent ? upsample_argmax_kernel<S, K, true> : upsample_argmax_kernel<S, K, false>, a));
    return {};
  });
}

}  // namespace

size_t upsample_argmax_workspace(const UpsampleArgmax&) { return 0; }

Status upsample_argmax(const UpsampleArgmax& a, const Launch& where) {
  Argmax call{};
  const int64_t B = a.label.size[0], H = a.label.size[1], W = a.label.size[2];
  if (a.label.numel() == 0) return {};
  if (const Status s = axes_of(a.scores, H, W, a.align_corners, 0, 0, 0, 0, &call.rows, &call.columns); !s.ok()) return s;
  const int64_t most = samples_of_launch(a.scores);
  if (most == 0) return bad_argument(kTooLarge);
  const OnDevice device(where);
  DNC_CHECK(device.error());
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  call.C = int(a.scores.size[1]), call.adjacent = adjacent_classes(a.scores);
  for (int64_t b = 0; b < B; b += most) {
    call.scores = Source(a.scores, bytes_of(a.scores.dtype)), call.scores.data += b * call.scores.sb;
    call.label = a.label.as<int64_t>() + b * H * W;
    call.blocks = CellBlocks(call.rows, call.columns, b + most < B ? most : B - b);
    if (!call.blocks.fit()) return bad_argument("scores must have fewer than 2^31 cells");
    Status s;
    switch (a.scores.dtype) {
      case DType::float32: s = launch_argmax<float>(call, stream); break;
      case DType::float16: s = launch_argmax<Float16>(call, stream); break;
      case DType::bfloat16: s = launch_argmax<BFloat16>(call, stream); break;
      default: return bad_argument("scores must be float32, float16 or bfloat16");
    }
    if (!s.ok()) return s;
  }
  return {};
}

}  // namespace cuda
}  // namespace dnc
