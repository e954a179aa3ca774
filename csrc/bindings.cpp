// The Python module _C: every public function of the library, on views of tensors that Python owns.
// The GIL is released while a kernel runs; a Status that is not ok becomes a Python exception that names the op.
#include "bindings.h"

#include <sstream>

#include "dnc/common.h"
#include "dnc/embedding.h"
#include "dnc/momentum.h"
#include "dnc/similarity.h"
#include "dnc/sinkhorn.h"
#include "dnc/upsample.h"
#include "stamp.h"

namespace py = pybind11;
using namespace dnc;

namespace {

// Runs a kernel without the GIL and raises what it reports.
template <class Args>
void run(const char* op, Status (*kernel)(const Args&), const Args& args) {
  Status s;
  {
    py::gil_scoped_release release;
    s = kernel(args);
  }
  raise(op, s);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("__version__") = DNC_VERSION;
  m.attr("compiler") = DNC_COMPILER;
  m.attr("source") = stamp::source;
  m.attr("commit") = stamp::commit;
#if defined(DNC_CUDA_ARCHS)
  m.attr("cuda_archs") = DNC_CUDA_ARCHS;
#else
  m.attr("cuda_archs") = py::none();
#endif
  bind_view(m);
  m.def("best_isa", [] { return int(best_isa()); });
  m.def("current_isa", [] { return int(current_isa()); });
  m.def("set_isa", [](int isa) { return set_isa(Isa(isa)); });

  m.def("cluster_sums", [](const char* op, View x, View cluster, View sums, View counts, int threads) {
    run(op, cluster_sums, ClusterSums{x, cluster, sums, counts, threads});
  });
  m.def("apply_momentum_", [](View centroids, View sums, View counts, double momentum, int threads) {
    run("apply_momentum_", apply_momentum, ApplyMomentum{centroids, sums, counts, momentum, threads});
  });
#if defined(DNC_WITH_CUDA)
  py::module_ cuda = m.def_submodule("cuda");
  bind_cuda(cuda);
  py::dict sources;  // family -> SHA-256 of its kernels' source
  std::istringstream words(stamp::cuda_sources);
  for (std::string family, hash; words >> family >> hash;) sources[family.c_str()] = hash;
  cuda.attr("sources") = sources;
#endif
  m.def("sinkhorn", [](View similarity, View group, int64_t groups, double epsilon, int iterations, double tolerance,
                       View assignment, View plan, View history, View steps, int threads) {
    run(plan ? "sinkhorn_plan" : "sinkhorn_assign", sinkhorn,
        Sinkhorn{similarity, group, groups, epsilon, iterations, tolerance, assignment, plan, history, steps, threads});
  });
  m.def("sinkhorn_backward", [](View similarity, View group, int64_t groups, double epsilon, View history, View steps,
                                View grad_plan, View grad_similarity, int threads) {
    run("sinkhorn_plan", sinkhorn_backward,
        SinkhornBackward{similarity, group, groups, epsilon, history, steps, grad_plan, grad_similarity, threads});
  });
  m.def("normalize_embedding",
        [](View x, View weight, View bias, double eps, View y, View mean, View rstd, View inverse_norm, int threads) {
          run("normalize_embedding", normalize_embedding,
              NormalizeEmbedding{x, weight, bias, eps, y, mean, rstd, inverse_norm, threads});
        });
  m.def("normalize_embedding_backward", [](View x, View weight, View bias, View mean, View rstd, View inverse_norm, View grad_y,
                                           View grad_rstd, View grad_x, View grad_weight, View grad_bias, int threads) {
    run("normalize_embedding", normalize_embedding_backward,
        NormalizeEmbeddingBackward{x, weight, bias, mean, rstd, inverse_norm, grad_y, grad_rstd, grad_x, grad_weight, grad_bias,
                                   threads});
  });
  m.def("class_scores", [](const char* op, View x, View centroids, View labels, int metric, bool distance, View scores,
                           View winner, View own_similarity, int threads) {
    run(op, class_scores, ClassScores{x, centroids, labels, Metric(metric), distance, scores, winner, own_similarity, threads});
  });
  m.def("class_scores_backward", [](View x, View centroids, View labels, int metric, View winner, View grad_scores,
                                    View grad_own_similarity, View grad_x, bool accumulate, View grad_centroids, int threads) {
    run("class_scores", class_scores_backward,
        ClassScoresBackward{x, centroids, labels, Metric(metric), winner, grad_scores, grad_own_similarity, grad_x, accumulate,
                            grad_centroids, threads});
  });
  m.def("nearest_centroid", [](View x, View centroids, int metric, View label, View sub, View score, int threads) {
    run("nearest_centroid", nearest_centroid, NearestCentroid{x, centroids, Metric(metric), label, sub, score, threads});
  });
  m.def("subcentroid_cross_entropy",
        [](View x, View centroids, View target, double temperature, int64_t ignore_index, View scale, View loss, View grad_x,
           View labels, View scores, View winner, View own_similarity, int threads) {
          const ClassScores outputs{.x = x,
                                    .centroids = centroids,
                                    .labels = labels,
                                    .scores = scores,
                                    .winner = winner,
                                    .own_similarity = own_similarity,
                                    .threads = threads};
          run("subcentroid_cross_entropy", subcentroid_cross_entropy,
              SubcentroidCrossEntropy{outputs, target, temperature, ignore_index, scale, loss, grad_x});
        });
  m.def("centroid_cross_entropy",
        [](View x, View centroids, View labels, int metric, View norm_weight, View norm_bias, double norm_eps, View scale,
           double temperature, View class_weight, int64_t ignore_index, double label_smoothing, int reduction, View grad_loss,
           View loss, View prediction, View own_similarity, View grad_x, View grad_centroids, View grad_norm_weight,
           View grad_norm_bias, View grad_scale, int threads) {
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
                                 .grad_centroids = grad_centroids,
                                 .grad_norm_weight = grad_norm_weight,
                                 .grad_norm_bias = grad_norm_bias,
                                 .grad_scale = grad_scale,
                                 .threads = threads};
          run("centroid_cross_entropy", centroid_cross_entropy, a);
        });
  m.def("upsample_cross_entropy",
        [](View scores, View labels, const std::vector<int64_t>& window, bool align_corners, View class_weight,
           int64_t ignore_index, double label_smoothing, View grad_loss, View sums, View loss, View grad_scores, int threads) {
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
                                 .grad_scores = grad_scores,
                                 .threads = threads};
          run("upsample_cross_entropy", upsample_cross_entropy, a);
        });
  m.def("upsample_argmax", [](View scores, bool align_corners, View label, int threads) {
    run("upsample_argmax", upsample_argmax, UpsampleArgmax{scores, align_corners, label, threads});
  });
}
