// Rows that bands leave for the label rows between them.
//
// A seam lies between band i and band i + 1 of a sample. Each of the two leaves one row there, and learns whether it was the
// second: that one computes the seam. So nobody waits. Bands are begun in order, so that few seams are open at a time: those of
// the bands at work, and those at the ends of the runs that are begun.
#pragma once
#include <omp.h>

#include "simd.h"

namespace dnc::cpu::DNC_ISA {
namespace {

// Two rows of w pixels of `width` classes: the last of the upper band, the first of the lower one.
template <class T>
struct Slot {
  T *scores = nullptr, *to_logits = nullptr;
  uint8_t* winner = nullptr;
};

template <class T>
class Seams {
 public:
  // Of `bands` bands; 0: there are no seams.
  Seams(int64_t bands, int threads, int64_t w, int64_t width)
      : size_(2 * w * width),
        bytes_((size_ * int64_t(2 * sizeof(T) + 1) + 63) / 64 * 64),
        most_(bands < 4 * threads + 2 ? bands : 4 * int64_t(threads) + 2),
        free_count_(most_),
        memory_(size_t(most_ * bytes_)),
        places_(size_t(2 * bands + most_) * sizeof(int32_t)) {
    omp_init_lock(&lock_);
    if (!ok()) return;
    place_ = places_.as<int32_t>(), arrived_ = place_ + bands, free_ = arrived_ + bands;
    for (int64_t i = 0; i < bands; i++) place_[i] = -1, arrived_[i] = 0;
    for (int64_t i = 0; i < most_; i++) free_[i] = int32_t(i);
  }
  ~Seams() { omp_destroy_lock(&lock_); }
  Seams(const Seams&) = delete;
  Seams& operator=(const Seams&) = delete;
  bool ok() const { return memory_.data && places_.data; }

  // Where the rows of a seam lie. False: no place is left.
  bool slot(int64_t seam, Slot<T>* out) {
    omp_set_lock(&lock_);
    if (place_[seam] < 0 && free_count_ > 0) place_[seam] = free_[--free_count_];
    const int64_t at = place_[seam];
    omp_unset_lock(&lock_);
    if (at < 0) return false;
    char* memory = memory_.as<char>() + at * bytes_;
    out->scores = reinterpret_cast<T*>(memory), out->to_logits = out->scores + size_;
    out->winner = reinterpret_cast<uint8_t*>(out->to_logits + size_);
    return true;
  }
  // Says that a row was left; true for the second one. The lock makes the other's row visible here.
  bool second(int64_t seam) {
    omp_set_lock(&lock_);
    const int count = ++arrived_[seam];
    omp_unset_lock(&lock_);
    return count == 2;
  }
  void give_back(int64_t seam) {
    omp_set_lock(&lock_);
    free_[free_count_++] = place_[seam];
    omp_unset_lock(&lock_);
  }

 private:
  const int64_t size_, bytes_, most_;
  int64_t free_count_;
  const Scratch memory_, places_;
  int32_t *place_ = nullptr, *arrived_ = nullptr, *free_ = nullptr;
  omp_lock_t lock_;
};

}  // namespace
}  // namespace dnc::cpu::DNC_ISA
