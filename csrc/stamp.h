// What this binary was built from, as cmake/source.cmake finds it.
#pragma once

namespace dnc::stamp {

extern const char* const source;  // SHA-256 of CMakeLists.txt, cmake/ and csrc/ without its tests
extern const char* const commit;  // the last commit that changed them, with + where the tree has changed since; or "unknown"
extern const char* const cuda_sources;  // "family SHA-256 family SHA-256 ..." of the CUDA kernels; empty without them

}  // namespace dnc::stamp
