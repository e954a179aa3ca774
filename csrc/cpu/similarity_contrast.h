// The work of similarity_contrast.cpp on one tile, and the packed sub-centroids that all tiles share: head.cpp packs once for
// all of its bands.
//
// The sweep of similarity_panels.h leaves a tile's similarities in the layout that it reads pixels in, as [block][slot][row],
// or as rows on AMX: after exp the tile is the left factor of a second sweep, over sub-centroids packed with channels as lanes.
#pragma once
#include "similarity_gradient.h"
#include "similarity_scores.h"

namespace dnc::cpu::DNC_ISA {
namespace {

#if defined(DNC_ISA_AMX)
// Takes similarities as rows [row][ld], and class maxima too where they are wanted.
template <class T>
struct Similarities {
  static constexpr int L = Vec<T>::lanes;
  T* out;
  int64_t ld;
  ClassMax<T>* maxima;
  DNC_INLINE T at(int r, int64_t slot) const { return out[r * ld + slot]; }
  DNC_INLINE T* direct(int b, int64_t j) const { return maxima ? nullptr : out + int64_t(b) * kRows * ld + j * L; }
  DNC_INLINE void operator()(int b, int64_t j, const Vec<T> (&acc)[kRows]) {
    if (maxima) (*maxima)(b, j, acc);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) acc[r].store(out + (int64_t(b) * kRows + r) * ld + j * L);
  }
};

// One block of similarities becomes exp((s - max) / temperature); a row of `skip` becomes zero. `packed` of the slots come out
// of the sweep. A row of bfloat16 lies where its float32 lay: what is written has been read.
template <class T>
void block_softmax(T* block, int64_t slots, int64_t packed, T scale, const bool* skip, T* top, T* sum) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  const V f = V::splat(scale);
  for (int r = 0; r < kRows; r++) {
    T* row = block + r * slots;
    BFloat16* out = reinterpret_cast<BFloat16*>(row);
    if (skip[r]) {
      std::memset(row, 0, size_t(slots) * sizeof(BFloat16));
      continue;
    }
    V most[2] = {V::load(row), V::load(row)}, total[2] = {V::splat(0), V::splat(0)};
    for (int64_t i = 0; i < packed; i += L) most[i / L % 2] = max(V::load(row + i), most[i / L % 2]);
    top[r] = max(most[0], most[1]).max();
    const V high = V::splat(top[r]);
    for (int64_t i = 0; i < packed; i += L) {
      const V e = exp((V::load(row + i) - high) * f);
      Store<T, BFloat16>::at(e, out + i);
      total[i / L % 2] = total[i / L % 2] + e;
    }
    if (packed < slots) std::memset(out + packed, 0, size_t(slots - packed) * sizeof(BFloat16));
    sum[r] = (total[0] + total[1]).sum();
  }
}
#else
// Takes similarities as [block][slot][row], and class maxima too where they are wanted.
template <class T>
struct Similarities {
  static constexpr int L = Vec<T>::lanes;
  T* out;
  int64_t slots;
  ClassMax<T>* maxima;
  DNC_INLINE T at(int r, int64_t slot) const { return out[(r / kRows * slots + slot) * kRows + r % kRows]; }
  DNC_INLINE void operator()(int b, int64_t j, const Vec<T> (&acc)[kRows]) {
    if (maxima) (*maxima)(b, j, acc);
    T rows[kRows][L];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) acc[r].store(rows[r]);
    T* o = out + (b * slots + j * L) * kRows;
    for (int l = 0; l < L; l++)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) o[l * kRows + r] = rows[r][l];
  }
};

constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

