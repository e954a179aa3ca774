"""Derivatives beyond a backward pass: higher ones, forward mode, transforms of torch.func, batches of gradients.

Every one is right or an error that says what to do; none is silently zero.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from dnc_kernels import backends, nn, ops, use_backend

N, C, K, D = 7, 3, 2, 4
G = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


X, P, S = normal(N, D), normal(C, K, D), normal(2, C, 3, 3)
MAP, GAIN, SHIFT = normal(2, D, 2, 3), normal(C) + 2, normal(C)
W, B, HEAT = normal(D) + 2, normal(D), torch.tensor(0.7, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, -1, 1, 2])
T = torch.tensor([0, 5, 2, -100, 4, 1, 3])
LABELS = torch.randint(0, C, (2, 5, 4), generator=G)
POWERS = normal(N, C)


def dots(x, p):
    pixels = x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, D)
    return torch.einsum("nd,ckd->nck", pixels, p)


def cosines(x, p):
    return dots(F.normalize(x, dim=1), F.normalize(p, dim=2))


def layer_norm(r, gain, shift, eps=1e-5):
    centred = r - r.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + eps).sqrt() * gain + shift


def cross_entropy(logits, target, reduction="mean"):
    return F.cross_entropy(logits, torch.where(target < 0, -100, target), reduction=reduction)


def plain_loss(x, p, gain, shift, heat, reduction="mean"):
    return cross_entropy(layer_norm(dots(x, p).amax(2), gain, shift) / heat, Y, reduction)


def loss(x, p, gain, shift, heat, reduction="mean", labels=Y):
    made = ops.centroid_cross_entropy(x, p, labels, norm_weight=gain, norm_bias=shift, temperature=heat, reduction=reduction)
    return made.loss


def upsampled(s):
    return F.interpolate(s, LABELS.shape[1:], mode="bilinear")


def plan(s):
    with use_backend("reference"):
        return ops.sinkhorn_plan(s, Y.clamp(min=0), C)


#: Name -> the op, the same in plain torch, its inputs; whether a kernel keeps what its second derivatives need.
CASES = {
    "class_scores": (
        lambda x, p: torch.cat([t.flatten() for t in ops.class_scores(x, p, Y)[::2]]),
        lambda x, p: torch.cat([dots(x, p).amax(2).flatten(), (dots(x, p)[range(N), Y] * (Y >= 0)[:, None]).flatten()]),
        (X, P), True,
    ),
    "class_scores of a map": (
        lambda x, p: ops.class_scores(x, p, metric="cosine").scores.permute(0, 2, 3, 1).flatten(),
        lambda x, p: cosines(x.permute(0, 2, 3, 1).reshape(-1, D), p).amax(2).flatten(),
        (MAP, P), True,
    ),
    "centroid_distance": (
        lambda x, p: ops.centroid_distance(x, p, metric="sqeuclidean"),
        lambda x, p: (x[:, None, None] - p).square().sum(3),
        (X, P), True,
    ),
    "centroid_cross_entropy none": (
        lambda *a: loss(*a, reduction="none"), lambda *a: plain_loss(*a, reduction="none"),
        (X, P, GAIN, SHIFT, HEAT), True,
    ),
    "centroid_cross_entropy of centroids": (loss, plain_loss, (X, P, GAIN, SHIFT, HEAT), True),
    "centroid_cross_entropy early": (
        lambda x, *a: loss(x, P, *a), lambda x, *a: plain_loss(x, P, *a), (X, GAIN, SHIFT, HEAT), False,
    ),
    "subcentroid_cross_entropy": (
        lambda x, p: ops.subcentroid_cross_entropy(x, p, T, temperature=0.5),
        lambda x, p: cross_entropy(dots(x, p).flatten(1) / 0.5, T), (X, P), True,
    ),
    "subcentroid_cross_entropy early": (
        lambda x: ops.subcentroid_cross_entropy(x, P, T, reduction="none"),
        lambda x: cross_entropy(dots(x, P).flatten(1), T, "none"), (X,), False,
    ),
    "upsample_cross_entropy": (
        lambda s: ops.upsample_cross_entropy(s, LABELS), lambda s: F.cross_entropy(upsampled(s), LABELS), (S,), False,
    ),
    "upsample_cross_entropy none": (
        lambda s: ops.upsample_cross_entropy(s, LABELS, reduction="none"),
        lambda s: F.cross_entropy(upsampled(s), LABELS, reduction="none"), (S,), True,
    ),
    "normalize_embedding": (
        lambda x, w, b: torch.cat([t.flatten() for t in ops.normalize_embedding(x, w, b, return_length=True)]),
        lambda x, w, b: torch.cat([
            F.normalize(layer_norm(x, w, b), dim=1).flatten(), (x.var(1, unbiased=False) + 1e-5).sqrt(),
        ]),
        (X, W, B), True,
    ),
    "sinkhorn_plan": (lambda s: ops.sinkhorn_plan(s, Y.clamp(min=0), C), plan, (POWERS,), True),
}  # fmt: skip


def scalar(function):
    """A function with a scalar result, whose gradient depends on the size of the result."""

    def run(*inputs):
        made = function(*inputs)
        at = torch.arange(made.numel(), dtype=torch.float64) / 3
        return ((at.cos() + 1.5) * made.flatten()).mean().sin() + made.square().mean() / 10

    return run


def alike(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_close(a.detach(), b.detach(), "loss_gradient", terms=1000, scale=1 + b.abs().max().item())


def derivatives(function, inputs, orders=None):
    """Of every order: gradients of a scalar made of those of the order before, by all inputs.

    Two orders where a LayerNorm over the classes is among what is differentiated: the third of torch's own is wrong.
    """
    orders = orders or (2 if any(t is GAIN for t in inputs) else 3)
    inputs = [t.clone().requires_grad_() for t in inputs]
    # not leaves, so that what they are made of counts once
    value, found = scalar(function)(*(t + t.sin() / 4 for t in inputs)), []
    for order in range(orders):
        grads = torch.autograd.grad(value, inputs, create_graph=order + 1 < orders)
        found += grads
        value = sum((g.sin() * (i + 1)).sum() for i, g in enumerate(grads))
    return found


@pytest.mark.parametrize("case", [name for name, (*_, kept) in CASES.items() if kept])
def test_derivatives_of_every_order(case):
    ours, plain, inputs, _ = CASES[case]
    alike(derivatives(ours, inputs), derivatives(plain, inputs))


@pytest.mark.parametrize("case", [name for name, (*_, kept) in CASES.items() if not kept])
def test_where_the_gradient_is_made_early_a_graph_is_refused_and_the_advice_works(case):
    ours, plain, inputs, _ = CASES[case]
    if not backends.unusable("cpu"):
        with pytest.raises(RuntimeError, match=r'made its gradient in the forward pass.*use_backend\("reference"\)'):
            derivatives(ours, inputs, 2)
    with use_backend("reference"):
        alike(derivatives(ours, inputs), derivatives(plain, inputs))


TRANSFORMS = {
    "grad": lambda f, v: grad(f, argnums=tuple(range(len(v))))(*v),
    "jacfwd": lambda f, v: jacfwd(f, argnums=tuple(range(len(v))))(*v),
    "hvp": lambda f, v: jvp(grad(f), v, tuple(t.cos() for t in v))[1:],
    "hessian": lambda f, v: (hessian(f)(*v),),
    "vmap": lambda f, v: (vmap(f)(*(torch.stack([t, 2 * t]) for t in v)),),
    "vmap of grad": lambda f, v: (vmap(grad(f))(*(torch.stack([t, 2 * t]) for t in v)),),
    "vmap with other dimensions": lambda f, v: (vmap(f, in_dims=1)(*(torch.stack([t, -t], min(1, t.ndim)) for t in v)),),
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_transforms_of_torch_func(case, transform):
    ours, plain, inputs, _ = CASES[case]
    if transform == "vmap with other dimensions" and any(t.ndim == 0 for t in inputs):
        return
    alike(TRANSFORMS[transform](scalar(ours), inputs), TRANSFORMS[transform](scalar(plain), inputs))


@pytest.mark.parametrize("case", CASES)
def test_jacobians_and_forward_mode(case):
    ours, plain, inputs, _ = CASES[case]
    alike(jacrev(ours)(*inputs)[None], jacrev(plain)(*inputs)[None])
    for at in range(len(inputs)):  # a tangent of one input alone too
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(t, t.cos()) if i == at else t.clone().requires_grad_() for i, t in enumerate(inputs)]
            tangents = [forward_ad.unpack_dual(f(*dual)).tangent for f in (ours, plain)]
        alike(tangents[:1], tangents[1:])


@pytest.mark.parametrize("case", CASES)
def test_batches_of_gradients(case):
    ours, plain, inputs, _ = CASES[case]
    found = []
    for function in (ours, plain):
        leaves = [t.clone().requires_grad_() for t in inputs]
        made = function(*leaves)
        grads = torch.stack([made.detach().cos(), made.detach().sin(), torch.ones_like(made)])
        found.append(torch.autograd.grad(made, leaves, grads, is_grads_batched=True))
    alike(*found)


def test_what_is_not_differentiable_can_be_batched():
    both = torch.stack([X, -X])
    for op in (
        lambda x: ops.nearest_centroid(x, P).label,
        lambda x: ops.sinkhorn_assign(x[:, :C], Y.clamp(min=0), C),
        lambda x: ops.cluster_sums(x, Y, C).sums,
        lambda x: ops.upsample_argmax(x[None, :6, None], 5),
    ):
        assert torch.equal(vmap(op)(both), torch.stack([op(X), op(-X)]))


def test_a_kernel_asked_for_by_name_says_that_it_sees_no_transform():
    with pytest.raises(RuntimeError, match=r"class_scores: backend 'cpu' was asked for but cannot run: .*\"auto\""):
        grad(lambda x: ops.class_scores(x, P, backend="cpu").scores.sum())(X)
    with forward_ad.dual_level(), use_backend("cpu"), pytest.raises(RuntimeError, match="forward-mode derivative"):
        ops.upsample_cross_entropy(forward_ad.make_dual(S, S), LABELS)


def heads():
    for options in ({}, {"recipe": "released"}, {"loss_size": "features"}, {"checkpoint": "none", "scores": "temperature"}):
        labels = LABELS[:, :2, :3] if "loss_size" in options else LABELS
        yield nn.DNCHead(D, C, K, generator=torch.Generator().manual_seed(1), **options), MAP, labels
    for options in ({}, {"recipe": "released"}, {"memory_size": 4}):
        yield nn.DNCClassifier(D, C, K, generator=torch.Generator().manual_seed(1), **options), X, Y


HEADS = [pytest.param(*made, id=f"{type(made[0]).__name__}-{i}") for i, made in enumerate(heads())]


@pytest.mark.parametrize(("head", "x", "labels"), HEADS)
def test_losses_of_heads(head, x, labels):
    head = copy.deepcopy(head).double().eval()
    direction, parameters = x.cos(), dict(head.named_parameters())
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(head.loss(leaf, labels).loss, [leaf, *parameters.values()])

    def of(x, parameters):
        return functional_call(head, parameters, (x, labels)).loss

    to_x, to_parameters = grad(of, argnums=(0, 1))(x, parameters)
    alike([to_x, *to_parameters.values()], expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        along = [forward_ad.unpack_dual(t).tangent for t in (head.loss(dual, labels).loss, head(dual).square().sum())]
    alike(along[:1], [(expected[0] * direction).sum()])
    (to_logits,) = torch.autograd.grad(head(leaf).square().sum(), leaf)
    alike(along[1:], [(to_logits * direction).sum()])
    alike([vmap(lambda x: of(x, parameters))(torch.stack([x, -x]))], [torch.stack([of(x, parameters), of(-x, parameters)])])

    # second derivatives, by the way that the error names
    second = jvp(grad(lambda x: of(x, parameters)), (x,), (direction,))[1]
    with pytest.raises(RuntimeError, match=r'create_graph=True.*use_backend\("reference"\)'):
        torch.autograd.grad(head.loss(leaf, labels).loss, leaf, create_graph=True)
    if isinstance(head, nn.DNCHead):
        head.checkpoint = "none"
    with use_backend("reference"):
        (first,) = torch.autograd.grad(head.loss(leaf, labels).loss, leaf, create_graph=True)
        alike(torch.autograd.grad(first, leaf, direction), [second])


@pytest.mark.parametrize(("head", "x", "labels"), [HEADS[0], HEADS[-1]])
def test_a_step_that_moves_inside_a_transform_says_so_before_anything_moves(head, x, labels):
    head = copy.deepcopy(head).double()
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(RuntimeError, match=r"\.loss: inside a transform .* pass update=False"):
        grad(lambda x: head.loss(x, labels).loss)(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="pass update=False"):
        head.loss(forward_ad.make_dual(x, x), labels)
    grad(lambda x: head.loss(x, labels, update=False).loss)(x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), head.state_dict().values(), strict=True))
