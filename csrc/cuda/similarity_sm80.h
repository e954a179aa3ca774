// The products of the similarity kernels on any GPU from sm_80 on: cp.async feeds a ring of boxes, mma.sync multiplies.
//
// Shared memory as on Hopper (similarity_sm90.h): the pixels of the block, 16 a warp, which stay; then a ring of kStages boxes
// of sub-centroids [kColumns, 64 channels], in the same swizzle. All threads copy, all warps multiply.
#pragma once
#include "similarity.h"

namespace dnc {
namespace cuda {
namespace sm80 {

constexpr int kStages = 3;
constexpr int kSliceBoxes = 4;  // boxes of channels of dX in registers

template <class T, bool kPlanes>
class Block {
 public:
  unsigned char* rest;

  __device__ Block(const Problem& p, unsigned char* shared, bool second)
      : p_(p),
        groups_(blockDim.x <= 128 ? 1 : int(blockDim.x) / 128),
        group_pixels_(blockDim.x <= 128 ? int(blockDim.x) / 2 : 64),
        warp_(int(threadIdx.x) / 32),
        lane_(int(threadIdx.x) % 32),
        second_(second) {
    x_ = shared;
    ring_ = x_ + groups_ * group_bytes();
    rest = ring_ + kStages * kColumns * 128;
  }
  __device__ PixelTile<kPlanes> pixels() const { return {x_ + warp_ / 4 * group_bytes(), box_bytes(), warp_ % 4 * 16}; }
  __device__ Place place(const PixelRuns& x, int tile) const { return x.place(tile * groups_ + warp_ / 4, group_pixels_); }
  // A tile has pixels while first(tile) < end(x).
  __device__ static int first(int tile) { return tile; }
  __device__ int end(const PixelRuns& x) const { return (x.groups(group_pixels_) + groups_ - 1) / groups_; }
  // All warps: the gradient is complete in the pixels' place.
  __device__ void meet() const { __syncthreads(); }
  // The next tile's `begin` waits for all that have not done with the pixels.
  __device__ void release_pixels() const {}

  // Fetches the pixels of a tile, and the first boxes. The block's threads have done with the pixels before.
  __device__ void begin(int tile) {
    __syncthreads();  // nobody reads the pixels or the ring any more
    for (int group = 0; group < groups_; group++) {
      const Place at = p_.x.place(tile * groups_ + group, group_pixels_);
      const PixelTile<kPlanes> to{x_ + group * group_bytes(), box_bytes(), 0};
      const T* x = static_cast<const T*>(p_.x.data);
      const int rows = kPlanes ? kBox : group_pixels_;
      for (int i = threadIdx.x; i < p_.boxes * rows * 8; i += blockDim.x) {
        const int c = i % 8, row = i / 8 % rows, box = i / 8 / rows;
        // 8 pixels of a channel, or 8 channels of a pixel; the last of a run or of the channels may be fewer
        const int d = box * kBox + (kPlanes ? row : 8 * c), n = at.offset + (kPlanes ? 8 * c : row);
        int left = kPlanes ? p_.x.run - n : p_.D - d;
        if (at.image >= p_.x.images || d >= p_.D || n >= p_.x.run || (kPlanes && 8 * c >= group_pixels_)) left = 0;
        left = left < 0 ? 0 : left > 8 ? 8 : left;
        const T* from = x + at.image * p_.x.image_stride + (kPlanes ? d * p_.x.stride + n : n * p_.x.stride + d);
        copy16_async(kPlanes ? to.plane(row, box, c) : row_chunk(to, row, box, c), left > 0 ? from : x, left * 2);
      }
    }
    step_ = fetched_ = 0;
    for (int s = 0; s < kStages - 1; s++) fetch();  // the pixels travel with the first of them
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the pixels are there
  }

