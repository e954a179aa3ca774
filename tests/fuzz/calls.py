"""Random calls of the ops: legal ones, and such as have one illegal argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from hypothesis import strategies as st

from dnc_kernels import backends, ops

from .values import FLOATS, INTEGERS, KINDS, SEEDS, SIZES, TAME, Spec, code_of, layouts

Draw = Callable[[st.SearchStrategy], Any]
#: Backends with the instruction sets of each.
BACKENDS = [("reference", None), *(("cpu", isa) for isa in backends.usable_isas())]
#: Under its interpreter, which is slow: one call in so many.
TRITON = backends.INTERPRETED and not backends.UNUSABLE["triton"]
METRICS = ("dot", "cosine", "sqeuclidean")


@dataclass
class Call:
    """A call of an op, by keyword."""

    op: str
    backend: str
    isa: str | None
    arguments: dict[str, Any]
    #: arguments that get a gradient, and the seed and layout of the incoming one
    leaves: tuple[str, ...] = ()
    incoming: tuple[int, str] = (0, "contiguous")
    #: the argument that is illegal
    illegal: str | None = None

    def values(self) -> dict[str, Any]:
        """The arguments, tensors made."""
        return {name: v.make() if isinstance(v, Spec) else v for name, v in self.arguments.items()}

    def code(self) -> str:
        """A program that makes the call."""
        lines = ["import numpy, torch", "from dnc_kernels import backends, ops"]
        if any(isinstance(v, Spec) and v.code().startswith("made") for v in self.arguments.values()):
            lines.append("from tests.fuzz.values import made")
        lines += [f"{name} = {code_of(v)}" for name, v in self.arguments.items() if isinstance(v, Spec)]
        lines += [f"{name}.requires_grad_()" for name in self.leaves]
        given = [f"{n}={n if isinstance(v, Spec) else code_of(v)}" for n, v in self.arguments.items()]
        call = f"ops.{self.op}({', '.join(given)}, backend={self.backend!r})"
        if self.isa:
            lines += [f"with backends.use_isa({self.isa!r}):", f"    result = {call}"]
        else:
            lines.append(f"result = {call}")
        if self.leaves:
            lines.append(f"# gradients of {', '.join(self.leaves)}; the incoming one: seed and layout {self.incoming}")
        lines.append("print(result)")
        return "\n".join(lines)


def _size(draw: Draw, most: int, least: int = 0) -> int:
    """Rarely none."""
    if least == 0 and draw(st.integers(1, 16)) == 16:
        return 0
    return draw(st.sampled_from([n for n in SIZES if max(least, 1) <= n <= most]))


def _option(draw: Draw, usual: Any, *others: Any) -> Any:
    """Mostly the usual value."""
    return draw(st.sampled_from((usual, usual, usual, *others)))


def _float(draw: Draw) -> torch.dtype:
    return draw(st.sampled_from(FLOATS))


def _pixels(draw: Draw, channels: int, small: bool, kinds: tuple[str, ...] = KINDS, dtype: torch.dtype | None = None) -> Spec:
    """[N,D] or [B,D,H,W]."""
    dtype = dtype or draw(st.sampled_from(FLOATS))
    if draw(st.booleans()):
        shape = (_size(draw, 13 if small else 33), channels)
    else:
        shape = (_size(draw, 2), channels, _size(draw, 3 if small else 5), _size(draw, 4 if small else 8))
    return Spec(draw(st.sampled_from(kinds)), shape, dtype, draw(layouts(len(shape))), draw(SEEDS))


def _centroids(draw: Draw, channels: int, small: bool, dtype: torch.dtype, kinds: tuple[str, ...] = TAME) -> Spec:
    classes, k = _size(draw, 5 if small else 17, 1), _size(draw, 4 if small else 13, 1)
    dtype = draw(st.sampled_from((dtype, torch.float32, *FLOATS)))
    return Spec(draw(st.sampled_from(kinds)), (classes, k, channels), dtype, draw(layouts(3)), draw(SEEDS))


def _labels(draw: Draw, x: Spec, bound: int, ignore_index: int, flat: bool = False) -> Spec:
    """Ids for the pixels of x [N,D] or [B,D,H,W], some left out."""
    shape = x.shape[:1] if len(x.shape) == 2 else (x.shape[0], *x.shape[2:])
    if flat and len(shape) == 3 and draw(st.booleans()):
        shape = (math.prod(shape),)
    dtype = draw(st.sampled_from(INTEGERS))
    # all, one, or all but the last
    some = draw(st.sampled_from((list(range(bound)), [draw(st.integers(0, bound - 1))], list(range(max(bound - 1, 1))))))
    ids = [*some, ignore_index, *draw(st.sampled_from(((), (-1,), (-100, -2), (-(2**31),), (-(2**63),))))]
    if not _within(ids, dtype) or draw(st.integers(1, 16)) == 16:
        ids = [ignore_index]  # nothing counts
    if not _within(ids, dtype):
        ids = [bound - 1 if bound <= torch.iinfo(dtype).max else 0]
    return Spec("ids", shape, dtype, draw(layouts(len(shape))), draw(SEEDS), tuple(ids))


def _within(ids: list[int], dtype: torch.dtype) -> list[int]:
    info = torch.iinfo(dtype)
    return [i for i in ids if info.min <= i <= info.max]


def _ignore_index(draw: Draw, bound: int) -> int:
    return _option(draw, -100, -1, 255, bound, 2**31 - 1, 2**31, 2**40, -(2**40), 2**63 - 1, numpy.int64(-100), bound + 1)


def _checked_ignore(draw: Draw, bound: int) -> int:
    index = _ignore_index(draw, bound)
    return index if not 0 <= index < bound else -100


def _vector(draw: Draw, length: int, kinds: tuple[str, ...] = ("normal", "constant", "integers")) -> Spec:
    return Spec(
        draw(st.sampled_from(kinds)), (length,), _float(draw), draw(st.sampled_from(("contiguous", "slice"))), draw(SEEDS)
    )


def _class_weight(draw: Draw, classes: int) -> torch.Tensor | None:
    if draw(st.booleans()):
        return None
    generator = torch.Generator().manual_seed(draw(SEEDS))
    weight = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1
    weight[-1] = draw(st.sampled_from((1.0, 0.0, math.inf)))
    return weight.to(_float(draw))


def _number(draw: Draw, *values: float) -> float:
    """One of them, as a Python or numpy number."""
    value = draw(st.sampled_from(values))
    kind = draw(st.sampled_from((float, float, float, numpy.float64, numpy.float32)))
    return kind(value)


def backend_of(draw: Draw, triton: int = 20) -> tuple[str, str | None]:
    """A backend and its instruction set; Triton one time in so many."""
    if TRITON and draw(st.integers(1, triton)) == triton:
        return "triton", None
    return draw(st.sampled_from(BACKENDS))


def _similarity(draw: Draw, small: bool, metrics: tuple[str, ...]) -> dict[str, Any]:
    channels = _size(draw, 17 if small else 33, 1)
    x = _pixels(draw, channels, small)
    return {"x": x, "centroids": _centroids(draw, channels, small, x.dtype), "metric": draw(st.sampled_from(metrics))}


def centroid_distance(draw: Draw, small: bool) -> dict[str, Any]:
    return _similarity(draw, small, METRICS[1:])


def nearest_centroid(draw: Draw, small: bool) -> dict[str, Any]:
    return _similarity(draw, small, METRICS)


def class_scores(draw: Draw, small: bool) -> dict[str, Any]:
    made = _similarity(draw, small, METRICS)
    if draw(st.booleans()):
        made["ignore_index"] = _checked_ignore(draw, made["centroids"].shape[0])
        made["labels"] = _labels(draw, made["x"], made["centroids"].shape[0], made["ignore_index"], flat=True)
    return made


def centroid_cross_entropy(draw: Draw, small: bool) -> dict[str, Any]:
    made = _similarity(draw, small, METRICS)
    classes = made["centroids"].shape[0]
    made["ignore_index"] = _checked_ignore(draw, classes)
    made["labels"] = _labels(draw, made["x"], classes, made["ignore_index"], flat=True)
    made["reduction"] = draw(st.sampled_from(("mean", "sum", "none")))
    if draw(st.booleans()):
        made["norm_weight"] = _vector(draw, classes)
        if draw(st.booleans()):
            made["norm_bias"] = _vector(draw, classes)
        made["norm_eps"] = _number(draw, 1e-5, 1e-3, 1.0)
    made["label_smoothing"] = _number(draw, 0.0, 0.1, 1.0)
    if draw(st.booleans()):
        made["temperature"] = Spec("constant", draw(st.sampled_from(((), (1,)))), _float(draw), "contiguous", 0)
    else:
        made["temperature"] = _number(draw, 1.0, 0.07, 10.0, 2)
    made["weight"] = _class_weight(draw, classes)
    return made


def subcentroid_cross_entropy(draw: Draw, small: bool) -> dict[str, Any]:
    made = _similarity(draw, small, METRICS[:1])
    del made["metric"]
    bound = made["centroids"].shape[0] * made["centroids"].shape[1]
    made["ignore_index"] = _checked_ignore(draw, bound)
    made["labels"] = _labels(draw, made["x"], bound, made["ignore_index"], flat=True)
    made["temperature"] = _number(draw, 1.0, 0.07, 10.0, 2)
    made["reduction"] = draw(st.sampled_from(("mean", "sum", "none")))
    return made


def _sinkhorn(draw: Draw, small: bool) -> dict[str, Any]:
    classes, k = draw(st.sampled_from((1, 2, 3, 7))), _size(draw, 13 if small else 33, 1)
    made: dict[str, Any] = {"similarity": _pixels(draw, k, small)}
    made["num_classes"], made["ignore_index"] = classes, _checked_ignore(draw, classes)
    made["labels"] = _labels(draw, made["similarity"], classes, made["ignore_index"], flat=True)
    made["epsilon"] = _number(draw, 0.05, 1.0, 1e-3, 100.0, 1)
    made["iterations"] = _option(draw, 3, 0, 1, 10, numpy.int64(2))
    made["tolerance"] = _option(draw, None, 0.0, 0.1, 1e-3, 1)
    return made


def sinkhorn_assign(draw: Draw, small: bool) -> dict[str, Any]:
    return _sinkhorn(draw, small)


def sinkhorn_plan(draw: Draw, small: bool) -> dict[str, Any]:
    made = _sinkhorn(draw, small)
    if draw(st.integers(0, 3)) == 0:
        made["labels"], made["num_classes"] = None, _option(draw, None, 1)
    return made


def cluster_sums(draw: Draw, small: bool) -> dict[str, Any]:
    x = _pixels(draw, _size(draw, 33, 1), small)
    clusters = draw(st.sampled_from((1, 2, 5, 17, 300)))
    index = _checked_ignore(draw, clusters)
    labels = _labels(draw, x, clusters, index, flat=True)
    return {"x": x, "labels": labels, "num_clusters": _option(draw, clusters, numpy.int64(clusters)), "ignore_index": index}


def _in_place(draw: Draw, channels: int, rank: int) -> Spec:
    shape = (_size(draw, 5, 1), _size(draw, 4, 1), channels)
    dtype = draw(st.sampled_from(FLOATS[:2]))
    shape = shape if rank == 3 else (shape[0] * shape[1], channels)
    return Spec("unit" if rank == 3 else "normal", shape, dtype, "contiguous", draw(SEEDS))


def momentum_update_(draw: Draw, small: bool) -> dict[str, Any]:
    centroids = _in_place(draw, _size(draw, 33, 1), 3)
    x = _pixels(draw, centroids.shape[2], small)
    bound = centroids.shape[0] * centroids.shape[1]
    index = _checked_ignore(draw, bound)
    made = {"centroids": centroids, "x": x, "labels": _labels(draw, x, bound, index, flat=True), "ignore_index": index}
    return {**made, "momentum": _number(draw, 0.9, 0.999, 0.0, 1.0, 1), "deterministic": _option(draw, None, True, False)}


def apply_momentum_(draw: Draw, small: bool) -> dict[str, Any]:
    centroids = _in_place(draw, _size(draw, 33, 1), draw(st.sampled_from((3, 2))))
    m = math.prod(centroids.shape[:-1])
    sums = Spec(draw(st.sampled_from(KINDS)), (m, centroids.shape[-1]), _float(draw), draw(layouts(2)), draw(SEEDS))
    counts = Spec("ids", (m,), draw(st.sampled_from(INTEGERS)), draw(layouts(1)), draw(SEEDS), (0, 1, 3, 100))
    momentum = _number(draw, 0.9, 0.999, 0.0, 1.0, 1)
    if draw(st.booleans()):
        momentum = torch.tensor(float(momentum), dtype=_float(draw))
    return {"centroids": centroids, "sums": sums, "counts": counts, "momentum": momentum}


def normalize_embedding(draw: Draw, small: bool) -> dict[str, Any]:
    channels = _size(draw, 33, 1)
    made: dict[str, Any] = {"x": _pixels(draw, channels, small)}
    for name in ("weight", "bias"):
        if draw(st.booleans()):
            made[name] = _vector(draw, channels, ("normal", "constant", "zeros"))
    return {**made, "eps": _number(draw, 1e-5, 1e-12, 1.0, 1), "return_length": draw(st.booleans())}


def _scores(draw: Draw, small: bool) -> Spec:
    shape = (_size(draw, 2), _size(draw, 5 if small else 17, 1), _size(draw, 4, 1), _size(draw, 5, 1))
    return Spec(draw(st.sampled_from(KINDS)), shape, _float(draw), draw(layouts(4)), draw(SEEDS))


def upsample_cross_entropy(draw: Draw, small: bool) -> dict[str, Any]:
    scores = _scores(draw, small)
    size = scores.shape[2:] if draw(st.booleans()) else (_size(draw, 4 if small else 13, 1), _size(draw, 4 if small else 8, 1))
    index = _checked_ignore(draw, scores.shape[1])
    labels = _labels(draw, Spec("", (scores.shape[0], 1, *size), torch.float32, "", 0), scores.shape[1], index)
    return {
        "scores": scores, "labels": labels, "ignore_index": index, "align_corners": draw(st.booleans()),
        "weight": _class_weight(draw, scores.shape[1]), "label_smoothing": _number(draw, 0.0, 0.1, 1.0),
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
    }  # fmt: skip


def upsample_argmax(draw: Draw, small: bool) -> dict[str, Any]:
    scores = _scores(draw, small)
    size = draw(st.sampled_from((scores.shape[2:], 1, 3, (4, 7), [5, 2], (numpy.int64(3), 4), torch.Size((2, 3)))))
    return {"scores": scores, "size": size, "align_corners": draw(st.booleans())}


DRAWN: dict[str, Callable[[Draw, bool], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        centroid_distance, class_scores, nearest_centroid, centroid_cross_entropy, subcentroid_cross_entropy, sinkhorn_assign,
        sinkhorn_plan, cluster_sums, momentum_update_, apply_momentum_, normalize_embedding, upsample_cross_entropy, upsample_argmax,
    )
}  # fmt: skip

LEAVES = {
    "centroid_distance": ("x", "centroids"),
    "class_scores": ("x", "centroids"),
    "centroid_cross_entropy": ("x", "centroids", "norm_weight", "norm_bias", "temperature"),
    "subcentroid_cross_entropy": ("x", "centroids"),
    "sinkhorn_plan": ("similarity",),
    "normalize_embedding": ("x", "weight", "bias"),
    "upsample_cross_entropy": ("scores",),
}


def call_of(draw: Draw, op: str, spoil: bool) -> Call:
    """A call of an op; spoil: with an illegal argument."""
    backend, isa = backend_of(draw)
    arguments = DRAWN[op](draw, backend == "triton")
    if backend == "triton":  # has no float64
        single = {torch.float64: torch.float32}
        for name, v in arguments.items():
            if isinstance(v, Spec) and v.dtype in single:
                arguments[name] = v._replace(dtype=torch.float32)
    call = Call(op, backend, isa, arguments)
    if spoil:
        _spoil(draw, call)
        return call
    possible = [name for name in LEAVES.get(op, ()) if isinstance(arguments.get(name), Spec)]
    call.leaves = tuple(name for name in possible if draw(st.booleans()))
    call.incoming = (draw(SEEDS), draw(st.sampled_from(("contiguous", "transposed", "one sample"))))
    return call


#: Where there is nothing to spoil.
_NOTHING = object()


def _reshaped(change: Callable[[tuple[int, ...]], tuple[int, ...] | None]) -> Callable[[Any], Any]:
    """The tensor with another shape, where there is one."""

    def spoiled(v: Any) -> Any:
        shape = change(v.shape) if isinstance(v, Spec) else None
        return _NOTHING if shape is None or shape == v.shape else v._replace(shape=shape, layout="contiguous")

    return spoiled


_MORE = _reshaped(lambda s: (*s[:-1], s[-1] + 1) if s else None)
_AXIS = _reshaped(lambda s: (*s, 1))
_FEWER_AXES = _reshaped(lambda s: s[1:] if len(s) > 1 else ())
_SWAPPED = _reshaped(lambda s: (*s[:-2], s[-1], s[-2]) if len(s) > 1 else None)
_NO_CHANNEL = _reshaped(lambda s: (s[0], 0, *s[2:]) if len(s) in (2, 4) else None)
_NONE_AT_ALL = _reshaped(lambda s: (0, *s[1:]))


def _as(make: Callable[[torch.Tensor], Any]) -> Callable[[Any], Any]:
    """What is made of the tensor."""
    return lambda v: make(v.make()) if isinstance(v, Spec) else _NOTHING


def _transposed(t: torch.Tensor) -> Any:
    other = t.mT.contiguous().mT
    return _NOTHING if other.is_contiguous() else other


_NO_FLOAT = (_as(lambda t: t.nan_to_num(0, 0, 0).to(torch.int64)), _as(lambda t: t != 0), _as(lambda t: t.to(torch.complex64)))
_NO_TENSOR = (_as(lambda t: t.tolist()), lambda v: "x", _as(lambda t: t.float().numpy()), lambda v: 3)
_ELSEWHERE = (_as(lambda t: t.to("meta")),)
_SPARSE = (_as(lambda t: t.to_sparse()),)
_PIXELS = (_AXIS, _FEWER_AXES, _NO_CHANNEL, *_NO_FLOAT, *_NO_TENSOR, *_SPARSE)
_IDS = (_MORE, _AXIS, _SWAPPED, _as(lambda t: t.double()), _as(lambda t: t != 0), *_NO_TENSOR, *_ELSEWHERE)
_VECTOR = (_MORE, _AXIS, *_NO_FLOAT[:2], *_NO_TENSOR[1:], *_ELSEWHERE)
_WORD = tuple(lambda v, word=word: word for word in ("l2", "DOT", "", 3, True))
_NAN, _TEXT = (lambda v: math.nan), (lambda v: "0.1")
_POSITIVE = (lambda v: 0, lambda v: -1.0, _NAN, lambda v: math.inf, _TEXT, lambda v: 1j, lambda v: [0.1])
_SHARE = (lambda v: -0.1, lambda v: 1.5, _NAN, _TEXT, lambda v: [0.1], lambda v: 0.5j)
_COUNT = (lambda v: 0, lambda v: -1, lambda v: 2.5, lambda v: "2", lambda v: True, lambda v: math.nan, lambda v: [2])
_BEYOND = "beyond"

#: Of every op and argument what may be wrong with it.
ILLEGAL: dict[str, dict[str, tuple[Any, ...]]] = {}
for _op in ("centroid_distance", "class_scores", "nearest_centroid", "centroid_cross_entropy", "subcentroid_cross_entropy"):
    _wrong = (_MORE, _AXIS, _FEWER_AXES, _NONE_AT_ALL, *_NO_FLOAT, *_NO_TENSOR, *_ELSEWHERE)
    ILLEGAL[_op] = {"x": _PIXELS, "centroids": _wrong, "backend": _WORD}
    if _op != "subcentroid_cross_entropy":
        ILLEGAL[_op]["metric"] = _WORD
for _op in ("class_scores", "centroid_cross_entropy", "subcentroid_cross_entropy"):
    ILLEGAL[_op] |= {
        "labels": (*_IDS, _BEYOND),
        "ignore_index": (lambda v: 0, lambda v: 1.5, _TEXT, lambda v: None, lambda v: [1]),
    }
ILLEGAL["centroid_cross_entropy"] |= {
    "norm_weight": _VECTOR, "norm_bias": _VECTOR, "norm_eps": (lambda v: -1.0, _NAN, _TEXT, lambda v: [1]),
    "temperature": (*_POSITIVE, lambda v: torch.ones(2), lambda v: torch.ones(1, dtype=torch.int64), lambda v: None),
    "weight": (lambda v: torch.ones(99), lambda v: [1.0], lambda v: torch.ones(1, 1), lambda v: "balanced"),
    "label_smoothing": _SHARE, "reduction": _WORD,
}  # fmt: skip
ILLEGAL["subcentroid_cross_entropy"] |= {"temperature": (*_POSITIVE, lambda v: torch.ones(())), "reduction": _WORD}
for _op in ("sinkhorn_assign", "sinkhorn_plan"):
    ILLEGAL[_op] = {
        "similarity": _PIXELS, "labels": (*_IDS, _BEYOND), "num_classes": _COUNT, "epsilon": (*_POSITIVE, lambda v: None),
        "iterations": (lambda v: -1, *_COUNT[2:]), "tolerance": (lambda v: -1.0, _NAN, _TEXT, lambda v: [1]),
        "ignore_index": ILLEGAL["class_scores"]["ignore_index"], "backend": _WORD,
    }  # fmt: skip
ILLEGAL["cluster_sums"] = {
    "x": _PIXELS, "labels": (*_IDS, _BEYOND), "num_clusters": _COUNT, "backend": _WORD,
    "ignore_index": ILLEGAL["class_scores"]["ignore_index"],
}  # fmt: skip
_CHANGED = (_MORE, _AXIS, _NONE_AT_ALL, *_NO_FLOAT, *_NO_TENSOR, _as(lambda t: t.half()), _as(_transposed))
ILLEGAL["momentum_update_"] = {
    "centroids": (*_CHANGED, *_ELSEWHERE), "x": _PIXELS, "labels": (*_IDS, _BEYOND), "momentum": _SHARE, "backend": _WORD,
    "ignore_index": ILLEGAL["class_scores"]["ignore_index"],
}  # fmt: skip
ILLEGAL["apply_momentum_"] = {
    "centroids": (*_CHANGED, *_ELSEWHERE), "sums": (_MORE, _AXIS, *_NO_FLOAT, *_NO_TENSOR, *_ELSEWHERE),
    "counts": (_MORE, _AXIS, _as(lambda t: t.double()), _as(lambda t: t != 0), *_NO_TENSOR, *_ELSEWHERE),
    "momentum": (*_SHARE, lambda v: torch.ones(2), lambda v: None), "backend": _WORD,
}  # fmt: skip
ILLEGAL["normalize_embedding"] = {
    "x": _PIXELS, "weight": _VECTOR, "bias": _VECTOR, "eps": (lambda v: -1.0, _NAN, lambda v: math.inf, _TEXT, lambda v: None),
    "backend": _WORD,
}  # fmt: skip
ILLEGAL["upsample_cross_entropy"] = {
    "scores": (_FEWER_AXES, _NO_CHANNEL, *_NO_FLOAT, *_NO_TENSOR, *_SPARSE), "labels": (_AXIS, _FEWER_AXES, *_IDS[3:], _BEYOND),
    "ignore_index": ILLEGAL["class_scores"]["ignore_index"], "label_smoothing": _SHARE, "reduction": _WORD, "backend": _WORD,
    "weight": ILLEGAL["centroid_cross_entropy"]["weight"],
}  # fmt: skip
ILLEGAL["upsample_argmax"] = {
    "scores": (_FEWER_AXES, _NO_CHANNEL, *_NO_FLOAT, *_NO_TENSOR, *_SPARSE), "backend": _WORD,
    "size": tuple(lambda v, s=s: s for s in ((0, 3), (1, 2, 3), -1, 2.5, "4", (), (2.0, 3), (True, 3), None, math.nan)),
}  # fmt: skip


def _spoil(draw: Draw, call: Call) -> None:
    """Make one argument of a legal call illegal; a call where nothing can be is left as it is."""
    name = draw(st.sampled_from(list(ILLEGAL[call.op])))
    how = draw(st.sampled_from(ILLEGAL[call.op][name]))
    if name == "backend":
        call.backend, call.illegal = how(None), name
        return
    if how == _BEYOND and call.backend == "triton":
        return  # a GPU does not look, and leaves such a pixel out
    value = call.arguments.get(name)
    if name in ("weight", "bias", "norm_weight", "norm_bias") and value is None:
        value = Spec("normal", (_length(call),), torch.float32, "contiguous", 0)
    value = _beyond(draw, call, value) if how == _BEYOND else how(value)
    any_shape = call.op.startswith("sinkhorn") and name == "labels" and len(call.arguments["similarity"].shape) == 2
    without = name in ("labels", "ignore_index") and call.arguments.get("labels") is None and call.op == "sinkhorn_plan"
    if (
        value is _NOTHING
        or without
        or (any_shape and how == _AXIS)
        or (name == "labels" and call.arguments.get("num_classes", 0) is None)
    ):
        return
    if name == "norm_bias":
        call.arguments.setdefault("norm_weight", Spec("normal", (_length(call),), torch.float32, "contiguous", 0))
    call.arguments[name], call.illegal = value, name


def _length(call: Call) -> int:
    if "centroids" in call.arguments:
        return call.arguments["centroids"].shape[0]
    return call.arguments["x" if "x" in call.arguments else "scores"].shape[1]


def _beyond(draw: Draw, call: Call, labels: Any) -> Any:
    """Labels with one id too large, if its dtype has room for it."""
    a = call.arguments
    if not isinstance(labels, Spec) or not math.prod(labels.shape):
        return _NOTHING
    bound = a.get("num_classes") or a.get("num_clusters")
    if bound is None:
        shape = (a["centroids"] if "centroids" in a else a["scores"]).shape
        per_class = call.op in ("class_scores", "centroid_cross_entropy", "upsample_cross_entropy")
        bound = shape[1] if call.op == "upsample_cross_entropy" else shape[0] if per_class else shape[0] * shape[1]
    beyond = [int(bound), 255, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1]
    top = torch.iinfo(labels.dtype).max
    possible = [i for i in beyond if int(bound) <= i <= top and i != a.get("ignore_index")]
    return labels._replace(ids=(draw(st.sampled_from(possible)),), layout="contiguous") if possible else _NOTHING


assert set(DRAWN) == {name for name in ops.__all__ if name[0].islower()}
