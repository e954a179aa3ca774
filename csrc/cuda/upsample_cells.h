// Where target pixels lie between source pixels: what the upsample kernels are built on. The same as in
// dnc_kernels/ops/upsample/triton_cells.py.
//
// A cell is the square between source pixels (r,x) and (r+1,x+1); its target pixels are those interpolated from these four
// corners. Cell -1 lies before the first source pixel, where positions are clamped to it. A thread owns a cell: it loads the
// four corners of a class and makes the K x K target pixels of the cell from them, in registers. A cell of more than 4 x 4
// target pixels is cut into parts. Where a map shrinks, most cells have no target pixel and their threads nothing to do.
//
// Positions are ratios of integers, so that no rounding moves a pixel to another cell. Target pixels of a cell are equally far
// apart, and a bilinear function is linear along each axis: the exponentials of a class at these pixels are four exponentials
// and their products, exp(u(kx,ky)) = first * right^kx * (down * both^kx)^ky. This holds its precision while the corners are
// less than kSteep apart; steeper cells take an exponential a pixel.
#pragma once
#include "common.h"
#include "dnc/upsample.h"

namespace dnc {
namespace cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// A score of -inf counts as this, one of inf as the other where that is needed: their differences are finite.
constexpr float kLowest = -2e38f, kHighest = 1e38f;
// Differences of a class between corners up to which its exponentials are products. Then the pixels of a cell are within
// 3 * 12 nats of each other (5.25 * 12 with those beyond the end of a cell, which are computed and not used: 2^91).
constexpr float kSteep = 12.f;

// One dimension. Target pixel i of the whole map lies at (step * i + base) / unit source pixels.
struct Axis {
  int64_t step, base, unit;
  int last;              // last source pixel of the whole map
  int source0, sources;  // source pixels at hand
  int target0, targets;  // likewise
  int cell0, cells;      // first cell with a target pixel at hand, cells from there to the last one
  int pixels, parts;     // target pixels of a part of a cell, parts of a cell
  float stride;          // source pixels between two target pixels; 0 where a part has one pixel
  bool wide;             // numerators do not fit 32 bits
};

inline int64_t bytes_of(DType d) {
  switch (d) {
    case DType::float64:
    case DType::int64: return 8;
    case DType::float32:
    case DType::int32: return 4;
    case DType::uint8: return 1;
    default: return 2;
  }
}

constexpr int kMostPixels = 4;  // of a part of a cell, along one dimension

inline Axis axis_of(int64_t sources, int64_t targets, bool corners, int64_t all_sources, int64_t source0, int64_t all_targets,
                    int64_t target0) {
  Axis a{};
  if (!corners) {
    a.step = 2 * all_sources, a.base = all_sources - all_targets, a.unit = 2 * all_targets;
  } else if (all_sources == 1) {  // all target pixels lie on the only source pixel: in cell 0, whose shares count as 0
    a.step = 1, a.base = 0, a.unit = all_targets;
  } else {
    a.step = all_sources - 1, a.base = 0, a.unit = all_targets > 1 ? all_targets - 1 : 1;
  }
  a.last = int(all_sources - 1), a.source0 = int(source0), a.sources = int(sources);
  a.target0 = int(target0), a.targets = int(targets);
  const auto cell = [&](int64_t i) { return int((a.step * i + a.base + a.unit) / a.unit - 1); };
  a.cell0 = cell(target0), a.cells = cell(target0 + targets - 1) - a.cell0 + 1;
  const int64_t pixels = divide_up(a.unit, a.step);
  a.parts = int(divide_up(pixels, kMostPixels)), a.pixels = int(divide_up(pixels, a.parts));
  a.stride = a.pixels == 1 ? 0.f : float(double(a.step) / double(a.unit));
  a.wide = (all_sources + 2) * (a.step + a.unit) * 2 + (a.base < 0 ? -a.base : a.base) >= INT32_MAX;
  return a;
}

// Rows and columns of a call, or why it cannot be made.
inline Status axes_of(const View& scores, int64_t H, int64_t W, bool corners, int64_t all_sources, int64_t source0,
                      int64_t all_targets, int64_t target0, Axis* rows, Axis* columns) {
  const int64_t h = scores.size[2], w = scores.size[3];
  if (all_sources == 0) all_sources = h, source0 = 0;
  if (all_targets == 0) all_targets = H, target0 = 0;
  const int64_t most = INT32_MAX / 4;
  if (all_sources > most || all_targets > most || w > most || W > most) {
    return bad_argument("maps must have fewer than 2^29 rows and columns");
  }
  if (source0 < 0 || source0 + h > all_sources || target0 < 0 || target0 + H > all_targets) {
    return bad_argument("the window lies outside the map");
  }
  *columns = axis_of(w, W, corners, w, 0, W, 0);
  *rows = axis_of(h, H, corners, all_sources, source0, all_targets, target0);
  if (H == 0) return {};
  const auto clamped = [&](int64_t r) { return r < 0 ? 0 : r > rows->last ? rows->last : r; };
  const int64_t end = rows->cell0 + rows->cells - 1;
  const bool reaches = (rows->step * (target0 + H - 1) + rows->base) % rows->unit > 0;
  if (clamped(rows->cell0) < source0 || clamped(end + reaches) >= source0 + h) {
    return bad_argument("the window lacks source rows of its labels");
  }
  return {};
}

// Calls f with K of the kernels, as a type: 1, 2 or 4 pixels of a cell along each dimension.
template <class F>
Status with_pixels(const Axis& rows, const Axis& columns, F f) {
  switch (rows.pixels > columns.pixels ? rows.pixels : columns.pixels) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    default: return f(std::integral_constant<int, 4>());
  }
}

