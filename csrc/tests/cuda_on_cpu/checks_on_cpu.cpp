// All checks in one file for the host, since pybind11 takes longer to compile than they do.
#if !defined(DNC_FAULTS_ALONE)
#include "checks_blocks.cu"
#include "checks_hopper.cu"
#include "checks_rings.cu"
#include "checks_warps.cu"
#endif
#include "checks.cu"
#include "checks_faults.cu"
