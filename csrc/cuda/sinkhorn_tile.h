// What the Sinkhorn kernels, forward and backward, share: tiles of rows in shared memory, sorted by group; softmax of a row.
//
// A block owns every gridDim-th tile of R rows, R = threads / L: L lanes share a row of K <= 12 L numbers, lane i of them has
// columns i, i + L, ... A tile is sorted by group once (a bitonic sort of its R labels), so that a warp's rows are a few
// segments of one group each: no table [G,K] lies on chip and no label is too rare or too frequent. Tiles that fit stay in
// shared memory for the whole launch; a block that owns more stages each of the others once a pass, from L2 or memory, into the
// last buffer. Shared memory: (buffers * areas + 1) * 4 (K + 1) R, and 10 R for the order of each tile that stays.
#pragma once
#include "common.h"
#include "dnc/sinkhorn.h"

namespace dnc {
namespace cuda {
namespace sinkhorn_tile {

constexpr int kColumns = 12;                               // of a lane, at most
constexpr int kRowBits = 10, kMaxThreads = 1 << kRowBits;  // of a block; R divides it
constexpr int64_t kMaxGroups = 1 << (31 - kRowBits);       // a group and a row are sorted as 32 bits
constexpr int kStarts = 40;                                // bytes of a warp's segment starts, at most 33
constexpr int32_t kLeftOut = -1, kNotFinite = -2;          // in place of a group; they sort last
// Differences over epsilon are cut at kFar, where exp has long been 0, and so stay finite at any epsilon.
constexpr float kFar = 1e30f;

struct Matrix {
  const void* data;
  DType dtype;
  int64_t sn, sk;
  Matrix() = default;
  __device__ Matrix(const float* p, int K) : data(p), dtype(DType::float32), sn(K), sk(1) {}
  explicit Matrix(const View& v) : data(v.data), dtype(v.dtype), sn(v.stride[0]), sk(v.stride[1]) {}
};

// The problem, and how it lies in blocks and shared memory; the same for every block.
struct Tiles {
  Matrix similarity;
  const int64_t* group;  // [N]; null: all pixels are group 0
  int64_t N, G;
  int count;     // of tiles
  int K, pitch;  // pitch: floats from row to row in shared memory, at least K + 1; L * odd, so that banks differ
  int rows;      // R of a tile
  int areas;     // [R,pitch] that a tile keeps
  int buffers, resident;
  // order of the tiles that do not stay: group, row and rank of Tile
  int32_t* group_at;
  uint16_t *row_at, *rank_at, *head_at;

  // bytes into the shared memory of a block, after the tiles' areas
  int work, edges, groups, places, starts;

  // Lays out the shared memory and returns its size.
  size_t layout(int threads) {
    const size_t area = size_t(rows) * pitch * sizeof(float), order = size_t(buffers) * rows * 2, warps = threads / 32;
    const size_t sizes[] = {buffers * areas * area, area, 2 * warps * (K + 1) * sizeof(float), 2 * order, 3 * order};
    int* const offsets[] = {&work, &edges, &groups, &places, &starts};
    size_t bytes = 0;
    for (int i = 0; i < 5; i++) bytes += sizes[i], *offsets[i] = int(bytes);
    return bytes + warps * kStarts;
  }
};

// Shared memory of a block, and where this thread stands. Pointers are made where they are needed: they would fill registers.
template <int L>
struct Block {
  static constexpr int kRows = 32 / L;            // of a warp
  static constexpr int kTeam = L == 1 ? 16 : 32;  // lanes that work on the K numbers of one group
  static constexpr int kShare = L <= 2 ? 1 : 2;   // of these, at most, for a lane: i, i + kTeam
  const Tiles& a;
  int thread, warp, lane, column, position;  // column, position: first column and row of this lane
  int columns;                               // of this lane
  int K, pitch;

  __device__ explicit Block(const Tiles& a) : a(a), K(opaque(a.K)), pitch(opaque(a.pitch)) {
    const unsigned i = unsigned(thread_here());
    thread = int(i), warp = int(i / 32), lane = int(i % 32), column = int(i % L), position = int(i / L);
    columns = int(unsigned(K - column + L - 1) / L);
  }
  // The block's i-th tile: which it is of all, whether it exists, stays in shared memory, and in which of the buffers it lies.
  __device__ int index(int i) const { return int(blockIdx.x + i * gridDim.x); }
  __device__ bool exists(int i) const { return index(i) < a.count; }
  __device__ bool resident(int i) const { return i < a.resident; }
  __device__ int buffer(int i) const { return i < a.buffers ? i : a.buffers - 1; }
  // Pixel of its row 0, and its rows that exist.
  __device__ int64_t first(int i) const { return int64_t(index(i)) * a.rows; }
  __device__ int size(int i) const { return a.N - first(i) < a.rows ? int(a.N - first(i)) : a.rows; }
  __device__ int warps() const { return int(blockDim.x) / 32; }
  // Position of the warp's first row in the tile.
  __device__ int base() const { return warp * kRows; }

