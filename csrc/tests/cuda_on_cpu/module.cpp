// The Python module of the host tests: the bindings of the CUDA kernels, and the settings of the harness.
#include <string>

#include "bindings.h"
#include "fibers.h"

PYBIND11_MODULE(_cuda_on_cpu, m) {
  bind_cuda(m);
  m.def("configure", [](const std::string& order, int processors, int capability) {
    auto& s = cuda_on_cpu::settings;
    s.order = cuda_on_cpu::order_of(order);
    s.processors = processors, s.capability = capability;
  });
  m.def("launches", [] { return cuda_on_cpu::settings.launches; });
}
