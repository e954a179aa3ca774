// head_first_pass on the CPU: everything of a segmentation head's step that comes before clustering, in one parallel region.
//
//   e = normalize(LayerNorm(x));  s = max_k <e, p>;  lse = log sum_m exp(<e, p_m> / temperature);  logits of s (head_logits.h);
//   losses = cross-entropy of the upsampled logits;  grad = d(pull * total + contrast * sum lse) / de
//   reads x [N,D] and labels [B,H,W] once, packed sub-centroids once a tile from L2/L3; writes grad [N,D] twice (from the
//   contrast, then with the cross-entropy's part) and own similarities [N,K]. 4*N*C*K*D flop with contrast and gradient,
//   B*H*W*C exponentials: compute-bound.
// Plan: threads take runs of bands of rows (head_bands.h), and a band's embedding, scores and logits stay in their own memory,
// which lies in L2. Nothing waits: there is no barrier but the region's end. The label rows between two bands, a *seam*, need
// the logits of the last row of one band and the first of the next, and give gradients to both. Whichever band is finished
// later does them, from rows that the earlier one left (head_seams.h). Computing those rows twice instead would be an eighth of
// the scores again at 8 rows a band; bands that hand a row down would make every band wait for the one above. Deterministic:
// bands depend on sizes alone; a pixel receives its gradient in one order, its band's before its seam's; sums are kept by run
// and seam and added in order. Reference: the bands of dnc_kernels/ops/head/op.py.
#include "dnc/head.h"

#include <omp.h>

#include "dnc/embedding.h"
#include "head_bands.h"
#include "head_logits.h"
#include "head_seams.h"
#include "similarity_contrast.h"
#include "upsample_planes_unit.h"
#include "upsample_unit.h"

#if defined(DNC_ISA_AMX)  // the embedding has no product, and no copy for AMX
namespace dnc::cpu::avx512 { Status normalize_embedding(const NormalizeEmbedding&); }
namespace dnc::cpu::DNC_ISA { using avx512::normalize_embedding; }
#else
namespace dnc::cpu::DNC_ISA { Status normalize_embedding(const NormalizeEmbedding&); }
#endif

namespace dnc::cpu::DNC_ISA {

Status class_scores_backward(const ClassScoresBackward&);

namespace {

// Of HeadFirstPass::factors.
constexpr int kPull = 1, kContrast = 2, kScale = 4;
template <class T>
T factor(const HeadFirstPass& a, int which) {
  return a.factors.as<T>()[which];
}

// What all threads share.
template <class T>
struct FirstPass {
  const HeadFirstPass& a;
  const Bands bands;
  const Runs runs;
  const int64_t C, D, H, W, width;  // width: a row of classes, in whole vectors
  const bool gradient, contrast, apart, rows_layout;
  const Axis rows;
  const ContrastPlan<T> plan;
  const UpsamplePlan<T> shape;  // of a whole band: how much memory its units need
  const LossTableMemory<T> tables;
  const Scratch norms;  // [2][width] gain and shift
  const Scratch totals, norm_sums;
  LogitRows<T> logits;
  FirstError error;

