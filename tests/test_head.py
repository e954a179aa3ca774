"""DNCHead: its loss against plain torch in float64, its updates, and what a training loop does with it."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close, assert_golden

from dnc_kernels import nn, ops

C, K, D = 5, 3, 16


pytestmark = pytest.mark.usefixtures("one_thread")


SCORES = ("norm", "temperature", "scale")


def make_head(**options):
    options = {"momentum": 0.9, "recipe": "released", **options}
    return nn.DNCHead(D, C, K, generator=torch.Generator().manual_seed(0), **options)


def batch(size=(6, 7), label_size=(24, 28), images=2, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(images, D, *size, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, C, (images, *label_size), generator=g)
    labels[0, :3] = 255
    return x, labels


def naive_loss(head, x, labels, p, cluster):
    """The same loss in plain torch, [N,C,K] and full-size logits in memory."""
    z = F.layer_norm(x.permute(0, 2, 3, 1), (D,), head.feat_norm.weight, head.feat_norm.bias)
    e = F.normalize(z, dim=-1)
    s = torch.einsum("bhwd,ckd->bhwck", e, p)
    r = s.amax(-1)
    if head.scores == "norm":
        o = F.layer_norm(r, (C,), head.mask_norm.weight, head.mask_norm.bias)
    elif head.scores == "scale":
        o = r * head.logit_scale.exp()
    else:
        o = r / head.temperature
    o = o.permute(0, 3, 1, 2)
    if head.loss_size == "labels":
        o = F.interpolate(o, labels.shape[1:], mode="bilinear", align_corners=head.align_corners)
    else:
        labels = F.interpolate(labels[:, None].double(), o.shape[2:], mode="nearest")[:, 0].long()
    weight = None if head.class_weight is None else head.class_weight.to(o.dtype)
    ce = F.cross_entropy(o, labels, weight, ignore_index=255, label_smoothing=head.label_smoothing)
    s = s.flatten(0, 2).flatten(1)
    ppc = F.cross_entropy(s / head.ppc_temperature, cluster, ignore_index=-1)
    keep = cluster >= 0
    ppd = (1 - s[keep].gather(1, cluster[keep, None])).square().mean()
    return ce + head.ppc_weight * ppc + head.ppd_weight * ppd


def clusters(head, x, labels):
    """What `loss` assigns, from its parts."""
    small = F.interpolate(labels[:, None].double(), x.shape[2:], mode="nearest")[:, 0].long()
    small = torch.where(small == 255, -1, small)
    own = ops.class_scores(head.embed(x), head.prototypes, small).own_similarity
    return head.cluster(own, small).flatten()


@pytest.mark.parametrize("loss_size", ["labels", "features"])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_weight": [0.5, 1.0, 2.0, 0.0, 1.5], "label_smoothing": 0.1},
        {"ppc_weight": 0.5, "ppd_weight": 0.7, "ppc_temperature": 0.1, "align_corners": True},
    ],
    ids=["plain", "weighted", "contrast"],
)
def test_loss_and_gradients_are_those_of_plain_torch(loss_size, scores, options):
    head = make_head(loss_size=loss_size, scores=scores, **options).double()
    x, labels = batch(dtype=torch.float64)
    p, cluster = head.prototypes.clone(), clusters(head, x, labels)
    x.requires_grad_()
    tensors = [x, *head.parameters()]
    expected = naive_loss(head, x, labels, p, cluster)
    actual = head.loss(x, labels).loss  # and the sub-centroids have moved before backward
    assert not torch.equal(head.prototypes, p)
    assert_golden(actual, expected.detach(), "loss")
    for a, e in zip(torch.autograd.grad(actual, tensors), torch.autograd.grad(expected, tensors), strict=True):
        assert_golden(a, e, "gradient")


@pytest.mark.parametrize("loss_size", ["labels", "features"])
@pytest.mark.parametrize("scores", SCORES)
def test_float32_loss_is_close_to_float64(loss_size, scores):
    head = make_head(loss_size=loss_size, scores=scores)
    x, labels = batch()
    expected = copy.deepcopy(head).double().loss(x.double(), labels).loss
    actual = head.loss(x, labels).loss
    assert_close(actual.detach(), expected.detach(), "head", terms=D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_forward_takes_every_dtype_and_layout(dtype, memory_format):
    head = make_head().eval()
    x = batch()[0].to(dtype).contiguous(memory_format=memory_format)
    scores = head(x)
    assert scores.shape == (2, C, 6, 7)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = copy.deepcopy(head).double()(x.double())
    # the embedding is rounded to the dtype of the features
    assert_close(scores.to(dtype), expected, "head", terms=D, scale=3)


def test_half_module_trains_with_float32_sub_centroids():
    head = make_head(scores="scale").bfloat16()
    x, labels = batch(dtype=torch.bfloat16)
    head.loss(x.requires_grad_(), labels).loss.backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all()
    assert head.prototypes.dtype == torch.float32
    assert head.logit_scale.grad.isfinite()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype(dtype):
    x, labels = batch()
    assert torch.equal(make_head().loss(x, labels).loss, make_head().loss(x, labels.to(dtype)).loss)


def test_projection_comes_first():
    head = make_head(embed_channels=8)
    x, labels = batch()
    assert head.prototypes.shape == (C, K, 8)
    head.loss(x, labels).loss.backward()
    assert head.projection.weight.grad.abs().sum() > 0
    inner = nn.DNCHead(8, C, K, recipe="released")
    inner.load_state_dict({k: v for k, v in head.state_dict().items() if not k.startswith("projection")})
    assert torch.equal(inner.eval()(head.projection(x)), head.eval()(x))


# labels


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_labels_are_resized_as_interpolate_does(height, width, h, w):
    labels = torch.arange(2 * height * width).view(2, height, width)
    for mode in ("nearest", "nearest-exact"):
        expected = F.interpolate(labels[:, None].double(), (h, w), mode=mode)[:, 0].long()
        assert torch.equal(nn.resize_labels(labels, (h, w), mode), expected)
        assert torch.equal(nn.resize_labels(labels[1], (h, w), mode), expected[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("size", [5, (5, 5), [5, 5], np.int64(5), (np.int32(5), 5), torch.Size((5, 5))], ids=repr)
def test_resized_labels_keep_their_dtype_and_take_any_size(dtype, size):
    labels = torch.randint(0, 100, (2, 9, 11)).to(dtype)
    resized = nn.resize_labels(labels, size)
    assert resized.dtype == dtype
    assert torch.equal(resized.double(), F.interpolate(labels[:, None].double(), (5, 5), mode="nearest-exact")[:, 0])


def test_resizing_labels_checks_its_input_and_copies_nothing_in_vain():
    labels = torch.zeros(2, 4, 6, dtype=torch.int64)
    assert nn.resize_labels(labels, (4, 6)) is labels
    assert nn.resize_labels(labels[:0], 3).shape == (0, 3, 3)
    for bad, error, text in (
        ((labels.float(), 2), TypeError, "resize_labels: labels must be an integer tensor"),
        ((labels[0, 0], 2), ValueError, r"labels must be \[B,H,W\] or \[H,W\]"),
        ((labels[:, :0], 2), ValueError, "labels must be of at least one row and column"),
        ((labels, 0), ValueError, r"size must be a positive integer or a pair \(H, W\) of them; got 0"),
        ((labels, (2, 3, 4)), ValueError, r"size must be a positive integer or a pair \(H, W\) of them"),
        ((labels, 2.5), TypeError, "size must be a positive integer or a pair"),
        ((labels, (True, 2)), TypeError, "size must be a positive integer or a pair"),
        ((labels, 2, "bilinear"), ValueError, "mode must be one of nearest, nearest-exact"),
    ):
        with pytest.raises(error, match=text):
            nn.resize_labels(*bad)


@pytest.mark.parametrize("scores", ["temperature", "scale"])
def test_confidence_scales_logits_and_leaves_the_nearest_alone(scores):
    plain, sure = (nn.DNCHead(8, C, K, scores=scores, confidence=c, recipe="released") for c in ("none", "length"))
    sure.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 3, 4)
    length = (x.double().var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert_close(sure(x), plain(x).double() * length, "head", terms=8, scale=10.0)
    assert torch.equal(sure(x).argmax(1), plain(x).argmax(1))
    assert sure(torch.zeros(1, 8, 1, 1, requires_grad=True)).isfinite().all()


def test_confidence_is_the_same_in_both_loss_modes():
    """At equal sizes the fused pass and the composed one must agree, gradients of the features' length included."""
    heads = [nn.DNCHead(8, C, K, loss_size=size, generator=torch.Generator().manual_seed(3)) for size in ("labels", "features")]
    labels, grads, losses = torch.randint(0, C, (2, 3, 4)), [], []
    features = torch.randn(2, 8, 3, 4)
    for head in heads:
        x = features.clone().requires_grad_()
        out = head.loss(x, labels)
        out.loss.backward()
        grads.append(x.grad), losses.append(out.loss.detach())
    assert_close(losses[0], losses[1].double(), "head", terms=8)
    assert_close(grads[0], grads[1].double(), "head", terms=8)
    assert_close(heads[0].prototypes, heads[1].prototypes.double(), "head", terms=8)


