"""Explanations, rules, the picture, the page (also in a browser) and the command."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from types import ModuleType

import numpy as np
import pytest
import torch
from explain_models import C, K, digits, of_images, of_maps, opened, prepare

pytest.importorskip("scipy")
pytest.importorskip("safetensors")
pytest.importorskip("jinja2")
pytest.importorskip("PIL")

from PIL import Image
from scipy import ndimage

from dnc_kernels import __main__, nn
from dnc_kernels.explain import Anchors, anchor, cli, draw, explain_images, explain_run, measure, rule, write_gallery
from dnc_kernels.explain.pictures import percent, shown

pytestmark = pytest.mark.usefixtures("one_thread")
NASTY = '<b>&"'
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


# explanations


def test_evidence_is_the_nearest_anchor_of_the_likeliest_classes():
    model, train, test = digits()
    anchors = anchor(model, train, prepare=prepare)
    found = explain_images(model, anchors, test.images[:9], prepare=prepare, labels=test.labels[:9], top=3)
    with torch.no_grad():
        features = model.backbone(prepare(test.images[:9]))
        probability = model.head(features).softmax(1)
        cosine = torch.einsum("nd,ckd->nck", model.head.embed(features), model.head.prototypes)
    for number, one in enumerate(found):
        assert (one.query, one.id, one.truth) == (number, str(number), int(test.labels[number]))
        assert [e.label for e in one.evidence] == probability[number].argsort(descending=True)[:3].tolist()
        assert one.right == (one.label == one.truth) and torch.equal(one.picture, test.images[number])
        for e in one.evidence:
            assert e.sub == cosine[number, e.label].argmax() and e.decides
            assert e.similarity == pytest.approx(float(cosine[number, e.label, e.sub]), abs=1e-6)
            assert e.probability == pytest.approx(float(probability[number, e.label]), abs=1e-6)


def test_an_unanchored_sub_centroid_gives_way_to_an_anchor_and_is_told():
    model, train, test = of_images()
    train.labels[train.labels == 1] = torch.tensor([1, -1, -1, -1, -1, -1, -1])
    train.labels[train.labels == 2] = -1
    anchors = anchor(model, train, prepare=prepare)
    cosine = torch.einsum("nd,ckd->nck", model.head.embed(model.backbone(prepare(test.images))), model.head.prototypes)
    told = set()
    for number, one in enumerate(explain_images(model, anchors, list(test.images), prepare=prepare)):
        for e in one.evidence:
            nearest = int(cosine[number, e.label].argmax())
            real = anchors[e.label, nearest].real
            assert e.decides == real
            assert e.sub == (nearest if e.label != 1 else int(anchors.sample[1].argmax()))
            told.add((e.label, e.decides))
    assert told == {(0, True), (1, True), (1, False), (2, False)}


def test_regions_are_connected_parts_of_the_prediction_with_a_pixel_of_theirs():
    model, train, test = of_maps(4)
    model.head.initialize_from_(model.backbone(prepare(train.images)), train.labels)
    anchors = anchor(model, train, prepare=prepare)
    found = explain_images(model, anchors, test.images, prepare=prepare, labels=test.labels, ids=list("abcd"), regions=3)
    with torch.no_grad():
        predicted = model.eval().predict(prepare(test.images)).numpy()
        logits = model(prepare(test.images))
    assert {one.query for one in found} == {0, 1, 2, 3}
    for query in range(4):
        of_query = [one for one in found if one.query == query]
        areas = [int(one.region.sum()) for one in of_query]
        classes = set(np.unique(predicted[query]).tolist())
        assert 1 <= len(of_query) <= 3 and {one.label for one in of_query[: len(classes)]} == classes  # each has its turn
        assert areas[: len(classes)] == sorted(areas[: len(classes)], reverse=True)
        largest = max(np.bincount(ndimage.label(predicted[query] == label)[0].ravel())[1:].max(initial=0) for label in range(C))
        assert areas[0] == largest
    for one in found:
        assert one.id == "abcd"[one.query] and one.region[one.row, one.column]
        assert (predicted[one.query][one.region] == one.label).all()
        assert ndimage.label(one.region)[1] == 1
        y, x = one.row // 4, one.column // 4
        assert one.evidence[0].probability == pytest.approx(float(logits[one.query, :, y, x].softmax(0).max()), abs=1e-5)
        inside = test.labels[one.query].numpy()[one.region]
        counts = np.bincount(inside[inside != 255], minlength=C)
        assert one.truth == (None if counts.sum() == 0 else counts.argmax())
        picture = shown(one)
        assert picture.shape == (40, 60, 3)
        outside = ~one.region
        assert (picture[outside] == (test.images[one.query].permute(1, 2, 0).numpy()[outside] * 0.35).astype(np.uint8)).all()


def test_explanations_refuse_what_does_not_fit():
    model, train, test = of_images()
    anchors = anchor(model, train, prepare=prepare)
    with pytest.raises(ValueError, match=r"explain_images: labels must be 21, one a picture"):
        explain_images(model, anchors, test.images, prepare=prepare, labels=test.labels[:3])
    with pytest.raises(ValueError, match=r"pictures must be of \[3,H,W\]"):
        explain_images(model, anchors, test.images[0], prepare=prepare)
    model.backbone[1].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"pictures must be of finite features"):
        explain_images(model, anchors, test.images, prepare=prepare)
    model.head.prototypes[0] = model.head.prototypes[1]
    with pytest.raises(ValueError, match=r"anchors must be the sub-centroids .*call anchors\.apply_"):
        explain_images(model, anchors, test.images, prepare=prepare)


# rules


def test_the_rule_of_a_class_holds_where_the_class_is_predicted():
    model, train, test = digits()
    anchors = anchor(model, train, prepare=prepare, classes=[f"digit {i}" for i in range(10)])
    with torch.no_grad():
        e = model.head.embed(model.backbone(prepare(test.images)))
        predicted = model.head.predict(model.backbone(prepare(test.images)))
    cosine = torch.einsum("nd,ckd->nck", e, anchors.embedding)
    for label in (0, 7):
        it = rule(anchors, f"digit {label}", rivals=2)
        others = cosine.amax(2)[:, [i for i in range(10) if i != label]].amax(1)
        holds = (cosine[:, label] > others[:, None]).any(1)  # IF (row) OR (row) ...
        assert torch.equal(holds, predicted == label)
        lines = it.text.splitlines()
        assert len(lines) == 3 * 4 + 1 and lines[-1] == f"THEN digit {label}"
        for sub, (own, rivals) in enumerate(it.rows):
            assert own is anchors[label, sub]
            like = (anchors.embedding @ anchors.embedding[label, sub]).amax(1)
            like[label] = -2
            assert [rival.label for rival in rivals] == like.topk(2).indices.tolist()
            first = (
                f"{'OR' if sub else 'IF'} (query nearer to digit {label} {sub + 1} [train/{own.sample}] than to any exemplar of"
            )
            assert lines[3 * sub] == f"{first} digit {rivals[0].label}"
            assert lines[3 * sub + 2].endswith("than to any of the 7 other classes)")


def test_rules_of_one_class_of_two_and_of_none():
    model, train, _ = of_images(classes=2)
    text = rule(anchor(model, train, prepare=prepare), 1).text
    assert "other class" not in text and text.count("any exemplar of 0") == K and text.endswith("THEN 1")
    model, train, _ = of_images(classes=1)
    anchors = anchor(model, train, prepare=prepare)
    assert rule(anchors, 0).text.startswith("IF (query given)") and "THEN" in rule(anchors, 0).html
    with pytest.raises(ValueError, match=r"rule: label must be in \[0,1\); got 1"):
        rule(anchors, 1)
    with pytest.raises(ValueError, match=r"rule: label must be the name of a class; got 'goose'"):
        rule(anchors, "goose")


# pages and pictures


class Page(HTMLParser):
    """Elements of a page; fails where tags do not match."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.data = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.data.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.data).split())


