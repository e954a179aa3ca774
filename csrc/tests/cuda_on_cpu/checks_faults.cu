// Kernels with a planted mistake, one each: what the harness must notice.
#include "checks.h"

namespace checks {
namespace {

using namespace dnc;

struct Shared {
  alignas(16) int value[32];
  PhaseBarrier arrived;
};

// One element behind the end of global memory.
__global__ void write_global_kernel(int* out, int size) {
  if (int(threadIdx.x) <= size) out[threadIdx.x] = 1;
}
// One element behind the end of the launch's shared memory.
__global__ void write_shared_kernel(int* out) {
  int* s = shared_memory<int>();
  s[threadIdx.x + 1] = 1;
  out[0] = s[1];
}
// A value that another thread has not written yet.
__global__ void missing_barrier_kernel(int* out) {
  Shared& s = *shared_memory<Shared>();
  s.value[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = s.value[31 - threadIdx.x];
}
// Half of the threads wait for the block, the others for a vote of all.
__global__ void divergent_barrier_kernel(int* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    out[0] = __any_sync(~0u, 1);
  }
}
// Two arrivals are announced, one comes.
__global__ void missing_arrival_kernel(int* out) {
  Shared& s = *shared_memory<Shared>();
  if (threadIdx.x == 0) {
    barrier_init(&s.arrived, 2);
    barrier_arrive(&s.arrived, 0);
  }
  __syncthreads();
  barrier_wait(&s.arrived, 0);
  out[0] = 1;
}
// A block that leaves before the barrier of the grid.
__global__ void missing_block_kernel(unsigned* arrived) {
  unsigned target = 0;
  if (blockIdx.x != 1) cuda::grid_barrier(arrived, target);
}
// A named barrier of 64 that one warp reaches.
__global__ void missing_warp_kernel(int* out) {
  if (threadIdx.x < 32) barrier(1, 64);
  out[0] = 1;
}
// One warp has the barrier to itself, as it thinks; the other waits for it there.
__global__ void mixed_barrier_kernel(int* out) {
  barrier(1, threadIdx.x < 32 ? 32 : 64);
  out[0] = 1;
}
// Results are read before the copy was waited for.
__global__ void early_read_kernel(const int* in, int* out) {
  Shared& s = *shared_memory<Shared>();
  copy16_async(s.value, in, 16);
  copy_async_commit();
  out[0] = s.value[0];
  copy_async_wait<0>();
}
// A kernel without a body, as where an architecture has no code for one.
__global__ void trap_kernel() { trap(); }

}  // namespace

void bind_faults(py::module_& m) {
  m.def("write_global", [](int size) {
    int* out = new int[size_t(size)];
    const cudaError_t error = launch(Grid{1, 32, nullptr}, write_global_kernel, out, size);
    delete[] out;
    check(error);
  });
  m.def("write_shared", [] {
    int out;
    check(launch(Grid{1, 32, nullptr, 32 * sizeof(int)}, write_shared_kernel, &out));
  });
  m.def("missing_barrier", [] {
    Array<int> out(32);
    check(launch(Grid{1, 32, nullptr, sizeof(Shared)}, missing_barrier_kernel, out.mutable_data()));
    return out;
  });
  m.def("divergent_barrier", [] {
    int out;
    check(launch(Grid{1, 32, nullptr}, divergent_barrier_kernel, &out));
  });
  m.def("missing_arrival", [] {
    int out;
    check(launch(Grid{1, 32, nullptr, sizeof(Shared)}, missing_arrival_kernel, &out));
  });
  m.def("missing_block", [] {
    unsigned arrived = 0;
    check(launch(Grid{3, 32, nullptr, 0, 1, true}, missing_block_kernel, &arrived));
  });
  m.def("missing_warp", [] {
    int out;
    check(launch(Grid{1, 64, nullptr}, missing_warp_kernel, &out));
  });
  m.def("mixed_barrier", [] {
    int out;
    check(launch(Grid{1, 64, nullptr}, mixed_barrier_kernel, &out));
  });
  m.def("trap", [] { check(launch(Grid{2, 32, nullptr}, trap_kernel)); });
  m.def("early_read", [] {
    alignas(16) const int in[4] = {7, 7, 7, 7};
    int out;
    check(launch(Grid{1, 1, nullptr, sizeof(Shared)}, early_read_kernel, &in[0], &out));
    return out;
  });
}

}  // namespace checks
