// Between the two products of centroid_cross_entropy: LayerNorm over the classes, cross-entropy and its gradient, on the class
// maxima that a thread itself found (similarity.h: class 4 slot + q of the pixels g and g + 8).
//
//   r[c] = max_k s;  o = (r - mean) rstd gain + shift, or r;  z = o scale / temperature
//   loss = (1-e) w_y (lse z - z_y) + e/C sum_c w_c (lse z - z_c)        (e: label smoothing; w: class weights)
//   dz[c] = on_p exp(z - lse) - e/C w_c - [c = y] (1-e) w_y;  dr = the same through scale and norm
//
// The maxima and winners of a block lie in a slab [slot][h][thread], in shared memory where it fits and in the workspace (L2)
// where not; dr replaces r in it. Only its own thread reads an entry: no barriers. Four passes over the slab (one less without
// norm). Sums over the classes: lanes of a quad; over pixels: rows of one warp, added up in order by the kernel that finishes.
// exp2_approximate: 2^-22 relative, as much as rounding z by half an ulp at |z| = 2.
#pragma once
#include "similarity.h"

namespace dnc {
namespace cuda {

using Reduction = CentroidCrossEntropy::Reduction;
constexpr int kSlotSums = 2 * 4;  // of a slot's classes, for gain and shift

// Sums over the pixels of a warp.
struct WarpSums {
  double loss, scale;
};

struct Loss {
  Problem p;
  int64_t ignore_index;
  const float *gain, *shift, *class_weight;  // [C] or nullptr
  float eps, smoothing, inverse_temperature;
  const float* scale;      // [] or nullptr
  const float* grad_loss;  // [] or [N] (each), or nullptr
  bool each;               // reduction none
  const double* weight;    // [] sum of the class weights, for the mean's gradient, or nullptr
  float* loss;             // [N] or nullptr
  int64_t* prediction;     // [N] or nullptr
  PixelRuns grad_x;        // laid out as x is; its data may be nullptr
  bool parameters;         // gradients of gain and shift are wanted
  bool wanted;             // any gradient
  WarpSums* sums;          // [warps]
  float* norm_sums;        // [warps][kSlotSums slots]: of gain [4 slots], then of shift; with parameters
  float* block_sums;       // [blocks][kSlotSums slots]
  unsigned char* slab;     // of the blocks, or nullptr: in shared memory
};

// A block's class maxima and, behind them, their winners: in shared memory at `offset`, or at `global`.
constexpr int kEntryBytes = sizeof(float) + sizeof(uint8_t);  // of a slab: a maximum and its winner
__host__ __device__ inline size_t slab_bytes(int slots, int threads) { return size_t(slots) * 2 * threads * kEntryBytes; }
template <bool kShared>
struct Slab {
  unsigned char* global;
  int offset, slots, threads, thread;
  __device__ unsigned char* base() const { return kShared ? shared_memory<unsigned char>() + offset : global; }
  __device__ float& r(int slot, int h) const { return reinterpret_cast<float*>(base())[(slot * 2 + h) * threads + thread]; }
  __device__ uint8_t& winner(int slot, int h) const {
    return base()[(slots * 2 * int(sizeof(float)) + slot * 2 + h) * threads + thread];
  }
};

// The warps of a block that take pixels: `count`, from `first` on.
struct Warps {
  int count, first;
  // This warp's number among those of the grid; made anew at each use, because registers are scarce.
  __device__ int here() const { return int(blockIdx.x) * count + thread_here() / 32 - first; }
};

// The slab of this block, for `thread` of `threads`.
template <bool kShared>
__device__ inline Slab<kShared> slab_of(const Loss& a, const unsigned char* rest, int threads, int thread) {
  const int64_t bytes = int64_t(slab_bytes(a.p.slots, threads));
  return {kShared ? nullptr : a.slab + blockIdx.x * bytes, int(rest - shared_memory<unsigned char>()), a.p.slots, threads,
          thread};
}

// Takes the maxima of product 1.
template <bool kShared>
struct ToSlab {
  Slab<kShared> slab;
  float sum[2] = {0, 0};
  __device__ void operator()(int h, int slot, float score, int winner) {
    slab.r(slot, h) = score;
    slab.winner(slot, h) = uint8_t(winner);
    sum[h] += score;
  }
};

__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// dX = a u + b x with u = sum_c dr p: what the metric and the incoming gradient make of the second product.
struct Finish {
  float a[2], b[2];  // zeros, as u is, for a pixel that does not count: its features are not touched
};

// f(slot, c, h, r) for all classes of this thread's two pixels.
template <bool kShared, class F>
__device__ inline void each_score(const Problem& p, const Slab<kShared>& slab, F f) {
  const int q = lane_here() % 4;
#pragma unroll 2
  for (int slot = 0; slot < p.slots; slot++) {
    const int c = 4 * slot + q;
    if (c >= p.C) continue;
    const float r[2] = {slab.r(slot, 0), slab.r(slot, 1)};
    f(slot, c, r);
  }
}

// Loss, prediction and dr of this thread's pixels; sum: of their class maxima, this lane's classes. All lanes of a warp call
// it.
template <bool kShared>
__device__ inline Finish cross_entropy(const Loss& a, const Rows& rows, const Slab<kShared>& slab, const float (&sum)[2],
                                       const Warps& warps) {
  const Problem& p = a.p;
  const int lane = lane_here(), q = lane % 4;
  const float tau = a.inverse_temperature * (a.scale != nullptr ? *a.scale : 1.f), log2e = 1.44269504f;
  const bool norm = a.gain != nullptr;
  const float classes = float(p.C);
  float mean[2] = {0, 0}, rstd[2] = {1, 1};
  bool finite[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float total = quad_sum(sum[h]);
    finite[h] = is_finite(total);  // a pixel's scores are all NaN, or none
    if (norm) mean[h] = total / classes;
  }
  if (norm) {
    float square[2] = {0, 0};
    each_score(p, slab, [&](int, int, const float (&r)[2]) {
#pragma unroll
      for (int h = 0; h < 2; h++) square[h] = fmaf(r[h] - mean[h], r[h] - mean[h], square[h]);
    });
#pragma unroll
    for (int h = 0; h < 2; h++) rstd[h] = 1.f / sqrtf(quad_sum(square[h]) / classes + a.eps);
  }
  const auto gain = [&](int c) { return norm ? __ldg(a.gain + c) : 1.f; };
  const auto shift = [&](int c) { return a.shift != nullptr ? __ldg(a.shift + c) : 0.f; };
  const auto weight = [&](int c) { return a.class_weight != nullptr ? __ldg(a.class_weight + c) : 1.f; };

  // log-sum-exp, the best class, the label's logit
  float top[2] = {-INFINITY, -INFINITY}, exps[2] = {0, 0}, own[2] = {0, 0}, weighted[2] = {0, 0}, weight_sum = 0;
  int best[2] = {0, 0};
  each_score(p, slab, [&](int, int c, const float (&r)[2]) {
    const float w = gain(c), b = shift(c);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float z = fmaf((r[h] - mean[h]) * rstd[h], w, b) * tau;
      if (z > top[h]) exps[h] *= exp2_approximate((top[h] - z) * log2e), top[h] = z, best[h] = c;
      exps[h] += exp2_approximate((z - top[h]) * log2e);
      if (c == rows.label[h]) own[h] = z;
      if (a.smoothing > 0) weighted[h] = fmaf(z, weight(c), weighted[h]);
    }
    if (a.smoothing > 0) weight_sum += weight(c);
  });
  if (a.smoothing > 0) weight_sum = quad_sum(weight_sum);
  float lse[2], on_p[2], on_y[2], factor[2];
  double loss_sum = 0;
  const float smooth = a.smoothing / classes;
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const float other = __shfl_xor_sync(~0u, top[h], step), other_exps = __shfl_xor_sync(~0u, exps[h], step);
      const int other_best = __shfl_xor_sync(~0u, best[h], step);
      const float high = fmaxf(top[h], other);
      // a lane without a class has -inf and no sum
      const float mine = exps[h] > 0 ? exps[h] * exp2_approximate((top[h] - high) * log2e) : 0.f;
      const float theirs = other_exps > 0 ? other_exps * exp2_approximate((other - high) * log2e) : 0.f;
      if (other > top[h] || (other == top[h] && other_best < best[h])) best[h] = other_best;
      exps[h] = mine + theirs, top[h] = high;
    }
    own[h] = quad_sum(own[h]), weighted[h] = quad_sum(weighted[h]);
    finite[h] = finite[h] && is_finite(top[h]);
    lse[h] = finite[h] ? top[h] + logf(exps[h]) : NAN;
    const bool counts = rows.label[h] >= 0;
    const float own_weight = counts ? weight(rows.label[h]) : 0.f;
    on_y[h] = (1.f - a.smoothing) * own_weight;
    on_p[h] = counts ? on_y[h] + smooth * weight_sum : 0.f;
    float loss = on_y[h] * (lse[h] - own[h]);
    if (a.smoothing > 0) loss += smooth * (weight_sum * lse[h] - weighted[h]);
    if (!counts) loss = 0;
    if (q == 0 && rows.inside(h)) {
      loss_sum += double(loss);
      if (a.loss != nullptr) a.loss[rows.n(h)] = loss;
      if (a.prediction != nullptr) a.prediction[rows.n(h)] = finite[h] ? best[h] : -1;
    }
    factor[h] = a.grad_loss == nullptr ? 1.f : !a.each ? *a.grad_loss : rows.inside(h) ? a.grad_loss[rows.n(h)] : 0.f;
    if (a.weight != nullptr) factor[h] = float(double(factor[h]) / *a.weight);
  }
  loss_sum = warp_sum(loss_sum);
  if (lane_here() == 0) a.sums[warps.here()].loss += loss_sum;
  Finish finish{};
  if (!a.wanted) return finish;

  const auto gradient = [&](int h, int c, float z, float w) {
    float d = on_p[h] * exp2_approximate((z - lse[h]) * log2e);
    if (a.smoothing > 0) d -= smooth * w;
    return c == rows.label[h] ? d - on_y[h] : d;
  };
  float along[2] = {0, 0}, slope[2] = {0, 0};  // LayerNorm's gradient needs two sums over the classes
  if (norm) {
    each_score(p, slab, [&](int, int c, const float (&r)[2]) {
      const float w = gain(c), b = shift(c), cw = weight(c);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float xhat = (r[h] - mean[h]) * rstd[h], g = gradient(h, c, fmaf(xhat, w, b) * tau, cw) * w;
        along[h] += g, slope[h] = fmaf(g, xhat, slope[h]);
      }
    });
