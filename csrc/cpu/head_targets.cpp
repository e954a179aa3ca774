// head_targets on the CPU: what follows for a pixel of a segmentation head from the sub-centroid that the transport chose.
//
//   target = group * K + assignment;  s = <e, p[target]>;  pull = -contrast / temperature - 2 distance (1 - s)
//   sums of lse - s / temperature and of (1 - s)^2; wins of the nearest own sub-centroid; pixels that are correct and labelled
//   reads own similarities [N,K] and five numbers a pixel once: bound by memory. One parallel region.
// Deterministic: sums are kept by chunk of pixels and added in order. Reference: `head_cluster` of
// dnc_kernels/ops/head/reference.py.
#include <omp.h>

#include "dnc/head.h"
#include "head_bands.h"

namespace dnc::cpu::DNC_ISA {
namespace {

constexpr int64_t kChunk = 4096;             // pixels
constexpr int kContrast = 2, kDistance = 3;  // of HeadFirstPass::factors

template <class T>
Status targets(const HeadTargets& a) {
  const int64_t N = a.group.size[0], K = a.own_similarity.size[1], C = a.classes, M = C * K, chunks = (N + kChunk - 1) / kChunk;
  int threads = int(a.threads < chunks ? a.threads : chunks);
  if (threads < 1 || N * K < 65536) threads = 1;  // below: less work than waking a thread
  const Scratch memory(size_t(threads * (M + 3)) * sizeof(int64_t)), chunk_sums(size_t(2 * chunks) * sizeof(double));
  if (!memory.data || !chunk_sums.data) return {Code::out_of_memory, 0, 0, "not enough memory"};
  std::memset(memory.data, 0, size_t(threads * (M + 3)) * sizeof(int64_t));
  const int64_t *group = a.group.as<int64_t>(), *prediction = a.prediction.as<int64_t>(), *small = a.small.as<int64_t>();
  const int64_t* assignment = a.assignment.as<int64_t>();
  const T inverse = T(1 / a.contrast_temperature), contrast = a.factors.as<T>()[kContrast] * inverse;
  const T distance = a.factors.as<T>()[kDistance];
  FirstError error;
#pragma omp parallel num_threads(threads)
  {
    int64_t *const wins = memory.as<int64_t>() + omp_get_thread_num() * (M + 3), *const pixels = wins + M;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < chunks; i++) {
      double ppc = 0, ppd = 0;
      for (int64_t n = i * kChunk; n < N && n < (i + 1) * kChunk; n++) {
        const int64_t c = group[n], k = assignment[n];
        int64_t target = -1;
        T pull = 0;
        if (c >= C || k >= K) {
          error.report({Code::bad_label, n, c >= C ? c : k, "groups must be in [0,C) and assignments in [0,K), or negative"},
                       n);
        } else if (c >= 0 && k >= 0) {
          const T *own = a.own_similarity.as<T>() + n * K, s = own[k], away = 1 - s;
          int64_t nearest = 0;
          for (int64_t j = 1; j < K; j++) nearest = own[j] > own[nearest] ? j : nearest;
          wins[c * K + nearest]++;
          target = c * K + k, pull = -contrast - 2 * distance * away;
          if (a.lse) ppc += double(a.lse.as<T>()[n] - s * inverse);
          ppd += double(away * away);
        }
        const bool finite = prediction[n] >= 0, labelled = finite && small[n] >= 0,
                   correct = labelled && prediction[n] == small[n];
        pixels[0] += correct, pixels[1] += labelled, pixels[2] += !finite;
        a.target.as<int64_t>()[n] = target;
        a.moving.as<int64_t>()[n] = correct || !a.correct_only ? target : -1;
        if (a.pull) a.pull.as<T>()[n] = pull;
      }
      chunk_sums.as<double>()[2 * i] = ppc, chunk_sums.as<double>()[2 * i + 1] = ppd;
    }
  }
  if (error.any()) return error.status();
  double total[2] = {0, 0};
  for (int64_t i = 0; i < 2 * chunks; i++) total[i % 2] += chunk_sums.as<double>()[i];
  a.sums.as<double>()[0] = total[0], a.sums.as<double>()[1] = total[1];
  for (int64_t m = 0; m < M + 3; m++) {
    int64_t count = 0;
    for (int t = 0; t < threads; t++) count += memory.as<int64_t>()[t * (M + 3) + m];
    a.counters.as<int64_t>()[m] = count;
  }
  return {};
}

}  // namespace

Status head_targets(const HeadTargets& a) {
  return a.own_similarity.dtype == DType::float64 ? targets<double>(a) : targets<float>(a);
}

}  // namespace dnc::cpu::DNC_ISA
