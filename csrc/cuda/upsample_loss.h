// What the loss and the gradient of upsample_cross_entropy share: upsample_loss.cu, upsample_gradient.cu.
#pragma once
#include "upsample_classes.h"

namespace dnc {
namespace cuda {

// A call, for some of its samples.
struct UpsampleCall {
  Source scores;
  Labels labels;
  const float* weight;  // [C] or null
  Axis rows, columns;
  int B, C;
  int64_t ignored;
  float smoothing;
  float* lse;     // [B,H,W] log-sum-exp in powers of 2
  bool adjacent;  // classes are neighbours in memory
};

// Gradient of the scores, from the log-sum-exp that the loss left. upsample_gradient.cu.
struct UpsampleGradient {
  const float* grad_loss;  // [B,H,W] or null: 1
  int64_t lb, lh, lw;      // its strides
  float* out;              // [B,C,h,w]
  int64_t ob, oc, oh, ow;
};
Status upsample_gradient(const UpsampleCall&, const UpsampleGradient&, DType scores, cudaStream_t);

}  // namespace cuda
}  // namespace dnc
