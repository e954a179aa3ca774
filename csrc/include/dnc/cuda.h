// How CUDA kernels are called. Every op `f(const F&)` of the library has a twin `cuda::f(const F&, const Launch&)` on views of
// device memory and `size_t cuda::f_workspace(const F&)`, the device memory it works in: a function of shapes and dtypes alone.
// Nothing is allocated, nothing waits: the kernels are in the stream when the call returns, and its Status holds what launching
// them said. `threads` of the arguments is not used. Labels outside [0,C) are ignored, where the CPU reports them.
#pragma once
#include "dnc/common.h"

namespace dnc {
namespace cuda {

struct Launch {
  void* workspace = nullptr;  // device memory, 256-byte aligned; may be reused once the stream has passed the call
  size_t bytes = 0;           // of it
  void* stream = nullptr;     // a cudaStream_t of `device`
  int device = -1;            // -1: the current one
};

}  // namespace cuda
}  // namespace dnc
