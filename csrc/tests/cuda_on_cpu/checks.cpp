// The Python module of the harness' own tests.
#include "checks.h"

PYBIND11_MODULE(_checks, m) {
  checks::bind_warps(m);
  checks::bind_hopper(m);
  checks::bind_faults(m);
  m.def("configure", [](const std::string& order) { cuda_on_cpu::settings.order = cuda_on_cpu::order_of(order); });
}
