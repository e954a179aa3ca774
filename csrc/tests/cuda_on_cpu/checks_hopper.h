// What the checks of Hopper share: tensor maps of arrays, and where a thread's numbers of a product lie.
#pragma once
#include <cuda.h>

#include "checks.h"

namespace checks {

template <class T>
constexpr CUtensorMapDataType type_of =
    std::is_same_v<T, dnc::BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;

// Of 2 or 3 sizes, innermost first, and the strides of all but that one, in elements; boxes of 64 by `box_rows` (by 1).
inline dnc::TensorMap map_of(const uint16_t* data, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                             int box_rows, CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
  if (found == nullptr) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  cuuint64_t size[3] = {}, pitch[2] = {};
  for (size_t i = 0; i < sizes.size(); i++) size[i] = cuuint64_t(sizes[i]);
  for (size_t i = 0; i < strides.size(); i++) pitch[i] = cuuint64_t(strides[i]) * 2;
  const cuuint32_t box[3] = {64, cuuint32_t(box_rows), 1}, step[3] = {1, 1, 1};
  dnc::TensorMap map;
  const CUresult encoded =
      encode(reinterpret_cast<CUtensorMap*>(&map), type, cuuint32_t(sizes.size()), const_cast<uint16_t*>(data), size, pitch,
             box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (encoded != CUDA_SUCCESS) throw std::runtime_error("the tensor map was refused: CUresult " + std::to_string(encoded));
  return map;
}
// Of a contiguous array [rows, columns].
inline dnc::TensorMap map_of(Device& d, const Array<uint16_t>& array, int box_rows,
                             CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) {
  return map_of(d.in(array), {array.shape(1), array.shape(0)}, {array.shape(1)}, box_rows, type);
}

// Operands of products, with the room that their swizzle asks for.
template <int N>
struct Products {
  alignas(1024) uint16_t a[64][64];
  alignas(1024) uint16_t b[N < 64 ? 64 : N][64];
  dnc::PhaseBarrier arrived;
};

// PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16": d[i] of thread t of the warpgroup.
__device__ inline int row_of(int t, int i) { return t / 32 * 16 + t % 32 / 4 + (i % 4 >= 2 ? 8 : 0); }
__device__ inline int column_of(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

}  // namespace checks