  template <class T>
  __device__ T* at(int offset) const {
    return reinterpret_cast<T*>(shared_memory<unsigned char>() + offset);
  }
  // [R,pitch]: similarities of a tile, by position, groups ascending; where tiles have two areas, the second; room for what a
  // pass makes.
  __device__ float* rows(int t) const { return at<float>(0) + buffer(t) * a.areas * a.rows * pitch; }
  __device__ float* more(int t) const { return rows(t) + a.rows * pitch; }
  __device__ float* work() const { return at<float>(a.work); }
  // The first of this lane's columns of row p; the next is L on.
  __device__ float* cell(float* area, int p) const { return area + p * pitch + column; }
  __device__ float* edges() const { return at<float>(a.edges); }
  __device__ uint8_t* starts() const { return at<uint8_t>(a.starts) + warp * kStarts; }
  // [R]: group of a position; where in the tile its pixel lies; position of a pixel; first position
  // of the group of a position.
  __device__ int32_t* group(int t) const {
    return resident(t) ? at<int32_t>(a.groups) + buffer(t) * a.rows : a.group_at + first(t);
  }
  __device__ uint16_t* row(int t) const {
    return resident(t) ? at<uint16_t>(a.places) + buffer(t) * 3 * a.rows : a.row_at + first(t);
  }
  __device__ uint16_t* rank(int t) const { return resident(t) ? row(t) + a.rows : a.rank_at + first(t); }
  __device__ uint16_t* head(int t) const { return resident(t) ? row(t) + 2 * a.rows : a.head_at + first(t); }
};

// The groups of this team, of all blocks: first, and how far the next is. The last warps of the grid come first.
struct Owned {
  int64_t first, step;
  template <int L>
  __device__ explicit Owned(const Block<L>& b) {
    constexpr int kTeams = 32 / Block<L>::kTeam;
    first = (int64_t(gridDim.x - blockIdx.x) * b.warps() - 1 - b.warp) * kTeams + b.lane / Block<L>::kTeam;
    step = int64_t(gridDim.x) * b.warps() * kTeams;
  }
};

// Row and column of the cells of a matrix [outer,inner] that a thread takes: its number, + blockDim.x, ...
struct Walk {
  int outer, inner, outer_step, inner_step, size;
  __device__ Walk(int thread, int size)
      : outer(thread / size), inner(thread % size), outer_step(blockDim.x / size), inner_step(blockDim.x % size), size(size) {}
  __device__ void next() {
    outer += outer_step, inner += inner_step;
    if (inner >= size) inner -= size, outer++;
  }
};

// Rows of a tile, from global to shared memory at the positions of `rank` (null: as they lie). Lanes follow the smaller stride;
// all loads of a thread are on their way before the first is needed.
template <class S, int L>
__device__ void stage_as(const Block<L>& b, float* to, const Matrix& m, int t, const uint16_t* rank) {
  const bool along_rows = m.sn < m.sk;
  const int size = along_rows ? b.size(t) : b.K;
  const int left = b.size(t) * b.K - b.thread;  // cells from this thread's first on
  float v[kColumns] = {};
  {
    const int64_t inner = along_rows ? m.sn : m.sk, outer = along_rows ? m.sk : m.sn;
    Walk at(b.thread, size);
    const S* p = static_cast<const S*>(m.data) + b.first(t) * m.sn + at.outer * outer + at.inner * inner;
    const int64_t step = at.outer_step * outer + at.inner_step * inner, wrap = outer - size * inner;
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
      if (j * int(blockDim.x) < left) v[j] = to_float(*p);
      at.inner += at.inner_step, p += step;
      if (at.inner >= size) at.inner -= size, p += wrap;
    }
  }
  Walk at(opaque(b.thread), size);  // 16 places kept from the first walk would fill the registers
#pragma unroll
  for (int j = 0; j < kColumns; j++) {
    const int n = along_rows ? at.inner : at.outer, k = along_rows ? at.outer : at.inner;
    if (j * int(blockDim.x) < left) to[(rank == nullptr ? n : rank[n]) * b.pitch + k] = v[j];
    at.next();
  }
}
template <int L>
__device__ void stage(const Block<L>& b, float* to, const Matrix& m, int t, const uint16_t* rank) {
  switch (m.dtype) {
    case DType::float16: stage_as<Float16>(b, to, m, t, rank); break;
    case DType::bfloat16: stage_as<BFloat16>(b, to, m, t, rank); break;
    default: stage_as<float>(b, to, m, t, rank);
  }
}
// The way back, into a contiguous [N,K].
template <int L>
__device__ void unstage(const Block<L>& b, float* to, const float* from, int t) {
  const uint16_t* rank = b.rank(t);
  to += b.first(t) * b.K;
  Walk at(b.thread, b.K);
  for (int e = b.thread; e < b.size(t) * b.K; e += blockDim.x) {
    to[e] = from[rank[at.outer] * b.pitch + at.inner];
    at.next();
  }
}

// The lane's columns of its row of `area`.
template <int L>
__device__ void put(const Block<L>& b, float* area, const float (&v)[kColumns]) {
  float* row = b.cell(area, b.position);
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    if (c < b.columns) row[c * L] = v[c];
  }
}

// Sorts the keys of the first `count` threads, a power of two; all threads call it. `exchange`: [2,count].
__device__ inline uint32_t sort_keys(int i, uint32_t key, int count, uint32_t* exchange) {
  int turn = 0;
  for (int size = 2; size <= count; size *= 2) {
    const bool up = (i & size) == 0;
    for (int stride = size / 2; stride >= 32; stride /= 2) {
      uint32_t* half = exchange + turn * count;
      if (i < count) half[i] = key;
      __syncthreads();  // all keys are there, and the other half has been read
      if (i < count) {
        const uint32_t other = half[i ^ stride];
        key = ((i & stride) == 0) == up ? min(key, other) : max(key, other);
      }
      turn ^= 1;
    }
    if (i >= max(count, 32)) continue;  // fewer than a warp: its other lanes sort among themselves
#pragma unroll
    for (int stride = 16; stride > 0; stride /= 2) {
      if (stride >= size) continue;
      const uint32_t other = __shfl_xor_sync(~0u, key, stride);
      key = ((i & stride) == 0) == up ? min(key, other) : max(key, other);
    }
  }
  return key;
}

// Rows of a tile that is not there: its similarities, by position. `opened`: not for the first time, so that its order is
// known.
template <int L>
__device__ void fetch_tile(const Block<L>& b, int t, bool opened) {
  const int i = b.thread;
  int64_t label = -1;
  if (!opened && i < b.size(t)) label = b.a.group == nullptr ? 0 : b.a.group[b.first(t) + i];
  float* rows = b.rows(t);
  stage(b, rows, b.a.similarity, t, opened ? b.rank(t) : nullptr);
  __syncthreads();  // the rows have arrived
  if (opened) return;
  int32_t group = kLeftOut;
  if (label >= 0 && label < b.a.G) {
    bool finite = true;
#pragma unroll 4
    for (int k = 0; k < b.K; k++) finite &= fabsf(rows[i * b.pitch + k]) <= kLargest;  // false for NaN
    group = finite ? int32_t(label) : kNotFinite;
  }
  const uint32_t key = sort_keys(i, uint32_t(group) << kRowBits | uint32_t(i), b.a.rows, reinterpret_cast<uint32_t*>(b.work()));
  group = int32_t(key) >> kRowBits;
  if (i < b.a.rows) {
    const int row = int(key & (kMaxThreads - 1));
    b.group(t)[i] = group, b.row(t)[i] = uint16_t(row), b.rank(t)[row] = uint16_t(i);
  }
  __syncthreads();  // the order is complete
  if (i < b.a.rows) {
    int begin = 0;
    for (int end = i; begin < end;) {
      const int middle = (begin + end) / 2;
      if (uint32_t(b.group(t)[middle]) < uint32_t(group)) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    b.head(t)[i] = uint16_t(begin);
  }
  const float* from = b.cell(rows, b.row(t)[b.position]);
  float v[kColumns] = {};
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    if (c < b.columns) v[c] = from[c * L];
  }
  __syncthreads();  // the rows have been read and may move
  put(b, rows, v);
  __syncwarp();  // a warp reads its own rows alone
}

// Over the L lanes of a row, or the lanes of a team; every lane gets it.
template <int kLanes>
__device__ inline float sum_across(float v) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}
template <int kLanes>
__device__ inline float max_across(float v) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, step));
  return v;
}

