// Chooses the instruction set once, and forwards every public function to that copy of its kernel.
#include <atomic>
#include <cstdlib>
#if defined(DNC_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "dnc/common.h"
#include "dnc/embedding.h"
#include "dnc/head.h"
#include "dnc/momentum.h"
#include "dnc/similarity.h"
#include "dnc/sinkhorn.h"
#include "dnc/upsample.h"

namespace dnc {

Scratch::Scratch(size_t bytes) : data(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
Scratch::~Scratch() { std::free(data); }

namespace {
#if defined(DNC_WITH_AMX)
// AMX-BF16 in the processor and, for every thread of this process, the tile registers, which Linux (5.16 or later) wants to be
// asked for: their state is 8 KB a thread.
bool may_use_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if ((d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & 1u << 5) == 0) return false;  // AVX512-BF16, which converts
  constexpr long request_permission = 0x1023, tile_data = 18;                        // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

Isa find_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(DNC_WITH_AMX)
  if (avx512 && may_use_amx()) return Isa::amx;
#endif
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

// The library's one variable: any thread may read and set it at any time. It orders nothing else, and a call reads it once.
std::atomic<Isa>& isa() {
  static std::atomic<Isa> value{best_isa()};
  return value;
}
}  // namespace
Isa best_isa() {
  static const Isa best = find_best_isa();
  return best;
}
Isa current_isa() { return isa().load(std::memory_order_relaxed); }
bool set_isa(Isa wanted) {
  if (wanted > best_isa()) return false;
  isa().store(wanted, std::memory_order_relaxed);
  return true;
}

#if defined(__x86_64__)
#define DNC_DECLARE(function, Args)                    \
  namespace cpu {                                      \
  namespace portable { Status function(const Args&); } \
  namespace avx2 { Status function(const Args&); }     \
  namespace avx512 { Status function(const Args&); }   \
  }
#define DNC_CHOOSE(isa, function, a)                          \
  const Isa chosen = isa;                                     \
  if (chosen >= Isa::avx512) return cpu::avx512::function(a); \
  if (chosen == Isa::avx2) return cpu::avx2::function(a);     \
  return cpu::portable::function(a);
#else
#define DNC_DECLARE(function, Args) \
  namespace cpu::portable { Status function(const Args&); }
#define DNC_CHOOSE(isa, function, a) return cpu::portable::function(a);
#endif

#define DNC_FORWARD(function, Args) \
  DNC_DECLARE(function, Args)       \
  Status function(const Args& a) { DNC_CHOOSE(current_isa(), function, a) }

// The same, and the copy for AMX where that has something to multiply: `problem` has the pixels and the sub-centroids.
#if defined(DNC_WITH_AMX)
namespace {
// Fewer channels would fill less than half a step of 32, where there is little time to save.
bool takes_tiles(const View& x, const View& centroids) {
  return x.dtype == DType::bfloat16 && centroids.dtype != DType::float64 && x.size[1] >= 16;
}
}  // namespace
#define DNC_FORWARD_PRODUCT(function, Args, problem)                                                    \
  DNC_DECLARE(function, Args)                                                                           \
  namespace cpu::amx { Status function(const Args&); }                                                  \
  Status function(const Args& a) {                                                                      \
    const Isa isa = current_isa();                                                                      \
    if (isa == Isa::amx && takes_tiles((problem).x, (problem).centroids)) return cpu::amx::function(a); \
    DNC_CHOOSE(isa, function, a)                                                                        \
  }
#else
#define DNC_FORWARD_PRODUCT(function, Args, problem) DNC_FORWARD(function, Args)
#endif

DNC_FORWARD(cluster_sums, ClusterSums)
DNC_FORWARD(apply_momentum, ApplyMomentum)
DNC_FORWARD(sinkhorn, Sinkhorn)
DNC_FORWARD(sinkhorn_backward, SinkhornBackward)
DNC_FORWARD(normalize_embedding, NormalizeEmbedding)
DNC_FORWARD(normalize_embedding_backward, NormalizeEmbeddingBackward)
DNC_FORWARD_PRODUCT(class_scores, ClassScores, a)
DNC_FORWARD_PRODUCT(class_scores_backward, ClassScoresBackward, a)
DNC_FORWARD_PRODUCT(nearest_centroid, NearestCentroid, a)
DNC_FORWARD_PRODUCT(centroid_cross_entropy, CentroidCrossEntropy, a)
DNC_FORWARD_PRODUCT(subcentroid_cross_entropy, SubcentroidCrossEntropy, a.scores)
DNC_FORWARD(upsample_cross_entropy, UpsampleCrossEntropy)
DNC_FORWARD(upsample_argmax, UpsampleArgmax)
DNC_FORWARD_PRODUCT(head_first_pass, HeadFirstPass, a)
DNC_FORWARD(head_second_pass, HeadSecondPass)
DNC_FORWARD(label_figures, LabelFigures)
DNC_FORWARD(head_targets, HeadTargets)

}  // namespace dnc
