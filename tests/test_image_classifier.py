import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dnc_kernels import integrations
from dnc_kernels.integrations import (
    DNCImageClassifier,
    SoftmaxClassifier,
    SoftmaxImageClassifier,
    _optional,
    image_classifier,
    pooled_features,
    softmax_classifier,
)
from dnc_kernels.nn import DNCClassifier

CLASSES = 7
SIZE = (64, 64)

pytestmark = pytest.mark.usefixtures("one_thread")


def package(name):
    # not importorskip: an installed torchvision whose import fails is what the adapters repair
    if _optional.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    return _optional.require(name, "test")


def timm_resnet():
    return package("timm").create_model("resnet10t", num_classes=CLASSES)


def timm_swin():
    options = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "img_size": SIZE, "window_size": 4}
    return package("timm").create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, **options)


def timm_wider_before_the_class_layer():
    return package("timm").create_model("mobilenetv3_small_050", num_classes=CLASSES)


def torchvision_resnet():
    resnet = package("torchvision.models.resnet")
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def torchvision_swin():
    swin = package("torchvision.models.swin_transformer")
    return swin.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=CLASSES, stochastic_depth_prob=0)


def torchvision_mobilenet():
    return package("torchvision.models").mobilenet_v3_small(num_classes=CLASSES)


def hf_resnet():
    transformers = package("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=CLASSES)
    return transformers.ResNetForImageClassification(config)


def hf_swin():
    transformers = package("transformers")
    config = transformers.SwinConfig(embed_dim=24, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=CLASSES)
    return transformers.SwinForImageClassification(config)


#: and the name of the class layer
NETWORKS = {
    timm_resnet: "fc",
    timm_swin: "head.fc",
    timm_wider_before_the_class_layer: "classifier",
    torchvision_resnet: "fc",
    torchvision_swin: "head",
    torchvision_mobilenet: "classifier.3",
    hf_resnet: "classifier.1",
    hf_swin: "classifier",
}


@pytest.mark.parametrize(("build", "layer_name"), NETWORKS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_features_are_what_the_class_layer_saw_and_names_and_weights_stay(build, layer_name):
    whole, images = build().eval(), torch.randn(2, 3, *SIZE)
    names, weights, layer = set(whole.state_dict()), dict(whole.state_dict()), whole.get_submodule(layer_name)
    with torch.no_grad():
        expected = whole(images)
        expected = getattr(expected, "logits", expected)
        backbone, channels = pooled_features(whole)
        features = backbone.eval()(images)
        assert features.shape == (2, channels) and layer.in_features == channels
        torch.testing.assert_close(layer(features), expected)
    assert set(backbone.state_dict()) == names - {f"{layer_name}.weight", f"{layer_name}.bias"}
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("build", [timm_resnet, torchvision_swin, hf_resnet, hf_swin], ids=lambda f: f.__name__)
def test_every_weight_learns_from_the_head(build):
    images, labels = torch.randn(4, 3, *SIZE), torch.tensor([0, 1, 2, 0])
    model = image_classifier(build(), 3, 2, momentum=0.9)
    assert isinstance(model, DNCImageClassifier) and isinstance(model.head, DNCClassifier)
    before = model.head.prototypes.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        result = model(images, labels)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(result.cross_entropy.item())
    assert losses[-1] < 0.6 * losses[0]
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert not torch.equal(model.head.prototypes, before)
    model.eval()
    assert torch.equal(model.predict(images), model(images).argmax(1)) and model(images).shape == (4, 3)


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:resnet18", "cifar:resnet18"])
def test_softmax_twin_begins_with_the_same_backbone(name):
    package(name.partition(":")[0].replace("cifar", "torchvision"))
    torch.manual_seed(3)
    dnc = image_classifier(name, CLASSES)
    torch.manual_seed(3)
    softmax = softmax_classifier(name, CLASSES)
    assert isinstance(softmax, SoftmaxImageClassifier) and isinstance(softmax.head, SoftmaxClassifier)
    one, two = dnc.backbone.state_dict(), softmax.backbone.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert softmax.head.in_features == dnc.head.in_features
    other = image_classifier(name, CLASSES).backbone.state_dict()
    assert not torch.equal(next(iter(other.values())), next(iter(one.values())))


def test_cifar_stem_keeps_32_pixels_where_the_usual_one_leaves_8():
    package("torchvision")
    images = torch.randn(1, 3, 32, 32)
    seen = {}
    for name in ("cifar:resnet18", "torchvision:resnet18"):
        backbone = image_classifier(name, 2).eval().backbone
        backbone.layer1.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0].shape[-1]}))
        assert backbone(images).shape == (1, 512)
    assert seen == {"cifar:resnet18": 32, "torchvision:resnet18": 8}


