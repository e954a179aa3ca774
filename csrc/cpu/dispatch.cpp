// Chooses the instruction set once, and forwards every public function to that copy of its kernel.
#include <atomic>
#include <cstdlib>

#include "dnc/common.h"
#include "dnc/embedding.h"
#include "dnc/momentum.h"
#include "dnc/similarity.h"
#include "dnc/sinkhorn.h"
#include "dnc/upsample.h"

namespace dnc {

Scratch::Scratch(size_t bytes) : data(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
Scratch::~Scratch() { std::free(data); }

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

namespace {
// The library's one variable: any thread may read and set it at any time. It orders nothing else, and a call reads it once.
std::atomic<Isa>& isa() {
  static std::atomic<Isa> value{best_isa()};
  return value;
}
}  // namespace
Isa current_isa() { return isa().load(std::memory_order_relaxed); }
bool set_isa(Isa wanted) {
  if (wanted > best_isa()) return false;
  isa().store(wanted, std::memory_order_relaxed);
  return true;
}

#if defined(__x86_64__)
#define DNC_FORWARD(function, Args)                      \
  namespace cpu {                                        \
  namespace portable { Status function(const Args&); }   \
  namespace avx2 { Status function(const Args&); }       \
  namespace avx512 { Status function(const Args&); }     \
  }                                                      \
  Status function(const Args& a) {                       \
    switch (current_isa()) {                             \
      case Isa::avx512: return cpu::avx512::function(a); \
      case Isa::avx2: return cpu::avx2::function(a);     \
      default: return cpu::portable::function(a);        \
    }                                                    \
  }
#else
#define DNC_FORWARD(function, Args)                         \
  namespace cpu::portable { Status function(const Args&); } \
  Status function(const Args& a) { return cpu::portable::function(a); }
#endif

DNC_FORWARD(cluster_sums, ClusterSums)
DNC_FORWARD(apply_momentum, ApplyMomentum)
DNC_FORWARD(sinkhorn, Sinkhorn)
DNC_FORWARD(sinkhorn_backward, SinkhornBackward)
DNC_FORWARD(normalize_embedding, NormalizeEmbedding)
DNC_FORWARD(normalize_embedding_backward, NormalizeEmbeddingBackward)
DNC_FORWARD(class_scores, ClassScores)
DNC_FORWARD(class_scores_backward, ClassScoresBackward)
DNC_FORWARD(nearest_centroid, NearestCentroid)
DNC_FORWARD(centroid_cross_entropy, CentroidCrossEntropy)
DNC_FORWARD(subcentroid_cross_entropy, SubcentroidCrossEntropy)
DNC_FORWARD(upsample_cross_entropy, UpsampleCrossEntropy)
DNC_FORWARD(upsample_argmax, UpsampleArgmax)

}  // namespace dnc
