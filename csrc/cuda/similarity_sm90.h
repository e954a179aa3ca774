// The products of the similarity kernels on Hopper (sm_90a): a producer warp feeds two warpgroups of 64 pixels through the
// tensor memory accelerator; wgmma multiplies.
//
// Shared memory: pixels of both warpgroups, which stay for the whole tile of 128; then `stages` boxes of sub-centroids
// [kColumns, 64 channels], a ring. In a cluster of two each block fetches half of every box and multicasts it to both, so that
// L2 is read once for 256 pixels. All boxes have the 128-byte swizzle. Barriers of the ring: full (bytes) and empty (8 consumer
// warps of every block); of the pixels: one pair a warpgroup.
#pragma once
#include "similarity.h"

namespace dnc {
namespace cuda {
namespace sm90 {

constexpr int kGroups = 2, kGroupPixels = 64, kPixels = kGroups * kGroupPixels, kConsumers = kGroups * 128;
constexpr int kThreads = 128 + kConsumers;  // the producer's warpgroup first: its registers go to the others
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kMaxStages = 12;
static_assert(kConsumers == 32 * kMaxWarps);

struct Barriers {
  PhaseBarrier full[kMaxStages], empty[kMaxStages], pixels_full[kGroups], pixels_empty[kGroups];
};

struct Maps {
  TensorMap x;     // boxes of 64 pixels and 64 channels: [D, N, 1], or of planes [HW, D, B], the innermost first
  TensorMap rows;  // [64 boxes, tiles * kColumns]: boxes of 64 channels and kColumns / cluster rows
};

// What a block knows of its shared memory and its place.
struct Block {
  unsigned char* x;     // [group][box][64 rows of 128 bytes]
  unsigned char* ring;  // [stage][kColumns rows of 128 bytes]
  unsigned char* rest;  // after them
  Barriers* barriers;
  int boxes, stages, cluster, rank;

  __device__ Block(unsigned char* shared, int boxes, int stages, int cluster)
      : boxes(boxes), stages(stages), cluster(cluster), rank(int(cluster_rank())) {
    x = shared;
    ring = x + kGroups * boxes * kGroupPixels * 128;
    barriers = reinterpret_cast<Barriers*>(ring + stages * kColumns * 128);
    rest = reinterpret_cast<unsigned char*>(barriers + 1);
  }
  static size_t bytes(int boxes, int stages) {
    return size_t(kGroups) * boxes * kGroupPixels * 128 + size_t(stages) * kColumns * 128 + sizeof(Barriers);
  }
  // Tiles of 128 pixels of this block: all blocks of a cluster go through the ring the same number of times.
  // From blockIdx.x in steps of the grid; a cluster's blocks stop together.
  __device__ int first(int tile) const { return (tile - rank) * kGroups; }
  __device__ bool has(int tile, const PixelRuns& x) const { return first(tile) < x.groups(kGroupPixels); }

  // Called by all threads of the block.
  __device__ void start() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < stages; s++) {
        barrier_init(&barriers->full[s], 1);
        barrier_init(&barriers->empty[s], unsigned(kConsumers / 32 * cluster));
      }
      for (int g = 0; g < kGroups; g++) barrier_init(&barriers->pixels_full[g], 1), barrier_init(&barriers->pixels_empty[g], 4);
      barrier_init_fence();
    }
    cluster_barrier();  // no block announces bytes at, or arrives at, a barrier that is not initialised
  }
};

// A position in the ring, and how often it went round.
struct Stage {
  int index = 0;
  unsigned parity = 0;
  __device__ void advance(int stages) {
    if (++index == stages) index = 0, parity ^= 1;
  }
};

// The producer, one thread: boxes of sub-centroids of the first product, then of the second (slice > 0: boxes of channels at a
// time), in the order in which the consumers take them.
__device__ inline void produce(const Problem& p, const Block& block, const Maps* maps, int slice) {
  prefetch_map(&maps->x), prefetch_map(&maps->rows);
  Stage stage;
  const int part = kColumns / block.cluster;
  const unsigned bytes = unsigned(kColumns) * 128;
  const auto fetch = [&](int tile, int box) {
    // the other block's consumers too have read what this box overwrites
    barrier_wait(&block.barriers->empty[stage.index], stage.parity ^ 1);
    PhaseBarrier* full = &block.barriers->full[stage.index];
    barrier_arrive_expect(full, bytes);
    unsigned char* to = block.ring + stage.index * kColumns * 128 + block.rank * part * 128;
    const int row = tile * kColumns + block.rank * part;
    if (block.cluster > 1) {
      copy_box_multicast(to, &maps->rows, box * kBox, row, full, uint16_t((1u << block.cluster) - 1));
    } else {
      copy_box(to, &maps->rows, box * kBox, row, full);
    }
    stage.advance(block.stages);
  };
  // f(box, column, row, image) for the boxes of a group's pixels. Past the last run there are zeros too: one run's pixels go
  // on, planes have an end.
  const auto each_box = [&](const Place& first, auto f) {
#pragma unroll 1
    for (int box = 0; box < block.boxes; box++) {
      const int d = box * kBox;
      p.planes ? f(box, first.offset, d, first.image) : f(box, d, first.image * p.x.run + first.offset, 0);
    }
  };
  unsigned parity = 0;
  for (int at = int(blockIdx.x); block.has(at, p.x); at += int(gridDim.x), parity ^= 1) {
    for (int g = 0; g < kGroups; g++) {
      barrier_wait(&block.barriers->pixels_empty[g], parity ^ 1);
      PhaseBarrier* full = &block.barriers->pixels_full[g];
      barrier_arrive_expect(full, unsigned(block.boxes) * kGroupPixels * 128);
      each_box(p.x.place(at * kGroups + g, kGroupPixels), [&](int box, int column, int row, int image) {
        copy_box(block.x + (g * block.boxes + box) * kGroupPixels * 128, &maps->x, column, row, image, full);
      });
    }
    // the next pixels on their way to L2 while these are multiplied
    for (int g = 0; g < kGroups && block.has(at + int(gridDim.x), p.x); g++) {
      each_box(p.x.place((at + int(gridDim.x)) * kGroups + g, kGroupPixels),
               [&](int, int column, int row, int image) { prefetch_box(&maps->x, column, row, image); });
    }
    for (int tile = 0; tile < p.tiles; tile++) {
#pragma unroll 1  // the producer has few registers
      for (int box = 0; box < p.boxes; box++) fetch(tile, box);
    }
    if (slice > 0) {
      for (int first_box = 0; first_box < p.boxes; first_box += slice) {
        for (int tile = 0; tile < p.tiles; tile++) {
#pragma unroll 1
          for (int box = first_box; box < p.boxes && box < first_box + slice; box++) fetch(tile, box);
        }
      }
    }
  }
}

