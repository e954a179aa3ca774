"""Real training loops: mixed precision, torch.compile, accumulation, checkpointing, EMA copies, saving and loading."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from small_network import CHANNELS, CHECKPOINTS, CLASSES, SUBCENTROIDS, Net, make_head, scenes
from tolerances import assert_close, assert_golden
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint as recompute

from dnc_kernels import ops

STEPS = 16


pytestmark = pytest.mark.usefixtures("one_thread")


def batch(step=0):
    """Two images and their labels; the same two in even steps."""
    images, labels = scenes(4)
    first = 2 * (step % 2)
    return images[first : first + 2], labels[first : first + 2]


def adam(net):
    return torch.optim.AdamW(net.parameters(), lr=0.01)


def fit(net, optimizer, steps=range(STEPS), *, dtype=None, scaler=None, after_step=None):
    """Train; returns the losses."""
    history = []
    for step in steps:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
            result = net(*batch(step))
        if scaler is None:
            result.loss.backward()
            optimizer.step()
        else:
            scaler.scale(result.loss).backward()
            scaler.step(optimizer)
            scaler.update()
        history.append(result.loss.detach())
        if after_step is not None:
            after_step()
    return torch.stack(history)


def assert_unit_length(head):
    length = head.prototypes.norm(dim=2)
    assert_close(length, torch.ones_like(length, dtype=torch.float64), "direction", terms=CHANNELS)


def assert_learned(head, history):
    """The loss fell; sub-centroids moved, and all are what sub-centroids have to be."""
    assert history.isfinite().all() and history[-2:].mean() < 0.5 * history[0]
    assert head.prototypes.dtype == torch.float32
    assert_unit_length(head)
    moved = (head.prototypes - make_head(recipe=head.recipe).prototypes).norm(dim=2) > 1e-2
    assert moved.any()
    assert all(p.isfinite().all() for p in head.parameters())


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def assert_equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# mixed precision


@pytest.mark.parametrize("recipe", ["default", "released"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains(dtype, checkpoint, recipe):
    net = Net(checkpoint, recipe=recipe)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if dtype == torch.float16 else None
    assert_learned(net.head, fit(net, adam(net), dtype=dtype, scaler=scaler))
    if scaler is not None:
        assert scaler.get_scale() == 2.0**12  # no step was skipped


@pytest.mark.parametrize(
    "cell, length, loss_size",
    # A pixel of a [2,256,256] label map weighs 1/131072: eight times less than the smallest normal float16.
    # At stride 32, 1024 of them meet in a feature; with long features their sum passes 65504 before it is divided by anything.
    [(8, 1, "labels"), (8, 1, "features"), (32, 8, "labels")],
    ids=["underflow", "features", "overflow"],
)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_float16_gradients_of_a_large_label_map_neither_underflow_nor_overflow(checkpoint, cell, length, loss_size):
    generator, size = torch.Generator().manual_seed(0), 256 // cell
    features = (length * torch.randn(2, CHANNELS, size, size, generator=generator)).half()
    labels = torch.randint(0, CLASSES, (2, size, size), generator=generator)
    labels = labels.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    # one sub-centroid a class: with more, rounding decides which of two equally near ones gets a gradient
    head = make_head(checkpoint, k=1, loss_size=loss_size)
    exact, half = features.double().requires_grad_(), features.clone().requires_grad_()
    copy.deepcopy(head).double().loss(exact, labels).loss.backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = head.loss(half, labels).loss
    scaler.scale(loss).backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.float16
    assert half.grad.isfinite().all()
    norm = exact.grad.norm(dim=1, keepdim=True)  # every pixel by itself: the smallest gradients are the first to vanish
    relative = (half.grad.double() / scaler.get_scale() / norm).half()
    expected = exact.grad / norm
    # the bound is that of the cross-entropy; similarities are rounded for the contrast too, and divided by its temperature
    assert_close(relative, expected, "loss_gradient", terms=CHANNELS, scale=1 + head.ppc_weight / head.ppc_temperature)


def test_step_that_overflows_float16_is_skipped_and_spares_the_sub_centroids():
    net, plain = Net(), Net()
    before = copy.deepcopy(dict(net.named_parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    fit(net, adam(net), range(1), dtype=torch.float16, scaler=scaler)
    assert scaler.get_scale() == 2.0**29
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    fit(plain, torch.optim.SGD(plain.parameters(), lr=0.0), range(1), dtype=torch.float16)
    assert torch.equal(net.head.prototypes, plain.head.prototypes)  # clustering has no gradients that could overflow
    assert_unit_length(net.head)


def test_infinite_pixel_is_skipped_by_the_scaler_and_left_out_of_the_update():
    net = Net()
    net.backbone[1] = torch.nn.Identity()  # batch norm would spread it over the whole batch
    twin = copy.deepcopy(net)
    before = copy.deepcopy(dict(net.named_parameters()))
    images, labels = batch()
    images = images.clone()
    images[1, 2, 20, 20] = torch.inf
    optimizer, scaler = adam(net), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with torch.autocast("cpu", dtype=torch.float16):
        features = net.backbone(images)
        loss = net.head.loss(features, labels).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert loss.isnan() and scaler.get_scale() == 2.0**11
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    lost = ~features.isfinite().all(1)
    assert 0 < int(net.head.nonfinite_pixels) == int(lost.sum())
    # as if nobody had labelled those pixels
    masked = torch.where(lost.repeat_interleave(4, 1).repeat_interleave(4, 2), 255, labels)
    with torch.autocast("cpu", dtype=torch.float16):
        twin.head.loss(torch.where(lost[:, None], 0, features).detach(), masked)
    assert torch.equal(net.head.prototypes, twin.head.prototypes)
    assert fit(net, optimizer, dtype=torch.float16, scaler=scaler)[-1] < 1.0  # and training goes on


# torch.compile


def assert_compiled_trains_as_eager(compiled, twin, eager, dtype=None):
    """Three steps of both: losses, gradients, weights, sub-centroids."""
    runs = []
    for step_of, net in ((eager, eager), (compiled, twin)):
        optimizer, grads = torch.optim.SGD(net.parameters(), lr=0.02), []
        history = fit(step_of, optimizer, range(3), dtype=dtype, after_step=lambda n=net, g=grads: g.append(gradients(n)))
        runs.append((history, grads))
    (expected, expected_grads), (actual, actual_grads) = runs
    assert_close(actual, expected.double(), "training", terms=3 * CHANNELS, scale=1)
    for a, e in zip(actual_grads, expected_grads, strict=True):
        assert a.keys() == e.keys()
        for name in a:
            assert_golden(a[name], e[name], "gradient")
    assert_close(twin.head.prototypes, eager.head.prototypes.double(), "training", terms=3 * CHANNELS)
    assert not torch.equal(twin.head.prototypes, make_head().prototypes)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_compiled_model_trains_as_the_eager_one(checkpoint):
    eager, twin = Net(checkpoint), Net(checkpoint)
    assert_compiled_trains_as_eager(torch.compile(twin, backend="aot_eager", fullgraph=True), twin, eager)


def test_compiled_model_trains_in_mixed_precision():
    eager, twin = Net(), Net()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    assert_compiled_trains_as_eager(compiled, twin, eager, dtype=torch.bfloat16)


def test_compiled_model_accumulates_as_the_eager_one():
    eager, twin = Net(accumulation_steps=2), Net(accumulation_steps=2)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for micro in range(4):
        for model, net in ((eager, eager), (compiled, twin)):
            net.zero_grad()
            model(*batch(micro)).loss.backward()
        for name, grad in gradients(eager).items():
            assert_golden(gradients(twin)[name], grad, "gradient")
        assert_close(twin.head.prototypes, eager.head.prototypes.double(), "direction", terms=CHANNELS)
    assert int(twin.head.num_updates) == 2


@pytest.mark.slow
def test_model_compiled_by_inductor_trains_as_the_eager_one():
    eager, twin = Net(), Net()
    assert_compiled_trains_as_eager(torch.compile(twin, fullgraph=True), twin, eager)


# accumulation


def update_of(head, features, labels):
    """Sums and counts that a loss adds to the update, from the public ops."""
    small = F.interpolate(labels[:, None].double(), features.shape[2:], mode="nearest-exact")[:, 0].long()
    small = torch.where(small == 255, -1, small)
    e = head.embed(features).detach()
    own = ops.class_scores(e, head.prototypes, small).own_similarity
    correct = head(features).argmax(1) == small
    cluster = torch.where(correct, head.cluster(own, small), -1)
    return ops.cluster_sums(e, cluster, CLASSES * SUBCENTROIDS)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_momentum_is_applied_once_for_all_micro_batches(checkpoint):
    n = 3
    net = Net(checkpoint, accumulation_steps=n)
    head = net.head
    for cycle in range(2):
        before, sums, counts = head.prototypes.clone(), 0, 0
        for micro in range(n):
            features, labels = net.backbone(batch(micro)[0]), batch(micro)[1]
            more = update_of(head, features, labels)
            sums, counts = sums + more.sums, counts + more.counts
            assert torch.equal(head.prototypes, before)
            assert int(head.num_updates) == cycle
            head.loss(features, labels).loss.backward()
        expected = before.clone()
        ops.apply_momentum_(expected, sums, counts, momentum=head.momentum)
        assert_close(head.prototypes, expected.double(), "direction", terms=CHANNELS)
        assert not torch.equal(head.prototypes, before)
        assert torch.equal(head.last_counts.flatten(), counts)
        assert int(head.num_updates) == cycle + 1


def test_losses_without_an_update_are_not_counted_as_micro_batches():
    net, twin = Net(accumulation_steps=2), Net(accumulation_steps=2)
    net(*batch(0))
    twin(*batch(0))
    net.head.loss(net.backbone(batch(1)[0]), batch(1)[1], update=False)
    twin.backbone(batch(1)[0])  # its batch norm sees what the other has seen
    assert torch.equal(net.head.prototypes, make_head().prototypes)
    net(*batch(1))
    twin(*batch(1))
    assert torch.equal(net.head.prototypes, twin.head.prototypes)
    assert not torch.equal(net.head.prototypes, make_head().prototypes)


def test_loading_a_state_drops_micro_batches_from_before():
    used, fresh = Net(accumulation_steps=2), Net(accumulation_steps=2)
    state = copy.deepcopy(used.state_dict())
    used(*batch(0))
    used.load_state_dict(state)
    for net in (used, fresh):
        net(*batch(1))
        assert torch.equal(net.head.prototypes, make_head().prototypes)
        net(*batch(0))
    assert torch.equal(used.head.prototypes, fresh.head.prototypes)
    assert not torch.equal(fresh.head.prototypes, make_head().prototypes)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_accumulated_gradients_are_the_sum_of_those_of_the_micro_batches(checkpoint):
    net = Net(checkpoint, accumulation_steps=2)
    alone = []
    for micro in range(2):
        twin = Net(checkpoint)
        twin.head.loss(twin.backbone(batch(micro)[0]), batch(micro)[1], update=False).loss.backward()
        alone.append(gradients(twin))
        net(*batch(micro)).loss.backward()
    for name, grad in gradients(net).items():
        assert_golden(grad, alone[0][name] + alone[1][name], "gradient")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_accumulation_trains(checkpoint):
    net = Net(checkpoint, accumulation_steps=2)
    optimizer, history = adam(net), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for micro in range(2):
            result = net(*batch(micro))
            (result.loss / 2).backward()
        optimizer.step()
        history.append(result.loss.detach())
    assert_learned(net.head, torch.stack(history))
    assert int(net.head.num_updates) == STEPS


# activation checkpointing


class RecomputingNet(Net):
    """The backbone's activations are computed again in backward."""

    def forward(self, images, labels):
        return self.head.loss(recompute(self.backbone, images, use_reentrant=False), labels)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_backbone_with_activation_checkpointing_trains_bit_for_bit_as_without(checkpoint):
    net, twin = Net(checkpoint), RecomputingNet(checkpoint)
    for step in range(3):
        results = []
        for model in (net, twin):
            model.zero_grad()
            result = model(*batch(step))
            result.loss.backward()
            results.append([*(part.detach() for part in result), *gradients(model).values(), model.head.prototypes.clone()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# copies


@pytest.mark.parametrize("recipe", ["default", "released"])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model_predicts_with_sound_sub_centroids(use_buffers, recipe):
    net = Net(recipe=recipe)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    plain = Net(recipe=recipe)
    expected = fit(plain, adam(plain))
    actual = fit(net, adam(net), after_step=lambda: averaged.update_parameters(net))
    # averaging leaves the original alone
    assert torch.equal(actual, expected)
    assert_equal_states(net, plain)
    ema = averaged.module.eval()
    assert not torch.equal(ema.head.feat_norm.weight, net.head.feat_norm.weight)
    assert torch.equal(ema.head.prototypes, net.head.prototypes) != use_buffers
    # unit length, or used as if: a shorter sub-centroid would lose to all others
    features = ema.backbone(batch()[0])
    scores, normalised = ema.head(features), copy.deepcopy(ema.head)
    normalised.prototypes.copy_(F.normalize(normalised.prototypes, dim=2))
    assert_close(scores, normalised(features).detach().double(), "head", terms=CHANNELS, scale=3)
    agree = ema.head.predict(features, (40, 40)) == batch()[1]
    assert agree[batch()[1] != 255].float().mean() > 0.75
    before = ema.head.prototypes.clone()
    fit(net, adam(net), range(2))
    assert torch.equal(ema.head.prototypes, before)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_copy_taken_while_training_goes_on_by_itself(checkpoint):
    net = Net(checkpoint)
    fit(net, torch.optim.SGD(net.parameters(), lr=0.02), range(3))
    twin, still = copy.deepcopy(net), copy.deepcopy(net)
    a, b = (fit(model, torch.optim.SGD(model.parameters(), lr=0.02), range(3, 6)) for model in (net, twin))
    assert torch.equal(a, b)
    assert_equal_states(net, twin)
    assert not torch.equal(still.head.prototypes, net.head.prototypes)


# files


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("options", [{}, {"recipe": "released"}, {"momentum": (0.5, 0.9, 6), "revive_after": 2}], ids=str)
def test_training_resumed_from_a_file_is_bit_equal_to_uninterrupted(checkpoint, options, tmp_path):
    whole = Net(checkpoint, **options)
    optimizer = adam(whole)
    fit(whole, optimizer, range(3))
    torch.save({"net": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "training.pt")
    expected = fit(whole, optimizer, range(3, 6))
    resumed = Net(checkpoint, **options)
    fit(resumed, adam(resumed), range(2))  # what it was must not matter
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    resumed.load_state_dict(state["net"])
    optimizer = adam(resumed)
    optimizer.load_state_dict(state["optimizer"])
    assert torch.equal(fit(resumed, optimizer, range(3, 6)), expected)
    assert_equal_states(resumed, whole)


def test_safetensors_bring_back_every_bit(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net, loaded = Net(), Net(recipe="default")
    fit(net, adam(net), range(4))
    safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    loaded.load_state_dict(safetensors.load_file(tmp_path / "net.safetensors"))
    assert_equal_states(net, loaded)
    images = batch(1)[0]
    outputs = [(m.head(m.backbone(images)), m.head.predict(m.backbone(images), (40, 40))) for m in (net.eval(), loaded.eval())]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