  static int64_t in_vectors(int64_t n) { return (n + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes; }
  static constexpr DType dtype() { return CentroidRows<T>::own_dtype(); }
  View logits_of(const Bands& b, int64_t channels) const {
    return pixel_rows(nullptr, dtype(), 1, channels, b.rows, b.w, width);
  }

  explicit FirstPass(const HeadFirstPass& args)
      : a(args),
        bands(a.x, a.band_pixels),
        runs(bands.count),
        C(a.centroids.size[0]),
        D(a.x.size[1]),
        H(a.labels.size[1]),
        W(a.labels.size[2]),
        width(in_vectors(C)),
        gradient(a.grad),
        contrast(a.lse),
        apart(H == bands.h && W == bands.w),
        rows_layout(a.x.stride[1] == 1 && a.x.stride[3] != 1),
        rows{bands.h, H, a.align_corners},
        plan(a.centroids, bands.most_pixels(), true, contrast, gradient, 1),
        shape(logits_of(bands, C), H, W, a.align_corners, bands.h, 0, H, 0),
        tables(shape, a.class_weight, a.label_smoothing),
        norms(a.norm_weight ? 2 * width * sizeof(T) : 0),
        totals(size_t(4 * bands.count) * sizeof(double)),
        norm_sums(a.norm_weight && gradient ? size_t(4 * runs.count * width) * sizeof(T) : 0),
        logits{C,
               width,
               a.temperature,
               T(double(factor<T>(a, kScale)) / a.temperature),
               factor<T>(a, kPull),
               a.norm_weight ? norms.as<T>() : nullptr,
               norms.as<T>() + width,
               T(a.norm_eps)} {
    if (!ok()) return;
    if (a.norm_weight) {
      std::memset(norms.data, 0, size_t(2 * width) * sizeof(T));
      std::memcpy(norms.data, a.norm_weight.data, size_t(C) * sizeof(T));
      std::memcpy(norms.as<T>() + width, a.norm_bias.data, size_t(C) * sizeof(T));
    }
    std::memset(totals.data, 0, size_t(4 * bands.count) * sizeof(double));
    if (a.norm_weight && gradient) std::memset(norm_sums.data, 0, size_t(4 * runs.count * width) * sizeof(T));
  }
  bool ok() const { return plan.ok() && tables.ok() && norms.data && totals.data && norm_sums.data; }

  // Sums of a band (part 0) or of the seam below it (part 1), and of all bands or seams of a run.
  double* total(int64_t band, int part) const { return totals.as<double>() + 4 * band + 2 * part; }  // cross-entropy, scale
  LogitSums<T> sums(int64_t run, int part) const {
    if (!a.norm_weight || !gradient) return {};
    T* gain = norm_sums.as<T>() + (2 * run + part) * 2 * width;
    return {0, gain, gain + width};
  }
  // Length (standard deviation over channels) of pixel n: 1 without confidence.
  T length(int64_t n) const {
    if (!a.confidence) return 1;
    const int64_t at = a.statistics.stride[0] + n;
    return a.statistics.dtype == DType::float64 ? T(1 / a.statistics.as<double>()[at]) : T(1 / a.statistics.as<float>()[at]);
  }
  void write_grad_rstd(int64_t n, T to_length, T length) const {
    const T value = -to_length * length * length;  // d length / d rstd = -length^2
    if (a.grad_rstd.dtype == DType::float64)
      a.grad_rstd.as<double>()[n] = value;
    else
      a.grad_rstd.as<float>()[n] = float(value);
  }
};

// A thread's memory and its work on a band.
template <class T>
struct FirstPassWorker {
  const FirstPass<T>& p;
  const HeadFirstPass& a;
  const bool few;  // classes: then lanes of the upsampled loss are pixels
  const int64_t pixels, width, embedding_bytes, map_bytes, winner_bytes, contrast_bytes, loss_bytes;
  const Scratch memory;
  char* const embedding;
  T *const scores, *const logits;  // [pixels][width]; logits become their gradient
  uint8_t* const winner;           // [pixels][width]
  char *const for_contrast, *const for_loss, *const for_columns;

  static int64_t lines(size_t bytes) { return int64_t((bytes + 63) / 64 * 64); }
  explicit FirstPassWorker(const FirstPass<T>& pass)
      : p(pass),
        a(pass.a),
        few(few_classes(p.shape, FewClasses<T>::loss)),
        pixels(p.bands.most_pixels()),
        width(p.width),
        // planes a cache line longer than a power of two
        embedding_bytes(a.embedding ? 0 : lines(size_t(pixels + 32) * p.D * size_of(a.x.dtype))),
        map_bytes(lines(size_t(pixels * width) * sizeof(T))),
        winner_bytes(lines(size_t(pixels * width))),
        contrast_bytes(lines(p.plan.bytes())),
        loss_bytes(lines(few ? PlanesUnit<T>::bytes(p.tables.columns) : LossUnit<T>::bytes(p.shape))),
        memory(size_t(embedding_bytes + 2 * map_bytes + winner_bytes + contrast_bytes + loss_bytes) +
               (few ? PlaneColumns<T>::bytes(p.shape) : 0)),
        embedding(memory.as<char>()),
        scores(reinterpret_cast<T*>(embedding + embedding_bytes)),
        logits(reinterpret_cast<T*>(embedding + embedding_bytes + map_bytes)),
        winner(reinterpret_cast<uint8_t*>(embedding + embedding_bytes + 2 * map_bytes)),
        for_contrast(embedding + embedding_bytes + 2 * map_bytes + winner_bytes),
        for_loss(for_contrast + contrast_bytes),
        for_columns(for_loss + loss_bytes) {
    if (memory.data) std::memset(scores, 0, size_t(2 * map_bytes + winner_bytes));  // zero beyond the classes, and stays so
  }

