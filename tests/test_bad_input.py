"""Arguments that are no numbers, words for flags, other devices and layouts: errors that name function, argument and what to do."""

import numpy as np
import pytest
import torch

from dnc_kernels import nn, ops

X, P, Y = torch.randn(5, 4), torch.randn(2, 2, 4), torch.tensor([0, 1, 0, 1, -1])
S, L = torch.randn(1, 2, 3, 3), torch.zeros(1, 6, 6, dtype=torch.int64)
UNIT = torch.nn.functional.normalize(X, dim=1)


def head(**options):
    return nn.DNCHead(4, 2, 2, **options)


#: What is called, and what the error must say. A number: of Python or numpy, no bool, no tensor.
BAD = {
    "temperature word": (lambda: ops.centroid_cross_entropy(X, P, Y, temperature="a"), "temperature must be a number.*got 'a'"),
    "temperature tensor": (lambda: ops.subcentroid_cross_entropy(X, P, Y, temperature=torch.tensor(1.0)), "temperature.*item"),
    "temperature huge": (lambda: ops.centroid_cross_entropy(X, P, Y, temperature=10**400), "temperature must be positive"),
    "smoothing tensor": (lambda: ops.upsample_cross_entropy(S, L, label_smoothing=torch.tensor(0.1)), "no gradient here"),
    "epsilon word": (lambda: ops.sinkhorn_assign(X, Y, 2, epsilon="x"), "sinkhorn_assign: epsilon must be a number"),
    "epsilon bool": (lambda: ops.sinkhorn_assign(X, Y, 2, epsilon=True), "epsilon must be a number"),
    "tolerance list": (lambda: ops.sinkhorn_plan(X, Y, 2, tolerance=[1]), "tolerance must be a number, None or 0 or more"),
    "iterations huge": (lambda: ops.sinkhorn_assign(X, Y, 2, iterations=2**40), "iterations must be .* at most 2147483647"),
    "classes huge": (lambda: ops.sinkhorn_assign(X, Y, 2**40), "num_classes must be .* at most 2147483647"),
    "clusters huge": (lambda: ops.cluster_sums(X, Y, 2**63), "num_clusters must be .* at most 2147483647"),
    "ignored huge": (lambda: ops.class_scores(X, P, Y, ignore_index=2**63), "ignore_index must be an integer of 64 bits"),
    "momentum none": (lambda: ops.momentum_update_(P.clone(), X, Y, momentum=None), "momentum must be a number, in .0,1.; got None"),
    "eps none": (lambda: ops.normalize_embedding(X, eps=None), "eps must be a number"),
    "sparse": (lambda: ops.normalize_embedding(X.to_sparse()), r"x must be a dense tensor.*to_dense"),
    "sparse labels": (lambda: ops.upsample_cross_entropy(S, L.to_sparse()), r"labels must be a dense tensor.*to_dense"),
    "flag": (lambda: ops.upsample_cross_entropy(S, L, align_corners="no"), "align_corners must be True or False; got 'no'"),
    "flag of argmax": (lambda: ops.upsample_argmax(S, 5, align_corners="no"), "align_corners must be True or False"),
    "deterministic": (lambda: ops.momentum_update_(P.clone(), X, Y, deterministic="no"), "deterministic must be True or False"),
    "weight of a loss": (lambda: head(ppc_weight="a"), "DNCHead: ppc_weight must be a number"),
    "ramp": (lambda: head(momentum=("a", 0.9, 3)), "DNCHead: momentum's start must be a number"),
    "ramp of two": (lambda: head(momentum=(0.5, 0.9)), r"momentum must be .* ramp \(start, end, steps\)"),
    "recent": (lambda: nn.Recent("x"), "Recent: fraction must be a number"),
    "generator": (lambda: head(generator=3), "generator must be a torch.Generator; got 3"),
    "balanced": (lambda: head(class_weight="balanced"), "class_weight must be a tensor or list of C=2 numbers; got 'balanced'"),
    "weights by name": (lambda: head(class_weight={0: 1.0}), "class_weight must be a tensor or list"),
    "complex weights": (lambda: head(class_weight=torch.ones(2) + 1j), "class_weight must be a tensor or list"),
    "flag of a head": (lambda: head(align_corners="no"), "DNCHead: align_corners must be True or False"),
    "device": (lambda: head()(S.new_empty(1, 4, 3, 3, device="meta")), r"DNCHead\.forward: features must be on cpu like the head"),
    "update": (lambda: head().loss(torch.randn(1, 4, 3, 3), L, update="no"), r"DNCHead\.loss: update must be True or False"),
    "step_bytes shape": (lambda: head().step_bytes((1, 2), (1, 2, 3)), r"step_bytes: features must be a shape \[B,D,h,w\]"),
    "step_bytes size": (lambda: head().step_bytes((1, 4, -2, 2), (1, 2, 3)), "features must be a non-negative integer; got -2"),
    "step_bytes dtype": (lambda: head().step_bytes((1, 4, 2, 2), (1, 2, 3), "float32"), "dtype must be a float dtype"),
    "correct": (lambda: head().update_(UNIT, Y, correct=torch.ones(5)), r"update_: correct must be a bool tensor"),
    "own list": (lambda: head().update_(UNIT, Y, own_similarity=[1]), "own_similarity must be a float32.*got .1."),
    "own ids": (lambda: head().update_(UNIT, Y, own_similarity=Y[:, None].expand(5, 2)), "own_similarity must be a float32"),
    "push word": (lambda: nn.FeatureMemory(2, 3, 4).push("x", Y), r"FeatureMemory\.push: features must be a float32"),
    "push ids": (lambda: nn.FeatureMemory(2, 3, 4).push(X.long(), Y), "features must be a float32"),
    "memory of ids": (lambda: nn.FeatureMemory(2, 3, 4, dtype=torch.int64), "FeatureMemory: dtype must be a float dtype"),
    "channels": (lambda: nn.NearestSamples(head()).add(torch.randn(5, 6), Y), r"NearestSamples\.add: embedding must be of 4 ch"),
    "samples": (lambda: nn.NearestSamples(head()).add(UNIT, Y, samples=[1]), "samples must be an integer tensor"),
    "nearest of nothing": (lambda: nn.NearestSamples("x"), "NearestSamples: sub_centroids must be a SubCentroids or a head"),
    "monitor of nothing": (lambda: nn.Monitor(3), "Monitor: head must be a SubCentroids or a head"),
    "checkpoint": (lambda: nn.load_released_state_dict(head(), 3), "checkpoint must be what torch.load gives"),
    "push elsewhere": (lambda: nn.FeatureMemory(2, 3, 4).push(X, Y.to("meta")), r"push: labels must be on cpu like features"),
    "diagnose a word": (lambda: head().diagnose(torch.randn(1, 4, 3, 3), "x"), r"diagnose: labels must be an integer tensor"),
    "refit without values": (lambda: head().refit_(torch.randn(1, 4, 6, 6), L.to("meta")), "labels must be of values"),
    "one class": (lambda: ops.sinkhorn_plan(X, num_classes=True), "sinkhorn_plan: num_classes must be a positive integer"),
    "start": (lambda: head().diagnose([], start=[1]), r"diagnose: start must be a float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_the_argument(name):
    call, expected = BAD[name]
    with pytest.raises((TypeError, ValueError), match=expected):
        call()


def test_numbers_and_flags_of_numpy_are_taken():
    kind = np.float32
    assert (
        ops.centroid_cross_entropy(X, P, Y, temperature=kind(2)).loss == ops.centroid_cross_entropy(X, P, Y, temperature=2).loss
    )
    ops.subcentroid_cross_entropy(X, P, Y, temperature=kind(1))
    ops.sinkhorn_assign(X, Y, np.int64(2), epsilon=kind(0.5), iterations=np.int32(2), tolerance=kind(0))
    ops.momentum_update_(P.clone(), X, Y, momentum=kind(0.5), deterministic=np.bool_(True))
    assert torch.equal(
        ops.upsample_cross_entropy(S, L, align_corners=np.bool_(True), label_smoothing=kind(0)),
        ops.upsample_cross_entropy(S, L, align_corners=True),
    )
    made = head(momentum=[0.5, 0.9, 3], ppc_weight=kind(1), class_weight=np.ones(2), temperature=np.int64(1))
    assert made.momentum == (0.5, 0.9, 3) and torch.equal(made.class_weight, torch.ones(2))


@pytest.mark.parametrize("size", [(1, 0), (0, 3), (0, 0)])
def test_maps_without_pixels_are_clustered(size):
    own, labels = torch.zeros(2, 2, *size), torch.zeros(2, *size, dtype=torch.int64)
    assert head().cluster(own, labels).shape == (2, *size)
