// The Python module of the checks: of the harness' own tests, and on a GPU of its primitives.
#include "checks.h"

PYBIND11_MODULE(_checks, m) {
#if !defined(DNC_FAULTS_ALONE)
  checks::bind_warps(m);
  checks::bind_blocks(m);
  checks::bind_hopper(m);
  checks::bind_rings(m);
#endif
#if defined(DNC_CUDA_ON_CPU)
  checks::bind_faults(m);
  m.def("configure", [](const std::string& order) { cuda_on_cpu::settings.order = cuda_on_cpu::order_of(order); });
#endif
}
