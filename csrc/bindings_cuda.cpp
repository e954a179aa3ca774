// The CUDA kernels in Python: the functions of bindings.cpp as _C.cuda.f(op, allocate, stream, device, record, ...), with
// allocate(bytes) -> address of that much device memory on the stream, the stream as a number, the device's index.
#include <mutex>

#include "bindings.h"
#include "dnc/cuda.h"

namespace py = pybind11;
using namespace dnc;

namespace {

// One thread launches at a time: a launch sets how much shared memory its kernel may have, for all threads of the process, and
// another's smaller need must not come between that and the launch. Launches take microseconds, and none waits for the device.
std::mutex launching;

template <class Args>
void bind(py::module_& m, const char* name, size_t (*workspace)(const Args&),
          Status (*kernel)(const Args&, const cuda::Launch&)) {
  m.def(name, [=](const std::string& op, const py::function& allocate, uintptr_t stream, int device, const py::args& records) {
    const Args args = python::filled<Args>(records, 1);
    cuda::Launch where;
    where.bytes = workspace(args), where.stream = reinterpret_cast<void*>(stream), where.device = device;
    if (where.bytes > 0) where.workspace = reinterpret_cast<void*>(allocate(where.bytes).cast<uintptr_t>());
    Status s;
    {
      py::gil_scoped_release release;
      const std::lock_guard lock(launching);
      s = kernel(args, where);
    }
    python::raise(op, s, records);
  });
  m.attr("fields")[name] = python::names<Args>();
}

}  // namespace

void bind_cuda(py::module_& m) {
  using namespace cuda;
  m.attr("fields") = py::dict();
  bind(m, "cluster_sums", cluster_sums_workspace, cuda::cluster_sums);
  bind(m, "apply_momentum_", apply_momentum_workspace, cuda::apply_momentum);
  bind(m, "momentum_update_", momentum_update_workspace, cuda::momentum_update);
  bind(m, "sinkhorn", sinkhorn_workspace, cuda::sinkhorn);
  bind(m, "sinkhorn_backward", sinkhorn_backward_workspace, cuda::sinkhorn_backward);
  bind(m, "normalize_embedding", normalize_embedding_workspace, cuda::normalize_embedding);
  bind(m, "normalize_embedding_backward", normalize_embedding_backward_workspace, cuda::normalize_embedding_backward);
  bind(m, "class_scores", class_scores_workspace, cuda::class_scores);
  bind(m, "nearest_centroid", nearest_centroid_workspace, cuda::nearest_centroid);
  bind(m, "centroid_cross_entropy", centroid_cross_entropy_workspace, cuda::centroid_cross_entropy);
  bind(m, "upsample_cross_entropy", upsample_cross_entropy_workspace, cuda::upsample_cross_entropy);
  bind(m, "upsample_argmax", upsample_argmax_workspace, cuda::upsample_argmax);
}
