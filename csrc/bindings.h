// What the Python modules share: views of tensors that Python owns, and how a Status becomes an exception.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "dnc/common.h"

// The class View of a module.
inline void bind_view(pybind11::module_& m) {
  const auto make = [](uintptr_t data, int dtype, const std::vector<int64_t>& size, const std::vector<int64_t>& stride) {
    dnc::View v;
    v.data = reinterpret_cast<void*>(data);
    v.dtype = static_cast<dnc::DType>(dtype);
    v.ndim = static_cast<int32_t>(size.size());
    if (v.ndim > 4) throw pybind11::value_error("View: at most 4 dimensions");
    for (int i = 0; i < v.ndim; i++) v.size[i] = size[i], v.stride[i] = stride[i];
    return v;
  };
  // dynamic attributes: Python hangs the tensor on its view, so that a temporary lives through the call
  pybind11::class_<dnc::View>(m, "View", pybind11::dynamic_attr(), pybind11::module_local())
      .def(pybind11::init(make))
      .def(pybind11::init<>());
}

inline void raise(const char* op, const dnc::Status& s) {
  const std::string name = std::string(op) + ": ";
  switch (s.code) {
    case dnc::Code::ok: return;
    case dnc::Code::bad_label:
      throw pybind11::value_error(name + s.what + "; got " + std::to_string(s.value) + " at pixel " + std::to_string(s.index) +
                                  (s.value == 255 ? " (ignore_index=255 leaves such pixels out)" : ""));
    case dnc::Code::bad_argument: throw pybind11::value_error(name + s.what);
    case dnc::Code::out_of_memory: throw std::bad_alloc();
    case dnc::Code::cuda_error: throw std::runtime_error(name + s.what);
  }
}

// The CUDA kernels, into a module of their own.
void bind_cuda(pybind11::module_& m);
