// The host twins of csrc/cuda/ptx.h, and of the CUDA built-ins that kernels use. Included by ptx.h alone.
// Layouts are those that the PTX ISA documents: fragments of mma.sync, ldmatrix and wgmma, the 128-byte swizzle, the boxes of a
// tensor map. Asynchronous work is done at the moment that catches most: copies into shared memory by the tensor memory
// accelerator at once (whoever still reads there is wrong), products and cp.async when they are waited for (whoever has
// overwritten their operands, or reads their results before, is wrong).
#pragma once
#include <cmath>
#include <limits>
#include <type_traits>

#include "fibers.h"

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define threadIdx (cuda_on_cpu::self().thread)
#define blockIdx (cuda_on_cpu::self().block->index)
#define blockDim (cuda_on_cpu::state.dim)
#define gridDim (cuda_on_cpu::state.grid)
#define warpSize 32
#define DNC_HOPPER 1
#define DNC_AMPERE 1
namespace dnc {
constexpr bool built_for_hopper() { return true; }
inline void trap() { cuda_on_cpu::trap(); }
}  // namespace dnc

// ---- CUDA's own functions

inline void __syncthreads() { cuda_on_cpu::block_barrier(); }
inline int __syncthreads_or(int) = delete;  // not twinned
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { cuda_on_cpu::spin_once(); }

namespace cuda_on_cpu {
inline int lane() { return self().linear % 32; }
template <class T>
T value_at(const unsigned char (*gathered)[kPayload], int lane) {
  T v;
  std::memcpy(&v, gathered[lane], sizeof(T));
  return v;
}
// The value of lane `from`, which must take part: what another one gives is undefined.
template <class T>
T shuffle(unsigned mask, T v, int from) {
  static_assert(sizeof(T) <= kPayload);
  unsigned char gathered[32][kPayload];
  exchange(mask, &v, sizeof(T), gathered);
  if (!(mask >> from & 1)) std::abort();
  return value_at<T>(gathered, from);
}
template <class T, class F>
T reduce(unsigned mask, T v, F f) {
  unsigned char gathered[32][kPayload];
  exchange(mask, &v, sizeof(T), gathered);
  bool first = true;
  T r{};
  for (int l = 0; l < 32; l++) {
    if (!(mask >> l & 1)) continue;
    r = first ? value_at<T>(gathered, l) : f(r, value_at<T>(gathered, l));
    first = false;
  }
  return r;
}
}  // namespace cuda_on_cpu