// (s - shift)/epsilon, at least -kFar whatever the numbers are; a NaN of an infinite difference times 0 is cut off before.
__device__ inline float scaled(float s, float shift, float inverse) {
  return fmaxf(fmaxf(s - shift, -kLargest) * inverse, -kFar);
}
// e^x for x <= 0 or little above: relative error 2^-22 + |x| 2^-24, as the rounding of x itself brings; 0 below 2^-126.
__device__ inline float fast_exp(float x) { return exp2_approximate(x * 1.4426950408889634f); }

// v = (s - row maximum)/epsilon + offset of the lane's columns, both from `cell`; returns the largest, to every lane of the
// row.
template <int L>
__device__ float scores(const Block<L>& b, const float* s, const float* offset, float inverse, float (&v)[kColumns]) {
  float largest = -kLargest;
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    if (c < b.columns) v[c] = s[c * L], largest = fmaxf(largest, v[c]);
  }
  largest = max_across<L>(largest);
  float top = -INFINITY;
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    if (c < b.columns) v[c] = scaled(v[c], largest, inverse) + offset[c * L], top = fmaxf(top, v[c]);
  }
  return max_across<L>(top);
}
// v = softmax_k(v), whose largest is `top`.
template <int L>
__device__ void softmax(const Block<L>& b, float top, float (&v)[kColumns]) {
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    if (c < b.columns) v[c] = fast_exp(v[c] - top), sum += v[c];
  }
  const float part = 1 / sum_across<L>(sum);
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    if (c < b.columns) v[c] *= part;
  }
}

