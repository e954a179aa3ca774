// label_figures on the CPU: how many labels count, of each class or of all; what labels there are; and those of the features.
//
//   counts[c] = |{n: labels[n] = c, c in [0,C), c != ignored}|;  small[y,x] = labels[place(y), place(x)], or -1
//   reads labels [B,H,W] once: bound by memory. One parallel region over rows, or none where that is quicker.
// Deterministic: labels are counted as integers, in any order. Reference: `head_labels` of dnc_kernels/ops/head/reference.py.
#include <omp.h>

#include "dnc/head.h"
#include "simd.h"

namespace dnc::cpu::DNC_ISA {
namespace {

// Labels below which one thread does it, in a third of a millisecond: threads may wait longer for each other.
constexpr int64_t kSerial = 1 << 20;
constexpr int kCopies = 4;  // of the counts: neighbours share a class, and an increment waits for the one before

template <class I>
int64_t count_kept(const I* row, int64_t n, int64_t step, int64_t ignored, int64_t classes) {
  int64_t kept = 0;
  if (step == 1)
    for (int64_t j = 0; j < n; j++) kept += (row[j] >= 0) & (int64_t(row[j]) < classes) & (int64_t(row[j]) != ignored);
  else
    for (int64_t j = 0; j < n; j++) {
      const int64_t y = row[j * step];
      kept += (y >= 0) & (y < classes) & (y != ignored);
    }
  return kept;
}

// What labels there are.
struct Range {
  int64_t least = INT64_MAX, most = INT64_MIN, wrong = 0;

  template <class I>
  void add(const I* row, int64_t n, int64_t step, int64_t ignored, int64_t classes) {
    if (n == 0) return;
    I low = row[0], high = row[0];
    if (step == 1)
      for (int64_t j = 1; j < n; j++) low = row[j] < low ? row[j] : low, high = row[j] > high ? row[j] : high;
    else
      for (int64_t j = 1; j < n; j++) {
        const I y = row[j * step];
        low = y < low ? y : low, high = y > high ? y : high;
      }
    least = low < least ? low : least, most = high > most ? high : most;
    if (int64_t(high) >= classes)
      for (int64_t j = 0; j < n; j++) {
        const int64_t y = row[j * step];
        wrong += (y >= classes) & (y != ignored);
      }
  }
};
#pragma omp declare reduction(join:Range : omp_out = Range{omp_in.least < omp_out.least ? omp_in.least : omp_out.least, \
                                                               omp_in.most > omp_out.most ? omp_in.most : omp_out.most, \
                                                               omp_in.wrong + omp_out.wrong}) initializer(omp_priv = Range{})

// The label of each feature along an axis, in float32 as torch finds it: integers pick other labels at some sizes, as 2 to 82.
DNC_INLINE int64_t place(int64_t target, int64_t source, int64_t targets, bool middle) {
  const float scale = float(source) / float(targets);
  const int64_t at = int64_t((float(target) + (middle ? 0.5f : 0.0f)) * scale);
  return at < source ? at : source - 1;
}

template <class I>
Status weigh(const LabelFigures& a) {
  const int64_t H = a.labels.size[1], W = a.labels.size[2], rows = a.labels.size[0] * H, C = a.classes;
  const int64_t h = a.small ? a.small.size[1] : 0, w = a.small ? a.small.size[2] : 0, small_rows = a.labels.size[0] * h;
  const int threads = rows * W < kSerial || a.threads < 1 ? 1 : int(a.threads < rows ? a.threads : rows);
  const int64_t size = a.weighted && a.counts ? C : 0, each = kCopies * (size + (a.small ? C : 0));  // counts of a thread
  const Scratch memory(size_t(threads * each) * sizeof(int64_t)), columns(size_t(w) * sizeof(int64_t));
  if (!memory.data || !columns.data) return {Code::out_of_memory, 0, 0, "not enough memory"};
  std::memset(memory.data, 0, size_t(threads * each) * sizeof(int64_t));
  for (int64_t x = 0; x < w; x++) columns.as<int64_t>()[x] = place(x, W, w, a.middle) * a.labels.stride[2];
  auto row_of = [&](int64_t b, int64_t y) { return a.labels.as<I>() + b * a.labels.stride[0] + y * a.labels.stride[1]; };
  auto counts = [&](int64_t y) { return y >= 0 && y < C && y != a.ignored; };
  int64_t kept = 0;
  Range range;
#pragma omp parallel num_threads(threads) reduction(+ : kept) reduction(join : range)
  {
    int64_t *const large = memory.as<int64_t>() + omp_get_thread_num() * each, *const small = large + kCopies * size;
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < rows; r++) {
      const I* row = row_of(r / H, r % H);
      if (a.range) range.add(row, W, a.labels.stride[2], a.ignored, C);
      if (!a.counts) continue;
      if (!a.weighted) {
        kept += count_kept(row, W, a.labels.stride[2], a.ignored, C);
        continue;
      }
      for (int64_t j = 0; j < W; j++)
        if (const int64_t y = row[j * a.labels.stride[2]]; counts(y)) large[j % kCopies * size + y]++;
    }
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < small_rows; r++) {
      const I* row = row_of(r / h, place(r % h, H, h, a.middle));
      int64_t* out = a.small.as<int64_t>() + r * w;
      for (int64_t x = 0; x < w; x++) {
        const int64_t y = row[columns.as<int64_t>()[x]];
        out[x] = counts(y) ? y : -1;
        if (counts(y)) small[x % kCopies * C + y]++;
      }
    }
  }
  if (a.range) {
    const bool any = rows * W > 0;
    int64_t* out = a.range.as<int64_t>();
    out[0] = any ? range.least : 0, out[1] = any ? range.most : 0, out[2] = range.wrong;
  }
  auto total = [&](int64_t c, int64_t first, int64_t classes) {
    int64_t count = 0;
    for (int64_t i = 0; i < threads * kCopies && classes > 0; i++)
      count += memory.as<int64_t>()[i / kCopies * each + first + i % kCopies * classes + c];
    return int32_t(count);
  };
  for (int64_t c = 0; c < C; c++) {
    if (a.counts) a.counts.as<int32_t>()[c] = a.weighted ? total(c, 0, size) : c == 0 ? int32_t(kept) : 0;
    if (a.small) a.small_counts.as<int32_t>()[c] = total(c, kCopies * size, C);
  }
  return {};
}

}  // namespace

Status label_figures(const LabelFigures& a) {
  switch (a.labels.dtype) {
    case DType::int64: return weigh<int64_t>(a);
    case DType::int32: return weigh<int32_t>(a);
    case DType::uint8: return weigh<uint8_t>(a);
    default: return bad_argument("labels must be int64, int32 or uint8");
  }
}

}  // namespace dnc::cpu::DNC_ISA