@pytest.mark.parametrize("bad, where", [(5, 3), (256, 0), (254, 600)])
def test_label_beyond_the_classes_is_an_error(bad, where):
    x, labels = batch()
    labels.view(-1)[where] = bad
    text = rf"labels must be in \[0,5\); ignore_index 255 or any negative id leaves a pixel out; got {bad} at pixel {where}"
    with pytest.raises(ValueError, match=rf"DNCHead\.loss: {text}"):
        make_head().loss(x, labels)
    with pytest.raises(ValueError, match=rf"DNCHead\.initialize_from_: {text}"):
        make_head().initialize_from_(x, labels)


@pytest.mark.parametrize("ignore_index", [255, -1, -100])
@pytest.mark.parametrize("checkpoint", ["none", "all"])
@pytest.mark.parametrize("options", [{}, {"loss_size": "features"}, {"class_weight": [0.5, 1.0, 2.0, 0.0, 1.5]}], ids=str)
def test_any_negative_label_leaves_a_pixel_out(ignore_index, checkpoint, options):
    """As if it were ignore_index: in the loss, its gradient, the accuracy, the counters and the update."""
    (x, labels), outcomes = batch(label_size=(12, 14)), []
    left_out = labels == 255
    for ids in (torch.full_like(labels, ignore_index), torch.randint(-9, 0, labels.shape)):
        ids[0, 0, 0] = ignore_index
        head = make_head(ignore_index=ignore_index, checkpoint=checkpoint, **options)
        y = x.clone().requires_grad_()
        result = head.loss(y, torch.where(left_out, ids, labels))
        result.loss.backward()
        assert int(head.bad_labels) == 0 and int(head.class_counts.sum()) < 2 * 6 * 7
        outcomes.append([*result, y.grad, head.prototypes, head.class_counts, head.last_counts])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_negative_labels_start_no_sub_centroid():
    x, labels = batch()
    counts = make_head().initialize_from_(x, torch.where(labels == 255, -7, labels))
    assert torch.equal(counts, make_head().initialize_from_(x, labels))


