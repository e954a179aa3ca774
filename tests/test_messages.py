"""Errors that users meet name the function, the argument, what was expected and what came; and what they advise works."""

import re

import pytest
import torch
import torch.nn.functional as F

from dnc_kernels import ops
from dnc_kernels.nn import DNCClassifier, DNCHead, FeatureMemory, NearestSamples, SubCentroids

B, D, H, W, C, K = 2, 8, 4, 6, 5, 2
_seeded = torch.Generator().manual_seed(0)
X = torch.randn(B, D, H, W, generator=_seeded)
P = F.normalize(torch.randn(C, K, D, generator=_seeded), dim=2)
Y = torch.randint(0, C, (B, H, W), generator=_seeded)
ROWS, IDS = X.permute(0, 2, 3, 1).reshape(-1, D), Y.reshape(-1)
SIMILARITY, SCORES = X[:, :K], X[:, :C]


def head():
    return DNCHead(D, C, K, generator=torch.Generator().manual_seed(0))


def classifier():
    return DNCClassifier(D, C, K, generator=torch.Generator().manual_seed(0))


def nearest(e, labels):
    samples = NearestSamples(head(), 2)
    samples.add(e, labels)
    return samples.result()


#: Functions of a map and its labels; the result tells whether two label maps mean the same.
MAPS = {
    "class_scores": lambda y: ops.class_scores(X, P, y).own_similarity,
    "centroid_cross_entropy": lambda y: ops.centroid_cross_entropy(X, P, y).loss,
    "subcentroid_cross_entropy": lambda y: ops.subcentroid_cross_entropy(X, P, y),
    "sinkhorn_assign": lambda y: ops.sinkhorn_assign(SIMILARITY, y, C),
    "sinkhorn_plan": lambda y: ops.sinkhorn_plan(SIMILARITY, y, C),
    "cluster_sums": lambda y: ops.cluster_sums(X, y, C).sums,
    "momentum_update_": lambda y: (p := P.clone(), ops.momentum_update_(p, X, y))[0],
    "upsample_cross_entropy": lambda y: ops.upsample_cross_entropy(SCORES, y),
    "DNCHead.loss": lambda y: head().loss(X, y).loss,
    "DNCHead.initialize_from_": lambda y: head().initialize_from_(X, y),
    "DNCHead.diagnose": lambda y: torch.tensor(head().diagnose([(X, y)]).overall["usage"]),
    "DNCHead.refit_": lambda y: (h := head(), h.refit_([(X, y)]))[0].prototypes,
    "NearestSamples.add": lambda y: nearest(head().embed(X), y).sample,
    "SubCentroids.cluster": lambda y: SubCentroids(C, K, D).cluster(SIMILARITY, y),
    "SubCentroids.update_": lambda y: (s := SubCentroids(C, K, D, generator=torch.Generator().manual_seed(0)), s.update_(X, y))[0].last_counts,
    "SubCentroids.initialize_from_": lambda y: SubCentroids(C, K, D).initialize_from_(X, y),
}  # fmt: skip
ROWS_OF = {
    "centroid_cross_entropy": lambda y: ops.centroid_cross_entropy(ROWS, P, y).loss,
    "DNCClassifier.loss": lambda y: classifier().loss(ROWS, y).loss,
    "DNCClassifier.initialize_from_": lambda y: classifier().initialize_from_(ROWS, y),
    "FeatureMemory.push": lambda y: (m := FeatureMemory(C, 4, D), m.push(ROWS, y))[0].storage,
}
ONE_HOT = F.one_hot(Y, C)
#: Labels that are wrong for a map -> what is advised, as Python that makes them right.
ADVICE = {
    "channel axis": (Y[:, None], "labels[:, 0]"),
    "channel axis last": (Y[..., None], "labels[..., 0]"),
    "one-hot": (ONE_HOT.permute(0, 3, 1, 2), "labels.argmax(1)"),
    "one-hot last": (ONE_HOT, "labels.argmax(-1)"),
    "transposed": (Y.transpose(1, 2), "labels.transpose(1, 2)"),
    "float": (Y.double(), ".long()"),
    "numpy": (Y.numpy(), "torch.as_tensor(...)"),
    "list": (Y.tolist(), "torch.tensor(...)"),
}


