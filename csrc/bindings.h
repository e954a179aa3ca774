// What the Python modules share: how a record of Python (a named tuple of tensors, numbers and words) fills the struct of a
// call, field by field and by name, and how a Status becomes an exception.
#pragma once
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <array>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "dnc/embedding.h"
#include "dnc/head.h"
#include "dnc/momentum.h"
#include "dnc/similarity.h"
#include "dnc/sinkhorn.h"
#include "dnc/upsample.h"

namespace dnc {

// f(name, member) for every field of a struct that Python may give, always in the same order.
template <class F>
void fields(ClusterSums& a, F f) {
  f("x", a.x), f("cluster", a.cluster), f("sums", a.sums), f("counts", a.counts), f("threads", a.threads);
}
template <class F>
void fields(ApplyMomentum& a, F f) {
  f("centroids", a.centroids), f("sums", a.sums), f("counts", a.counts), f("momentum", a.momentum), f("threads", a.threads);
}
template <class F>
void fields(MomentumUpdate& a, F f) {
  f("centroids", a.centroids), f("x", a.x), f("cluster", a.cluster), f("momentum", a.momentum);
  f("deterministic", a.deterministic);
}
template <class F>
void fields(Sinkhorn& a, F f) {
  f("similarity", a.similarity), f("group", a.group), f("groups", a.groups), f("epsilon", a.epsilon);
  f("iterations", a.iterations), f("tolerance", a.tolerance), f("assignment", a.assignment), f("plan", a.plan);
  f("history", a.history), f("steps", a.steps), f("threads", a.threads);
}
template <class F>
void fields(SinkhornBackward& a, F f) {
  f("similarity", a.similarity), f("group", a.group), f("groups", a.groups), f("epsilon", a.epsilon), f("history", a.history);
  f("steps", a.steps), f("grad_plan", a.grad_plan), f("grad_similarity", a.grad_similarity), f("threads", a.threads);
}
template <class F>
void fields(NormalizeEmbedding& a, F f) {
  f("x", a.x), f("weight", a.weight), f("bias", a.bias), f("eps", a.eps), f("y", a.y), f("mean", a.mean), f("rstd", a.rstd);
  f("inverse_norm", a.inverse_norm), f("threads", a.threads);
}
template <class F>
void fields(NormalizeEmbeddingBackward& a, F f) {
  f("x", a.x), f("weight", a.weight), f("bias", a.bias), f("mean", a.mean), f("rstd", a.rstd);
  f("inverse_norm", a.inverse_norm), f("grad_y", a.grad_y), f("grad_rstd", a.grad_rstd), f("grad_x", a.grad_x);
  f("grad_weight", a.grad_weight), f("grad_bias", a.grad_bias), f("threads", a.threads);
}
template <class F>
void fields(ClassScores& a, F f) {
  f("x", a.x), f("centroids", a.centroids), f("labels", a.labels), f("metric", a.metric), f("distance", a.distance);
  f("scores", a.scores), f("winner", a.winner), f("own_similarity", a.own_similarity), f("threads", a.threads);
}
template <class F>
void fields(ClassScoresBackward& a, F f) {
  f("x", a.x), f("centroids", a.centroids), f("labels", a.labels), f("metric", a.metric), f("winner", a.winner);
  f("grad_scores", a.grad_scores), f("grad_own_similarity", a.grad_own_similarity), f("grad_x", a.grad_x);
  f("accumulate", a.accumulate), f("grad_centroids", a.grad_centroids), f("threads", a.threads);
}
template <class F>
void fields(NearestCentroid& a, F f) {
  f("x", a.x), f("centroids", a.centroids), f("metric", a.metric), f("label", a.label), f("sub", a.sub), f("score", a.score);
  f("threads", a.threads);
}
template <class F>
void fields(CentroidCrossEntropy& a, F f) {
  f("x", a.x), f("centroids", a.centroids), f("labels", a.labels), f("metric", a.metric), f("norm_weight", a.norm_weight);
  f("norm_bias", a.norm_bias), f("norm_eps", a.norm_eps), f("scale", a.scale), f("temperature", a.temperature);
  f("class_weight", a.class_weight), f("ignore_index", a.ignore_index), f("label_smoothing", a.label_smoothing);
  f("reduction", a.reduction), f("grad_loss", a.grad_loss), f("loss", a.loss), f("prediction", a.prediction);
  f("own_similarity", a.own_similarity), f("grad_x", a.grad_x), f("grad_centroids", a.grad_centroids);
  f("grad_norm_weight", a.grad_norm_weight), f("grad_norm_bias", a.grad_norm_bias), f("grad_scale", a.grad_scale);
  f("threads", a.threads);
}
template <class F>
void fields(SubcentroidCrossEntropy& a, F f) {
  fields(a.scores, f);
  f("target", a.target), f("temperature", a.temperature), f("ignore_index", a.ignore_index), f("scale", a.scale);
  f("loss", a.loss), f("grad_x", a.grad_x);
}
template <class F>
void fields(UpsampleCrossEntropy& a, F f) {
  f("scores", a.scores), f("labels", a.labels), f("source_rows", a.source_rows), f("source_row0", a.source_row0);
  f("target_rows", a.target_rows), f("target_row0", a.target_row0), f("align_corners", a.align_corners);
  f("class_weight", a.class_weight), f("ignore_index", a.ignore_index), f("label_smoothing", a.label_smoothing);
  f("grad_loss", a.grad_loss), f("sums", a.sums), f("loss", a.loss), f("grad_scores", a.grad_scores), f("threads", a.threads);
}
template <class F>
void fields(UpsampleArgmax& a, F f) {
  f("scores", a.scores), f("align_corners", a.align_corners), f("label", a.label), f("threads", a.threads);
}
template <class F>
void fields(HeadFirstPass& a, F f) {
  f("x", a.x), f("weight", a.weight), f("bias", a.bias), f("eps", a.eps), f("centroids", a.centroids), f("labels", a.labels);
  f("ignored", a.ignored), f("confidence", a.confidence), f("temperature", a.temperature), f("norm_eps", a.norm_eps);
  f("norm_weight", a.norm_weight), f("norm_bias", a.norm_bias), f("class_weight", a.class_weight);
  f("label_smoothing", a.label_smoothing), f("align_corners", a.align_corners);
  f("contrast_temperature", a.contrast_temperature), f("band_pixels", a.band_pixels), f("sampled", a.sampled);
  f("factors", a.factors), f("losses", a.losses), f("prediction", a.prediction), f("group", a.group);
  f("own_similarity", a.own_similarity), f("lse", a.lse), f("statistics", a.statistics), f("grad", a.grad);
  f("grad_rstd", a.grad_rstd), f("grad_scale", a.grad_scale), f("grad_norm", a.grad_norm), f("embedding", a.embedding);
  f("threads", a.threads);
}
template <class F>
void fields(HeadSecondPass& a, F f) {
  f("x", a.x), f("weight", a.weight), f("bias", a.bias), f("eps", a.eps), f("centroids", a.centroids);
  f("statistics", a.statistics), f("grad", a.grad), f("grad_rstd", a.grad_rstd), f("embedding", a.embedding);
  f("target", a.target), f("pull", a.pull), f("cluster", a.cluster), f("band_pixels", a.band_pixels);
  f("grad_affine", a.grad_affine), f("sums", a.sums), f("counts", a.counts), f("threads", a.threads);
}
template <class F>
void fields(LabelFigures& a, F f) {
  f("labels", a.labels), f("ignored", a.ignored), f("classes", a.classes), f("weighted", a.weighted), f("middle", a.middle);
  f("counts", a.counts), f("range", a.range), f("small", a.small), f("small_counts", a.small_counts), f("threads", a.threads);
}
template <class F>
void fields(HeadTargets& a, F f) {
  f("own_similarity", a.own_similarity), f("group", a.group), f("prediction", a.prediction), f("small", a.small);
  f("assignment", a.assignment), f("lse", a.lse), f("factors", a.factors), f("classes", a.classes);
  f("contrast_temperature", a.contrast_temperature), f("correct_only", a.correct_only);
  f("target", a.target), f("pull", a.pull), f("moving", a.moving), f("sums", a.sums), f("counters", a.counters);
  f("threads", a.threads);
}

namespace python {
namespace py = pybind11;

// The words of an enum, in its order.
inline constexpr std::array<std::string_view, 3> words(Metric) { return {"dot", "cosine", "sqeuclidean"}; }
inline constexpr std::array<std::string_view, 3> words(CentroidCrossEntropy::Reduction) { return {"none", "mean", "sum"}; }

// Where a tensor lies, from torch: through the C functions of its DLPack exchange where it has them, else through its Python
// attributes, ten times slower. The layouts of these structs are DLPack's ABI (dmlc/dlpack, version 1).
struct DLTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *size, *stride;
  uint64_t byte_offset;
};
struct DLPackExchange {
  uint32_t major, minor;
  void* previous;
  void *allocate, *to_managed, *from_managed;
  int (*describe)(void* tensor, DLTensor* out);  // without waiting, without owning
  void* stream;
};

class Torch {
 public:
  PyTypeObject *tensor = nullptr, *parameter = nullptr;

