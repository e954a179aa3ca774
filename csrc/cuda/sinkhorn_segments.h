// Sums over the rows of each group in a sorted tile (sinkhorn_tile.h). They run over the rows in order; a segment that spans
// warps is added up by the warp where it starts. What crosses blocks is an integer, so that no order of atomics changes a bit.
#pragma once
#include "sinkhorn_tile.h"

namespace dnc {
namespace cuda {
namespace sinkhorn_tile {

// The rows of a warp as segments of one group each; rows that are left out lie behind the last.
struct Segments {
  int group;  // of this lane's row
  int count;
  int head;  // position of the first row of this lane's group, in the tile
  bool from_before, into_next;
};

template <int L>
__device__ Segments find_segments(const Block<L>& b, int t) {
  constexpr int W = Block<L>::kRows;
  const int32_t* group = b.group(t);
  Segments s;
  s.group = group[b.position];
  const int before = __shfl_up_sync(~0u, s.group, L);
  const bool begins = b.column == 0 && s.group >= 0 && (b.lane < L || before != s.group);
  const unsigned heads = __ballot_sync(~0u, begins), used = __ballot_sync(~0u, s.group >= 0);
  s.count = __popc(heads);
  if (begins) b.starts()[__popc(heads & ((1u << b.lane) - 1))] = uint8_t(unsigned(b.lane) / L);
  if (b.lane == 0) b.starts()[s.count] = uint8_t(__popc(used) / L);
  s.head = b.head(t)[b.position];
  const int first = b.base(), next = first + W;
  s.from_before = s.count > 0 && b.warp > 0 && group[first - 1] == group[first];
  s.into_next = s.count > 0 && b.warp + 1 < b.warps() && group[next] >= 0 && group[next - 1] == group[next];
  __syncwarp();  // the starts are complete
  return s;
}

// For every segment, of all warps together, and every column: value(k, begin, end) of the positions that a warp has of it,
// joined by join(k, a, b) in order of the warps, once to emit(group, k, value). All threads call it.
template <int L, class Value, class Join, class Emit>
__device__ void each_segment(const Block<L>& b, int t, const Segments& s, int columns, Value value, Join join, Emit emit) {
  constexpr int W = Block<L>::kRows;
  const int base = b.base();
  const int32_t* groups = b.group(t);
  float *continued = b.edges(), *begun = continued + b.warps() * columns;
  for (int segment = 0, k = b.lane;; k += 32) {
    while (k >= columns) k -= columns, segment++;
    if (segment >= s.count) break;
    const int begin = base + b.starts()[segment], end = base + b.starts()[segment + 1];
    const float v = value(k, begin, end);
    if (segment == 0 && s.from_before) {
      continued[b.warp * columns + k] = v;
    } else if (segment == s.count - 1 && s.into_next) {
      begun[b.warp * columns + k] = v;
    } else {
      emit(groups[begin], k, v);
    }
  }
  __syncthreads();  // the edges of all warps are there
  if (s.into_next && !(s.from_before && s.count == 1)) {
    const int group = groups[base + W];
    const bool same = b.lane > b.warp && b.lane < b.warps() && groups[b.lane < b.warps() ? b.lane * W : 0] == group;
    const int end = b.warp + 1 + __popc(__ballot_sync(~0u, same));  // the warps of a group are neighbours
    for (int k = b.lane; k < columns; k += 32) {
      float v = begun[b.warp * columns + k];
      for (int w = b.warp + 1; w < end; w++) v = join(k, v, continued[w * columns + k]);
      emit(group, k, v);
    }
  }
}

// Sums of the columns of `work` over the rows of each segment, added to table [G,K] as integers of scale(group).
template <int L>
__device__ void add_segments(const Block<L>& b, int t, const Segments& s, float scale, unsigned long long* table) {
  const float* work = b.work();
  const int pitch = b.pitch, K = b.K;
  each_segment(
      b, t, s, K,
      [=](int k, int begin, int end) {
        float sum = 0;
        for (int p = begin; p < end; p++) sum += work[p * pitch + k];
        return sum;
      },
      [](int, float x, float y) { return x + y; },
      [=](int32_t group, int k, float sum) {
        const long long units = __float2ll_rn(sum * scale);
        if (units != 0) atomicAdd(table + int64_t(group) * K + k, static_cast<unsigned long long>(units));
      });
}
__device__ inline float from_units(unsigned long long units) { return float(static_cast<long long>(units)); }

}  // namespace sinkhorn_tile
}  // namespace cuda
}  // namespace dnc