def test_compiled_step_leaves_out_negative_labels_and_counts_those_beyond_the_classes():
    head, twin, (x, labels) = make_head(), make_head(), batch()
    odd = torch.where(labels == 255, -3, labels)
    odd[0, 0, :4] = 255
    compiled = torch.compile(head.loss, backend="aot_eager")
    assert_close(compiled(x, odd).loss.detach(), twin.loss(x, labels).loss.detach().double(), "head", terms=D)
    assert int(head.bad_labels) == 0
    odd[1, 5, 5:7] = 254
    compiled(x, odd)
    assert int(head.bad_labels) == 2


def test_ignore_index_that_is_a_class_is_an_error():
    with pytest.raises(ValueError, match=r"ignore_index must be outside \[0,300\); got 255"):
        nn.DNCHead(8, 300)
    assert nn.DNCHead(8, 300, ignore_index=-100).ignore_index == -100


def test_more_than_255_sub_centroids_lose_none():
    # one number space for targets and ignore_index drops sub-centroid 255 in the released code
    head = nn.DNCHead(8, 30, 10, update_from="all", momentum=0.0, ppd_weight=0.0)
    x, labels = torch.randn(1, 8, 40, 40), torch.full((1, 40, 40), 25)
    head.loss(x, labels)
    assert head.last_counts[25, 5] > 0
    assert int(head.last_counts.sum()) == 1600


