// centroid_cross_entropy on Hopper: max over K, LayerNorm over C, cross-entropy and dX in one persistent kernel.
//
// Reads x [N,D] once from memory and the packed sub-centroids [M,D] twice a tile of 256 pixels (a cluster of two blocks) from
// L2; writes dX, own similarities, prediction and loss. Neither [N,C,K] nor [N,C] reaches memory while the slab fits shared
// memory. FLOPs 4 N M D. ADE20K (N=131072, C=150, K=10, D=256): 201 GFLOP over 800 TF/s = 252 us; 0.8 GB of L2 reads over 5.5
// TB/s = 145 us; 141 MB over 3.0 TB/s = 47 us: compute. Cityscapes/8 (N=262144, C=19): 64 us of compute; 282 MB = 94 us:
// memory. Plan: similarity_sm90.h. One producer warp, two consumer warpgroups of 64 pixels; the groups drift apart by what the
// ring holds, so that one multiplies while the other takes maxima. Product 1 from shared memory; dS of product 2 in registers.
// Deterministic: every sum has one order. Reference: dnc_kernels/ops/similarity/reference.py.
#include "similarity_loss.h"
#include "similarity_sm90.h"

namespace dnc {
namespace cuda {
namespace {

using namespace sm90;

template <class T, bool kPlanes, bool kShared>
__global__ void __launch_bounds__(kThreads, 1)
    centroid_loss_sm90_kernel(const __grid_constant__ Loss a, const __grid_constant__ Maps maps, int stages, int cluster) {
#if DNC_HOPPER
  // boxes of channels of dX in registers; addresses of a slab in global memory need some of them
  constexpr int kSliceBoxes = kShared ? 4 : 3;
  const Problem& p = a.p;
  const auto here = [&] { return Block(shared_memory<unsigned char>(), p.boxes, stages, cluster); };
  here().start();
  if (threadIdx.x < 128) {
    registers_decrease<kProducerRegisters>();
    if (threadIdx.x == 0) produce(p, here(), &maps, a.grad_x.data != nullptr ? kSliceBoxes : 0);
    __syncwarp();  // the cluster's barrier wants whole warps
  } else {
    registers_increase<kConsumerRegisters>();
    const Block block = here();
    const int thread = int(threadIdx.x) - 128;
    const Warps warps{kConsumers / 32, 4};
    const Slab<kShared> slab = slab_of<kShared>(a, block.rest, kConsumers, thread);
    Consumer<T, kPlanes> consumer(block);
    const PixelTile<kPlanes> x = consumer.pixels();
    clear_sums(a, warps);
    for (int at = int(blockIdx.x); block.has(at, p.x); at += int(gridDim.x)) {
      const auto place = [&] { return consumer.place(p.x, at); };  // made anew at each use, because registers are scarce
      consumer.begin(at);
      const Rows rows = read_rows<T>(p, x, place(), a.ignore_index);
      clear_own(p, rows);
      ToSlab<kShared> sink{slab};
      for (int tile = 0; tile < p.tiles; tile++) {
        float s[kSums];
        consumer.scores(s);
        take_maxima(p, rows, s, tile, sink);
      }
      const Finish finish = cross_entropy(a, rows, slab, sink.sum, warps);
      if (a.grad_x.data != nullptr) {
        consumer.meet();  // the group's products have read the pixels that the gradient now overwrites
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
            consumer.gradient(u, fragments, boxes);
          }
          put_gradient<T>(u, finish, x, slice, boxes);
        }
        if (kPlanes) {
          consumer.meet();  // the group's gradient is complete
        } else {
          __syncwarp();  // the warp's is
        }
        store_gradient<T>(p, a.grad_x, x, place(), 4);
      }
      consumer.release_pixels();
    }
    if (a.parameters) barrier(1 + kGroups, kConsumers);  // all warps have stored their sums; 1 and 2 are the groups' own
    add_warps(a, kConsumers / 32, thread, kConsumers);
  }
  cluster_barrier();  // no block leaves while another may still copy into it or arrive at its barriers
#else
  trap();
#endif
}

template <class T, bool kPlanes, bool kShared>
Status run(const Loss& a, DType dtype, cudaStream_t stream, Launched* launched) {
  const size_t extra = kShared ? slab_bytes(a.p.slots, kConsumers) : 0;
  Shape shape;
  DNC_CHECK(shape_of(&shape, a.p, extra));
  if (shape.stages == 0) return bad_argument("x and centroids do not fit this GPU's shared memory");
  Maps maps;
  DNC_CHECK(maps_of(&maps, a.p, dtype, shape.cluster));
  launched->blocks = shape.blocks, launched->warps = shape.blocks * (kConsumers / 32);
  const Grid grid{shape.blocks, kThreads, stream, shape.shared + extra, unsigned(shape.cluster)};
  DNC_CHECK(launch(grid, centroid_loss_sm90_kernel<T, kPlanes, kShared>, a, maps, shape.stages, shape.cluster));
  return {};
}

}  // namespace

Status run_loss_sm90(const Loss& a, DType dtype, bool in_shared, cudaStream_t stream, Launched* launched) {
  return for_layout(dtype, a.p.planes, [&](auto element, auto planes) {
    return in_shared ? run<decltype(element), decltype(planes)::value, true>(a, dtype, stream, launched)
                     : run<decltype(element), decltype(planes)::value, false>(a, dtype, stream, launched);
  });
}

}  // namespace cuda
}  // namespace dnc