// One block of similarities becomes exp((s - max) / temperature); a row of `skip` becomes zero.
template <class T>
void block_softmax(T* block, int64_t slots, int64_t, T scale, const bool* skip, T* top, T* sum) {
  using V = Vec<T>;
  constexpr int L = V::lanes, cycle = kRows / gcd(kRows, L), length = cycle * L;  // vectors until lanes meet the same rows
  const int64_t count = slots * kRows;
  T lane[length];
  V most[cycle], total[cycle];
  for (int c = 0; c < cycle; c++) most[c] = V::splat(-INFINITY), total[c] = V::splat(0);
  for (int64_t i = 0; i < count; i += length)
#pragma GCC unroll 4
    for (int c = 0; c < cycle; c++) most[c] = max(V::load(block + i + c * L), most[c]);
  for (int c = 0; c < cycle; c++) most[c].store(lane + c * L);
  for (int r = 0; r < kRows; r++) {
    top[r] = lane[r];
    for (int i = r; i < length; i += kRows) top[r] = lane[i] > top[r] ? lane[i] : top[r];
  }
  // minus infinity goes through exp to an exact zero
  for (int i = 0; i < length; i++) lane[i] = skip[i % kRows] ? T(INFINITY) : top[i % kRows];
  for (int c = 0; c < cycle; c++) most[c] = V::load(lane + c * L);
  const V f = V::splat(scale);
  for (int64_t i = 0; i < count; i += length)
#pragma GCC unroll 4
    for (int c = 0; c < cycle; c++) {
      const V e = exp((V::load(block + i + c * L) - most[c]) * f);
      e.store(block + i + c * L);
      total[c] = total[c] + e;
    }
  for (int c = 0; c < cycle; c++) total[c].store(lane + c * L);
  for (int r = 0; r < kRows; r++) {
    sum[r] = 0;
    for (int i = r; i < length; i += kRows) sum[r] += lane[i];
  }
}
#endif

// Sub-centroids as the tiles of a call read them, and how long a tile is.
template <class T>
struct ContrastPlan {
  const PanelLayout<T> lay, channels;
  const bool contrast, gradient;  // the softmax, its gradient; without: class scores alone
  Scratch panels, channel_panels;
  CentroidRows<T> centroids;
  int rows = 0, blocks = 0;
  size_t partial = 0;

  // Of at most N pixels; `scored`: class scores are written.
  ContrastPlan(const View& given, int64_t N, bool scored, bool contrast_, bool gradient_, int threads)
      : lay(given.size[0], given.size[1], given.size[2], operand_parts(given, Metric::dot)),
        channels(weight_layout(lay)),
        contrast(contrast_),
        gradient(gradient_ && contrast_),
        panels(lay.bytes()),
        channel_panels(gradient ? channels.bytes() : 0),
        centroids(given, Metric::dot, threads) {
    if (!ok() || N == 0) return;
    pack_panels(lay, given, Metric::dot, panels.as<Operand<T>>(), threads);
    if (gradient) pack_channels(lay, channels, centroids.rows, channel_panels.as<Operand<T>>(), threads);
    const int64_t second = gradient ? channels.width + (slots() > kDeep ? kPanelsInRun * Vec<T>::lanes : 0) : 0;
    const int64_t wide = (contrast ? slots() : 0) + second;
    rows = tile_rows(lay.D, wide * sizeof(T) + (scored ? lay.width * (sizeof(T) + 1) : 0), N, sizeof(T));
    blocks = rows / kRows;
    partial = size_t(max64(partial_size(lay, blocks), gradient ? partial_size(channels, blocks) : 0));
  }
  // Channels as lanes, slots as depth; a row of weights lies where its similarities of type T lay.
  static PanelLayout<T> weight_layout(const PanelLayout<T>& lay) {
    PanelLayout<T> channels(lay.D, 1, lay.slots(), lay.parts);
    channels.ld = channels.depth * int64_t(sizeof(T) / sizeof(Operand<T>));
    return channels;
  }
  int64_t slots() const { return channels.depth; }  // of a pixel's weights: those of `lay`, in whole steps
  bool ok() const { return panels.data && channel_panels.data && centroids.rows; }
  size_t own_bytes() const {
    const size_t weights = contrast ? slots() : 0, mean = gradient ? channels.width : 0;
    return ((size_t(rows) * (lay.D + weights + mean + 3) + partial) * sizeof(T) + rows + 63) / 64 * 64;
  }
  size_t bytes() const { return own_bytes() + ScoreTile<T>::bytes(lay, rows); }  // of a thread
};

// Tiles of a call, in memory of a thread: the one that makes the object, which configures its tile registers. So while it
// lives, the thread makes no other such object and calls no other product.
template <class T>
struct ContrastTiles {
  [[maybe_unused]] const Tiles registers{};
  const SubcentroidCrossEntropy& a;
  const ContrastPlan<T>& plan;
  const Pixels x;
  const int64_t N, tiles;
  const T scale, coefficient;
  Operand<T>* tile;
  T *weights, *mean, *partials, *top, *sum, *own;  // weights as Similarities leave them; own: of the target
  bool* skip;
  ScoreTile<T> score;