def test_all_ignored_batch_gives_zeros_and_moves_nothing():
    for options in ({}, {"loss_size": "features"}, {"class_weight": [1.0] * C}):
        head = make_head(**options)
        before = head.prototypes.clone()
        x = batch()[0].requires_grad_()
        result = head.loss(x, torch.full((2, 24, 28), 255))
        result.loss.backward()
        assert [v.item() for v in result] == [0, 0, 0, 0, 0]
        assert x.grad.abs().max() == 0
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in head.parameters())
        assert torch.equal(head.prototypes, before)


@pytest.mark.parametrize("loss_size", ["labels", "features"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_feature_gives_nan_loss_and_poisons_nothing(loss_size, value):
    x, labels = batch(label_size=(6, 7))
    labels[0, :3], labels[1, 2, 2] = 1, 2
    head, twin = make_head(loss_size=loss_size), make_head(loss_size=loss_size)
    masked = labels.clone()
    masked[1, 2, 2] = 255
    twin.loss(x, masked)
    x[1, 4, 2, 2] = value
    assert head.loss(x, labels).loss.isnan()
    assert torch.equal(head.prototypes, twin.prototypes)
    assert int(head.nonfinite_pixels) == 1


def test_step_counts_its_classes():
    head = make_head()
    x, labels = batch(label_size=(6, 7))
    head.loss(x, labels)
    assert head.class_counts.tolist() == torch.bincount(labels[labels != 255], minlength=C).tolist()
    assert int(head.num_updates) == 1
    assert int(head.bad_labels) == 0


@pytest.mark.parametrize(
    "x, labels, text",
    [
        ((2, D, 4), (2, 4, 4), r"DNCHead\.loss: features must be \[B,16,h,w\]"),
        ((2, D + 1, 4, 4), (2, 4, 4), r"features must be \[B,16,h,w\]"),
        ((2, D, 4, 4), (3, 4, 4), r"labels must be \[2,H,W\] to match features"),
        ((2, D, 4, 4), (2, 1, 4, 4), r"DNCHead\.loss: labels .*labels\[:, 0\]"),
        ((2, D, 0, 4), (2, 4, 4), r"DNCHead\.loss: features must be of at least one row and column"),
    ],
)
def test_shapes_are_checked(x, labels, text):
    with pytest.raises(ValueError, match=text):
        make_head().loss(torch.randn(x), torch.zeros(labels, dtype=torch.int64))


def test_no_channel_is_dropped_from_what_is_no_label_map():
    with pytest.raises(ValueError, match=r"labels must be \[2,H,W\]") as error:
        make_head().loss(torch.randn(2, D, 4, 4), torch.zeros(2, 4, 4, 3, dtype=torch.int64))
    assert "labels[:, 0]" not in str(error.value)


@pytest.mark.parametrize("function", ["forward", "embed", "predict", "explain", "loss", "initialize_from_"])
def test_errors_name_the_function_that_was_called(function):
    arguments = (torch.zeros(1, 4, 4, dtype=torch.int64),) if function in ("loss", "initialize_from_") else ()
    with pytest.raises(ValueError, match=rf"^DNCHead\.{function}: features must be"):
        getattr(make_head(), function)(torch.randn(1, D + 1, 4, 4), *arguments)


def test_dtypes_are_checked():
    x, labels = batch()
    with pytest.raises(TypeError, match="labels must be an integer tensor"):
        make_head().loss(x, labels.float())
    with pytest.raises(TypeError, match=r"features must be a float32, .* tensor; .* \(convert it with \.float\(\)\)"):
        make_head().loss(x.long(), labels)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"recipe": "best"}, "recipe must be one of default, released, slow, classification, segmentation; got best"),
        ({"scores": "softmax"}, "scores must be one of norm, temperature, scale"),
        ({"temperature": 0.0}, "temperature must be positive and finite"),
        ({"ppc_weight": -1.0}, "ppc_weight must be non-negative and finite"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0,1\]"),
        ({"loss_size": "both"}, "loss_size must be one of labels, features"),
        ({"class_weight": [1.0]}, r"class_weight must be \[C\]=\[5\]"),
        ({"class_weight": [1.0, 1, 1, 1, -1]}, "class_weight must be non-negative"),
        ({"embed_channels": -3}, "DNCHead: embed_channels must be None or a positive integer"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(ValueError, match=text):
        make_head(**options)


# training


def test_weights_of_zero_skip_their_work(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("not wanted")

    monkeypatch.setattr(ops, "subcentroid_cross_entropy", fail)
    head = make_head(ppc_weight=0.0, ppd_weight=0.0)
    x, labels = batch()
    result = head.loss(x, labels)
    assert result.ppc == 0 and result.ppd == 0 and result.loss == result.cross_entropy
    monkeypatch.setattr(ops, "sinkhorn_assign", fail)
    head.eval().loss(x, labels)


def test_evaluation_moves_nothing():
    x, labels = batch()
    head = make_head().eval()
    before = copy.deepcopy(head.state_dict())
    trained = make_head().loss(x, labels)
    evaluated = head.loss(x, labels)
    assert all(torch.equal(a, b) for a, b in zip(evaluated, trained, strict=True))
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())
    assert int(head.num_updates) == 0


def test_update_can_be_asked_for_or_left_out():
    x, labels = batch()
    head = make_head()
    before = head.prototypes.clone()
    head.loss(x, labels, update=False)
    assert torch.equal(head.prototypes, before)
    loss = head.eval().loss(x.requires_grad_(), labels, update=True).loss
    assert not torch.equal(head.prototypes, before)
    loss.backward()


def test_scores_taken_before_an_update_can_go_backward_after_it():
    x, labels = batch()
    head = make_head()
    scores = head(x.requires_grad_())
    head.loss(x, labels).loss.backward()
    scores.sum().backward()


def test_gradients_accumulate_over_micro_batches():
    head = make_head()
    x, labels = batch()
    one = head.loss(x[:1], labels[:1], update=False).loss + head.loss(x[1:], labels[1:], update=False).loss
    one.backward()
    two = make_head()
    for i in range(2):
        two.loss(x[i : i + 1], labels[i : i + 1], update=False).loss.backward()
    for a, b in zip(two.parameters(), head.parameters(), strict=True):
        assert_close(a.grad, b.grad.double(), "head", terms=x.numel())


def test_autocast_trains_in_bfloat16():
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, D, 3, padding=1)
    head = make_head()
    labels = batch(label_size=(6, 7))[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = net(torch.randn(2, 3, 6, 7))
        assert features.dtype == torch.bfloat16
        result = head.loss(features, labels)
    assert result.loss.dtype == torch.float32
    result.loss.backward()
    assert net.weight.grad.isfinite().all() and net.weight.grad.abs().sum() > 0
    assert head.prototypes.dtype == torch.float32


def test_reruns_are_bit_equal():
    runs = []
    for _ in range(2):
        head, (x, labels) = make_head(assignment="gumbel"), batch()
        for _ in range(3):
            x = x.detach().requires_grad_()
            head.loss(x, labels).loss.backward()
        runs.append((x.grad, head.prototypes, head.mask_norm.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("scores", SCORES)
def test_training_learns_a_separable_map(scores):
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, D, 1)
    head = make_head(scores=scores, momentum=0.99)
    labels = torch.randint(0, C, (2, 12, 12))
    image = torch.randn(C, 3)[labels].permute(0, 3, 1, 2) + 0.1 * torch.randn(2, 3, 12, 12)
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=0.04)
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        result = head.loss(net(image), labels)
        result.loss.backward()
        optimizer.step()
        history.append(result)
    assert history[-1].loss < history[0].loss
    assert history[-1].accuracy > 0.95
    assert (head.eval().predict(net(image)) == labels).float().mean() > 0.95


def test_learnable_scale_begins_where_asked_and_learns():
    head = make_head(scores="scale", scale=7.0)
    x, labels = batch()
    scores = ops.class_scores(head.embed(x), head.prototypes).scores
    assert_close(head(x).detach(), 7 * scores.detach().double(), "head", terms=1)
    head.loss(x, labels).loss.backward()
    assert head.logit_scale.grad.abs() > 0


@pytest.mark.parametrize("scores", ["norm", "scale"])
def test_forward_compiles_into_one_graph(scores):
    head = make_head(scores=scores)
    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((6, 7), (4, 9)):
        x = batch(size)[0]
        assert_close(compiled(x).detach(), head(x).detach().double(), "head", terms=D, scale=3)


@pytest.mark.parametrize("options", [{}, {"loss_size": "features", "momentum": (0.5, 0.9, 2), "revive_after": 1}])
def test_training_step_is_one_graph_without_a_sync_and_does_what_eager_does(options):
    eager, twin = make_head(**options), make_head(**options)
    compiled = torch.compile(twin.loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed in range(3):
        x, labels = batch(seed=seed)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, actual = eager.loss(a, labels), compiled(b, labels)
        expected.loss.backward()
        actual.loss.backward()
        assert_close(actual.loss.detach(), expected.loss.detach().double(), "head", terms=D)
        assert_golden(b.grad, a.grad, "gradient")
    assert_close(twin.prototypes, eager.prototypes.double(), "direction", terms=D)
    assert int(twin.num_updates) == 3


def test_compiled_step_counts_wrong_labels_instead_of_raising():
    head = make_head()
    x, labels = batch()
    labels[1, 5, 5] = 77
    torch.compile(head.loss, backend="aot_eager")(x, labels)
    assert int(head.bad_labels) == 1


def test_gumbel_step_compiles_with_a_generator():
    # make_head gives one; it draws outside the graph
    eager, twin = make_head(assignment="gumbel"), make_head(assignment="gumbel")
    x, labels = batch()
    torch.compile(twin.loss, backend="aot_eager")(x, labels)
    eager.loss(x, labels)
    assert_close(twin.prototypes, eager.prototypes.double(), "direction", terms=D)


# prediction


@pytest.mark.parametrize("scores", SCORES)
def test_prediction_is_the_argmax_of_upsampled_logits(scores):
    head = make_head(scores=scores).eval()
    x, _ = batch()
    assert torch.equal(head.predict(x), head(x).argmax(1))
    expected = F.interpolate(head(x).double(), (24, 28), mode="bilinear").topk(2, dim=1)
    clear = expected.values[:, 0] - expected.values[:, 1] > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(head.predict(x, (24, 28))[clear], expected.indices[:, 0][clear])


def test_explanation_names_the_predicted_class_and_its_sub_centroid():
    head = make_head(scores="temperature").eval()
    x, _ = batch()
    label, sub, score = head.explain(x)
    assert torch.equal(label, head.predict(x))
    own = torch.einsum("bdhw,bhwd->bhw", head.embed(x), head.prototypes[label, sub])
    assert_close(score, own.detach().double(), "head", terms=D)


# state


def test_state_dict_has_the_released_names():
    expected = {"prototypes", "feat_norm.weight", "feat_norm.bias", "mask_norm.weight", "mask_norm.bias"}
    assert set(make_head().state_dict()) == expected
    assert set(make_head(scores="temperature").state_dict()) == {n for n in expected if "mask" not in n}


def test_parameters_are_the_norms_alone():
    assert {name for name, _ in make_head().named_parameters()} == {
        f"{norm}.{part}" for norm in ("feat_norm", "mask_norm") for part in ("weight", "bias")
    }


@pytest.mark.parametrize("how", ["state_dict", "safetensors", "deepcopy", "pickle"])
def test_training_goes_on_exactly_from_a_copy(how, tmp_path):
    head = make_head(scores="norm")
    x, labels = batch()
    head.loss(x, labels)
    if how == "deepcopy":
        twin = copy.deepcopy(head)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(head))
    else:
        twin = nn.DNCHead(D, C, K, recipe="released", momentum=0.9)
        state = head.state_dict()
        if how == "safetensors":
            safetensors = pytest.importorskip("safetensors.torch")
            safetensors.save_file(state, tmp_path / "head.safetensors")
            state = safetensors.load_file(tmp_path / "head.safetensors")
        twin.load_state_dict(state)
    a, b = head.loss(x, labels), twin.loss(x, labels)
    assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))
    assert torch.equal(head.prototypes, twin.prototypes)


