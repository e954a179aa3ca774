import json
import math
import multiprocessing
import re
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from dnc_kernels import __main__, demo
from dnc_kernels.demo import cli, pictures, scenes, worker
from dnc_kernels.demo.explanations import _inside, explain
from dnc_kernels.demo.network import SmallBackbone, SoftmaxHead
from dnc_kernels.demo.training import HEADS, Settings, class_iou, read_scenes, train, write_scenes

SMALL = Settings(steps=45, batch=2, height=48, width=64, train_scenes=12, test_scenes=6, evaluations=3, threads=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 0, SMALL)
    return read_scenes(folder)


@pytest.fixture(scope="module")
def runs(small):
    threads = torch.get_num_threads()
    yield {head: train(head, 0, small, SMALL) for head in HEADS}
    torch.set_num_threads(threads)


def test_scenes_are_equal_bits_for_equal_arguments_and_differ_between_seeds():
    first, again, other = (scenes.make_scenes(3, seed=seed) for seed in (5, 5, 6))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[1], other[1])


def test_training_and_held_out_scenes_share_no_digit_image():
    train_images, train_digits = scenes.digit_images("train")
    test_images, test_digits = scenes.digit_images("test")
    assert len(train_images) + len(test_images) == len(load_digits().target)
    of_train, of_test = ({image.tobytes() for image in images} for images in (train_images, test_images))
    assert not of_train & of_test
    assert set(train_digits) == set(test_digits) == set(range(10))
    assert not np.array_equal(scenes.make_scenes(2, seed=0, split="train")[1], scenes.make_scenes(2, seed=0, split="test")[1])


@pytest.mark.parametrize(("height", "width", "channels"), [(36, 36, 3), (40, 100, 1), (128, 64, 3)])
def test_scenes_have_the_documented_shapes_types_and_ranges(height, width, channels):
    images, labels = scenes.make_scenes(4, seed=1, config=scenes.SceneConfig(height, width, channels))
    assert images.shape == (4, channels, height, width) and images.dtype == np.float32
    assert labels.shape == (4, height, width) and labels.dtype == np.int64
    assert images.min() >= 0 and images.max() <= 1
    assert labels.min() == 0 and labels.max() <= 10


def test_every_class_occurs_and_ground_fills_most_of_a_scene():
    _, labels = scenes.make_scenes(24, seed=2)
    share = np.bincount(labels.ravel(), minlength=scenes.NUM_CLASSES) / labels.size
    assert (share[1:] > 0.003).all() and 0.7 < share[0] < 0.95


@pytest.mark.parametrize("digit", range(10))
def test_labels_match_the_digits_drawn(monkeypatch, digit):
    images, digits = scenes.digit_images("train")
    only = digits == digit
    monkeypatch.setattr(scenes, "digit_images", lambda split: (images[only], digits[only]))
    assert set(np.unique(scenes.make_scenes(2, seed=3)[1])) == {0, 1 + digit}


def test_a_label_lies_where_its_digit_was_drawn():
    plain = scenes.SceneConfig(texture=(0.0, 0.0), sensor_noise=0.0, contrast=(0.75, 0.75), fragments=0)
    images, labels = scenes.make_scenes(4, seed=4, config=plain)
    away = np.abs(images - np.median(images, axis=(2, 3), keepdims=True)).max(1)  # from the ground's even colour
    assert away[labels > 0].min() > 0.1
    assert np.mean(away[labels == 0] < 0.1) > 0.9


def test_fragments_of_digits_are_labelled_ground():
    only = scenes.SceneConfig(tries=0, fragments=8, texture=(0.0, 0.0), sensor_noise=0.0)
    images, labels = scenes.make_scenes(3, seed=5, config=only)
    assert labels.max() == 0 and images.std(axis=(2, 3)).min() > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scenes.SceneConfig(height=35), r"must hold the largest digit \(36 pixels\); got 35x128"),
        (lambda: scenes.SceneConfig(scale=(3.0, 2.0)), r"scale must be \(low, high\)"),
        (lambda: scenes.SceneConfig(channels=2), "channels must be 1 or 3; got 2"),
        (lambda: scenes.make_scenes(0, seed=0), "count must be at least 1; got 0"),
        (lambda: scenes.digit_images("val"), "split must be 'train' or 'test'; got 'val'"),
    ],
)
def test_wrong_scenes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_backbone_has_nine_convolutions_and_stride_four():
    backbone = SmallBackbone()
    assert sum(isinstance(module, torch.nn.Conv2d) for module in backbone.modules()) == 9
    assert backbone(torch.rand(1, 3, 48, 64)).shape == (1, 64, 12, 16)


