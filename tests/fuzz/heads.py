"""Random lives of the layers: what each step gives and changes, against the same step in float64."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dnc_kernels import backends, nn
from dnc_kernels.nn import _kmeans

from . import oracle
from .calls import Draw, _checked_ignore, _labels, _option, _size, backend_of
from .judge import Fault, _word, demand, near
from .values import SEEDS, Spec, code_of, layouts

KINDS = ("normal", "integers", "unit", "duplicates", "zeros", "constant", "large", "offset", "tiny", "some NaN", "some Inf")
#: What keeps its rounding errors small enough to be judged.
JUDGED = KINDS[:4]


@dataclass
class HeadCall:
    """A layer made with options, and what is done with it: (method, arguments)."""

    op: str
    backend: str
    isa: str | None
    options: dict[str, Any]
    seed: int
    steps: list[tuple[str, dict[str, Any]]]
    illegal: str | None = None

    def code(self) -> str:
        """A program that does it."""
        options = ", ".join(f"{n}={code_of(v)}" for n, v in self.options.items())
        lines = [
            "import copy, io, numpy, pickle, torch", "from dnc_kernels import backends, nn", "from dnc_kernels.nn import Recent",
            "from tests.fuzz.values import made", f"torch.manual_seed({self.seed})", f"make = lambda: nn.{self.op}({options})",
            f"backends.use_backend({self.backend!r}).__enter__()", "head = make()",
        ]  # fmt: skip
        if self.isa:
            lines.insert(-1, f"backends.use_isa({self.isa!r}).__enter__()")
        for method, arguments in self.steps:
            given = ", ".join(f"{n}={code_of(v)}" for n, v in arguments.items())
            lines.append(ACTIONS[method][1] if method in ACTIONS else f"print(head.{method}({given}))")
        return "\n".join(lines)


def _reloaded(head: Any, make: Callable[[], Any]) -> Any:
    other = make().to(head.prototypes.dtype) if head.prototypes.dtype == torch.float64 else make()
    other.load_state_dict(copy.deepcopy(head.state_dict()))
    return other.train(head.training)


def _pickled(head: Any, make: Callable[[], Any]) -> Any:
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


#: What is done to a whole layer, and its code.
ACTIONS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "train": (lambda head, make: head.train(), "head.train()"),
    "eval": (lambda head, make: head.eval(), "head.eval()"),
    "reload": (_reloaded, "old, head = head, make(); head.load_state_dict(old.state_dict()); head.train(old.training)"),
    "deepcopy": (lambda head, make: copy.deepcopy(head), "head = copy.deepcopy(head)"),
    "pickle": (lambda head, make: pickle.loads(pickle.dumps(head)), "head = pickle.loads(pickle.dumps(head))"),
    "save": (
        _pickled,
        "file = io.BytesIO(); torch.save(head, file); file.seek(0); head = torch.load(file, weights_only=False)",
    ),
    "half": (lambda head, make: head.half(), "head.half()"),
    "bfloat16": (lambda head, make: head.bfloat16(), "head.bfloat16()"),
    "double": (lambda head, make: head.double(), "head.double()"),
    "float": (lambda head, make: head.float(), "head.float()"),
}


def _features(draw: Draw, channels: int, rank: int, dtype: torch.dtype) -> Spec:
    shape = (_size(draw, 17), channels) if rank == 2 else (_size(draw, 2), channels, _size(draw, 4, 1), _size(draw, 5, 1))
    kind = draw(st.sampled_from(KINDS)) if draw(st.integers(0, 3)) == 0 else draw(st.sampled_from(JUDGED))
    return Spec(kind, shape, dtype, draw(layouts(rank)), draw(SEEDS))


def _head_labels(draw: Draw, x: Spec, classes: int, ignore_index: int) -> Spec:
    """As large as the features, or of another size."""
    if len(x.shape) == 2 or draw(st.booleans()):
        return _labels(draw, x, classes, ignore_index)
    size = (_size(draw, 8, 1), _size(draw, 7, 1))
    height, width = x.shape[2:]
    if height != width and size[0] * height == size[1] * width:  # rows and columns swapped, which is refused
        size = size[::-1]
    return _labels(draw, x._replace(shape=(x.shape[0], 1, *size)), classes, ignore_index)


def _options(draw: Draw, head: str, classes: int) -> dict[str, Any]:
    """Some options of a head, most at their defaults."""
    words: dict[str, tuple[Any, ...]] = {
        "recipe": ("released", "slow", "classification", "segmentation", "default"),
        "momentum": (0.9, 0.0, 1.0, (0.5, 0.99, 4), nn.Recent(0.5, 0.9)),
        "epsilon": (1.0, 0.01), "iterations": (0, 1, numpy.int64(5)), "assignment": ("gumbel",),
        "ppc_weight": (0.0, 1.0), "ppd_weight": (0.0, 1.0), "sync": ("none", "sums", "average"),
        "scores": ("norm", "temperature", "scale"), "temperature": (1.0,), "scale": (1.0,), "confidence": ("none", "length"),
        "ppc_temperature": (0.1, 1.0), "update_from": ("all", "correct"), "init": ("random", "orthogonal", "data"),
        "init_step": (1,), "warmup_steps": (1,), "revive_after": (1, 0), "label_smoothing": (0.1, 1.0),
        "accumulation_steps": (2, 3), "dtype": (torch.float64, torch.bfloat16, torch.float16),
        "class_weight": ([1.0] * classes, torch.linspace(0.5, 2, classes), torch.arange(classes).double()),
    }  # fmt: skip
    if head == "DNCHead":
        words |= {
            "embed_channels": (3, 8), "align_corners": (True,), "label_mode": ("nearest", "nearest-exact"),
            "loss_size": ("features", "labels"), "checkpoint": ("none", "scores", "all"), "band_pixels": (1, 5, 64),
            "pixels_per_class": (1, 1000),
        }  # fmt: skip
    else:
        words |= {"memory_size": (0, 1, 3)}
    chosen = draw(st.lists(st.sampled_from(sorted(words)), max_size=5, unique=True))
    return {name: draw(st.sampled_from(words[name])) for name in sorted(chosen)}


def _head_call(draw: Draw, op: str, spoil: bool) -> HeadCall:
    backend, isa = backend_of(draw, triton=40)
    rank = 4 if op == "DNCHead" else 2
    classes, channels = draw(st.sampled_from((3, 1, 2, 7))), draw(st.sampled_from((4, 1, 2, 8, 13)))
    ignore_index = _checked_ignore(draw, classes)
    size = {"in_channels" if rank == 4 else "in_features": channels, "num_classes": classes}
    size["num_subcentroids"] = draw(st.sampled_from((2, 1, 3, 10)))
    options = {**size, **_options(draw, op, classes), "ignore_index": ignore_index}
    if backend == "triton" and options.get("dtype") == torch.float64:  # Triton has none
        del options["dtype"]
    call = HeadCall(op, backend, isa, options, draw(SEEDS), [])
    dtype = options.get("dtype", torch.float32)
    for _ in range(draw(st.sampled_from((1, 2, 3, 4)))):
        step = draw(st.sampled_from(("loss", "loss", "loss", "forward", "predict", "explain", "data", "action")))
        if step == "action":
            name = draw(st.sampled_from(sorted(ACTIONS)))
            kinds = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64, "float": torch.float32}
            if backend == "triton" and name == "double":
                continue
            dtype = kinds.get(name, dtype)
            call.steps.append((name, {}))
            continue
        x = _features(draw, channels, rank, dtype)
        given: dict[str, Any] = {"features": x}
        if step == "data":
            step = draw(st.sampled_from(("diagnose", "refit_", "initialize_from_")))
            given = {
                "data" if step != "initialize_from_" else "features": x,
                "labels": _head_labels(draw, x, classes, ignore_index),
            }
        if step == "loss":
            given |= {"labels": _head_labels(draw, x, classes, ignore_index), "update": _option(draw, None, True, False)}
        if step == "predict" and rank == 4:
            given["size"] = draw(st.sampled_from((None, 3, (4, 7), [numpy.int64(2), 5])))
        call.steps.append((step, given))
    if spoil:
        _spoil(draw, call, classes, rank)
    return call


_POSITIVE = (0, -1, 2.5, "2", None, True, math.nan)
_FINITE = (0, -1.0, math.nan, math.inf, "0.1", [1.0])
_WORD = ("none at all", 3, "", True)
_WRONG_OPTIONS: dict[str, tuple[Any, ...]] = {
    "num_classes": _POSITIVE, "num_subcentroids": (*_POSITIVE, 257), "ignore_index": (0, 1.5, "255", None, math.nan),
    "momentum": (-0.1, 1.5, math.nan, "0.9", (0.5, 0.9), (0.5, 2.0, 4), (0.5, 0.9, 0), [0.9], 0.5j),
    "epsilon": _FINITE, "iterations": (-1, 2.5, "3", True), "temperature": _FINITE, "scale": _FINITE,
    "ppc_weight": (-1.0, math.nan, math.inf, "0.1", [1]), "ppd_weight": (-1.0, math.nan, math.inf, "0.1"),
    "ppc_temperature": _FINITE, "label_smoothing": (-0.1, 1.1, math.nan, "0.1"), "recipe": _WORD, "scores": _WORD,
    "confidence": _WORD, "assignment": _WORD, "update_from": _WORD, "sync": _WORD, "init": _WORD, "init_step": (-1, 1.5, "1"),
    "warmup_steps": (-1, 1.5, "1"), "revive_after": (-1, 1.5, "1", True), "accumulation_steps": _POSITIVE,
    "class_weight": ([1.0], [-1.0] * 3, "balanced", [[1.0]], [math.nan] * 3, 1.0), "dtype": (torch.int64, "float32", torch.complex64),
    "generator": (3,),
}  # fmt: skip
_WRONG_OF = {
    "DNCHead": {"in_channels": _POSITIVE, "embed_channels": (0, -1, 2.5, "2", True), "label_mode": _WORD, "loss_size": _WORD,
                "checkpoint": _WORD, "band_pixels": (0, -1, 2.5, "2"), "pixels_per_class": (0, -1, 2.5, "2")},
    "DNCClassifier": {"in_features": _POSITIVE, "memory_size": (-1, 2.5, "2", None, True)},
}  # fmt: skip


def _spoil(draw: Draw, call: HeadCall, classes: int, rank: int) -> None:
    wrong = {**_WRONG_OPTIONS, **_WRONG_OF[call.op]}
    if draw(st.booleans()) or not call.steps:
        name = draw(st.sampled_from(sorted(wrong)))
        call.options[name] = draw(st.sampled_from(wrong[name]))
        if name == "class_weight":
            call.options["num_classes"] = 3
        if name == "num_classes":
            call.options.pop("class_weight", None)
        call.illegal, call.steps = name, []
        return
    _, given = call.steps[-1]
    if not given:
        return
    name = draw(st.sampled_from(sorted(given)))
    value = given[name]
    if name in ("features", "data"):
        changes: list[Any] = [
            value._replace(shape=(*value.shape, 1), layout="contiguous"),
            value.make().to(torch.complex64),
            value._replace(shape=(value.shape[0], value.shape[1] + 1, *value.shape[2:]), layout="contiguous"),
            (value.make() > 0),
            (value.make() > 0).long(),
            value.make().to("meta"),
            "x",
            value.make().to_sparse(),
        ]
    elif name == "labels":
        longer = (*value.shape[:-1], value.shape[-1] + 1) if rank == 2 else (value.shape[0] + 1, *value.shape[1:])
        changes = [
            value._replace(shape=longer, layout="contiguous"),
            value._replace(shape=(*value.shape, 3), layout="contiguous"),
            value.make().double(),
            value.make() != 0,
            "x",
            value.make().tolist(),
            value.make().to("meta"),
        ]
        beyond = [i for i in (classes, 255, 2**31, 2**32 + 1, 2**63) if i >= classes and i <= torch.iinfo(value.dtype).max]
        beyond = [i for i in beyond if i != call.options["ignore_index"]]
        if math.prod(value.shape) and beyond and len(value.shape) == rank - 1:
            changes.append(value._replace(ids=(draw(st.sampled_from(beyond)),), layout="contiguous"))
    elif name == "size":
        changes = [(0, 3), (1, 2, 3), -1, 2.5, "4", (2.0, 3)]
    else:
        return
    given[name] = draw(st.sampled_from(changes))
    call.illegal = name


def run(call: HeadCall) -> None:
    """Raise a fault if a step does not do what is promised."""
    torch.manual_seed(call.seed)
    with ExitStack() as stack:
        stack.enter_context(backends.use_backend(call.backend))
        stack.enter_context(patch.object(_kmeans, "RESERVOIR", 2**12))  # whose size, not the samples', sets the time
        if call.isa:
            stack.enter_context(backends.use_isa(call.isa))

        def make() -> Any:
            return getattr(nn, call.op)(**call.options)

        if call.illegal and not call.steps:
            _refused(call, "", make, call.options.get(call.illegal))
            return
        head = _does("constructor", make)
        pending: list[Any] = [None, 0]
        for number, (method, arguments) in enumerate(call.steps):
            if method in ACTIONS:
                before = _state(head)
                head = _does(method, lambda: ACTIONS[method][0](head, make))  # noqa: B023
                if method in ("reload", "deepcopy", "pickle", "save"):
                    _alike(method, before, _state(head), call)
                continue
            given = {n: v.make() if isinstance(v, Spec) else v for n, v in arguments.items()}
            if call.illegal and number == len(call.steps) - 1:
                _refused(call, f".{method}", lambda: getattr(head, method)(**given), given[call.illegal])  # noqa: B023
                return
            _step(call, head, method, arguments, given, pending)


def _does(what: str, act: Callable[[], Any]) -> Any:
    try:
        return act()
    except Exception as e:
        raise Fault(f"{what} refused", f"{type(e).__name__}: {str(e)[:400]}") from None


def _refused(call: HeadCall, method: str, act: Callable[[], Any], value: Any) -> None:
    what = f"{method or 'option'} {call.illegal} ({_word(value)})"
    try:
        result = act()
    except Exception as e:
        names = {"data": "data|features|labels", "features": "features|labels", "labels": "labels|data"}.get(
            call.illegal, call.illegal
        )
        ours = re.match(rf"{call.op}{re.escape(method)}: .*\b({names})\b", str(e), re.DOTALL) is not None
        kind = isinstance(e, (ValueError, TypeError, NotImplementedError))
        demand(ours and kind, f"unclear error for {what}", f"{type(e).__name__}: {str(e)[:300]}")
    else:
        text = repr(result)
        raise Fault(f"accepted {what}", f"no error; got {text[:200]}")


def _state(head: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in (*head.named_parameters(), *head.named_buffers())}


#: Not in every state dict, by documentation.
_FLEETING = ("class_counts", "nonfinite_pixels", "bad_labels", "last_counts", "idle_updates", "wins", "num_updates")


def _alike(method: str, before: dict[str, Tensor], after: dict[str, Tensor], call: HeadCall) -> None:
    for name, old in before.items():
        if method == "reload" and name.endswith(_FLEETING):
            continue
        new = after[name]
        if old.is_floating_point() and method == "reload":  # a fresh layer has its own dtype
            new, old = new.double(), old.double().to(new.dtype).double()
        demand(
            torch.equal(new, old),
            f"{method} changes {name}",
            f"{old.flatten()[:8].tolist()} is now {new.flatten()[:8].tolist()}",
        )


def _step(call: HeadCall, head: Any, method: str, arguments: dict[str, Any], given: dict[str, Any], pending: list[Any]) -> None:
    name = "data" if "data" in given else "features"
    x, kind = given[name], arguments[name].kind
    before = _state(head)
    if method in ("forward", "loss"):
        x.requires_grad_()
    twin = Twin(call, head, x)
    result = _does(method, lambda: head(x) if method == "forward" else getattr(head, method)(**given))
    after = _state(head)
    changes = method in ("refit_", "initialize_from_") or (
        method == "loss" and (head.training if given["update"] is None else given["update"])
    )
    if not changes:
        for n, old in before.items():
            demand(_same(old, after[n]), f"{method} changes {n}", "though nothing was to be changed")
    p = after["prototypes"]
    demand(bool(p.isfinite().all()), f"{method}: sub-centroids", "not finite")
    demand(bool(((p.double().norm(dim=2) - 1).abs() < 1e-5).all()), f"{method}: sub-centroids", "not of length 1")
    judged = kind in JUDGED and twin.clear
    if method == "forward":
        _judge_forward(twin, result, judged)
    elif method == "predict":
        _judge_predict(call, twin, result, given.get("size"), judged)
    elif method == "explain":
        _judge_explain(twin, result, judged)
    elif method == "loss":
        _judge_loss(call, head, twin, result, given["labels"], changes, before, after, judged, pending)
    else:
        if method != "diagnose":
            pending[:] = [None, 0] if method == "refit_" else pending
        kept = oracle.left_out(given["labels"], twin.classes, int(call.options["ignore_index"]))
        if judged and twin.flat and method == "diagnose" and (twin.e.norm(dim=1) > 0.9).all():
            counts = torch.bincount(kept[kept >= 0], minlength=twin.classes)
            demand(torch.equal(result.counts, counts), "diagnose: counts", f"{result.counts.tolist()}, not {counts.tolist()}")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


class Twin:
    """A head's step in float64, from its parameters and sub-centroids as they are now."""

    def __init__(self, call: HeadCall, head: Any, x: Tensor) -> None:
        self.head, self.leaf, self.flat = head, x, x.ndim == 2
        self.classes, self.k, self.channels = head.prototypes.shape
        self.wide = {n: t.detach().double().clone().requires_grad_() for n, t in head.named_parameters()}
        self.wide["features"] = x.detach().double().requires_grad_()
        self.names = [n for n in self.wide if n != "features"]
        maps = self.wide["features"]
        if getattr(head, "projection", None) is not None:
            maps = F.conv2d(maps, self.wide["projection.weight"], self.wide["projection.bias"])
        self.maps = maps
        rows = oracle.rows(maps)
        norm = head.feat_norm
        self.e, _, length = oracle.embedded(rows, self.wide["feat_norm.weight"], self.wide["feat_norm.bias"], norm.eps)
        p = head.prototypes.detach().double().clone()  # an update moves them in place
        norms = p.norm(dim=2, keepdim=True)  # within 1e-6 a row is of unit length as it is
        self.p = p if head.training else torch.where((norms - 1).abs() <= 1e-6, p, p / norms)
        self.finite = rows.detach().isfinite().all(1)
        self.s = torch.einsum("nd,ckd->nck", self.e, self.p)
        r = self.s.amax(2)
        if head.scores == "norm":
            self.logits = F.layer_norm(
                r, (self.classes,), self.wide["mask_norm.weight"], self.wide["mask_norm.bias"], head.mask_norm.eps
            )
        else:
            r = r * length[:, None] if head.confidence == "length" else r
            self.logits = r * self.wide["logit_scale"].exp() if head.scores == "scale" else r / head.temperature
        parameters = [t.dtype for t in head.parameters()]
        halves = [d for d in (x.dtype, *parameters) if d.itemsize == 2]
        self.precision = (
            halves[0]
            if halves
            else torch.float64
            if x.dtype == torch.float64 and torch.float32 not in parameters
            else torch.float32
        )
        if call.backend == "triton" and self.precision == torch.float64:
            self.precision = torch.float32
        # statistics of a pixel whose channels are nearly alike are rounding
        spread = (rows - rows.mean(1, keepdim=True)).detach().norm(dim=1) / rows.detach().norm(dim=1).clamp_min(1e-30)
        # of channels that are alike but for the rounding of their mean, so is the direction
        self.clear = bool((spread > 1e-6).all())
        self.steep = float((1 / spread.clamp_min(1e-3)).max()) if len(rows) else 1.0
        rstd = 1 / length.detach()
        self.strength = float(rstd.max()) if len(rows) else 1.0
        self.size = self.steep * (1 + float(self.logits.detach().abs().max()) if len(rows) and self.finite.all() else 1.0)

    def slack(self) -> float:
        """Error of a logit or similarity."""
        eps = max(torch.finfo(self.precision).eps, torch.finfo(torch.float64).eps)
        sharp = 32.0 if self.head.scores == "norm" else 1.0
        return 64 * eps * math.sqrt(self.channels + self.classes) * self.size * sharp

    def shaped(self, values: Tensor) -> Tensor:
        return oracle.mapped(self.maps.detach(), values)


