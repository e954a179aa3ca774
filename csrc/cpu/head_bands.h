// How a head's feature map is cut into bands of rows and runs of bands, views of a band, and who met an error first.
#pragma once
#include <omp.h>

#include "dnc/common.h"
#include "simd.h"

namespace dnc::cpu::DNC_ISA {
namespace {

// Rows [top,bottom) of samples [begin,end): pixels [first, first + pixels) of all. More than one sample: all of their rows.
struct Band {
  int64_t begin, end, top, bottom, first, pixels;
  int64_t rows() const { return bottom - top; }
};

// Bands depend on sizes and `band_pixels` alone, never on the threads. One has two rows at least, except the last of a map: a
// row then meets one neighbouring band at most.
struct Bands {
  int64_t B, h, w, rows, samples, per_sample, count;
  Bands(const View& x, int64_t pixels) : B(x.size[0]), h(x.size[2]), w(x.size[3]) {
    const int64_t wanted = pixels / (w > 0 ? w : 1);
    rows = wanted < 2 ? 2 : wanted;
    samples = 1;
    if (rows >= h) {
      rows = h;
      samples = h * w > 0 && pixels > h * w ? pixels / (h * w) : 1;
    }
    per_sample = rows > 0 ? (h + rows - 1) / rows : 0;
    count = w > 0 ? (B + samples - 1) / samples * per_sample : 0;
  }
  int64_t most_pixels() const { return (samples < B ? samples : B) * rows * w; }
  Band at(int64_t i) const {
    Band b;
    b.begin = i / per_sample * samples, b.end = b.begin + samples < B ? b.begin + samples : B;
    b.top = i % per_sample * rows, b.bottom = b.top + rows < h ? b.top + rows : h;
    b.first = (b.begin * h + b.top) * w, b.pixels = (b.end - b.begin) * b.rows() * w;
    return b;
  }
};

// Bands in runs, which threads take whole: sums over pixels are kept for a run, in the order of its bands.
struct Runs {
  static constexpr int64_t kMost = 512;
  int64_t bands, count;
  explicit Runs(int64_t all) : bands(all), count(all < kMost ? all : kMost) {}
  int64_t begin(int64_t run) const { return run * bands / count; }
};

constexpr int64_t size_of(DType t) {
  return t == DType::float64 || t == DType::int64   ? 8
         : t == DType::float32 || t == DType::int32 ? 4
         : t == DType::uint8                        ? 1
                                                    : 2;
}

// Samples [begin,end), rows [top,bottom) of maps [B,D,h,w], or labels [B,H,W].
inline View part_of(View v, int64_t begin, int64_t end, int64_t top, int64_t bottom) {
  const int row = v.ndim - 2;
  v.data = static_cast<char*>(v.data) + (begin * v.stride[0] + top * v.stride[row]) * size_of(v.dtype);
  v.size[0] = end - begin, v.size[row] = bottom - top;
  return v;
}
// Elements [first, first + n) of the first dimension.
inline View part_of(View v, int64_t first, int64_t n) {
  v.data = static_cast<char*>(v.data) + first * v.stride[0] * size_of(v.dtype);
  v.size[0] = n;
  return v;
}
// Pixels [first, first + n) of row i of [rows,N].
inline View row_of(const View& v, int64_t i, int64_t first, int64_t n) {
  View r;
  r.data = static_cast<char*>(v.data) + (i * v.stride[0] + first * v.stride[1]) * size_of(v.dtype);
  r.dtype = v.dtype, r.ndim = 1, r.size[0] = n, r.stride[0] = v.stride[1];
  return r;
}
// A map [samples,channels,rows,w] whose pixels lie `width` elements apart, channels side by side.
inline View pixel_rows(void* data, DType dtype, int64_t samples, int64_t channels, int64_t rows, int64_t w, int64_t width) {
  return {data, dtype, 4, {samples, channels, rows, w}, {rows * w * width, 1, w * width, width}};
}

// The error of the lowest band that met one.
class FirstError {
 public:
  FirstError() { omp_init_lock(&lock_); }
  ~FirstError() { omp_destroy_lock(&lock_); }
  FirstError(const FirstError&) = delete;
  FirstError& operator=(const FirstError&) = delete;
  bool any() const { return __atomic_load_n(&found_, __ATOMIC_RELAXED); }
  void report(const Status& s, int64_t band) {
    if (s.ok()) return;
    omp_set_lock(&lock_);
    if (!found_ || band < band_) status_ = s, band_ = band;
    __atomic_store_n(&found_, true, __ATOMIC_RELAXED);
    omp_unset_lock(&lock_);
  }
  Status status() const { return status_; }

 private:
  omp_lock_t lock_;
  bool found_ = false;
  int64_t band_ = 0;
  Status status_;
};

}  // namespace
}  // namespace dnc::cpu::DNC_ISA