def check(page):
    """Whole, by itself, and usable with a keyboard and a screen reader."""
    parsed = Page(page)
    without_pictures = re.sub(r"base64,[\w+/=]+", "", page)
    assert not re.search(r"https?:|//\w|@import|url\(|<script|<link|<iframe|javascript:|\son\w+=", without_pictures)
    assert parsed.of("html")[0]["lang"] and parsed.of("title")
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in parsed.of("img"))
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert all(link["href"].removeprefix("#") in ids for link in parsed.of("a"))
    assert "default-src 'none'" in next(m["content"] for m in parsed.of("meta") if "http-equiv" in m)
    assert not any("tabindex" in attributes for _, attributes in parsed.elements)  # only elements that have the focus anyway
    return parsed


@pytest.fixture(scope="module")
def explained_digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    return explain_run(opened(*digits()), out=out), out


def test_a_page_says_what_anchoring_cost_and_shows_right_and_wrong_queries(explained_digits):
    done, out = explained_digits
    assert {file.name for file in done.files} == {"anchors.safetensors", "anchors.json", "index.html", "wrong.png", "right.png"}
    page = check((out / "index.html").read_text())
    before, after = done.anchors.before, done.anchors.after
    text = page.text
    assert f"{percent(before.accuracy)} before, {percent(after.accuracy)} with real training images" in text
    assert "Anchoring cost nothing and gained" in text or re.search(r"Anchoring cost \d+\.\d points? of accuracy", text)
    assert "were dead" not in text  # k-means leaves none
    assert [h for h in ("Wrong decisions (6)", "Right decisions (6)") if h not in text] == []
    assert len(page.of("article")) == len(done.explanations) == 12
    wrong = [one for one in done.explanations if not one.right]
    assert len(wrong) == 6 and all(f"wrong: it is class {one.truth}" in text for one in wrong)
    for one in done.explanations:
        assert one.id in text and percent(one.evidence[0].probability) in text
    assert all(f"train/{a.sample}" in text for a in done.anchors)
    assert Anchors.load(out).sample.equal(done.anchors.sample)