// A consumer warpgroup's side of the ring. A box is given back when the products that read it are complete: one behind the
// newest.
template <class T, bool kPlanes>
class Consumer {
 public:
  __device__ explicit Consumer(const Block& block) : block_(block) {}

  __device__ PixelTile<kPlanes> pixels() const { return {group_pixels(), kGroupPixels * 128, thread_here() / 32 % 4 * 16}; }
  __device__ Place place(const PixelRuns& x, int tile) const { return x.place(tile * kGroups + group(), kGroupPixels); }
  // All warps of the group: its products have read the pixels, or its gradient is complete in their place.
  __device__ void meet() const { barrier(1 + group(), 128); }
  // A tile has pixels, of this block or its cluster's other one, while first(tile) < end(x).
  __device__ int first(int tile) const { return block_.first(tile); }
  __device__ int end(const PixelRuns& x) const { return x.groups(kGroupPixels); }
  __device__ void begin(int) const { barrier_wait(&block_.barriers->pixels_full[group()], parity_); }
  // This warp has done with the pixels.
  __device__ void release_pixels() {
    parity_ ^= 1;
    async_proxy_fence();  // what was written there by hand, before the next pixels are copied over it
    __syncwarp();         // all lanes have done so
    if (lane_here() == 0) barrier_arrive(&block_.barriers->pixels_empty[group()], unsigned(block_.rank));
  }

  // s = products of the group's pixels and a tile of sub-centroids.
  __device__ void scores(float (&s)[kSums]) {
    for (int box = 0; box < block_.boxes; box++) {
      const unsigned char* b = next_box();
      const uint64_t x = matrix_descriptor(group_pixels() + box * kGroupPixels * 128, 0), p = matrix_descriptor(b, 0);
      products_fence();
#pragma unroll
      for (int k = 0; k < kBox / 16; k++) {  // 16 channels: 32 bytes on, or 16 rows of a plane
        multiply<T, kPlanes>(s, x + k * (kPlanes ? 16 * 128 >> 4 : 2), p + k * 2, box + k > 0);
      }
      issued();
    }
    done();
    products_pin(s);
  }

  // u += dS p over the boxes of a slice of channels; a: fragments of dS, of 16 columns each.
  template <int S>
  __device__ void gradient(float (&u)[S][kBox / 2], const uint32_t (&a)[kFragments][4], int boxes) {
#pragma unroll
    for (int box = 0; box < S; box++) {
      if (box < boxes) {
        const uint64_t p = matrix_descriptor(next_box(), 0);
        products_fence();
#pragma unroll
        for (int f = 0; f < kFragments; f++) multiply_transposed<T>(u[box], a[f], p + f * (16 * 128 >> 4), true);
        issued();
      }
    }
    done();
#pragma unroll
    for (int box = 0; box < S; box++) products_pin(u[box]);
  }

 private:
  // made anew at each use, because registers are scarce
  __device__ static int group() { return thread_here() / 128 - 1; }
  __device__ unsigned char* group_pixels() const { return block_.x + group() * block_.boxes * kGroupPixels * 128; }
  __device__ unsigned char* next_box() {
    barrier_wait(&block_.barriers->full[stage_.index], stage_.parity);
    return block_.ring + stage_.index * kColumns * 128;
  }
  __device__ void issued() {
    products_commit();
    if (held_ >= 0) {
      products_wait<1>();
      give_back();
    }
    held_ = stage_.index;
    stage_.advance(block_.stages);
  }
  __device__ void done() {
    products_wait<0>();
    give_back();
    held_ = -1;
  }
  __device__ void give_back() const {
    const int rank = lane_here();
    if (rank < block_.cluster) barrier_arrive(&block_.barriers->empty[held_], unsigned(rank));
  }

  const Block& block_;
  int held_ = -1;
  unsigned parity_ = 0;  // of the pixels
  Stage stage_;
};

// ---- host

struct Shape {
  int stages, cluster;
  unsigned blocks;
  size_t shared;  // without what a kernel adds
};
// With `extra` bytes of the kernel's own; stages == 0: does not fit.
cudaError_t shape_of(Shape* shape, const Problem& p, size_t extra);
cudaError_t maps_of(Maps* maps, const Problem& p, DType dtype, int cluster);

}  // namespace sm90
}  // namespace cuda
}  // namespace dnc