inline void __syncwarp(unsigned mask = ~0u) {
  unsigned char gathered[32][cuda_on_cpu::kPayload];
  const char nothing = 0;
  cuda_on_cpu::exchange(mask, &nothing, 1, gathered);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  const int l = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle(mask, v, l / width * width + from % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32) {
  const int l = cuda_on_cpu::lane(), from = l ^ x;  // earlier segments can be read, later ones not
  return cuda_on_cpu::shuffle(mask, v, from >= (l / width + 1) * width ? l : from);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32) {
  const int l = cuda_on_cpu::lane(), from = l - int(d);
  return cuda_on_cpu::shuffle(mask, v, from < l / width * width ? l : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32) {
  const int l = cuda_on_cpu::lane(), from = l + int(d);
  return cuda_on_cpu::shuffle(mask, v, from >= (l / width + 1) * width ? l : from);
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  const unsigned mine = p != 0 ? 1u << cuda_on_cpu::lane() : 0u;
  return cuda_on_cpu::reduce(mask, mine, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }
inline unsigned __reduce_add_sync(unsigned mask, unsigned v) {
  return cuda_on_cpu::reduce(mask, v, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  return cuda_on_cpu::reduce(mask, v, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline int __reduce_max_sync(unsigned mask, int v) {
  return cuda_on_cpu::reduce(mask, v, [](int a, int b) { return std::max(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) {
  return cuda_on_cpu::reduce(mask, v, [](unsigned a, unsigned b) { return a | b; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T v) {
  unsigned char gathered[32][cuda_on_cpu::kPayload];
  cuda_on_cpu::exchange(mask, &v, sizeof(T), gathered);
  unsigned same = 0;
  for (int l = 0; l < 32; l++) {
    if ((mask >> l & 1) && cuda_on_cpu::value_at<T>(gathered, l) == v) same |= 1u << l;
  }
  return same;
}
inline unsigned __activemask() = delete;  // says nothing that a program may rely on

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(unsigned(v)); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}
inline float __uint_as_float(unsigned v) {
  float r;
  std::memcpy(&r, &v, 4);
  return r;
}
inline unsigned __float_as_uint(float v) {
  unsigned r;
  std::memcpy(&r, &v, 4);
  return r;
}
inline int __float_as_int(float v) { return int(__float_as_uint(v)); }
inline float __int_as_float(int v) { return __uint_as_float(unsigned(v)); }
inline long long __double_as_longlong(double v) {
  long long r;
  std::memcpy(&r, &v, 8);
  return r;
}
inline double __longlong_as_double(long long v) {
  double r;
  std::memcpy(&r, &v, 8);
  return r;
}
inline int __float2int_rn(float v) { return int(std::nearbyintf(v)); }
inline long long __float2ll_rn(float v) { return std::llrintf(v); }
inline long long __double2ll_rn(double v) { return std::llrint(v); }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline double rsqrt(double v) { return 1.0 / std::sqrt(v); }
inline float __frcp_rn(float v) { return 1.f / v; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }
inline float __log2f(float v) { return std::log2(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float v) { return std::fmin(std::fmax(v, 0.f), 1.f); }

namespace cuda_on_cpu {
template <class T, class F>
T atomically(T* p, F f) {
  const T old = *p;
  *p = f(old);
  return old;
}
}  // namespace cuda_on_cpu
template <class T>
T atomicAdd(T* p, T v) {
  return cuda_on_cpu::atomically(p, [v](T old) { return T(old + v); });
}
inline int atomicAdd(int* p, unsigned v) { return atomicAdd(p, int(v)); }
template <class T>
T atomicMax(T* p, T v) {
  return cuda_on_cpu::atomically(p, [v](T old) { return std::max(old, v); });
}
template <class T>
T atomicMin(T* p, T v) {
  return cuda_on_cpu::atomically(p, [v](T old) { return std::min(old, v); });
}
template <class T>
T atomicOr(T* p, T v) {
  return cuda_on_cpu::atomically(p, [v](T old) { return T(old | v); });
}
template <class T>
T atomicExch(T* p, T v) {
  return cuda_on_cpu::atomically(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  return cuda_on_cpu::atomically(p, [=](T old) { return old == expected ? v : old; });
}
using std::max;
using std::min;

namespace dnc {

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(cuda_on_cpu::self().block->shared);
}

template <class... P, class... A>
cudaError_t launch(const Grid& grid, void (*kernel)(P...), const A&... arguments) {
  return cuda_on_cpu::launch(grid.blocks, grid.threads, grid.shared, grid.cluster, grid.cooperative,
                             [=] { kernel(P(arguments)...); });
}
template <class... P>
cudaError_t resident_blocks(int* blocks, void (*)(P...), unsigned threads, size_t shared) {
  *blocks = int(std::min<size_t>(2048 / threads, 227 * 1024 / std::max<size_t>(shared, 1)));
  *blocks = std::min(*blocks, 2);  // a few blocks are as good as many, and sooner done
  return cudaSuccess;
}

inline int lane_here() { return cuda_on_cpu::lane(); }
inline int thread_here() { return cuda_on_cpu::self().linear; }
template <class T>
T opaque(T v) {
  return v;
}
inline void spin() { cuda_on_cpu::spin_once(); }
inline unsigned load_acquire(const unsigned* p) { return *p; }
inline unsigned add_acquire_release(unsigned* p, unsigned v) { return atomicAdd(p, v); }
inline void add_vector(float* p, float4 v) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) std::abort();  // red.v4 traps on it
  p[0] += v.x, p[1] += v.y, p[2] += v.z, p[3] += v.w;
}
template <class T>
uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(low))) | uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(high)))
                                                                          << 16;
  } else {
    return uint32_t(__half_as_ushort(__float2half_rn(low))) | uint32_t(__half_as_ushort(__float2half_rn(high))) << 16;
  }
}
inline float exp2_approximate(float x) {
  const float r = std::exp2(x);
  return std::fabs(r) < 1.17549435e-38f ? 0.f : r;
}
inline void barrier(int id, int threads) {
  if (id < 1 || id > 15 || threads <= 0 || threads % 32 != 0) std::abort();  // 0 is __syncthreads; whole warps take part
  cuda_on_cpu::named_barrier(id, threads);
}

// Addresses of the shared window: a bias, so that 0 is none, then the offset within the block's buffer.
constexpr uint32_t kWindow = 1024;
inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - cuda_on_cpu::self().block->shared) + kWindow;
}

// ---- cp.async

inline void copy16_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes < 0 || bytes > 16)
    std::abort();
  auto& groups = cuda_on_cpu::self().copies;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back([=] {
    std::memset(to, 0, 16);
    std::memcpy(to, from, size_t(bytes));
  });
}
inline void copy_async_commit() {
  auto& groups = cuda_on_cpu::self().copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
template <int kPending>
void copy_async_wait() {
  auto& groups = cuda_on_cpu::self().copies;
  while (int(groups.size()) > kPending + 1) {  // the last one is open
    for (auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

// ---- mma.sync and ldmatrix

template <class T>
float element(uint16_t bits) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __uint_as_float(uint32_t(bits) << 16);
  } else {
    return __half2float(__ushort_as_half(bits));
  }
}
template <bool kTransposed>
void load_matrices_as(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  unsigned char gathered[32][cuda_on_cpu::kPayload];
  cuda_on_cpu::exchange(~0u, &row, sizeof row, gathered);
  const int l = cuda_on_cpu::lane(), g = l / 4, q = l % 4;
  for (int j = 0; j < 4; j++) {
    const auto at = [&](int i, int k) { return cuda_on_cpu::value_at<const uint16_t*>(gathered, 8 * j + i)[k]; };
    r[j] = kTransposed ? uint32_t(at(2 * q, g)) | uint32_t(at(2 * q + 1, g)) << 16
                       : uint32_t(at(g, 2 * q)) | uint32_t(at(g, 2 * q + 1)) << 16;
  }
  __syncwarp();  // the rows have been read
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices_as<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { load_matrices_as<true>(r, row); }

template <class T>
void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t give[6] = {a[0], a[1], a[2], a[3], b0, b1};
  unsigned char gathered[32][cuda_on_cpu::kPayload];
  cuda_on_cpu::exchange(~0u, give, sizeof give, gathered);
  const int g = cuda_on_cpu::lane() / 4, q = cuda_on_cpu::lane() % 4;
  const auto word = [&](int lane, int i) {
    uint32_t v;
    std::memcpy(&v, gathered[lane] + 4 * i, 4);
    return v;
  };
  for (int i = 0; i < 4; i++) {
    const int column = 2 * q + i % 2, upper = i / 2;
    for (int k = 0; k < 16; k++) {
      const uint32_t wa = word(4 * g + k % 8 / 2, upper + k / 8 * 2), wb = word(4 * column + k % 8 / 2, 4 + k / 8);
      d[i] += element<T>(uint16_t(wa >> 16 * (k % 2))) * element<T>(uint16_t(wb >> 16 * (k % 2)));
    }
  }
}

// ---- mbarrier, clusters

constexpr unsigned kInitialised = 0x15A;
struct alignas(8) PhaseBarrier {
  uint32_t parity : 1, arrivals : 11, left : 11, initialised : 9;
  int32_t bytes;
};
static_assert(sizeof(PhaseBarrier) == 8, "as on the GPU");
inline void barrier_advance(PhaseBarrier* b) {
  if (b->initialised != kInitialised) std::abort();
  if (b->left == 0 && b->bytes == 0) b->parity ^= 1, b->left = b->arrivals, cuda_on_cpu::state.progress = true;
}
inline PhaseBarrier* barrier_of(PhaseBarrier* b, unsigned rank) {
  auto& gang = *cuda_on_cpu::self().block->gang;
  if (rank >= gang.blocks.size()) std::abort();
  return reinterpret_cast<PhaseBarrier*>(gang.blocks[rank]->shared + (shared_address(b) - kWindow));
}
inline void barrier_init(PhaseBarrier* b, unsigned arrivals) {
  if (arrivals == 0 || arrivals > 1024) std::abort();  // a GPU counts further; more than a block's threads is a mistake
  *b = {0, arrivals, arrivals, kInitialised, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(PhaseBarrier* b, unsigned bytes) {
  if (b->left == 0) std::abort();  // more arrivals than the phase has
  b->bytes += int32_t(bytes), b->left--;
  barrier_advance(b);
}
inline void barrier_arrive(PhaseBarrier* b, unsigned rank) {
  PhaseBarrier* there = barrier_of(b, rank);
  if (there->left == 0) std::abort();
  there->left--;
  barrier_advance(there);
}
inline void barrier_wait(PhaseBarrier* b, unsigned parity) {
  if (b->initialised != kInitialised) std::abort();
  while (b->parity == parity) cuda_on_cpu::spin_once();
}
inline unsigned cluster_rank() { return cuda_on_cpu::state.cluster == 1 ? 0 : cuda_on_cpu::self().block->rank; }
inline void cluster_barrier() {
  if (cuda_on_cpu::state.cluster == 1) {
    cuda_on_cpu::block_barrier();
  } else {
    cuda_on_cpu::gang_barrier();
  }
}
template <int>
void registers_increase() {}
template <int>
void registers_decrease() {}

// ---- tensor memory accelerator. The fake driver (runtime.cpp) writes this into a TensorMap.

struct HostMap {
  unsigned char* data;
  int64_t columns, rows, planes, pitch, plane_pitch;  // pitches in bytes
  int32_t box_columns, box_rows, rank;
};
inline HostMap host_map(const TensorMap* map) {
  HostMap m;
  std::memcpy(&m, map->opaque, sizeof m);
  return m;
}
// Byte offsets of the 128-byte swizzle: 16-byte chunk c of 128-byte row r lies at c ^ r % 8.
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }
inline void prefetch_map(const TensorMap*) {}
inline void copy_box_into(cuda_on_cpu::Block& block, uint32_t to, const TensorMap* map, int column, int row, int plane,
                          int rank, uint32_t barrier) {
  const HostMap m = host_map(map);
  if (to % 1024 != 0 || m.box_columns * 2 != 128 || m.rank != rank) std::abort();
  for (int r = 0; r < m.box_rows; r++) {
    for (int c = 0; c < m.box_columns; c++) {
      uint16_t v = 0;
      if (column + c >= 0 && column + c < m.columns && row + r >= 0 && row + r < m.rows && plane >= 0 && plane < m.planes) {
        std::memcpy(&v, m.data + plane * m.plane_pitch + (row + r) * m.pitch + int64_t(column + c) * 2, 2);
      }
      std::memcpy(block.shared + (swizzled(to + uint32_t(r * 128 + c * 2)) - kWindow), &v, 2);
    }
  }
  auto* b = reinterpret_cast<PhaseBarrier*>(block.shared + (barrier - kWindow));
  b->bytes -= m.box_rows * 128;
  barrier_advance(b);
}
inline void copy_box(void* to, const TensorMap* map, int column, int row, PhaseBarrier* b) {
  copy_box_into(*cuda_on_cpu::self().block, shared_address(to), map, column, row, 0, 2, shared_address(b));
}
inline void copy_box(void* to, const TensorMap* map, int column, int row, int plane, PhaseBarrier* b) {
  copy_box_into(*cuda_on_cpu::self().block, shared_address(to), map, column, row, plane, 3, shared_address(b));
}
inline void prefetch_box(const TensorMap*, int, int, int) {}
inline void copy_box_multicast(void* to, const TensorMap* map, int column, int row, PhaseBarrier* b, uint16_t blocks) {
  auto& gang = *cuda_on_cpu::self().block->gang;
  for (size_t rank = 0; rank < gang.blocks.size(); rank++) {
    if (blocks >> rank & 1) copy_box_into(*gang.blocks[rank], shared_address(to), map, column, row, 0, 2, shared_address(b));
  }
}
inline void async_proxy_fence() {}

// ---- wgmma

inline uint64_t matrix_descriptor(const void* p, uint32_t leading) {
  return uint64_t((shared_address(p) & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}
// Element (row, k) of an operand whose rows are k-adjacent, or with kTransposed (column n = row, k) of one whose columns are.
template <class T, bool kTransposed>
float operand(const cuda_on_cpu::Block& block, uint64_t descriptor, int row, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4, leading = uint32_t(descriptor >> 16 & 0x3FFF) << 4,
                 stride = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t at =
      kTransposed ? start + uint32_t(row / 64) * leading + uint32_t(k / 8) * stride + uint32_t(k % 8 * 128 + row % 64 * 2)
                  : start + uint32_t(row / 8) * stride + uint32_t(row % 8 * 128 + k * 2);
  uint16_t bits;
  std::memcpy(&bits, block.shared + (swizzled(at) - kWindow), 2);
  return element<T>(bits);
}
template <int R, class A, class B>
void product_later(float (&d)[R], bool accumulate, A a, B b) {
  cuda_on_cpu::Fiber& f = cuda_on_cpu::self();
  const int warp = f.linear / 32 % 4, g = cuda_on_cpu::lane() / 4, q = cuda_on_cpu::lane() % 4;
  float* out = d;
  f.products.push_back({[=] {
                          for (int i = 0; i < R; i++) {
                            const int row = i % 4 / 2, column = i / 4 * 8 + 2 * q + i % 2;
                            float sum = accumulate ? out[i] : 0.f;
                            for (int k = 0; k < 16; k++) sum += a(16 * warp + g + 8 * row, row, k) * b(column, k);
                            out[i] = sum;
                          }
                        },
                        -1});
}
template <class T, bool kColumns, int R>
void multiply(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(R == 40);
  const cuda_on_cpu::Block* block = cuda_on_cpu::self().block;
  product_later(
      d, accumulate, [=](int row, int, int k) { return operand<T, kColumns>(*block, a, row, k); },
      [=](int column, int k) { return operand<T, false>(*block, b, column, k); });
}
template <class T, int R>
void multiply_transposed(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(R == 32);
  const cuda_on_cpu::Block* block = cuda_on_cpu::self().block;
  unsigned char gathered[32][cuda_on_cpu::kPayload];
  cuda_on_cpu::exchange(~0u, a, sizeof a, gathered);
  struct {
    float value[2][16];
  } mine;
  const int g = cuda_on_cpu::lane() / 4;
  for (int row = 0; row < 2; row++) {
    for (int k = 0; k < 16; k++) {
      uint32_t w;
      std::memcpy(&w, gathered[4 * g + k % 8 / 2] + 4 * (row + k / 8 * 2), 4);
      mine.value[row][k] = element<T>(uint16_t(w >> 16 * (k % 2)));
    }
  }
  product_later(
      d, accumulate, [=](int, int row, int k) { return mine.value[row][k]; },
      [=](int column, int k) { return operand<T, true>(*block, b, column, k); });
}
inline void products_fence() {}
inline void products_commit() {
  cuda_on_cpu::Fiber& f = cuda_on_cpu::self();
  for (auto& p : f.products) {
    if (p.group < 0) p.group = f.product_groups;
  }
  f.product_groups++;
}
template <int kPending>
void products_wait() {
  cuda_on_cpu::Fiber& f = cuda_on_cpu::self();
  // the lanes of a warp go on together, as on the GPU: one that ran ahead could release what another has still to read
  while (!f.products.empty() && f.products.front().group >= 0 && f.products.front().group < f.product_groups - kPending) {
    f.products.front().run();
    f.products.erase(f.products.begin());
  }
  __syncwarp();
}
template <int N>
void products_pin(float (&)[N]) {}

}  // namespace dnc