def _judge_forward(twin: Twin, result: Tensor, judged: bool) -> None:
    demand(result.dtype in (torch.float32, torch.float64), "forward", f"dtype {result.dtype}")
    if judged and twin.head.scores != "norm":
        near(
            "forward",
            result,
            twin.shaped(twin.logits),
            "head",
            terms=twin.channels,
            scale=2 * twin.size,
            precision=twin.precision,
        )


def _judge_predict(call: HeadCall, twin: Twin, result: Tensor, size: Any, judged: bool) -> None:
    demand(result.dtype == torch.int64, "predict", f"dtype {result.dtype}")
    logits = twin.shaped(twin.logits.detach())
    if not twin.flat:
        size = (
            logits.shape[2:]
            if size is None
            else (int(size[0]), int(size[1]))
            if isinstance(size, (tuple, list))
            else (int(size),) * 2
        )
        logits = oracle.interpolated(logits, tuple(size), bool(call.options.get("align_corners", False)))
    demand(result.shape == logits.amax(1).shape, "predict", f"shape {list(result.shape)}")
    if judged and result.numel():
        demand(bool(((result >= 0) & (result < twin.classes)).all()), "predict", str(result.tolist()))
        behind = logits.amax(1) - logits.gather(1, result[:, None])[:, 0]
        demand(float(behind.max()) <= 2 * twin.slack(), "predict", f"logits {float(behind.max()):.3g} below the best")


