// Sinkhorn backward: the adjoint of dnc/sinkhorn.h unrolled over all steps, from the potentials u[1..T] that the forward pass
// kept.
//
//   Z = s/epsilon, P = softmax_k(Z + u[T]), G = grad_plan, S_t[n,k] = softmax_k(Z + u[t])
//   W_t[n,k] = exp(Z + v[t-1] + u[t] + log K): each column of a group sums to 1, since u[t] is that column's logsumexp
//   A = P (G - sum_k G P);  dZ = A;  du[T] = sum_n A
//   t = T..1:  dZ -= du[t] W_t;  dv[t-1] = -sum_k du[t] W_t;  and for t > 1:  dZ -= dv[t-1] S_{t-1};  du[t-1] = -sum_n dv[t-1]
//   S_{t-1} grad_similarity = dZ/epsilon
//
// Every step is one pass: reads similarity [N,K] and 4 bytes a pixel, reads and writes grad_similarity [N,K] (dZ until the last
// step); v and S are recomputed, so nothing else of size [N,K] exists. Sums over pixels as in the forward pass: fixed chunks,
// added in order. Reference: autograd through dnc_kernels/ops/sinkhorn/reference.py.
#include "dnc/sinkhorn.h"
#include "sinkhorn_rows.h"

namespace dnc::cpu::DNC_ISA {
namespace {

template <class T, int NV>
struct Adjoint {
  using V = Vec<T>;
  const SinkhornBackward& a;
  const Rows<T> s, grad_plan;
  const Lanes<T, NV> lanes;
  const Chunks chunks;
  const int64_t N, K, G, width;
  const T inverse;
  const int64_t* const steps;

  const Scratch ids, buffers, partial, counted, tables, group_info;
  int32_t* const id;          // [N] group, -1: left out
  T* const part;              // [chunk,G,width]
  int32_t* const part_count;  // [chunk,G]
  T* const du;                // [G,width]
  T* const before;            // [G,width] u[t-1] - max_k u[t-1], -inf in padding
  T* const now;               // [G,width] u[t] + log K, -inf in padding
  int64_t* const count;       // [G] pixels

  explicit Adjoint(const SinkhornBackward& a)
      : a(a),
        s(a.similarity),
        grad_plan(a.grad_plan),
        lanes(s.K),
        chunks(s.N, a.groups),
        N(s.N),
        K(s.K),
        G(a.groups),
        width(lanes.width),
        inverse(inverse_epsilon<T>(a.epsilon)),
        steps(a.steps.as<int64_t>()),
        ids(sizeof(int32_t) * N),
        buffers(sizeof(T) * chunks.count * 2 * width),
        partial(sizeof(T) * chunks.count * G * width),
        counted(sizeof(int32_t) * chunks.count * G),
        tables(sizeof(T) * G * 3 * width),
        group_info(sizeof(int64_t) * G),
        id(ids.as<int32_t>()),
        part(partial.as<T>()),
        part_count(counted.as<int32_t>()),
        du(tables.as<T>()),
        before(du + G * width),
        now(before + G * width),
        count(group_info.as<int64_t>()) {}

  Status run() {
    if (!ids.data || !buffers.data || !partial.data || !counted.data || !tables.data || !group_info.data)
      return {Code::out_of_memory};
    int64_t last = 0;
    for (int64_t g = 0; g < G; g++) {
      if (steps[g] < 0 || steps[g] >= a.history.size[0]) return bad_argument("steps and history do not belong together");
      last = steps[g] > last ? steps[g] : last;
      centre(g, steps[g], before + g * width);
    }
    through_plan();
    for (int64_t g = 0; g < G; g++) {
      count[g] = 0;
      for (int64_t c = 0; c < chunks.count; c++) count[g] += part_count[c * G + g];
      total(g);
    }
    for (int64_t t = last; t >= 1; t--) {
      for (int64_t g = 0; g < G; g++) {
        if (steps[g] < t) continue;
        if (t > 1) centre(g, t - 1, before + g * width);
        const T log_K = std::log(T(K)), *const u = row(t, g);
        for (int64_t k = 0; k < width; k++) now[g * width + k] = k < K ? u[k] + log_K : T(-INFINITY);
      }
      t > 1 ? through_step<false>(t) : through_step<true>(t);
      for (int64_t g = 0; t > 1 && g < G; g++)
        if (steps[g] >= t) total(g);
    }
    return {};
  }

  const T* row(int64_t t, int64_t g) const { return a.history.as<T>() + (t * G + g) * K; }

  // u[t] - max u[t]; zeros for t = 0, where the plan is softmax(Z)
  void centre(int64_t g, int64_t t, T* out) const {
    const T* const u = row(t, g);
    T most = t ? u[0] : T(0);
    for (int64_t k = 1; t && k < K; k++) most = u[k] > most ? u[k] : most;
    for (int64_t k = 0; k < width; k++) out[k] = k >= K ? T(-INFINITY) : t ? u[k] - most : T(0);
  }

  void total(int64_t g) {
    for (int64_t k = 0; k < width; k++) {
      T sum = 0;
      for (int64_t c = 0; c < chunks.count; c++) sum += part[(c * G + g) * width + k];
      du[g * width + k] = sum;
    }
  }

