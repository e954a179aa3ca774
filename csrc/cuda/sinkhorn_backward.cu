// Sinkhorn backward: the adjoint unrolled over all steps; the same on the CPU, with more words: csrc/cpu/sinkhorn_backward.cpp.
// Reference: autograd through dnc_kernels/ops/sinkhorn/reference.py.
//
//   Z = (s - row maximum)/epsilon, P = softmax_k(Z + u[T]), G = grad_plan;  A = P (G - sum_k G P);  dZ = A;  du[T] = sum_n A
//   t = T..2:  c = column sums of S = softmax_k(Z + u[t-1]), which u[t] divided by;  h = du[t]/c;  d[n] = sum_k h S
//              dZ -= S (h - d);  du[t-1] = sum_n d S
//   t = 1:     dZ -= du[1] exp((s - peak)/epsilon + u[1] + log K);  grad_similarity = dZ/epsilon
//
// Reads similarity, group and grad_plan once, history [T+1,G,K] and steps [G] in every pass; writes grad [N,K] float32 once. A
// tile that does not stay on chip reads similarity again and reads and writes grad, which holds dZ, in every pass. Floors of
// ADE20K (N=131072, C=150, K=10, float32, T=3) on an H100: memory, 11.5 MB read and 5.2 MB written, 5.6 us at 3 TB/s; latency,
// T + 1 = 4 barriers of the grid of 1 to 2 us, each with a read of sums behind it of 1 us. Arithmetic, (T + 1) N K exps, 1.5
// us.
//
// Plan: one cooperative launch and a memset, as sinkhorn.cu; tiles have two areas, similarities and dZ. T + 2 passes: the size
// of G and the pixels of every group, the plan, each step.
// Only sums [G,K] cross blocks, as int64 in units that follow what is summed, per group: at first the largest |G|, of which n
// terms of at most 2 P each are summed; then the sum over k of |du[t]|, which bounds the sum over pixels and k of |d S|, since
// c = sum_n S. A NaN or an Inf in G spreads to its group alone.
// Deterministic: integer sums; float sums inside a tile have a fixed order. Tiles depend on N, K and the GPU.
#include "sinkhorn_segments.h"

