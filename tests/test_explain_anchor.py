"""Anchoring: real samples, no two alike, the best assignment, the right pictures, and files that come back as they were."""

import json
from itertools import permutations

import numpy as np
import pytest
import torch
from explain_models import C, D, K, Samples, digits, of_images, of_maps, prepare
from torch import nn as torch_nn

pytest.importorskip("scipy")
pytest.importorskip("safetensors")
pytest.importorskip("jinja2")

from dnc_kernels import nn
from dnc_kernels.explain import Anchors, AnchorsError, anchor, measure
from dnc_kernels.explain.anchoring import window

pytestmark = pytest.mark.usefixtures("one_thread")


def embedded(model, samples):
    """Embeddings of all batches, as the model sees them in evaluation."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model.head.embed(model.backbone(prepare(images))) for images, _, _ in samples])


def places(anchors):
    return [[(a.sample, a.row, a.column) for a in row if a.real] for row in anchors.rows]


@pytest.mark.parametrize("seed", range(4))
def test_samples_of_a_class_differ_and_their_cosines_have_the_largest_sum(seed):
    model, train, _ = of_images(seed=seed)
    old, e = model.head.prototypes.clone(), embedded(model, train)
    anchors = anchor(model, train, prepare=prepare)
    for label in range(C):
        of_class = (train.labels == label).nonzero()[:, 0]
        cosine = (old[label] @ e[of_class].T).double()
        best = max(sum(cosine[k, i] for k, i in enumerate(chosen)) for chosen in permutations(range(len(of_class)), K))
        chosen = anchors.sample[label]
        assert len(set(chosen.tolist())) == K and (train.labels[chosen] == label).all()
        assert sum(a.similarity for a in anchors.rows[label]) == pytest.approx(float(best), abs=1e-6)


def test_two_sub_centroids_that_like_one_sample_best_share_it_no_more():
    model, train, _ = of_images()
    model.head.prototypes[0, 1:] = model.head.prototypes[0, :1]
    nearest = nn.nearest_samples(model.head, embedded(model, train), train.labels, K).sample[0, 0]
    assert sorted(anchor(model, train, prepare=prepare).sample[0].tolist()) == sorted(nearest.tolist())


@pytest.mark.parametrize("training", [True, False])
def test_sub_centroids_become_the_embeddings_of_the_samples_bit_for_bit(training):
    model, train, _ = of_images(per_class=9)
    model.backbone.append(torch_nn.BatchNorm1d(D))  # whose mode matters
    old, e = model.head.prototypes.clone(), embedded(model, train)
    model.train(training)
    model.backbone[0].eval()
    anchors = anchor(model, train, prepare=prepare)
    assert torch.equal(model.head.prototypes, e[anchors.sample])
    assert torch.equal(anchors.embedding, model.head.prototypes)
    assert (model.training, model.backbone[-1].training, model.backbone[0].training) == (training, training, False)
    for one in anchors:
        assert one.similarity == pytest.approx(float(old[one.label, one.sub] @ e[one.sample]), abs=1e-6)
        assert one.id == f"train/{one.sample}" and one.box == (0, 0, 4, 4)
        assert torch.equal(one.crop, train.images[one.sample])


def test_shares_dead_and_usage_count_the_nearest_own_sub_centroid():
    model, train, _ = of_images(per_class=11)
    train.labels[:4] = -1
    own = torch.einsum("nd,nkd->nk", embedded(model, train), model.head.prototypes[train.labels]).argmax(1)
    anchors = anchor(model, train, prepare=prepare)
    share = torch.zeros(C, K, dtype=torch.float64)
    for label in range(C):
        share[label] = own[train.labels == label].bincount(minlength=K) / (train.labels == label).sum()
    torch.testing.assert_close(anchors.share, share, rtol=0, atol=1e-7)
    assert anchors.counts == tuple((train.labels == label).sum().item() for label in range(C))
    assert anchors.dead == float((share < 0.01).double().mean())
    entropy = -(share * share.clamp(min=1e-30).log()).sum(1).mean() / np.log(K)
    assert anchors.usage == pytest.approx(float(entropy), abs=1e-6)


def test_above_ten_a_dead_sub_centroid_has_less_than_a_tenth_of_an_even_share():
    model, train, _ = of_images(per_class=30, classes=1, k=20)
    anchors = anchor(model, train, prepare=prepare)
    assert anchors.dead_below == pytest.approx(0.005) and anchors.dead == float((anchors.share == 0).double().mean()) > 0


def test_a_class_with_too_few_samples_keeps_its_other_sub_centroids():
    model, train, _ = of_images()
    train.labels[train.labels == 1] = torch.tensor([1, 1, -100, -100, -1, -100, -100])  # two are left
    train.labels[train.labels == 2] = -100
    old = model.head.prototypes.clone()
    anchors = anchor(model, train, prepare=prepare)
    assert [(anchors.sample[label] >= 0).sum().item() for label in range(C)] == [K, 2, 0]
    kept = anchors.sample < 0
    assert torch.equal(model.head.prototypes[kept], old[kept])
    assert not torch.isclose(model.head.prototypes[~kept], old[~kept]).all(1).any()
    assert all(one.crop is None and one.id == "" for one in anchors if not one.real)
    assert anchors.counts == (7, 2, 0) and anchors.share[2].tolist() == [0] * K


@pytest.mark.parametrize(("height", "width", "stride", "align"), [(40, 60, 4, False), (40, 60, 4, True), (36, 33, 5, False)])
def test_pixels_and_crops_of_a_segmentation_are_where_they_say(height, width, stride, align):
    model, train, _ = of_maps(6, height, width, stride=stride, align_corners=align)
    old, e = model.head.prototypes.clone(), embedded(model, train)
    anchors = anchor(model, train, prepare=prepare, crop=16)
    small = nn.resize_labels(train.labels, e.shape[2:])
    for one in anchors:
        # of all features: this one's cosine, and its embedding, bit for bit
        y, x = ((e[one.sample] == model.head.prototypes[one.label, one.sub][:, None, None]).all(0)).nonzero()[0].tolist()
        assert small[one.sample, y, x] == one.label
        assert one.similarity == pytest.approx(float(old[one.label, one.sub] @ e[one.sample, :, y, x]), abs=1e-6)
        if align:
            expected = (round(y * (height - 1) / (e.shape[2] - 1)), round(x * (width - 1) / (e.shape[3] - 1)))
        else:
            expected = (int((y + 0.5) * height / e.shape[2]), int((x + 0.5) * width / e.shape[3]))
            assert abs(one.row - (stride * y + (stride - 1) / 2)) <= stride / 2  # within the pixels that the feature saw
        assert (one.row, one.column) == expected
        top, left, tall, wide = one.box
        assert (tall, wide) == (16, 16) and 0 <= top <= height - 16 and 0 <= left <= width - 16
        assert torch.equal(one.crop, train.images[one.sample][:, top : top + 16, left : left + 16])
        # the picture holds its coordinates
        at = int(one.at[0] * 16), int(one.at[1] * 16)
        assert one.crop[:, at[0], at[1]].tolist() == [one.row, one.column, one.sample]


def test_no_image_of_a_segmentation_serves_two_where_there_are_enough_else_no_pixel():
    model, train, _ = of_maps(6)
    anchors = anchor(model, train, prepare=prepare)
    assert all(len(set(row)) == K for row in anchors.sample.tolist())
    assert train.passes == 2

    model, train, _ = of_maps(6)
    train.labels[2:][train.labels[2:] == 1] = 255  # class 1 in two images only
    train.passes = 0
    old, e = model.head.prototypes.clone(), embedded(model, train)
    anchors = anchor(model, train, prepare=prepare)
    assert len(set(places(anchors)[1])) == K and set(anchors.sample[1].tolist()) <= {0, 1}
    assert all(len(set(anchors.sample[label].tolist())) == K for label in (0, 2))
    flat, labels = e.permute(0, 2, 3, 1).reshape(-1, D), nn.resize_labels(train.labels, e.shape[2:]).reshape(-1)
    cosine = old[1] @ flat[labels == 1].T
    few = cosine.topk(K, dim=1).indices.unique()
    best = max(sum(cosine[k, i] for k, i in enumerate(chosen)) for chosen in permutations(few.tolist(), K))
    assert sum(a.similarity for a in anchors.rows[1]) == pytest.approx(float(best), abs=1e-6)


def test_a_class_of_two_pixels():
    model, train, _ = of_maps(2)
    train.labels[train.labels == 2] = 255
    train.labels[0, :4, :8] = 2  # two features
    anchors = anchor(model, train, prepare=prepare)
    assert sorted(places(anchors)[2]) == [(0, 2, 2), (0, 2, 6)] and anchors.counts[2] == 2


def test_figures_before_and_after_are_those_of_the_predictions():
    model, train, test = digits()
    with torch.no_grad():
        before = model.head.predict(model.backbone(prepare(test.images)))
        anchors = anchor(model, train, prepare=prepare, evaluate=test)
        after = model.head.predict(model.backbone(prepare(test.images)))
    assert not torch.equal(before, after)
    for figures, predicted in ((anchors.before, before), (anchors.after, after)):
        assert figures.accuracy == pytest.approx(float((predicted == test.labels).double().mean()))
        for label in range(10):
            mine = test.labels == label
            assert figures.per_class[label] == pytest.approx(float((predicted[mine] == label).double().mean()))
        assert (figures.miou, figures.count, figures.name, figures.value) == (None, len(test), "accuracy", figures.accuracy)
    assert anchors.cost == pytest.approx(anchors.before.accuracy - anchors.after.accuracy)
    assert anchors.after.accuracy > 0.9  # 40 digits tell the others


def test_miou_is_that_of_the_upsampled_predictions():
    model, _, test = of_maps(3)
    model.head.initialize_from_(model.backbone(prepare(test.images)), test.labels)
    test.labels[test.labels == 2] = 255  # predicted, but never true
    figures = measure(model, test, prepare=prepare)
    with torch.no_grad():
        predicted = model.eval().predict(prepare(test.images))
    kept = test.labels != 255
    iou = []
    for label in range(C):
        truth, said = (test.labels == label) & kept, (predicted == label) & kept
        iou.append(float((truth & said).sum() / (truth | said).sum()))
    assert figures.per_class == pytest.approx(iou) and iou[2] == 0
    assert figures.miou == pytest.approx(np.mean(iou))
    assert figures.accuracy == pytest.approx(float((predicted == test.labels)[kept].double().mean()))
    assert figures.count == kept.sum()


def test_names_float_images_and_grey_ones():
    model, train, _ = of_images()
    train = [(images[:, :1].double() / 255, labels) for images, labels, _ in train]
    names = [f"name {i}" for i in range(21)]
    anchors = anchor(model, train, prepare=lambda x: x.float().repeat(1, 3, 1, 1), ids=names, classes=["a", "b", "c"])
    assert anchors.classes == ("a", "b", "c")
    for one in anchors:
        assert one.id == names[one.sample]
        expected = (train[one.sample // 4][0][one.sample % 4] * 255).round().to(torch.uint8)
        assert torch.equal(one.crop, expected.expand(3, -1, -1))


def test_large_pictures_are_stored_small():
    model, train, _ = of_maps(3, 100, 200)
    anchors = anchor(model, train, prepare=prepare, crop=80, thumbnail=20)
    for one in anchors:
        assert one.crop.shape == (3, 20, 20) and one.box[2:] == (80, 80)
        row, column = (int(one.at[0] * 20), int(one.at[1] * 20))
        shown = one.crop[:, row, column].int() - torch.tensor([one.row, one.column, one.sample])
        assert shown.abs().max() <= 4


@pytest.mark.parametrize(
    ("at", "side", "box"),
    [((0, 0), 10, (0, 0, 10, 10)), ((50, 79), 10, (45, 70, 10, 10)), ((99, 40), 10, (90, 35, 10, 10)),
     ((50, 40), 200, (0, 0, 100, 80)), ((50, 40), None, (26, 16, 48, 48))],
)  # fmt: skip
def test_windows_lie_within_the_picture(at, side, box):
    assert window(*at, 100, 80, side) == box


def test_an_average_of_models_is_anchored_by_the_cosines_it_predicts_with():
    model, train, _ = of_images()
    expected = anchor(model, train, prepare=prepare)
    model, train, _ = of_images()
    model.head.prototypes *= torch.rand(C, K, 1) + 0.2
    shortened = anchor(model, train, prepare=prepare)
    assert torch.equal(shortened.sample, expected.sample)
    assert [a.similarity for a in shortened] == pytest.approx([a.similarity for a in expected], abs=1e-6)


# wrong data


class Shuffled(Samples):
    def __iter__(self):
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.passes))
        kept = self.images, self.labels
        self.images, self.labels = self.images[order], self.labels[order]
        yield from super().__iter__()
        self.images, self.labels = kept


def test_data_in_another_order_is_refused():
    model, train, _ = of_images()
    shuffled = Shuffled(train.images, train.labels)
    old = model.head.prototypes.clone()
    with pytest.raises(ValueError, match=r"anchor: data must be the same samples in the same order.*leave out shuffling"):
        anchor(model, shuffled, prepare=prepare)
    assert torch.equal(model.head.prototypes, old)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda data: iter(data), TypeError, r"anchor: data must be .* that can be read again; got .*make a list of it"),
        (lambda data: (batch for batch in data), TypeError, r"that can be read again"),
        (lambda data: [images for images, _, _ in data], TypeError, r"data must be batches of \(images, labels\)"),
        (lambda data: [], ValueError, r"data must be at least one batch"),
        (lambda data: [(i[:, :2], t) for i, t, _ in data], ValueError, r"images must be \[B,3,H,W\]"),
        (lambda data: [(i, t[1:]) for i, t, _ in data], ValueError, r"labels must be \[B\] with B=4"),
        (lambda data: [(i, t.float()) for i, t, _ in data], TypeError, r"labels must be an integer tensor"),
        (lambda data: [(i, t + 1) for i, t, _ in data], ValueError, r"labels must be in \[0,3\)"),
        (lambda data: [(i, t, n[1:]) for i, t, n in data], ValueError, r"ids must be 4 names"),
    ],
)
def test_data_that_cannot_serve_are_refused(change, error, text):
    model, train, _ = of_images()
    with pytest.raises(error, match=text):
        anchor(model, change(train), prepare=prepare)


def test_other_arguments_that_cannot_serve_are_refused(monkeypatch):
    model, train, _ = of_images()
    with pytest.raises(TypeError, match=r"anchor: images must be the backbone's input, in floats.*pass prepare"):
        anchor(model, train)
    with pytest.raises(ValueError, match=r"anchor: classes must be 3 names"):
        anchor(model, train, prepare=prepare, classes=["one"])
    with pytest.raises(ValueError, match=r"anchor: ids must be 21 names, one a sample; got 1"):
        anchor(model, train, prepare=prepare, ids=["one"])
    with pytest.raises(TypeError, match=r"anchor: model must be a module with \.backbone"):
        anchor(model.backbone, train, prepare=prepare)
    monkeypatch.setattr("dnc_kernels.nn._sync.ranks", lambda sync: 2)
    with pytest.raises(
        RuntimeError, match=r"anchor: torch\.distributed must be of one rank; got 2 ranks \(anchor in one process"
    ):
        anchor(model, train, prepare=prepare)


# files


def same(a, b):
    assert (a.classes, a.segmentation, a.counts, a.before, a.after) == (b.classes, b.segmentation, b.counts, b.before, b.after)
    assert torch.equal(a.embedding, b.embedding)
    for one, other in zip(a, b, strict=True):
        assert {n: v for n, v in vars(one).items() if n != "crop"} == {n: v for n, v in vars(other).items() if n != "crop"}
        assert (one.crop is None) == (other.crop is None) and (one.crop is None or torch.equal(one.crop, other.crop))


@pytest.mark.parametrize("make", [of_images, of_maps])
def test_saved_anchors_come_back_and_make_the_same_classifier(make, tmp_path):
    model, train, test = make()
    train.labels[train.labels == 2] = -1  # a class without samples; None in its figures
    test.labels[test.labels == 2] = -1
    anchors = anchor(model, train, prepare=prepare, evaluate=test, classes=["ö/\n", "<b>", '"'])
    assert anchors.save(tmp_path / "new" / "folder") == tuple(
        tmp_path / "new" / "folder" / name for name in ("anchors.safetensors", "anchors.json")
    )
    loaded = Anchors.load(tmp_path / "new" / "folder")
    same(loaded, anchors)
    other = make(seed=5)[0]
    other.backbone.load_state_dict(model.backbone.state_dict())
    loaded.apply_(other.head)
    assert torch.equal(other.head.prototypes, model.head.prototypes)
    loaded.save(tmp_path)
    same(Anchors.load(str(tmp_path)), anchors)


def test_anchors_stay_when_a_start_from_data_is_due():
    model, train, _ = of_images(init="data", init_step=2)
    anchors = anchor(model, train, prepare=prepare)
    model.train()
    for _ in range(4):  # momentum hardly moves them
        model.head.loss(model.backbone(prepare(train.images)), train.labels)
    assert (model.head.prototypes * anchors.embedding).sum(2).min() > 0.99


def test_anchors_of_another_head_are_refused():
    model, train, _ = of_images()
    anchors = anchor(model, train, prepare=prepare)
    with pytest.raises(ValueError, match=r"Anchors\.apply_: head must be of \[C,K,D\]=\[3, 3, 8\]; got \[3, 2, 8\]"):
        anchors.apply_(nn.DNCClassifier(D, C, K - 1))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edited(change):
    def edit(folder):
        index = json.loads((folder / "anchors.json").read_text())
        change(index)
        (folder / "anchors.json").write_text(json.dumps(index))

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "anchors.safetensors", -1),
        lambda folder: flip(folder / "anchors.safetensors", 9),
        lambda folder: (folder / "anchors.safetensors").unlink(),
        lambda folder: (folder / "anchors.json").unlink(),
        lambda folder: (folder / "anchors.json").write_text("{"),
        lambda folder: (folder / "anchors.json").write_text("[1]"),
        edited(lambda index: index.update(version=2)),
        edited(lambda index: index["anchors"][0].update(sample=300)),
        edited(lambda index: index["after"].update(accuracy=1.0)),
        edited(lambda index: index.pop("digest")),
    ],
)
def test_files_that_changed_are_refused(damage, tmp_path):
    model, train, test = of_images()
    anchor(model, train, prepare=prepare, evaluate=test).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(
        AnchorsError, match=r"anchors\.\w+: expected anchors as Anchors\.save writes them .*; got .+; anchor again"
    ):
        Anchors.load(tmp_path)


def test_files_that_say_what_cannot_be_are_refused(tmp_path, monkeypatch):
    """A digest is no proof: whoever edits a file can make one."""
    model, train, _ = of_images()
    anchor(model, train, prepare=prepare).save(tmp_path)
    monkeypatch.setattr("dnc_kernels.explain.anchors._digest", lambda index, tensors: None)
    edited(lambda index: index.update(digest=None))(tmp_path)
    assert Anchors.load(tmp_path).sample.shape == (C, K)
    for change in (
        lambda index: index["anchors"].pop(),
        lambda index: index["anchors"].__setitem__(1, index["anchors"][0]),
        lambda index: index["anchors"][0].update(sample=-1),
        lambda index: index["anchors"][0].update(box=[1]),
        lambda index: index["anchors"][0].update(nonsense=1),
        lambda index: index["classes"].pop(),
        lambda index: index.pop("counts"),
    ):
        text = (tmp_path / "anchors.json").read_text()
        edited(change)(tmp_path)
        with pytest.raises(AnchorsError):
            Anchors.load(tmp_path)
        (tmp_path / "anchors.json").write_text(text)
