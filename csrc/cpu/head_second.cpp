// head_second_pass on the CPU: what the cluster of a pixel decides, and the gradient of the features, in one parallel region.
//
//   sums[m] = sum of e[n] over cluster[n] == m;  de[n] += pull[n] * p[target[n]];  dx = gradient of normalize(LayerNorm(x))
//   reads x [N,D] twice and grad [N,D] twice, writes grad twice, a band at a time from L2: bound by memory. The embedding is
//   made again where it is added, from the statistics of the first pass, and stored nowhere (momentum_sums.h).
// Plan: two kinds of work, of which neither waits for the other. Tasks of cluster sums come first, because they are longer;
// then runs of bands (head_bands.h), each of which makes a band's gradient from end to end. No barrier but the region's end.
// Deterministic: tasks and bands depend on sizes alone; sums are kept by chunk and run, and added in order. Reference: the
// bands of dnc_kernels/ops/head/op.py.
#include <omp.h>

#include "dnc/embedding.h"
#include "dnc/head.h"
#include "head_bands.h"
#include "momentum_sums.h"
#include "similarity_gradient.h"
#include "similarity_scores.h"

namespace dnc::cpu::DNC_ISA {

Status normalize_embedding_backward(const NormalizeEmbeddingBackward&);

namespace {

// The cluster sums of a call: x of type S, statistics of type T.
template <class T, class S>
struct EmbeddingSums {
  const HeadSecondPass& a;
  const int64_t N, D, M;
  Scratch clusters, affine;
  Problem problem;
  SumPlan<T> plan;
  Scratch others;

  EmbeddingSums(const HeadSecondPass& args, int threads)
      : a(args),
        N(Pixels(args.x).N()),
        D(args.x.size[1]),
        M(args.cluster ? args.sums.size[0] : 0),
        clusters(size_t(args.cluster ? N : 0) * sizeof(int64_t)),
        affine(size_t(2 * D) * sizeof(T)),
        problem{Pixels(args.embedding ? args.embedding : args.x),
                clusters.as<int64_t>(),
                N,
                D,
                M > 0 ? M : 1,
                args.sums.data,
                args.counts.as<int64_t>(),
                threads},
        plan(problem),
        others(args.cluster ? plan.other_bytes(problem) : 0) {
    if (!ok()) return;
    for (int64_t d = 0; d < D; d++) {
      affine.as<T>()[d] = a.weight ? a.weight.as<T>()[d] : T(1);
      affine.as<T>()[D + d] = a.bias ? a.bias.as<T>()[d] : T(0);
    }
  }
  bool ok() const { return clusters.data && affine.data && others.data; }
  int64_t tasks() const { return a.cluster && N > 0 ? plan.tasks() : 0; }
  int64_t own_bytes() const { return tasks() > 0 ? plan.own_bytes(problem) : 0; }
  Embedded<T> source() const {
    const T* statistics = a.statistics.as<T>();
    return {statistics, statistics + N, statistics + 2 * N, affine.as<T>(), affine.as<T>() + D};
  }

  // Clusters without those of pixels that have a NaN or an Inf, which leave one in the statistics; and how many each has.
  Status count() {
    if (!a.cluster) return {};
    std::memset(a.sums.data, 0, size_t(M * D) * sizeof(T));
    std::memset(a.counts.data, 0, size_t(M) * sizeof(int64_t));
    const Embedded<T> s = source();
    for (int64_t n = 0; n < N; n++) {
      int64_t m = a.cluster.as<int64_t>()[n];
      if (m >= M) return {Code::bad_label, n, m, "clusters must be in [0,C*K) or negative"};
      if (!std::isfinite(s.mean[n] * s.rstd[n] * s.inverse_norm[n])) m = -1;
      clusters.as<int64_t>()[n] = m < 0 ? -1 : m;
      if (m >= 0) a.counts.as<int64_t>()[m]++;
    }
    return {};
  }
  void run(int64_t task, char* own) const {
    if (a.embedding)
      plan.template run<S>(problem, Plain<T>{}, task, own, others.as<T>());
    else
      plan.template run<S>(problem, source(), task, own, others.as<T>());
  }
  void finish() const {
    for (int64_t m = 0; tasks() > 0 && plan.chunks > 1 && m < M; m++) plan.add_chunks(problem, m, others.as<T>());
  }
};

// grad[n] += pull[n] * p[target[n]], of pixels with a target; C: the type that is computed in.
template <class C>
struct TargetGradient {
  static constexpr int kPixels = 64;  // of a tile: rows of 256 channels in 64 KB
  const HeadSecondPass& a;
  const CentroidRows<C> centroids;
  explicit TargetGradient(const HeadSecondPass& args) : a(args), centroids(args.centroids, Metric::dot, 1) {}

