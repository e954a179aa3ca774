// Host side of similarity_sm90.h: tensor maps, and what of a block's shared memory goes to the ring.
#include <cuda.h>

#include "similarity_sm90.h"

namespace dnc {
namespace cuda {
namespace sm90 {

namespace {

// A map of 16-bit elements, innermost dimension first, strides of the others in elements; boxes of 64 by `box_rows` (by 1).
cudaError_t encode(TensorMap* map, const void* data, DType dtype, int rank, const int64_t (&sizes)[3],
                   const int64_t (&strides)[2], int box_rows) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= 64, "TensorMap stands for CUtensorMap");
  // through the runtime, so that the library needs no driver to be loaded
  static const auto encode_tiled = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)
               : nullptr;
  }();
  if (encode_tiled == nullptr) return cudaErrorSymbolNotFound;
  const cuuint64_t size[3] = {cuuint64_t(sizes[0]), cuuint64_t(sizes[1]), cuuint64_t(sizes[2])};
  const cuuint64_t stride[2] = {cuuint64_t(strides[0]) * 2, cuuint64_t(strides[1]) * 2};
  const cuuint32_t box[3] = {kBox, cuuint32_t(box_rows), 1}, step[3] = {1, 1, 1};
  const CUresult result =
      encode_tiled(reinterpret_cast<CUtensorMap*>(map),
                   dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                   cuuint32_t(rank), const_cast<void*>(data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t maps_of(Maps* maps, const Problem& p, DType dtype, int cluster) {
  const PixelRuns& x = p.x;
  // strides that nothing is reached by must be valid all the same
  const int64_t far = round_up(int64_t(x.run) * p.D, 8), image = x.images > 1 ? x.image_stride : far;
  const int64_t stride = (p.planes ? p.D : x.run) > 1 ? x.stride : far;
  const cudaError_t error = p.planes ? encode(&maps->x, x.data, dtype, 3, {x.run, p.D, x.images}, {stride, image}, kBox)
                                     : encode(&maps->x, x.data, dtype, 3, {p.D, x.run, 1}, {stride, image}, kGroupPixels);
  if (error != cudaSuccess) return error;
  const int64_t width = int64_t(p.boxes) * kBox;
  return encode(&maps->rows, p.rows, dtype, 2, {width, int64_t(p.tiles) * kColumns, 1}, {width, 0}, kColumns / cluster);
}

cudaError_t shape_of(Shape* shape, const Problem& p, size_t extra) {
  int limit = 0, processors = 0;
  cudaError_t error = attribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess) error = attribute(&processors, cudaDevAttrMultiProcessorCount);
  if (error != cudaSuccess) return error;
  shape->stages = kMaxStages;
  while (shape->stages > 0 && Block::bytes(p.boxes, shape->stages) + extra > size_t(limit)) shape->stages--;
  if (shape->stages < 3) shape->stages = 0;  // two boxes are held while a third is on its way
  const int64_t tiles = divide_up(divide_up(p.x.run, kGroupPixels) * p.x.images, kGroups);
  // pairs of blocks share what they fetch, once there is a pair's worth of pixels for every processor
  shape->cluster = tiles >= processors && processors >= 2 ? 2 : 1;
  int64_t blocks = tiles < processors ? tiles : processors;
  if (blocks > kMaxBlocks) blocks = kMaxBlocks;
  shape->blocks = unsigned(blocks / shape->cluster * shape->cluster);
  shape->shared = Block::bytes(p.boxes, shape->stages);
  return cudaSuccess;
}

}  // namespace sm90
}  // namespace cuda
}  // namespace dnc
