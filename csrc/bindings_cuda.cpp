// The CUDA kernels in Python: the functions of bindings.cpp without `threads`, and with three arguments after the rest:
// allocate(bytes) -> address of that much device memory on the stream, the stream as a number, the device's index.
#include "bindings.h"
#include "dnc/cuda.h"
#include "dnc/embedding.h"
#include "dnc/momentum.h"

namespace py = pybind11;
using namespace dnc;

namespace {

using Allocate = py::function;

template <class Args>
void run(const char* op, size_t (*workspace)(const Args&), Status (*kernel)(const Args&, const cuda::Launch&), const Args& args,
         const Allocate& allocate, uintptr_t stream, int device) {
  cuda::Launch where;
  where.bytes = workspace(args), where.stream = reinterpret_cast<void*>(stream), where.device = device;
  if (where.bytes > 0) where.workspace = reinterpret_cast<void*>(allocate(where.bytes).cast<uintptr_t>());
  Status s;
  {
    py::gil_scoped_release release;
    s = kernel(args, where);
  }
  raise(op, s);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("momentum_update_", [](View centroids, View x, View cluster, double momentum, bool deterministic, Allocate allocate,
                               uintptr_t stream, int device) {
    run("momentum_update_", cuda::momentum_update_workspace, cuda::momentum_update,
        MomentumUpdate{centroids, x, cluster, momentum, deterministic}, allocate, stream, device);
  });
  m.def("normalize_embedding", [](View x, View weight, View bias, double eps, View y, View mean, View rstd, View inverse_norm,
                                  Allocate allocate, uintptr_t stream, int device) {
    run("normalize_embedding", cuda::normalize_embedding_workspace, cuda::normalize_embedding,
        NormalizeEmbedding{x, weight, bias, eps, y, mean, rstd, inverse_norm}, allocate, stream, device);
  });
  m.def("normalize_embedding_backward",
        [](View x, View weight, View bias, View mean, View rstd, View inverse_norm, View grad_y, View grad_rstd, View grad_x,
           View grad_weight, View grad_bias, Allocate allocate, uintptr_t stream, int device) {
          run("normalize_embedding", cuda::normalize_embedding_backward_workspace, cuda::normalize_embedding_backward,
              NormalizeEmbeddingBackward{x, weight, bias, mean, rstd, inverse_norm, grad_y, grad_rstd, grad_x, grad_weight,
                                         grad_bias},
              allocate, stream, device);
        });
}
