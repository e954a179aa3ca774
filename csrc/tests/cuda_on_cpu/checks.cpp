// The Python module of the harness' own tests.
#include "checks.h"

PYBIND11_MODULE(_checks, m) {
  checks::bind_warps(m);
  checks::bind_hopper(m);
  checks::bind_faults(m);
  m.def("configure", [](const std::string& order) {
    using cuda_on_cpu::Order;
    cuda_on_cpu::settings.order = order == "backward"   ? Order::backward
                                  : order == "shuffled" ? Order::shuffled
                                                        : Order::forward;
  });
}