def follow(advice, labels):
    text = advice.replace("...", "labels") if advice.startswith("torch") else advice
    return eval(text if "labels" in text else f"labels{text}", {"torch": torch, "labels": labels})


@pytest.mark.parametrize("kind", ADVICE)
@pytest.mark.parametrize("op", MAPS)
def test_advice_on_labels_of_a_map_works(op, kind):
    labels, advice = ADVICE[kind]
    if op == "upsample_cross_entropy" and kind == "transposed":
        return  # labels of any size are right there
    streamed = op in ("DNCHead.diagnose", "DNCHead.refit_") and not isinstance(labels, torch.Tensor)
    name = "data" if streamed else "labels"
    with pytest.raises((ValueError, TypeError), match=rf"^{re.escape(op)}: {name} must be .*; got ") as error:
        MAPS[op](labels)
    said = str(error.value)
    if streamed:
        assert "torch.as_tensor(...)" in said and len(said) < 400
        advice = "torch.as_tensor(...)"
    assert said.endswith(")") and advice in said, said
    torch.testing.assert_close(MAPS[op](follow(advice, labels)), MAPS[op](Y), rtol=0, atol=0)


@pytest.mark.parametrize("op", MAPS)
def test_a_mask_in_colour_or_in_fractions_is_no_label_map(op):
    """labels[:, 0] of an RGB mask [B,H,W,3] would be a label map of one row; .long() of a mask of ToTensor is all 0."""
    for channels in (3, 4):
        with pytest.raises(ValueError, match=r"\(a mask in colour: replace each colour by the id of its class\)$"):
            MAPS[op](Y[..., None].repeat(1, 1, 1, channels) * 40)
    with pytest.raises(TypeError, match=r"must be an integer tensor; .* ToTensor divides a mask by 255, PILToTensor does not"):
        MAPS[op](Y / 255)


