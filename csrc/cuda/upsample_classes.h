// Scores of one class after another at the corners of the cells of a warp.
//
// Where the pixels of a class are neighbours in memory, each thread loads its own corners, those of the next class while this
// one is worked on. Where the classes of a pixel are (channels_last), that would touch 32 lines for 32 scores: there a warp
// fetches kRun classes of its pixels together, as runs of memory, and hands them out through shared memory.
#pragma once
#include "upsample_cells.h"

namespace dnc {
namespace cuda {

constexpr int kRun = 8;
// kRun classes of the corners of a warp's cells; 33: all lanes of a run write to different banks.
struct ClassRun {
  float at[kRun][4][33];
};
// The classes of a pixel are neighbours.
inline bool adjacent_classes(const View& scores) {
  return scores.stride[1] == 1 && scores.size[1] > 1 && scores.stride[3] != 1;
}

template <class S, bool kAdjacent>
class ClassReader;

template <class S>
class ClassReader<S, false> {
 public:
  // `plane`: of class 0; `offset`: of this thread's corners.
  __device__ ClassReader(const char* plane, int64_t sc, const uint32_t (&offset)[4], int first, int end, ClassRun*)
      : plane_(plane + min(first, end - 1) * sc),
        sc_(sc),
        offset_(offset),
        end_(end),
        coming_(load_corners<S>(plane_, offset)) {}
  // Scores of class c; `next` will be asked for after it, if it is below the end.
  __device__ Corners read(int c, int next) {
    const Corners now = coming_;
    plane_ += next < end_ ? (next - c) * sc_ : 0;
    coming_ = load_corners<S>(plane_, offset_);
    return now;
  }

 private:
  const char* plane_;
  int64_t sc_;
  const uint32_t (&offset_)[4];
  int end_;
  Corners coming_;
};

// Whole warps call it, and begin every run of kRun classes at its first one.
template <class S>
class ClassReader<S, true> {
 public:
  __device__ ClassReader(const char* plane, int64_t, const uint32_t (&offset)[4], int, int end, ClassRun* run)
      : plane_(plane), offset_(offset), end_(end), run_(run) {}
  __device__ Corners read(int c, int) {
    const int lane = threadIdx.x % 32;
    if (c % kRun == 0) fetch(c);
    const auto& at = run_->at[c % kRun];
    return {at[0][lane], at[1][lane], at[2][lane], at[3][lane]};
  }

 private:
  __device__ void fetch(int first) {
    const int lane = threadIdx.x % 32, c = lane % kRun;
    const char* plane = plane_ + int64_t(min(first + c, end_ - 1)) * int64_t(sizeof(S));
    __syncwarp();  // all lanes have read the run before
#pragma unroll
    for (int q = 0; q < 4; q++) {
#pragma unroll
      for (int i = 0; i < kRun; i++) {
        const int of = i * (32 / kRun) + lane / kRun;
        const uint32_t offset = __shfl_sync(~0u, offset_[q], of);
        run_->at[c][q][of] = to_float(*reinterpret_cast<const S*>(plane + offset));
      }
    }
    __syncwarp();  // the run is complete
  }

  const char* plane_;
  const uint32_t (&offset_)[4];
  int end_;
  ClassRun* run_;
};

}  // namespace cuda
}  // namespace dnc