def page_of(tmp_path, make, **options):
    model, train, test = make()
    if make is of_maps:
        model.head.initialize_from_(model.backbone(prepare(train.images)), train.labels)
    names = [options.pop("name", "goose"), "castle", "hornbill"]
    anchors = anchor(model, train, prepare=prepare, evaluate=options.pop("evaluate", test), classes=names)
    queries = explain_images(
        model,
        anchors,
        test.images[:6],
        prepare=prepare,
        labels=options.pop("labels", test.labels[:6]),
        ids=options.pop("ids", None),
    )
    return write_gallery(tmp_path / "page.html", anchors, queries, **options).read_text(), anchors


@pytest.mark.parametrize("make", [of_images, of_maps])
def test_names_are_text_wherever_they_come_from(tmp_path, make):
    nasty, _ = page_of(tmp_path, make, name=NASTY, ids=[f"{NASTY}<script>'{i}" for i in range(6 if make is of_images else 5)])
    plain, _ = page_of(tmp_path, make)
    nasty, plain = check(nasty), check(plain)
    count = {tag: len(plain.of(tag)) for tag, _ in plain.elements}
    assert count == {tag: len(nasty.of(tag)) for tag, _ in nasty.elements}
    assert [sorted(a) for _, a in nasty.elements] == [sorted(a) for _, a in plain.elements]  # no attribute more
    assert NASTY in nasty.text and f"{NASTY}<script>'0" in nasty.text
    assert any(NASTY in image["alt"] for image in nasty.of("img"))


def test_rules_and_errors_of_nasty_names_stand_alone():
    model, train, _ = of_images()
    html = rule(anchor(model, train, prepare=prepare, classes=[NASTY, "a", "b"]), 0).html
    assert '<b>&"' not in html and f"{NASTY} 1" in Page(html).text and html.count("<img") == K * 3


def test_pages_without_figures_queries_or_some_samples(tmp_path):
    text, _ = page_of(tmp_path, of_images, evaluate=None, labels=None)
    text = check(text).text
    assert "What anchoring cost was not measured" in text and "Decisions without a known truth (6)" in text
    model, train, _ = of_images()
    train.labels[train.labels == 1] = -1
    anchors = anchor(model, train, prepare=prepare)
    page = check(write_gallery(tmp_path / "page.html", anchors).read_text())
    assert f"apart from {K} of classes with too few of them" in page.text
    assert "no training sample" in page.text and f"{K} sub-centroids stayed" in page.text and not page.of("article")


def test_a_page_of_many_classes_shows_some(tmp_path):
    model, train, _ = of_images(per_class=2, classes=60, k=1)
    anchors = anchor(model, train, prepare=prepare)
    query = explain_images(model, anchors, train.images[59:60], prepare=prepare, labels=[59])
    page = check(write_gallery(tmp_path / "page.html", anchors, query).read_text())
    assert "10 more classes are in anchors.json" in page.text
    headings = " ".join(page.data)
    assert "59 1" in headings and "58 1" not in headings  # the query's class comes before the first ones


def test_a_dead_run_is_warned_of_on_the_page_unless_refitted(tmp_path):
    model, train, test = of_images()
    model.head.prototypes[:, 1:] = -model.head.embed(model.backbone(prepare(train.images))).mean(0)
    anchors = anchor(model, train, prepare=prepare, evaluate=test)
    page = check(write_gallery(tmp_path / "page.html", anchors).read_text()).text
    assert f"{percent(anchors.dead)} of the sub-centroids were dead" in page and "Refit the sub-centroids first" in page
    page = check(write_gallery(tmp_path / "page.html", anchors, trained=measure(model, test, prepare=prepare)).read_text()).text
    assert "were dead" in page and "Refit the sub-centroids first" not in page and "as trained" in page


