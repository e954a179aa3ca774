"""What the options of the layers share: their types, their defaults on record, numbers of any kind, repr, and groups."""

import inspect
import re
import subprocess
import sys
import warnings
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from dnc_kernels import nn
from dnc_kernels.errors import map_size, renamed, whole_number
from dnc_kernels.nn import _choices

HEADS = {
    "DNCHead": lambda **options: nn.DNCHead(8, 5, 2, **options),
    "DNCClassifier": lambda **o: nn.DNCClassifier(8, 5, 2, **o),
}

pytestmark = pytest.mark.usefixtures("one_thread")


# numbers


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.int32(3), np.array(3)], ids=repr)
def test_a_whole_number_of_any_kind_is_an_int(value):
    assert type(whole_number("op", "n", value)) is int and whole_number("op", "n", value) == 3


@pytest.mark.parametrize(
    "value", [True, np.True_, 3.0, np.float64(3), "3", None, torch.tensor(3), torch.ones(1), np.ones(2)], ids=repr
)
def test_what_is_no_whole_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="op: n must be a positive integer; got"):
        whole_number("op", "n", value)


@pytest.mark.parametrize(
    "least, text", [(1, "a positive integer"), (0, "a non-negative integer"), (2, "an integer of at least 2")]
)
def test_a_number_that_is_too_small_is_a_value_error(least, text):
    assert whole_number("op", "n", least, least) == least
    with pytest.raises(ValueError, match=f"op: n must be {text}; got {least - 1}"):
        whole_number("op", "n", np.int64(least - 1).item(), least)
    assert whole_number("op", "n", -7, None) == -7


@pytest.mark.parametrize("size", [4, np.int32(4), (4, 4), [np.int64(4), 4], torch.Size((4, 4))], ids=repr)
def test_a_size_is_one_number_or_two(size):
    assert map_size("op", size) == (4, 4) and all(type(n) is int for n in map_size("op", size))


@pytest.mark.parametrize(
    "size, error", [(0, ValueError), ((4, 0), ValueError), ((4,), ValueError), ((4, 4, 4), ValueError), (True, TypeError),
                    ((4, 2.0), TypeError), ("44", TypeError), (None, TypeError)],
    ids=repr,
)  # fmt: skip
def test_what_is_no_size_is_an_error(size, error):
    with pytest.raises(error, match=r"op: size must be a positive integer or a pair \(H, W\) of them; got"):
        map_size("op", size)