  View classes(T* data, const Band& b, int64_t rows) const {
    return pixel_rows(data, p.dtype(), b.end - b.begin, p.C, rows, p.bands.w, width);
  }
  View embedding_of(const Band& b) const {
    if (a.embedding) return part_of(a.embedding, b.begin, b.end, b.top, b.bottom);
    const int64_t w = p.bands.w, each = b.rows() * w, D = p.D, plane = pixels + 32;
    const View& x = a.x;
    if (p.rows_layout) return {embedding, x.dtype, 4, {b.end - b.begin, D, b.rows(), w}, {each * D, 1, w * D, D}};
    return {embedding, x.dtype, 4, {b.end - b.begin, D, b.rows(), w}, {each, plane, w, 1}};
  }

  // Embedding, scores and contrast of a band.
  Status score(const Band& b) const {
    NormalizeEmbedding n;
    n.x = part_of(a.x, b.begin, b.end, b.top, b.bottom), n.weight = a.weight, n.bias = a.bias, n.eps = a.eps;
    n.y = embedding_of(b);
    n.mean = row_of(a.statistics, 0, b.first, b.pixels), n.rstd = row_of(a.statistics, 1, b.first, b.pixels);
    n.inverse_norm = row_of(a.statistics, 2, b.first, b.pixels);
    if (const Status s = DNC_ISA::normalize_embedding(n); !s.ok()) return s;
    SubcentroidCrossEntropy c;
    c.scores.x = n.y, c.scores.centroids = a.centroids, c.scores.labels = part_of(a.sampled, b.first, b.pixels);
    c.scores.scores = classes(scores, b, b.rows());
    c.scores.winner = pixel_rows(winner, DType::uint8, b.end - b.begin, p.C, b.rows(), p.bands.w, width);
    c.scores.own_similarity = part_of(a.own_similarity, b.first, b.pixels);
    if (p.contrast) {
      c.temperature = a.contrast_temperature, c.scale = part_of(a.factors, kContrast, 1),
      c.loss = part_of(a.lse, b.first, b.pixels);
      if (p.gradient) c.grad_x = part_of(a.grad, b.begin, b.end, b.top, b.bottom);
    }
    ContrastTiles<T> tiles(c, p.plan, for_contrast);
    for (int64_t t = 0; t < tiles.tiles; t++) tiles.run(t);
    return {};
  }

  // Cross-entropy of label rows [above,below) of a band, from logits whose first row is `top`; its gradient takes their place:
  // a unit writes that of a row when it reads the row no more.
  Status lose(const Band& b, int64_t top, int64_t rows, int64_t above, int64_t below, double* total) const {
    UpsampleCrossEntropy u;
    u.scores = classes(logits, b, rows), u.labels = part_of(a.labels, b.begin, b.end, above, below);
    u.ignore_index = a.ignored, u.label_smoothing = a.label_smoothing, u.align_corners = a.align_corners;
    if (p.gradient) u.grad_scores = u.scores;
    const UpsamplePlan<T> plan(u.scores, below - above, p.W, a.align_corners, p.bands.h, top, p.H, above);
    if (!few) return lose(b, LossUnit<T>(u, plan, p.tables.tables, for_loss), plan, rows, above, total);
    const PlaneColumns<T> columns(plan, for_columns);
    return lose(b, PlanesUnit<T>(u, columns, p.tables.tables, for_loss), plan, rows, above, total);
  }
  template <class Unit>
  Status lose(const Band& b, Unit unit, const UpsamplePlan<T>& plan, int64_t rows, int64_t above, double* total) const {
    for (int64_t i = 0; i < b.end - b.begin; i++) {
      unit.run(i, 0, rows, nullptr);
      *total += unit.sums.loss;
      if (const int64_t at = unit.sums.bad_index; at >= 0) {
        const int64_t row = at / p.W - i * plan.H, pixel = ((b.begin + i) * p.H + above + row) * p.W + at % p.W;
        return {Code::bad_label, pixel, unit.sums.bad_label, "labels must be in [0,C), ignore_index or negative"};
      }
    }
    return {};
  }

