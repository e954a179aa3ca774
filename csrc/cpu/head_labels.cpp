// label_figures on the CPU: how many labels count, of each class or of all; least and largest label.
//
//   counts[c] = |{n: labels[n] = c, c in [0,C), c != ignored}|
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

template <class I>
void widen(const I* row, int64_t n, int64_t step, int64_t* least, int64_t* most) {
  if (n == 0) return;
  I low = row[0], high = row[0];
  if (step == 1)
    for (int64_t j = 1; j < n; j++) low = row[j] < low ? row[j] : low, high = row[j] > high ? row[j] : high;
  else
    for (int64_t j = 1; j < n; j++) {
      const I y = row[j * step];
      low = y < low ? y : low, high = y > high ? y : high;
    }
  *least = low < *least ? low : *least, *most = high > *most ? high : *most;
}

template <class I>
Status weigh(const LabelFigures& a) {
  const int64_t rows = a.labels.size[0] * a.labels.size[1], H = a.labels.size[1], W = a.labels.size[2], C = a.classes;
  const int threads = rows * W < kSerial || a.threads < 1 ? 1 : int(a.threads < rows ? a.threads : rows);
  const int64_t size = a.weighted ? C : 0;
  Scratch memory(size_t((threads * kCopies * size)) * sizeof(int64_t));
  if (!memory.data) return {Code::out_of_memory, 0, 0, "not enough memory"};
  std::memset(memory.data, 0, size_t(threads * kCopies * size) * sizeof(int64_t));
  int64_t kept = 0, least = INT64_MAX, most = INT64_MIN;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : kept) reduction(min : least) reduction(max : most)
  for (int64_t r = 0; r < rows; r++) {
    const I* row = a.labels.as<I>() + r / H * a.labels.stride[0] + r % H * a.labels.stride[1];
    if (a.range) widen(row, W, a.labels.stride[2], &least, &most);
    if (!a.counts) continue;
    if (!a.weighted) {
      kept += count_kept(row, W, a.labels.stride[2], a.ignored, C);
      continue;
    }
    int64_t* counts = memory.as<int64_t>() + omp_get_thread_num() * kCopies * size;
    for (int64_t j = 0; j < W; j++)
      if (const int64_t y = row[j * a.labels.stride[2]]; y >= 0 && y < C && y != a.ignored) counts[j % kCopies * size + y]++;
  }
  if (a.range) {
    const bool any = rows * W > 0;
    a.range.as<int64_t>()[0] = any ? least : 0, a.range.as<int64_t>()[1] = any ? most : 0;
  }
  if (!a.counts) return {};
  for (int64_t c = 0; c < C; c++) {
    int64_t count = c == 0 ? kept : 0;
    for (int64_t t = 0; t < threads * kCopies && size > 0; t++) count += memory.as<int64_t>()[t * size + c];
    a.counts.as<int32_t>()[c] = int32_t(count);
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
