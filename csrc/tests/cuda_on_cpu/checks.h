// Small kernels, one for each thing of the GPU that the library's kernels rest on. On the host they test the harness itself
// (tests/test_cuda_on_cpu.py, tests/test_cuda_sanitized.py), on a GPU the hardware and what ptx.h says to it (`python -m
// benchmarks.primitives`, which has the expected results of both).
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common.h"

namespace checks {

namespace py = pybind11;
template <class T>
using Array = py::array_t<T, py::array::c_style>;

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// An array that no kernel has written yet: what one leaves out is seen.
template <class T>
Array<T> unwritten(std::vector<py::ssize_t> shape) {
  Array<T> made(std::move(shape));
  std::memset(made.mutable_data(), 0xCB, size_t(made.nbytes()));
  return made;
}

// Arrays of one launch in device memory, for as long as this lives.
class Device {
 public:
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() {
    for (const Copy& c : copies_) (void)cudaFree(c.there);
  }

  template <class T>
  const T* in(const Array<T>& a) {
    return static_cast<const T*>(take(const_cast<T*>(a.data()), size_t(a.nbytes()), false));
  }
  // Goes there, and comes back when the kernel has run.
  template <class T>
  T* out(Array<T>& a) {
    return static_cast<T*>(take(a.mutable_data(), size_t(a.nbytes()), true));
  }
  // The kernel's end, with what went wrong in it.
  void finish(cudaError_t launched) {
    check(launched);
    check(cudaDeviceSynchronize());
    for (const Copy& c : copies_) {
      if (c.back) check(cudaMemcpy(c.here, c.there, c.bytes, cudaMemcpyDeviceToHost));
    }
  }

 private:
  struct Copy {
    void *here, *there;
    size_t bytes;
    bool back;
  };
  void* take(void* here, size_t bytes, bool back) {
    void* there = nullptr;
    check(cudaMalloc(&there, bytes));
    copies_.push_back({here, there, bytes, back});
    check(cudaMemcpy(there, here, bytes, cudaMemcpyHostToDevice));
    return there;
  }
  std::vector<Copy> copies_;
};

void bind_warps(py::module_& m);   // shuffles, votes, ldmatrix, mma.sync, cp.async, named barriers
void bind_blocks(py::module_& m);  // blocks that wait for each other, or add to the same place
void bind_hopper(py::module_& m);  // mbarriers, clusters, boxes and their swizzle, wgmma
void bind_rings(py::module_& m);   // proxies, registers, and all of it together as the similarity kernels do it
void bind_faults(py::module_& m);  // kernels with a mistake, for the host alone

}  // namespace checks
