#include "dnc/similarity.h"
#include "simd.h"
namespace dnc::cpu::DNC_ISA {
Status class_scores(const ClassScores&) { return bad_argument("not built"); }
Status class_scores_backward(const ClassScoresBackward&) { return bad_argument("not built"); }
Status nearest_centroid(const NearestCentroid&) { return bad_argument("not built"); }
Status centroid_cross_entropy(const CentroidCrossEntropy&) { return bad_argument("not built"); }
}