  static const Torch& get() {
    static py::gil_safe_call_once_and_store<Torch> storage;
    return storage.call_once_and_store_result([] { return Torch(); }).get_stored();
  }

  View view(PyObject* t) const {
    if (exchange == nullptr) return view_of_attributes(t);
    DLTensor d;
    if (exchange->describe(t, &d) != 0) throw py::error_already_set();
    View v;
    v.data = static_cast<char*>(d.data) + d.byte_offset;
    v.dtype = dtype_of(d.code, d.bits);
    set_shape(v, d.ndim, [&](int i) { return d.size[i]; }, [&](int i) { return d.stride[i]; });
    return v;
  }

  // Dtype, device and shape, appended to `text`. False for what is no strided tensor of a CPU or a CUDA device, or only looks
  // like one: a subclass, a negated view.
  bool describe(PyObject* t, std::string& text) const {
    const py::object negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(t, is_neg));
    if (!negated) throw py::error_already_set();
    if (negated.ptr() == Py_True) return false;
    const auto append = [&](const auto& number) { text.append(reinterpret_cast<const char*>(&number), sizeof number); };
    if (exchange != nullptr) {
      DLTensor d;
      if (exchange->describe(t, &d) != 0) return PyErr_Clear(), false;
      if (d.device_type != 1 && d.device_type != 2) return false;
      append(d.code), append(d.bits), append(d.device_type), append(d.device_id), append(d.ndim);
      for (int i = 0; i < d.ndim; i++) append(d.size[i]);
      return true;
    }
    const py::handle of(t);
    if (!(of.attr("is_cpu").cast<bool>() || of.attr("is_cuda").cast<bool>())) return false;
    append(of.attr("dtype").ptr()), append(of.attr("get_device")().cast<int>());
    const py::tuple size = of.attr("shape");
    append(int(size.size()));
    for (const auto& n : size) append(n.cast<int64_t>());
    return true;
  }