def test_timm_network_of_one_size_is_built_for_the_size_of_the_images():
    package("timm")
    model = image_classifier("timm:vit_tiny_patch16_224", 3, image_size=(32, 32)).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_module_that_gives_features_is_taken_as_it_is():
    class Mine(nn.Module):
        channels = 5

        def forward(self, images):
            return images.mean((2, 3)).repeat(1, 2)[:, :5]

    mine = Mine()
    model = image_classifier(mine, 4, 3, memory_size=0, recipe="released", update_from="all")
    assert model.backbone is mine
    assert (model.head.in_features, model.head.num_subcentroids, model.head.recipe) == (5, 3, "released")
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    model.eval()
    assert torch.equal(model(images, labels).loss, model.loss(images, labels).loss)
    before = model.head.last_counts.clone()
    model(images, labels, update=True)
    assert not torch.equal(model.head.last_counts, before)


@pytest.mark.parametrize("ignored", [-100, -1, -7])
def test_softmax_loss_is_the_cross_entropy_of_labelled_samples(ignored):
    head = SoftmaxClassifier(6, 4, label_smoothing=0.1)
    features, labels = torch.randn(5, 6, requires_grad=True), torch.tensor([0, ignored, 3, 1, ignored])
    result = head(features, labels)
    kept = labels >= 0
    logits = head(features)
    expected = F.cross_entropy(logits[kept], labels[kept], label_smoothing=0.1)
    torch.testing.assert_close(result.loss, expected)
    assert result.ppc == result.ppd == 0 and torch.equal(result.cross_entropy, result.loss)
    torch.testing.assert_close(result.accuracy, (logits.argmax(1) == labels)[kept].float().mean())
    result.loss.backward()
    assert features.grad.isfinite().all() and (features.grad[~kept] == 0).all() and (features.grad[kept] != 0).any()
    assert head.loss(features, torch.full((5,), ignored)).loss == 0
    assert torch.equal(head.predict(features), logits.argmax(1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", r"image_classifier: network must be one of timm:NAME, torchvision:NAME, .*; got resnet18"),
        ("timm:resnet_18", r"network must be a model of timm; got resnet_18 \(close: .*resnet18"),
        ("torchvision:resnet_18", r"network must be after torchvision: one of .*resnet18.*; got torchvision:resnet_18"),
        ("cifar:swin_t", r"network must be after cifar: one of resnet18, resnet34, resnet50; got cifar:swin_t"),
        ("torchvision:", r"network must be one of"),
    ],
)
def test_unknown_name_says_what_there_is(name, expected):
    package("timm")
    with pytest.raises(ValueError, match=expected):
        image_classifier(name, 3)


def test_network_without_a_class_layer_to_cut_is_refused():
    with pytest.raises(TypeError, match=r"pooled_features: network must be a classification network of timm.*; got Sequential"):
        pooled_features(nn.Sequential(nn.Conv2d(3, 4, 3)))
    transformers = package("transformers")
    other = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(TypeError, match=r"network must be a ResNetForImageClassification or Swin.*; got ResNetModel"):
        pooled_features(other)


@pytest.mark.parametrize(
    ("name", "missing"), [("timm:a", "timm"), ("torchvision:a", "torchvision"), ("hf-swin", "transformers")]
)
def test_missing_package_names_the_extra_to_install(monkeypatch, name, missing):
    monkeypatch.delitem(sys.modules, missing, raising=False)
    found = _optional.find_spec
    monkeypatch.setattr(_optional, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(ModuleNotFoundError, match=rf'needs {missing}: run `pip install "dnc_kernels\[networks\]"`'):
        image_classifier(name, 3)


def test_hf_networks_by_name_have_the_published_sizes():
    package("transformers")
    with torch.device("meta"):
        sizes = {kind: integrations.HuggingFaceClassifierFeatures.create(kind).channels for kind in ("resnet", "swin")}
    assert sizes == {"resnet": 2048, "swin": 768}
