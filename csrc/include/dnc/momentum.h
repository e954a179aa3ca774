// Sums of the pixels of each sub-centroid, and the momentum update (DNC, eq. 8).
#pragma once
#include "dnc/common.h"

namespace dnc {

// sums[m] = sum of x[n] over cluster[n] == m; counts[m] = how many. Pixels with cluster -1 or a non-finite feature are left
// out.
struct ClusterSums {
  View x;        // [N,D] or [B,D,H,W], float32/float64/float16/bfloat16
  View cluster;  // [N] int64, -1 or in [0,M)
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

#if defined(DNC_WITH_CUDA)
// The same two steps on the current CUDA device, on `stream` (a cudaStream_t), without a host synchronisation.
// Deterministic: the pixels of a sub-centroid are added in a fixed order. Clusters outside [0,M) are left out.
struct MomentumUpdateCuda {
  View centroids;  // in and out [M,D] float32, contiguous
  View x;          // [N,D] or [B,D,H,W] float32/float16/bfloat16
  View cluster;    // [N] int64, contiguous
  double momentum = 0.999;
  void* workspace = nullptr;  // momentum_workspace_bytes(M, D, N) bytes of device memory, 256-byte aligned
  void* stream = nullptr;
};
size_t momentum_workspace_bytes(int64_t M, int64_t D, int64_t N);
Status momentum_update_cuda(const MomentumUpdateCuda&);
#endif

}  // namespace dnc