  // From the gradient of logits to that of the embedding, of rows [top,bottom) of a band: n pixels from the first of them.
  Status back(const Band& b, int64_t top, int64_t bottom, const T* from, uint8_t* winners, T* g, LogitSums<T>& sums) const {
    const int64_t first = b.first + (top - b.top) * p.bands.w, n = (b.end - b.begin) * (bottom - top) * p.bands.w;
    for (int64_t i = 0; i < n; i++) {
      const T length = p.length(first + i), to_length = p.logits.backward(from + i * width, length, g + i * width, sums);
      if (a.confidence) p.write_grad_rstd(first + i, to_length, length);
    }
    ClassScoresBackward c;
    c.x = c.grad_x = part_of(a.grad, b.begin, b.end, top, bottom), c.centroids = a.centroids;
    c.grad_scores = classes(g, b, bottom - top), c.accumulate = p.contrast;
    c.winner = pixel_rows(winners, DType::uint8, b.end - b.begin, p.C, bottom - top, p.bands.w, width);
    return DNC_ISA::class_scores_backward(c);
  }

  // Everything of a band but its seams.
  Status band(int64_t i, int64_t run, bool above, bool below) const {
    const Band b = p.bands.at(i);
    if (const Status s = score(b); !s.ok()) return s;
    for (int64_t n = 0; n < b.pixels; n++) {
      p.logits.forward(scores + n * width, p.length(b.first + n), logits + n * width);
      const bool finite = std::isfinite(scores[n * width]);  // NaN in one class is NaN in all
      a.prediction.as<int64_t>()[b.first + n] = finite ? p.logits.largest(logits + n * width) : -1;
      a.group.as<int64_t>()[b.first + n] = finite ? a.sampled.as<int64_t>()[b.first + n] : -1;
    }
    // label rows whose lower feature row is one of these but the last, which the seam has
    int64_t from = b.top, to = b.bottom;
    if (!p.apart) {
      from = b.top == 0 ? 0 : p.rows.first(b.top, 0, p.H);
      to = b.bottom == p.bands.h ? p.H : p.rows.first(b.bottom - 1, 0, p.H);
    }
    double* total = p.total(i, 0);
    if (const Status s = lose(b, b.top, b.rows(), from, to, total); !s.ok() || !p.gradient) return s;
    const int64_t top = b.top + above, bottom = b.bottom - below, skip = above * p.bands.w * width;
    if (top >= bottom) return {};
    LogitSums<T> sums = p.sums(run, 0);
    const Status s = back(b, top, bottom, scores + skip, winner + skip, logits + skip, sums);
    total[1] += sums.scale;
    return s;
  }

  // The label rows between band i and the next one, from the rows that both left in a slot.
  Status seam(int64_t i, int64_t run, bool within, const Slot<T>& slot) const {
    const Band b = p.bands.at(i);
    const int64_t w = p.bands.w, top = b.bottom - 1, first = b.first + (b.rows() - 1) * w;
    for (int64_t n = 0; n < 2 * w; n++) p.logits.forward(slot.scores + n * width, p.length(first + n), logits + n * width);
    const int64_t from = p.rows.first(top, 0, p.H), to = p.rows.first(top + 1, from, p.H);
    double* total = p.total(i, 1);
    if (const Status s = lose(b, top, 2, from, to, total); !s.ok() || !p.gradient) return s;
    for (int64_t k = 0; k < 2 * w * width; k++) slot.to_logits[k] += logits[k];
    LogitSums<T> sums = p.sums(run, within ? 0 : 1);
    const Status s = back(b, top, top + 2, slot.scores, slot.winner, slot.to_logits, sums);
    total[1] += sums.scale;
    return s;
  }