  void add(const View& grad, int64_t first, int64_t pixels, C* tile) const {
    const Pixels g(grad);
    const int64_t* target = a.target.as<int64_t>() + first;
    const C* pull = a.pull.as<C>() + first;
    for (int64_t n0 = 0; n0 < pixels; n0 += kPixels) {
      const int n = int(min64(kPixels, pixels - n0));
      bool any = false;
      for (int i = 0; i < n; i++) any |= target[n0 + i] >= 0;
      if (!any) continue;
      load_tile(g, n0, n, tile, g.D);
      for (int i = 0; i < n; i++) {
        if (target[n0 + i] < 0) continue;
        const C* p = centroids.rows + target[n0 + i] * g.D;
        for (int64_t d = 0; d < g.D; d++) tile[i * g.D + d] += pull[n0 + i] * p[d];
      }
      store_tile(g, n0, n, tile, g.D);
    }
  }
};

// T: the statistics and what is kept of x; S: x; C: sub-centroids, pull.
template <class T, class S, class C>
Status second_pass(const HeadSecondPass& a) {
  const Bands bands(a.x, a.band_pixels);
  const Runs runs(a.grad ? bands.count : 0);
  const int64_t D = a.x.size[1], N = bands.B * bands.h * bands.w;
  int threads = a.threads;
  if (threads < 1 || N * D < 16384) threads = 1;  // below: less work than waking a thread
  EmbeddingSums<T, S> sums(a, threads);
  const TargetGradient<C> targets(a);
  const bool pulled = a.grad && a.target && a.pull;
  if (pulled)
    for (int64_t n = 0, M = a.centroids.size[0] * a.centroids.size[1]; n < N; n++)
      if (const int64_t m = a.target.as<int64_t>()[n]; m >= M)
        return {Code::bad_label, n, m, "targets must be in [0,C*K) or negative"};
  const Scratch affine(size_t(runs.count * 2 * D) * sizeof(T));  // gradients of weight and bias, by run
  if (!sums.ok() || !targets.centroids.rows || !affine.data) return out_of_memory();
  if (const Status s = sums.count(); !s.ok()) return s;
  const int64_t tasks = sums.tasks();
  if (threads > tasks + runs.count) threads = int(tasks + runs.count > 0 ? tasks + runs.count : 1);
  FirstError error;
#pragma omp parallel num_threads(threads)
  {
    const Scratch own(size_t(sums.own_bytes())), tile(pulled ? size_t(TargetGradient<C>::kPixels * D) * sizeof(C) : 0);
    const Scratch one(size_t(2 * D) * sizeof(T));
    if (!own.data || !tile.data || !one.data) error.report(out_of_memory(), -1);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < tasks + runs.count; i++) {
      if (error.any()) continue;
      if (i < tasks) {
        sums.run(i, own.as<char>());
        continue;
      }
      const int64_t run = i - tasks;
      T* total = affine.as<T>() + run * 2 * D;
      std::memset(total, 0, size_t(2 * D) * sizeof(T));
      for (int64_t k = runs.begin(run); k < runs.begin(run + 1); k++) {
        const Band b = bands.at(k);
        const View grad = part_of(a.grad, b.begin, b.end, b.top, b.bottom);
        if (pulled) targets.add(grad, b.first, b.pixels, tile.as<C>());
        NormalizeEmbeddingBackward n;
        n.x = part_of(a.x, b.begin, b.end, b.top, b.bottom), n.weight = a.weight, n.bias = a.bias, n.grad_y = n.grad_x = grad;
        n.mean = row_of(a.statistics, 0, b.first, b.pixels), n.rstd = row_of(a.statistics, 1, b.first, b.pixels);
        n.inverse_norm = row_of(a.statistics, 2, b.first, b.pixels);
        if (a.grad_rstd) n.grad_rstd = part_of(a.grad_rstd, b.first, b.pixels);
        n.grad_weight = row_of(a.grad_affine, 0, 0, D), n.grad_weight.data = one.data;
        n.grad_bias = n.grad_weight, n.grad_bias.data = one.as<T>() + D;
        error.report(DNC_ISA::normalize_embedding_backward(n), k);
        for (int64_t d = 0; d < 2 * D; d++) total[d] += one.as<T>()[d];
      }
    }
  }
  if (error.any()) return error.status();
  sums.finish();
  for (int64_t d = 0; d < 2 * D && a.grad; d++) {
    double total = 0;
    for (int64_t run = 0; run < runs.count; run++) total += double(affine.as<T>()[run * 2 * D + d]);
    a.grad_affine.as<T>()[d] = T(total);
  }
  return {};
}

template <class T, class S>
Status second_pass(const HeadSecondPass& a) {
  return a.centroids.dtype == DType::float64 ? second_pass<T, S, double>(a) : second_pass<T, S, T>(a);
}

}  // namespace

Status head_second_pass(const HeadSecondPass& a) {
  if (a.grad && a.grad.dtype != a.x.dtype) return bad_argument("grad must have the dtype of x");
  switch (a.x.dtype) {
    case DType::float32: return second_pass<float, float>(a);
    case DType::float64: return second_pass<double, double>(a);
    case DType::float16: return second_pass<float, Float16>(a);
    case DType::bfloat16: return second_pass<float, BFloat16>(a);
    default: return bad_argument("x must be float32, float64, float16 or bfloat16");
  }
}

}  // namespace dnc::cpu::DNC_ISA
