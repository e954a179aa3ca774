// Host side of similarity_sm90.h: tensor maps, and what of a block's shared memory goes to the ring.
#include <cuda.h>

#include "similarity_sm90.h"

namespace dnc {
namespace cuda {
namespace sm90 {

cudaError_t encode(TensorMap* map, const void* data, DType dtype, int64_t columns, int64_t rows, int64_t pitch, int box_rows) {
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
  const cuuint64_t size[2] = {cuuint64_t(columns), cuuint64_t(rows)}, stride[1] = {cuuint64_t(pitch) * 2};
  const cuuint32_t box[2] = {kBox, cuuint32_t(box_rows)}, step[2] = {1, 1};
  const CUresult result =
      encode_tiled(reinterpret_cast<CUtensorMap*>(map),
                   dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                   const_cast<void*>(data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t maps_of(Maps* maps, const Problem& p, DType dtype, int cluster) {
  const cudaError_t error = encode(&maps->x, p.x, dtype, p.D, p.N, p.pitch, kGroupPixels);
  if (error != cudaSuccess) return error;
  return encode(&maps->rows, p.rows, dtype, int64_t(p.boxes) * kBox, int64_t(p.tiles) * kColumns, int64_t(p.boxes) * kBox,
                kColumns / cluster);
}

cudaError_t shape_of(Shape* shape, const Problem& p, size_t extra) {
  int limit = 0, processors = 0;
  cudaError_t error = attribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess) error = attribute(&processors, cudaDevAttrMultiProcessorCount);
  if (error != cudaSuccess) return error;
  shape->stages = kMaxStages;
  while (shape->stages > 0 && Block::bytes(p.boxes, shape->stages) + extra > size_t(limit)) shape->stages--;
  if (shape->stages < 3) shape->stages = 0;  // two boxes are held while a third is on its way
  const int64_t tiles = divide_up(p.N, kPixels);
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