def test_the_softmax_head_is_cross_entropy_of_upsampled_logits():
    torch.manual_seed(0)
    head, x, y = SoftmaxHead(8, 11), torch.randn(2, 8, 5, 6), torch.randint(0, 11, (2, 20, 24))
    logits = F.interpolate(head.conv(x), scale_factor=4, mode="bilinear", align_corners=False)
    result = head.loss(x, y)
    torch.testing.assert_close(result.loss, F.cross_entropy(logits, y))
    assert torch.equal(head.predict(x, (20, 24)), logits.argmax(1))
    assert result.ppc == 0 and result.ppd == 0


def test_iou_of_a_confusion_matrix():
    # class 0: 3 hits, 1 missed, 2 false; class 2 neither occurs nor is predicted
    iou = class_iou(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert iou[:2].tolist() == pytest.approx([3 / 6, 4 / 7]) and iou[2].isnan()


@pytest.mark.parametrize("head", HEADS)
def test_losses_fall(runs, head):
    loss = runs[head].loss
    assert len(loss) == SMALL.steps and np.isfinite(loss).all()
    assert np.mean(loss[-5:]) < 0.6 * np.mean(loss[:2])


@pytest.mark.parametrize("head", HEADS)
def test_a_run_repeats_bit_for_bit(runs, small, head):
    again = train(head, 0, small, SMALL)
    assert again.loss == runs[head].loss and again.evaluated_miou == runs[head].evaluated_miou
    np.testing.assert_array_equal(again.predictions, runs[head].predictions)
    for name, value in runs[head].state.items():
        np.testing.assert_array_equal(again.state[name], value, err_msg=name)


def test_both_heads_start_from_the_same_backbone_and_see_the_same_scenes_in_the_same_order(small, monkeypatch):
    seen, weights = {head: [] for head in HEADS}, {}
    forward = SmallBackbone.forward
    for head in HEADS:

        def spy(self, images, head=head):
            weights.setdefault(head, [p.detach().clone() for p in self.parameters()])
            if self.training:
                seen[head].append(images.clone())
            return forward(self, images)

        monkeypatch.setattr(SmallBackbone, "forward", spy)
        train(head, 3, small, Settings(**{**vars(SMALL), "steps": 10, "evaluations": 1}))
    assert len(seen["dnc"]) == 10
    assert all(torch.equal(a, b) for a, b in zip(seen["dnc"], seen["softmax"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights["dnc"], weights["softmax"], strict=True))


def test_figures_of_a_run(runs, small):
    for run in runs.values():
        wrong = run.predictions != small.test_labels.numpy()
        assert run.pixel_accuracy == pytest.approx(1 - wrong.mean())
        assert run.miou == run.evaluated_miou[-1] == pytest.approx(np.nanmean(run.class_iou))
        assert run.evaluated_at == [15, 30, 45]
        assert run.step_ms > 0
    assert runs["softmax"].learnable_head == 64 * 11 + 11 and runs["softmax"].moved == 0
    assert runs["dnc"].moved == 11 * SMALL.subcentroids * 64
    # projection 64 to 64 with bias, LayerNorm over 64 channels, one scale: the sub-centroids are not among them
    assert runs["dnc"].learnable_head == 64 * 64 + 64 + 2 * 64 + 1
    backbones = {run.learnable_all - run.learnable_head for run in runs.values()}
    assert len(backbones) == 1


def test_explanations_name_training_pixels_of_the_winning_class(runs, small):
    explained = explain(runs["dnc"], small, SMALL)
    assert explained.cases
    labels = small.labels.numpy()[:, 2::4, 2::4].reshape(len(small.labels), -1)
    nearest = explained.nearest
    for case in explained.cases:
        assert small.test_labels[case.scene, case.row, case.column] == case.truth
        assert (case.winner == case.best_of_truth) == (case.winner.label == case.truth)
        assert case.winner.similarity >= case.best_of_truth.similarity
        for sample, pixel, cosine in zip(*(values[case.winner[:2]].tolist() for values in nearest), strict=True):
            if sample >= 0:
                assert labels[sample, pixel] == case.winner.label and -1 <= cosine <= 1
    present = np.unique(labels)
    assert explained.share[present].sum(1) == pytest.approx(np.ones(len(present)))


def test_inside_is_what_has_four_equal_neighbours():
    labels = torch.zeros(1, 5, 5, dtype=torch.int64)
    labels[0, 1:4, 1:4] = 1
    assert _inside(labels)[0].nonzero().tolist() == [[2, 2]]


def test_outlined_errors_are_three_pixels_wide():
    mask = np.zeros((9, 9), bool)
    mask[0:2, :] = True  # a seam of two pixels
    mask[4:7, 2:6] = True
    expected = np.zeros_like(mask)
    expected[4:7, 2:6] = True
    np.testing.assert_array_equal(pictures._opened(mask), expected)


def test_a_patch_at_a_corner_is_padded_and_centred():
    image = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    patch = pictures._patch(image, 0, 63)
    assert patch.shape == (pictures.PATCH, pictures.PATCH, 3)
    half = pictures.PATCH // 2
    np.testing.assert_array_equal(patch[half, half], image[0, 63])
    assert (patch[: half - 1] == 225).all()


def test_the_demo_runs_end_to_end_and_writes_everything(tmp_path, capsys):
    out = tmp_path / "out"
    assert __main__.main(["demo", "--quick", "--threads", "1", "--out", str(out)]) == 0
    names = {"metrics.json", "predictions.png", "curves.png", "explanations.png", "subcentroids.png"}
    assert {path.name for path in out.iterdir()} == names
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png"))
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["heads"]) == {"dnc", "softmax"}
    for head in metrics["heads"].values():
        assert set(head) >= {
            "miou",
            "pixel_accuracy",
            "step_ms",
            "seconds",
            "learnable_head",
            "learnable_all",
            "peak_mb",
            "runs",
        }
        assert 0 < head["pixel_accuracy"]["mean"] < 1 and head["miou"]["std"] is None
        (run,) = head["runs"]
        assert len(run["loss"]) == metrics["settings"]["steps"] == cli.QUICK.steps
        assert run["evaluated_at"][-1] == cli.QUICK.steps and set(run["class_iou"]) == set(scenes.CLASS_NAMES)
        if sys.platform == "linux":
            assert head["peak_mb"] > 0
    assert 0 < metrics["heads"]["dnc"]["runs"][0]["anchored_miou"] < 1 and "dead" not in metrics["heads"]["softmax"]["runs"][0]
    assert metrics["settings"]["seeds"] == [0] and metrics["settings"]["quick"] and metrics["settings"]["threads"] == 1
    assert metrics["versions"]["torch"] == torch.__version__ and metrics["backends"]["class_scores"] in ("cpu", "reference")
    printed = capsys.readouterr().out
    for expected in (
        "DNC head",
        "softmax head",
        "mIoU",
        "pixel accuracy",
        "steps/s",
        "s left",
        "metrics.json",
        "with training pixels",
    ):
        assert expected in printed


def test_several_seeds_give_mean_and_deviation(monkeypatch, tmp_path, capsys, runs):
    def pretend(head, seed, folder, settings, report):
        assert read_scenes(folder).images.shape[0] == cli.QUICK.train_scenes
        run = runs[head]
        return type(run)(**{**vars(run), "seed": seed, "miou": 0.5 + 0.1 * seed})

    monkeypatch.setattr(cli, "train_in_process", pretend)
    monkeypatch.setattr(cli, "draw", lambda *given: [])
    assert cli.main(["--quick", "--seeds", "3", "--heads", "softmax", "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["heads"]) == ["softmax"] and metrics["settings"]["seeds"] == [0, 1, 2]
    assert metrics["heads"]["softmax"]["miou"] == pytest.approx({"mean": 0.6, "std": 0.1})
    printed = capsys.readouterr().out
    assert "0.6000 ± 0.1000" in printed and "3 seeds" in printed and "DNC head" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "128"], "--size must be HEIGHTxWIDTH in pixels, such as 128x128; got '128'"),
        (["--size", "130x128"], "--size must be multiples of 4, the stride of the network; got 130x128"),
        (["--size", "32x128"], "--size must be at least 36x36"),
        (["--heads", "dnc,linear"], "--heads must be dnc or softmax"),
        (["--recipe", "best"], "--recipe must be one of .*released.*; got 'best'"),
        (["--steps", "9"], "--steps must be at least 10; got 9"),
        (["--batch", "0"], "--batch must be at least 1; got 0"),
        (["--seeds", "0"], "--seeds must be at least 1; got 0"),
        (["--seed", "-1"], "--seed must be at least 0; got -1"),
        (["--threads", "0"], "--threads must be at least 1; got 0"),
        (["--subcentroids", "257"], "--subcentroids must be at most 256; got 257"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N; got 'tpu'"),
        (["--device", "cuda:99"], "--device cuda:99: torch finds no such GPU"),
        (["--steps", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_options_are_refused_in_a_line(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_a_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["--quick", "--out", str(tmp_path / "file")]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("dnc_kernels demo: ") and str(tmp_path / "file") in printed and printed.count("\n") == 1


def test_an_interrupt_ends_with_a_line(monkeypatch, tmp_path, capsys):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train_in_process", interrupted)
    assert cli.main(["--quick", "--out", str(tmp_path)]) == 130
    assert "interrupted, nothing was written" in capsys.readouterr().err


class _Context:
    """multiprocessing with threads for processes, so that what the training process does can be replaced."""

    Pipe = staticmethod(multiprocessing.Pipe)

    def __init__(self, exitcode):
        self.exitcode = exitcode

    def Process(self, target, args, daemon):
        context = self

        class Done:
            exitcode = context.exitcode
            start = staticmethod(lambda: target(*args))
            join = staticmethod(lambda timeout=None: None)
            is_alive = staticmethod(lambda: False)

        return Done


@pytest.mark.parametrize(
    ("work", "exitcode", "message"),
    [
        (lambda sender, *rest: sender.send(("error", "Traceback ... boom")), 0, r"training the dnc head failed\n.*boom"),
        (lambda sender, *rest: None, 3, "ended with status 3$"),
        (lambda sender, *rest: None, -9, "ended with status -9: killed, most likely for memory; lower --batch or --size"),
    ],
)
def test_a_failed_training_process_is_reported(monkeypatch, tmp_path, work, exitcode, message):
    monkeypatch.setattr(worker.multiprocessing, "get_context", lambda method: _Context(exitcode))
    monkeypatch.setattr(worker, "_work", work)
    with pytest.raises(worker.TrainingFailedError, match=message):
        worker.train_in_process("dnc", 0, tmp_path, SMALL, lambda *step: None)


@pytest.mark.parametrize("name", ["sklearn", "matplotlib", "rich"])
def test_a_missing_extra_is_a_line_that_says_what_to_install(monkeypatch, capsys, name):
    for module in [module for module in sys.modules if module.startswith("dnc_kernels.demo")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("dnc_kernels.demo", raising=False)
    find_spec = demo.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None if wanted == name else find_spec(wanted))
    assert __main__.main(["demo"]) == 1
    assert capsys.readouterr().err == f'the demo needs {name}: run `pip install "dnc_kernels[demo]"`\n'


def test_a_class_absent_from_a_run_is_null_in_json(runs):
    from dnc_kernels.demo.report import _run

    run = type(runs["dnc"])(**{**vars(runs["dnc"]), "class_iou": [math.nan] * 11})
    assert json.loads(json.dumps(_run(run), allow_nan=False))["class_iou"]["digit 3"] is None


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(180)  # a minute of an H100's 16 cores compiles its kernels
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_demo_runs_on_a_gpu(tmp_path):
    assert cli.main(["--quick", "--device", "cuda", "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert all(head["peak_mb"] > 0 for head in metrics["heads"].values())