def _judge_explain(twin: Twin, result: Any, judged: bool) -> None:
    label, sub, score = (t.flatten() for t in result)
    demand(bool((label[~twin.finite] == -1).all()), "explain", "not -1 for a pixel that is not finite")
    if judged and len(label):
        s = twin.s.detach().flatten(1)
        taken = s.gather(1, (label * twin.k + sub)[:, None])[:, 0]
        demand(float((s.amax(1) - taken).max()) <= 2 * twin.slack(), "explain", "not the nearest")
        near("explain", score, taken, "head", terms=twin.channels, scale=twin.steep, precision=twin.precision)


def _judge_loss(call: HeadCall, head: Any, twin: Twin, result: Any, labels: Tensor, update: bool, before: dict[str, Tensor],
                after: dict[str, Tensor], judged: bool, pending: list[Any]) -> None:  # fmt: skip
    ignore_index, o = int(call.options["ignore_index"]), head
    kept = oracle.left_out(labels, twin.classes, ignore_index).view(labels.shape)
    small = kept.flatten() if twin.flat else oracle.nearest_labels(kept, twin.maps.shape[2:], o.label_mode).flatten()
    if update:
        counts = torch.bincount(small[small >= 0], minlength=twin.classes)
        demand(
            torch.equal(after["class_counts"], counts),
            "class_counts",
            f"{after['class_counts'].tolist()}, not {counts.tolist()}",
        )
        bad = int((~twin.finite).sum())
        demand(int(after["nonfinite_pixels"] - before["nonfinite_pixels"]) == bad, "nonfinite_pixels", f"not {bad} more")
    whole = (
        result.cross_entropy
        + (o.ppc_weight * result.ppc if o.ppc_weight else 0)
        + (o.ppd_weight * result.ppd if o.ppd_weight else 0)
    )
    gap = float((whole - result.loss).detach().abs().nan_to_num(0))
    demand(gap <= 1e-4 * (1 + float(result.loss.detach().abs().nan_to_num(0))), "loss", "not the weighted sum of its parts")
    if bool((small >= 0).any()) and bool((~twin.finite[small >= 0]).any()) and twin.flat:
        demand(bool(result.loss.isnan()), "loss", f"{float(result.loss.detach())} with a labelled pixel that is not finite")
    if not judged or not twin.finite.all():
        pending[:] = [None, math.nan]
        return
    if not len(twin.s):
        return
    # cross-entropy
    if o.__class__.__name__ == "DNCHead" and o.loss_size == "labels":
        logits, target = oracle.interpolated(twin.shaped(twin.logits), tuple(labels.shape[1:]), o.align_corners), kept
    else:
        logits, target = twin.logits, small
    weight = None if o.class_weight is None else o.class_weight.double()
    total = oracle.cross_entropy(logits, target, weight, o.label_smoothing, "sum")
    mass = (target >= 0).sum().double() if weight is None else torch.where(target >= 0, weight[target.clamp_min(0)], 0).sum()
    cross_entropy = total / torch.where(mass > 0, mass, 1)
    sharp = 1.0 if o.scores != "norm" else 32.0
    skew = 1.0 if weight is None else float(weight.max() * (target >= 0).sum() / mass) if mass > 0 else 1.0
    terms, scale = twin.channels + twin.classes, twin.size * sharp * max(skew, 1.0)
    near("cross_entropy", result.cross_entropy, cross_entropy, "head", terms=terms, scale=scale, precision=twin.precision)
    # clustering
    own = twin.s[torch.arange(len(small)), small.clamp_min(0)]
    group, all_own = small, own.detach()
    if getattr(o, "memory", None) is not None:
        stored, held = before["memory.storage"][:-1].double(), torch.arange(o.num_classes * o.memory_size)
        owner = held // o.memory_size
        filled = held % o.memory_size < before["memory.pushed"].clamp(max=o.memory_size)[owner]
        group = torch.cat([small, torch.where(filled, owner, -1)])
        all_own = torch.cat([all_own, torch.einsum("nd,nkd->nk", stored, twin.p[owner])])
    plan, _ = oracle.transport(all_own, group, twin.classes, float(o.epsilon), int(o.iterations), None)
    counts = torch.bincount(group[group >= 0], minlength=twin.classes)
    alone = (counts[group.clamp_min(0)] == 1)[:, None] | (int(o.iterations) == 0)
    plan = torch.where(alone, all_own * 1e3, plan.clamp_min(1e-300).log())[: len(small)]
    sub = plan.argmax(1)
    decided = o.assignment == "argmax" and getattr(o, "pixels_per_class", None) in (None, 1000)
    blur = twin.slack() * (2 / min(float(o.epsilon), 1.0) + 1)
    if twin.k > 1 and decided:
        top = plan[small >= 0].topk(2, 1).values
        decided = bool((top[:, 0] - top[:, 1] > 10 * blur).all())
    if not decided:
        pending[:] = [None, math.nan]
        return
    cluster = torch.where(small >= 0, small * twin.k + sub, -1)
    count, used = (small >= 0).sum().clamp(min=1), cluster >= 0
    towards = own.gather(1, sub[:, None])[:, 0]
    ppc, ppd = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    if o.ppc_weight:
        ppc = oracle.cross_entropy(twin.s.flatten(1) / o.ppc_temperature, cluster, None, 0.0, "sum") / count
    if o.ppd_weight:
        ppd = torch.where(used, (1 - towards).square(), 0).sum() / count
    heat = 1 / min(o.ppc_temperature, 1.0)
    near("ppc", result.ppc, ppc, "head", terms=terms, scale=twin.steep * heat, precision=twin.precision)
    near("ppd", result.ppd, ppd, "head", terms=terms, scale=twin.steep, precision=twin.precision)
    # gradients, where no other sub-centroid is as near
    clear = True
    if twin.k > 1:
        top = twin.s.detach().topk(2, 2).values
        clear = bool((top[..., 0] - top[..., 1] > 4 * twin.slack()).all())
    loss = cross_entropy + (o.ppc_weight * ppc if o.ppc_weight else 0) + (o.ppd_weight * ppd if o.ppd_weight else 0)
    names = ["features", *twin.names]
    if clear and result.loss.requires_grad and loss.requires_grad and twin.precision.itemsize > 2 and not alone.all():
        got = torch.autograd.grad(result.loss, [twin.leaf, *head.parameters()], allow_unused=True)
        want = torch.autograd.grad(loss, [twin.wide[n] for n in names], allow_unused=True)
        for n, g, w in zip(names, got, want, strict=True):
            w = torch.zeros_like(twin.wide[n]) if w is None else w
            reach = float(w.abs().max()) + twin.strength * (1 if n == "features" else 0) / max(len(small), 1)
            if g is not None and g.numel():
                near(f"gradient of {n}", g, w, "head", terms=len(small) * twin.channels, scale=4 * (reach + 1e-3) * scale * heat,
                     precision=twin.precision)  # fmt: skip
            else:
                demand(not w.any(), f"gradient of {n}", "None")
    if update:
        _judge_update(call, head, twin, small, cluster, before, after, pending)