#pragma unroll
    for (int h = 0; h < 2; h++) along[h] = quad_sum(along[h]) / classes, slope[h] = quad_sum(slope[h]) / classes;
  }
  float total[2] = {0, 0}, scale_sum = 0;
  // every lane of the warp goes through every slot: those of a column of classes add up what the norm's parameters get
  for (int slot = 0; slot < p.slots; slot++) {
    const int c = 4 * slot + q;
    const bool real = c < p.C;
    const float w = real ? gain(c) : 0.f, b = real ? shift(c) : 0.f, cw = real ? weight(c) : 0.f;
    float to_gain = 0, to_shift = 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float d = 0;
      if (real && rows.label[h] >= 0) {
        const float r = slab.r(slot, h), xhat = (r - mean[h]) * rstd[h], o = fmaf(xhat, w, b);
        const float dz = gradient(h, c, o * tau, cw);
        d = norm ? (fmaf(dz, w, -along[h]) - xhat * slope[h]) * (rstd[h] * tau) : dz * tau;
        total[h] += p.metric == Metric::cosine ? d * r : d;
        scale_sum = fmaf(dz * o, factor[h], scale_sum);
        to_shift += dz * tau * factor[h], to_gain += dz * tau * factor[h] * xhat;
      }
      if (real) slab.r(slot, h) = d;
    }
    if (a.parameters) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        to_gain += __shfl_xor_sync(~0u, to_gain, step), to_shift += __shfl_xor_sync(~0u, to_shift, step);
      }
      if (lane_here() < 4 && real) {
        float* at = a.norm_sums + int64_t(warps.here()) * kSlotSums * p.slots + c;
        at[0] += to_gain, at[4 * p.slots] += to_shift;
      }
    }
  }
  if (a.scale != nullptr) {
    const double of_scale = warp_sum(double(scale_sum) * a.inverse_temperature);
    if (lane_here() == 0) a.sums[warps.here()].scale += of_scale;
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    total[h] = quad_sum(total[h]);
    finish.a[h] = finish.b[h] = 0;
    if (rows.label[h] < 0) continue;
    // the factor comes last: times a loss scale, dr may exceed what float16 holds
    finish.a[h] = factor[h];
    // cosine: (u - x/|x| sum_c dr r) / |x|; sqeuclidean: rows hold 2 p, so u - 2 x sum_c dr
    if (p.metric == Metric::cosine) {
      finish.a[h] *= rows.alpha[h], finish.b[h] = -total[h] * rows.alpha[h] * rows.alpha[h] * factor[h];
    }
    if (p.metric == Metric::sqeuclidean) finish.b[h] = -2 * total[h] * factor[h];
  }
  return finish;
}