  // s = products of the warp's pixels and the next tile of sub-centroids.
  __device__ void scores(float (&s)[kSums]) {
#pragma unroll
    for (int i = 0; i < kSums; i++) s[i] = 0;
    const PixelTile<kPlanes> x = pixels();
    for (int box = 0; box < p_.boxes; box++) {
      const unsigned char* b = next_box();
#pragma unroll
      for (int k = 0; k < kBox / 16; k++) {
        uint32_t a[4];
        if constexpr (kPlanes) {  // channels 16 k .. + 7 of the warp's pixels 0-7 and 8-15; then channels + 8
          load_matrices_transposed(a, x.plane(16 * k + lane_ / 16 * 8 + lane_ % 8, box, x.row / 8 + lane_ / 8 % 2));
        } else {
          load_matrices(a, x.chunk(lane_ % 16, box, 2 * k + lane_ / 16));
        }
#pragma unroll
        for (int j = 0; j < kColumns / 16; j++) {
          uint32_t v[4];  // columns 16 j .. + 7, channels 0-7 and 8-15; then columns + 8
          const int row = 16 * j + lane_ % 8 + lane_ / 16 * 8;
          load_matrices(v, b + row * 128 + ((2 * k + lane_ / 8 % 2) ^ (row & 7)) * 16);
          multiply_16x8x16<T>(reinterpret_cast<float (&)[4]>(s[8 * j]), a, v[0], v[1]);
          multiply_16x8x16<T>(reinterpret_cast<float (&)[4]>(s[8 * j + 4]), a, v[2], v[3]);
        }
      }
    }
  }

  // u += dS p over the boxes of a slice of channels; a: fragments of dS, of 16 columns each.
  __device__ void gradient(float (&u)[kSliceBoxes][kBox / 2], const uint32_t (&a)[kFragments][4], int boxes) {
#pragma unroll
    for (int box = 0; box < kSliceBoxes; box++) {
      if (box < boxes) {
        const unsigned char* b = next_box();
#pragma unroll
        for (int f = 0; f < kFragments; f++) {
#pragma unroll
          for (int j = 0; j < kBox / 16; j++) {
            uint32_t v[4];  // rows 16 f .. + 7 and + 8, channels 16 j .. + 7; then channels + 8
            const int row = 16 * f + lane_ % 16;
            load_matrices_transposed(v, b + row * 128 + ((2 * j + lane_ / 16) ^ (row & 7)) * 16);
            multiply_16x8x16<T>(reinterpret_cast<float (&)[4]>(u[box][8 * j]), a[f], v[0], v[1]);
            multiply_16x8x16<T>(reinterpret_cast<float (&)[4]>(u[box][8 * j + 4]), a[f], v[2], v[3]);
          }
        }
      }
    }
  }

 private:
  __device__ int box_bytes() const { return (kPlanes ? kBox : group_pixels_) * 128; }
  __device__ int group_bytes() const { return p_.boxes * box_bytes(); }
  __device__ static unsigned char* row_chunk(const PixelTile<kPlanes>& x, int row, int box, int c) {
    if constexpr (kPlanes) {
      return nullptr;
    } else {
      return x.chunk(row, box, c);
    }
  }
  // The box that step `fetched_` of this tile of pixels needs.
  __device__ void fetch() {
    const int one = p_.tiles * p_.boxes;
    if (fetched_ < (second_ ? 2 * one : one)) {
      int tile = fetched_ / p_.boxes, box = fetched_ % p_.boxes;
      if (fetched_ >= one) {
        constexpr int kWide = kSliceBoxes;
        const int slice = (fetched_ - one) / (p_.tiles * kWide), at = (fetched_ - one) % (p_.tiles * kWide);
        const int left = p_.boxes - slice * kWide, width = left < kWide ? left : kWide;
        tile = at / width, box = slice * kWide + at % width;
      }
      const T* from = static_cast<const T*>(p_.rows) + int64_t(tile) * kColumns * p_.boxes * kBox + box * kBox;
      unsigned char* to = ring_ + fetched_ % kStages * kColumns * 128;
      for (int i = threadIdx.x; i < kColumns * 8; i += blockDim.x) {
        const int c = i % 8, row = i / 8;
        copy16_async(to + row * 128 + (c ^ (row & 7)) * 16, from + int64_t(row) * p_.boxes * kBox + c * 8, 16);
      }
    }
    fetched_++;
    copy_async_commit();  // an empty group too counts
  }
  __device__ const unsigned char* next_box() {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the box of this step is complete, and the one before has been read: its place is free
    fetch();
    return ring_ + step_++ % kStages * kColumns * 128;
  }

  const Problem& p_;
  unsigned char *x_, *ring_;
  const int groups_, group_pixels_, warp_, lane_;
  const bool second_;
  int step_ = 0, fetched_ = 0;
};

// ---- host

struct Shape {
  int warps;  // 0: does not fit
  unsigned blocks;
  size_t shared;
};
cudaError_t shape_of(Shape* shape, const Problem& p, size_t extra_a_warp);

}  // namespace sm80
}  // namespace cuda
}  // namespace dnc
