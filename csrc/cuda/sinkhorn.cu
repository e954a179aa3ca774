// Sinkhorn forward: formulas in dnc/sinkhorn.h, reference in dnc_kernels/ops/sinkhorn/reference.py, the same on the CPU:
// csrc/cpu/sinkhorn.cpp.
//
// With Z = (s - shift)/epsilon, per group of n pixels and with v = 0 first, a pair of marginal steps is one sum over pixels:
//   t = 1:  c[k] = sum_n exp((s[n,k] - m[k])/epsilon), m[k] = max_n s[n,k];   u[k] = (max_k m[k] - m[k])/epsilon - log(K c[k])
//   t > 1:  c[k] = sum_n S[n,k], S = softmax_k(Z + u);                        u[k] <- u[k] - log(K c[k] / n)
//
// Reads similarity [N,K] (float32/float16/bfloat16, any strides) and group [N] int64 once, writes plan [N,K] float32 and
// assignment [N] int64 once; tables of [G,K] go through L2 in every pass. Floors of ADE20K (N=131072, C=150, K=10, float32,
// T=3) on an H100: memory, 6.3 MB read and 1 MB written, 2.4 us at 3 TB/s; latency, T + 1 = 4 barriers of the grid of 1 to 2
// us, each with a read of sums behind it of 1 us. Arithmetic, (T + 1) N K exps at 16 a clock and multiprocessor, 1.5 us.
//
// Plan: one cooperative launch and a memset. T + 2 passes over the block's tiles of rows (sinkhorn_tile.h), with a barrier of
// the grid between them: the maxima m and the number of pixels; c for each step; the result. A warp derives u of the groups
// that it meets from the sums of the pass before, and adds one term a segment and column to those of this pass. What later
// passes need (u - max u, steps, history, zeros for the sums after next) is written by the half-warp that owns the group;
// owners are the last warps of the grid, which have no tile if any have none. Once no group moves any more, no further sums are
// made.
//
// Only column sums [G,K] cross blocks. They are int64 multiples of 2^-q: adding integers is exact. One scale is enough: terms
// lie in [0,1], and their sum is at least 1 for t = 1, and at least 1/K for t > 1 (u made every column of exp(Z + u + v) sum to
// 1/K, so no row of it exceeds 1, and dividing by the rows' sums shrinks no column). A segment's part is rounded to float32 and
// to 2^-q, q = 62 - bits(N): what the latter loses is at most N^2 K 2^-62 of the sum, 4e-8 for ADE20K. Deterministic: integer
// sums and maxima; float sums inside a tile have a fixed order. Tiles depend on N, K and the GPU.
#include "sinkhorn_segments.h"