// dS of a tile as fragments of the second product: a[f] covers 16 columns.
template <class T, bool kShared>
__device__ inline void make_fragments(uint32_t (&a)[kFragments][4], const Problem& p, const Slab<kShared>& slab, int tile) {
  for_subcentroids(p, [&](auto k) {
    constexpr int kK = decltype(k)::value;
    int slot = tile * p.per_lane;
    int winner[2] = {-1, -1};  // of the class of element e, as an element; none of the elements behind the last class
    float d[2] = {0, 0}, before[2] = {0, 0};
#pragma unroll
    for (int e = 0; e < kOwn; e++) {
      if (begins<kK>(p, e)) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const bool real = slot < slots_here(p);
          winner[h] = real ? slab.winner(slot, h) + e : -1;
          d[h] = real ? slab.r(slot, h) : 0.f;
        }
        slot++;
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float v = winner[h] == e ? d[h] : 0.f;
        if (e % 2 == 1) a[e / 4][e % 4 / 2 * 2 + h] = pack_pair<T>(before[h], v);
        before[h] = v;
      }
    }
  });
}

// dX of a slice of channels, in place of the warp's pixels in shared memory.
template <class T, bool kPlanes, int S>
__device__ inline void put_gradient(const float (&u)[S][kBox / 2], const Finish& finish, const PixelTile<kPlanes>& x,
                                    int first_box, int boxes) {
  const int lane = lane_here(), g = lane / 4, q = lane % 4;
#pragma unroll
  for (int box = 0; box < S; box++) {
    if (box < boxes) {
#pragma unroll
      for (int c = 0; c < 8; c++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          uint16_t *low = x.element(g + 8 * h, first_box + box, 8 * c + 2 * q), *high = nullptr;
          uint32_t before = 0;  // of the pixel's features
          if constexpr (kPlanes) {
            high = x.element(g + 8 * h, first_box + box, 8 * c + 2 * q + 1);
            before = *low | uint32_t(*high) << 16;
          } else {
            before = *reinterpret_cast<const uint32_t*>(low);
          }
          // chosen, not multiplied: 0 times a feature that is not finite is NaN
          if (finish.b[h] == 0) before = 0;
          const float a = fmaf(finish.b[h], to_float(T{uint16_t(before)}), u[box][4 * c + 2 * h] * finish.a[h]);
          const float b = fmaf(finish.b[h], to_float(T{uint16_t(before >> 16)}), u[box][4 * c + 2 * h + 1] * finish.a[h]);
          const uint32_t pair = pack_pair<T>(a, b);
          if constexpr (kPlanes) {
            *low = uint16_t(pair), *high = uint16_t(pair >> 16);
          } else {
            *reinterpret_cast<uint32_t*>(low) = pair;
          }
        }
      }
    }
  }
}

