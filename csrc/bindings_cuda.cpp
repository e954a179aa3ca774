// The CUDA kernels in Python: the functions of bindings.cpp without `threads`, and with three arguments after the rest:
// allocate(bytes) -> address of that much device memory on the stream, the stream as a number, the device's index.
#include "bindings.h"
#include "dnc/cuda.h"
#include "dnc/momentum.h"
#include "dnc/upsample.h"

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
  m.def("upsample_cross_entropy", [](View scores, View labels, const std::vector<int64_t>& window, bool align_corners,
                                     View class_weight, int64_t ignore_index, double label_smoothing, View grad_loss, View sums,
                                     View loss, View grad_scores, Allocate allocate, uintptr_t stream, int device) {
    if (window.size() != 4) throw py::value_error("upsample_cross_entropy: a window is four row numbers");
    UpsampleCrossEntropy a{.scores = scores,
                           .labels = labels,
                           .source_rows = window[0],
                           .source_row0 = window[1],
                           .target_rows = window[2],
                           .target_row0 = window[3],
                           .align_corners = align_corners,
                           .class_weight = class_weight,
                           .ignore_index = ignore_index,
                           .label_smoothing = label_smoothing,
                           .grad_loss = grad_loss,
                           .sums = sums,
                           .loss = loss,
                           .grad_scores = grad_scores};
    run("upsample_cross_entropy", cuda::upsample_cross_entropy_workspace, cuda::upsample_cross_entropy, a, allocate, stream,
        device);
  });
  m.def("upsample_argmax", [](View scores, bool align_corners, View label, Allocate allocate, uintptr_t stream, int device) {
    run("upsample_argmax", cuda::upsample_argmax_workspace, cuda::upsample_argmax, UpsampleArgmax{scores, align_corners, label},
        allocate, stream, device);
  });
}
