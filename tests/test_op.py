"""Ops made of records: what the dispatcher sees, what an eager call skips, and that records and structs have the same fields."""

import importlib
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dnc_kernels import backends, ops
from dnc_kernels.ops import _op
from dnc_kernels.ops._common import kernels
from dnc_kernels.ops.similarity.calls import LossCall, LossOut, NearestCall, NearestOut, ScoresOut
from dnc_kernels.ops.similarity.op import class_scores, nearest_centroid

X, P = (
    torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
    torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1)),
)
Y = torch.tensor([0, 1, 2, 0, 1, -1])
CPU = pytest.mark.skipif(bool(backends.unusable("cpu")), reason=backends.unusable("cpu"))

#: C++ function -> the records of the calls that it serves.
RECORDS = {
    "class_scores": [("similarity", "ScoresCall", "ScoresOut"), ("similarity", "DistanceCall")],
    "class_scores_backward": [("similarity", "ScoresBackwardCall", "ScoresBackwardOut")],
    "nearest_centroid": [("similarity", "NearestCall", "NearestOut")],
    "centroid_cross_entropy": [("similarity", "LossCall", "LossOut")],
    "subcentroid_cross_entropy": [("similarity", "ContrastCall", "ContrastOut"), ("similarity", "SweepCall", "SweepOut")],
    "sinkhorn": [("sinkhorn", "SinkhornCall", "SinkhornOut")],
    "sinkhorn_backward": [("sinkhorn", "SinkhornBackwardCall", "SinkhornBackwardOut")],
    "cluster_sums": [("momentum", "SumsCall", "SumsOut")],
    "apply_momentum_": [("momentum", "ApplyCall")],
    "momentum_update_": [("momentum", "UpdateCall")],
    "normalize_embedding": [("embedding", "NormalizeCall", "NormalizeOut")],
    "normalize_embedding_backward": [("embedding", "NormalizeBackwardCall", "NormalizeBackwardOut")],
    "upsample_cross_entropy": [("upsample", "UpsampleCall", "UpsampleOut")],
    "upsample_argmax": [("upsample", "ArgmaxCall", "ArgmaxOut")],
    "head_first_pass": [("head", "FirstArguments", "FirstPass")],
    "head_second_pass": [("head", "SecondArguments")],
    "label_figures": [("head", "FiguresCall", "Figures")],
    "head_targets": [("head", "TargetsCall", "Targets")],
}


def records(family, *names):
    module = importlib.import_module(f"dnc_kernels.ops.{family}.calls")
    return [getattr(module, name) for name in names]


def struct_fields(function):
    cuda = getattr(backends.native(), "cuda", None)
    return backends.native().fields.get(function) or (cuda.fields.get(function) if cuda else None)


@CPU
def test_every_function_of_the_library_has_its_records():
    cuda = getattr(backends.native(), "cuda", None)
    known = set(backends.native().fields) | set(cuda.fields if cuda else ("momentum_update_",))
    assert known == set(RECORDS)


@CPU
@pytest.mark.parametrize("function", RECORDS)
def test_records_have_the_fields_of_their_struct_by_name_and_in_its_order(function):
    struct = struct_fields(function)
    if struct is None:
        pytest.skip("a function of CUDA builds")
    given = set()
    for family, *names in RECORDS[function]:
        for cls in records(family, *names):
            own = [field for field in cls._fields if field != "backend"]
            places = [struct.index(field) for field in own]  # ValueError: a field that the struct lacks
            assert function == "subcentroid_cross_entropy" or places == sorted(places), cls
            given |= set(own)
    # what only a launcher knows
    assert set(struct) - given <= {"threads", "distance"} | ({"metric"} if function == "subcentroid_cross_entropy" else set())


