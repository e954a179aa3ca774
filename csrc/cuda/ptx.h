// Everything of the GPU that C++ has no word for, one small function each: launching, shared memory, barriers, asynchronous
// copies, the tensor memory accelerator, matrix products. Kernels hold no inline PTX.
//
// The one header that knows how it is compiled: nvcc gets PTX; the host tests (-DDNC_CUDA_ON_CPU) get the same functions as
// host C++ from csrc/tests/cuda_on_cpu/, which honour the documented fragment and swizzle layouts. Two rules come of it: shared
// memory is dynamic, one struct a kernel (`shared_memory`), and a loop that waits for another thread calls `spin`. Source of
// the instructions: PTX ISA 8.0 and later.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "dnc/common.h"

namespace dnc {

// A launch: blocks, threads of a block, bytes of dynamic shared memory. Blocks of a cluster run together and read each other's
// shared memory; blocks of a cooperative launch all run at the same time, or the launch fails.
struct Grid {
  dim3 blocks;
  unsigned threads;
  cudaStream_t stream;
  size_t shared = 0;
  unsigned cluster = 1;
  bool cooperative = false;
};

// A 2- or 3-dimensional array of 16-bit elements as the tensor memory accelerator sees it.
struct TensorMap {
  alignas(64) unsigned char opaque[128];
};

void copy16_async(void* to, const void* from, bool all) = delete;  // it takes the number of bytes

}  // namespace dnc

#if defined(DNC_CUDA_ON_CPU)
#include "ptx_on_cpu.h"
#else
namespace dnc {

// Compiled for the Hopper of wgmma and setmaxnreg (sm_90a, and no other). A kernel of one of these two has no body elsewhere:
// it calls trap() there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DNC_HOPPER 1
#else
#define DNC_HOPPER 0
#endif
// Compiled for any GPU that is not served by the Hopper kernels: mma.sync and cp.async.
#if defined(__CUDA_ARCH__) && !DNC_HOPPER
#define DNC_AMPERE 1
#else
#define DNC_AMPERE 0
#endif

// On the host: whether this binary has code for Hopper. CMake turns 90 into 90a.
constexpr bool built_for_hopper() {
#if defined(__CUDA_ARCH_LIST__)
  for (int arch : {__CUDA_ARCH_LIST__}) {
    if (arch == 900) return true;
  }
#endif
  return false;
}

// In place of what this architecture has no code for: the launch fails, where an empty kernel would leave garbage.
__device__ inline void trap() { __trap(); }

// The kernel's dynamic shared memory, 1024-byte aligned.
template <class T>
__device__ inline T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dnc_dynamic_shared[];
  return reinterpret_cast<T*>(dnc_dynamic_shared);
}

// Launch errors come back at once; errors of the kernel itself at a later call, as CUDA has it.
template <class... P, class... A>
cudaError_t launch(const Grid& grid, void (*kernel)(P...), const A&... arguments) {
  if (grid.shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared));
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
      return error;
    }
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks, config.blockDim = dim3(grid.threads), config.dynamicSmemBytes = grid.shared;
  config.stream = grid.stream, config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = grid.cluster, a.val.clusterDim.y = 1, a.val.clusterDim.z = 1;
  }
  if (grid.cooperative) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeCooperative, a.val.cooperative = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, P(arguments)...);
  if (error != cudaSuccess) (void)cudaGetLastError();  // or the next, innocent call would report it
  return error;
}

// Blocks of `kernel` that one multiprocessor holds at a time.
template <class... P>
cudaError_t resident_blocks(int* blocks, void (*kernel)(P...), unsigned threads, size_t shared) {
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
      return error;
    }
  }
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, int(threads), shared);
}

// The lane within the warp, read anew where it is called: a register that nothing else needs to keep.
__device__ inline int lane_here() {
  int r;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(r));
  return r;
}

// threadIdx.x, likewise.
__device__ inline int thread_here() {
  int r;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(r));
  return r;
}

// v, of which the compiler knows nothing: what is computed from it in a loop is computed there, and held in no register
// outside.
template <class T>
__device__ inline T opaque(T v) {
  asm volatile("" : "+r"(v));
  return v;
}

// In a loop that waits for another thread.
__device__ inline void spin() { __nanosleep(20); }