@pytest.mark.parametrize("op", ROWS_OF)
def test_advice_on_labels_of_rows_works(op):
    right = ROWS_OF[op](IDS)
    for labels, advice in (
        (IDS[:, None], "labels[:, 0]"), (F.one_hot(IDS, C), "labels.argmax(1)"), (IDS.float(), ".long()"),
        (IDS.numpy(), "torch.as_tensor(...)"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=rf"^{re.escape(op)}: labels must be ") as error:
            ROWS_OF[op](labels)
        assert advice in str(error.value)
        torch.testing.assert_close(ROWS_OF[op](follow(advice, labels)), right, rtol=0, atol=0)
    with pytest.raises(ValueError, match=rf"^{re.escape(op)}: labels must be .*; got \[47\] int64"):
        ROWS_OF[op](IDS[:-1])


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("op", [op for op in MAPS if op.startswith(("DNCHead", "Nearest"))])
def test_labels_whose_rows_and_columns_are_swapped_are_refused_at_any_scale(op, scale):
    """Sizes of PIL are (width, height): labels [B,W,H] of a map [B,D,H,W] trained on the wrong pixels."""
    labels = Y.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    MAPS[op](labels)
    with pytest.raises(ValueError, match=rf"^{re.escape(op)}: labels .*\(rows and columns are swapped: labels.transpose"):
        MAPS[op](labels.transpose(1, 2))
    with pytest.raises(ValueError, match=rf"^{re.escape(op)}: labels must be .*; got \[2, 0, 6\]"):
        MAPS[op](Y[:, :0])


def test_similarities_of_a_transposed_map_are_refused():
    sub = SubCentroids(C, K, D)
    own = torch.rand(B, K, H, W)
    sub.update_(X, Y, own_similarity=own)
    with pytest.raises(
        ValueError, match=r"^SubCentroids.update_: own_similarity must be .*\[2, 4, 6\] to match x; got \[2, 6, 4\]"
    ):
        sub.update_(X, Y, own_similarity=own.transpose(2, 3))


FUNCTIONS = {
    "DNCHead.loss": lambda x: head().loss(x, Y),
    "DNCHead.forward": lambda x: head()(x),
    "DNCHead.embed": lambda x: head().embed(x),
    "DNCHead.predict": lambda x: head().predict(x),
    "DNCHead.explain": lambda x: head().explain(x),
    "DNCHead.initialize_from_": lambda x: head().initialize_from_(x, Y),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_advice_on_features_works(function):
    call, start = FUNCTIONS[function], rf"^{re.escape(function)}: features must be .*; got "
    for x, advice, works in (
        (X.permute(0, 2, 3, 1), "features.permute(0, 3, 1, 2)", True),
        (X.flatten(2).transpose(1, 2), "features.transpose(1, 2).unflatten(2, (h, w))", True),
        (X[0], "features[None]", "loss" not in function and "initialize" not in function),
    ):
        with pytest.raises(ValueError, match=start) as error:
            call(x)
        assert f"{advice})" in str(error.value)
        if works:
            call(eval(advice, {"features": x, "h": H, "w": W}))
    for x, advice in (((X * 9).long(), "convert it with .float()"), (X.numpy(), "torch.as_tensor(...)")):
        with pytest.raises(TypeError, match=start + r".*\)$") as error:
            call(x)
        assert advice in str(error.value)
    with pytest.raises(ValueError, match=start + r"\[2, 5, 4, 6\] .* \(make the head for 5 channels\)$"):
        call(X[:, :5])
    with pytest.raises(ValueError, match=start + r"meta \(move the head with .to\(features.device\), or the features to it\)$"):
        call(X.to("meta"))


def test_advice_on_features_of_a_classifier_works():
    for x, advice in (
        (X, "features.mean((2, 3))"), (X.flatten(2).transpose(1, 2), "features.mean(1)"), (ROWS[0], "features[None]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^DNCClassifier.forward: features must be \[N,8\]; got ") as error:
            classifier()(x)
        assert advice in str(error.value)
        assert classifier()(eval(advice, {"features": x})).shape[1] == C


@pytest.mark.parametrize("op", ["class_scores", "nearest_centroid", "centroid_distance"])
def test_advice_on_pixels_works(op):
    call = getattr(ops, op)
    for x, advice in ((X.flatten(2).transpose(1, 2), "x.flatten(0, 1)"), (X[0], "x[None]")):
        with pytest.raises(ValueError, match=rf"^{op}: x must be \[N,D\] or \[B,D,H,W\]; got ") as error:
            call(x, P)
        assert advice in str(error.value)
        call(eval(advice, {"x": x}), P)


@pytest.mark.parametrize("op", ["class_scores", "centroid_cross_entropy", "cluster_sums", "upsample_cross_entropy"])
def test_advice_on_255_works(op):
    labels = torch.where(Y == 1, 255, Y)
    call = {
        "class_scores": lambda **o: ops.class_scores(X, P, labels, **o),
        "centroid_cross_entropy": lambda **o: ops.centroid_cross_entropy(X, P, labels, **o),
        "cluster_sums": lambda **o: ops.cluster_sums(X, labels, C, **o),
        "upsample_cross_entropy": lambda **o: ops.upsample_cross_entropy(SCORES, labels, **o),
    }[op]
    for backend in ("cpu", "reference"):
        with pytest.raises(
            ValueError, match=rf"^{op}: labels .*got 255 at pixel \d+ \(ignore_index=255 leaves such pixels out"
        ):
            call(backend=backend)
        call(ignore_index=255, backend=backend)
