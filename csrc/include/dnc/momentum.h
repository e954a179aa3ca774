// Sums of the pixels of each sub-centroid, and the momentum update (DNC, eq. 8).
#pragma once
#include "dnc/common.h"
#include "dnc/cuda.h"

namespace dnc {

// sums[m] = sum of x[n] over cluster[n] == m; counts[m] = how many. Pixels with a negative cluster or a non-finite feature are
// left out.
struct ClusterSums {
  View x;        // [N,D] or [B,D,H,W], float32/float64/float16/bfloat16
  View cluster;  // [N] int64 in [0,M); negative: left out
  View sums;     // out [M,D], float64 for float64 x, else float32; contiguous
  View counts;   // out [M] int64
  int threads = 1;
};
Status cluster_sums(const ClusterSums&);

// centroids[m] <- normalise(momentum * centroids[m] + (1 - momentum) * normalise(sums[m])) where counts[m] > 0; the others keep
// every bit. A sum or a result that is zero or not finite leaves its sub-centroid as it was.
struct ApplyMomentum {
  View centroids;  // in and out [M,D], float32 or float64, contiguous
  View sums;       // [M,D] float32 or float64, contiguous
  View counts;     // [M] int64
  double momentum = 0.999;
  int threads = 1;
};
Status apply_momentum(const ApplyMomentum&);

// Both steps at once, on CUDA alone.
struct MomentumUpdate {
  View centroids;  // in and out [M,D] float32, contiguous
  View x;          // [N,D] or [B,D,H,W] float32/float16/bfloat16, any strides
  View cluster;    // [N] int64, contiguous; outside [0,M): left out
  double momentum = 0.999;
  // the pixels of a sub-centroid are added in a fixed order; false: faster where neighbours share one
  bool deterministic = true;
};

// The CUDA twins take float32 centroids and sums, x of any other dtype but float64, fewer than 2^32 pixels and 2^22
// sub-centroids, and a contiguous cluster; clusters outside [0,M) are left out. cluster_sums is always deterministic.
namespace cuda {
size_t cluster_sums_workspace(const ClusterSums&);
Status cluster_sums(const ClusterSums&, const Launch&);
size_t apply_momentum_workspace(const ApplyMomentum&);
Status apply_momentum(const ApplyMomentum&, const Launch&);
size_t momentum_update_workspace(const MomentumUpdate&);
Status momentum_update(const MomentumUpdate&, const Launch&);
}  // namespace cuda

}  // namespace dnc