inline float inverse_epsilon(double epsilon) { return 1 / epsilon > double(kFar) ? kFar : float(1 / epsilon); }
inline int bits(int64_t n) {
  int count = 0;
  for (; n > 0; n /= 2) count++;
  return count;
}

// Lanes that share a row.
inline int lanes(int64_t K) {
  int L = 1;
  while (L * kColumns < K) L *= 2;
  return L;
}

// Order of the tiles that do not stay, for whatever tile a device takes.
inline void take_order(Parts& parts, Tiles* t, int64_t N) {
  const int64_t rows = round_up(N, kMaxThreads);
  t->group_at = parts.take<int32_t>(rows);
  t->row_at = parts.take<uint16_t>(rows);
  t->rank_at = parts.take<uint16_t>(rows);
  t->head_at = parts.take<uint16_t>(rows);
}

inline const char* wrong(const View& similarity, const View& group, int64_t groups, double epsilon) {
  if (similarity.ndim != 2 || similarity.size[1] < 1 || similarity.size[1] > sinkhorn_limits::max_subcentroids)
    return "similarity must be [N,K] within limits";
  if (similarity.dtype != DType::float32 && similarity.dtype != DType::float16 && similarity.dtype != DType::bfloat16) {
    return "similarity must be float32, float16 or bfloat16";
  }
  if (group && group.numel() != similarity.size[0]) return "group must have an element for each row of similarity";
  if (groups < 1 || groups > kMaxGroups) return "num_groups must be in [1, 2^21]";
  return epsilon > 0 ? nullptr : "epsilon must be positive";
}

// Tiles as small as one a multiprocessor allows, else as many of them resident as fit; one block a multiprocessor, and a warp
// for every two groups where blocks are few. `kernel` is the one for lanes(K).
template <class Kernel>
Status arrange(Tiles* t, Grid* grid, const View& similarity, const View& group, int64_t groups, int areas, cudaStream_t stream,
               Kernel kernel) {
  t->similarity = Matrix(similarity), t->group = group ? group.as<int64_t>() : nullptr;
  t->N = similarity.size[0], t->G = groups, t->K = int(similarity.size[1]), t->areas = areas;
  const int L = lanes(t->K);
  t->pitch = L * (int(divide_up(t->K + 1, L)) | 1);
  int processors, limit;
  DNC_CHECK(attribute(&processors, cudaDevAttrMultiProcessorCount));
  DNC_CHECK(attribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin));
  int threads = 128;
  while (threads < kMaxThreads && int64_t(processors) * (threads / L) < t->N) threads *= 2;
  for (;; threads /= 2) {
    t->rows = threads / L, t->count = int(divide_up(t->N, t->rows));
    const int64_t wanted = t->count + divide_up(divide_up(groups, 2), threads / 32);
    const int blocks = int(wanted < processors ? wanted : processors);
    const int most = int(divide_up(t->count, blocks));  // tiles of a block
    t->buffers = 1;
    while (t->buffers < most && t->layout(threads) <= size_t(limit)) t->buffers++;
    if (t->buffers > 1 && t->layout(threads) > size_t(limit)) t->buffers--;
    t->resident = t->buffers < most ? t->buffers - 1 : t->buffers;
    *grid = {dim3(unsigned(blocks)), unsigned(threads), stream, t->layout(threads), 1, true};
    int fit = 0;
    if (grid->shared <= size_t(limit)) DNC_CHECK(resident_blocks(&fit, kernel, grid->threads, grid->shared));
    if (fit > 0) return {};
    if (threads == 128) return bad_argument("the GPU has too little shared memory for a tile of rows");
  }
}

}  // namespace sinkhorn_tile
}  // namespace cuda
}  // namespace dnc