 private:
  const DLPackExchange* exchange = nullptr;
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  std::vector<std::pair<PyObject*, DType>> dtypes;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const py::object type = torch.attr("Tensor");
    tensor = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
    parameter = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("nn").attr("Parameter")).inc_ref().ptr());
    const std::pair<const char*, DType> names[] = {
        {"float32", DType::float32}, {"float64", DType::float64}, {"float16", DType::float16}, {"bfloat16", DType::bfloat16},
        {"int64", DType::int64},     {"int32", DType::int32},     {"uint8", DType::uint8}};
    for (const auto& [name, dtype] : names) dtypes.emplace_back(py::object(torch.attr(name)).inc_ref().ptr(), dtype);
    if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return;
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    const auto* found = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found == nullptr) throw py::error_already_set();
    if (found->major == 1 && found->describe != nullptr) exchange = found;
  }

  static DType dtype_of(uint8_t code, uint8_t bits) {
    switch (code << 8 | bits) {
      case 2 << 8 | 32: return DType::float32;
      case 2 << 8 | 64: return DType::float64;
      case 2 << 8 | 16: return DType::float16;
      case 4 << 8 | 16: return DType::bfloat16;
      case 0 << 8 | 64: return DType::int64;
      case 0 << 8 | 32: return DType::int32;
      case 1 << 8 | 8: return DType::uint8;
      default: throw py::type_error("a tensor of a dtype that no kernel takes");
    }
  }

  View view_of_attributes(PyObject* tensor) const {
    const py::handle t(tensor);
    View v;
    v.data = reinterpret_cast<void*>(t.attr("data_ptr")().cast<uintptr_t>());
    const py::object dtype = t.attr("dtype");
    bool known = false;
    for (const auto& [object, of] : dtypes)
      if (dtype.ptr() == object) v.dtype = of, known = true;
    if (!known) throw py::type_error("a tensor of a dtype that no kernel takes");
    const py::tuple size = t.attr("shape"), stride = t.attr("stride")();
    set_shape(
        v, int(size.size()), [&](int i) { return size[i].cast<int64_t>(); }, [&](int i) { return stride[i].cast<int64_t>(); });
    return v;
  }

  template <class Size, class Stride>
  static void set_shape(View& v, int ndim, Size size, Stride stride) {
    if (ndim > 4) throw py::value_error("a tensor of more than 4 dimensions");
    v.ndim = ndim;
    for (int i = 0; i < ndim; i++) v.size[i] = size(i), v.stride[i] = stride(i);
    if (ndim == 0) v.ndim = 1, v.size[0] = v.stride[0] = 1;  // a scalar is a view of one element
  }
};

