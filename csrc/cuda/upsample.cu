// The class of the highest bilinearly interpolated score of every target pixel.
//
//   label[b,i,j] = argmax_c u[b,c,i,j],  u: scores interpolated at (i,j); ties: the lowest class; NaN: the highest score
//
// Reads scores [B,C,h,w] (float32/float16/bfloat16, any strides; each four times, three of these from L1 and L2); writes label
// [B,H,W] int64. [B,C,H,W] never exists. Floors on an H100 for [8,150,128,128] float32 -> 512^2, E = 315 M (3.0 TB/s; a cycle
// of a processor is 128 products or 64 comparisons and selections, 132 processors at 1.7 GHz): 79 + 17 MB 32 us; 3 * E
// comparisons and selections 66 us.
//
// Plan: a thread owns a cell (upsample_cells.h) and keeps the best score and class of its pixels in registers while it walks
// over the classes, the next class being loaded meanwhile. A block owns 32 cells of four rows of cells. All classes are rounded
// alike, so equal scores stay equal. A warp that has met a NaN or Inf walks over the classes once more, with care.
// Deterministic: a label depends on its own scores only. Reference: dnc_kernels/ops/upsample/reference.py.
#include "upsample_cells.h"

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
};

template <int K>
struct Best {
  float score[K * K];
  int label[K * K];
};

// Walks over the classes. kCareful: any scores; the first NaN stays, a neighbour without a share is not seen. Otherwise returns
// NaN where a NaN or Inf was met.
template <class S, int K, bool kCareful>
__device__ inline float walk(const Argmax& a, const CellPlace& place, const float (&right)[K], const float (&down)[K],
                             Best<K>& best) {
#pragma unroll
  for (int k = 0; k < K * K; k++) best.score[k] = -INFINITY, best.label[k] = 0;
  float poison = 0;
  const char* at = place.row;
  Corners coming = load_corners<S>(at, place.offset);
  for (int c = 0; c < a.C; c++) {
    const Corners s = coming;
    at += c + 1 < a.C ? a.scores.sc : 0;
    coming = load_corners<S>(at, place.offset);  // of the next class, while this one is worked on
    const float above = s.s01 - s.s00, below = s.s11 - s.s10;
    if (!kCareful) poison = fmaf(below - above, 0.f, poison);
#pragma unroll
    for (int kx = 0; kx < K; kx++) {
      const float top = kCareful ? blend_exact(s.s00, s.s01, right[kx]) : fmaf(right[kx], above, s.s00);
      const float bottom = kCareful ? blend_exact(s.s10, s.s11, right[kx]) : fmaf(right[kx], below, s.s10);
#pragma unroll
      for (int ky = 0; ky < K; ky++) {
        const int k = kx * K + ky;
        const float u = kCareful ? blend_exact(top, bottom, down[ky]) : fmaf(down[ky], bottom - top, top);
        bool higher = u > best.score[k];  // the first of equal scores stays
        if (kCareful) higher = higher || (u != u && best.score[k] == best.score[k]);
        best.score[k] = higher ? u : best.score[k], best.label[k] = higher ? c : best.label[k];
      }
    }
  }
  return poison;
}

template <class S, int K>
__global__ void __launch_bounds__(kThreads) upsample_argmax_kernel(Argmax a) {
  const CellPlace place = place_of(a.scores, a.rows, a.columns, a.blocks);
  const Span &across = place.across, &along = place.along;
  float right[K], down[K];
#pragma unroll
  for (int k = 0; k < K; k++) {
    right[k] = share(a.columns, across.begin + k, place.x), down[k] = share(a.rows, along.begin + k, place.y);
  }
  Best<K> best;
  const float poison = walk<S, K, false>(a, place, right, down, best);
  if (poison != poison) walk<S, K, true>(a, place, right, down, best);
#pragma unroll
  for (int k = 0; k < K * K; k++) {
    if (place.inside(k % K, k / K)) a.label[place.pixel(a.rows, a.columns, k % K, k / K)] = best.label[k];
  }
}

template <class S>
Status launch_argmax(const Argmax& a, cudaStream_t stream) {
  const unsigned blocks = unsigned(a.blocks.count());
  switch (pixels_of(a.rows, a.columns)) {
    case 1: DNC_CHECK(launch(Grid{blocks, kThreads, stream}, upsample_argmax_kernel<S, 1>, a)); break;
    case 2: DNC_CHECK(launch(Grid{blocks, kThreads, stream}, upsample_argmax_kernel<S, 2>, a)); break;
    default: DNC_CHECK(launch(Grid{blocks, kThreads, stream}, upsample_argmax_kernel<S, 4>, a));
  }
  return {};
}

}  // namespace

size_t upsample_argmax_workspace(const UpsampleArgmax&) { return 0; }

Status upsample_argmax(const UpsampleArgmax& a, const Launch& where) {
  Argmax call{};
  const int64_t B = a.label.size[0], H = a.label.size[1], W = a.label.size[2];
  if (a.label.numel() == 0) return {};
  if (const Status s = axes_of(a.scores, H, W, a.align_corners, 0, 0, 0, 0, &call.rows, &call.columns); !s.ok()) return s;
  const int64_t most = samples_of_launch(a.scores, call.columns);
  if (most == 0) return bad_argument("eight rows of scores must span less than 4 GB");
  const OnDevice device(where);
  DNC_CHECK(device.error());
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  call.C = int(a.scores.size[1]);
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
