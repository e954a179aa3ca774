// The Python module _C: every public function of the library, on records of tensors that Python owns:
//   _C.centroid_cross_entropy(op, threads, record, record, ...)
// `op` is what an error names. The GIL is released while a kernel runs, and the module does not need it.
#include "bindings.h"

#include <sstream>

#include "stamp.h"

namespace py = pybind11;
using namespace dnc;
using namespace py::literals;

namespace {

template <class Args>
void bind(py::module_& m, const char* name, Status (*kernel)(const Args&)) {
  m.def(name, [kernel](const std::string& op, int threads, const py::args& records) {
    const Args args = python::filled<Args>(records, threads);
    Status s;
    {
      py::gil_scoped_release release;
      s = kernel(args);
    }
    python::raise(op, s, records);
  });
  m.attr("fields")[name] = python::names<Args>();
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.attr("__version__") = DNC_VERSION;
  m.attr("compiler") = DNC_COMPILER;
  m.attr("source") = stamp::source;
  m.attr("commit") = stamp::commit;
#if defined(DNC_CUDA_ARCHS)
  m.attr("cuda_archs") = DNC_CUDA_ARCHS;
#else
  m.attr("cuda_archs") = py::none();
#endif
  m.def("best_isa", [] { return int(best_isa()); });
  m.def("current_isa", [] { return int(current_isa()); });
  m.def("set_isa", [](int isa) { return set_isa(Isa(isa)); });
  m.def("signature", python::signature);
  m.attr("fields") = py::dict();  // function -> names of what its records may have
  // family -> what its CUDA kernels take at most; of a build without them too
  using namespace cuda;
  m.attr("cuda_limits") = py::dict("similarity"_a = py::dict("max_channels"_a = similarity_limits::max_channels,
                                                             "channel_multiple"_a = similarity_limits::channel_multiple,
                                                             "max_subcentroids"_a = similarity_limits::max_subcentroids),
                                   "sinkhorn"_a = py::dict("max_subcentroids"_a = sinkhorn_limits::max_subcentroids));
#if defined(DNC_WITH_CUDA)
  py::module_ cuda = m.def_submodule("cuda");
  bind_cuda(cuda);
  py::dict sources;  // family -> SHA-256 of its kernels' source
  std::istringstream words(stamp::cuda_sources);
  for (std::string family, hash; words >> family >> hash;) sources[family.c_str()] = hash;
  cuda.attr("sources") = sources;
#endif
  bind(m, "cluster_sums", cluster_sums);
  bind(m, "apply_momentum_", apply_momentum);
  bind(m, "sinkhorn", sinkhorn);
  bind(m, "sinkhorn_backward", sinkhorn_backward);
  bind(m, "normalize_embedding", normalize_embedding);
  bind(m, "normalize_embedding_backward", normalize_embedding_backward);
  bind(m, "class_scores", class_scores);
  bind(m, "class_scores_backward", class_scores_backward);
  bind(m, "nearest_centroid", nearest_centroid);
  bind(m, "centroid_cross_entropy", centroid_cross_entropy);
  bind(m, "subcentroid_cross_entropy", subcentroid_cross_entropy);
  bind(m, "upsample_cross_entropy", upsample_cross_entropy);
  bind(m, "upsample_argmax", upsample_argmax);
  bind(m, "head_first_pass", head_first_pass);
  bind(m, "head_second_pass", head_second_pass);
  bind(m, "label_figures", label_figures);
  bind(m, "head_targets", head_targets);
}
