// Entropic optimal transport of pixels to sub-centroids, many groups of different sizes at once (DNC, eq. 5-7).
#pragma once
#include "dnc/common.h"
#include "dnc/cuda.h"

namespace dnc {

// For every group g over its n_g pixels: T steps of
//   u[g,k] = -log K  - logsumexp_n(s[n,k]/epsilon + v[n])   (sub-centroid marginal, first)
//   v[n]   = -log n_g - logsumexp_k(s[n,k]/epsilon + u[g,k])  (pixel marginal)
// from v = 0. plan[n] = softmax_k(s[n]/epsilon + u[g]); assignment[n] = its argmax, lowest k on ties.
// A group of one pixel has a uniform plan: its assignment is the argmax of s. T = 0: plan = softmax_k(s/epsilon).
// A row with a non-finite similarity is left out of its group: assignment -1, plan NaN. Finite for every epsilon > 0.
struct Sinkhorn {
  View similarity;  // [N,K] float32/float64/float16/bfloat16, any strides
  View group;       // [N] int64 below groups, contiguous, negative = left out; absent: one group
  int64_t groups = 1;
  double epsilon = 0.05;
  int iterations = 3;
  double tolerance = -1;  // >= 0: a group stops once max_k |K * column sum - 1| <= tolerance
  View assignment;        // out, optional: [N] int64, -1 where left out
  View plan;  // out, optional: [N,K] float64 for float64 similarity, else float32, contiguous; zero rows where group < 0
  // out, optional: [iterations + 1,groups,K] of the plan's dtype, for the backward pass. Row 0: the similarity that row 1 is
  // measured from, so that u[1] = -log K - logsumexp_n((s - row 0)/epsilon). Row t > 1: u[t] from the v that follows from
  // u[t-1] - max_k u[t-1]. Rows after a group's last step repeat it; absent groups have zeros.
  View history;
  View steps;  // out, optional: [groups] int64: steps done, 0 for absent groups
  int threads = 1;
};
Status sinkhorn(const Sinkhorn&);

// grad_similarity = the derivative of sum(plan * grad_plan), through all the steps. Rows left out of their group get zeros.
struct SinkhornBackward {
  View similarity, group;
  int64_t groups = 1;
  double epsilon = 0.05;
  View history, steps;   // as written by sinkhorn
  View grad_plan;        // [N,K] of the plan's dtype, any strides
  View grad_similarity;  // out [N,K] of the plan's dtype, contiguous
  int threads = 1;
};
Status sinkhorn_backward(const SinkhornBackward&);

// On CUDA: K within the limit, groups to 2^21, no float64; a group >= groups is left out like a negative one, and its plan is
// zero. One cooperative launch.
namespace cuda {
namespace sinkhorn_limits {
constexpr int max_subcentroids = 64;  // K
}
size_t sinkhorn_workspace(const Sinkhorn&);
Status sinkhorn(const Sinkhorn&, const Launch&);
size_t sinkhorn_backward_workspace(const SinkhornBackward&);
Status sinkhorn_backward(const SinkhornBackward&, const Launch&);
}  // namespace cuda

}  // namespace dnc
