// Kernels that try what only a GPU can get wrong: two proxies that see the same shared memory, registers that change hands
// between warpgroups, and registers that products in flight read and write; in the end all of it as the similarity kernels do.
#include "checks_hopper.h"

namespace checks {
namespace {

using namespace dnc;

// Element (row, column) of a tile with rows of 64, in the 128-byte swizzle.
template <int N>
__device__ uint16_t& swizzled_at(uint16_t (&tile)[N][64], int row, int column) {
  return tile[row][((column / 8) ^ (row & 7)) * 8 + column % 8];
}

// d [64,N] = sum of a[r] [64,64] b[r] [N,64]^T over the rounds: operands that threads store, and the asynchronous proxy reads.
template <int N>
__global__ void stored_kernel(const uint16_t* a, const uint16_t* b, int rounds, float* d) {
  Products<N>& s = *shared_memory<Products<N>>();
  const int t = int(threadIdx.x);
  float sum[N / 2];
  for (int i = 0; i < N / 2; i++) sum[i] = 0;
  for (int round = 0; round < rounds; round++) {
    for (int i = t; i < 64 * 64; i += 128) swizzled_at(s.a, i / 64, i % 64) = a[round * 64 * 64 + i];
    for (int i = t; i < N * 64; i += 128) swizzled_at(s.b, i / 64, i % 64) = b[round * N * 64 + i];
    async_proxy_fence();
    __syncthreads();  // all operands are there
    products_pin(sum);
    products_fence();
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
      multiply<BFloat16, false>(sum, matrix_descriptor(&s.a[0][k], 0), matrix_descriptor(&s.b[0][k], 0), true);
    }
    products_commit();
    products_wait<0>();
    products_pin(sum);
    __syncthreads();  // all warps' products have read them
  }
  for (int i = 0; i < N / 2; i++) d[row_of(t, i) * N + column_of(t, i)] = sum[i];
}

struct Overwritten {
  alignas(1024) uint16_t data[16][64];
  PhaseBarrier full, empty;
};
// Warps 1 to 4 read each of `rounds` boxes [16,64] and store nonsense in its place, before the next one is copied there. out
// [rounds, 16, 64] as the copies left it.
__global__ void overwritten_kernel(const __grid_constant__ TensorMap map, int rounds, uint16_t* out) {
  Overwritten& s = *shared_memory<Overwritten>();
  const int t = int(threadIdx.x);
  if (t == 0) {
    barrier_init(&s.full, 1), barrier_init(&s.empty, 4);
    barrier_init_fence();
  }
  __syncthreads();
  for (int round = 0; round < rounds; round++) {
    const unsigned phase = unsigned(round % 2);
    if (t == 0) {
      barrier_wait(&s.empty, phase ^ 1);
      barrier_arrive_expect(&s.full, sizeof s.data);
      copy_box(s.data, &map, 0, 16 * round, &s.full);
    } else if (t >= 32) {
      barrier_wait(&s.full, phase);
      for (int i = t - 32; i < 16 * 64; i += 128) {
        out[round * 16 * 64 + i] = s.data[i / 64][i % 64];
        s.data[i / 64][i % 64] = uint16_t(0xDEAD + i + round);
      }
      async_proxy_fence();
      __syncwarp();
      if (lane_here() == 0) barrier_arrive(&s.empty, 0);
    }
  }
}

constexpr int kFew = 40, kMany = 232;  // registers of the similarity kernels on Hopper
constexpr int kWide = 192;             // numbers that a thread with many registers keeps

// Warpgroup 0 gives registers up, the two others take them and keep kWide numbers each: out [256, kWide], after `rounds` times
// v[i] = 3 v[i] + v[i + 1].
__global__ void __launch_bounds__(384, 1) registers_kernel(int rounds, unsigned* out) {
  if (threadIdx.x < 128) {
    registers_decrease<kFew>();
    return;
  }
  registers_increase<kMany>();
  const unsigned t = threadIdx.x - 128;
  unsigned v[kWide];
#pragma unroll
  for (unsigned i = 0; i < kWide; i++) v[i] = t * kWide + i;
#pragma unroll 1
  for (int round = 0; round < rounds; round++) {
    const unsigned first = v[0];
#pragma unroll
    for (unsigned i = 0; i < kWide; i++) v[i] = 3 * v[i] + (i + 1 < kWide ? v[i + 1] : first);
  }
#pragma unroll
  for (unsigned i = 0; i < kWide; i++) out[t * kWide + i] = v[i];
}

constexpr int kBoxes = 4, kStages = 3, kColumns = 80;
struct Pipeline {
  alignas(1024) uint16_t x[2][kBoxes][64][64];
  alignas(1024) uint16_t ring[kStages][kColumns][64];
  PhaseBarrier x_full, full[kStages], empty[kStages];
};
// As centroid_cross_entropy: for every tile p [80,256] of `rows` s = x p^T, then u += bfloat16(s) p, x [128,256]. Products are
// issued a box at a time, and a box is given back when the products of the next one are in flight: while they run, the
// accumulators of up to two batches and the fragments of s are not the compiler's to move. s [tiles, 128, 80], u [128, 256].
__global__ void __launch_bounds__(384, 1)
    pipeline_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap rows, int tiles, float* s_out,
                    float* u_out) {
  Pipeline& s = *shared_memory<Pipeline>();
  const int t = int(threadIdx.x);
  if (t == 0) {
    barrier_init(&s.x_full, 1);
    for (int i = 0; i < kStages; i++) barrier_init(&s.full[i], 1), barrier_init(&s.empty[i], 8);
    barrier_init_fence();
  }
  __syncthreads();
  int stage = 0;
  unsigned parity = 0;
  const auto advance = [&] {
    if (++stage == kStages) stage = 0, parity ^= 1;
  };
  if (t < 128) {
    registers_decrease<kFew>();
    if (t != 0) return;
    barrier_arrive_expect(&s.x_full, sizeof s.x);
    for (int g = 0; g < 2; g++) {
      for (int box = 0; box < kBoxes; box++) copy_box(s.x[g][box], &x, box * 64, g * 64, &s.x_full);
    }
    for (int step = 0; step < tiles * 2 * kBoxes; step++) {
      barrier_wait(&s.empty[stage], parity ^ 1);
      barrier_arrive_expect(&s.full[stage], kColumns * 128);
      copy_box(s.ring[stage], &rows, step % kBoxes * 64, step / (2 * kBoxes) * kColumns, &s.full[stage]);
      advance();
    }
    return;
  }
  registers_increase<kMany>();
  const int g = t / 128 - 1, of_group = t % 128;
  int held = -1;
  const auto give_back = [&] {
    if (held >= 0 && lane_here() == 0) barrier_arrive(&s.empty[held], 0);
  };
  const auto issued = [&] {
    products_commit();
    if (held >= 0) products_wait<1>();
    give_back();
    held = stage;
    advance();
  };
  const auto done = [&] {
    products_wait<0>();
    give_back();
    held = -1;
  };
  float u[kBoxes][32];
#pragma unroll
  for (int box = 0; box < kBoxes; box++) {
#pragma unroll
    for (int i = 0; i < 32; i++) u[box][i] = 0;
  }
  barrier_wait(&s.x_full, 0);
  for (int tile = 0; tile < tiles; tile++) {
    float first[kColumns / 2];
    for (int box = 0; box < kBoxes; box++) {
      barrier_wait(&s.full[stage], parity);
      products_fence();
#pragma unroll
      for (int k = 0; k < 64; k += 16) {
        multiply<BFloat16, false>(first, matrix_descriptor(&s.x[g][box][0][k], 0), matrix_descriptor(&s.ring[stage][0][k], 0),
                                  box + k > 0);
      }
      issued();
    }
    done();
    products_pin(first);
    float* out = s_out + (int64_t(tile) * 128 + g * 64) * kColumns;
    for (int i = 0; i < kColumns / 2; i++) out[row_of(of_group, i) * kColumns + column_of(of_group, i)] = first[i];
    uint32_t fragment[kColumns / 16][4];
#pragma unroll
    for (int f = 0; f < kColumns / 16; f++) {
#pragma unroll
      for (int j = 0; j < 4; j++) fragment[f][j] = pack_pair<BFloat16>(first[8 * f + 2 * j], first[8 * f + 2 * j + 1]);
    }
#pragma unroll
    for (int box = 0; box < kBoxes; box++) {
      barrier_wait(&s.full[stage], parity);
      products_fence();
#pragma unroll
      for (int f = 0; f < kColumns / 16; f++) {
        multiply_transposed<BFloat16>(u[box], fragment[f], matrix_descriptor(s.ring[stage][16 * f], 0), true);
      }
      issued();
    }
    done();
#pragma unroll
    for (int box = 0; box < kBoxes; box++) products_pin(u[box]);
  }
#pragma unroll
  for (int box = 0; box < kBoxes; box++) {
#pragma unroll
    for (int i = 0; i < 32; i++) {
      u_out[(g * 64 + row_of(of_group, i)) * 64 * kBoxes + box * 64 + column_of(of_group, i)] = u[box][i];
    }
  }
}

}  // namespace