  void leave(const Slot<T>& slot, int half, int64_t row) const {
    const int64_t size = p.bands.w * width, at = row * size;
    std::memcpy(slot.scores + half * size, scores + at, size_t(size) * sizeof(T));
    std::memcpy(slot.winner + half * size, winner + at, size_t(size));
    if (p.gradient) std::memcpy(slot.to_logits + half * size, logits + at, size_t(size) * sizeof(T));
  }
};

template <class T>
Status first_pass(const HeadFirstPass& a) {
  FirstPass<T> p(a);
  if (!p.ok()) return out_of_memory();
  const int64_t N = p.bands.B * p.bands.h * p.bands.w;
  int threads = a.threads < p.runs.count ? a.threads : int(p.runs.count);
  if (threads < 1 || N * p.D < 16384) threads = 1;  // below: less work than waking a thread
  Seams<T> seams(p.apart || p.bands.per_sample < 2 ? 0 : p.bands.count, threads, p.bands.w, p.width);
  if (!seams.ok()) return out_of_memory();
#pragma omp parallel num_threads(threads)
  {
    const FirstPassWorker<T> worker(p);
    if (!worker.memory.data) p.error.report(out_of_memory(), -1);
// in order, or more seams could be open than there are places for
#pragma omp for schedule(monotonic : dynamic, 1) nowait
    for (int64_t run = 0; run < p.runs.count; run++) {
      const int64_t begin = p.runs.begin(run), end = p.runs.begin(run + 1);
      for (int64_t i = begin; i < end && !p.error.any(); i++) {
        const Band b = p.bands.at(i);
        const bool above = !p.apart && b.top > 0, below = !p.apart && b.bottom < p.bands.h;
        p.error.report(worker.band(i, run, above, below), i);
        // both rows are left before a seam overwrites the thread's gradient of logits
        Slot<T> slots[2];  // above, where this band's first row is the lower half, and below
        const bool has[2] = {above, below};
        for (int side = 0; side < 2 && !p.error.any(); side++) {
          if (!has[side]) continue;
          if (seams.slot(i - 1 + side, &slots[side]))
            worker.leave(slots[side], 1 - side, side == 0 ? 0 : b.rows() - 1);
          else
            p.error.report(out_of_memory(), i);
        }
        for (int side = 0; side < 2 && !p.error.any(); side++) {
          const int64_t seam = i - 1 + side;
          if (!has[side] || !seams.second(seam)) continue;
          p.error.report(worker.seam(seam, seam >= begin ? run : run - 1, seam >= begin && seam + 1 < end, slots[side]), i);
          seams.give_back(seam);
        }
      }
    }
  }
  if (p.error.any()) return p.error.status();

  double total = 0, scale = 0;
  for (int64_t i = 0; i < 2 * p.bands.count; i++) total += p.total(i / 2, i % 2)[0], scale += p.total(i / 2, i % 2)[1];
  a.losses.as<double>()[0] = total, a.losses.as<double>()[1] = 0;
  if (a.grad_scale.numel() > 0) a.grad_scale.as<T>()[0] = T(scale * double(factor<T>(a, kScale)));  // that of its logarithm
  for (int part = 0; part < 2 && a.grad_norm.numel() > 0; part++)
    for (int64_t c = 0; c < p.C; c++) {
      double sum = 0;
      for (int64_t i = 0; a.norm_weight && p.gradient && i < 2 * p.runs.count; i++) {
        const LogitSums<T> s = p.sums(i / 2, i % 2);
        sum += double((part == 0 ? s.gain : s.shift)[c]);
      }
      a.grad_norm.as<T>()[part * p.C + c] = T(sum);
    }
  return {};
}

}  // namespace

Status head_first_pass(const HeadFirstPass& a) {
  if (a.grad && a.grad.dtype != a.x.dtype) return bad_argument("grad must have the dtype of x");
  return with_compute_type(a.own_similarity.dtype == DType::float64, [&](auto type) { return first_pass<decltype(type)>(a); });
}

}  // namespace dnc::cpu::DNC_ISA
