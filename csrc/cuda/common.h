// What the CUDA kernels share: element conversions, pixel addresses, sums over a warp or block, a barrier of the whole grid,
// and on the host the layout of a workspace, the device and the status.
#pragma once
#include <limits>

#include "dnc/cuda.h"
#include "ptx.h"

namespace dnc {
namespace cuda {

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(BFloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ inline float to_float(Float16 v) { return __half2float(__ushort_as_half(v.bits)); }
constexpr float kLargest = std::numeric_limits<float>::max();
__device__ inline bool is_finite(float v) { return fabsf(v) <= kLargest; }  // false for NaN

template <class T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
__device__ inline Float16 from_float<Float16>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}

// Pixels as kernels see them (dnc::Pixels): offset of channel 0 of pixel n, in elements.
struct PixelMap {
  void* data;
  int64_t N, D, HW, W, sb, sh, sw, sd;
  bool flat;  // pixels are sw apart throughout

  PixelMap() = default;
  explicit PixelMap(const Pixels& p)
      : data(p.data),
        N(p.N()),
        D(p.D),
        HW(p.H * p.W),
        W(p.W),
        sb(p.sb),
        sh(p.sh),
        sw(p.sw),
        sd(p.sd),
        flat(p.B == 1 && p.H == 1) {}
  explicit PixelMap(const View& v) : PixelMap(Pixels(v)) {}

  __device__ int64_t offset(int64_t n) const {
    if (flat) return n * sw;
    if (N > UINT32_MAX) return n / HW * sb + n % HW / W * sh + n % W * sw;
    // 64-bit divisions take several times as long
    const uint32_t image = uint32_t(n) / uint32_t(HW), rest = uint32_t(n) - image * uint32_t(HW), row = rest / uint32_t(W);
    return image * sb + row * sh + (rest - row * uint32_t(W)) * sw;
  }
  template <class T>
  __device__ T* at(int64_t n) const {
    return static_cast<T*>(data) + offset(n);
  }
};

// Sum over the lanes of a warp, in a fixed order; every lane gets it.
template <class T>
__device__ inline T warp_sum(T v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}
// Inclusive sum over the lanes of a warp.
template <class T>
__device__ inline T warp_scan(T v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(~0u, v, step);
    if (lane >= step) v += other;
  }
  return v;
}
// Sum over a block of kWarps warps, in a fixed order; every thread gets it. `of_warp`: kWarps elements of shared memory.
template <int kWarps, class T>
__device__ inline T block_sum(T v, T* of_warp) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();  // of_warp is complete
  T sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w++) sum += of_warp[w];
  __syncthreads();  // of_warp has been read and may be written again
  return sum;
}

// All threads of all blocks of a cooperative launch. `arrived`: one word of global memory, zero before the launch; it counts
// the blocks that arrived, over all barriers, and `target` is this thread's count of them (0 at the start). A launch may have
// 2^32 / blocks barriers.
__device__ inline void grid_barrier(unsigned* arrived, unsigned& target) {
  __syncthreads();  // one thread's release stands for all that the block has written before this
  target += gridDim.x;
  if (threadIdx.x == 0) {
    if (add_acquire_release(arrived, 1) + 1 != target) {
      while (int(load_acquire(arrived) - target) < 0) spin();
    }
  }
  __syncthreads();  // the block has seen all others arrive
}

// Parts of a workspace, each 256-byte aligned, in the order taken. From a null pointer: only the size.
class Parts {
 public:
  explicit Parts(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t elements) {
    T* part = reinterpret_cast<T*>(base_ == nullptr ? nullptr : base_ + bytes_);
    bytes_ += (size_t(elements) * sizeof(T) + 255) / 256 * 256;
    return part;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

inline Status failed(cudaError_t error) { return {Code::cuda_error, 0, 0, cudaGetErrorString(error)}; }

// The device of a launch is current while this lives; the one before it afterwards.
class OnDevice {
 public:
  explicit OnDevice(const Launch& where) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && where.device >= 0 && where.device != before_) {
      error_ = cudaSetDevice(where.device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~OnDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// An attribute of the current device.
inline cudaError_t attribute(int* value, cudaDeviceAttr which) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(value, which, device) : error;
}

// Whether kernels for Hopper run on the current device; if not, those for any GPU from sm_80 on do, from their PTX perhaps.
inline cudaError_t on_hopper(bool* yes) {
  int major = 0;
  const cudaError_t error = attribute(&major, cudaDevAttrComputeCapabilityMajor);
  *yes = major == 9 && built_for_hopper();
  return error;
}

// Returns from a launcher with the status of a CUDA call that failed.
#define DNC_CHECK(call)                                                  \
  do {                                                                   \
    const cudaError_t dnc_error = (call);                                \
    if (dnc_error != cudaSuccess) return ::dnc::cuda::failed(dnc_error); \
  } while (0)

// The launch has room for `bytes` of workspace.
inline bool enough(const Launch& where, size_t bytes) {
  return bytes == 0 || (where.workspace != nullptr && where.bytes >= bytes);
}
inline Status too_small() { return bad_argument("the workspace is smaller than its _workspace function says"); }

}  // namespace cuda
}  // namespace dnc