def released_state(prefix="", older=False):
    state = {name: torch.rand_like(value) + 0.5 for name, value in make_head().state_dict().items()}
    if older:
        state["subcentroids"] = state.pop("prototypes")
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "head.", "module.", "module.decode_head."])
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_released_checkpoints_load(prefix, older, wrapper):
    state = released_state(prefix, older)
    head = make_head()
    report = nn.load_released_state_dict(head, state if wrapper is None else {wrapper: state, "epoch": 3})
    assert report.kept == [] and report.extras == {}
    rows = state[prefix + ("subcentroids" if older else "prototypes")]
    assert_close(head.prototypes, F.normalize(rows.double(), dim=2), "direction", terms=D)
    assert torch.equal(head.mask_norm.bias, state[prefix + "mask_norm.bias"])


def test_protoseg_extras_come_back_once():
    state = released_state("module.")
    for name in ("cls_head.0.weight", "proj_head.proj.0.weight", "proj_head.mlp2.0.weight", "backbone.conv1.weight"):
        state["module." + name] = torch.zeros(1)
    report = nn.load_released_state_dict(make_head(), {"state_dict": state})
    assert sorted(report.extras) == ["backbone.conv1.weight", "cls_head.0.weight", "proj_head.proj.0.weight"]


def test_other_scores_take_the_rest_of_a_released_checkpoint():
    report = nn.load_released_state_dict(make_head(scores="scale"), released_state())
    assert report.kept == ["logit_scale"]
    assert sorted(report.extras) == ["mask_norm.bias", "mask_norm.weight"]