// Bytes that tell calls apart by what their checks and choices may depend on: dtypes, devices and shapes of tensors, and other
// plain values. None where a value is something else than a plain tensor, None, a bool, an int, a float or a string.
inline py::object signature(const py::tuple& values) {
  const Torch& torch = Torch::get();
  std::string text;
  for (const py::handle value : values) {
    PyObject* v = value.ptr();
    PyTypeObject* type = Py_TYPE(v);
    const auto append = [&](char kind, const auto& number) {
      text.push_back(kind), text.append(reinterpret_cast<const char*>(&number), sizeof number);
    };
    if (v == Py_None) {
      text.push_back('n');
    } else if (type == torch.tensor || type == torch.parameter) {
      text.push_back('t');
      if (!torch.describe(v, text)) return py::none();
    } else if (type == &PyUnicode_Type) {
      Py_ssize_t size;
      const char* word = PyUnicode_AsUTF8AndSize(v, &size);
      if (word == nullptr) throw py::error_already_set();
      append('s', size), text.append(word, size_t(size));
    } else if (type == &PyFloat_Type) {
      append('f', PyFloat_AS_DOUBLE(v));
    } else if (type == &PyLong_Type) {
      int overflow;
      append('i', PyLong_AsLongLongAndOverflow(v, &overflow));
      if (overflow != 0) return py::none();
    } else if (type == &PyBool_Type) {
      text.push_back(v == Py_True ? 'T' : 'F');
    } else {
      return py::none();
    }
  }
  return py::bytes(text);
}

