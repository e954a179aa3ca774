// Cross-entropy and argmax of bilinearly upsampled scores (sizes may also shrink).
#pragma once
#include "dnc/common.h"
#include "dnc/cuda.h"

namespace dnc {

// loss of label pixel (b,i,j): cross-entropy of the scores interpolated at its position. Gradients are those of
// sum over pixels of grad_loss * loss; a mean is divided afterwards, so that gradients stay far from underflow.
//
// The four row numbers describe a window of larger maps: scores are rows source_row0.. of source_rows, labels rows
// target_row0.. of target_rows. Every source row that the given labels are interpolated from must be given. 0 rows: not a
// window.
struct UpsampleCrossEntropy {
  View scores;  // [B,C,h,w], float32/float64/float16/bfloat16, any strides
  View labels;  // [B,H,W] int64, int32 or uint8, any strides; in [0,C); ignore_index or any negative id: left out
  int64_t source_rows = 0, source_row0 = 0, target_rows = 0, target_row0 = 0;
  bool align_corners = false;
  View class_weight;  // optional [C] of the compute type (float64 for float64 scores, else float32)
  int64_t ignore_index = -100;
  double label_smoothing = 0.0;
  View grad_loss;    // optional [B,H,W] of the compute type, any strides; absent: 1
  View sums;         // out, optional [2] float64: sum of the losses, sum of the class weights of the pixels that count
  View loss;         // out, optional [B,H,W] of the compute type, contiguous; 0 where ignored
  View grad_scores;  // out, optional, the shape of scores, of the compute type, any strides without overlap
  int threads = 1;
};
Status upsample_cross_entropy(const UpsampleCrossEntropy&);

// The class of the largest interpolated score, the lowest on ties; NaN counts as the largest.
struct UpsampleArgmax {
  View scores;  // as above
  bool align_corners = false;
  View label;  // out [B,H,W] int64, contiguous
  int threads = 1;
};
Status upsample_argmax(const UpsampleArgmax&);

// float32, float16 and bfloat16 scores; gradients are float32. Maps have fewer than 2^29 rows and columns, and a class
// of a sample spans less than 4 GB. The loss works in B*H*W floats where a gradient is asked for.
namespace cuda {
size_t upsample_cross_entropy_workspace(const UpsampleCrossEntropy&);
Status upsample_cross_entropy(const UpsampleCrossEntropy&, const Launch&);
size_t upsample_argmax_workspace(const UpsampleArgmax&);
Status upsample_argmax(const UpsampleArgmax&, const Launch&);
}  // namespace cuda

}  // namespace dnc
