// centroid_cross_entropy on any GPU from sm_80 on: max over K, LayerNorm over C, cross-entropy and dX in one persistent kernel.
//
// Reads x [N,D] once from memory and the packed sub-centroids [M,D] twice a tile of at most 128 pixels from L2; writes dX, own
// similarities, prediction and loss. FLOPs 4 N M D: ADE20K (N=131072, C=150, K=10, D=256) 201 GFLOP over 260 TF/s (A100) = 773
// us. Plan: similarity_sm80.h; between the products as on Hopper (similarity_loss.h). Deterministic: every sum has one order.
// Reference: dnc_kernels/ops/similarity/reference.py.
#include "similarity_loss.h"
#include "similarity_sm80.h"

namespace dnc {
namespace cuda {
namespace {

using namespace sm80;

template <class T, bool kPlanes, bool kShared>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) centroid_loss_sm80_kernel(const __grid_constant__ Loss a) {
#if DNC_AMPERE
  const Problem& p = a.p;
  Block<T, kPlanes> block(p, shared_memory<unsigned char>(), a.grad_x.data != nullptr);
  const Warps warps{int(blockDim.x) / 32, 0};
  const Slab<kShared> slab = slab_of<kShared>(a, block.rest, int(blockDim.x), int(threadIdx.x));
  const PixelTile<kPlanes> x = block.pixels();
  clear_sums(a, warps);
  for (int at = int(blockIdx.x); block.first(at) < block.end(p.x); at += int(gridDim.x)) {
    const Place place = block.place(p.x, at);
    block.begin(at);
    const Rows rows = read_rows<T>(p, x, place, a.ignore_index);
    clear_own(p, rows);
    ToSlab<kShared> sink{slab};
    for (int tile = 0; tile < p.tiles; tile++) {
      float s[kSums];
      block.scores(s);
      take_maxima(p, rows, s, tile, sink);
    }
    const Finish finish = cross_entropy(a, rows, slab, sink.sum, warps);
    if (a.grad_x.data != nullptr) {
      for (int slice = 0; slice < p.boxes; slice += kSliceBoxes) {
        const int boxes = p.boxes - slice < kSliceBoxes ? p.boxes - slice : kSliceBoxes;
        float u[kSliceBoxes][kBox / 2];
#pragma unroll
        for (int box = 0; box < kSliceBoxes; box++) {
#pragma unroll
          for (int i = 0; i < kBox / 2; i++) u[box][i] = 0;
        }
        for (int tile = 0; tile < p.tiles; tile++) {
          uint32_t fragments[kFragments][4];
          make_fragments<T>(fragments, p, slab, tile);
          block.gradient(u, fragments, boxes);
        }
        put_gradient<T>(u, finish, x, slice, boxes);
      }
      if (kPlanes) {
        block.meet();  // the group's gradient is complete
      } else {
        __syncwarp();  // the warp's is
      }
      store_gradient<T>(p, a.grad_x, x, place, warps.count < 4 ? warps.count : 4);
    }
  }
  __syncthreads();  // all warps of the block have stored their sums
  add_warps(a, warps.count, int(threadIdx.x), int(blockDim.x));
#else
  trap();
#endif
}

template <class T, bool kPlanes, bool kShared>
Status run(const Loss& a, cudaStream_t stream, Launched* launched) {
  Shape shape;
  DNC_CHECK(shape_of(&shape, a.p, kShared ? slab_bytes(a.p.slots, 32) : 0));
  if (shape.warps == 0) return bad_argument("x and centroids do not fit this GPU's shared memory");
  launched->blocks = shape.blocks, launched->warps = shape.blocks * unsigned(shape.warps);
  const Grid grid{shape.blocks, unsigned(shape.warps) * 32, stream, shape.shared};
  DNC_CHECK(launch(grid, centroid_loss_sm80_kernel<T, kPlanes, kShared>, a));
  return {};
}

}  // namespace

namespace sm80 {

cudaError_t shape_of(Shape* shape, const Problem& p, size_t extra_a_warp) {
  int limit = 0, processors = 0;
  cudaError_t error = attribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess) error = attribute(&processors, cudaDevAttrMultiProcessorCount);
  if (error != cudaSuccess) return error;
  const auto bytes = [&](int warps) {
    const int groups = warps < 4 ? 1 : warps / 4, rows = p.planes || warps >= 4 ? 64 : warps * 16;
    return size_t(groups) * p.boxes * rows * 128 + warps * extra_a_warp + size_t(kStages) * kColumns * 128;
  };
  shape->warps = kMaxWarps;
  while (shape->warps > 0 && bytes(shape->warps) > size_t(limit)) shape->warps /= 2;
  if (shape->warps == 0) return cudaSuccess;
  shape->shared = bytes(shape->warps);
  const int pixels = shape->warps < 4 ? shape->warps * 16 : 64;
  int64_t blocks = divide_up(divide_up(p.x.run, pixels) * p.x.images, shape->warps < 4 ? 1 : shape->warps / 4);
  if (blocks > processors) blocks = processors;
  if (blocks > kMaxBlocks) blocks = kMaxBlocks;
  shape->blocks = unsigned(blocks);
  return cudaSuccess;
}

}  // namespace sm80

Status run_loss_sm80(const Loss& a, DType dtype, bool in_shared, cudaStream_t stream, Launched* launched) {
  return for_layout(dtype, a.p.planes, [&](auto element, auto planes) {
    return in_shared ? run<decltype(element), decltype(planes)::value, true>(a, stream, launched)
                     : run<decltype(element), decltype(planes)::value, false>(a, stream, launched);
  });
}

}  // namespace cuda
}  // namespace dnc