def test_sizes_may_vary_under_export_and_are_those_of_the_example_under_trace():
    class Sized(torch.nn.Module):
        def forward(self, x, images):
            return interpolate(x, map_size("op", images.shape[2:]))

    x, images = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 16, 12)
    dynamic = {"x": None, "images": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
    exported = torch.export.export(Sized(), (x, images), dynamic_shapes=dynamic)
    assert exported.module()(x, torch.randn(1, 3, 9, 7)).shape == (1, 3, 9, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Sized(), (x, images))
    assert traced(x, images).shape == (1, 3, 16, 12)


INTEGERS = {
    "DNCHead": [
        "in_channels", "num_classes", "num_subcentroids", "embed_channels", "iterations", "ignore_index", "init_step",
        "warmup_steps", "revive_after", "band_pixels", "pixels_per_class", "accumulation_steps",
    ],
    "DNCClassifier": [
        "in_features", "num_classes", "num_subcentroids", "memory_size", "iterations", "ignore_index", "init_step",
        "warmup_steps", "revive_after", "accumulation_steps",
    ],
    "SubCentroids": [
        "num_classes", "num_subcentroids", "channels", "iterations", "init_step", "warmup_steps", "revive_after",
        "accumulation_steps",
    ],
}  # fmt: skip


@pytest.mark.parametrize("layer", INTEGERS)
def test_every_whole_number_of_a_layer_may_come_from_numpy(layer):
    given = {name: np.int64(300 if name == "ignore_index" else 4) for name in INTEGERS[layer]}
    module = getattr(nn, layer)(**given)
    for name, value in given.items():
        assert type(getattr(module, name)) is int and getattr(module, name) == value
    for name in given:
        with pytest.raises(TypeError, match=rf"{layer}: {name} must be .*integer"):
            getattr(nn, layer)(**{**given, name: 4.0})
        with pytest.raises(TypeError, match=rf"{layer}: {name} must be .*integer"):
            getattr(nn, layer)(**{**given, name: True})


def test_memory_and_samples_take_numbers_of_numpy():
    memory = nn.FeatureMemory(np.int64(3), np.int64(2), np.int32(4))
    assert (memory.num_classes, memory.size, memory.channels) == (3, 2, 4) and type(memory.size) is int
    assert nn.NearestSamples(HEADS["DNCHead"](), np.int64(3)).count == 3


@pytest.mark.parametrize("size", [16, np.int64(16), (np.int64(16), 16), [16, np.int32(16)], torch.Size((16, 16))], ids=repr)
def test_prediction_takes_any_size(size):
    head, x = HEADS["DNCHead"]().eval(), torch.randn(2, 8, 4, 4)
    assert torch.equal(head.predict(x, size), head.predict(x, (16, 16)))
    assert head.predict(x, 4).shape == (2, 4, 4)
    for bad, error in (((16, 0), ValueError), (2.5, TypeError), ((4, 4, 4), ValueError)):
        with pytest.raises(error, match=r"DNCHead\.predict: size must be"):
            head.predict(x, bad)


class Predicts(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, features, images):
        return self.head.predict(features, images.shape[2:])


@pytest.mark.parametrize("how", ["export", "compile", "trace"])
def test_prediction_follows_the_size_of_the_images(how):
    network, features, images = Predicts(HEADS["DNCHead"]().eval()), torch.randn(2, 8, 4, 4), torch.randn(2, 3, 16, 16)
    if how == "trace":  # which keeps the size of the example
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(torch.jit.trace(network, (features, images))(features, images), network(features, images))
        return
    if how == "export":
        dynamic = {"features": None, "images": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
        made = torch.export.export(network, (features, images), dynamic_shapes=dynamic).module()
    else:
        made = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    other = torch.randn(2, 3, 20, 18)
    assert torch.equal(made(features, other), network(features, other))


# names


@renamed(old="new", former="present")
def renamed_function(new, present=2):
    """Its text."""
    return new, present


def test_an_old_keyword_works_and_warns_with_the_place_of_the_call():
    with pytest.warns(FutureWarning, match=r"renamed_function: old is now called new; old will go in 0\.2") as caught:
        assert renamed_function(old=1) == (1, 2)
    assert caught[0].filename == __file__
    with pytest.warns(FutureWarning, match="former is now called present"):
        assert renamed_function(1, former=3) == (1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert renamed_function(1, present=3) == (1, 3)


def test_both_names_are_an_error():
    with pytest.raises(TypeError, match="renamed_function: old is the old name of new; both were given"):
        renamed_function(old=1, new=2)
    with pytest.warns(FutureWarning), pytest.raises(TypeError, match="multiple values for argument 'new'"):
        renamed_function(1, old=2)


def test_a_renamed_function_keeps_its_signature_and_traces():
    assert list(inspect.signature(renamed_function).parameters) == ["new", "present"]
    assert renamed_function.__doc__ == "Its text."
    for call in (lambda x: renamed_function(x + 1)[0], lambda x: renamed_function(old=x + 1)[0]):
        assert torch.compile(call, fullgraph=True, backend="aot_eager")(torch.zeros(2)).tolist() == [1, 1]


def test_old_keywords_of_the_layers():
    module, x, cluster = nn.SubCentroids(3, 2, 8), torch.randn(4, 8), torch.arange(4)
    with pytest.warns(FutureWarning, match=r"SubCentroids\.update_: cluster is now called labels"):
        module.update_(x, cluster=cluster)
    assert int(module.last_counts.sum()) == 4
    classifier = HEADS["DNCClassifier"]().eval()
    with pytest.warns(FutureWarning, match=r"DNCClassifier\.predict: x is now called features"):
        assert torch.equal(classifier.predict(x=x), classifier.predict(x))


# words


def test_words_are_those_of_the_recipes():
    assert set(get_args(_choices.Recipe)) == {"default", *nn.RECIPES}
    for recipe in nn.RECIPES.values():
        for name in recipe.keys() & _choices.CHOICES.keys():
            assert recipe[name] in _choices.CHOICES[name]


@pytest.mark.parametrize("layer", HEADS)
def test_every_word_is_typed_and_accepted(layer):
    hints = inspect.signature(getattr(nn, layer)).parameters
    for name, words in _choices.CHOICES.items():
        if name in hints:
            assert str not in get_args(hints[name].annotation) and hints[name].annotation not in ("str", "str | None")
            for word in words:
                expected = getattr(nn, layer).default_recipe if word == "default" else word
                assert getattr(HEADS[layer](**{name: word}), name) == expected


def test_mypy_knows_the_words(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n[mypy-numpy.*]\nfollow_imports = skip\n")
    good = 'DNCHead(64, 19, recipe="released", scores="norm", checkpoint="none")'
    lines = [good, 'DNCHead(64, 19, recipe="relased")', 'DNCHead(64, 19, sync="sum")', 'DNCClassifier(64, 19, init="zeros")']
    (tmp_path / "user.py").write_text("from dnc_kernels.nn import DNCClassifier, DNCHead\n" + "\n".join(lines) + "\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        tmp_path / "mypy.ini",
        "--cache-dir",
        tmp_path,
        tmp_path / "user.py",
    ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    wrong = re.findall(r'user\.py:(\d+): error: Argument "(\w+)" to "\w+" has incompatible type', said)
    assert wrong == [("3", "recipe"), ("4", "sync"), ("5", "init")], said


# defaults


def documented(layer):
    """name -> text of every argument in a layer's docstring."""
    text = re.search(r"Args:\n(.*?)\n\n", inspect.getdoc(getattr(nn, layer)), re.DOTALL)[1]
    entries = {}
    for names, rest in re.findall(r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", text, re.DOTALL | re.MULTILINE):
        entries |= dict.fromkeys(names.split(", "), " ".join(rest.split()))
    return entries


@pytest.mark.parametrize("layer", HEADS)
def test_docstring_names_every_argument_and_every_default(layer):
    parameters, texts = inspect.signature(getattr(nn, layer)).parameters, documented(layer)
    assert list(texts) == list(parameters)
    default, released = nn.RECIPES[getattr(nn, layer).default_recipe], nn.RECIPES["released"]
    for name, parameter in parameters.items():
        if parameter.default is not None:
            continue
        if name not in default:
            assert "None: " in texts[name], name
            continue
        show = [f"``{r[name]}``" if isinstance(r[name], str) else repr(r[name]) for r in (default, released)]
        expected = show[0] if show[0] == show[1] else f"{show[0]} (released: {show[1]})"
        assert texts[name].endswith(f"Default: {expected}."), (name, texts[name], expected)
    for module, recipe in ((HEADS[layer](), default), (HEADS[layer](recipe="released"), released)):
        assert all(getattr(module, name) == value for name, value in recipe.items())


# repr


def test_repr_shows_sizes_recipe_and_what_differs():
    assert repr(nn.DNCHead(64, 19)).startswith(
        "DNCHead(\n  in_channels=64, num_classes=19, num_subcentroids=10, recipe='segmentation'\n  (feat_norm)"
    )
    weight = [1.0] * 19
    head = nn.DNCHead(
        64, 19, 3, embed_channels=8, momentum=(0.9, 0.99, 10), recipe="released", scores="norm", confidence="length",
        class_weight=weight, checkpoint="none", ignore_index=-1, revive_after=0,
    )  # fmt: skip
    assert head.extra_repr() == (
        "in_channels=64, num_classes=19, num_subcentroids=3, embed_channels=8, momentum=(0.9, 0.99, 10), ignore_index=-1, "
        "confidence='length', class_weight=tensor[19], checkpoint='none', recipe='released'"
    )
    assert nn.DNCClassifier(8, 5, memory_size=0, init="random").extra_repr() == (
        "in_features=8, num_classes=5, num_subcentroids=4, memory_size=0, init='random', recipe='classification'"
    )
    assert nn.SubCentroids(3, 2, 8, epsilon=0.1).extra_repr() == "num_classes=3, num_subcentroids=2, channels=8, epsilon=0.1"
    assert "momentum=ramp" in nn.SubCentroids(3, 2, 8, momentum=ramp).extra_repr()


def ramp(step):
    return 0.9


def test_repr_of_a_subclass_with_a_constructor_of_its_own():
    class Own(nn.DNCHead):
        def __init__(self, **options):
            super().__init__(8, 5, 2, **options)

    assert (
        Own(sync="none").extra_repr() == "in_channels=8, num_classes=5, num_subcentroids=2, sync='none', recipe='segmentation'"
    )


# groups


@pytest.mark.parametrize(
    "make, matrices",
    [
        (lambda: nn.DNCHead(8, 5, 2, embed_channels=4), ["projection.weight"]),
        (lambda: nn.DNCHead(8, 5, 2), []),
        (lambda: nn.DNCHead(8, 5, 2, recipe="released"), []),
        (lambda: nn.DNCClassifier(8, 5, 2), []),
    ],
)
def test_weight_decay_is_on_matrices_alone(make, matrices):
    module = make()
    groups = module.parameter_groups(0.3)
    names = {id(p): name for name, p in module.named_parameters()}
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())
    assert [names[id(p)] for group in groups for p in group["params"] if group["weight_decay"] == 0.3] == matrices
    assert all(group["params"] for group in groups) and len(groups) == 1 + bool(matrices)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    changed = [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]
    assert changed == matrices
