// Launcher of centroid_cross_entropy: packs the sub-centroids, runs the kernel of this GPU, adds up what its blocks left.
// Kernels and plans: similarity_loss_sm90.cu, similarity_loss_sm80.cu, similarity_pack.cu. Reference:
// dnc_kernels/ops/similarity/reference.py; the same on the CPU: csrc/cpu/similarity_loss.cpp.
#include "similarity_loss.h"

namespace dnc {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kWeightPixels = 4096;

// partial[block] = sum of the class weights of the block's pixels that count.
__global__ void __launch_bounds__(kThreads)
    label_weight_kernel(const int64_t* __restrict__ labels, const float* __restrict__ class_weight, int64_t N, int C,
                        int64_t ignore_index, double* __restrict__ partial) {
  double sum = 0;
  for (int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x; n < N; n += int64_t(gridDim.x) * kThreads) {
    const int64_t y = labels[n];
    if (y != ignore_index && y >= 0 && y < C) sum += class_weight != nullptr ? double(class_weight[y]) : 1.0;
  }
  sum = block_sum<kWarps>(sum, shared_memory<double>());
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block: *total = sum of partial[count].
__global__ void __launch_bounds__(kThreads)
    total_kernel(const double* __restrict__ partial, int count, double* __restrict__ total) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum<kWarps>(sum, shared_memory<double>());
  if (threadIdx.x == 0) *total = sum;
}

// Block 0: the scalars, from the sums of `warps` warps. Further blocks: 32 entries of [kSlotSums slots] each, from `blocks`
// rows.
__global__ void __launch_bounds__(kThreads)
    finish_loss_kernel(const WarpSums* __restrict__ sums, int warps, const double* __restrict__ weight,
                       float* __restrict__ loss, float* __restrict__ grad_scale, const float* __restrict__ block_sums,
                       int blocks, int slots, int C, float* __restrict__ grad_gain, float* __restrict__ grad_shift) {
  if (blockIdx.x == 0) {
    double of_loss = 0, of_scale = 0;
    for (int i = threadIdx.x; i < warps; i += kThreads) of_loss += sums[i].loss, of_scale += sums[i].scale;
    of_loss = block_sum<kWarps>(of_loss, shared_memory<double>());
    of_scale = block_sum<kWarps>(of_scale, shared_memory<double>());
    if (threadIdx.x == 0) {
      // no pixel counts: 0 / 0, as in torch
      if (loss != nullptr) *loss = float(weight != nullptr ? of_loss / *weight : of_loss);
      if (grad_scale != nullptr) *grad_scale = float(of_scale);
    }
    return;
  }
  float* part = shared_memory<float>();  // [kWarps][32]
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32, i = (int(blockIdx.x) - 1) * 32 + lane;
  float sum = 0;
  if (i < kSlotSums * slots) {
    for (int b = row; b < blocks; b += kWarps) sum += block_sums[int64_t(b) * kSlotSums * slots + i];
  }
  part[row * 32 + lane] = sum;
  __syncthreads();  // the rows' sums are complete
  if (row == 0) {
    sum = 0;
    for (int r = 0; r < kWarps; r++) sum += part[r * 32 + lane];
    const int c = i % (4 * slots);
    float* out = i < 4 * slots ? grad_gain : grad_shift;
    if (i < kSlotSums * slots && c < C && out != nullptr) out[c] = sum;
  }
}

struct Workspace {
  Packed packed;
  double* weight;  // [1 + kMaxBlocks]
  WarpSums* sums;
  float *norm_sums, *block_sums;
  unsigned char* slab;  // nullptr: in shared memory
  bool in_shared;
  size_t bytes;
};

Workspace layout(void* base, const CentroidCrossEntropy& a) {
  Parts parts(base);
  Workspace w{Packed(parts, a.centroids, a.metric), nullptr, nullptr, nullptr, nullptr, nullptr, true, 0};
  // a block has a pixel at least: how many more depends on the GPU, and on where images end
  const int64_t N = Pixels(a.x).N(), blocks = N < kMaxBlocks ? N : kMaxBlocks;
  const int slots = int(divide_up(a.centroids.size[0], 4));
  w.weight = parts.take<double>(1 + kMaxBlocks);
  w.sums = parts.take<WarpSums>(blocks * kMaxWarps);
  const bool parameters = a.grad_norm_weight || a.grad_norm_bias;
  w.norm_sums = parts.take<float>(parameters ? blocks * kMaxWarps * kSlotSums * slots : 0);
  w.block_sums = parts.take<float>(parameters ? blocks * kSlotSums * slots : 0);
  w.in_shared = slab_in_shared(w.packed.boxes, slots);
  w.slab = w.in_shared ? nullptr : parts.take<unsigned char>(blocks * int64_t(slab_bytes(slots, 32 * kMaxWarps)));
  w.bytes = parts.bytes();
  return w;
}

}  // namespace

