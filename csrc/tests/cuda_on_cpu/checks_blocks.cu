// Kernels that try what blocks do together: the barrier of a cooperative grid, the last block that adds up what the others
// left, and additions of vectors to the same place.
#include "checks.h"

namespace checks {
namespace {

using namespace dnc;

// Round by round every block takes what its neighbour had, and adds one: after r rounds block b has (b + r) % blocks + r.
// values [2, blocks]; a block writes by its last thread and reads by its first.
__global__ void grid_barrier_kernel(unsigned* arrived, int rounds, int* values, int* out) {
  unsigned target = 0;
  const int blocks = int(gridDim.x), b = int(blockIdx.x);
  int* v = shared_memory<int>();
  if (threadIdx.x == 0) *v = b;
  for (int round = 0; round < rounds; round++) {
    int* row = values + round % 2 * blocks;
    __syncthreads();  // *v is there
    if (threadIdx.x == blockDim.x - 1) row[b] = *v;
    cuda::grid_barrier(arrived, target);
    if (threadIdx.x == 0) *v = row[(b + 1) % blocks] + 1;
  }
  if (threadIdx.x == 0) out[b] = *v;
}

// Block b leaves its row of `parts` [blocks, 64]; the one that is last adds up the columns: out [64], and out[64] its number of
// the blocks before it.
__global__ void last_block_kernel(unsigned* count, int* parts, int* out) {
  unsigned* before = shared_memory<unsigned>();
  const int t = int(threadIdx.x);
  parts[64 * blockIdx.x + unsigned(t)] = int(blockIdx.x + 1) * (t + 1);
  __syncthreads();  // the row is written
  if (t == 0) *before = add_acquire_release(count, 1);
  __syncthreads();  // all threads know the number
  if (*before + 1 != gridDim.x) return;
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; b++) sum += parts[64 * b + unsigned(t)];
  out[t] = sum;
  if (t == 0) out[64] = int(*before);
}

// Every thread adds (1, t, b, t + b) to one of four places. out [4, 4].
__global__ void add_vector_kernel(float* out) {
  const float t = float(threadIdx.x), b = float(blockIdx.x);
  add_vector(out + 4 * (threadIdx.x % 4), float4{1, t, b, t + b});
}

}  // namespace

void bind_blocks(py::module_& m) {
  m.def("grid_barrier", [](int blocks, int rounds) {
    auto out = unwritten<int>({blocks}), values = unwritten<int>({2, blocks});
    Array<unsigned> arrived(1);
    *arrived.mutable_data() = 0;
    Device d;
    d.finish(launch(Grid{unsigned(blocks), 64, nullptr, sizeof(int), 1, true}, grid_barrier_kernel, d.out(arrived), rounds,
                    d.out(values), d.out(out)));
    return out;
  });
  m.def("last_block", [](int blocks) {
    auto out = unwritten<int>({65}), parts = unwritten<int>({blocks, 64});
    Array<unsigned> count(1);
    *count.mutable_data() = 0;
    Device d;
    d.finish(launch(Grid{unsigned(blocks), 64, nullptr, sizeof(unsigned)}, last_block_kernel, d.out(count), d.out(parts),
                    d.out(out)));
    return out;
  });
  m.def("add_vector", [](int blocks, int threads) {
    Array<float> out({4, 4});
    std::memset(out.mutable_data(), 0, size_t(out.nbytes()));
    Device d;
    d.finish(launch(Grid{unsigned(blocks), unsigned(threads), nullptr}, add_vector_kernel, d.out(out)));
    return out;
  });
}

}  // namespace checks
