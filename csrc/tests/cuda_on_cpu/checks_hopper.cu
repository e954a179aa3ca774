// Kernels that try Hopper's primitives: mbarriers, clusters, boxes of a tensor map with the 128-byte swizzle, multicast, and
// wgmma. The layouts are written out here once more, from the PTX ISA.
#include <pybind11/stl.h>

#include "checks_hopper.h"

namespace checks {
namespace {

using namespace dnc;

struct Box {
  alignas(1024) uint16_t data[16][64];
  PhaseBarrier arrived;
};
// The bytes of shared memory under a box [16,64] at (column, row), and of a plane where the array has them.
__global__ void box_kernel(const __grid_constant__ TensorMap map, int column, int row, bool planes, int plane, uint16_t* out) {
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
__global__ void multicast_kernel(const __grid_constant__ TensorMap map, uint16_t* out) {
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

// d [64,N] = c + a [64,64] b [N,64]^T, both from shared memory, 16 columns a product. kColumns: a lies as its transpose.
template <class T, bool kColumns, int N>
__global__ void wgmma_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, bool accumulate,
                             float* d) {
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
  products_pin(sum);
  products_fence();
#pragma unroll
  for (int k = 0; k < 64; k += 16) {
    const uint64_t from = matrix_descriptor(kColumns ? s.a[k] : &s.a[0][k], 0);
    multiply<T, kColumns>(sum, from, matrix_descriptor(&s.b[0][k], 0), accumulate || k > 0);
  }
  products_commit();
  products_wait<0>();
  products_pin(sum);
  for (int i = 0; i < N / 2; i++) d[row_of(t, i) * N + column_of(t, i)] = sum[i];
}

// d [64,N] = a [64,64] b [64,N]: a from registers, b in panels of 64 columns.
template <class T, int N>
__global__ void wgmma_transposed_kernel(const uint16_t* a, const __grid_constant__ TensorMap b, float* d) {
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
  uint32_t fragment[4][4];  // made before any product: registers of one in flight must not be written
  for (int f = 0; f < 4; f++) {
    for (int j = 0; j < 4; j++) {
      const int row = t / 32 * 16 + t % 32 / 4 + j % 2 * 8, column = 16 * f + t % 4 * 2 + j / 2 * 8;
      fragment[f][j] = uint32_t(a[row * 64 + column]) | uint32_t(a[row * 64 + column + 1]) << 16;
    }
  }
  float sum[N / 2];
  for (int i = 0; i < N / 2; i++) sum[i] = 0;
  products_pin(sum);
  products_fence();
#pragma unroll
  for (int f = 0; f < 4; f++) multiply_transposed<T>(sum, fragment[f], matrix_descriptor(s.b[16 * f], 64 * 128), f > 0);
  products_commit();
  products_wait<0>();
  products_pin(sum);
  for (int i = 0; i < N / 2; i++) d[row_of(t, i) * N + column_of(t, i)] = sum[i];
}

template <class T, bool kColumns, int N>
Array<float> wgmma(const Array<uint16_t>& a, const Array<uint16_t>& b, bool accumulate, Array<float> sums) {
  Device d;
  const TensorMap ma = map_of(d, a, 64, type_of<T>), mb = map_of(d, b, N, type_of<T>);
  d.finish(launch(Grid{1, 128, nullptr, sizeof(Products<N>)}, wgmma_kernel<T, kColumns, N>, ma, mb, accumulate, d.out(sums)));
  return sums;
}
template <class T, int N>
Array<float> wgmma_transposed(const Array<uint16_t>& a, const Array<uint16_t>& b) {
  auto sums = unwritten<float>({64, N});
  Device d;
  const TensorMap map = map_of(d, b, 64, type_of<T>);
  d.finish(launch(Grid{1, 128, nullptr, sizeof(Products<N>)}, wgmma_transposed_kernel<T, N>, d.in(a), map, d.out(sums)));
  return sums;
}

}  // namespace

void bind_hopper(py::module_& m) {
  // a box [16,64] of an array that lies in `in` with these sizes and strides in elements, innermost first
  m.def("box", [](const Array<uint16_t>& in, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int column,
                  int row, int plane) {
    auto out = unwritten<uint16_t>({16, 64});
    Device d;
    const TensorMap from = map_of(d.in(in), sizes, strides, 16);
    d.finish(launch(Grid{1, 32, nullptr, sizeof(Box)}, box_kernel, from, column, row, sizes.size() == 3, plane, d.out(out)));
    return out;
  });
  m.def("ring", [](int rounds) {
    auto out = unwritten<int>({rounds, 64});
    Device d;
    d.finish(launch(Grid{1, 96, nullptr, sizeof(Ring)}, ring_kernel, rounds, d.out(out)));
    return out;
  });
  m.def("multicast", [](const Array<uint16_t>& in) {
    auto out = unwritten<uint16_t>({4, 16, 64});
    Device d;
    const TensorMap map = map_of(d, in, 8);
    d.finish(launch(Grid{4, 32, nullptr, sizeof(Multicast), 2}, multicast_kernel, map, d.out(out)));
    return out;
  });
  m.def("wgmma_80_bf16", wgmma<BFloat16, false, 80>);
  m.def("wgmma_80_f16", wgmma<Float16, false, 80>);
  m.def("wgmma_columns_80_bf16", wgmma<BFloat16, true, 80>);
  m.def("wgmma_columns_80_f16", wgmma<Float16, true, 80>);
  m.def("wgmma_transposed_64_bf16", wgmma_transposed<BFloat16, 64>);
  m.def("wgmma_transposed_64_f16", wgmma_transposed<Float16, 64>);
}

}  // namespace checks