namespace dnc {
namespace cuda {
namespace {

using namespace sinkhorn_tile;

// A step's sums are multiples of its bound times this; seven times the bound still fits an int64.
constexpr float kStepScale = 1152921504606846976.f, kStepUnit = 1 / kStepScale;

struct Backward {
  Tiles tiles;
  Matrix grad_plan;
  float inverse, scale, unit;  // 1/epsilon; of the first sums
  int iterations;
  const float* history;
  const int64_t* steps;
  float* grad;
  // Workspace, the first part zero before the launch. Sums: table 0 is du of each group's last step, du[t] of the others is in
  // 1 + t % 3.
  unsigned* arrived;
  unsigned long long *count, *sums;  // [G] pixels; [4,G,K]
  unsigned* size;                    // [G] bits of the largest |grad_plan|: of positive numbers, NaN above all
  float* bound;                      // [2,G] sum over k of |du[t]|, for the sums of du[t-1]: t % 2
  size_t zeros, bytes;
};

Backward layout(void* base, int64_t N, int64_t G, int64_t K) {
  Backward w{};
  Parts parts(base);
  w.arrived = parts.take<unsigned>(1);
  w.count = parts.take<unsigned long long>(G);
  w.sums = parts.take<unsigned long long>(4 * G * K);
  w.size = parts.take<unsigned>(G);
  w.zeros = parts.bytes();
  w.bound = parts.take<float>(2 * G);
  take_order(parts, &w.tiles, N);
  w.bytes = parts.bytes();
  return w;
}

__device__ inline int steps_of(const Backward& a, int64_t g) {
  return int(a.steps[g] < a.iterations ? a.steps[g] : a.iterations);
}

// Largest |grad_plan| of a group, at least the smallest number whose inverse is finite; NaN stays.
__device__ inline float size_of(const Backward& a, int64_t g) {
  const float size = __uint_as_float(a.size[g]);
  return size < 1.17549435e-38f ? 1.17549435e-38f : size;
}

// A lane's columns of u[t] - max_k u[t]; zeros for t = 0.
template <int L>
__device__ void read_centred(const Backward& a, const Block<L>& b, int64_t g, bool used, int t, float (&u)[Block<L>::kShare]) {
  float top = -INFINITY;
#pragma unroll
  for (int j = 0; j < Block<L>::kShare; j++) {
    const int64_t k = j * Block<L>::kTeam + b.lane % Block<L>::kTeam;
    u[j] = used && t > 0 && k < b.K ? a.history[(t * a.tiles.G + g) * b.K + k] : 0.f;
    if (k < b.K) top = fmaxf(top, u[j]);
  }
  top = max_across<Block<L>::kTeam>(top);
#pragma unroll
  for (float& x : u) x -= top;
}

// A lane's columns of du[t], zeros where the group did not make the step; returns their bound.
template <int L>
__device__ float read_du(const Backward& a, const Block<L>& b, int64_t g, bool used, int t, float (&du)[Block<L>::kShare]) {
  const int64_t G = a.tiles.G;
  const bool last = used && steps_of(a, g) == t;
  float size = 0;
  if (used) size = last ? size_of(a, g) : a.bound[(t + 1) % 2 * G + g];
  const unsigned long long* sums = a.sums + ((last ? 0 : 1 + t % 3) * G + g) * b.K;
  float bound = 0;
#pragma unroll
  for (int j = 0; j < Block<L>::kShare; j++) {
    const int k = j * Block<L>::kTeam + b.lane % Block<L>::kTeam;
    // the unit first: a small size times the unit might vanish
    du[j] = used && k < b.K ? from_units(sums[k]) * (last ? a.unit : kStepUnit) * size : 0.f;
    bound += fabsf(du[j]);
  }
  return sum_across<Block<L>::kTeam>(bound);
}

// For pass t, to the first row of each group. In `work`: u - max u of the softmax, or u[1] + log K for t = 1; in column K the
// size of G or for t = 1 the peak. In the second area: 1/c times du over its bound, or du for t = 1; in column K the bound. A
// group that did not make the step has column K of the second area negative. `plan`: the pass before all steps.
template <int L>
__device__ void offsets(const Backward& a, const Block<L>& b, int tile, const Segments& s, int t, bool plan) {
  constexpr int kTeam = Block<L>::kTeam;
  const int K = b.K, base = b.base();
  for (int first = 0; first < s.count; first += 32 / kTeam) {
    const int segment = first + b.lane / kTeam;
    const bool exists = segment < s.count && !(segment == 0 && s.from_before);  // or the warp before does it
    const int position = base + b.starts()[segment < s.count ? segment : 0];
    const int64_t g = b.group(tile)[position];
    const int steps = steps_of(a, g);
    const bool used = exists && (plan || steps >= t);
    float u[Block<L>::kShare], du[Block<L>::kShare] = {}, more = 0, bound = 0;
    if (plan) {
      read_centred(a, b, g, used, steps, u);
      more = size_of(a, g);
    } else {
      bound = read_du(a, b, g, used, t, du);
      read_centred(a, b, g, used, t - 1, u);
      const float log_pixels = logf(float(a.count[g]));
      if (t == 1 && used) more = a.history[g * K];
#pragma unroll
      for (int j = 0; j < Block<L>::kShare; j++) {
        const int k = j * kTeam + b.lane % kTeam;
        if (!used || k >= K) continue;
        const float now = a.history[(t * a.tiles.G + g) * K + k] + logf(float(K));
        if (t == 1) {
          u[j] = now;
        } else {
          du[j] = du[j] / (bound == 0 ? 1.f : bound) * expf(now - u[j] - log_pixels);
        }
      }
    }
    if (!exists) continue;
    float *work = b.work() + position * b.pitch, *second = b.more(tile) + position * b.pitch;
#pragma unroll
    for (int j = 0; j < Block<L>::kShare; j++) {
      const int k = j * kTeam + b.lane % kTeam;
      if (k >= K) continue;
      work[k] = u[j];
      if (!plan) second[k] = du[j];
    }
    if (b.lane % kTeam == 0) work[K] = more, second[K] = used ? bound : -1.f;
  }
  __syncthreads();  // the offsets are complete
}

// Largest |grad_plan| of every group, and its pixels.
template <int L>
__device__ void add_sizes(const Backward& a, const Block<L>& b, int tile, const Segments& s) {
  const float* up = b.cell(b.more(tile), b.position);
  unsigned most = 0;
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    if (c < b.columns) most = max(most, __float_as_uint(fabsf(up[c * L])));
  }
#pragma unroll
  for (int step = L / 2; step > 0; step /= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
  const float* work = b.work();
  const int pitch = b.pitch;
  if (b.column == 0) b.work()[b.position * pitch] = __uint_as_float(most);
  __syncwarp();  // those of the warp's rows are there
  const auto larger = [](float x, float y) { return __float_as_uint(x) > __float_as_uint(y) ? x : y; };
  each_segment(
      b, tile, s, 2,
      [=](int k, int begin, int end) {
        if (k == 1) return float(end - begin);
        float m = work[begin * pitch];
        for (int p = begin + 1; p < end; p++) m = larger(m, work[p * pitch]);
        return m;
      },
      [=](int k, float x, float y) { return k == 1 ? x + y : larger(x, y); },
      [&](int32_t group, int k, float v) {
        if (k == 1) {
          atomicAdd(a.count + group, static_cast<unsigned long long>(v));
        } else {
          atomicMax(a.size + group, __float_as_uint(v));
        }
      });
}

// A to the second area, or A/epsilon for a group without steps; A over the size of G to `work`.
template <int L>
__device__ void through_plan(const Backward& a, const Block<L>& b, int tile, const Segments& s) {
  float* row = b.cell(b.more(tile), b.position);
  const float size = b.work()[s.head * b.pitch + b.K];
  const float scale = s.group >= 0 && steps_of(a, s.group) > 0 ? 1.f : a.inverse;
  float v[kColumns] = {}, dot = 0;
  softmax(b, scores(b, b.cell(b.rows(tile), b.position), b.cell(b.work(), s.head), a.inverse, v), v);
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    if (c < b.columns) dot += v[c] * row[c * L];
  }
  dot = sum_across<L>(dot);
  const float part = 1 / size;
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    if (c >= b.columns) continue;
    v[c] = s.group >= 0 ? v[c] * (row[c * L] - dot) : 0.f;
    row[c * L] = v[c] * scale;
    v[c] *= part;
  }
  __syncthreads();  // the offsets have been read, and their places are free
  put(b, b.work(), v);
  __syncwarp();  // the terms of the warp are there
}

// Back through step t: the second area, and for t > 1 the terms of du[t-1] over the bound of du[t] to `work`.
template <int L>
__device__ void through_step(const Backward& a, const Block<L>& b, int tile, const Segments& s, int t) {
  const float* row = b.cell(b.rows(tile), b.position);
  float *second = b.more(tile), *mine = b.cell(second, b.position);
  float dz[kColumns] = {};
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    if (c < b.columns) dz[c] = mine[c * L];
  }
  __syncwarp();  // dZ is in registers, and its places are free
  offsets(a, b, tile, s, t, false);
  const float *offset = b.cell(b.work(), s.head), *factor = b.cell(second, s.head);
  const float bound = second[s.head * b.pitch + b.K];
  const bool used = s.group >= 0 && !(bound < 0);  // a NaN spreads
  float v[kColumns] = {};
  if (t == 1) {
    const float peak = b.work()[s.head * b.pitch + b.K];
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      if (c >= b.columns || !used) continue;
      dz[c] = (dz[c] - fast_exp(scaled(row[c * L], peak, a.inverse) + offset[c * L]) * factor[c * L]) * a.inverse;
    }
  } else {
    softmax(b, scores(b, row, offset, a.inverse, v), v);
    float dot = 0;
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      if (c < b.columns) dot += v[c] * factor[c * L];
    }
    dot = sum_across<L>(dot);
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      if (c >= b.columns) continue;
      if (used) dz[c] -= bound * (v[c] * (factor[c * L] - dot));
      v[c] = used ? v[c] * dot : 0.f;
    }
  }
  __syncthreads();  // the offsets have been read, and their places are free
  put(b, second, dz);
  if (t > 1) put(b, b.work(), v);
  __syncwarp();  // the terms of the warp are there
}