@CPU
def test_a_field_that_the_struct_lacks_is_an_error():
    from typing import NamedTuple

    class Odd(NamedTuple):
        x: torch.Tensor
        centroid: torch.Tensor

    with pytest.raises(TypeError, match=r"Odd.*has a field that the kernel's struct lacks"):
        backends.native().nearest_centroid("nearest_centroid", 1, Odd(X, P))
    with pytest.raises(TypeError, match="x must be a tensor or None; got 3"):
        backends.native().nearest_centroid("nearest_centroid", 1, NearestCall(3, P, "dot", "cpu"))
    with pytest.raises(ValueError, match="metric: unknown word euclid"):
        backends.native().nearest_centroid("nearest_centroid", 1, NearestCall(X, P, "euclid", "cpu"))
    with pytest.raises(TypeError, match="a call is made of records; got 5"):
        backends.native().nearest_centroid("nearest_centroid", 1, 5)


def test_a_record_shows_shapes_dtypes_and_strides():
    call = LossCall(X.T, P, Y, "dot", None, None, 1e-5, None, 1.0, None, -100, 0.0, "mean", None, "cpu")
    text = repr(call)
    assert text.startswith(
        "LossCall(x=[4, 6] float32 on cpu, strides [1, 4], centroids=[3, 2, 4] float32 on cpu, strides [8, 4, 1]"
    )
    assert "norm_weight" not in text and "temperature=1.0" in text and "backend='cpu'" in text
    assert repr(LossOut()) == "LossOut()"
    assert pickle.loads(pickle.dumps(LossOut())) == LossOut()


@CPU
def test_an_error_of_a_kernel_shows_the_call():
    with pytest.raises(ValueError, match=r"cluster_sums: labels .*\[0,3\); got 7 at pixel 1|got 7 at pixel 1"):
        ops.cluster_sums(X, torch.tensor([0, 7, 0, 0, 0, 0]), 3, backend="cpu")


class Dispatched(TorchDispatchMode):
    """Names of the ops that the dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A subclass that sees what is dispatched."""

    seen = ()

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen += (str(function),)
        return function(*[a.inner if isinstance(a, cls) else a for a in args], **(kwargs or {}))


@CPU
def test_modes_subclasses_profilers_and_autocast_meet_the_op():
    with Dispatched() as seen:
        ops.nearest_centroid(X, P)
    assert "dnc_kernels.nearest_centroid.default" in seen.names
    Wrapped.seen = ()
    nearest_centroid(NearestCall(Wrapped(X), P, "dot", "cpu"))
    assert Wrapped.seen == ("dnc_kernels.nearest_centroid.default",)
    with torch.profiler.profile() as profile:
        ops.nearest_centroid(X, P)
    assert "dnc_kernels::nearest_centroid" in {event.key for event in profile.key_averages()}
    with FlopCounterMode(display=False):
        ops.nearest_centroid(X, P)
    with torch.autocast("cpu"):
        assert not _op.plain((X, P))
        assert ops.class_scores(X, P).scores.dtype == torch.float32


@CPU
def test_an_eager_call_on_plain_tensors_skips_the_dispatcher():
    assert _op.plain((X, nn.Parameter(P), None, "dot", 1.0, 3, True))
    with torch.no_grad():
        assert _op.plain((X,))
    with torch.inference_mode():
        assert _op.plain((X, torch.ones(3)))
    for odd in (
        X.to("meta"),
        X.to_sparse(),
        Wrapped(X),
        torch.view_as_complex(torch.ones(2, 2)).conj().imag,
        [1],
        object(),
    ):
        assert not _op.plain((odd,))
    with torch._C._AutoDispatchBelowAutograd():
        assert not _op.plain((X,))


@CPU
@pytest.mark.parametrize("force", [False, True])
def test_both_ways_give_the_same_results_and_gradients(force, monkeypatch):
    def run():
        x, p = X.clone().requires_grad_(), P.clone().requires_grad_()
        scores, winner, own = ops.class_scores(x, p, Y, backend="cpu")
        (scores.square().sum() + own.exp().sum() + ops.centroid_cross_entropy(x, p.detach(), Y, backend="cpu").loss).backward()
        assert not winner.requires_grad
        return scores.detach(), winner, own.detach(), x.grad, p.grad

    expected = run()
    monkeypatch.setattr(_op, "plain", lambda call: not force)
    for made, wanted in zip(run(), expected, strict=True):
        assert torch.equal(made, wanted)


