// Kernels that try the twins of Hopper's primitives: mbarriers, clusters, boxes of a tensor map with the 128-byte swizzle,
// multicast, and wgmma. The layouts are written out here once more, from the PTX ISA.
#include <cuda.h>

#include "checks.h"

namespace checks {
namespace {

using namespace dnc;

// Of [rows, columns] or [planes, rows, columns].
TensorMap map_of(const Array<uint16_t>& array, int box_rows) {
  void* found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, nullptr));
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  const auto rank = cuuint32_t(array.ndim());
  cuuint64_t size[3], pitch[2];
  for (cuuint32_t i = 0; i < rank; i++) size[i] = cuuint64_t(array.shape(rank - 1 - i));  // the adjacent one first
  pitch[0] = size[0] * 2, pitch[1] = pitch[0] * size[1];
  const cuuint32_t box[3] = {64, cuuint32_t(box_rows), 1}, step[3] = {1, 1, 1};
  TensorMap map;
  if (encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<uint16_t*>(array.data()),
             size, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
    throw std::runtime_error("the tensor map was refused");
  }
  return map;
}

struct Box {
  alignas(1024) uint16_t data[16][64];
  PhaseBarrier arrived;
};
// The bytes of shared memory under a box [16,64] at (column, row), and of a plane where the array has them.
__global__ void box_kernel(const TensorMap map, int column, int row, bool planes, int plane, uint16_t* out) {
  Box& s = *shared_memory<Box>();
  if (threadIdx.x == 0) {
    barrier_init(&s.arrived, 1);
    barrier_init_fence();
    barrier_arrive_expect(&s.arrived, sizeof s.data);
    if (planes) {
      copy_box(s.data, &map, column, row, plane, &s.arrived);
    } else {
      copy_box(s.data, &map, column, row, &s.arrived);
    }
  }
  __syncthreads();
  barrier_wait(&s.arrived, 0);
  for (int i = int(threadIdx.x); i < 16 * 64; i += 32) out[i] = s.data[i / 64][i % 64];
}

struct Ring {
  int value[2];
  PhaseBarrier full[2], empty[2];
};
// A producer thread of warp 0 and 64 consumers pass `rounds` values through two slots. out [rounds, 64].
__global__ void ring_kernel(int rounds, int* out) {
  Ring& s = *shared_memory<Ring>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) barrier_init(&s.full[i], 1), barrier_init(&s.empty[i], 64);
    barrier_init_fence();
  }
  __syncthreads();
  for (int r = 0; r < rounds; r++) {
    const int slot = r % 2;
    const unsigned phase = unsigned(r / 2 % 2);
    if (threadIdx.x == 0) {
      barrier_wait(&s.empty[slot], phase ^ 1);  // the phase before the first counts as ended
      s.value[slot] = 1000 + r;
      barrier_arrive_expect(&s.full[slot], 0);
    } else if (threadIdx.x >= 32) {
      barrier_wait(&s.full[slot], phase);
      out[64 * r + int(threadIdx.x) - 32] = s.value[slot];
      barrier_arrive(&s.empty[slot], 0);
    }
  }
}

struct Multicast {
  alignas(1024) uint16_t data[2][8][64];
  PhaseBarrier arrived;
};
// Clusters of two: block r sends rows 8 r.. of the array [16,64] to both. out [blocks, 16, 64] as it lies.
__global__ void multicast_kernel(const TensorMap map, uint16_t* out) {
  Multicast& s = *shared_memory<Multicast>();
  const unsigned rank = cluster_rank();
  if (threadIdx.x == 0) {
    barrier_init(&s.arrived, 2);  // this block and the other one
    barrier_init_fence();
  }
  cluster_barrier();  // or a copy would meet a barrier that is not there yet
  if (threadIdx.x == 0) {
    barrier_arrive_expect(&s.arrived, sizeof s.data);
    copy_box_multicast(s.data[rank], &map, 0, int(8 * rank), &s.arrived, 3);
    barrier_arrive(&s.arrived, rank ^ 1);
  }
  barrier_wait(&s.arrived, 0);
  for (int i = int(threadIdx.x); i < 1024; i += 32) out[blockIdx.x * 1024 + unsigned(i)] = s.data[i / 512][i / 64 % 8][i % 64];
  cluster_barrier();  // a block must not end while the other one writes to it
}

