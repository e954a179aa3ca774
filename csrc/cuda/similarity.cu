// Class scores with their winners, and the nearest sub-centroid: product 1 with the max over K, and over the classes, in its
// epilogue.
//
//   scores[n,c] = max_k s(x[n], p[c,k]), winner its k;  nearest: the best of all, label c and sub k; lowest index on ties
// Reads x [N,D] once from memory and the packed sub-centroids [M,D] once a tile of pixels from L2; writes scores [N,C] fp32 and
// winners, or 20 bytes a pixel. FLOPs 2 N M D. ADE20K (N=131072, C=150, K=10, D=256): 101 GFLOP over 800 TF/s = 126 us; scores
// 165 MB over 3.0 TB/s = 55 us, nearest 70 MB = 23 us: compute. Plan: similarity_sm90.h and similarity_sm80.h, persistent.
// Deterministic. Reference: dnc_kernels/ops/similarity/reference.py; the same on the CPU: csrc/cpu/similarity.cpp.
#include "similarity_sm80.h"
#include "similarity_sm90.h"

namespace dnc {
namespace cuda {
namespace {

// What becomes of the class maxima: a Sink per tile of pixels, made of what is written.
struct ToScores {
  PixelMap scores, winner;  // float, uint8_t

  struct Sink {
    const ToScores& out;
    float* score[2];
    uint8_t* win[2];
    __device__ Sink(const ToScores& out, const Problem&, const Rows& rows) : out(out) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        score[h] = rows.inside(h) ? out.scores.at<float>(rows.n(h)) : nullptr;
        win[h] = rows.inside(h) && out.winner.data != nullptr ? out.winner.at<uint8_t>(rows.n(h)) : nullptr;
      }
    }
    __device__ void operator()(int h, int slot, float v, int k) {
      const int64_t c = 4 * slot + threadIdx.x % 4;
      if (score[h] != nullptr) score[h][c * out.scores.sd] = is_finite(v) ? v : NAN;
      if (win[h] != nullptr) win[h][c * out.winner.sd] = uint8_t(k);
    }
    __device__ void finish(const Rows&) {}
  };
};

struct ToNearest {
  int64_t *label, *sub;
  float* score;

  struct Sink {
    const ToNearest& out;
    int K;
    float best[2] = {-INFINITY, -INFINITY};
    int at[2] = {INT32_MAX, INT32_MAX};  // c * K + k
    __device__ Sink(const ToNearest& out, const Problem& p, const Rows&) : out(out), K(p.K) {}
    __device__ void operator()(int h, int slot, float v, int k) {
      if (v > best[h]) best[h] = v, at[h] = (4 * slot + int(threadIdx.x) % 4) * K + k;
    }
    __device__ void finish(const Rows& rows) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
          const float other = __shfl_xor_sync(~0u, best[h], step);
          const int m = __shfl_xor_sync(~0u, at[h], step);
          if (other > best[h] || (other == best[h] && m < at[h])) best[h] = other, at[h] = m;
        }
        // where all similarities are NaN, nothing beat minus infinity
        const bool found = is_finite(best[h]);
        if (threadIdx.x % 4 == 0 && rows.inside(h)) {
          out.label[rows.n(h)] = found ? at[h] / K : -1;
          out.sub[rows.n(h)] = found ? at[h] % K : -1;
          out.score[rows.n(h)] = found ? best[h] : NAN;
        }
      }
    }
  };
};

// All tiles of this block, by the products (sm90::Consumer or sm80::Block) made of `parts`. Made here, not handed in by
// reference: so nvcc makes the code of a loop in the kernel itself.
template <class T, class Products, class Out, class... Part>
__device__ inline void scores_of_block(const Problem& p, const Out& out, Part&&... parts) {
  Products products(parts...);
  for (int at = int(blockIdx.x); products.first(at) < products.end(p.x); at += int(gridDim.x)) {
    products.begin(at);
    const Rows rows = read_rows<T>(p, products.pixels(), products.place(p.x, at), -1);
    clear_own(p, rows);
    typename Out::Sink sink(out, p, rows);
    for (int tile = 0; tile < p.tiles; tile++) {
      float s[kSums];
      products.scores(s);
      take_maxima(p, rows, s, tile, sink);
    }
    products.release_pixels();
    sink.finish(rows);
  }
}