__device__ inline int quotient(const Axis& a, int64_t n, int64_t d) {
  return a.wide ? int(n / d) : int(uint32_t(n) / uint32_t(d));
}
// First target pixel at hand whose cell is r or a later one; the end of those at hand where there is none.
__device__ inline int first_target(const Axis& a, int r) {
  const int64_t ahead = r * a.unit - a.base;
  const int i = quotient(a, (ahead > 0 ? ahead : 0) + a.step - 1, a.step);
  return min(max(i, a.target0), a.target0 + a.targets);
}
// Share of source pixel r+1 in target pixel i of cell r, rounded once; 0 before the first and behind the last cell.
__device__ inline float share(const Axis& a, int i, int r) {
  return r < 0 || r >= a.last ? 0.f : float(a.step * i + a.base - r * a.unit) / float(a.unit);
}
// Source pixel r, or the nearest one at hand, counted from the first at hand.
__device__ inline int source_at(const Axis& a, int r) { return min(max(min(max(r, 0), a.last) - a.source0, 0), a.sources - 1); }

// Target pixels [begin,end) of a part of a cell: pixel begin + k has the share first + k * stride of the far source pixel.
struct Span {
  int begin, end;
  float first, stride;
};
__device__ inline Span span_of(const Axis& a, int cell, int from, int to, int part) {
  Span s;
  s.begin = from + part * a.pixels, s.end = min(to, s.begin + a.pixels);
  // an empty span may lie anywhere: far out, exponentials would overflow
  const bool still = cell < 0 || cell >= a.last || s.begin >= s.end;
  s.first = still ? 0.f : share(a, s.begin, cell);
  s.stride = still ? 0.f : a.stride;
  return s;
}

// `part` of the way from low to high; a neighbour without a share is not seen.
__device__ inline float blend(float low, float high, float part) { return part == 0 ? low : fmaf(part, high - low, low); }
// The same where infinities of one sign stay.
__device__ inline float blend_exact(float low, float high, float part) {
  return part == 0 ? low : (1 - part) * low + part * high;
}

