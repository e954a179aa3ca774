// subcentroid_cross_entropy on the CPU: softmax over all sub-centroids, its loss and gradient, class scores beside it.
//
//   s[n,m] = <x_n, p_m> / temperature;  loss = lse_m s - s[target];  dX = (sum_m softmax_m p_m - p_target) / temperature
//   reads x once [N,D], packed centroids twice a tile from L2/L3; writes loss [N], dX [N,D]; [N,C*K] lives a tile at a time.
//   floors: 4*N*C*K*D flop at FMA peak with dX (2 without); 2*N*D*4 bytes. Compute-bound from D = 32 on.
// Plan: threads take tiles (similarity_contrast.h). Every pixel's results depend on that pixel alone: bit-equal for any thread
// count. Reference: dnc_kernels/ops/similarity/reference.py.
#include "similarity_contrast.h"

#include <omp.h>

#include "dnc/similarity.h"

namespace dnc::cpu::DNC_ISA {
namespace {

Status check_targets(const SubcentroidCrossEntropy& a, int64_t N, int64_t M) {
  for (int64_t n = 0; n < N; n++) {
    const int64_t m = a.target.as<int64_t>()[n];
    if (m >= M && m != a.ignore_index) return {Code::bad_label, n, m, "labels must be in [0,C*K), ignore_index or negative"};
  }
  return {};
}

template <class T>
Status contrast(const SubcentroidCrossEntropy& a) {
  const ClassScores& s = a.scores;
  const int64_t N = Pixels(s.x).N();
  if (N == 0) return {};
  if (a.target)
    if (const Status bad = check_targets(a, N, s.centroids.size[0] * s.centroids.size[1]); !bad.ok()) return bad;
  const ContrastPlan<T> plan(s.centroids, N, bool(s.scores), true, bool(a.grad_x), s.threads);
  if (!plan.ok()) return out_of_memory();
  const int64_t tiles = (N + plan.rows - 1) / plan.rows;
  int failed = 0;
#pragma omp parallel num_threads(s.threads) reduction(| : failed)
  {
    Scratch memory(plan.bytes());
    failed = !memory.data;
    ContrastTiles<T> work(a, plan, memory.data);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tiles; t++)
      if (!failed) work.run(t);
  }
  return failed ? out_of_memory() : Status{};
}

}  // namespace

Status subcentroid_cross_entropy(const SubcentroidCrossEntropy& a) {
  if (a.scores.metric != Metric::dot) return bad_argument("the metric must be dot");
  if (a.scores.own_similarity && !a.scores.labels) return bad_argument("own_similarity needs labels");
  return with_compute_type(a.loss.dtype == DType::float64, [&](auto type) { return contrast<decltype(type)>(a); });
}

}  // namespace dnc::cpu::DNC_ISA
