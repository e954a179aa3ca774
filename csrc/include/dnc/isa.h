// The instruction set above those of `Isa`. It is not among them because common.h is part of what GPUs have proven.
#pragma once
#include "dnc/common.h"

namespace dnc {

// Runs all that stand before it; multiplies bfloat16 pixels on tile registers, and is avx512 in all else. The operating system
// must let the process use them.
inline constexpr Isa isa_amx = Isa(3);

}  // namespace dnc
