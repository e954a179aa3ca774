// The CUDA runtime and driver calls that launchers make, on host memory; and the switch of fibers.
#include <cuda.h>

#include <cstring>

#include "fibers.h"

using namespace cuda_on_cpu;

#if defined(__x86_64__)
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch,@function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch,.-cuda_on_cpu_switch
)");
#endif

namespace {

// cuTensorMapEncodeTiled: the fields that ptx_on_cpu.h reads (HostMap), and the driver's own checks.
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* size,
                const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* element_stride,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool half = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  bool good = (rank == 2 || rank == 3) && half && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
              swizzle == CU_TENSOR_MAP_SWIZZLE_128B && reinterpret_cast<uintptr_t>(map) % 64 == 0 &&
              reinterpret_cast<uintptr_t>(address) % 16 == 0 && box[0] * 2 <= 128;
  for (cuuint32_t i = 0; good && i < rank; i++) {
    good = size[i] > 0 && size[i] <= 1ull << 32 && box[i] > 0 && box[i] <= 256 && element_stride[i] == 1 &&
           (i == 0 || (stride[i - 1] % 16 == 0 && stride[i - 1] < 1ull << 40));
  }
  if (!good || (rank == 3 && box[2] != 1)) return CUDA_ERROR_INVALID_VALUE;
  struct {
    void* data;
    int64_t columns, rows, planes, pitch, plane_pitch;
    int32_t box_columns, box_rows, rank;
  } m = {address,
         int64_t(size[0]),
         int64_t(size[1]),
         rank == 3 ? int64_t(size[2]) : 1,
         int64_t(stride[0]),
         rank == 3 ? int64_t(stride[1]) : 0,
         int32_t(box[0]),
         int32_t(box[1]),
         int32_t(rank)};
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &m, sizeof m);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return settings.error.empty() ? "CUDA error" : settings.error.c_str();
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount: *value = settings.processors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = settings.capability / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = settings.capability % 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = (settings.capability == 80 ? 163 : settings.capability == 86 || settings.capability == 89 ? 99 : 227) * 1024;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; return cudaSuccess;
    default: settings.error = "an attribute that the host tests do not know"; return cudaErrorInvalidValue;
  }
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  settings.launches++;  // a GPU launches one too
  std::memset(p, value, bytes);
  return cudaSuccess;
}
// Exactly as large as asked for, so that AddressSanitizer sees what lies behind.
cudaError_t cudaMalloc(void** p, size_t bytes) {
  return posix_memalign(p, 256, bytes > 0 ? bytes : 1) == 0 ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  if (result != nullptr) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
