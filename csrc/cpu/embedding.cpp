#include "dnc/embedding.h"
#include "simd.h"
namespace dnc::cpu::DNC_ISA {
Status normalize_embedding(const NormalizeEmbedding&) { return bad_argument("not built"); }
Status normalize_embedding_backward(const NormalizeEmbeddingBackward&) { return bad_argument("not built"); }
}