void bind_rings(py::module_& m) {
  m.def("stored_80", [](const Array<uint16_t>& a, const Array<uint16_t>& b) {
    auto sums = unwritten<float>({64, 80});
    Device d;
    d.finish(
        launch(Grid{1, 128, nullptr, sizeof(Products<80>)}, stored_kernel<80>, d.in(a), d.in(b), int(a.shape(0)), d.out(sums)));
    return sums;
  });
  m.def("overwritten", [](const Array<uint16_t>& in) {
    const int rounds = int(in.shape(0) / 16);
    auto out = unwritten<uint16_t>({rounds, 16, 64});
    Device d;
    const TensorMap map = map_of(d, in, 16);
    d.finish(launch(Grid{1, 160, nullptr, sizeof(Overwritten)}, overwritten_kernel, map, rounds, d.out(out)));
    return out;
  });
  m.def("registers", [](int rounds) {
    auto out = unwritten<unsigned>({256, kWide});
    Device d;
    d.finish(launch(Grid{1, 384, nullptr}, registers_kernel, rounds, d.out(out)));
    return out;
  });
  m.def("pipeline", [](const Array<uint16_t>& x, const Array<uint16_t>& rows) {
    const int tiles = int(rows.shape(0) / kColumns);
    auto s = unwritten<float>({tiles, 128, kColumns}), u = unwritten<float>({128, 64 * kBoxes});
    Device d;
    const TensorMap mx = map_of(d, x, 64), mrows = map_of(d, rows, kColumns);
    d.finish(launch(Grid{1, 384, nullptr, sizeof(Pipeline)}, pipeline_kernel, mx, mrows, tiles, d.out(s), d.out(u)));
    return py::make_tuple(s, u);
  });
}

}  // namespace checks