@CPU
@pytest.mark.parametrize("force", [False, True])
def test_a_negated_view_gives_its_own_values(force, monkeypatch):
    if force:
        monkeypatch.setattr(_op, "plain", lambda call: False)
    odd = torch.view_as_complex(torch.stack([X, -X], -1)).conj().imag
    assert odd.is_neg() and torch.equal(odd, X)
    assert torch.equal(ops.nearest_centroid(odd, P).score, ops.nearest_centroid(X, P).score)


@CPU
def test_an_op_without_a_derivative_says_so():
    x = X.clone().requires_grad_()
    made = nearest_centroid.overload(x, P, "dot", "cpu")
    with pytest.raises(RuntimeError, match="dnc_kernels::nearest_centroid has no derivative"):
        made[2].sum().backward()


@CPU
@pytest.mark.parametrize("force", [False, True])
def test_a_gradient_of_the_forward_pass_is_given_no_graph(force, monkeypatch):
    if force:
        monkeypatch.setattr(_op, "plain", lambda call: False)
    x = X.clone().requires_grad_()
    loss = ops.centroid_cross_entropy(x, P, Y).loss
    expected = r'centroid_cross_entropy made its gradient in the forward pass.*backend="reference"'
    with pytest.raises(RuntimeError, match=expected):
        torch.autograd.grad(loss, x, create_graph=True)


@CPU
def test_the_ops_of_the_dispatcher_refuse_a_tangent():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(RuntimeError, match="dnc_kernels::class_scores has no forward-mode derivative"):
            class_scores.overload(x, P, None, "dot", "cpu")
        class_scores.overload(X, P, None, "dot", "cpu")


@CPU
@pytest.mark.parametrize("force", [False, True])
def test_an_op_in_place_is_seen_by_autograd(force, monkeypatch):
    if force:
        monkeypatch.setattr(_op, "plain", lambda call: False)
    centroids = nn.functional.normalize(P, dim=2)
    before = centroids._version
    ops.momentum_update_(centroids, X, torch.arange(6), momentum=0.5)
    assert centroids._version > before
    with torch.inference_mode():
        ops.momentum_update_(centroids.clone(), X, torch.arange(6), momentum=0.5)


@CPU
def test_results_that_were_not_asked_for_are_none_on_both_ways(monkeypatch):
    monkeypatch.setattr(_op, "plain", lambda call: False)
    assert ops.class_scores(X, P).own_similarity is None
    flat = class_scores.overload(X, P, None, "dot", "cpu")
    assert flat[2].dtype == torch.bool and flat[2].shape == (0,)


def test_checks_are_made_once_for_equal_calls_and_again_for_others():
    with pytest.raises(TypeError, match="ignore_index"):
        ops.class_scores(X, P, Y, ignore_index=-1.0)
    ops.class_scores(X, P, Y, ignore_index=-1)
    with pytest.raises(TypeError, match="ignore_index"):  # -1 == -1.0
        ops.class_scores(X, P, Y, ignore_index=-1.0)
    with pytest.raises(ValueError, match="centroids must be"):
        ops.class_scores(X, P[..., :3], Y, ignore_index=-1)
    with pytest.raises(TypeError, match="labels"):
        ops.class_scores(X, P, Y.float(), ignore_index=-1)


@CPU
def test_into_fills_given_results_of_any_backend():
    for backend in ("reference", "cpu"):
        label, sub, score = (torch.empty(6, dtype=t) for t in (torch.int64, torch.int64, torch.float32))
        nearest_centroid.into(NearestCall(X, P, "dot", backend), NearestOut(label, sub, score))
        assert torch.equal(label, ops.nearest_centroid(X, P).label)
        scores, winner = torch.empty(6, 3), torch.empty(6, 3, dtype=torch.uint8)
        from dnc_kernels.ops.similarity.calls import ScoresCall

        class_scores.into(ScoresCall(X, P, None, "dot", backend), ScoresOut(scores, winner, None))
        torch.testing.assert_close(scores, ops.class_scores(X, P).scores)


def test_every_backend_of_a_family_has_the_same_launchers():
    for op in (class_scores, nearest_centroid):
        for backend in ("cpu", "cuda"):
            assert callable(getattr(kernels(op.family, backend), op.name))