// Writes the bound of du[t] for the groups that the warp owns, and clears the sums of du[t-2].
template <int L>
__device__ void keep_bounds(const Backward& a, const Block<L>& b, int t) {
  const Owned owned(b);
  const int64_t G = a.tiles.G;
  for (int64_t g = owned.first; g - b.lane / Block<L>::kTeam < G; g += owned.step) {
    float du[Block<L>::kShare];
    const bool used = g < G && steps_of(a, g) >= t;
    const float bound = read_du(a, b, g, used, t, du);
    if (used && b.lane % Block<L>::kTeam == 0) a.bound[t % 2 * G + g] = bound;
    for (int k = b.lane % Block<L>::kTeam; k < b.K && g < G; k += Block<L>::kTeam) {
      a.sums[((1 + (t + 1) % 3) * G + g) * b.K + k] = 0;
    }
  }
}

template <int L>
__global__ void __launch_bounds__(kMaxThreads, 1) sinkhorn_backward_kernel(const __grid_constant__ Backward a) {
  // anew each time: what depends on the thread lives in registers no longer than it must
  const auto block = [&] { return Block<L>(a.tiles); };
  // pass T + 2: sizes, T + 1: the plan, t: step t
  const int start = a.iterations > 0 ? a.iterations + 2 : 1;
  for (int t = start;; t--) {
    const bool plan = t == a.iterations + 1, sizes = t > a.iterations + 1;
    for (int tile = 0; block().exists(tile); tile++) {
      if (tile > 0) __syncthreads();  // edges, `work` and the staged rows of the tile before have been read
      if (t == start || !block().resident(tile)) {
        fetch_tile(block(), tile, t < start);
        const Matrix more = t == start || plan ? a.grad_plan : Matrix(a.grad, a.tiles.K);
        stage_as<float>(block(), block().more(tile), more, tile, block().rank(tile));
        __syncthreads();  // grad_plan or dZ has arrived
      }
      const Segments segments = find_segments(block(), tile);
      if (sizes) {
        add_sizes(a, block(), tile, segments);
        continue;
      }
      if (plan) {
        offsets(a, block(), tile, segments, 0, true);
        through_plan(a, block(), tile, segments);
        if (t > 1) add_segments(block(), tile, segments, a.scale, a.sums);
      } else {
        through_step(a, block(), tile, segments, t);
        const int64_t table = 1 + (t + 2) % 3;
        if (t > 1) add_segments(block(), tile, segments, kStepScale, a.sums + table * a.tiles.G * a.tiles.K);
      }
      if (t == 1 || !block().resident(tile)) {
        __syncthreads();  // dZ of all rows is there
        unstage(block(), a.grad, block().more(tile), tile);
      }
    }
    if (t == 1) return;
    if (t <= a.iterations) keep_bounds(a, block(), t);
    unsigned arrived = unsigned(start - t) * gridDim.x;
    grid_barrier(a.arrived, arrived);  // sums, sizes and bounds are read by all; other sums are free
  }
}

}  // namespace