// Scores of a class at the corners of a cell: (r,x), (r,x+1), (r+1,x), (r+1,x+1).
struct Corners {
  float s00, s01, s10, s11;
};
// `offset`: of the corners, in bytes from `plane`, which is the same for all threads. 32 bits: half an address' instructions.
template <class S>
__device__ inline Corners load_corners(const char* plane, const uint32_t (&offset)[4]) {
  const auto at = [plane](uint32_t o) { return to_float(*reinterpret_cast<const S*>(plane + o)); };
  return {at(offset[0]), at(offset[1]), at(offset[2]), at(offset[3])};
}
__device__ inline float highest_of(const Corners& c) { return fmaxf(fmaxf(c.s00, c.s01), fmaxf(c.s10, c.s11)); }
// NaN becomes -inf's stand-in.
__device__ inline Corners finite(const Corners& c) {
  const auto bounded = [](float s) { return fminf(fmaxf(s, kLowest), kHighest); };
  return {bounded(c.s00), bounded(c.s01), bounded(c.s10), bounded(c.s11)};
}
// -inf becomes its stand-in; NaN stays.
__device__ inline Corners bounded(const Corners& c) {
  const auto above = [](float s) { return s < kLowest ? kLowest : s; };
  return {above(c.s00), above(c.s01), above(c.s10), above(c.s11)};
}

// How the scores of a class change over the pixels of a cell.
struct Slopes {
  float right, right_below, both;  // s01 - s00, s11 - s10, their difference
  float first, down;               // the first pixel's score, bottom - top at its column
};
__device__ inline Slopes slopes_of(const Corners& c, const Span& across, const Span& along) {
  Slopes s;
  s.right = c.s01 - c.s00, s.right_below = c.s11 - c.s10, s.both = s.right_below - s.right;
  const float top = fmaf(across.first, s.right, c.s00), bottom = fmaf(across.first, s.right_below, c.s10);
  s.down = bottom - top, s.first = fmaf(along.first, s.down, top);
  return s;
}
// Not steeper than `most`, and no corner is NaN or infinite.
__device__ inline bool gentle(const Slopes& s, float most = kSteep) {
  const float steepest = fmaxf(fmaxf(fabsf(s.right), fabsf(s.right_below)), fabsf(s.down));  // NaN is seen by `both`
  return (steepest <= most) & (fabsf(s.both) <= most);
}
// exp2 of shifted scores of the pixels of a cell, as factors.
struct Powers {
  float first, right, down, both;
};
__device__ inline Powers powers_of(const Slopes& s, const Span& across, const Span& along, float shift) {
  const float to_right = across.stride * kLog2e, to_down = along.stride * kLog2e;
  return {exp2_approximate(fmaf(s.first, kLog2e, shift)), exp2_approximate(fmaf(along.first, s.both, s.right) * to_right),
          exp2_approximate(s.down * to_down), exp2_approximate(s.both * (to_right * along.stride))};
}

// Samples of a launch, so that offsets within a class fit 32 bits; 0: not even those of one do.
inline int64_t samples_of_launch(const View& scores) {
  const int64_t size = bytes_of(scores.dtype), most = int64_t(1) << 32, sample = scores.stride[0] * size;
  const int64_t plane = ((scores.size[2] - 1) * scores.stride[2] + scores.size[3] * scores.stride[3]) * size;
  if (plane >= most) return 0;
  const int64_t samples = sample == 0 ? scores.size[0] : (most - plane) / sample + 1;
  return samples < scores.size[0] ? samples : scores.size[0];
}
constexpr const char* kTooLarge = "a class of a sample must span less than 4 GB";

// Labels [B,H,W] of any strides; int64, int32 or uint8.
struct Labels {
  const void* data;
  DType dtype;
  int64_t sb, sh, sw;
  Labels() = default;
  explicit Labels(const View& v) : data(v.data), dtype(v.dtype), sb(v.stride[0]), sh(v.stride[1]), sw(v.stride[2]) {}
  __device__ int64_t offset(int b, int i, int j) const { return b * sb + i * sh + j * sw; }
  // The label at an offset, or -1 where it does not count.
  template <class I>
  __device__ int at(int64_t offset, int classes, int64_t ignored) const {
    const int64_t y = static_cast<const I*>(data)[offset];
    return y >= 0 && y < classes && y != ignored ? int(y) : -1;
  }
};

