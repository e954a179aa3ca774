// l2_normalize(LayerNorm(x)): the embedding of a pixel (DNC, released head).
#pragma once
#include "dnc/cuda.h"

namespace dnc {

// z = (x - mean) * rstd * weight + bias over the D channels of each pixel; y = z / max(|z|, 1e-12).
struct NormalizeEmbedding {
  View x;             // [N,D] or [B,D,H,W], float32/float64/float16/bfloat16, any strides
  View weight, bias;  // optional [D], the dtype of the statistics
  double eps = 1e-5;
  View y;                         // out, x's shape and dtype, any strides
  View mean, rstd, inverse_norm;  // out [N]: float64 for float64 x, else float32
  int threads = 1;
};
Status normalize_embedding(const NormalizeEmbedding&);

struct NormalizeEmbeddingBackward {
  View x, weight, bias, mean, rstd, inverse_norm;
  View grad_y;                  // x's shape, any strides (expanded too)
  View grad_rstd;               // optional [N], the dtype of the statistics: rstd is a result that others may use
  View grad_x;                  // out, optional, x's shape and dtype, any strides; may be grad_y itself
  View grad_weight, grad_bias;  // out, optional [D], the dtype of the statistics
  int threads = 1;
};
Status normalize_embedding_backward(const NormalizeEmbeddingBackward&);

// float32, float16 and bfloat16. grad_weight and grad_bias are sums of fixed order, bit-equal from run to run on a kind of GPU;
// their workspace is at most 8 KB a channel.
namespace cuda {
size_t normalize_embedding_workspace(const NormalizeEmbedding&);  // 0
Status normalize_embedding(const NormalizeEmbedding&, const Launch&);
size_t normalize_embedding_backward_workspace(const NormalizeEmbeddingBackward&);
Status normalize_embedding_backward(const NormalizeEmbeddingBackward&, const Launch&);
}  // namespace cuda

}  // namespace dnc
