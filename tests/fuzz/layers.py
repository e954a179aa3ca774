"""Random calls of the smaller parts of the layers: bare sub-centroids, the memory, nearest samples, label maps of another size."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dnc_kernels import backends, nn

from . import oracle
from .calls import BACKENDS, Draw, _labels, _size
from .judge import Fault, _word, demand, near
from .values import INTEGERS, SEEDS, Spec, code_of, layouts


@dataclass
class LayerCall:
    """A part made with arguments, and one call of a method of it (or the function itself)."""

    op: str
    backend: str
    isa: str | None
    sizes: tuple[int, int, int]
    method: str
    arguments: dict[str, Any]
    seed: int
    illegal: str | None = None

    def code(self) -> str:
        """A program that makes the call."""
        given = ", ".join(f"{n}={code_of(v)}" for n, v in self.arguments.items())
        made = f"nn.{self.op}{self.sizes}" if self.op in ("SubCentroids", "FeatureMemory") else f"nn.SubCentroids{self.sizes}"
        owner = "nn" if self.method == self.op or self.op == "nearest_samples" else "part"
        first = "part, " if self.op == "nearest_samples" else ""
        return (
            f"import numpy, torch\nfrom dnc_kernels import backends, nn\nfrom tests.fuzz.values import made\n"
            f"torch.manual_seed({self.seed})\npart = {made}\nprint({owner}.{self.method}({first}{given}))"
        )


_WRONG = ("float", "bool", "shape", "text", "list", "meta", "beyond")


def call_of(draw: Draw, op: str, spoil: bool) -> LayerCall:
    backend, isa = draw(st.sampled_from(BACKENDS))
    classes, k, channels = draw(st.sampled_from((3, 1, 7))), draw(st.sampled_from((2, 1, 5))), draw(st.sampled_from((4, 1, 13)))
    call = LayerCall(op, backend, isa, (classes, k, channels), op, {}, draw(SEEDS))
    dtype = draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)))
    if op == "resize_labels":
        shape = (_size(draw, 3), _size(draw, 17, 1), _size(draw, 8, 1))[draw(st.integers(0, 1)) :]
        labels = Spec("ids", shape, draw(st.sampled_from(INTEGERS)), draw(layouts(len(shape))), draw(SEEDS), tuple(range(100)))
        size = draw(st.sampled_from((3, 1, (4, 7), (16, 2), [numpy.int64(5), 33], shape[-2:])))
        call.arguments = {"labels": labels, "size": size, "mode": draw(st.sampled_from(("nearest-exact", "nearest")))}
        bound = None
    else:
        width, kind = channels, "unit" if op == "nearest_samples" else draw(st.sampled_from(("unit", "some NaN")))
        if op == "SubCentroids":
            call.method = draw(st.sampled_from(("cluster", "update_")))
            width = k if call.method == "cluster" else channels
        else:
            call.method = {"FeatureMemory": "push"}.get(op, op)
        maps = op != "FeatureMemory" and draw(st.booleans())
        shape = (_size(draw, 2), width, _size(draw, 4), _size(draw, 5)) if maps else (_size(draw, 17), width)
        layout = draw(layouts(len(shape)))
        if kind == "unit" and layout.startswith("one "):  # values repeated along another axis would not be of unit length
            layout = "contiguous"
        x = Spec(kind, shape, dtype, layout, draw(SEEDS))
        bound = classes * k if call.method == "update_" else classes
        name = {"cluster": "own_similarity", "update_": "x", "push": "features"}.get(call.method, "embedding")
        call.arguments = {name: x, "labels": _labels(draw, x, bound, -1, flat=op == "SubCentroids")}
        if op == "nearest_samples":
            call.arguments |= {"count": draw(st.sampled_from((3, 1, numpy.int64(2)))), "nearest_only": draw(st.booleans())}
    if spoil:
        _spoil(draw, call, bound)
    return call


def _spoil(draw: Draw, call: LayerCall, bound: int | None) -> None:
    name = draw(st.sampled_from([n for n, v in call.arguments.items() if isinstance(v, Spec)]))
    value, how = call.arguments[name], draw(st.sampled_from(_WRONG))
    if how == "float":
        wrong: Any = value.make().double() if name == "labels" else value.make().nan_to_num(0).long()
    elif how == "bool":
        wrong = value.make() != 0
    elif how == "shape":
        wrong = value._replace(shape=(*value.shape, 2, 2, 2), layout="contiguous")
    elif how == "meta" and call.op != "resize_labels":
        wrong = value.make().to("meta")
    elif how == "beyond" and bound is not None:
        possible = [
            i for i in (bound, 255, 2**31, 2**32 + 1, 2**63) if bound <= i <= torch.iinfo(call.arguments["labels"].dtype).max
        ]
        if not possible or not math.prod(call.arguments["labels"].shape):
            return
        name = "labels"
        wrong = call.arguments["labels"]._replace(ids=(draw(st.sampled_from(possible)),), layout="contiguous")
    else:
        wrong = "x" if how == "text" else value.make().tolist()
    if how == "shape" and name == "labels" and not math.prod(value.shape):
        return
    call.arguments[name], call.illegal = wrong, name


def run(call: LayerCall) -> None:
    """Raise a fault if the call does not do what is promised."""
    torch.manual_seed(call.seed)
    with ExitStack() as stack:
        stack.enter_context(backends.use_backend(call.backend))
        if call.isa:
            stack.enter_context(backends.use_isa(call.isa))
        part = nn.FeatureMemory(*call.sizes) if call.op == "FeatureMemory" else nn.SubCentroids(*call.sizes, momentum=0.9)
        given = {n: v.make() if isinstance(v, Spec) else v for n, v in call.arguments.items()}
        before = {n: v.clone() for n, v in given.items() if isinstance(v, Tensor) and not v.is_meta}
        rows = part.prototypes.clone() if call.op != "FeatureMemory" else None
        function = getattr(nn, call.op) if hasattr(nn, call.method) else getattr(part, call.method)
        try:
            result = function(part, **given) if call.op == "nearest_samples" else function(**given)
        except Exception as e:
            text = f"{type(e).__name__}: {str(e)[:300]}"
            if call.illegal is None:
                raise Fault(f"{call.method} refused", text) from None
            ours = re.match(rf"(\w+\.)?\w+: .*\b({'|'.join(call.arguments)})\b", str(e), re.DOTALL) is not None
            what = f"unclear error for {call.method} {call.illegal} ({_word(given[call.illegal])})"
            demand(ours and isinstance(e, (ValueError, TypeError, NotImplementedError)), what, text)
            return
        if call.illegal is not None:
            raise Fault(
                f"accepted {call.method} {call.illegal} ({_word(given[call.illegal])})", f"no error; got {result!r}"[:300]
            )
        for name, old in before.items():
            same = (
                torch.equal(given[name].nan_to_num(0.5), old.nan_to_num(0.5))
                if old.is_floating_point()
                else torch.equal(given[name], old)
            )
            demand(same, "input changed", name)
        _JUDGES[call.method](call, part, given, result, rows)


def _cluster(call: LayerCall, part: Any, given: dict[str, Any], result: Tensor, rows: Tensor) -> None:
    s = oracle.rows(given["own_similarity"])
    labels, (classes, k, _) = oracle.left_out(given["labels"], call.sizes[0], -1), call.sizes
    none = (labels < 0) | ~s.isfinite().all(1)
    got = result.flatten()
    demand(torch.equal(got < 0, none), "cluster", lambda: f"{got.tolist()} of labels {labels.tolist()}")
    demand(bool((got[~none] // k == labels[~none]).all()), "cluster", "of another class")
    plan, _ = oracle.transport(s, torch.where(none, -1, labels), classes, 0.05, 3, None)
    taken = plan.gather(1, (got % k).clamp_min(0)[:, None])[:, 0]
    counts = torch.bincount(labels[~none], minlength=classes)
    alone = counts[labels.clamp_min(0)] == 1
    demand(bool((taken >= 0.999 * plan.amax(1))[~none & ~alone].all()), "cluster", "not the largest of the plan")


def _update(call: LayerCall, part: Any, given: dict[str, Any], result: None, rows: Tensor) -> None:
    m = call.sizes[0] * call.sizes[1]
    sums, counts, sizes = oracle.cluster_sums(oracle.rows(given["x"]), oracle.left_out(given["labels"], m, -1), m)
    demand(torch.equal(part.last_counts.flatten(), counts), "last_counts", lambda: str(part.last_counts.tolist()))
    expected, norm = oracle.moved(rows.flatten(0, 1), sums, counts, 0.9)
    judged = (counts == 0) | ((sums.norm(dim=1) > 1e-3 * sizes) & (norm[:, 0] > 1e-3))
    scale = 1 + sizes / sums.norm(dim=1).clamp_min(1e-30)
    near("sub-centroids", part.prototypes.flatten(0, 1), expected, "direction", terms=max(int(counts.max()), 1), scale=scale[:, None],
         judged=judged[:, None])  # fmt: skip


def _push(call: LayerCall, part: Any, given: dict[str, Any], result: None, rows: None) -> None:
    classes, size, _ = call.sizes
    labels, x = oracle.left_out(given["labels"], classes, -1).tolist(), given["features"]
    kept = [[x[i] for i, c in enumerate(labels) if c == g and x[i].isfinite().all()] for g in range(classes)]
    held = part.read()
    for g in range(classes):
        got = held.features[held.labels == g]
        want = kept[g][-size:]
        demand(len(got) == len(want), "memory", f"{len(got)} features of class {g}, not {len(want)}")
        demand(all(any(torch.equal(a, b.float()) for a in got) for b in want), "memory", f"not the last {size} of class {g}")


def _nearest(call: LayerCall, part: Any, given: dict[str, Any], result: Any, rows: Tensor) -> None:
    classes, k, _ = call.sizes
    x, count = given["embedding"], int(given["count"])
    labels = oracle.left_out(given["labels"], classes, -1)
    s = torch.einsum("nd,ckd->nck", oracle.rows(x), rows.double())
    finite, per_image = oracle.rows(x).isfinite().all(1), max(len(s) // max(x.shape[0], 1), 1)
    eps = 64 * torch.finfo(torch.float32).eps * math.sqrt(call.sizes[2])
    for c in range(classes):
        for j in range(k):
            best: dict[int, float] = {}
            for n in ((labels == c) & finite).nonzero()[:, 0].tolist():
                if given["nearest_only"] and k > 1 and float(s[n, c].topk(2).values.diff().abs()) < eps:
                    return
                if not given["nearest_only"] or int(s[n, c].argmax()) == j:
                    image = n // per_image
                    best[image] = max(best.get(image, -math.inf), float(s[n, c, j]))
            want = sorted(best.values(), reverse=True)[:count]
            got = result.similarity[c, j]
            demand(
                int((result.sample[c, j] >= 0).sum()) == len(want),
                "nearest",
                f"{result.sample[c, j].tolist()}, not {len(want)}",
            )
            wide = torch.tensor(want, dtype=torch.float64)
            near("similarity", got[: len(want)], wide, "similarity", terms=call.sizes[2], scale=1.0)


def _resize(call: LayerCall, part: Any, given: dict[str, Any], result: Tensor, rows: Tensor) -> None:
    labels, size = given["labels"], given["size"]
    size = tuple(int(n) for n in size) if isinstance(size, (tuple, list)) else (int(size),) * 2
    wide = labels.float().view(-1, 1, *labels.shape[-2:]) if labels.numel() else labels.new_zeros(0, 1, 1, 1).float()
    expected = (
        F.interpolate(labels.float().reshape(-1, 1, *labels.shape[-2:]), size=size, mode=given["mode"]) if len(wide) else wide
    )
    demand(
        result.dtype == labels.dtype and result.shape == (*labels.shape[:-2], *size),
        "labels",
        f"{result.dtype} {list(result.shape)}",
    )
    demand(
        torch.equal(result.float().flatten(), expected.flatten()),
        "labels",
        lambda: f"{result.tolist()}, not {expected.tolist()}",
    )


_JUDGES: dict[str, Any] = {
    "cluster": _cluster,
    "update_": _update,
    "push": _push,
    "nearest_samples": _nearest,
    "resize_labels": _resize,
}
TARGETS = {
    op: (lambda draw, spoil, op=op: call_of(draw, op, spoil), run)
    for op in ("SubCentroids", "FeatureMemory", "nearest_samples", "resize_labels")
}
