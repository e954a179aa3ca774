// Alone in a file: another stamp compiles nothing else.
#include "stamp.h"

namespace dnc::stamp {

const char* const source = DNC_SOURCE;
const char* const commit = DNC_COMMIT;
const char* const cuda_sources = DNC_CUDA_SOURCES;

}  // namespace dnc::stamp
