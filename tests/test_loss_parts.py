"""The parts of a loss and what is done with them: gradients of any mixture, and what a loss says that is taken for a tensor."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tolerances import assert_close

from dnc_kernels import use_backend
from dnc_kernels.backends import chosen
from dnc_kernels.nn import DNCClassifier, DNCHead, DNCLoss, _made
from dnc_kernels.ops.head import bands

CHANNELS, CLASSES, K = 12, 5, 3
PARTS = ("cross_entropy", "ppc", "ppd")
MIXTURES = {
    **{part: {part: 1.0} for part in PARTS},
    "all": {"cross_entropy": 0.7, "ppc": 2.0, "ppd": 0.05},
    "with the loss": {"loss": 0.5, "ppc": 1.3},
    "against the loss": {"loss": 1.0, "cross_entropy": -1.0},
    "negative": {"cross_entropy": 1.0, "ppd": -0.4},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def mixed(each, turns):
    """Every mixture with each of the first, the second in turn: all pairs of two are there, in half as many cases as of all three."""
    return [
        pytest.param(mixture, value, turns[(i + j) % len(turns)], id=f"{name}-{value}-{turns[(i + j) % len(turns)]}")
        for i, (name, mixture) in enumerate(MIXTURES.items())
        for j, value in enumerate(each)
    ]


@pytest.fixture(autouse=True)
def small_bands(monkeypatch):
    monkeypatch.setattr(bands, "BAND_PIXELS", 40)


def make_head(**options):
    torch.manual_seed(1)
    head = DNCHead(CHANNELS, CLASSES, K, **{"ppc_weight": 0.3, "ppd_weight": 0.2, "momentum": 0.9, **options})
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return head


def problem(dtype=torch.float32, layout=torch.contiguous_format):
    torch.manual_seed(2)
    x = torch.randn(2, CHANNELS, 9, 13).to(dtype).contiguous(memory_format=layout)
    labels = torch.randint(0, CLASSES, (2, 18, 26))
    labels[0, :2] = 255
    return x, labels


def mix(result, mixture, scale=1.0):
    return scale * sum(weight * getattr(result, part) for part, weight in mixture.items())


def gradients(head, x, labels, mixture, scale=1.0, **options):
    head, x = copy.deepcopy(head), x.detach().requires_grad_()
    mix(head.loss(x, labels, **options), mixture, scale).backward()
    # a part that says nothing about a parameter leaves it a zero, or nothing
    tensors = {"x": x} | dict(head.named_parameters())
    return {name: torch.zeros_like(t) if t.grad is None else t.grad / scale for name, t in tensors.items()}


def exact_gradients(head, x, labels, mixture, **options):
    """Of a float64 copy whose step is made of reference ops, with autograd between them."""
    wide = copy.deepcopy(head).double()
    wide.checkpoint = "none"
    with use_backend("reference"):
        return gradients(wide, x.double(), labels, mixture, **options)


def assert_same(actual, expected, terms):
    for name, want in expected.items():
        assert_close(actual[name], want.double(), "head", terms=terms, scale=float(want.abs().max()) or 1.0)


# gradients


@pytest.mark.parametrize(("mixture", "checkpoint", "update"), mixed(("none", "scores", "all"), (False, True)))
def test_gradients_of_parts_are_those_of_plain_torch(mixture, checkpoint, update):
    head, (x, labels) = make_head(checkpoint=checkpoint), problem()
    # with update=True the sub-centroids have moved when backward comes
    actual = gradients(head, x, labels, mixture, update=update)
    assert_same(actual, exact_gradients(head, x, labels, mixture, update=update), x.numel())


@pytest.mark.parametrize(
    "options",
    [
        {"scores": "norm"}, {"scores": "temperature", "temperature": 0.07}, {"confidence": "none"}, {"loss_size": "features"},
        {"class_weight": [0.5, 1.0, 2.0, 0.0, 3.0], "label_smoothing": 0.1}, {"ppc_temperature": 0.1}, {"embed_channels": 7},
        {"align_corners": True}, {"revive_after": 1}, {"update_from": "all"},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_counts_in_the_parts(options):
    head, (x, labels) = make_head(**options).double(), problem(torch.float64)
    assert_same(gradients(head, x, labels, MIXTURES["all"]), exact_gradients(head, x, labels, MIXTURES["all"]), x.numel())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
def test_the_weights_of_the_loss_give_its_gradient(dtype, layout):
    head, (x, labels) = make_head(), problem(dtype, layout)
    mixture = {"cross_entropy": 1.0, "ppc": 0.3, "ppd": 0.2}
    assert_same(gradients(head, x, labels, mixture), gradients(head, x, labels, {"loss": 1.0}), x.numel())


@pytest.mark.parametrize(
    ("mixture", "numbers", "layout"),
    mixed(
        [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 65536.0)], (torch.contiguous_format, torch.channels_last)
    ),
)
def test_half_precision_neither_under_nor_overflows(numbers, mixture, layout):
    dtype, scale = numbers
    # one sub-centroid of each class: with more, rounding decides which of two equally near ones gets a gradient
    # a contrast temperature of 1: the two parts of its gradient are rounded before they meet, and at a lower one they nearly cancel
    torch.manual_seed(1)
    options = {"ppc_weight": 0.3, "ppc_temperature": 1.0, "ppd_weight": 0.2}
    head, (x, labels) = DNCHead(CHANNELS, CLASSES, 1, **options), problem(dtype, layout)
    expected = exact_gradients(head, x, labels, mixture)["x"]
    y = x.detach().requires_grad_()
    mix(head.loss(y, labels), mixture, scale).backward()
    assert y.grad.dtype == dtype and y.grad.isfinite().all()
    norm = expected.norm(dim=1, keepdim=True)  # every pixel by itself: the smallest gradients are the first to vanish
    norm = norm.clamp(min=float(norm.max()) / 100)  # where the parts nearly cancel nothing is left to compare
    assert_close((y.grad.double() / scale / norm).to(dtype), expected / norm, "loss_gradient", terms=CHANNELS)


@pytest.mark.parametrize("options", [{}, {"recipe": "released"}, {"memory_size": 0}], ids=str)
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_classifier_gives_gradients_of_parts(mixture, options):
    torch.manual_seed(1)
    head = DNCClassifier(CHANNELS, CLASSES, K, **{"ppc_weight": 0.3, "ppd_weight": 0.2, **options})
    x, labels = torch.randn(60, CHANNELS), torch.randint(-1, CLASSES, (60,))
    wide = copy.deepcopy(head).double()
    with use_backend("reference"):
        expected = gradients(wide, x.double(), labels, mixture)
    assert_same(gradients(head, x, labels, mixture), expected, x.numel())


@pytest.mark.parametrize("checkpoint", ("none", "all"))
@pytest.mark.parametrize("off", [("ppc",), ("ppd",), ("ppc", "ppd")], ids=str)
def test_a_part_of_weight_0_is_0_without_a_gradient(checkpoint, off):
    head, (x, labels) = make_head(checkpoint=checkpoint, **{f"{part}_weight": 0.0 for part in off}), problem()
    result = head.loss(x.requires_grad_(), labels, update=False)
    for part in PARTS:
        assert getattr(result, part).requires_grad == (part not in off)
        assert (getattr(result, part) == 0) == (part in off)
    assert result.loss.requires_grad and not result.accuracy.requires_grad
    on = [part for part in PARTS if part not in off]
    mixture = dict.fromkeys(on, 1.0)
    actual = gradients(head, x, labels, mixture, update=False)
    assert_same(actual, exact_gradients(head, x, labels, mixture, update=False), x.numel())


def test_without_contrast_the_gradient_of_the_cross_entropy_is_at_hand(monkeypatch):
    head, (x, labels) = make_head(ppc_weight=0.0, ppd_weight=0.0), problem()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(head.loss(x, labels, update=False).loss, x)
    result = head.loss(x, labels, update=False)
    monkeypatch.setattr(_made, "head_first_pass", None)  # no second time
    (actual,) = torch.autograd.grad(result.cross_entropy + 0 * result.loss, x)
    assert torch.equal(actual, expected)


def test_parts_are_made_again_by_the_backend_of_the_loss(monkeypatch):
    head, (x, labels), seen = make_head(), problem(), []
    first_pass = _made.head_first_pass
    monkeypatch.setattr(_made, "head_first_pass", lambda step, *a: seen.append(step.backend) or first_pass(step, *a))
    with use_backend("reference"):
        result = head.loss(x.requires_grad_(), labels)
    result.ppc.backward()
    assert seen == ["reference"] and chosen() != "reference"


@pytest.mark.parametrize("checkpoint", ("none", "all"))
def test_the_graph_may_be_kept_for_one_part_after_the_other(checkpoint):
    head, (x, labels) = make_head(checkpoint=checkpoint), problem()
    mixture = {"loss": 1.0, "cross_entropy": 1.0, "ppc": 1.0, "ppd": 1.0}
    expected = gradients(head, x, labels, mixture)["x"]
    result = head.loss(x.requires_grad_(), labels)
    each = [torch.autograd.grad(getattr(result, part), x, retain_graph=part != "ppd")[0] for part in mixture]
    assert_same({"x": sum(each)}, {"x": expected}, x.numel())


@pytest.mark.parametrize("first, second", [("loss", "loss"), ("loss", "ppc"), ("ppc", "loss"), ("ppc", "ppd")])
def test_a_second_backward_without_the_graph_is_the_error_of_torch(first, second):
    head, (x, labels) = make_head(), problem()
    result = head.loss(x.requires_grad_(), labels)
    getattr(result, first).backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        getattr(result, second).backward()


@pytest.mark.parametrize("part", ("loss", *PARTS))
def test_second_derivatives_are_refused(part):
    head, (x, labels) = make_head(), problem()
    result = head.loss(x.requires_grad_(), labels)
    with pytest.raises(RuntimeError, match=r"DNCHead\.loss made its gradient in the forward pass"):
        torch.autograd.grad(getattr(result, part), x, create_graph=True)


@pytest.mark.parametrize("what", ("labels", "x", "weight"))
def test_what_changes_after_the_loss_is_an_error_where_it_counts(what):
    head, (x, labels) = make_head(), problem()
    leaf = x.clone().requires_grad_()
    x = leaf * 1  # as a backbone's output
    changed = {"labels": labels, "x": x, "weight": head.feat_norm.weight}[what]
    result = head.loss(x, labels)
    with torch.no_grad():
        changed.mul_(1)
    with pytest.raises(RuntimeError, match=rf"DNCHead\.loss: {what} was changed in place after the loss"):
        torch.autograd.grad(result.ppc, leaf, retain_graph=True)
    torch.autograd.grad(result.loss, leaf)  # which has its gradient already


@pytest.mark.parametrize("part", ("loss", "ppc"))
def test_what_is_kept_for_backward_goes_with_it(part):
    head, (x, labels) = make_head(), problem()
    array = labels.numpy().copy()
    result = head.loss(x.requires_grad_(), torch.from_numpy(array))
    held = [weakref.ref(array), weakref.ref(result.ppc.grad_fn.again)]
    del array
    gc.collect()
    assert all(ref() is not None for ref in held)
    getattr(result, part).backward()
    gc.collect()
    assert all(ref() is None for ref in held), "result.cross_entropy may be in a list for the log"
    assert result.cross_entropy.requires_grad


def test_buffers_may_be_written_before_backward():
    head, (x, labels) = make_head(class_weight=[1.0, 2.0, 1.0, 1.0, 3.0]), problem()
    expected = gradients(head, x, labels, {"cross_entropy": 1.0})["x"]
    result = head.loss(x.requires_grad_(), labels)
    for buffer in head.buffers():
        buffer.zero_()
    result.cross_entropy.backward()
    assert torch.equal(x.grad, expected)


def test_a_loss_without_gradients_keeps_nothing():
    head, (x, labels) = make_head(), problem()
    with torch.no_grad():
        result = head.loss(x, labels)
    assert not any(t.requires_grad for t in result)
    frozen = make_head().requires_grad_(False)
    assert not any(t.requires_grad for t in frozen.loss(x, labels))


@pytest.mark.parametrize("checkpoint", ("none", "scores", "all"))
def test_parts_train_the_features_alone_and_the_head_alone(checkpoint):
    (x, labels), mixture = problem(), MIXTURES["all"]
    head = make_head(checkpoint=checkpoint)
    whole = gradients(head, x, labels, mixture)
    frozen = copy.deepcopy(head).requires_grad_(False)
    assert torch.equal(gradients(frozen, x, labels, mixture)["x"], whole["x"])
    mix(head.loss(x, labels), mixture).backward()
    for name, parameter in head.named_parameters():
        assert torch.equal(parameter.grad, whole[name])


def test_infinite_gradients_reach_the_scaler():
    head, (x, labels) = make_head(), problem(torch.float16)
    for factor in (torch.inf, torch.nan):
        y = x.clone().requires_grad_()
        (head.loss(y, labels).ppc * factor).backward()
        assert not y.grad.isfinite().all()


# torch.compile


@pytest.mark.parametrize("kind", ("none", "scores", "all", "classifier"))
def test_compiled_module_computes_the_loss_in_one_graph(kind):
    torch.manual_seed(1)
    if kind == "classifier":
        eager = DNCClassifier(CHANNELS, CLASSES, K, ppc_weight=0.3)
        x, labels = torch.randn(60, CHANNELS), torch.randint(-1, CLASSES, (60,))
    else:
        eager, (x, labels) = make_head(checkpoint=kind), problem()
    twin, graphs = copy.deepcopy(eager), []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, actual = eager(a, labels), compiled(b, labels)
    assert len(graphs) == 1 and type(actual) is DNCLoss
    for part in ("loss", *PARTS):
        assert_close(getattr(actual, part).detach(), getattr(expected, part).detach().double(), "head", terms=x.numel())
    expected.loss.backward(), actual.loss.backward()
    assert_same({"x": b.grad}, {"x": a.grad}, x.numel())
    assert torch.equal(twin.last_counts, eager.last_counts) and int(twin.num_updates) == 1


@pytest.mark.parametrize("weights", ((0.3, 0.2), (0.3, 0.0), (0.0, 0.0)))
def test_a_part_that_has_no_gradient_in_a_graph_is_no_silent_zero(weights):
    """In bands every compiled step would make the gradients of the parts, so there are none; to ask for one is an error."""
    eager, (x, labels) = make_head(ppc_weight=weights[0], ppd_weight=weights[1]), problem()
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    x = x.clone().requires_grad_()

    def gradient(head, f):
        return torch.autograd.grad(f(head(x, labels, update=False)), x)[0]

    for f in (lambda r: r.loss + 5 * r.ppc, lambda r: r.cross_entropy + r.ppd, lambda r: r.ppc):
        with pytest.raises(
            RuntimeError, match=r"^DNCHead\.loss: under torch\.compile .* no gradients; use .*checkpoint=.none.*"
        ):
            gradient(compiled, f)
    alone = gradient(compiled, lambda r: r.loss)
    assert_same({"x": alone}, {"x": gradient(eager, lambda r: r.loss)}, x.numel())
    if not any(weights):  # then the cross-entropy is the loss
        assert torch.equal(gradient(compiled, lambda r: r.cross_entropy), alone)


@pytest.mark.parametrize("kind", ("none", "classifier"))
def test_compiled_parts_carry_gradients_without_bands(kind):
    torch.manual_seed(1)
    if kind == "none":
        eager, (x, labels) = make_head(checkpoint="none"), problem()
    else:
        eager = DNCClassifier(CHANNELS, CLASSES, K, ppc_weight=0.3, ppd_weight=0.2)
        x, labels = torch.randn(60, CHANNELS), torch.randint(-1, CLASSES, (60,))
    twin = copy.deepcopy(eager)
    compiled = torch.compile(lambda y: mix(twin(y, labels), MIXTURES["all"]), fullgraph=True, backend="aot_eager")
    y = x.clone().requires_grad_()
    compiled(y).backward()
    assert_same({"x": y.grad}, {"x": gradients(eager, x, labels, MIXTURES["all"])["x"]}, x.numel())


def test_compiled_code_reads_a_loss_by_name():
    head, (x, labels) = make_head(), problem()
    # what `_replace` gives stays inside: torch 2.11 cannot return it, of any named tuple
    compiled = torch.compile(
        lambda y: head(y, labels, update=False)._replace(accuracy=y.new_zeros(())).loss, fullgraph=True, backend="aot_eager"
    )
    assert_close(compiled(x).detach(), head.loss(x, labels, update=False).loss.detach().double(), "head", terms=x.numel())


# forward


def test_forward_with_labels_is_the_loss():
    head, (x, labels) = make_head(), problem()
    twin, same = copy.deepcopy(head), copy.deepcopy(head)
    assert all(torch.equal(a, b) for a, b in zip(head(x, labels), twin.loss(x, labels), strict=True))
    assert torch.equal(head.prototypes, twin.prototypes) and int(head.num_updates) == 1
    same(x, labels, update=False)
    assert int(same.num_updates) == 0
    with pytest.raises(ValueError, match=r"DNCHead\.forward: update must be None without labels; got True"):
        same(x, update=True)


# a loss that is taken for a tensor


def some_loss():
    return DNCLoss(*(torch.tensor(float(i), requires_grad=i < 4) for i in range(5)))


@pytest.mark.parametrize("name", ("backward", "item", "detach", "cpu", "mean", "requires_grad", "dtype", "to", "size", "numpy"))
def test_a_loss_taken_for_a_tensor_says_what_to_write(name):
    with pytest.raises(AttributeError, match=rf"DNCLoss is a tuple \(loss, .*\) and has no '{name}': use \.loss\.{name}"):
        getattr(some_loss(), name)
    assert not hasattr(some_loss(), name)


@pytest.mark.parametrize(
    "calculate", [lambda r: r / 4, lambda r: r * 2, lambda r: 2 * r, lambda r: r + r, lambda r: 0 + r, lambda r: r - 1]
)
def test_arithmetic_with_a_loss_says_what_to_write(calculate):
    with pytest.raises(TypeError, match=r"DNCLoss is a tuple .* not a tensor: use \.loss"):
        calculate(some_loss())


def test_a_loss_says_how_to_go_backward():
    with pytest.raises(AttributeError, match=r"use \.loss\.backward\(\)$"):
        some_loss().backward()


def test_a_loss_is_a_named_tuple_still():
    result = some_loss()
    with pytest.raises(AttributeError, match="DNCLoss has no attribute 'lost'"):
        result.lost  # noqa: B018
    loss, *_, accuracy = result
    assert loss is result.loss and accuracy is result[4] and result._replace(ppc=loss).ppc is loss
    assert type(pickle.loads(pickle.dumps(result))) is DNCLoss and type(copy.deepcopy(result._replace())) is DNCLoss
    doubled = torch.utils._pytree.tree_map(lambda t: 2 * t, result)
    assert type(doubled) is DNCLoss and doubled.accuracy == 8