@pytest.mark.parametrize("make", [of_images, of_maps])
def test_the_picture_shows_queries_and_exemplars(make, tmp_path):
    model, train, test = make()
    anchors = anchor(model, train, prepare=prepare, classes=[NASTY, r"$\bad{$", "a/very/long/name/of/a/class"])
    queries = explain_images(model, anchors, test.images[:4], prepare=prepare, labels=test.labels[:4])
    picture = np.asarray(Image.open(draw(tmp_path / "four.png", queries, anchors, r"$\frac$")).convert("RGB"))
    one = np.asarray(Image.open(draw(tmp_path / "one.png", queries[:1], anchors)).convert("RGB"))
    assert picture.shape[1] > 2.5 * one.shape[1] and picture.shape[0] > 1.8 * one.shape[0]
    white = (one == 255).all(2).mean()
    assert 0.4 < white < 0.9


@pytest.mark.parametrize(
    ("share", "text"), [(0.809, "80.9%"), (1.0, "100.0%"), (0.9999, ">99.9%"), (0.0, "0.0%"), (1e-6, "<0.1%"), (0.0005, "0.1%")]
)
def test_shares_are_never_rounded_to_certainty(share, text):
    assert percent(share) == text


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
def test_the_page_in_a_browser(tmp_path):
    model, train, test = of_images()
    colours = torch.tensor([[255, 0, 255], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    for samples in (train, test):
        samples.images[:] = colours[samples.labels][:, :, None, None]  # to be found again in the screenshot
    anchors = anchor(model, train, prepare=prepare, evaluate=test, classes=["magenta", "green", NASTY])
    queries = explain_images(model, anchors, test.images[:6], prepare=prepare, labels=test.labels[:6])
    page = write_gallery(tmp_path / "page.html", anchors, queries)

    def browse(*options):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    parsed = Page(browse("--dump-dom"))
    assert parsed.of("article") and len(parsed.of("img")) == len(Page(page.read_text()).of("img"))
    assert f"{NASTY} 1" in parsed.text
    browse(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,1500", "--hide-scrollbars")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50
    for colour in colours.tolist():
        assert (pixels == colour).all(1).sum() > 500, f"exemplars of colour {colour} are not displayed"


# the command


@pytest.fixture
def fake_run(monkeypatch):
    """`open_run` of a run that does not exist; what it was asked for, and the function to change what it gives."""
    asked, made = [], {"run": lambda: opened(*digits())}

    def open_run(path, data=None, device="cpu"):
        asked.append((path, data, device))
        return made["run"]()

    module = ModuleType("dnc_kernels.runs.opened")
    module.open_run = open_run
    monkeypatch.setitem(sys.modules, "dnc_kernels.runs.opened", module)
    return asked, made


def test_the_command_writes_everything_and_says_it(fake_run, tmp_path, capsys):
    asked, _ = fake_run
    out = tmp_path / "out"
    options = ["--checkpoint", str(tmp_path), "--data", "photos", "--out", str(out), "--queries", "4"]
    assert __main__.main(["explain", *options]) == 0
    assert [(str(path), str(data), device) for path, data, device in asked] == [(str(tmp_path), "photos", "cpu")]
    said = capsys.readouterr()
    assert re.search(r"accuracy: \d+\.\d% before anchoring, \d+\.\d% with training samples as sub-centroids \([+-]\d\.\d points\)",
                     said.out)  # fmt: skip
    assert "40 of 40 are training samples now" in said.out and "warning" not in said.out
    assert "anchoring to 1437 training samples, measuring on 360" in said.err
    check((out / "index.html").read_text())
    assert Anchors.load(out).sample.shape == (10, 4)
    for name in ("wrong.png", "right.png"):
        assert Image.open(out / name).size[0] > 500
    assert all(str(out / name) in said.out for name in ("anchors.json", "index.html", "right.png"))


def test_a_refit_comes_before_anchoring_and_its_figures_are_told(fake_run, tmp_path, capsys, monkeypatch):
    _, made = fake_run
    run = opened(*digits())
    run.model.head.prototypes[:, 1:] = -run.model.head.prototypes.mean((0, 1))  # dead
    made["run"] = lambda: run
    calls = []

    def refit(head, data, labels=None, *, backbone=None, prepare=None):
        calls.append((data, backbone))
        head.initialize_from_(backbone(prepare(data.images)), data.labels)

    monkeypatch.setattr(nn.SubCentroids, "refit_", refit, raising=False)
    assert cli.main(["--checkpoint", str(tmp_path), "--out", str(tmp_path), "--queries", "0"]) == 0
    assert "of them were dead before, each won under 1% of its class; --refit" in capsys.readouterr().out
    run.model.head.prototypes[:, 1:] = -run.model.head.prototypes.mean((0, 1))
    assert cli.main(["--checkpoint", str(tmp_path), "--out", str(tmp_path), "--queries", "0", "--refit"]) == 0
    out = capsys.readouterr().out
    assert calls == [(run.train, run.model.backbone)]
    assert (
        re.search(r"% as trained, \d+\.\d% refitted, \d+\.\d% with training samples as sub-centroids .* in all", out)
        and "dead" not in out
    )
    assert "Refitting the sub-centroids before that gained" in check((tmp_path / "index.html").read_text()).text


def test_a_segmentation_in_one_call(tmp_path):
    model, train, test = of_maps(6)
    model.head.initialize_from_(model.backbone(prepare(train.images)), train.labels)
    done = explain_run(opened(model, train, test), out=tmp_path, queries=4, top=2)
    assert len({one.id for one in done.explanations}) == 4 and all(len(one.evidence) == 2 for one in done.explanations)
    page = check((tmp_path / "index.html").read_text())
    assert "mIoU" in page.text and "real training pixels" in page.text
    assert any("ring" in attributes.get("class", "") for attributes in page.of("span"))
    right = model.predict(prepare(test.images)) == test.labels
    share = [float(r[kept].double().mean()) for r, kept in zip(right, test.labels != 255, strict=True)]
    worst = sorted(range(6), key=lambda i: share[i])[:2]
    assert {f"test/{i}" for i in worst} <= {one.id for one in done.explanations}


def test_queries_take_turns_among_the_classes_and_fill_up_with_right_ones(explained_digits):
    done, _ = explained_digits
    of_right = [one.truth for one in done.explanations if one.right]
    assert len(set(of_right)) == 6
    model, train, test = digits()
    few = opened(model, train, type(test)(test.images[:8], test.labels[:8]))
    assert len(explain_run(few, queries=6).explanations) == 6  # of eight images hardly three are wrong


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "the following arguments are required: --checkpoint"),
        (["--checkpoint", "no/such/run"], "--checkpoint must be a folder of a run or a checkpoint; got no/such/run"),
        (["--checkpoint", ".", "--queries", "-1"], "--queries must be at least 0; got -1"),
        (["--checkpoint", ".", "--device", "tpu"], "--device must be cpu, cuda or cuda:N; got 'tpu'"),
        (["--checkpoint", ".", "--device", "cuda:77"], "--device cuda:77: torch finds no such GPU"),
    ],
)
def test_wrong_options_end_with_status_2(options, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(options)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RuntimeError("run: expected a checkpoint;\n got none"), 1, "dnc_kernels explain: run: expected a checkpoint; got none"),
        (FileNotFoundError(2, "No such file", "x.png"), 1, "dnc_kernels explain: [Errno 2] No such file: 'x.png'"),
        (KeyboardInterrupt(), 130, "dnc_kernels explain: interrupted"),
        (ModuleNotFoundError("No module named 'sklearn'", name="sklearn"), 1,
         'dnc_kernels explain: the run needs sklearn: run `pip install "dnc_kernels[explain,demo,networks]"`'),
    ],
)  # fmt: skip
def test_a_failure_is_one_line(fake_run, error, status, said, capsys, tmp_path):
    def fail():
        raise error

    fake_run[1]["run"] = fail
    assert cli.main(["--checkpoint", str(tmp_path), "--out", str(tmp_path)]) == status
    assert capsys.readouterr().err.splitlines() == [said]


@pytest.mark.parametrize("name", ["scipy", "jinja2"])
def test_a_missing_extra_is_a_line_that_says_what_to_install(monkeypatch, capsys, name):
    import importlib.util

    for module in [module for module in sys.modules if module.startswith("dnc_kernels.explain")]:
        monkeypatch.delitem(sys.modules, module)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None if wanted == name else find_spec(wanted))
    assert __main__.main(["explain"]) == 1
    assert capsys.readouterr().err == f'explain needs {name}: run `pip install "dnc_kernels[explain]"`\n'
