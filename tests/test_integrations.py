import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dnc_kernels import integrations
from dnc_kernels.integrations import (
    DNCSegmenter,
    SegformerFeatures,
    TimmFeatures,
    TorchvisionFeatures,
    UperNetFeatures,
    _optional,
)
from dnc_kernels.nn import DNCHead

pytest.importorskip("sklearn")
from dnc_kernels.demo.scenes import NUM_CLASSES, SceneConfig, make_scenes

SIZE = (64, 64)


pytestmark = pytest.mark.usefixtures("one_thread")


def segformer():
    pytest.importorskip("transformers")
    return SegformerFeatures.create(
        depths=[1] * 4, hidden_sizes=[16, 32, 64, 64], num_attention_heads=[1, 2, 2, 2], decoder_hidden_size=64
    )


def upernet():
    pytest.importorskip("transformers")
    return UperNetFeatures.create(64, embed_dim=24, depths=[1] * 4, num_heads=[2, 2, 4, 4], window_size=4)


def torchvision_network(name):
    skip_without_torchvision()
    return TorchvisionFeatures.create(name)


def timm_backbone(name, **options):
    skip_without_torchvision()
    pytest.importorskip("timm")
    return TimmFeatures.create(name, 64, image_size=SIZE, **options)


def skip_without_torchvision():
    # not importorskip: an installed torchvision whose import fails is what these adapters repair
    if _optional.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    integrations.declare_missing_torchvision_ops()


NETWORKS = {
    "segformer": (segformer, 4, 3e-3),
    "upernet-swin": (upernet, 4, 3e-3),
    "fcn-resnet50": (lambda: torchvision_network("fcn_resnet50"), 8, 1e-3),
    "deeplabv3-resnet50": (lambda: torchvision_network("deeplabv3_resnet50"), 8, 1e-3),
    "timm-resnet18": (lambda: timm_backbone("resnet18"), 4, 3e-3),
    "timm-convnext": (lambda: timm_backbone("convnext_atto"), 4, 3e-3),
}


@pytest.fixture(scope="module")
def scenes():
    images, labels = make_scenes(2, seed=0, config=SceneConfig(*SIZE))
    return (torch.from_numpy(images) - 0.45) / 0.225, torch.from_numpy(labels)


def entropy(labels):
    share = np.bincount(labels.flatten(), minlength=NUM_CLASSES) / labels.numel()
    return -sum(p * math.log(p) for p in share if p > 0)