template <class T, bool kPlanes, class Out>
__global__ void __launch_bounds__(sm90::kThreads, 1)
    class_scores_sm90_kernel(const __grid_constant__ Problem p, const __grid_constant__ Out out,
                             const __grid_constant__ sm90::Maps maps, int stages, int cluster) {
#if DNC_HOPPER
  const auto here = [&] { return sm90::Block(shared_memory<unsigned char>(), p.boxes, stages, cluster); };
  here().start();
  if (threadIdx.x < 128) {
    registers_decrease<sm90::kProducerRegisters>();
    if (threadIdx.x == 0) sm90::produce(p, here(), &maps, 0);
    __syncwarp();  // the cluster's barrier wants whole warps
  } else {
    registers_increase<sm90::kConsumerRegisters>();
    const sm90::Block block = here();
    scores_of_block<T, sm90::Consumer<T, kPlanes>>(p, out, block);
  }
  cluster_barrier();  // no block leaves while another may still copy into it or arrive at its barriers
#else
  trap();
#endif
}

template <class T, bool kPlanes, class Out>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    class_scores_sm80_kernel(const __grid_constant__ Problem p, const __grid_constant__ Out out) {
#if DNC_AMPERE
  scores_of_block<T, sm80::Block<T, kPlanes>>(p, out, p, shared_memory<unsigned char>(), false);
#else
  trap();
#endif
}

template <class T, bool kPlanes, class Out>
Status run_as(const Problem& p, const Out& out, DType dtype, cudaStream_t stream) {
  bool hopper = false;
  DNC_CHECK(on_hopper(&hopper));
  const Status small = bad_argument("x does not fit this GPU's shared memory");
  if (hopper) {
    sm90::Shape shape;
    DNC_CHECK(sm90::shape_of(&shape, p, 0));
    if (shape.stages == 0) return small;
    sm90::Maps maps;
    DNC_CHECK(sm90::maps_of(&maps, p, dtype, shape.cluster));
    const Grid grid{shape.blocks, sm90::kThreads, stream, shape.shared, unsigned(shape.cluster)};
    DNC_CHECK(launch(grid, class_scores_sm90_kernel<T, kPlanes, Out>, p, out, maps, shape.stages, shape.cluster));
  } else {
    sm80::Shape shape;
    DNC_CHECK(sm80::shape_of(&shape, p, 0));
    if (shape.warps == 0) return small;
    DNC_CHECK(launch(Grid{shape.blocks, unsigned(shape.warps) * 32, stream, shape.shared},
                     class_scores_sm80_kernel<T, kPlanes, Out>, p, out));
  }
  return {};
}

template <class Out>
Status run(const Problem& p, const Packed& packed, const View& centroids, const Out& out, DType dtype, cudaStream_t stream) {
  DNC_CHECK(packed.pack(centroids, p.metric, dtype, stream));
  if (dtype == DType::bfloat16) {
    return p.planes ? run_as<BFloat16, true>(p, out, dtype, stream) : run_as<BFloat16, false>(p, out, dtype, stream);
  }
  return p.planes ? run_as<Float16, true>(p, out, dtype, stream) : run_as<Float16, false>(p, out, dtype, stream);
}

size_t workspace(const View& centroids, Metric metric) {
  Parts parts(nullptr);
  Packed packed(parts, centroids, metric);
  return parts.bytes();
}

}  // namespace

size_t class_scores_workspace(const ClassScores& a) { return workspace(a.centroids, a.metric); }

Status class_scores(const ClassScores& a, const Launch& where) {
  if (const char* why = refuses(a.x, a.centroids)) return bad_argument(why);
  if (a.distance) return bad_argument("distances are not made by the CUDA kernel");
  if (!enough(where, class_scores_workspace(a))) return too_small();
  const OnDevice device(where);
  DNC_CHECK(device.error());
  Parts parts(where.workspace);
  const Packed packed(parts, a.centroids, a.metric);
  Problem p = problem_of(a.x, a.centroids, a.metric, packed);
  if (p.N == 0) return {};
  p.labels = a.labels.as<int64_t>(), p.own = a.own_similarity.as<float>();
  const ToScores out{PixelMap(a.scores), a.winner ? PixelMap(a.winner) : PixelMap{}};
  return run(p, packed, a.centroids, out, a.x.dtype, static_cast<cudaStream_t>(where.stream));
}

size_t nearest_centroid_workspace(const NearestCentroid& a) { return workspace(a.centroids, a.metric); }

Status nearest_centroid(const NearestCentroid& a, const Launch& where) {
  if (const char* why = refuses(a.x, a.centroids)) return bad_argument(why);
  if (!enough(where, nearest_centroid_workspace(a))) return too_small();
  const OnDevice device(where);
  DNC_CHECK(device.error());
  Parts parts(where.workspace);
  const Packed packed(parts, a.centroids, a.metric);
  const Problem p = problem_of(a.x, a.centroids, a.metric, packed);
  if (p.N == 0) return {};
  const ToNearest out{a.label.as<int64_t>(), a.sub.as<int64_t>(), a.score.as<float>()};
  return run(p, packed, a.centroids, out, a.x.dtype, static_cast<cudaStream_t>(where.stream));
}

}  // namespace cuda
}  // namespace dnc