  // softmax_k((s - shift)/epsilon + u) into p; returns the logsumexp
  DNC_INLINE T softmax(const T* row, V shift, const T* u, T* p) const {
    const V scale = V::splat(inverse);
    V most = V::splat(-INFINITY);
    for (int64_t j = 0; j < lanes.count(); j++) {
      const V x = scaled(lanes.load(row, j), shift, scale) + V::load(u + j * V::lanes);
      x.store(p + j * V::lanes);
      most = max(most, x);
    }
    const T m = most.max();
    V r = V::splat(T(0));
    for (int64_t j = 0; j < lanes.count(); j++) {
      const V e = exp(V::load(p + j * V::lanes) - V::splat(m));
      e.store(p + j * V::lanes);
      r = r + e;
    }
    const T sum = r.sum();
    for (int64_t j = 0; j < lanes.count(); j++) (V::load(p + j * V::lanes) / V::splat(sum)).store(p + j * V::lanes);
    return m + std::log(sum);
  }

  // grad_similarity = A, part = its column sums; which pixels count.
  void through_plan() {
    const int64_t* const group = a.group ? a.group.as<int64_t>() : nullptr;
    chunks.each(a.threads, [&](int64_t c, int64_t begin, int64_t end) {
      T *const p = buffers.as<T>() + c * 2 * width, *const buffer = p + width;
      GroupSums<T, NV> sums(part + c * G * width, G, width);
      int32_t* const pixels = part_count + c * G;
      std::memset(pixels, 0, sizeof(int32_t) * G);
      for (int64_t n = begin; n < end; n++) {
        T* const d = a.grad_similarity.as<T>() + n * K;
        const int64_t g = group ? group[n] : 0;
        const T* x = nullptr;
        if (g >= 0 && g < G) x = s.row(n, buffer);
        if (!x || !lanes.finite(x)) {
          id[n] = -1;
          std::memset(d, 0, sizeof(T) * K);
          continue;
        }
        id[n] = int32_t(g);
        pixels[g]++;
        softmax(x, V::splat(lanes.largest(x)), before + g * width, p);
        const T* const up = grad_plan.row(n, buffer);
        V dot = V::splat(T(0));
        for (int64_t j = 0; j < lanes.count(); j++) dot = fma(lanes.load(up, j), V::load(p + j * V::lanes), dot);
        const V mean = V::splat(dot.sum()), scale = V::splat(steps[g] ? T(1) : inverse), one = V::splat(T(1));
        sums.select(g);
        for (int64_t j = 0; j < lanes.count(); j++) {
          const V A = V::load(p + j * V::lanes) * (lanes.load(up, j) - mean);
          lanes.store(d, j, A * scale);
          sums.add(j, A, one);
        }
      }
      sums.flush();
    });
  }

  // Step t of the groups that did it: dZ, and part = du[t-1].
  template <bool first>
  void through_step(int64_t t) {
    chunks.each(a.threads, [&](int64_t c, int64_t begin, int64_t end) {
      T *const S = buffers.as<T>() + c * 2 * width, *const buffer = S + width;
      GroupSums<T, NV> sums(part + c * G * width, G, width);
      for (int64_t n = begin; n < end; n++) {
        const int64_t g = id[n];
        if (g < 0 || steps[g] < t) continue;
        const T* const x = s.row(n, buffer);
        T* const d = a.grad_similarity.as<T>() + n * K;
        const V scale = V::splat(inverse), shift = V::splat(first ? row(0, g)[0] : lanes.largest(x));
        const V v = V::splat(first ? T(0) : -std::log(T(count[g])) - softmax(x, shift, before + g * width, S));
        V dv = V::splat(T(0));
        for (int64_t j = 0; j < lanes.count(); j++) {
          const V W = exp(scaled(lanes.load(x, j), shift, scale) + v + V::load(now + g * width + j * V::lanes));
          const V w = W * V::load(du + g * width + j * V::lanes);
          const V left = lanes.load(d, j) - w;
          lanes.store(d, j, first ? left * scale : left);
          dv = dv - w;
        }
        if (first) continue;
        dv = V::splat(dv.sum());
        sums.select(g);
        for (int64_t j = 0; j < lanes.count(); j++) {
          const V q = V::load(S + j * V::lanes);
          lanes.store(d, j, lanes.load(d, j) - dv * q);
          sums.add(j, V::splat(T(0)) - dv, q);
        }
      }
      sums.flush();
    });
  }
};

template <class T>
Status adjoint(const SinkhornBackward& a) {
  const int64_t K = a.similarity.size[1];
  if (K <= Vec<T>::lanes) return Adjoint<T, 1>(a).run();
  if (K <= 2 * Vec<T>::lanes) return Adjoint<T, 2>(a).run();
  return Adjoint<T, 0>(a).run();
}

}  // namespace

Status sinkhorn_backward(const SinkhornBackward& a) {
  if (a.similarity.ndim != 2 || a.similarity.size[1] < 1) return bad_argument("similarity must be [N,K] with K > 0");
  if (a.groups < 1 || a.groups > INT32_MAX) return bad_argument("num_groups must be in [1, 2^31)");
  return a.similarity.dtype == DType::float64 ? adjoint<double>(a) : adjoint<float>(a);
}

}  // namespace dnc::cpu::DNC_ISA
