#include "dnc/momentum.h"
#include "simd.h"
namespace dnc::cpu::DNC_ISA {
Status cluster_sums(const ClusterSums&) { return bad_argument("not built"); }
Status apply_momentum(const ApplyMomentum&) { return bad_argument("not built"); }
}