template <int N>
struct Products {
  alignas(1024) uint16_t a[64][64];
  alignas(1024) uint16_t b[N < 64 ? 64 : N][64];
  PhaseBarrier arrived;
};
// PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16": d[i] of thread t of the warpgroup.
__device__ int row_of(int t, int i) { return t / 32 * 16 + t % 32 / 4 + (i % 4 >= 2 ? 8 : 0); }
__device__ int column_of(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

// d [64,N] = c + a [64,64] b [N,64]^T, both from shared memory, 16 columns a product. kColumns: a lies as its transpose.
template <bool kColumns, int N>
__global__ void wgmma_kernel(const TensorMap a, const TensorMap b, bool accumulate, float* d) {
  Products<N>& s = *shared_memory<Products<N>>();
  const int t = int(threadIdx.x);
  if (t == 0) {
    barrier_init(&s.arrived, 1);
    barrier_init_fence();
    barrier_arrive_expect(&s.arrived, (64 + N) * 128);
    copy_box(s.a, &a, 0, 0, &s.arrived);
    copy_box(s.b, &b, 0, 0, &s.arrived);
  }
  __syncthreads();
  barrier_wait(&s.arrived, 0);
  float sum[N / 2];
  for (int i = 0; i < N / 2; i++) sum[i] = d[row_of(t, i) * N + column_of(t, i)];
  products_fence();
  for (int k = 0; k < 64; k += 16) {
    const uint64_t from = matrix_descriptor(kColumns ? s.a[k] : &s.a[0][k], 0);
    multiply<BFloat16, kColumns>(sum, from, matrix_descriptor(&s.b[0][k], 0), accumulate || k > 0);
  }
  products_commit();
  products_wait<0>();
  for (int i = 0; i < N / 2; i++) d[row_of(t, i) * N + column_of(t, i)] = sum[i];
}

// d [64,N] = a [64,64] b [64,N]: a from registers, b in panels of 64 columns.
template <int N>
__global__ void wgmma_transposed_kernel(const uint16_t* a, const TensorMap b, float* d) {
  Products<N>& s = *shared_memory<Products<N>>();
  const int t = int(threadIdx.x);
  if (t == 0) {
    barrier_init(&s.arrived, 1);
    barrier_init_fence();
    barrier_arrive_expect(&s.arrived, N * 128);
    for (int panel = 0; panel < N / 64; panel++) copy_box(s.b[64 * panel], &b, 64 * panel, 0, &s.arrived);
  }
  __syncthreads();
  barrier_wait(&s.arrived, 0);
  float sum[N / 2];
  products_fence();
  for (int k = 0; k < 64; k += 16) {
    uint32_t fragment[4];
    for (int j = 0; j < 4; j++) {
      const int row = t / 32 * 16 + t % 32 / 4 + j % 2 * 8, column = k + t % 4 * 2 + j / 2 * 8;
      fragment[j] = uint32_t(a[row * 64 + column]) | uint32_t(a[row * 64 + column + 1]) << 16;
    }
    multiply_transposed<BFloat16>(sum, fragment, matrix_descriptor(s.b[k], 64 * 128), k > 0);
  }
  products_commit();
  products_wait<0>();
  for (int i = 0; i < N / 2; i++) d[row_of(t, i) * N + column_of(t, i)] = sum[i];
}

template <bool kColumns, int N>
Array<float> wgmma(Array<uint16_t> a, Array<uint16_t> b, bool accumulate, Array<float> d) {
  const TensorMap ma = map_of(a, 64), mb = map_of(b, N);
  check(launch(Grid{1, 128, nullptr, sizeof(Products<N>)}, wgmma_kernel<kColumns, N>, ma, mb, accumulate, d.mutable_data()));
  return d;
}
template <int N>
Array<float> wgmma_transposed(Array<uint16_t> a, Array<uint16_t> b) {
  const TensorMap map = map_of(b, 64);
  Array<float> d({64, N});
  check(launch(Grid{1, 128, nullptr, sizeof(Products<N>)}, wgmma_transposed_kernel<N>, a.data(), map, d.mutable_data()));
  return d;
}

}  // namespace

void bind_hopper(py::module_& m) {
  m.def("box", [](Array<uint16_t> in, int column, int row, int plane) {
    const TensorMap from = map_of(in, 16);
    Array<uint16_t> out({16, 64});
    check(launch(Grid{1, 32, nullptr, sizeof(Box)}, box_kernel, from, column, row, in.ndim() == 3, plane, out.mutable_data()));
    return out;
  });
  m.def("ring", [](int rounds) {
    Array<int> out({rounds, 64});
    check(launch(Grid{1, 96, nullptr, sizeof(Ring)}, ring_kernel, rounds, out.mutable_data()));
    return out;
  });
  m.def("multicast", [](Array<uint16_t> in) {
    const TensorMap map = map_of(in, 8);
    Array<uint16_t> out({4, 16, 64});
    check(launch(Grid{4, 32, nullptr, sizeof(Multicast), 2}, multicast_kernel, map, out.mutable_data()));
    return out;
  });
  m.def("wgmma_80", wgmma<false, 80>);
  m.def("wgmma_columns_80", wgmma<true, 80>);
  m.def("wgmma_transposed_64", wgmma_transposed<64>);
}

}  // namespace checks
