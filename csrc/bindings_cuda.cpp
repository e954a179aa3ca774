// The CUDA kernels in Python: the functions of bindings.cpp without `threads`, and with three arguments after the rest:
// allocate(bytes) -> address of that much device memory on the stream, the stream as a number, the device's index.
#include "bindings.h"
#include "dnc/cuda.h"
#include "dnc/embedding.h"
#include "dnc/momentum.h"
#include "dnc/similarity.h"
#include "dnc/sinkhorn.h"
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
  m.def("cluster_sums", [](View x, View cluster, View sums, View counts, Allocate allocate, uintptr_t stream, int device) {
    run("cluster_sums", cuda::cluster_sums_workspace, cuda::cluster_sums, ClusterSums{x, cluster, sums, counts}, allocate,
        stream, device);
  });
  m.def("apply_momentum_",
        [](View centroids, View sums, View counts, double momentum, Allocate allocate, uintptr_t stream, int device) {
          run("apply_momentum_", cuda::apply_momentum_workspace, cuda::apply_momentum,
              ApplyMomentum{centroids, sums, counts, momentum}, allocate, stream, device);
        });
  m.def("momentum_update_", [](View centroids, View x, View cluster, double momentum, bool deterministic, Allocate allocate,
                               uintptr_t stream, int device) {
    run("momentum_update_", cuda::momentum_update_workspace, cuda::momentum_update,
        MomentumUpdate{centroids, x, cluster, momentum, deterministic}, allocate, stream, device);
  });
  m.def("class_scores", [](View x, View centroids, View labels, int metric, View scores, View winner, View own_similarity,
                           Allocate allocate, uintptr_t stream, int device) {
    run("class_scores", cuda::class_scores_workspace, cuda::class_scores,
        ClassScores{x, centroids, labels, Metric(metric), false, scores, winner, own_similarity, 1}, allocate, stream, device);
  });
  m.def("nearest_centroid", [](View x, View centroids, int metric, View label, View sub, View score, Allocate allocate,
                               uintptr_t stream, int device) {
    run("nearest_centroid", cuda::nearest_centroid_workspace, cuda::nearest_centroid,
        NearestCentroid{x, centroids, Metric(metric), label, sub, score, 1}, allocate, stream, device);
  });
  m.def("centroid_cross_entropy",
        [](View x, View centroids, View labels, int metric, View norm_weight, View norm_bias, double norm_eps, View scale,
           double temperature, View class_weight, int64_t ignore_index, double label_smoothing, int reduction, View grad_loss,
           View loss, View prediction, View own_similarity, View grad_x, View grad_norm_weight, View grad_norm_bias,
           View grad_scale, Allocate allocate, uintptr_t stream, int device) {
          CentroidCrossEntropy a{.x = x,
                                 .centroids = centroids,
                                 .labels = labels,
                                 .metric = Metric(metric),
                                 .norm_weight = norm_weight,
                                 .norm_bias = norm_bias,
                                 .norm_eps = norm_eps,
                                 .scale = scale,
                                 .temperature = temperature,
                                 .class_weight = class_weight,
                                 .ignore_index = ignore_index,
                                 .label_smoothing = label_smoothing,
                                 .reduction = CentroidCrossEntropy::Reduction(reduction),
                                 .grad_loss = grad_loss,
                                 .loss = loss,
                                 .prediction = prediction,
                                 .own_similarity = own_similarity,
                                 .grad_x = grad_x,
                                 .grad_norm_weight = grad_norm_weight,
                                 .grad_norm_bias = grad_norm_bias,
                                 .grad_scale = grad_scale};
          run("centroid_cross_entropy", cuda::centroid_cross_entropy_workspace, cuda::centroid_cross_entropy, a, allocate,
              stream, device);
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
  m.def("sinkhorn", [](View similarity, View group, int64_t groups, double epsilon, int iterations, double tolerance,
                       View assignment, View plan, View history, View steps, Allocate allocate, uintptr_t stream, int device) {
    run(plan ? "sinkhorn_plan" : "sinkhorn_assign", cuda::sinkhorn_workspace, cuda::sinkhorn,
        Sinkhorn{similarity, group, groups, epsilon, iterations, tolerance, assignment, plan, history, steps}, allocate, stream,
        device);
  });
  m.def("sinkhorn_backward", [](View similarity, View group, int64_t groups, double epsilon, View history, View steps,
                                View grad_plan, View grad_similarity, Allocate allocate, uintptr_t stream, int device) {
    run("sinkhorn_plan", cuda::sinkhorn_backward_workspace, cuda::sinkhorn_backward,
        SinkhornBackward{similarity, group, groups, epsilon, history, steps, grad_plan, grad_similarity}, allocate, stream,
        device);
  });
}