size_t centroid_cross_entropy_workspace(const CentroidCrossEntropy& a) { return layout(nullptr, a).bytes; }

Status centroid_cross_entropy(const CentroidCrossEntropy& a, const Launch& where) {
  if (const char* why = refuses(a.x, a.centroids)) return bad_argument(why);
  if (a.grad_centroids) return bad_argument("grad_centroids is not made by the CUDA kernel");
  PixelRuns x, grad;
  bool planes, grad_planes;
  runs_of(a.x, &x, &planes);
  if (a.grad_x && (!runs_of(a.grad_x, &grad, &grad_planes) || grad_planes != planes)) {
    return bad_argument("grad_x must be laid out as x is: adjacent channels or adjacent pixels, other strides multiples of 8");
  }
  if (!enough(where, centroid_cross_entropy_workspace(a))) return too_small();
  const OnDevice device(where);
  DNC_CHECK(device.error());
  bool hopper = false;
  DNC_CHECK(on_hopper(&hopper));
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  const Workspace w = layout(where.workspace, a);
  const bool mean = a.reduction == Reduction::mean, each = a.reduction == Reduction::none;

  Loss l{};
  l.p = problem_of(a.x, a.centroids, a.metric, w.packed);
  l.p.labels = a.labels.as<int64_t>(), l.p.own = a.own_similarity.as<float>();
  l.ignore_index = a.ignore_index;
  l.gain = a.norm_weight.as<float>(), l.shift = a.norm_bias.as<float>(), l.class_weight = a.class_weight.as<float>();
  l.eps = float(a.norm_eps), l.smoothing = float(a.label_smoothing), l.inverse_temperature = float(1 / a.temperature);
  l.scale = a.scale.as<float>(), l.grad_loss = a.grad_loss.as<float>(), l.each = each;
  l.weight = mean ? w.weight : nullptr;
  l.loss = each ? a.loss.as<float>() : nullptr, l.prediction = a.prediction.as<int64_t>();
  if (a.grad_x) l.grad_x = grad;
  l.parameters = a.grad_norm_weight || a.grad_norm_bias;
  l.wanted = a.grad_x || l.parameters || a.grad_scale;
  l.sums = w.sums, l.norm_sums = w.norm_sums, l.block_sums = w.block_sums;
  l.slab = w.slab;

  const size_t shared = kThreads * sizeof(double);
  if (mean) {
    const int64_t wanted = divide_up(l.p.N, kWeightPixels);
    const unsigned blocks = unsigned(wanted < 1 ? 1 : wanted < kMaxBlocks ? wanted : kMaxBlocks);
    DNC_CHECK(launch(Grid{blocks, kThreads, stream, shared}, label_weight_kernel, l.p.labels, l.class_weight, int64_t(l.p.N),
                     l.p.C, l.ignore_index, w.weight + 1));
    DNC_CHECK(launch(Grid{1, kThreads, stream, shared}, total_kernel, w.weight + 1, int(blocks), w.weight));
  }
  Launched launched;
  if (l.p.N > 0) {
    DNC_CHECK(w.packed.pack(a.centroids, a.metric, a.x.dtype, stream));
    const auto run = hopper ? run_loss_sm90 : run_loss_sm80;
    const Status s = run(l, a.x.dtype, w.in_shared, stream, &launched);
    if (!s.ok()) return s;
  }
  float* loss = each ? nullptr : a.loss.as<float>();
  if (loss == nullptr && !a.grad_scale && !l.parameters) return {};
  const unsigned blocks = 1 + (l.parameters ? unsigned(divide_up(kSlotSums * l.p.slots, 32)) : 0);
  DNC_CHECK(launch(Grid{blocks, kThreads, stream, shared}, finish_loss_kernel, w.sums, int(launched.warps), l.weight, loss,
                   a.grad_scale.as<float>(), w.block_sums, int(launched.blocks), l.p.slots, l.p.C,
                   a.grad_norm_weight.as<float>(), a.grad_norm_bias.as<float>()));
  return {};
}

}  // namespace cuda
}  // namespace dnc