// Sum of the class weights, in a fixed order; every lane of the warp gets it.
__device__ inline float sum_of_weights(const float* weight, int classes) {
  if (weight == nullptr) return float(classes);
  float sum = 0;
  for (int c = threadIdx.x % 32; c < classes; c += 32) sum += weight[c];
  return warp_sum(sum);
}

// An array as kernels address it: strides in bytes.
struct Source {
  const char* data = nullptr;
  int64_t sb, sc, sh, sw;
  Source() = default;
  Source(const View& v, int64_t size)
      : data(static_cast<const char*>(v.data)),
        sb(v.stride[0] * size),
        sc(v.stride[1] * size),
        sh(v.stride[2] * size),
        sw(v.stride[3] * size) {}
};

// How cells are cut into blocks of kCellWarps warps: a warp owns 32 cells (or parts of cells) of a row of cells, samples
// following each other, a block as many rows of them as it has warps; their common source rows meet in L1.
constexpr int kCellWarps = 4;
struct CellBlocks {
  int64_t lanes = 0, steps = 0, across = 0;  // cells of a row of cells, rows of cells, blocks side by side
  CellBlocks() = default;
  CellBlocks(const Axis& rows, const Axis& columns, int64_t samples)
      : lanes(samples * columns.cells * columns.parts), steps(int64_t(rows.cells) * rows.parts), across(divide_up(lanes, 32)) {}
  int64_t count() const { return across * divide_up(steps, kCellWarps); }
  bool fit() const { return lanes < INT32_MAX - 32 && steps < INT32_MAX - kCellWarps && count() <= INT32_MAX; }
};

// The cell (y,x) of sample b, or the part of it, that a thread owns.
struct CellPlace {
  int b, y, x;
  bool here;  // else the thread repeats the last cell, and must not write
  Span across, along;
  uint32_t offset[4];  // of the corners from the class's first score, in bytes

  __device__ bool inside(int ky, int kx) const {
    return here && along.begin + ky < along.end && across.begin + kx < across.end;
  }
  // Of a contiguous map [B,H,W].
  __device__ int64_t pixel(const Axis& rows, const Axis& columns, int ky, int kx) const {
    return (int64_t(b) * rows.targets + (along.begin + ky - rows.target0)) * columns.targets + across.begin + kx;
  }
};
__device__ inline CellPlace place_of(const Source& scores, const Axis& rows, const Axis& columns, const CellBlocks& blocks) {
  const int block_x = blockIdx.x % int(blocks.across), block_y = blockIdx.x / int(blocks.across);
  int lane = block_x * 32 + threadIdx.x % 32, step = block_y * kCellWarps + threadIdx.x / 32;
  CellPlace p;
  p.here = lane < blocks.lanes && step < blocks.steps;
  lane = min(lane, int(blocks.lanes) - 1), step = min(step, int(blocks.steps) - 1);
  const int of_sample = columns.cells * columns.parts;
  p.b = lane / of_sample, p.x = columns.cell0 + lane % columns.cells, p.y = rows.cell0 + step / rows.parts;
  p.across =
      span_of(columns, p.x, first_target(columns, p.x), first_target(columns, p.x + 1), lane % of_sample / columns.cells);
  p.along = span_of(rows, p.y, first_target(rows, p.y), first_target(rows, p.y + 1), step % rows.parts);
  const int64_t top = p.b * scores.sb + source_at(rows, p.y) * scores.sh, left = source_at(columns, p.x) * scores.sw;
  const int64_t bottom = p.b * scores.sb + source_at(rows, p.y + 1) * scores.sh,
                right = source_at(columns, p.x + 1) * scores.sw;
  p.offset[0] = uint32_t(top + left), p.offset[1] = uint32_t(top + right);
  p.offset[2] = uint32_t(bottom + left), p.offset[3] = uint32_t(bottom + right);
  return p;
}

}  // namespace cuda
}  // namespace dnc
