// sums[m] = sum of x[n] over cluster[n] == m, counts[m] = how many;  p[m] <- unit(g * p[m] + (1 - g) * unit(sums[m])) (DNC, eq.
// 8).
//
// cluster_sums    reads x [N,D] or [B,D,H,W] (float32/float64/float16/bfloat16) and cluster [N] int64; writes sums [M,D],
// counts [M].
//                 Bound by memory: x is read once, N*D*sizeof(x) bytes.
//   plan:         tasks of one chunk of pixels by one slice of channels (momentum_sums.h).
//   accuracy:     fp32 (fp64 for float64 x). Partial sums of about kFlush pixels are added to totals: the rounding error of a
//   sum of n
//                 pixels grows like kFlush + n / kFlush and not like n.
//   determinism:  an element is summed in pixel order within a chunk, and over chunks in order. Chunks depend on N, M and the
//   layout alone,
//                 slices change no sum: bit-equal for any number of threads.
//   non-finite:   the sums are made as if all pixels were finite. Only a NaN, an Inf or an overflow leaves a sum that is not
//   finite; in
//                 that case alone x is searched for such pixels, and the sums are made again without them.
// apply_momentum  reads and writes centroids [M,D], reads sums [M,D]: three passes over a row, in double. Parallel over rows.
// Reference: dnc_kernels/ops/momentum/reference.py.
#include <omp.h>

#include "momentum_sums.h"

namespace dnc::cpu::DNC_ISA {
namespace {

constexpr int64_t kSerial = 1 << 15;  // elements below which starting threads costs more than the work

// Checks the clusters and counts them.
Status count(const Problem& a) {
  Scratch memory(size_t(a.threads * (a.M + 1)) * sizeof(int64_t));
  if (!memory.data) return {Code::out_of_memory};
  int64_t *first_bad = memory.as<int64_t>(), *histograms = first_bad + a.threads;
#pragma omp parallel for num_threads(a.threads) schedule(static, 1)
  for (int64_t t = 0; t < a.threads; t++) {
    int64_t* h = histograms + t * a.M;
    std::memset(h, 0, size_t(a.M) * sizeof(int64_t));
    first_bad[t] = -1;
    const Part part(a.N, t, a.threads);
    for (int64_t n = part.begin; n < part.end; n++) {
      const int64_t m = a.cluster[n];
      if (uint64_t(m) < uint64_t(a.M)) {
        h[m]++;
      } else if (m >= 0) {
        first_bad[t] = n;
        break;
      }
    }
  }
  for (int64_t t = 0; t < a.threads; t++) {
    if (first_bad[t] >= 0)
      return {Code::bad_label, first_bad[t], a.cluster[first_bad[t]],
              "labels must be in [0,num_clusters), ignore_index or negative"};
  }
  std::memset(a.counts, 0, size_t(a.M) * sizeof(int64_t));
  for (int64_t t = 0; t < a.threads; t++) {
    for (int64_t m = 0; m < a.M; m++) a.counts[m] += histograms[t * a.M + m];
  }
  return {};
}

template <class T, class S>
Status sum_all(const Problem& a) {
  const SumPlan<T> plan(a);
  const int64_t own_bytes = plan.own_bytes(a);
  Scratch memory(size_t(own_bytes) * size_t(a.threads)), others(plan.other_bytes(a));
  if (!memory.data || !others.data) return {Code::out_of_memory};
#pragma omp parallel num_threads(a.threads)
  {
    char* own = memory.as<char>() + own_bytes * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < plan.tasks(); task++) plan.template run<S>(a, Plain<T>{}, task, own, others.as<T>());
    if (plan.chunks > 1) {
#pragma omp for schedule(static)
      for (int64_t m = 0; m < a.M; m++) plan.add_chunks(a, m, others.as<T>());
    }
  }
  return {};
}

template <class T>
bool finite(const T* p, int64_t n) {
  constexpr int64_t L = Vec<T>::lanes;
  Vec<T> v = Vec<T>::splat(0);
  int64_t i = 0;
  for (; i + L <= n; i += L) v = fma(Vec<T>::load(p + i), Vec<T>::splat(0), v);  // 0 * Inf and 0 * NaN are NaN
  T s = v.sum();
  for (; i < n; i++) s += p[i] * T(0);
  return s == 0;
}

// cluster [N], with -1 for the pixels that have a NaN or Inf. Only clusters whose sum is not finite can own one. True: there
// are some.
template <class T, class S>
bool without_bad_pixels(const Problem& a, int64_t* cluster) {
  const Pixels& x = a.x;
  const T* sums = static_cast<const T*>(a.sums);
  constexpr int64_t block = 256;
  const int64_t blocks = divide_up(a.N, block);
  bool found = false;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1) reduction(|| : found)
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t end = min(a.N, (b + 1) * block);
    for (int64_t n = b * block; n < end;) {
      const int64_t run = x.run(n, end - n);
      const S* in = reinterpret_cast<const S*>(x.data) + x.offset(n);
      T zero[block];  // 0 where a pixel is finite, else NaN
      std::memset(zero, 0, sizeof(zero));
      if (x.sw == 1 && x.sd != 1) {
        for (int64_t d = 0; d < a.D; d++) {
          for (int64_t i = 0; i < run; i++) zero[i] += T(0) * read<T>(in + d * x.sd + i);
        }
      } else {
        for (int64_t i = 0; i < run; i++) {
          const int64_t m = a.cluster[n + i];
          if (m < 0 || finite(sums + m * a.D, a.D)) continue;
          for (int64_t d = 0; d < a.D; d++) zero[i] += T(0) * read<T>(in + i * x.sw + d * x.sd);
        }
      }
      for (int64_t i = 0; i < run; i++) {
        const bool bad = a.cluster[n + i] >= 0 && !(zero[i] == 0);
        cluster[n + i] = bad ? -1 : a.cluster[n + i];
        found = found || bad;
      }
      n += run;
    }
  }
  return found;
}

