// Similarities of pixels and sub-centroids with what follows them fused in: max over K, norm over C, cross-entropy, gradients.
#pragma once
#include "dnc/common.h"
#include "dnc/cuda.h"

namespace dnc {

// scores[n,c] = max_k similarity(x[n], centroids[c,k]); winner = the k of it, lowest on ties. A pixel with a non-finite feature
// has NaN scores. With K = 1 and C = C*K this is the plain matrix of similarities.
struct ClassScores {
  View x;          // [N,D] or [B,D,H,W], float32/float64/float16/bfloat16, any strides
  View centroids;  // [C,K,D], any of these dtypes, contiguous
  View labels;     // optional [N] int64 in [0,C); negative: own_similarity row is zero
  Metric metric = Metric::dot;
  bool distance = false;  // write the distance instead: 1 - cosine, or |x-p|^2
  View scores;            // out [N,C] or [B,C,H,W], float32 or float64 (the compute type), any strides
  View winner;            // out, optional: uint8, the shape of scores, any strides
  View own_similarity;    // out, optional: [N,K] of the compute type, contiguous
  int threads = 1;
};
Status class_scores(const ClassScores&);

// Gradients of class_scores. Only the winner of a class carries its gradient.
struct ClassScoresBackward {
  View x, centroids, labels;
  Metric metric = Metric::dot;
  View winner;               // with grad_scores: as written by class_scores
  View grad_scores;          // optional, the shape of scores, any strides
  View grad_own_similarity;  // optional [N,K] contiguous
  View grad_x;               // out, optional, x's shape and dtype, any strides
  bool accumulate = false;   // add to grad_x instead of overwriting it
  View grad_centroids;       // out, optional [C,K,D] of the compute type, contiguous
  int threads = 1;
};
Status class_scores_backward(const ClassScoresBackward&);

// The nearest sub-centroid of all: m = label * K + sub, lowest on ties; -1, -1, NaN for a pixel with a non-finite feature.
struct NearestCentroid {
  View x, centroids;
  Metric metric = Metric::dot;
  View label, sub;  // out [N] int64
  View score;       // out [N] of the compute type
  int threads = 1;
};
Status nearest_centroid(const NearestCentroid&);

// Cross-entropy of the class scores and, in the same pass, its gradients. For each pixel r[c] = max_k similarity;
// o = LayerNorm_C(r) where norm_weight is given, else r; logits = o * scale / temperature.
struct CentroidCrossEntropy {
  View x, centroids;
  View labels;  // [N] int64, in [0,C); ignore_index or any negative id leaves a pixel out
  Metric metric = Metric::dot;
  View norm_weight, norm_bias;  // optional [C] of the compute type
  double norm_eps = 1e-5;
  View scale;  // optional: one element of the compute type
  double temperature = 1.0;
  View class_weight;  // optional [C] of the compute type
  int64_t ignore_index = -100;
  double label_smoothing = 0.0;
  enum class Reduction : int32_t { none, mean, sum } reduction = Reduction::mean;
  View grad_loss;       // optional: gradients are multiplied by it; [N] for none, one element otherwise; absent: 1
  View loss;            // out, optional: [N] for none, one element otherwise, of the compute type
  View prediction;      // out, optional [N] int64; -1 for a pixel with a non-finite feature
  View own_similarity;  // out, optional [N,K] of the compute type; zero rows where ignored
  View grad_x;          // out, optional, x's shape and dtype, any strides
  View grad_centroids;  // out, optional [C,K,D] of the compute type
  View grad_norm_weight, grad_norm_bias;  // out, optional [C] of the compute type
  View grad_scale;                        // out, optional, one element of the compute type
  int threads = 1;
};
Status centroid_cross_entropy(const CentroidCrossEntropy&);

// Cross-entropy over all C*K similarities <x,p> / temperature and, in the same pass, its gradient for a coefficient of 1 a
// pixel: loss[n] = lse_m(s[n,m]) - s[n,target], grad_x[n] = (sum_m softmax_m p_m - p_target) / temperature. Without a target
// the target's terms are left out: loss is the log-sum-exp, for pixels with a label where labels are given. Class scores come
// out of the same product where they are asked for.
struct SubcentroidCrossEntropy {
  ClassScores scores;  // x, centroids, labels, threads; metric dot; its outputs are optional here
  View target;         // optional [N] int64: c*K + k; ignore_index or any negative id leaves a pixel out
  double temperature = 1.0;
  int64_t ignore_index = -100;
  View scale;   // optional, one element of the compute type: grad_x is multiplied by it
  View loss;    // out [N] of the compute type, 0 where left out
  View grad_x;  // out, optional, x's shape and dtype, any strides; 0 where left out
};
Status subcentroid_cross_entropy(const SubcentroidCrossEntropy&);

namespace cuda {
// What the CUDA kernels take: x float16 or bfloat16, 16-byte aligned, with adjacent channels ([N,D], channels_last) or adjacent
// pixels (NCHW) and its other strides multiples of 16 bytes; centroids of at most 32 bits; D and K within these limits. Scores,
// own similarities and gradients of small tensors are float32. Distances and grad_centroids are not made.
namespace similarity_limits {
constexpr int max_channels = 768;     // D
constexpr int channel_multiple = 8;   // D is a multiple of it: 16 bytes
constexpr int max_subcentroids = 20;  // K
}  // namespace similarity_limits
size_t class_scores_workspace(const ClassScores&);
Status class_scores(const ClassScores&, const Launch&);
size_t nearest_centroid_workspace(const NearestCentroid&);
Status nearest_centroid(const NearestCentroid&, const Launch&);
size_t centroid_cross_entropy_workspace(const CentroidCrossEntropy&);
Status centroid_cross_entropy(const CentroidCrossEntropy&, const Launch&);
}  // namespace cuda

}  // namespace dnc
