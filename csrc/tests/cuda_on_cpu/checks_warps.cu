// Kernels that try the primitives of warps: shuffles and votes, ldmatrix, mma.sync, cp.async, named barriers. The layouts
// are written out here once more, from the tables of the PTX ISA, element by element.
#include "checks.h"

namespace checks {
namespace {

using namespace dnc;

// out [13, 32]: each operation on the value 100 + lane.
__global__ void shuffle_kernel(int* out, int width) {
  const int l = int(threadIdx.x), v = 100 + l;
  int row = 0;
  const auto put = [&](int r) { out[32 * row++ + l] = r; };
  put(__shfl_sync(~0u, v, (l * 7 + 3) % 32));
  put(__shfl_sync(~0u, v, l % 3, width));
  put(__shfl_xor_sync(~0u, v, 5));
  put(__shfl_xor_sync(~0u, v, width, width));
  put(__shfl_up_sync(~0u, v, 3, width));
  put(__shfl_down_sync(~0u, v, 3, width));
  put(int(__ballot_sync(~0u, l % 3 == 0)));
  put(__any_sync(~0u, l == 9));
  put(__all_sync(~0u, l != 9));
  put(int(__match_any_sync(~0u, l / 5)));
  put(int(__reduce_add_sync(~0u, unsigned(l))));
  put(int(__reduce_max_sync(~0u, unsigned(l * 5 % 31))));
  // two halves apart
  const unsigned half = l < 16 ? 0xFFFFu : 0xFFFF0000u;
  put(int(__reduce_add_sync(half, unsigned(l))));
}

struct Matrices {
  alignas(16) uint16_t row[32][8];  // row r % 8 of matrix r / 8
};
// out [2, 32, 4]: what ldmatrix gives each lane, then with .trans.
__global__ void ldmatrix_kernel(const uint16_t* in, uint32_t* out) {
  Matrices& s = *shared_memory<Matrices>();
  const int l = int(threadIdx.x);
  for (int i = 0; i < 8; i++) s.row[l][i] = in[8 * l + i];
  __syncwarp();
  uint32_t r[4], t[4];
  load_matrices(r, s.row[l]);
  load_matrices_transposed(t, s.row[l]);
  for (int j = 0; j < 4; j++) out[4 * l + j] = r[j], out[4 * (32 + l) + j] = t[j];
}

// d [16,8] += a [16,16] b [16,8], row-major. PTX ISA, "Matrix Fragments for mma.m16n8k16" with 16-bit elements.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* d) {
  const int l = int(threadIdx.x), group = l >> 2, in_group = l & 3;
  uint16_t fa[8], fb[4];
  float fd[4];
  for (int i = 0; i < 8; i++) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    fa[i] = a[row * 16 + column].bits;
  }
  for (int i = 0; i < 4; i++) fb[i] = b[(in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)) * 8 + group].bits;
  const auto place = [&](int i) { return (group + (i >= 2 ? 8 : 0)) * 8 + in_group * 2 + (i & 1); };
  for (int i = 0; i < 4; i++) fd[i] = d[place(i)];
  const auto pair = [](const uint16_t* f, int i) { return uint32_t(f[2 * i]) | uint32_t(f[2 * i + 1]) << 16; };
  const uint32_t ra[4] = {pair(fa, 0), pair(fa, 1), pair(fa, 2), pair(fa, 3)};
  multiply_16x8x16<T>(fd, ra, pair(fb, 0), pair(fb, 1));
  for (int i = 0; i < 4; i++) d[place(i)] = fd[i];
}

struct Copies {
  alignas(16) uint32_t word[3][4];
};
// out [4, 3, 4]: the buffer after three groups were started, and with 2, 1, 0 of them allowed to be missing; the third group is
// not valid and brings zeros.
__global__ void copy_kernel(const uint32_t* in, uint32_t* out) {
  Copies& s = *shared_memory<Copies>();
  const auto put = [&](int row) {
    for (int i = 0; i < 12; i++) out[12 * row + i] = reinterpret_cast<const volatile uint32_t*>(s.word)[i];
  };
  for (int g = 0; g < 3; g++) {
    copy16_async(s.word[g], in + 4 * g, g < 2 ? 16 : 0);
    copy_async_commit();
  }
  put(0);
  copy_async_wait<2>();
  put(1);
  copy_async_wait<1>();
  put(2);
  copy_async_wait<0>();
  put(3);
}

struct Named {
  int stage[3][64];
};
// Three pairs of warps pass values on, each pair through a barrier of its own; pair p makes p + 1 rounds.
__global__ void named_barrier_kernel(int* out) {
  Named& s = *shared_memory<Named>();
  const int pair = int(threadIdx.x) / 64, t = int(threadIdx.x) % 64;
  int v = int(threadIdx.x);
  for (int round = 0; round <= pair; round++) {
    s.stage[pair][t] = v;
    barrier(1 + pair, 64);
    v = s.stage[pair][(t + 33) % 64] + 1;
    barrier(1 + pair, 64);
  }
  out[threadIdx.x] = v;
}

template <class T>
Array<float> mma(const Array<uint16_t>& a, const Array<uint16_t>& b, Array<float> c) {
  Device d;
  d.finish(launch(Grid{1, 32, nullptr}, mma_kernel<T>, reinterpret_cast<const T*>(d.in(a)), reinterpret_cast<const T*>(d.in(b)),
                  d.out(c)));
  return c;
}

}  // namespace

void bind_warps(py::module_& m) {
  m.def("shuffles", [](int width) {
    auto out = unwritten<int>({13, 32});
    Device d;
    d.finish(launch(Grid{1, 32, nullptr}, shuffle_kernel, d.out(out), width));
    return out;
  });
  m.def("ldmatrix", [](const Array<uint16_t>& in) {
    auto out = unwritten<uint32_t>({2, 32, 4});
    Device d;
    d.finish(launch(Grid{1, 32, nullptr, sizeof(Matrices)}, ldmatrix_kernel, d.in(in), d.out(out)));
    return out;
  });
  m.def("mma_bf16", mma<BFloat16>);
  m.def("mma_f16", mma<Float16>);
  m.def("copies", [](const Array<uint32_t>& in) {
    auto out = unwritten<uint32_t>({4, 3, 4});
    Device d;
    d.finish(launch(Grid{1, 1, nullptr, sizeof(Copies)}, copy_kernel, d.in(in), d.out(out)));
    return out;
  });
  m.def("named_barriers", [] {
    auto out = unwritten<int>({192});
    Device d;
    d.finish(launch(Grid{1, 192, nullptr, sizeof(Named)}, named_barrier_kernel, d.out(out)));
    return out;
  });
}

}  // namespace checks