SLOW = ("fcn-resnet50", "deeplabv3-resnet50")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NETWORKS])
def test_network_learns_digit_scenes_with_the_head_in_place_of_its_class_layer(name, scenes):
    images, labels = scenes
    make, stride, rate = NETWORKS[name]
    backbone = make()
    network = DNCSegmenter(backbone, DNCHead(backbone.channels, NUM_CLASSES))
    assert backbone(images).shape == (2, backbone.channels, SIZE[0] // stride, SIZE[1] // stride)
    before = network.head.prototypes.clone()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    losses = []
    for _ in range(20):
        result = network.loss(images, labels)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(result.cross_entropy.item())
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    # what a network can reach that looks at the shares of the classes and at no pixel
    assert losses[-1] < entropy(labels)
    without_gradient = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    # Swin's norm after its last stage is no part of the feature maps, in UPerNet as it is published too
    assert [n for n in without_gradient if "swin.layernorm" not in n] == []
    assert all(p.grad.abs().max() > 0 for n, p in network.named_parameters() if n.startswith("backbone.") and p.ndim == 4)
    assert not torch.equal(network.head.prototypes, before)

    network.eval()
    prediction = network.predict(images)
    assert prediction.shape == labels.shape and prediction.dtype == torch.int64
    assert prediction.min() >= 0 and prediction.max() < NUM_CLASSES
    assert network.predict(images, (40, 50)).shape == (2, 40, 50)
    logits = network(images)
    assert logits.shape == (2, NUM_CLASSES, SIZE[0] // stride, SIZE[1] // stride)

    torch.manual_seed(1)
    other = make()
    again = DNCSegmenter(other, DNCHead(other.channels, NUM_CLASSES)).eval()
    assert not torch.equal(again(images), logits)
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(again(images), logits, rtol=0, atol=0)


def test_forward_with_labels_is_the_loss():
    network = DNCSegmenter(nn.Conv2d(3, 8, 4, stride=4), DNCHead(8, 3, 2)).eval()
    images, labels = torch.randn(2, 3, 16, 16), torch.randint(0, 3, (2, 16, 16))
    assert torch.equal(network(images, labels).loss, network.loss(images, labels).loss)
    assert torch.equal(network(images), network.head(network.backbone(images)))
    for call in (network, network.loss):
        updates = int(network.head.num_updates)
        call(images, labels, update=True)
        assert int(network.head.num_updates) == updates + 1
    assert torch.equal(network.predict(images, 16), network.predict(images))


@pytest.mark.parametrize("name", ["segformer", "upernet-swin", "fcn_resnet50", "deeplabv3_resnet50"])
def test_class_layer_on_the_features_gives_what_the_whole_network_gives(name):
    images = torch.randn(2, 3, *SIZE)
    if "_" in name:
        skip_without_torchvision()
        build = getattr(_optional.require("torchvision.models.segmentation", "test"), name)
        whole = build(weights=None, weights_backbone=None, num_classes=7).eval()
        adapter, layer = TorchvisionFeatures(whole), whole.classifier[-1]
        expected = whole(images)["out"]
    else:
        transformers = pytest.importorskip("transformers")
        integrations.declare_missing_torchvision_ops()
        if name == "segformer":
            config = transformers.SegformerConfig(num_labels=7, depths=[1] * 4, decoder_hidden_size=64)
            whole = transformers.SegformerForSemanticSegmentation(config).eval()
        else:
            stages = ["stage1", "stage2", "stage3"]
            swin = transformers.SwinConfig(embed_dim=24, depths=[1] * 3, num_heads=[2] * 3, window_size=4, out_features=stages)
            config = transformers.UperNetConfig(backbone_config=swin, num_labels=7, hidden_size=32, auxiliary_in_channels=96)
            whole = transformers.UperNetForSemanticSegmentation(config).eval()
        layer = whole.decode_head.classifier
        expected = whole(images).logits
        adapter = (SegformerFeatures if name == "segformer" else UperNetFeatures)(whole)
    ours = layer(adapter.eval()(images))
    if name != "segformer":  # which leaves its logits at the features' size
        ours = nn.functional.interpolate(ours, size=SIZE, mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours, expected)


def test_state_dict_has_the_names_of_the_network():
    skip_without_torchvision()
    whole = _optional.require("torchvision.models.segmentation", "test").fcn_resnet50(weights=None, weights_backbone=None)
    missing = whole.state_dict().keys() - TorchvisionFeatures(whole).state_dict().keys()
    assert missing == {"classifier.4.weight", "classifier.4.bias"}


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}, (16, 16)),
        ("vit_tiny_patch16_224", {"depth": 3}, (4, 4)),
    ],
)
def test_timm_transformers_of_a_fixed_size_and_with_channels_last_maps_work(name, options, shape):
    backbone = timm_backbone(name, **options)
    assert backbone(torch.randn(2, 3, *SIZE)).shape == (2, 64, *shape)


def test_network_without_a_class_layer_to_cut_is_refused():
    network = nn.Module()
    network.backbone, network.classifier = nn.Identity(), nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(
        TypeError, match=r"TorchvisionFeatures: the last layer of network.classifier must be a 1x1 conv.*got Conv2d"
    ):
        TorchvisionFeatures(network)


def test_unknown_timm_backbone_names_close_ones():
    skip_without_torchvision()
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"TimmFeatures: name must be a model of timm; got resnet_18 \(close: .*resnet18"):
        TimmFeatures.create("resnet_18")


@pytest.mark.parametrize(
    ("package", "create"),
    [
        ("transformers", SegformerFeatures.create),
        ("transformers", UperNetFeatures.create),
        ("torchvision", lambda: TorchvisionFeatures.create("fcn_resnet50")),
        ("timm", lambda: TimmFeatures.create("resnet18")),
    ],
)
def test_missing_package_names_the_extra_to_install(monkeypatch, package, create):
    monkeypatch.delitem(sys.modules, package, raising=False)
    found = _optional.find_spec
    monkeypatch.setattr(_optional, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ModuleNotFoundError, match=rf'needs {package}: run `pip install "dnc_kernels\[networks\]"`'):
        create()