// This warp's part of dX from shared to global memory, 16 bytes a lane, 128 bytes a row: its 16 pixels, or of planes the pixels
// of the whole group for a share of the channels. `warps` of the group.
template <class T, bool kPlanes>
__device__ inline void store_gradient(const Problem& p, const PixelRuns& to, const PixelTile<kPlanes>& x, const Place& at,
                                      int warps) {
  if (at.image >= to.images) return;
  const int lane = lane_here(), c = lane % 8;
  T* image = static_cast<T*>(to.data) + at.image * to.image_stride;
  if constexpr (kPlanes) {
    const int n = at.offset + 8 * c, left = c < 2 * warps ? to.run - n : 0;
    for (int d = x.row / 16 * 4 + lane / 8; d < p.D; d += 4 * warps) {
      const auto* from = reinterpret_cast<const T*>(x.plane(d % kBox, d / kBox, c));
      T* target = image + d * to.stride + n;
      if (left >= 8) {
        *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int i = 0; i < left; i++) target[i] = from[i];
      }
    }
  } else {
    for (int r = lane / 8; r < 16; r += 4) {
      const int n = at.offset + x.row + r;
      if (n >= to.run) continue;
      for (int d = 8 * c; d < p.D; d += kBox) {
        *reinterpret_cast<uint4*>(image + n * to.stride + d) = *reinterpret_cast<const uint4*>(x.chunk(r, d / kBox, c));
      }
    }
  }
}

