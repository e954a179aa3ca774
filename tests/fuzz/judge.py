"""Runs a call and holds what it gives to float64: values, ties, gradients, bits of a second call, inputs left alone, errors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from tolerances import assert_close
from torch import Tensor

from dnc_kernels import backends, ops

from . import oracle
from .calls import Call
from .values import laid_out


class Fault(Exception):
    """What is wrong with a call: a word for the kind, and what was expected and got."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


def demand(ok: bool, kind: str, text: str | Callable[[], str]) -> None:
    """Raise a fault unless `ok`."""
    if not ok:
        raise Fault(kind, text if isinstance(text, str) else text())


def near(
    what: str, actual: Tensor, expected: Tensor, rule: str, *, terms: int, scale: Tensor | float = 1.0, judged: Tensor | None = None,
    precision: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Hold a result to the table's bound, apart from elements that are not `judged` or whose terms overflow.

    precision: what is no better than this dtype is judged as if it had it.
    """
    actual, expected = actual.detach(), expected.detach().double()
    if precision is not None and torch.finfo(precision).bits < torch.finfo(actual.dtype).bits:
        actual = actual.to(precision)
    demand(actual.shape == expected.shape, what, f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    if not actual.numel():
        return
    info = torch.finfo(actual.dtype)
    compute = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32)
    size = torch.as_tensor(scale, dtype=torch.float64).expand(expected.shape)
    # squares of what is within 1/64 of the largest number overflow on the way
    far = ~(size.abs() < compute.max / 64) | (expected.abs() > info.max / 2)
    out = far if judged is None else far | ~judged.expand(expected.shape)
    if what.startswith("gradient"):  # a number where torch has none is welcome
        out = out | expected.isnan()
    size = torch.where(out, 1, size) + (1e-30 if info.bits > 16 else info.tiny)
    try:
        assert_close(torch.where(out, 0, actual), torch.where(out, 0, expected), rule, terms=terms, scale=size)
    except AssertionError as e:
        raise Fault(what, str(e)) from None


def run(call: Call) -> None:
    """Raise a fault if the call does not do what is promised."""
    with backends.use_isa(call.isa) if call.isa else nullcontext():
        if call.illegal is not None:
            _refused(call)
        else:
            _right(call)


def _refused(call: Call) -> None:
    values = call.values()
    what = f"{call.illegal} ({_word(values.get(call.illegal))})"
    try:
        result = getattr(ops, call.op)(**{**values, "backend": call.backend})
    except Exception as e:
        text = f"{type(e).__name__}: {str(e)[:300]}"
        names = "|".join(map(re.escape, (call.illegal, *call.arguments)))
        ours = re.match(rf"{re.escape(call.op)}: .*\b({names})\b", str(e), re.DOTALL) is not None
        demand(ours and isinstance(e, (ValueError, TypeError, NotImplementedError)), f"unclear error for {what}", text)
    else:
        text = repr(result)
        raise Fault(f"accepted {what}", f"no error; got {text[:300]}")


def _word(value: Any) -> str:
    """What kind of thing it is."""
    if not isinstance(value, Tensor):
        return type(value).__name__ if not isinstance(value, (int, float, str)) else repr(value)
    return "sparse" if value.is_sparse else "meta" if value.is_meta else str(value.dtype).removeprefix("torch.")


def _right(call: Call) -> None:
    values = call.values()
    leaves = [values[name].requires_grad_() for name in call.leaves]
    before = {name: v.detach().clone() for name, v in values.items() if isinstance(v, Tensor)}
    changes = "centroids" if call.op.endswith("_") else ""
    function = getattr(ops, call.op)
    try:
        result = function(**values, backend=call.backend)
        grads, incoming = _gradients(call, result, leaves)
        for name, old in before.items():
            demand(name == changes or _same(values[name], old), "input changed", name)
        again = {**values, changes: before[changes].clone()} if changes else values
        second = function(**again, backend=call.backend)
        more, _ = _gradients(call, second, leaves)
    except Fault:
        raise
    except Exception as e:
        raise Fault("legal call refused", f"{type(e).__name__}: {str(e)[:400]}") from None
    if changes:
        demand(_same(values[changes], again[changes]), "second call differs", changes)
        demand(result is None, "result", f"expected None, got {result!r}")
    for a, b in zip((*_tensors(result), *grads), (*_tensors(second), *more), strict=True):
        demand(a is b is None or _same(a, b), "second call differs", lambda a=a, b=b: f"{a} and {b}"[:400])
    given = {**values, changes: before[changes]} if changes else values
    JUDGES[call.op](
        call, given, values.get(changes) if changes else result, dict(zip(call.leaves, grads, strict=True)), incoming
    )


def _tensors(result: Any) -> tuple[Tensor | None, ...]:
    return (result,) if isinstance(result, Tensor) or result is None else tuple(result)


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(
        torch.where(a.isnan(), 0, a), torch.where(b.isnan(), 0, b)
    ) if a.is_floating_point() else torch.equal(a, b)  # fmt: skip


def _gradients(call: Call, result: Any, leaves: list[Tensor]) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
    """Of the leaves, and the incoming ones of each result."""
    outputs = _tensors(result)
    seed, layout = call.incoming
    generator = torch.Generator().manual_seed(seed)
    incoming: list[Tensor | None] = []
    for t in outputs:
        wanted = t is not None and t.requires_grad
        demand(wanted or not leaves or bool(incoming), "no gradient", "the result has no graph")
        made = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) if wanted else None
        incoming.append(None if made is None else laid_out(made, layout if made.ndim else "contiguous"))
    pairs = [(t, g) for t, g in zip(outputs, incoming, strict=True) if g is not None]
    if not leaves or not pairs:
        return (None,) * len(leaves), incoming
    grads = torch.autograd.grad([t for t, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    for leaf, g in zip(leaves, grads, strict=True):
        if g is not None:
            demand(g.dtype == leaf.dtype and g.shape == leaf.shape, "gradient", f"{g.dtype} {list(g.shape)} for {leaf.dtype}")
    return grads, incoming


def _wide(values: dict[str, Any], leaves: tuple[str, ...]) -> dict[str, Any]:
    """The arguments in float64; leaves require a gradient."""
    wide = {n: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in values.items()}
    for name in leaves:
        wide[name].requires_grad_()
    return wide


def _compute(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _precision(call: Call, v: dict[str, Any]) -> torch.dtype:
    """Of a similarity: on Triton sub-centroids are rounded to 16 bits where the pixels have 16, for the tensor cores."""
    x, p = v["x"], v["centroids"]
    rounds = call.backend == "triton" and x.dtype.itemsize == 2 and (p.dtype != x.dtype or v.get("metric") == "cosine")
    return x.dtype if rounds else _compute(x, p)


def _exact(call: Call, *names: str) -> bool:
    """Whether every sum of products is exact, so that ties are ties."""
    kinds = {"integers", "zeros", "constant"}
    return all(call.arguments[n].kind in kinds for n in names) and call.arguments.get("metric", "dot") != "cosine"


def _chosen(what: str, call: Call, chosen: Tensor, s: Tensor, slack: Tensor, exact: bool, judged: Tensor, rows: Tensor) -> None:
    """Hold an argmax over the last axis of s [...,M] to its values, and to the lowest of equals: of equal `rows` [...,M,D] too."""
    if not s.numel():
        return
    inside = (chosen >= 0) & (chosen < s.shape[-1])
    demand(bool((inside | ~judged).all()), what, lambda: f"{chosen.tolist()} of {s.shape[-1]}")
    index = torch.where(inside, chosen, 0)
    value, best = s.gather(-1, index[..., None])[..., 0], s.amax(-1)
    wrong = judged & ~(value >= best - 2 * slack)
    demand(not wrong.any(), what, lambda: f"{chosen.tolist()}, whose values {value.tolist()} are below {best.tolist()}")
    if exact:
        first = (s == best[..., None]).int().argmax(-1)
        demand(bool(((first == index) | ~judged).all()), f"{what} of a tie", lambda: f"{chosen.tolist()}, not {first.tolist()}")
    if call.backend == "reference":
        return  # torch's product may round equal columns unlike each other
    same = (rows[..., :, None, :] == rows[..., None, :, :]).all(-1).int().argmax(-1)  # first row that is equal
    lowest = same.expand(*index.shape, -1).gather(-1, index[..., None])[..., 0]
    demand(bool(((lowest == index) | ~judged).all()), f"{what} of equals", lambda: f"{chosen.tolist()}, not {lowest.tolist()}")


def _similarity(call: Call, v: dict[str, Any], wide: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Similarities [N,C,K], their magnitudes, which pixels are finite [N], and which similarities are judged [N,C,K]."""
    x, p, metric = oracle.rows(wide["x"]), wide["centroids"], v.get("metric", "dot")
    finite = x.isfinite().all(1)
    s = oracle.similarity(torch.where(finite[:, None], x, 0), p, metric)
    size = oracle.similarity_size(torch.where(finite[:, None], x, 0).detach(), p.detach(), metric)
    judged = finite[:, None, None].expand(s.shape)
    longest = 1e18 if _compute(v["x"], v["centroids"]) == torch.float32 else 1e150  # its square overflows
    judged = judged & (x.detach().norm(dim=1) < longest)[:, None, None]
    return s, size, finite, judged


def _slack(size: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Error of a similarity of this magnitude, as in the table."""
    return 5 * torch.finfo(dtype).eps * math.sqrt(channels + 1) * size + 1e-30


def _judge_distance(call: Call, v: dict[str, Any], distance: Tensor, grads: dict[str, Any], incoming: list[Any]) -> None:
    wide = _wide(v, call.leaves)
    s, size, _, judged = _similarity(call, v, wide)
    expected = 1 - s if v["metric"] == "cosine" else -s
    x, d = v["x"], v["x"].shape[1]
    demand(distance.dtype == _compute(x, v["centroids"]), "distance", f"dtype {distance.dtype}")
    near("distance", distance, oracle.mapped(x, expected), "similarity", terms=d, scale=oracle.mapped(x, size),
         judged=oracle.mapped(x, judged), precision=_precision(call, v))  # fmt: skip
    if grads and judged.all():
        g = torch.zeros_like(s) if not distance.numel() else _unmapped(incoming[0]).double()
        _similarity_gradients(call, v, wide, grads, (expected * g).sum(), g.abs())


def _unmapped(t: Tensor) -> Tensor:
    """[N,...] of [N,...] or [B,...,H,W]."""
    return t if t.ndim <= 3 else t.movedim((-2, -1), (1, 2)).flatten(0, 2)


def _similarity_gradients(
    call: Call,
    v: dict[str, Any],
    wide: dict[str, Any],
    grads: dict[str, Any],
    total: Tensor,
    amount: Tensor,
    rule: str = "similarity",
) -> None:
    """Hold the gradients of x and centroids to those of `total`; amount [N,C,K]: magnitudes that reach the similarities."""
    leaves = [name for name in ("x", "centroids") if name in grads]
    if not leaves or not total.requires_grad:
        return
    x, p = oracle.rows(wide["x"].detach()), wide["centroids"].detach()
    expected = torch.autograd.grad(total, [wide[name] for name in leaves], allow_unused=True, retain_graph=True)
    pull_x, pull_p = oracle.pull_size(x, p, v.get("metric", "dot"))
    sizes = {"x": oracle.mapped(v["x"], amount.sum((1, 2))[:, None] * pull_x).expand(v["x"].shape),
             "centroids": (amount.sum(0)[..., None] * pull_p).expand(v["centroids"].shape)}  # fmt: skip
    terms = x.shape[1] + {"x": p.shape[0] * p.shape[1], "centroids": len(x)}[leaves[0]] + len(x)
    for name, e in zip(leaves, expected, strict=True):
        got = grads[name]
        e = torch.zeros_like(wide[name]) if e is None else e
        demand(got is not None or not e.any(), f"gradient of {name}", "None")
        if got is not None:
            near(f"gradient of {name}", got, e, rule, terms=terms, scale=sizes[name], precision=_precision(call, v))


def _judge_scores(call: Call, v: dict[str, Any], result: Any, grads: dict[str, Any], incoming: list[Any]) -> None:
    wide = _wide(v, call.leaves)
    s, size, finite, judged = _similarity(call, v, wide)
    d, dtype = v["x"].shape[1], _compute(v["x"], v["centroids"])
    demand(result.scores.dtype == dtype and result.winner.dtype == torch.uint8, "dtype", str(result.scores.dtype))
    scores, winner = _unmapped(result.scores.detach()), _unmapped(result.winner).long()
    demand(bool(scores[~finite].isnan().all()), "scores of a non-finite pixel", "not NaN")
    sure = judged.all(2)
    _chosen(
        "winner",
        call,
        winner,
        s.detach(),
        _slack(size.amax(2), d, _precision(call, v)),
        _exact(call, "x", "centroids"),
        sure,
        wide["centroids"].detach(),
    )
    taken = s.gather(2, winner[..., None].clamp_max(s.shape[2] - 1))[..., 0]
    near("scores", scores, taken, "similarity", terms=d, scale=size.amax(2), judged=sure, precision=_precision(call, v))
    total, amount = taken.new_zeros(()), torch.zeros_like(size)
    if incoming and incoming[0] is not None:
        g = _unmapped(incoming[0]).double()
        total = total + (taken * g).sum()
        amount.scatter_add_(2, winner[..., None], g.abs()[..., None])
    if v.get("labels") is not None:
        labels = oracle.left_out(v["labels"], s.shape[1], v["ignore_index"])
        own, index = _unmapped(result.own_similarity), labels.clamp_min(0)
        kept = (labels >= 0)[:, None]
        expected = torch.where(kept, s[torch.arange(len(s)), index], 0)
        near("own_similarity", own, expected, "similarity", terms=d, scale=size.amax((1, 2))[:, None],
             judged=judged.all(2).all(1)[:, None] | ~kept, precision=_precision(call, v))  # fmt: skip
        demand(not own[labels < 0].any(), "own_similarity", "not 0 where left out")
        if len(incoming) > 2 and incoming[2] is not None:
            g = torch.where(kept, _unmapped(incoming[2]).double(), 0)
            total = total + (expected * g).sum()
            amount[torch.arange(len(s)), index] += g.abs()
    if grads and judged.all():
        _similarity_gradients(call, v, wide, grads, total, amount)


def _judge_nearest(call: Call, v: dict[str, Any], result: Any, grads: dict[str, Any], incoming: list[Any]) -> None:
    s, size, finite, judged = _similarity(call, v, _wide(v, ()))
    label, sub, score = (t.flatten() for t in result)
    d, k = v["x"].shape[1], s.shape[2]
    for t, bad in zip((label, sub, score), (-1, -1, math.nan), strict=True):
        rest = t[~finite]
        demand(
            bool((rest.isnan() if bad != bad else rest == bad).all()), "non-finite pixel", lambda rest=rest: str(rest.tolist())
        )
    sure = judged.flatten(1).all(1) if s.numel() else finite
    index, flat = label * k + sub, s.flatten(1)
    _chosen("nearest", call, index, flat, _slack(size.flatten(1).amax(1), d, _precision(call, v)), _exact(call, "x", "centroids"), sure,
            v["centroids"].double().flatten(0, 1))  # fmt: skip
    taken = flat.gather(1, index.clamp(0, flat.shape[1] - 1)[:, None])[:, 0]
    near(
        "score", score, taken, "similarity", terms=d, scale=size.flatten(1).amax(1), judged=sure, precision=_precision(call, v)
    )


def _loss_of(call: Call, v: dict[str, Any], r: Tensor, logits: Tensor, labels: Tensor, error: Tensor, result: Tensor, dtype: torch.dtype,
             finite: Tensor, sure: Tensor, terms: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Hold a loss to torch's cross-entropy of logits [N,M]; the loss, and what each pixel's gradient is multiplied by [N].

    error [N]: magnitude of what a logit is made of.
    """
    reduction, smoothing, weight = v["reduction"], float(v.get("label_smoothing", 0.0)), v.get("weight")
    counted = finite | (labels < 0)
    logits = torch.where(counted[:, None], logits, math.nan)
    loss = oracle.cross_entropy(logits, labels, weight, smoothing, reduction)
    amount = oracle.shares(labels, logits.shape[1], weight, smoothing, reduction)
    each = torch.where(labels >= 0, amount * error, 0)
    kept = sure | (labels < 0)
    shape = loss if reduction == "none" else None
    if shape is not None:
        actual = result.flatten()
        near(
            "loss",
            actual,
            loss,
            "loss",
            terms=terms,
            scale=torch.where(kept, each, 1),
            judged=kept,
            precision=_precision(call, v),
        )
        demand(not actual[labels < 0].any(), "loss", "not 0 where left out")
    elif kept.all() or bool(loss.isnan()):
        near("loss", result, loss, "loss", terms=terms, scale=float(each.nan_to_num(1).sum()), precision=_precision(call, v))
    demand(result.dtype == dtype, "loss", f"dtype {result.dtype}")
    return loss, amount


def _judge_loss(call: Call, v: dict[str, Any], result: Any, grads: dict[str, Any], incoming: list[Any]) -> None:
    wide = _wide(v, call.leaves)
    s, size, finite, judged = _similarity(call, v, wide)
    d, dtype = v["x"].shape[1], _compute(v["x"], v["centroids"])
    labels = oracle.left_out(v["labels"], s.shape[1], v["ignore_index"])
    sure = judged.flatten(1).all(1) if s.numel() else finite
    largest = size.flatten(1).amax(1) if s.numel() else size.new_zeros(len(s))
    r, at = s.max(2)
    stretch = torch.ones(len(s), dtype=torch.float64)
    o = r
    if v.get("norm_weight") is not None:
        w, eps = wide["norm_weight"], float(v["norm_eps"])
        rstd = ((r - r.mean(1, keepdim=True)).square().mean(1, keepdim=True) + eps).rsqrt()
        xhat = (r - r.mean(1, keepdim=True)) * rstd
        o = xhat * w + (wide["norm_bias"] if v.get("norm_bias") is not None else 0)
        stretch = rstd[:, 0].detach() * w.detach().abs().max()
    t = wide["temperature"] if isinstance(v["temperature"], Tensor) else float(v["temperature"])
    logits = o / t
    heat = float(torch.as_tensor(t).detach())
    error = (largest * stretch + o.detach().abs().amax(1)) / heat
    loss, amount = _loss_of(call, v, r, logits, labels, error, result.loss, dtype, finite, sure, d + s.shape[1])
    prediction = result.prediction.flatten()
    demand(bool((prediction[~finite] == -1).all()), "prediction", "not -1 for a non-finite pixel")
    rows = torch.arange(s.shape[1], dtype=torch.float64)[:, None]
    exact = _exact(call, "x", "centroids") and v.get("norm_weight") is None and heat == 1
    _chosen("prediction", call, prediction, o.detach(), _slack(largest * stretch + o.detach().abs().amax(1), d + s.shape[1], _precision(call, v)),
            exact, sure, rows)  # fmt: skip
    own, kept = _unmapped(result.own_similarity), (labels >= 0)[:, None]
    expected = torch.where(kept, s[torch.arange(len(s)), labels.clamp_min(0)], 0)
    near("own_similarity", own, expected, "similarity", terms=d, scale=largest[:, None], judged=sure[:, None] | ~kept,
         precision=_precision(call, v))  # fmt: skip
    if not grads or incoming[0] is None or not (sure.all() and bool(loss.isfinite().all())):
        _check_no_count(call, grads, labels, sure)
        return
    # a class whose nearest sub-centroid is not clear may send its gradient to another
    top = s.detach().topk(2, dim=2).values if s.shape[2] > 1 else None
    exact = _exact(call, "x", "centroids")
    if (
        top is not None
        and not exact
        and bool((top[..., 0] - top[..., 1] <= 2 * _slack(size.amax(2), d, _precision(call, v)))[labels >= 0].any())
    ):
        return
    if exact and top is not None:  # the lowest
        first = (s.detach() == top[..., :1]).int().argmax(2)
        if not torch.equal(first, at):
            raise AssertionError("torch.max takes the first on a CPU")
    g = incoming[0].double().flatten() if v["reduction"] == "none" else incoming[0].double()
    total = (loss * g).sum()
    per_pixel = amount * g.abs() * (1 + error)
    steep = stretch * (1 + largest * stretch) * (math.sqrt(s.shape[1]) if v.get("norm_weight") is not None else 1)
    reach = (per_pixel * steep / heat)[:, None, None].expand(s.shape) / s.shape[2]
    _similarity_gradients(call, v, wide, grads, total, reach, "loss_gradient")
    rest = [name for name in ("norm_weight", "norm_bias", "temperature") if name in grads]
    if rest:
        most = (1 + o.detach().abs().amax(1)) * (1 + largest * stretch)
        sizes = {"norm_weight": per_pixel * most * math.sqrt(s.shape[1]) / heat, "norm_bias": per_pixel / heat * most,
                 "temperature": per_pixel * most / heat**2}  # fmt: skip
        for name, e in zip(rest, torch.autograd.grad(total, [wide[n] for n in rest]), strict=True):
            near(f"gradient of {name}", grads[name], e, "loss_gradient", terms=d + len(s), scale=float(sizes[name].sum()),
                 precision=_precision(call, v))  # fmt: skip


def _check_no_count(call: Call, grads: dict[str, Any], labels: Tensor, finite: Tensor) -> None:
    """Without a pixel that counts gradients are 0; torch's own are NaN in a pixel that is, which the reference repeats."""
    if (labels < 0).all() and (finite.all() or call.backend != "reference"):
        for name, g in grads.items():
            demand(g is None or not g.any(), f"gradient of {name}", "not 0 without a pixel that counts")


def _judge_contrast(call: Call, v: dict[str, Any], result: Tensor, grads: dict[str, Any], incoming: list[Any]) -> None:
    wide = _wide(v, call.leaves)
    s, size, finite, judged = _similarity(call, v, wide)
    d, dtype, heat = v["x"].shape[1], _compute(v["x"], v["centroids"]), float(v["temperature"])
    labels = oracle.left_out(v["labels"], s.shape[1] * s.shape[2], v["ignore_index"])
    sure = judged.flatten(1).all(1) if s.numel() else finite
    error = (size.flatten(1).amax(1) if s.numel() else size.new_zeros(len(s))) / heat
    terms = d + s.shape[1] * s.shape[2]
    # the product of a non-finite pixel is not finite, in every sub-centroid: NaN also where it is left out of a mean
    loss, amount = _loss_of(call, v, s, s.flatten(1) / heat, labels, error, result, dtype, finite, sure, terms)
    if not grads or not (sure.all() and bool(loss.isfinite().all())):
        _check_no_count(call, grads, labels, sure)
        return
    g = incoming[0].double().flatten() if v["reduction"] == "none" else incoming[0].double()
    reach = (amount * g.abs() * (1 + error) / heat)[:, None, None].expand(s.shape) / (s.shape[1] * s.shape[2])
    _similarity_gradients(call, v, wide, grads, (loss * g).sum(), reach, "loss_gradient")


def _plan(call: Call, v: dict[str, Any], s: Tensor) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Plan, where it is judged [N], classes [N], terms of the table, and the number of classes."""
    groups = 1 if v["labels"] is None else int(v["num_classes"])
    labels = (
        torch.zeros(len(s), dtype=torch.int64)
        if v["labels"] is None
        else oracle.left_out(v["labels"], groups, v["ignore_index"])
    )
    limit = None if v["tolerance"] is None else float(v["tolerance"])
    plan, clear = oracle.transport(s, labels, groups, float(v["epsilon"]), int(v["iterations"]), limit)
    kept = s.detach()[s.detach().isfinite().all(1)]
    spread = float(kept.max() - kept.min()) if kept.numel() else 0.0
    # every iteration rounds its exponents; three of them are the table's
    terms = max(1.0, int(v["iterations"]) / 3) * min(spread / float(v["epsilon"]), 1e150) ** 2 + len(s)
    return plan, clear, labels, math.ceil(terms), groups


def _judge_plan(call: Call, v: dict[str, Any], result: Tensor, grads: dict[str, Any], incoming: list[Any]) -> None:
    wide = _wide(v, call.leaves)
    s = oracle.rows(wide["similarity"])
    plan, clear, labels, terms, _ = _plan(call, v, s)
    rows = oracle.rows(result.detach())
    finite = s.detach().isfinite().all(1)
    demand(not rows[labels < 0].any(), "plan", "not 0 where left out")
    mine = rows[(labels >= 0) & finite]
    demand(bool(mine.isfinite().all()), "plan", "not finite")
    demand(bool(((mine.sum(1) - 1).abs() < 1e-5).all()), "plan", lambda: f"rows sum to {mine.sum(1).tolist()}")
    dtype = _compute(v["similarity"])
    overflow = (
        float(wide["similarity"].detach().nan_to_num(0, 0, 0).abs().max() if s.numel() else 0) > torch.finfo(dtype).max / 64
    )
    if terms * torch.finfo(dtype).eps ** 2 > 1 or overflow:
        return  # every number of the plan is rounding alone
    near("plan", rows.to(dtype), plan, "plan", terms=terms, scale=1e-30, judged=clear[:, None])
    if grads and clear.all() and plan.requires_grad:
        g = torch.where(finite[:, None], oracle.rows(incoming[0]), 0)
        (expected,) = torch.autograd.grad((torch.where(finite[:, None], plan, 0) * g).sum(), wide["similarity"])
        expected = oracle.mapped(v["similarity"], torch.where(finite[:, None], oracle.rows(expected), 0))
        if expected.numel():
            near("gradient of similarity", grads["similarity"], expected, "plan_gradient", terms=terms,
                 scale=float(g.abs().max()) / float(v["epsilon"]))  # fmt: skip


def _judge_assign(call: Call, v: dict[str, Any], result: Tensor, grads: dict[str, Any], incoming: list[Any]) -> None:
    s = oracle.rows(v["similarity"])
    plan, clear, labels, terms, groups = _plan(call, v, s)
    finite, sub = s.isfinite().all(1), result.flatten()
    demand(result.dtype == torch.int64, "dtype", str(result.dtype))
    none = (labels < 0) | ~finite
    demand(bool((sub[none] == -1).all()), "assignment", "not -1 where left out")
    demand(bool(((sub[~none] >= 0) & (sub[~none] < s.shape[1])).all()), "assignment", lambda: str(sub.tolist()))
    dtype = _compute(v["similarity"])
    counts = torch.bincount(labels[~none], minlength=groups) if len(s) else torch.zeros(groups)
    alone = ~none & ((counts[labels.clamp_min(0)] == 1) | (int(v["iterations"]) == 0))
    alone &= s.abs().amax(1) > 1e-30  # denormal numbers may be taken for 0
    taken = s.gather(1, sub.clamp_min(0)[:, None])[:, 0]
    demand(
        bool((taken == s.amax(1))[alone].all()) if len(s) else True, "assignment", "not the nearest, of a class of one pixel"
    )
    if s.shape[1] > 1 and terms * torch.finfo(dtype).eps ** 2 < 1e-6:
        error = 4 * torch.finfo(dtype).eps * math.sqrt(terms)
        logs = plan.clamp_min(1e-300).log()
        got = logs.gather(1, sub.clamp_min(0)[:, None])[:, 0]
        wrong = ~none & ~alone & clear & (got < logs.amax(1) - error - 1e-9)
        demand(
            not wrong.any(),
            "assignment",
            lambda: f"{sub.tolist()}: log of the plan {got.tolist()}, best {logs.amax(1).tolist()}",
        )


def _judge_sums(call: Call, v: dict[str, Any], result: Any, grads: dict[str, Any], incoming: list[Any]) -> None:
    x, m = oracle.rows(v["x"]), int(v["num_clusters"])
    sums, counts, sizes = oracle.cluster_sums(x, oracle.left_out(v["labels"], m, v["ignore_index"]), m)
    demand(torch.equal(result.counts, counts), "counts", lambda: f"{result.counts.tolist()}, not {counts.tolist()}")
    demand(result.sums.dtype == _compute(v["x"]), "dtype", str(result.sums.dtype))
    near("sums", result.sums, sums, "sum", terms=int(counts.max()), scale=sizes[:, None])


def _judge_moved(
    call: Call, v: dict[str, Any], after: Tensor, sums: Tensor, counts: Tensor, sizes: Tensor, compute: torch.dtype
) -> None:
    """Sub-centroids [M,D] after an update; sizes [M]: magnitude of what the sums add up."""
    before, momentum = v["centroids"].reshape(-1, v["centroids"].shape[-1]), float(v["momentum"])
    rows = after.reshape(before.shape)
    still = counts <= 0
    demand(_same(rows[still], before[still]), "sub-centroids without pixels", "moved")
    expected, norm = oracle.moved(before, sums, counts, momentum)
    length = sums.norm(dim=1)
    bound = torch.finfo(compute)
    judged = still | ((length > 1e-4 * sizes) & (sizes < bound.max / 64) & (length > bound.tiny * 1e6) & (norm[:, 0] > 1e-3))
    zero = (counts > 0) & (sizes == 0)
    demand(_same(rows[zero], before[zero]), "sub-centroids of zero sums", "moved")
    scale = (0.2 + (1 - momentum) * sizes / length.clamp_min(1e-300))[:, None] / norm
    near("centroids", rows.to(compute), expected, "direction", terms=max(int(counts.max()), 1), scale=torch.where(judged[:, None], scale, 1),
         judged=judged[:, None])  # fmt: skip
    demand(bool(rows.isfinite().all()) or not before.isfinite().all(), "centroids", "not finite")


def _judge_update(call: Call, v: dict[str, Any], after: Tensor, grads: dict[str, Any], incoming: list[Any]) -> None:
    m = v["centroids"].shape[0] * v["centroids"].shape[1]
    sums, counts, sizes = oracle.cluster_sums(oracle.rows(v["x"]), oracle.left_out(v["labels"], m, v["ignore_index"]), m)
    compute = torch.float32 if v["centroids"].dtype == torch.float32 else _compute(v["x"])
    _judge_moved(call, v, after, sums, counts, sizes, compute)


def _judge_apply(call: Call, v: dict[str, Any], after: Tensor, grads: dict[str, Any], incoming: list[Any]) -> None:
    sums = v["sums"].double()
    v = {**v, "momentum": float(v["momentum"])}
    _judge_moved(call, v, after, sums, v["counts"].long(), sums.norm(dim=1), v["centroids"].dtype)


def _judge_embedding(call: Call, v: dict[str, Any], result: Any, grads: dict[str, Any], incoming: list[Any]) -> None:
    wide = _wide(v, call.leaves)
    x, weight, bias, eps = v["x"], wide.get("weight"), wide.get("bias"), float(v["eps"])
    rows, d = oracle.rows(wide["x"]), x.shape[1]
    y, z, length = oracle.embedded(rows, weight, bias, eps)
    got, got_length = result if v["return_length"] else (result, None)
    demand(
        got.dtype == x.dtype and got.stride() == torch.empty_like(x).stride(),
        "embedding",
        f"{got.dtype}, strides {got.stride()}",
    )
    finite = rows.detach().isfinite().all(1)
    demand(bool(oracle.rows(got.detach())[~finite].isnan().all()), "embedding of a non-finite pixel", "not NaN")
    raw = rows.detach()
    mean = raw.mean(1, keepdim=True)
    rstd, norm = 1 / length.detach()[:, None], z.detach().norm(dim=1, keepdim=True)
    w, b = (1 if weight is None else weight.detach().abs()), (0 if bias is None else bias.detach().abs())
    xhat = ((raw - mean) * rstd).abs() + mean.abs() * rstd
    # where the affine is 0 or everything cancels, rounding alone is left; a processor may take denormal numbers for 0, and the
    # square of a length may be one
    spread = (raw - mean).abs().amax(1)
    normal = (spread == 0) | (spread > (1e-150 if x.dtype == torch.float64 else torch.finfo(torch.float32).tiny * 1e8))
    judged = (
        finite
        & normal
        & (raw.norm(dim=1) < 1e17)
        & ((norm > 1e-4 * (xhat * w + b).amax(1, keepdim=True))[:, 0] | (norm == 0)[:, 0])
    )
    norm = norm.clamp_min(1e-12)
    spread = (xhat * w + b).amax(1, keepdim=True) / norm
    near(
        "embedding",
        oracle.rows(got).to(got.dtype),
        y,
        "embedding",
        terms=d,
        scale=spread.expand(y.shape),
        judged=judged[:, None],
    )
    if got_length is not None:
        size = raw.abs().amax(1) if d else 0
        near("length", got_length.flatten(), length, "embedding", terms=d, scale=size, judged=finite & (raw.norm(dim=1) < 1e17))
    if not grads or not judged.all():
        return
    g = oracle.rows(incoming[0])
    total = (y * g).sum()
    to_z = g.abs().amax(1, keepdim=True) / norm * (1 + spread)
    to_x = to_z * rstd * torch.as_tensor(w).max() * (1 + mean.abs() * rstd)
    if got_length is not None and incoming[1] is not None:
        h = incoming[1].double().flatten()
        total, to_x = total + (length * h).sum(), to_x + h.abs()[:, None] * (1 + mean.abs() * rstd)
    expected = torch.autograd.grad(total, [wide[name] for name in grads])
    for (name, grad), e in zip(grads.items(), expected, strict=True):
        if name == "x":
            near("gradient of x", grad, e, "embedding_grad", terms=d, scale=oracle.mapped(x, to_x.expand(rows.shape)))
        elif len(rows):
            near(
                f"gradient of {name}",
                grad,
                e,
                "embedding_param_grad",
                terms=len(rows),
                scale=float((to_z * xhat.clamp_min(1)).max()),
                precision=_compute(x),
            )


def _judge_upsampled(call: Call, v: dict[str, Any], result: Tensor, grads: dict[str, Any], incoming: list[Any]) -> None:
    wide = _wide(v, call.leaves)
    scores, labels = wide["scores"], v["labels"]
    classes, size = scores.shape[1], tuple(labels.shape[1:])
    same = size == tuple(scores.shape[2:])
    labels = oracle.left_out(labels, classes, v["ignore_index"]).view(labels.shape)
    logits = oracle.interpolated(scores, size, v["align_corners"])
    smoothing = float(v["label_smoothing"])
    loss = oracle.cross_entropy(logits, labels, v["weight"], smoothing, v["reduction"])
    amount = oracle.shares(labels, classes, v["weight"], smoothing, v["reduction"])
    raw = scores.detach()
    demand(result.dtype == _compute(v["scores"]), "dtype", str(result.dtype))
    if not raw.isfinite().all():
        return
    dtype = torch.finfo(result.dtype)
    largest = float(raw.abs().max()) if raw.numel() else 0.0
    # scores as they are lose nothing but their differences; interpolation rounds at their size
    spread = float((raw.amax(1) - raw.amin(1)).max()) if raw.numel() else 0.0
    error = 1 + (spread if same else largest + spread)
    if largest > dtype.max / 64:
        return
    if v["reduction"] == "none":
        near("loss", result, loss, "interpolated_loss", terms=classes, scale=torch.where(labels >= 0, amount, 0) * error)
        demand(not result[labels < 0].any(), "loss", "not 0 where left out")
    else:
        near("loss", result, loss, "interpolated_loss", terms=classes, scale=float((amount * error).nan_to_num(1).sum()))
    if not grads:
        return
    if (labels < 0).all():
        demand(not grads["scores"].any(), "gradient of scores", "not 0 without a pixel that counts")
    if not loss.isfinite().all():
        return
    g = incoming[0].double()
    (expected,) = torch.autograd.grad((loss * g).sum(), wide["scores"])
    most = float((amount * g.abs()).max()) if labels.numel() else 0.0
    # of all target pixels around a source pixel
    around = math.prod(math.ceil(2 * t / n) + 1 for t, n in zip(size, raw.shape[2:], strict=True))
    near(
        "gradient of scores",
        grads["scores"],
        expected,
        "interpolated_loss",
        terms=classes + around,
        scale=most * error * around,
    )


def _judge_argmax(call: Call, v: dict[str, Any], result: Tensor, grads: dict[str, Any], incoming: list[Any]) -> None:
    scores, size = v["scores"], v["size"]
    size = tuple(int(n) for n in size) if isinstance(size, (tuple, list)) else (int(size),) * 2
    demand(
        result.dtype == torch.int64 and result.shape == (scores.shape[0], *size),
        "shape",
        f"{result.dtype} {list(result.shape)}",
    )
    wide = scores.double()
    if size == tuple(scores.shape[2:]):  # as they are: exact, NaN the highest
        expected = wide.argmax(1)
        demand(torch.equal(result, expected), "argmax", lambda: f"{result.tolist()}, not {expected.tolist()}")
        return
    finite = wide.isfinite().all() and float(wide.abs().max() if wide.numel() else 0) < torch.finfo(_compute(scores)).max / 64
    if not finite or not wide.numel():
        return
    logits = oracle.interpolated(wide, size, v["align_corners"]).movedim(1, -1)
    slack = _slack(wide.abs().max().expand(logits.shape[:-1]), 4, _compute(scores))
    judged = torch.ones(logits.shape[:-1], dtype=torch.bool)
    channels = wide.movedim(1, 0).flatten(1)
    _chosen("argmax", call, result, logits, slack, call.arguments["scores"].kind == "zeros", judged, channels)


Judge = Callable[[Call, dict[str, Any], Any, dict[str, Any], list[Any]], None]
JUDGES: dict[str, Judge] = {
    "centroid_distance": _judge_distance,
    "class_scores": _judge_scores,
    "nearest_centroid": _judge_nearest,
    "centroid_cross_entropy": _judge_loss,
    "subcentroid_cross_entropy": _judge_contrast,
    "sinkhorn_assign": _judge_assign,
    "sinkhorn_plan": _judge_plan,
    "cluster_sums": _judge_sums,
    "momentum_update_": _judge_update,
    "apply_momentum_": _judge_apply,
    "normalize_embedding": _judge_embedding,
    "upsample_cross_entropy": _judge_upsampled,
    "upsample_argmax": _judge_argmax,
}
