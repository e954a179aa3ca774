"""The ops and the head give what the released code gives: its outputs of one training step are in tests/data."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import assert_golden

from dnc_kernels import nn, ops

NAMES = ("cityscapes_f32", "cityscapes_f64", "hard_f64", "missing_classes_f64")


@cache
def load(name):
    with np.load(Path(__file__).parent / "data" / f"golden_{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.fixture(params=NAMES)
def golden(request):
    return load(request.param)


def make_head(golden, **options):
    classes, k, channels = golden["prototypes"].shape
    head = nn.DNCHead(
        channels, classes, k, recipe="released", momentum=float(golden["gamma"]), epsilon=float(golden["epsilon"]),
        iterations=int(golden["sinkhorn_iterations"]), ignore_index=int(golden["ignore_index"]),
        dtype=golden["x"].dtype, **options,
    )  # fmt: skip
    names = ("prototypes", "feat_norm_weight", "feat_norm_bias", "mask_norm_weight", "mask_norm_bias")
    head.load_state_dict({name.replace("norm_", "norm."): golden[name] for name in names})
    return head


def as_map(pixels):
    """[N,D] as one column of pixels [1,D,N,1], in channels-first memory."""
    return pixels.T[None, :, :, None].contiguous()


def flat(features):
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def targets(golden):
    target = golden["contrast_target"]
    return torch.where(golden["labels"] == golden["ignore_index"], -1, target)


def test_prototypes_are_normalised_on_load(golden):
    head = make_head(golden)
    expected = torch.nn.functional.normalize(golden["prototypes"], dim=2)
    assert_golden(head.prototypes, expected, "prototypes")


def test_embedding(golden):
    assert_golden(flat(make_head(golden).embed(as_map(golden["x"]))), golden["embedding"], "value")


def test_raw_scores(golden):
    head = make_head(golden)
    scores = ops.class_scores(head.embed(as_map(golden["x"])), head.prototypes).scores
    assert_golden(flat(scores), golden["raw_scores"], "value")


def test_scores_and_prediction(golden):
    head = make_head(golden).eval()
    scores = flat(head(as_map(golden["x"])))
    assert_golden(scores, golden["scores"], "value")
    top = golden["scores"].topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(head.predict(as_map(golden["x"])).flatten()[clear], golden["prediction"][clear])


@pytest.mark.parametrize("loss_size", ["labels", "features"])
def test_cross_entropy_and_its_gradients(golden, loss_size):
    head = make_head(golden, ppc_weight=0.0, ppd_weight=0.0, loss_size=loss_size)
    x = as_map(golden["x"]).requires_grad_()
    result = head.loss(x, golden["labels"][None, :, None])
    assert_golden(result.loss.detach(), golden["cross_entropy"], "loss")
    result.loss.backward()
    assert_golden(flat(x.grad), golden["grad_x"], "gradient")
    for norm in ("feat_norm", "mask_norm"):
        for part in ("weight", "bias"):
            assert_golden(getattr(getattr(head, norm), part).grad, golden[f"grad_{norm}_{part}"], "gradient")


def test_contrast_target_is_equal_where_the_plan_is_no_tie(golden):
    head = make_head(golden)
    e, labels = golden["embedding"], golden["labels"]
    own = ops.class_scores(e, head.prototypes, labels, ignore_index=head.ignore_index).own_similarity
    labels = torch.where(labels == head.ignore_index, -1, labels)
    cluster = head.cluster(own, labels)
    plan = ops.sinkhorn_plan(own, labels, head.num_classes, epsilon=head.epsilon, iterations=head.iterations)
    top = plan.topk(2, dim=1).values
    tie = top[:, 0] - top[:, 1] < (1e-4 if e.dtype == torch.float32 else 1e-10)
    assert tie[labels >= 0].float().mean() < 0.05
    expected = targets(golden)
    assert torch.equal(cluster[~tie], expected[~tie])
    assert torch.equal(cluster < 0, expected < 0)


def test_step_moves_the_sub_centroids_as_released(golden):
    head = make_head(golden)
    head.loss(as_map(golden["x"]), golden["labels"][None, :, None])
    assert_golden(head.prototypes, golden["updated_prototypes"], "value")


@pytest.mark.parametrize("loss_size", ["labels", "features"])
def test_ppc_and_ppd(golden, loss_size):
    head = make_head(golden, loss_size=loss_size)
    result = head.loss(as_map(golden["x"]), golden["labels"][None, :, None])
    assert_golden(result.ppc, golden["ppc"], "loss")
    assert_golden(result.ppd, golden["ppd"], "loss")
    assert_golden(result.loss.detach(), golden["cross_entropy"] + 0.01 * golden["ppc"] + 0.001 * golden["ppd"], "loss")


def test_classifier_gives_the_same_step(golden):
    classes, k, channels = golden["prototypes"].shape
    model = nn.DNCClassifier(
        channels, classes, k, memory_size=0, recipe="released", momentum=float(golden["gamma"]),
        ignore_index=255, dtype=golden["x"].dtype,
    )  # fmt: skip
    model.load_state_dict(make_head(golden).state_dict())
    result = model.loss(golden["x"], golden["labels"])
    assert_golden(result.cross_entropy, golden["cross_entropy"], "loss")
    assert_golden(result.ppc, golden["ppc"], "loss")
    assert_golden(result.ppd, golden["ppd"], "loss")
    assert_golden(model.prototypes, golden["updated_prototypes"], "value")