// The sums of a grid's warps start at zero. The lanes that add to an entry clear it.
__device__ inline void clear_sums(const Loss& a, const Warps& warps) {
  if (lane_here() == 0) a.sums[warps.here()] = {0, 0};
  if (!a.parameters || lane_here() >= 4) return;
  for (int i = lane_here(); i < kSlotSums * a.p.slots; i += 4)
    a.norm_sums[int64_t(warps.here()) * kSlotSums * a.p.slots + i] = 0;
}
// Adds up a block's warps, once all of them have stored: thread `thread` of `threads`.
__device__ inline void add_warps(const Loss& a, int warps, int thread, int threads) {
  if (!a.parameters) return;
  const float* from = a.norm_sums + int64_t(blockIdx.x) * warps * kSlotSums * a.p.slots;
  for (int i = thread; i < kSlotSums * a.p.slots; i += threads) {
    float sum = 0;
    for (int w = 0; w < warps; w++) sum += from[int64_t(w) * kSlotSums * a.p.slots + i];
    a.block_sums[int64_t(blockIdx.x) * kSlotSums * a.p.slots + i] = sum;
  }
}

// ---- host

// Shared memory that every launch may count on where the slab lies there: a block of 128 pixels on Hopper has room.
inline bool slab_in_shared(int boxes, int slots) {
  return size_t(2) * boxes * 64 * 128 + size_t(3) * kColumns * 128 + 256 + slab_bytes(slots, 32 * kMaxWarps) <= 227 * 1024;
}

// f of an element of x's dtype, and whether x lies as planes as a constant.
template <class F>
Status for_layout(DType dtype, bool planes, F f) {
  if (dtype == DType::bfloat16) return planes ? f(BFloat16{}, std::true_type{}) : f(BFloat16{}, std::false_type{});
  return planes ? f(Float16{}, std::true_type{}) : f(Float16{}, std::false_type{});
}

struct Launched {
  unsigned blocks = 0, warps = 0;  // rows of block_sums, of sums
};
Status run_loss_sm90(const Loss& a, DType dtype, bool slab_in_shared, cudaStream_t stream, Launched* launched);
Status run_loss_sm80(const Loss& a, DType dtype, bool slab_in_shared, cudaStream_t stream, Launched* launched);

}  // namespace cuda
}  // namespace dnc
