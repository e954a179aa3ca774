// The training step of a segmentation head in two passes over bands of rows, and what lies between them: the caller clusters.
#pragma once
#include "dnc/common.h"

namespace dnc {

// Embedding of every feature pixel, class scores, contrast, logits, their cross-entropy upsampled to the labels, and the
// gradient of the embedding. logits = scores * exp(log_scale) * (length of the pixel's feature, with confidence) / temperature,
// or LayerNorm over the classes of the scores where norm_weight is given. Gradients are those of pull * cross-entropy +
// contrast * contrast loss, with factors = {unit, pull, contrast, distance, exp(log_scale), weight, count}. "The compute type":
// float64 if x or centroids are, else float32. "That of the statistics": float64 for float64 x, else float32.
struct HeadFirstPass {
  View x;             // [B,D,h,w], float32/float64/float16/bfloat16, any strides
  View weight, bias;  // [D], the type of the statistics
  double eps = 1e-5;
  View centroids;        // [C,K,D], any of the dtypes of x, contiguous
  View labels;           // [B,H,W] int64, int32 or uint8, any strides, as of UpsampleCrossEntropy
  int64_t ignored = -1;  // the label of none
  bool confidence = false;
  double temperature = 1.0;
  View norm_weight, norm_bias;  // optional [C] of the compute type
  double norm_eps = 1e-5;
  View class_weight;  // optional [C] of the compute type
  double label_smoothing = 0.0;
  bool align_corners = false;
  double contrast_temperature = 1.0;
  int64_t band_pixels = 2048;  // of a band, about; it has two rows at least where the map has
  View sampled;                // [N] int64 in [0,C), negative for none: labels of own similarities and of the contrast
  View factors;                // [7] of the compute type
  View losses;                 // out [2] float64: summed cross-entropy, 0
  View prediction;             // out [N] int64, -1 where scores are not finite
  View group;                  // out [N] int64: sampled, -1 where scores are not finite
  View own_similarity;         // out [N,K] of the compute type, contiguous
  View lse;                    // out [N] of the compute type, optional: log-sum-exp of the similarities; then contrast counts
  View statistics;             // out [3,N], contiguous: mean, rstd and inverse norm
  View grad;                   // out, optional, x's shape and dtype, any strides; without it nothing of the other gradients
  View grad_rstd;              // out [N], the type of the statistics; with grad and confidence
  View grad_scale;             // out, one element of the compute type, that of log_scale; without elements with a norm
  View grad_norm;              // out [2,C] of the compute type; without elements where there is no norm
  View embedding;              // out, optional, x's shape and dtype: kept
  int threads = 1;
};
Status head_first_pass(const HeadFirstPass&);

// Sums of the embeddings of the pixels of each cluster, what a pixel's target adds to the gradient of its embedding, and from
// that the gradient of x.
struct HeadSecondPass {
  View x, weight, bias;
  double eps = 1e-5;  // not read: the statistics have it
  View centroids, statistics;
  View grad;       // in and out, optional: of the embedding, becomes that of x
  View grad_rstd;  // optional [N]
  View embedding;  // optional: where it was kept
  View target;     // optional [N] int64: c*K + k, negative for none; with pull
  View pull;       // optional [N] of the compute type: gradient of the similarity to the target
  View cluster;    // optional [N] int64 in [0,M), negative: left out
  int64_t band_pixels = 2048;
  View grad_affine;  // out [2,D] of weight and bias, the type of the statistics; 0 without grad
  View sums;         // out [M,D], the type of the statistics, contiguous; with cluster
  View counts;       // out [M] int64
  int threads = 1;
};
Status head_second_pass(const HeadSecondPass&);

// How many labels count: are in [0,C) and not `ignored`. What labels there are, and which the features have: the label in the
// middle of a feature's cell, or the first of the cell.
struct LabelFigures {
  View labels;  // [B,H,W] int64, int32 or uint8, any strides
  int64_t ignored = -1, classes = 0;
  bool weighted = false;  // classes are counted apart; else all of them as class 0
  bool middle = false;
  View counts;        // out, optional [C] int32
  View range;         // out, optional [3] int64: least, largest (0 of none), number of those that are no class and not ignored
  View small;         // out, optional [B,h,w] int64, contiguous: -1 for what does not count
  View small_counts;  // out [C] int32, of `small`; with it
  int threads = 1;
};
Status label_figures(const LabelFigures&);

// What follows for a pixel from its sub-centroid `assignment` in its class `group`, once the transport has found it.
struct HeadTargets {
  View own_similarity;                        // [N,K] of the compute type, contiguous
  View group, prediction, small, assignment;  // [N] int64; negative: none
  View lse;                                   // optional [N]
  View factors;                               // [7], as of HeadFirstPass
  int64_t classes = 0;
  double contrast_temperature = 1.0;
  bool correct_only = false;  // only pixels whose prediction is `small` move sub-centroids
  View target;                // out [N] int64: c*K + k, or -1
  View pull;                  // out, optional [N]: gradient of the similarity to the target, 0 where there is none
  View moving;                // out [N] int64: the target where it moves, else -1
  View sums;                  // out [2] float64: of lse - <e,p>/temperature (0 without lse), and of (1 - <e,p>)^2
  View counters;              // out [M+3] int64: wins of each sub-centroid; pixels that are correct, labelled, not finite
  int threads = 1;
};
Status head_targets(const HeadTargets&);

}  // namespace dnc