template <class Member>
void assign(Member& member, const char* name, PyObject* value) {
  if (value == Py_None) return;  // the struct's default: an absent view
  if constexpr (std::is_same_v<Member, View>) {
    const Torch& torch = Torch::get();
    if (!PyType_IsSubtype(Py_TYPE(value), torch.tensor))
      throw py::type_error(std::string(name) + " must be a tensor or None; got " + std::string(py::repr(value)));
    member = torch.view(value);
  } else if constexpr (std::is_enum_v<Member>) {
    const auto word = py::handle(value).cast<std::string_view>();
    const auto all = words(Member());
    for (size_t i = 0; i < all.size(); i++)
      if (all[i] == word) return void(member = Member(i));
    throw py::value_error(std::string(name) + ": unknown word " + std::string(word));
  } else {
    member = py::handle(value).cast<Member>();
  }
}

// Which element of a record of some type fills which field of Args: -1 for none. Found once for a type.
template <class Args>
const std::vector<int>& plan_of(PyTypeObject* type) {
  static std::mutex mutex;
  static std::unordered_map<PyTypeObject*, std::vector<int>> plans;
  {
    const std::lock_guard lock(mutex);
    if (const auto found = plans.find(type); found != plans.end()) return found->second;
  }
  const auto given = py::handle(reinterpret_cast<PyObject*>(type)).attr("_fields").cast<py::tuple>();
  std::vector<int> plan;
  Args a;
  size_t known = 0;
  fields(a, [&](std::string_view name, auto&) {
    int at = -1;
    for (size_t i = 0; i < given.size(); i++)
      if (given[i].cast<std::string_view>() == name) at = int(i), known++;
    plan.push_back(at);
  });
  for (const auto& name : given) known += name.cast<std::string_view>() == "backend";
  if (known != given.size())
    throw py::type_error(std::string(type->tp_name) + std::string(py::str(given)) +
                         " has a field that the kernel's struct lacks");
  py::handle(reinterpret_cast<PyObject*>(type)).inc_ref();  // its address stays its own
  const std::lock_guard lock(mutex);
  return plans.emplace(type, std::move(plan)).first->second;
}

// The names of the fields of a struct, for those who want to know what a function takes.
template <class Args>
py::tuple names() {
  py::list all;
  Args a;
  fields(a, [&](const char* name, auto&) { all.append(name); });
  return py::tuple(all);
}

// The struct that records fill; fields without a record keep their defaults.
template <class Args>
Args filled(const py::args& records, int threads) {
  Args a;
  for (const py::handle record : records) {
    if (!PyTuple_Check(record.ptr())) throw py::type_error("a call is made of records; got " + std::string(py::repr(record)));
    const std::vector<int>& plan = plan_of<Args>(Py_TYPE(record.ptr()));
    size_t i = 0;
    fields(a, [&](const char* name, auto& member) {
      if (const int at = plan[i++]; at >= 0) assign(member, name, PyTuple_GET_ITEM(record.ptr(), at));
    });
  }
  fields(a, [&](std::string_view name, auto& member) {
    if constexpr (std::is_same_v<std::remove_reference_t<decltype(member)>, int>)
      if (name == "threads") member = threads;
  });
  return a;
}

// Raises what a Status says about a call of `op`.
inline void raise(const std::string& op, const Status& s, const py::args& records) {
  const auto with_call = [&] {
    std::string text = op + ": " + s.what;
    for (const py::handle record : records) text += "\n  " + std::string(py::repr(record));
    return text;
  };
  switch (s.code) {
    case Code::ok: return;
    case Code::bad_label:
      throw py::value_error(op + ": " + s.what + "; got " + std::to_string(s.value) + " at pixel " + std::to_string(s.index) +
                            (s.value == 255 ? " (ignore_index=255 leaves such pixels out)" : ""));
    case Code::bad_argument: throw py::value_error(with_call());
    case Code::out_of_memory: PyErr_SetString(PyExc_MemoryError, with_call().c_str()); throw py::error_already_set();
    case Code::cuda_error: throw std::runtime_error(with_call());
  }
}

}  // namespace python
}  // namespace dnc

// The CUDA kernels, into a module of their own.
void bind_cuda(pybind11::module_& m);