  ContrastTiles(const SubcentroidCrossEntropy& args, const ContrastPlan<T>& p, void* memory)
      : a(args),
        plan(p),
        x(args.scores.x),
        N(x.N()),
        tiles((N + p.rows - 1) / p.rows),
        scale(T(1 / args.temperature)),
        coefficient(scale * (args.scale ? args.scale.as<T>()[0] : T(1))),
        tile(static_cast<Operand<T>*>(memory)),
        weights(static_cast<T*>(memory) + p.rows * p.lay.D),
        mean(weights + (p.contrast ? p.rows * p.slots() : 0)),
        partials(mean + (p.gradient ? p.rows * p.channels.width : 0)),
        top(partials + p.partial),
        sum(top + p.rows),
        own(sum + p.rows),
        skip(reinterpret_cast<bool*>(own + p.rows)),
        score(args.scores, p.lay, p.rows, static_cast<char*>(memory) + p.own_bytes()) {}

  void run(int64_t t) {
    const ClassScores& s = a.scores;
    const PanelLayout<T>& lay = plan.lay;
    const int64_t n0 = t * plan.rows, K = lay.K, slots = plan.slots();
    const int n = int(min64(plan.rows, N - n0)), used = (n + kRows - 1) / kRows;
    pack_tile(x, n0, n, tile);
    if (s.scores) score.begin(n0, n);
    auto maxima = score.take();
    if (!plan.contrast) {
      sweep(lay, plan.panels.template as<Operand<T>>(), tile, used, partials, maxima);
      score.finish(n0, n, tile);
      return;
    }
    auto target = [&](int r) { return a.target.as<int64_t>()[n0 + r]; };
    for (int r = 0; r < used * kRows; r++) {
      skip[r] = r >= n;
      if (r < n && a.target) skip[r] = target(r) < 0 || target(r) == a.ignore_index;
      if (r < n && !a.target && s.labels) {
        const int64_t y = s.labels.as<int64_t>()[n0 + r];
        skip[r] = y < 0 || y >= lay.C;
      }
    }
    Similarities<T> take{weights, slots, s.scores ? &maxima : nullptr};
    sweep(lay, plan.panels.template as<Operand<T>>(), tile, used, partials, take);
    if (s.scores) score.finish(n0, n, tile);
    if (a.target)
      for (int r = 0; r < n; r++) {
        if (skip[r]) continue;
        own[r] = take.at(r, lay.slot(target(r) / K, target(r) % K));
      }
    for (int b = 0; b < used; b++)
      block_softmax(weights + b * slots * kRows, slots, lay.slots(), scale, skip + b * kRows, top + b * kRows, sum + b * kRows);
    for (int r = 0; r < n; r++) {
      // the target is taken from the maximum first: both can be large where their difference is not
      const double from_top = double(top[r]) - (a.target && !skip[r] ? double(own[r]) : 0.0);
      a.loss.as<T>()[n0 + r] = skip[r] ? T(0) : T(from_top * double(scale) + std::log(double(sum[r])));
    }
    if (!plan.gradient) return;
    Rows<T> into{plan.channels.width, plan.channels.width, mean};
    sweep(plan.channels, plan.channel_panels.template as<Operand<T>>(), reinterpret_cast<const Operand<T>*>(weights), used,
          partials, into);
    for (int r = 0; r < n; r++) {
      T* g = mean + r * plan.channels.width;
      if (skip[r]) {
        std::memset(g, 0, size_t(x.D) * sizeof(T));
        continue;
      }
      const T factor = coefficient / sum[r];
      if (a.target) {
        const T* p = plan.centroids.rows + target(r) * x.D;
        for (int64_t d = 0; d < x.D; d++) g[d] = g[d] * factor - p[d] * coefficient;
      } else {
        for (int64_t d = 0; d < x.D; d++) g[d] *= factor;
      }
    }
    store_tile(Pixels(a.grad_x), n0, n, mean, plan.channels.width);
  }
};

}  // namespace
}  // namespace dnc::cpu::DNC_ISA