__device__ inline unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// Adds and returns what was there; orders what came before it, by the whole block after a barrier, and what comes after.
__device__ inline unsigned add_acquire_release(unsigned* p, unsigned v) {
  unsigned old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
// p[0..3] += v, device-wide, without a result; one 16-byte operation where the GPU has it.
__device__ inline void add_vector(float* p, float4 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
#else
  atomicAdd(p, v.x), atomicAdd(p + 1, v.y), atomicAdd(p + 2, v.z), atomicAdd(p + 3, v.w);
#endif
}
// Two floats in one 32-bit word, the first in the low half. Volatile: packed where they are made, they take one register less.
template <class T>
__device__ inline uint32_t pack_pair(float low, float high);
template <>
__device__ inline uint32_t pack_pair<BFloat16>(float low, float high) {
  uint32_t r;
  asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ inline uint32_t pack_pair<Float16>(float low, float high) {
  uint32_t r;
  asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// 2^x, error 2^-22 relative over the whole range (PTX ISA: ex2.approx.ftz).
__device__ inline float exp2_approximate(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Some threads of a block: barrier `id` of 1..15 among `threads` of them.
__device__ inline void barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Address within the shared memory window.
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// cp.async: 16 bytes to shared memory, the first `bytes` of them from global memory, then zeros; groups complete in order.
__device__ inline void copy16_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the newest `kPending` groups of this thread have arrived.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane 8j + i gives the address of row i of matrix j; r[j] of lane l holds elements
// 2 (l % 4) and the next of row l / 4. `transposed`: of column l / 4.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d [16,8] += a [16,16] b [16,8] by a warp, 16-bit elements, fp32 sums. With g = lane / 4 and q = lane % 4, pairs of columns:
// d = rows g, g, g+8, g+8 at columns 2q, 2q+1; a = (g, 2q..), (g+8, 2q..), (g, 2q+8..), (g+8, 2q+8..); b = rows 2q.. and 2q+8..
// of column g.
template <class T>
__device__ inline void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- Hopper: mbarrier, clusters, tensor memory accelerator, warpgroup products

// A barrier of phases: a phase ends when `arrivals` threads have arrived and all bytes that they announced have come.
struct alignas(8) PhaseBarrier {
  uint64_t bits;
};
__device__ inline void barrier_init(PhaseBarrier* b, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the cluster and to the asynchronous proxy.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive_expect(PhaseBarrier* b, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Arrives at the same barrier of block `rank` of the cluster.
//
// Arrivals and waits order memory within the block alone (the default, .cta), as CUTLASS's ClusterBarrier does
// (include/cutlass/arch/barrier.h). More is not needed: another block's data comes through the asynchronous proxy, whose
// complete_tx releases it to the cluster (PTX ISA, cp.async.bulk.tensor), and what another block is told is that products have
// read a box: they have, since they were waited for. Nothing that one block writes by ordinary stores is read by another. At
// .cluster scope the compiler makes a fence of the whole device (MEMBAR.ALL.GPU, CCTL.IVALL) of each of them: `python -m
// benchmarks.aot` refuses one between products.
__device__ inline void barrier_arrive(PhaseBarrier* b, unsigned rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}"
      :
      : "r"(shared_address(b)), "r"(rank)
      : "memory");
}
// Waits until the phase of this parity (0 for the first) has ended.
__device__ inline void barrier_wait(PhaseBarrier* b, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\nwaiting:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\nbra waiting;\nfinished:\n}"
      :
      : "r"(shared_address(b)), "r"(parity)
      : "memory");
}
__device__ inline unsigned cluster_rank() {
  unsigned r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// All threads of all blocks of the cluster.
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Registers of each thread of the calling warpgroup from here on; a multiple of 8.
template <int kRegisters>
__device__ inline void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ inline void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// The box at (column, row) into shared memory, zeros outside the array; its bytes are counted by `b`. One thread calls it.
__device__ inline void copy_box(void* to, const TensorMap* map, int column, int row, PhaseBarrier* b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               :
               : "r"(shared_address(to)), "l"(map), "r"(shared_address(b)), "r"(column), "r"(row)
               : "memory");
}
// The same of a 3-dimensional array.
__device__ inline void copy_box(void* to, const TensorMap* map, int column, int row, int plane, PhaseBarrier* b) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
               :
               : "r"(shared_address(to)), "l"(map), "r"(shared_address(b)), "r"(column), "r"(row), "r"(plane)
               : "memory");
}
// The box of a 3-dimensional array into L2, for a copy to come.
__device__ inline void prefetch_box(const TensorMap* map, int column, int row, int plane) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" ::"l"(map), "r"(column), "r"(row), "r"(plane)
               : "memory");
}
// Of the 2-dimensional one, to the same places of every block of the cluster whose bit is set in `blocks`.
__device__ inline void copy_box_multicast(void* to, const TensorMap* map, int column, int row, PhaseBarrier* b,
                                          uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5}], [%2], %3;"
      :
      : "r"(shared_address(to)), "l"(map), "r"(shared_address(b)), "h"(blocks), "r"(column), "r"(row)
      : "memory");
}
// Makes this thread's writes to shared memory visible to copies and products that follow a barrier.
__device__ inline void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A matrix in shared memory with rows of 128 bytes in the 128-byte swizzle (16-byte chunk c of row r lies at c ^ r % 8). Eight
// rows are 1024 bytes on; `leading` is where the next 64 columns of a transposed operand are.
__device__ inline uint64_t matrix_descriptor(const void* p, uint32_t leading) {
  return uint64_t((shared_address(p) & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}
__device__ inline void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the newest kPending groups of the warpgroup are done; accumulators are valid only then.
template <int kPending>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Ties accumulators to this point, so that the compiler does not move their use across it.
template <int N>
__device__ inline void products_pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

}  // namespace dnc

#include "wgmma.h"
#endif  // DNC_CUDA_ON_CPU