def test_released_checkpoints_without_a_head_or_with_two_or_half_of_one_are_errors():
    with pytest.raises(ValueError, match="must be a state dict with prototypes or subcentroids"):
        nn.load_released_state_dict(make_head(), {"fc.weight": torch.zeros(1)})
    two = {**released_state("a."), **released_state("b.")}
    with pytest.raises(ValueError, match=r"state dict of one head; got a.prototypes, b.prototypes"):
        nn.load_released_state_dict(make_head(), two)
    half = {"prototypes": released_state()["prototypes"]}
    with pytest.raises(ValueError, match=r"feat_norm.bias"):
        nn.load_released_state_dict(make_head(), half)
    assert len(nn.load_released_state_dict(make_head(), half, strict=False).kept) == 4
    with pytest.raises(RuntimeError, match="size mismatch for prototypes"):
        nn.load_released_state_dict(nn.DNCHead(D, C, K + 1, recipe="released"), released_state())


# recipes


def test_recipes_name_the_same_choices():
    assert all(set(recipe) == set(nn.RECIPES["released"]) for recipe in nn.RECIPES.values())


def test_explicit_options_override_the_recipe():
    head = nn.DNCHead(D, C, recipe="released", momentum=0.5, scores="temperature")
    assert head.momentum == 0.5 and head.scores == "temperature"
    assert head.ppc_weight == nn.RECIPES["released"]["ppc_weight"]


def test_released_recipe_is_the_published_head():
    head = nn.DNCHead(D, C, recipe="released")
    assert (head.scores, head.momentum, head.epsilon, head.iterations) == ("norm", 0.999, 0.05, 3)
    assert (head.ppc_weight, head.ppd_weight, head.update_from, head.init) == (0.01, 0.001, "correct", "random")
    x = torch.randn(1, D, 4, 4)
    assert head(x).abs().max() <= math.sqrt(C - 1) + 1e-5  # what LayerNorm over classes bounds a logit by


def test_head_starts_from_data():
    head = make_head()
    x, labels = batch(label_size=(6, 7))
    labels[:] = labels.clamp(max=1)
    before = head.prototypes.clone()
    counts = head.initialize_from_(x, labels)
    assert counts[2:].tolist() == [0] * (C - 2)
    assert torch.equal(head.prototypes[2:], before[2:])
    rows = head.embed(x).detach().permute(0, 2, 3, 1).reshape(-1, D)
    assert ((head.prototypes[:2].flatten(0, 1) @ rows.T).amax(1) > (before[:2].flatten(0, 1) @ rows.T).amax(1)).all()