namespace dnc {
namespace cuda {
namespace {

using namespace sinkhorn_tile;

struct Forward {
  Tiles tiles;
  float inverse, scale, unit, tolerance;  // 1/epsilon, 2^q, 2^-q
  bool bounded;                           // by the tolerance
  int iterations;
  int64_t* assignment;
  float *plan, *history;
  int64_t* steps;
  // Workspace, the first part zero before the launch. Tables rotate: step t has sums t % 3, base (t + 1) % 2, last t % 2.
  unsigned* arrived;
  int* latest;                       // step at which a group has last moved
  unsigned long long *count, *sums;  // [G] pixels; [3,G,K] column sums
  unsigned* largest;                 // [G,K] maxima as order keys, 0: none
  int* last;                         // [2,G] steps done
  float* base;                       // [2,G,K] u[t] - max_k u[t]; what step 1 starts from: (max_k m - m)/epsilon
  size_t zeros, bytes;
};

Forward layout(void* base, int64_t N, int64_t G, int64_t K) {
  Forward w{};
  Parts parts(base);
  w.arrived = parts.take<unsigned>(1);
  w.latest = parts.take<int>(1);
  w.count = parts.take<unsigned long long>(G);
  w.sums = parts.take<unsigned long long>(3 * G * K);
  w.largest = parts.take<unsigned>(G * K);
  w.last = parts.take<int>(2 * G);
  w.zeros = parts.bytes();
  w.base = parts.take<float>(2 * G * K);
  take_order(parts, &w.tiles, N);
  w.bytes = parts.bytes();
  return w;
}

// Unsigned numbers in the order of the floats; no finite float has 0.
__device__ inline unsigned order_key(float v) {
  const unsigned bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float from_order_key(unsigned key) {
  return key == 0 ? 0.f : __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// Step t of a group, by a team: lane i has columns i, i + kTeam
template <int L>
struct Potential {
  float u[Block<L>::kShare], centred[Block<L>::kShare];  // centred: u - max_k u
  unsigned long long count;
  int steps;
  bool moved;  // the step was done
};

// From the sums of the step's pass. `g` need not be a group where !exists.
template <int L>
__device__ Potential<L> potential(const Forward& a, const Block<L>& b, int64_t g, bool exists, int t) {
  const int64_t G = a.tiles.G, K = b.K, table = G * K;
  Potential<L> p;
  p.count = exists ? a.count[g] : 0;
  const int last = exists && a.bounded ? a.last[(t + 1) % 2 * G + g] : 0;
  const float pixels = p.count > 0 ? float(p.count) : 1.f;
  const float log_ratio = (t > 1 ? logf(pixels) : 0.f) - logf(float(K));
  float base[Block<L>::kShare], top = -INFINITY, error = 0;
#pragma unroll
  for (int j = 0; j < Block<L>::kShare; j++) {
    const int64_t k = j * Block<L>::kTeam + b.lane % Block<L>::kTeam;
    const bool inside = exists && k < K;
    base[j] = inside ? a.base[t % 2 * table + g * K + k] : 0.f;
    const float sum = inside ? from_units(a.sums[t % 3 * table + g * K + k]) * a.unit : 0.f;
    const float c = fmaxf(sum, 1.f / float(K));  // below lies only what rounding left
    p.u[j] = p.count > 0 ? base[j] + log_ratio - logf(c) : 0.f;
    if (k < K) {
      top = fmaxf(top, p.u[j]);
      // the new u divides by the column sums of the coupling that stands
      error = fmaxf(error, fabsf(c * (float(K) / pixels) - 1));
    }
  }
  top = max_across<Block<L>::kTeam>(top), error = max_across<Block<L>::kTeam>(error);
  p.moved = p.count > 0 && (!a.bounded || t == 1 || (last == t - 1 && error > a.tolerance));
  p.steps = p.moved ? t : last;
#pragma unroll
  for (int j = 0; j < Block<L>::kShare; j++) p.centred[j] = p.moved ? p.u[j] - top : base[j];
  return p;
}

// Writes step t of the groups that the warp owns, and clears the sums of step t + 2. `result`: no step follows.
template <int L>
__device__ void keep_potentials(const Forward& a, const Block<L>& b, int t, bool result) {
  const int64_t G = a.tiles.G, K = b.K, table = G * K;
  const Owned owned(b);
  for (int64_t g = owned.first; g - b.lane / Block<L>::kTeam < G; g += owned.step) {
    const bool exists = g < G;
    const Potential<L> p = potential(a, b, g, exists, t);
    if (!exists) continue;
#pragma unroll
    for (int j = 0; j < Block<L>::kShare; j++) {
      const int64_t k = j * Block<L>::kTeam + b.lane % Block<L>::kTeam, at = g * K + k;
      if (k >= K) continue;
      a.base[(t + 1) % 2 * table + at] = p.centred[j];
      a.sums[(t + 2) % 3 * table + at] = 0;
      if (a.history == nullptr) continue;
      const float u = p.moved ? p.u[j] : p.steps > 0 ? a.history[(t - 1) * table + at] : 0.f;
#pragma unroll 1
      for (int64_t row = t; row <= (result ? a.iterations : t); row++) a.history[row * table + at] = u;
    }
    if (b.lane % Block<L>::kTeam != 0) continue;
    a.last[t % 2 * G + g] = p.steps;
    if (a.bounded && p.moved) atomicMax(a.latest, t);
    if (result && a.steps != nullptr) a.steps[g] = p.steps;
  }
}

// Writes what step 1 of the groups that the warp owns starts from, or without any step what the result has of them.
template <int L>
__device__ void keep_maxima(const Forward& a, const Block<L>& b) {
  const int64_t G = a.tiles.G, K = a.tiles.K;
  const Owned owned(b);
  for (int64_t g = owned.first; g - b.lane / Block<L>::kTeam < G; g += owned.step) {
    const bool exists = g < G;
    float m[Block<L>::kShare], peak = -kLargest;
#pragma unroll
    for (int j = 0; j < Block<L>::kShare; j++) {
      const int64_t k = j * Block<L>::kTeam + b.lane % Block<L>::kTeam;
      m[j] = exists && k < K ? from_order_key(a.largest[g * K + k]) : -kLargest;
      peak = fmaxf(peak, m[j]);
    }
    peak = max_across<Block<L>::kTeam>(peak);
    if (!exists) continue;
    const bool used = a.iterations > 0 && a.count[g] > 0;
    if (a.iterations == 0 && a.steps != nullptr && b.lane % Block<L>::kTeam == 0) a.steps[g] = 0;
#pragma unroll
    for (int j = 0; j < Block<L>::kShare; j++) {
      const int64_t k = j * Block<L>::kTeam + b.lane % Block<L>::kTeam;
      if (k >= K) continue;
      a.base[G * K + g * K + k] = -scaled(m[j], peak, a.inverse);
      if (a.history != nullptr) a.history[g * K + k] = used ? peak : 0.f;
    }
  }
}

// Largest similarity of every column of every group, and the pixels of each group.
template <int L>
__device__ void add_maxima(const Forward& a, const Block<L>& b, int tile, const Segments& segments) {
  const int K = b.K, pitch = b.pitch;
  const float* rows = b.rows(tile);
  each_segment(
      b, tile, segments, K + 1,
      [=](int k, int begin, int end) {
        if (k == K) return float(end - begin);
        float m = rows[begin * pitch + k];
        for (int p = begin + 1; p < end; p++) m = fmaxf(m, rows[p * pitch + k]);
        return m;
      },
      [=](int k, float x, float y) { return k == K ? x + y : fmaxf(x, y); },
      [&](int32_t group, int k, float v) {
        if (k == K) {
          atomicAdd(a.count + group, static_cast<unsigned long long>(v));
        } else {
          atomicMax(a.largest + int64_t(group) * K + k, order_key(v));
        }
      });
}

// What pass t adds to the scores of each group, to the first row of the group in `work`: m for t = 1, u - max u of step
// t - 1 after that, 0 without any step. In column K: for a sum, whether step t - 1 was done; for the result, whether the group
// is a single pixel, or without any step any group.
template <int L>
__device__ void offsets(const Forward& a, const Block<L>& b, int tile, const Segments& s, int t, bool result) {
  const int K = b.K, base = b.base();
  for (int first = 0; first < s.count; first += 32 / Block<L>::kTeam) {
    const int segment = first + b.lane / Block<L>::kTeam;
    const bool exists = segment < s.count && !(segment == 0 && s.from_before);  // or the warp before does it
    const int position = base + b.starts()[segment < s.count ? segment : 0];
    const int64_t g = b.group(tile)[position];
    float* out = b.work() + position * b.pitch;
    Potential<L> p;
    if (t > 1) {
      p = potential(a, b, g, exists, t - 1);
    } else {
      p.moved = true, p.count = 1;
#pragma unroll
      for (int j = 0; j < Block<L>::kShare; j++) {
        const int k = j * Block<L>::kTeam + b.lane % Block<L>::kTeam;
        p.centred[j] = exists && k < K && !result ? from_order_key(a.largest[g * K + k]) : 0.f;
      }
    }
    if (!exists) continue;
#pragma unroll
    for (int j = 0; j < Block<L>::kShare; j++) {
      const int k = j * Block<L>::kTeam + b.lane % Block<L>::kTeam;
      if (k < K) out[k] = p.centred[j];
    }
    if (b.lane % Block<L>::kTeam == 0) out[K] = (result ? p.count == 1 : p.moved) ? 1.f : 0.f;
  }
  __syncthreads();  // the offsets are complete
}

// The terms of step t, in `work`.
template <int L>
__device__ void terms(const Forward& a, const Block<L>& b, int tile, const Segments& s, int t) {
  const float *row = b.cell(b.rows(tile), b.position), *offset = b.cell(b.work(), s.head);
  float v[kColumns] = {};
  if (t == 1) {
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      if (c < b.columns) v[c] = scaled(row[c * L], offset[c * L], a.inverse);
    }
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      if (c < b.columns) v[c] = fast_exp(v[c]);
    }
  } else {
    softmax(b, scores(b, row, offset, a.inverse, v), v);
    if (b.work()[s.head * b.pitch + b.K] == 0) {  // a group that has stopped adds nothing
#pragma unroll
      for (float& x : v) x = 0;
    }
  }
  __syncthreads();  // the offsets have been read, and their places are free
  if (s.group >= 0) put(b, b.work(), v);
  __syncwarp();  // the terms of the warp are there
}

template <int L>
__device__ void write_result(const Forward& a, const Block<L>& b, int tile, const Segments& s) {
  const float *row = b.cell(b.rows(tile), b.position), *offset = b.cell(b.work(), s.head);
  float v[kColumns] = {};
  const float top = scores(b, row, offset, a.inverse, v);
  if (a.assignment != nullptr) {
    const bool nearest = b.work()[s.head * b.pitch + b.K] != 0;  // one pixel has a uniform plan, and takes its nearest
    float best = -INFINITY;
    int at = 0;
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      if (c >= b.columns) continue;
      const float x = nearest ? row[c * L] : v[c];
      if (x > best) best = x, at = c * L + b.column;
    }
#pragma unroll
    for (int step = L / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(~0u, best, step);
      const int there = __shfl_xor_sync(~0u, at, step);
      if (other > best || (other == best && there < at)) best = other, at = there;
    }
    const int n = b.row(tile)[b.position];
    if (b.column == 0 && n < b.size(tile)) a.assignment[b.first(tile) + n] = s.group >= 0 ? at : -1;
  }
  if (a.plan == nullptr) return;
  softmax(b, top, v);
  if (s.group < 0) {
#pragma unroll
    for (float& x : v) x = s.group == kNotFinite ? NAN : 0.f;
  }
  __syncthreads();  // the offsets have been read, and their places are free
  put(b, b.work(), v);
  __syncthreads();  // the plan of all rows is there
  unstage(b, a.plan, b.work(), tile);
}

template <int L>
__global__ void __launch_bounds__(kMaxThreads, 1) sinkhorn_kernel(const __grid_constant__ Forward a) {
  // anew each time: what depends on the thread lives in registers no longer than it must
  const auto block = [&] { return Block<L>(a.tiles); };
  const int start = a.iterations > 0 ? 0 : 1;
  for (int t = start;; t++) {
    // in pass t the owners learn which groups moved at step t - 1
    const bool result = t > a.iterations || (a.bounded && t > 2 && *a.latest < t - 2);
    for (int tile = 0; block().exists(tile); tile++) {
      if (tile > 0) __syncthreads();  // edges, `work` and the staged rows of the tile before have been read
      if (t == start || !block().resident(tile)) fetch_tile(block(), tile, t > start);
      const Segments segments = find_segments(block(), tile);
      if (t == 0) {
        add_maxima(a, block(), tile, segments);
        continue;
      }
      offsets(a, block(), tile, segments, t, result);
      if (result) {
        write_result(a, block(), tile, segments);
      } else {
        terms(a, block(), tile, segments, t);
        add_segments(block(), tile, segments, a.scale, a.sums + t % 3 * a.tiles.G * a.tiles.K);
      }
    }
    if (t == 1) keep_maxima(a, block());
    if (t > 1) keep_potentials(a, block(), t - 1, result);
    if (result) return;
    unsigned arrived = unsigned(t - start) * gridDim.x;
    grid_barrier(a.arrived, arrived);  // sums, maxima and what the owners wrote are read by all; other sums are free
  }
}

}  // namespace

size_t sinkhorn_workspace(const Sinkhorn& a) {
  return layout(nullptr, a.similarity.size[0], a.groups, a.similarity.size[1]).bytes;
}

Status sinkhorn(const Sinkhorn& a, const Launch& where) {
  if (const char* what = wrong(a.similarity, a.group, a.groups, a.epsilon)) return bad_argument(what);
  if (a.iterations < 0) return bad_argument("iterations must be 0 or more");
  const int64_t N = a.similarity.size[0], K = a.similarity.size[1];
  if (!enough(where, sinkhorn_workspace(a))) return too_small();
  const OnDevice device(where);
  DNC_CHECK(device.error());
  Forward w = layout(where.workspace, N, a.groups, K);
  const int q = 62 - bits(N);
  w.inverse = inverse_epsilon(a.epsilon), w.scale = ldexpf(1, q), w.unit = ldexpf(1, -q);
  w.bounded = a.tolerance >= 0, w.tolerance = a.tolerance < double(kFar) ? float(a.tolerance) : kFar;
  w.iterations = a.iterations;
  w.assignment = a.assignment ? a.assignment.as<int64_t>() : nullptr;
  w.plan = a.plan ? a.plan.as<float>() : nullptr;
  w.history = a.history ? a.history.as<float>() : nullptr;
  w.steps = a.steps ? a.steps.as<int64_t>() : nullptr;
  const int L = lanes(K);
  const auto kernel = L == 1   ? sinkhorn_kernel<1>
                      : L == 2 ? sinkhorn_kernel<2>
                      : L == 4 ? sinkhorn_kernel<4>
                               : sinkhorn_kernel<8>;
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  Grid grid;
  const Status status = arrange(&w.tiles, &grid, a.similarity, a.group, a.groups, 1, stream, kernel);
  if (!status.ok()) return status;
  DNC_CHECK(cudaMemsetAsync(where.workspace, 0, w.zeros, stream));
  DNC_CHECK(launch(grid, kernel, w));
  return {};
}

}  // namespace cuda
}  // namespace dnc