def in_a_fresh_process(code):
    root = Path(integrations.__file__).parents[2]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)


def test_importing_the_adapters_imports_no_optional_package():
    code = "import sys, dnc_kernels.integrations; print({'torchvision', 'timm', 'transformers'} & set(sys.modules))"
    assert in_a_fresh_process(code).stdout.strip() == "set()"


FAKE_TORCHVISION = """
import torch
from torch.library import register_fake
@register_fake("torchvision::nms")
def _(dets, scores, iou_threshold): ...
"""


def test_torchvision_that_cannot_load_its_library_imports_after_its_ops_are_declared(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from . import _meta_registrations\n")
    (package / "_meta_registrations.py").write_text(FAKE_TORCHVISION)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from dnc_kernels.integrations import declare_missing_torchvision_ops as declare\n"
        "print(declare(), 'torchvision' in sys.modules, declare())"
    )
    done = in_a_fresh_process(code)
    assert done.stdout.strip() == "True True False", done.stderr


def test_torchvision_that_fails_for_another_reason_raises_that_reason(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('another reason')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from dnc_kernels.integrations import declare_missing_torchvision_ops\n"
        "declare_missing_torchvision_ops()"
    )
    done = in_a_fresh_process(code)
    assert done.returncode == 1 and "another reason" in done.stderr


def pretrained_class():
    """A model of transformers with a head in it."""
    transformers = pytest.importorskip("transformers")
    integrations.declare_missing_torchvision_ops()

    class Config(transformers.PretrainedConfig):
        model_type = "small_dnc"

        def __init__(self, init="data", momentum=None, **options):
            super().__init__(**options)
            self.init, self.momentum = init, momentum

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.backbone = nn.Conv2d(3, 8, 1)
            weight = [1.0, 2.0, 3.0, 4.0]
            self.head = DNCHead(8, 4, 2, init=config.init, momentum=config.momentum, class_weight=weight)
            self.post_init()

        def forward(self, x, labels):
            return self.head(self.backbone(x), labels).loss

        def _init_weights(self, module):
            super()._init_weights(module)
            if isinstance(module, DNCHead):
                module.reset_parameters()

    return Model, Config


@pytest.fixture
def filled_memory():
    """Empty memory reads as NaN and as the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("own_init", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_gives_the_head_that_was_saved(own_init, dtype, tmp_path, filled_memory):
    Model, Config = pretrained_class()
    if not own_init:
        del Model._init_weights
    torch.manual_seed(0)
    model, x, labels = Model(Config()).train(), torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2, 8, 8))
    model(x, labels)
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, dtype=dtype).train()
    head, source = loaded.head, model.head
    assert torch.equal(head.prototypes, source.prototypes)
    assert torch.equal(head.class_weight, source.class_weight)
    assert int(head.num_updates) == 1 and int(head.start_in) == 0
    for name in ("last_counts", "idle_updates", "wins", "class_counts", "nonfinite_pixels", "bad_labels"):
        assert not getattr(head, name).any(), name
    loaded(x.to(dtype), labels)
    assert (head.prototypes - source.prototypes).abs().max() < 0.05  # moved, not started over
    if dtype == torch.float32:
        model(x, labels)
        assert torch.equal(head.prototypes, source.prototypes)


def test_from_pretrained_completes_what_a_checkpoint_lacks(tmp_path, filled_memory):
    Model, Config = pretrained_class()
    model = Model(Config(init="orthogonal", momentum=0.9))
    model.save_pretrained(tmp_path / "constant")  # without `num_updates` and `start_in`
    head = Model.from_pretrained(tmp_path / "constant", config=Config(init="data")).head
    assert torch.equal(head.prototypes, model.head.prototypes)
    assert int(head.num_updates) == int(head.start_in) == 0
    backbone = {f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}
    model.save_pretrained(tmp_path / "backbone", state_dict=backbone)
    head = Model.from_pretrained(tmp_path / "backbone", config=Config(init="data")).head
    assert (head.prototypes.norm(dim=2) - 1).abs().max() < 1e-5 and int(head.start_in) == 1
    assert head.logit_scale.item() == pytest.approx(math.log(10))