size_t sinkhorn_backward_workspace(const SinkhornBackward& a) {
  return layout(nullptr, a.similarity.size[0], a.groups, a.similarity.size[1]).bytes;
}

Status sinkhorn_backward(const SinkhornBackward& a, const Launch& where) {
  if (const char* what = wrong(a.similarity, a.group, a.groups, a.epsilon)) return bad_argument(what);
  if (a.grad_plan.dtype != DType::float32 || a.history.dtype != DType::float32 || a.grad_similarity.dtype != DType::float32) {
    return bad_argument("history, grad_plan and grad_similarity must be float32");
  }
  const int64_t N = a.similarity.size[0], K = a.similarity.size[1];
  if (N == 0) return {};
  if (!enough(where, sinkhorn_backward_workspace(a))) return too_small();
  const OnDevice device(where);
  DNC_CHECK(device.error());
  Backward w = layout(where.workspace, N, a.groups, K);
  const int q = 61 - bits(N);  // |A| is at most twice the largest |G|
  w.grad_plan = Matrix(a.grad_plan);
  w.inverse = inverse_epsilon(a.epsilon), w.scale = ldexpf(1, q), w.unit = ldexpf(1, -q);
  w.iterations = int(a.history.size[0]) - 1;
  w.history = a.history.as<float>(), w.steps = a.steps.as<int64_t>(), w.grad = a.grad_similarity.as<float>();
  const int L = lanes(K);
  const auto kernel = L == 1   ? sinkhorn_backward_kernel<1>
                      : L == 2 ? sinkhorn_backward_kernel<2>
                      : L == 4 ? sinkhorn_backward_kernel<4>
                               : sinkhorn_backward_kernel<8>;
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  Grid grid;
  const Status status = arrange(&w.tiles, &grid, a.similarity, a.group, a.groups, 2, stream, kernel);
  if (!status.ok()) return status;
  DNC_CHECK(cudaMemsetAsync(where.workspace, 0, w.zeros, stream));
  DNC_CHECK(launch(grid, kernel, w));
  return {};
}

}  // namespace cuda
}  // namespace dnc