def _judge_update(call: HeadCall, head: Any, twin: Twin, small: Tensor, cluster: Tensor, before: dict[str, Tensor],
                  after: dict[str, Tensor], pending: list[Any]) -> None:  # fmt: skip
    """Sub-centroids after a step."""
    if head.init == "data" or head.revive_after:
        return
    if head.update_from == "correct":
        logits = twin.logits.detach()
        if twin.classes > 1:
            top = logits.topk(2, 1).values
            if bool((top[:, 0] - top[:, 1] <= 4 * twin.slack())[small >= 0].any()):
                pending[:] = [None, math.nan]
                return
        cluster = torch.where(logits.argmax(1) == small, cluster, -1)
    m = twin.classes * twin.k
    sums, counts, _ = oracle.cluster_sums(twin.e.detach(), cluster, m)
    if math.isnan(pending[1]):
        return
    if pending[0] is not None:
        sums, counts = sums + pending[0][0], counts + pending[0][1]
    pending[:] = [(sums, counts), pending[1] + 1]
    done = int(before["num_updates"])
    if pending[1] < head.accumulation_steps:
        demand(
            torch.equal(before["prototypes"], after["prototypes"]), "sub-centroids", "moved before the last accumulated loss"
        )
        return
    pending[:] = [None, 0]
    demand(int(after["num_updates"]) == done + 1, "num_updates", f"{int(after['num_updates'])} after {done}")
    demand(
        torch.equal(after["last_counts"].flatten(), counts),
        "last_counts",
        f"{after['last_counts'].tolist()}, not {counts.tolist()}",
    )
    momentum = head.momentum
    if isinstance(momentum, tuple):
        start, end, steps = momentum
        momentum = end - (end - start) * (1 + math.cos(math.pi * min(done / steps, 1))) / 2
    elif callable(momentum):
        momentum = 1 - 1 / (momentum.fraction * done + 1 / (1 - momentum.start))
    old = before["prototypes"].double().flatten(0, 1)
    if done < head.warmup_steps:
        counts = torch.zeros_like(counts)
    expected, norm = oracle.moved(old, sums, counts, float(momentum))
    tame = (counts == 0) | ((sums.norm(dim=1) > 1e-2) & (norm[:, 0] > 1e-2))
    got = after["prototypes"].flatten(0, 1)
    near("sub-centroids", got, expected, "direction", terms=max(int(counts.max()), 1) + twin.channels, scale=twin.steep * 100.0,
         judged=tame[:, None], precision=twin.precision)  # fmt: skip


TARGETS = {op: (lambda draw, spoil, op=op: _head_call(draw, op, spoil), run) for op in ("DNCHead", "DNCClassifier")}
