// The library without Python: every op family on small float32 arrays against loops in double, with each instruction set, and
// from eight threads at a time.
// Also the example of how a C++ program calls it: fill an argument struct with views, look at the Status.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <thread>
#include <vector>

#include "dnc/common.h"
#include "dnc/embedding.h"
#include "dnc/momentum.h"
#include "dnc/similarity.h"
#include "dnc/sinkhorn.h"
#include "dnc/upsample.h"

namespace {

constexpr int64_t N = 203, C = 7, K = 3, D = 37, M = C * K;
std::atomic<int> failures = 0;

dnc::View view(void* data, dnc::DType dtype, std::initializer_list<int64_t> size) {
  dnc::View v;
  v.data = data;
  v.dtype = dtype;
  for (int64_t s : size) v.size[v.ndim++] = s;
  int64_t stride = 1;
  for (int i = v.ndim - 1; i >= 0; i--) v.stride[i] = stride, stride *= v.size[i];
  return v;
}
dnc::View view(std::vector<float>& a, std::initializer_list<int64_t> size) { return view(a.data(), dnc::DType::float32, size); }
dnc::View view(std::vector<int64_t>& a, std::initializer_list<int64_t> size) { return view(a.data(), dnc::DType::int64, size); }

void check(const char* what, dnc::Status s) {
  if (s.ok()) return;
  std::printf("FAIL %s: %s\n", what, s.what);
  failures++;
}
// Passes below `bound`, which callers derive from the number of rounded terms; NaN fails.
void check(const char* what, double error, double bound) {
  if (error <= bound) return;
  std::printf("FAIL %s: error %g > %g\n", what, error, bound);
  failures++;
}

// worst = max(worst, error), where a NaN is the worst error of all (std::fmax would drop it).
void grow(double& worst, double error) {
  if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
}

std::vector<float> random(int64_t n, uint32_t seed) {
  std::vector<float> a(n);
  for (float& f : a) {
    seed = seed * 1664525u + 1013904223u;
    f = float(seed >> 8) / float(1 << 23) - 1;
  }
  return a;
}

double dot(const float* a, const float* b) {
  double s = 0;
  for (int64_t d = 0; d < D; d++) s += double(a[d]) * b[d];
  return s;
}

// 37 products below 1, each rounded to 2^-24, and their sums.
constexpr double kDotBound = 37 * 37 * 6e-8;

void test_similarity(std::vector<float>& x, std::vector<float>& p) {
  std::vector<float> scores(N * C), score(N);
  std::vector<uint8_t> winner(N * C);
  std::vector<int64_t> label(N), sub(N);
  check("class_scores", dnc::class_scores({.x = view(x, {N, D}),
                                           .centroids = view(p, {C, K, D}),
                                           .scores = view(scores, {N, C}),
                                           .winner = view(winner.data(), dnc::DType::uint8, {N, C})}));
  check("nearest_centroid", dnc::nearest_centroid({.x = view(x, {N, D}),
                                                   .centroids = view(p, {C, K, D}),
                                                   .label = view(label, {N}),
                                                   .sub = view(sub, {N}),
                                                   .score = view(score, {N})}));
  double error = 0, lost = 0, nearest = 0;
  for (int64_t n = 0; n < N; n++) {
    double best = -INFINITY;
    for (int64_t c = 0; c < C; c++) {
      double max = -INFINITY;
      for (int64_t k = 0; k < K; k++) max = std::fmax(max, dot(&x[n * D], &p[(c * K + k) * D]));
      grow(error, std::fabs(scores[n * C + c] - max));
      const int64_t won = winner[n * C + c];
      grow(lost, won < K ? max - dot(&x[n * D], &p[(c * K + won) * D]) : INFINITY);
      best = std::fmax(best, max);
    }
    const bool in_range = label[n] >= 0 && label[n] < C && sub[n] >= 0 && sub[n] < K;
    grow(nearest, in_range ? best - dot(&x[n * D], &p[(label[n] * K + sub[n]) * D]) : INFINITY);
    grow(nearest, std::fabs(score[n] - best));
  }
  check("class_scores: scores", error, kDotBound);
  check("class_scores: winner", lost, kDotBound);
  check("nearest_centroid", nearest, kDotBound);
}

void test_cross_entropy(std::vector<float>& x, std::vector<float>& p, std::vector<int64_t>& labels) {
  std::vector<float> loss(1);
  check("centroid_cross_entropy", dnc::centroid_cross_entropy({.x = view(x, {N, D}),
                                                               .centroids = view(p, {C, K, D}),
                                                               .labels = view(labels, {N}),
                                                               .temperature = 0.5,
                                                               .loss = view(loss, {1})}));
  double expected = 0;
  for (int64_t n = 0; n < N; n++) {
    double sum = 0, own = 0;
    for (int64_t c = 0; c < C; c++) {
      double max = -INFINITY;
      for (int64_t k = 0; k < K; k++) max = std::fmax(max, dot(&x[n * D], &p[(c * K + k) * D]));
      sum += std::exp(max / 0.5);
      if (c == labels[n]) own = max / 0.5;
    }
    expected += (std::log(sum) - own) / N;
  }
  check("centroid_cross_entropy: loss", std::fabs(loss[0] - expected), 4 * kDotBound);
  std::vector<int64_t> bad = labels;
  bad[5] = C;
  const dnc::Status s = dnc::centroid_cross_entropy(
      {.x = view(x, {N, D}), .centroids = view(p, {C, K, D}), .labels = view(bad, {N}), .loss = view(loss, {1})});
  check("centroid_cross_entropy: a label outside the classes is reported",
        s.code == dnc::Code::bad_label && s.index == 5 && s.value == C ? 0 : 1, 0);
}

void test_sinkhorn(std::vector<float>& x, std::vector<float>& p) {
  std::vector<float> similarity(N * K), plan(N * K);
  std::vector<int64_t> assignment(N);
  for (int64_t n = 0; n < N; n++)
    for (int64_t k = 0; k < K; k++) similarity[n * K + k] = float(0.1 * dot(&x[n * D], &p[k * D]));
  check(
      "sinkhorn",
      dnc::sinkhorn({.similarity = view(similarity, {N, K}), .assignment = view(assignment, {N}), .plan = view(plan, {N, K})}));
  std::vector<double> u(K), v(N);
  for (int step = 0; step < 3; step++) {
    for (int64_t k = 0; k < K; k++) {
      double sum = 0;
      for (int64_t n = 0; n < N; n++) sum += std::exp(similarity[n * K + k] / 0.05 + v[n]);
      u[k] = -std::log(double(K)) - std::log(sum);
    }
    for (int64_t n = 0; n < N; n++) {
      double sum = 0;
      for (int64_t k = 0; k < K; k++) sum += std::exp(similarity[n * K + k] / 0.05 + u[k]);
      v[n] = -std::log(double(N)) - std::log(sum);
    }
  }
  double error = 0, wrong = 0;
  for (int64_t n = 0; n < N; n++) {
    for (int64_t k = 0; k < K; k++) {
      const double expected = N * std::exp(similarity[n * K + k] / 0.05 + u[k] + v[n]);
      grow(error, std::fabs(plan[n * K + k] - expected));
      wrong += assignment[n] < 0 || assignment[n] >= K || plan[n * K + k] > plan[n * K + assignment[n]] + 1e-5f;
    }
  }
  check("sinkhorn: plan", error, 2e-5);  // s / epsilon reaches 20, so its rounding alone is 20 * 2^-24 in the exponent
  check("sinkhorn: assignment", wrong, 0);
}

void test_momentum(std::vector<float>& x, std::vector<float> p, std::vector<int64_t> cluster) {
  cluster[3] = -1;
  std::vector<float> sums(M * D);
  std::vector<int64_t> counts(M);
  check("cluster_sums",
        dnc::cluster_sums(
            {.x = view(x, {N, D}), .cluster = view(cluster, {N}), .sums = view(sums, {M, D}), .counts = view(counts, {M})}));
  std::vector<double> expected(M * D);
  std::vector<int64_t> count(M);
  for (int64_t n = 0; n < N; n++) {
    if (cluster[n] < 0) continue;
    count[cluster[n]]++;
    for (int64_t d = 0; d < D; d++) expected[cluster[n] * D + d] += x[n * D + d];
  }
  double error = 0;
  for (int64_t i = 0; i < M * D; i++) grow(error, std::fabs(sums[i] - expected[i]));
  check("cluster_sums: sums", error, N * 6e-8 * N);
  check("cluster_sums: counts", counts == count ? 0 : 1, 0);

  std::vector<float> updated = p;
  check("apply_momentum",
        dnc::apply_momentum(
            {.centroids = view(updated, {M, D}), .sums = view(sums, {M, D}), .counts = view(counts, {M}), .momentum = 0.9}));
  error = 0;
  for (int64_t m = 0; m < M; m++) {
    double length = 0, norm = 0;
    for (int64_t d = 0; d < D; d++) length += expected[m * D + d] * expected[m * D + d];
    std::vector<double> q(D);
    for (int64_t d = 0; d < D; d++) {
      q[d] = 0.9 * p[m * D + d] + 0.1 * expected[m * D + d] / std::sqrt(length);
      norm += q[d] * q[d];
    }
    for (int64_t d = 0; d < D; d++) {
      const double want = count[m] ? q[d] / std::sqrt(norm) : p[m * D + d];
      grow(error, std::fabs(updated[m * D + d] - want));
    }
  }
  check("apply_momentum", error, 2e-6);
}

void test_embedding(std::vector<float>& x) {
  std::vector<float> y(N * D), mean(N), rstd(N), inverse_norm(N);
  check("normalize_embedding", dnc::normalize_embedding({.x = view(x, {N, D}),
                                                         .y = view(y, {N, D}),
                                                         .mean = view(mean, {N}),
                                                         .rstd = view(rstd, {N}),
                                                         .inverse_norm = view(inverse_norm, {N})}));
  double error = 0;
  for (int64_t n = 0; n < N; n++) {
    double average = 0, variance = 0;
    for (int64_t d = 0; d < D; d++) average += double(x[n * D + d]) / D;
    for (int64_t d = 0; d < D; d++) variance += (x[n * D + d] - average) * (x[n * D + d] - average) / D;
    // |z|^2 = D * variance / (variance + eps), so eps cancels
    for (int64_t d = 0; d < D; d++) grow(error, std::fabs(y[n * D + d] - (x[n * D + d] - average) / std::sqrt(variance * D)));
  }
  check("normalize_embedding", error, 2e-6);
}

// 5 x 6 scores of C classes under 11 x 9 labels.
void test_upsample(std::vector<float>& x, std::vector<int64_t>& labels) {
  constexpr int64_t h = 5, w = 6, H = 11, W = 9;
  std::vector<float> scores(x.begin(), x.begin() + C * h * w), grad(C * h * w);
  std::vector<int64_t> y(labels.begin(), labels.begin() + H * W), label(H * W);
  std::vector<double> sums(2), expected_grad(C * h * w);
  y[7] = -100;
  dnc::UpsampleCrossEntropy a{.scores = view(scores, {1, C, h, w}), .labels = view(y, {1, H, W})};
  a.sums = view(sums.data(), dnc::DType::float64, {2});
  a.grad_scores = view(grad, {1, C, h, w});
  check("upsample_cross_entropy", dnc::upsample_cross_entropy(a));
  check("upsample_argmax", dnc::upsample_argmax({.scores = a.scores, .label = view(label, {1, H, W})}));
  const auto position = [](int64_t i, int64_t source, int64_t target) {
    return std::fmax((double(i) + 0.5) * double(source) / double(target) - 0.5, 0.0);
  };
  double loss = 0, lost = 0, error = 0;
  for (int64_t i = 0; i < H; i++)
    for (int64_t j = 0; j < W; j++) {
      const double at_y = position(i, h, H), at_x = position(j, w, W);
      double u[C], sum = 0, most = -INFINITY, share[4];
      int64_t corner[4];
      for (int k = 0; k < 4; k++) {
        const int64_t r = int64_t(at_y), q = int64_t(at_x), r1 = r + 1 < h ? r + 1 : r, q1 = q + 1 < w ? q + 1 : q;
        corner[k] = (k / 2 ? r1 : r) * w + (k % 2 ? q1 : q);
        share[k] = (k / 2 ? at_y - double(r) : 1 - at_y + double(r)) * (k % 2 ? at_x - double(q) : 1 - at_x + double(q));
      }
      for (int64_t c = 0; c < C; c++) {
        u[c] = 0;
        for (int k = 0; k < 4; k++) u[c] += share[k] * scores[c * h * w + corner[k]];
        sum += std::exp(u[c]), most = std::fmax(most, u[c]);
      }
      const int64_t chosen = label[i * W + j], own = y[i * W + j];
      grow(lost, chosen >= 0 && chosen < C ? most - u[chosen] : INFINITY);
      if (own < 0) continue;
      loss += std::log(sum) - u[own];
      for (int64_t c = 0; c < C; c++)
        for (int k = 0; k < 4; k++) expected_grad[c * h * w + corner[k]] += share[k] * (std::exp(u[c]) / sum - (c == own));
    }
  for (int64_t i = 0; i < C * h * w; i++) grow(error, std::fabs(grad[i] - expected_grad[i]));
  check("upsample_cross_entropy: loss", std::fabs(sums[0] - loss), H * W * 1e-6);
  check("upsample_cross_entropy: pixels", std::fabs(sums[1] - (H * W - 1)), 0);
  check("upsample_cross_entropy: gradient", error, 4e-6);
  check("upsample_argmax", lost, 1e-6);
  y[5] = C;
  const dnc::Status bad = dnc::upsample_cross_entropy(a);
  check("upsample_cross_entropy: bad label", bad.code == dnc::Code::bad_label && bad.index == 5 && bad.value == C ? 0 : 1, 0);
}

// What ops of every family make of the same inputs, which they only read.
std::vector<std::vector<float>> results(std::vector<float>& x, std::vector<float>& p, std::vector<int64_t>& labels,
                                        std::vector<int64_t>& cluster) {
  constexpr int64_t h = 5, w = 6, H = 11, W = 9;
  constexpr int threads = 2;  // each call has a team of its own
  std::vector<float> scores(N * C), loss(1), grad_x(N * D), grad_p(M * D), plan(N * K), sums(M * D), y(N * D), mean(N), rstd(N),
      inverse_norm(N), grad_scores(C * h * w);
  std::vector<int64_t> counts(M);
  std::vector<double> total(2);
  check("class_scores",
        dnc::class_scores(
            {.x = view(x, {N, D}), .centroids = view(p, {C, K, D}), .scores = view(scores, {N, C}), .threads = threads}));
  check("centroid_cross_entropy", dnc::centroid_cross_entropy({.x = view(x, {N, D}),
                                                               .centroids = view(p, {C, K, D}),
                                                               .labels = view(labels, {N}),
                                                               .loss = view(loss, {1}),
                                                               .grad_x = view(grad_x, {N, D}),
                                                               .grad_centroids = view(grad_p, {C, K, D}),
                                                               .threads = threads}));
  check("sinkhorn", dnc::sinkhorn({.similarity = view(x, {N, K}), .plan = view(plan, {N, K}), .threads = threads}));
  check("cluster_sums", dnc::cluster_sums({.x = view(x, {N, D}),
                                           .cluster = view(cluster, {N}),
                                           .sums = view(sums, {M, D}),
                                           .counts = view(counts, {M}),
                                           .threads = threads}));
  std::vector<float> updated = p;
  counts.assign(M, 1);
  check("apply_momentum", dnc::apply_momentum({.centroids = view(updated, {M, D}),
                                               .sums = view(x, {M, D}),
                                               .counts = view(counts, {M}),
                                               .momentum = 0.9,
                                               .threads = threads}));
  check("normalize_embedding", dnc::normalize_embedding({.x = view(x, {N, D}),
                                                         .y = view(y, {N, D}),
                                                         .mean = view(mean, {N}),
                                                         .rstd = view(rstd, {N}),
                                                         .inverse_norm = view(inverse_norm, {N}),
                                                         .threads = threads}));
  check("upsample_cross_entropy", dnc::upsample_cross_entropy({.scores = view(x, {1, C, h, w}),
                                                               .labels = view(labels, {1, H, W}),
                                                               .sums = view(total.data(), dnc::DType::float64, {2}),
                                                               .grad_scores = view(grad_scores, {1, C, h, w}),
                                                               .threads = threads}));
  return {scores, loss, grad_x, grad_p, plan, sums, updated, y, grad_scores};
}

// Eight threads run ops while a ninth changes the instruction set under them: each call's result is, bit for bit, that of the
// set it began with.
void test_threads(std::vector<float>& x, std::vector<float>& p, std::vector<int64_t>& labels, std::vector<int64_t>& cluster) {
  std::vector<dnc::Isa> isas;
  std::vector<std::vector<std::vector<float>>> expected;
  for (dnc::Isa isa : {dnc::Isa::portable, dnc::Isa::avx2, dnc::Isa::avx512, dnc::Isa::amx}) {
    if (!dnc::set_isa(isa)) continue;
    isas.push_back(isa);
    expected.push_back(results(x, p, labels, cluster));
  }
  std::atomic<int> running = 8, wrong = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; t++) {
    threads.emplace_back([&] {
      for (int i = 0; i < 20; i++) {
        const auto got = results(x, p, labels, cluster);
        for (size_t op = 0; op < got.size(); op++) {
          wrong += std::none_of(expected.begin(), expected.end(), [&](const auto& e) { return e[op] == got[op]; });
        }
      }
      running--;
    });
  }
  for (size_t i = 0; running > 0; i++) {
    dnc::set_isa(isas[i % isas.size()]);
    std::this_thread::yield();
  }
  for (std::thread& thread : threads) thread.join();
  check("eight threads: results of another instruction set", wrong, 0);
}

}  // namespace

int main() {
  std::vector<float> x = random(N * D, 1), p = random(M * D, 2);
  std::vector<int64_t> labels(N), cluster(N);
  for (int64_t n = 0; n < N; n++) labels[n] = n * 5 % C, cluster[n] = n * 11 % (M - 1);  // the last sub-centroid stays empty
  int tested = 0;
  for (dnc::Isa isa : {dnc::Isa::portable, dnc::Isa::avx2, dnc::Isa::avx512, dnc::Isa::amx}) {
    if (!dnc::set_isa(isa)) continue;
    const int before = failures;
    test_similarity(x, p);
    test_cross_entropy(x, p, labels);
    test_sinkhorn(x, p);
    test_momentum(x, p, cluster);
    test_embedding(x);
    test_upsample(x, labels);
    std::printf("instruction set %d: %s\n", int(isa), failures == before ? "ok" : "failed");
    tested++;
  }
  test_threads(x, p, labels, cluster);
  return failures == 0 && tested > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