template <class T, class S>
Status sum_pixels(Problem a) {
  const auto sum = [&] {
    Status s = count(a);
    return s.ok() ? sum_all<T, S>(a) : s;
  };
  Status s = sum();
  if (!s.ok() || finite(static_cast<const T*>(a.sums), a.M * a.D)) return s;
  Scratch copy(size_t(a.N) * sizeof(int64_t));
  if (!copy.data) return {Code::out_of_memory};
  if (!without_bad_pixels<T, S>(a, copy.as<int64_t>())) return {};  // the pixels are finite, their sum overflows
  a.cluster = copy.as<int64_t>();
  return sum();
}

// <u,u> of u = g * p + c * s.
template <class P, class S>
double squared_length(const P* p, const S* s, double g, double c, int64_t D) {
  using V = Vec<double>;
  constexpr int64_t L = V::lanes;
  V total = V::splat(0);
  int64_t d = 0;
  for (; d + L <= D; d += L) {
    const V u = fma(V::splat(g), Load<double, P>::at(p + d), V::splat(c) * Load<double, S>::at(s + d));
    total = fma(u, u, total);
  }
  double sum = total.sum();
  for (; d < D; d++) {
    const double u = g * double(p[d]) + c * double(s[d]);
    sum += u * u;
  }
  return sum;
}

bool usable(double squared) { return squared > 0 && squared <= 1.7976931348623157e308; }

template <class P, class S>
Status apply(const ApplyMomentum& a) {
  const int64_t M = a.centroids.size[0], D = a.centroids.size[1];
  const double g = a.momentum;
  [[maybe_unused]] const int threads = M * D < kSerial ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t m = 0; m < M; m++) {
    if (a.counts.as<int64_t>()[m] <= 0) continue;
    P* p = a.centroids.as<P>() + m * D;
    const S* s = a.sums.as<S>() + m * D;
    const double length = squared_length(s, s, 1, 0, D);
    if (!usable(length)) continue;
    const double c = (1 - g) / std::sqrt(length), updated = squared_length(p, s, g, c, D);
    if (!usable(updated)) continue;
    const double r = 1 / std::sqrt(updated), gr = g * r, cr = c * r;
    for (int64_t d = 0; d < D; d++) p[d] = P(gr * double(p[d]) + cr * double(s[d]));
  }
  return {};
}

}  // namespace

Status cluster_sums(const ClusterSums& a) {
  const Pixels x(a.x);
  Problem p{x, a.cluster.as<int64_t>(), x.N(), x.D, a.sums.size[0], a.sums.data, a.counts.as<int64_t>(), a.threads};
  if (p.threads < 1 || p.N * p.D < kSerial) p.threads = 1;
  switch (a.x.dtype) {
    case DType::float32: return sum_pixels<float, float>(p);
    case DType::float64: return sum_pixels<double, double>(p);
    case DType::float16: return sum_pixels<float, Float16>(p);
    case DType::bfloat16: return sum_pixels<float, BFloat16>(p);
    default: return bad_argument("x must be float32, float64, float16 or bfloat16");
  }
}

Status apply_momentum(const ApplyMomentum& a) {
  const bool wide = a.centroids.dtype == DType::float64, wide_sums = a.sums.dtype == DType::float64;
  if ((!wide && a.centroids.dtype != DType::float32) || (!wide_sums && a.sums.dtype != DType::float32)) {
    return bad_argument("centroids and sums must be float32 or float64");
  }
  if (wide) return wide_sums ? apply<double, double>(a) : apply<double, float>(a);
  return wide_sums ? apply<float, double>(a) : apply<float, float>(a);
}

}  // namespace dnc::cpu::DNC_ISA
