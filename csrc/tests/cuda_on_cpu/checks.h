// Small kernels that test the harness itself (tests/test_cuda_on_cpu.py, tests/test_cuda_sanitized.py).
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "common.h"

namespace checks {

namespace py = pybind11;
template <class T>
using Array = py::array_t<T, py::array::c_style>;

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

void bind_warps(py::module_& m);   // shuffles, votes, ldmatrix, mma.sync, cp.async
void bind_hopper(py::module_& m);  // mbarriers, clusters, boxes and their swizzle, wgmma
void bind_faults(py::module_& m);  // kernels with a mistake

}  // namespace checks
