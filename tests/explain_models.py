"""Small models and data for the tests of dnc_kernels.explain."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import nn as torch_nn

from dnc_kernels import nn
from dnc_kernels.integrations import DNCSegmenter

C, K, D = 3, 3, 8


class ImageClassifier(torch_nn.Module):
    """As `DNCImageClassifier`: a backbone and a head."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head


@dataclass
class Samples:
    """Batches (images, labels, ids), the same ones in every pass; `passes` counts them."""

    images: torch.Tensor
    labels: torch.Tensor
    batch: int = 4
    name: str = "train"
    passes: int = field(default=0)

    def __len__(self):
        return len(self.images)

    def id(self, number):
        return f"{self.name}/{number}"

    def __iter__(self):
        self.passes += 1
        for first in range(0, len(self.images), self.batch):
            some = slice(first, first + self.batch)
            yield self.images[some], self.labels[some], [self.id(first + i) for i in range(len(self.images[some]))]


def prepare(images):
    return images.float() / 255


def of_images(per_class=7, classes=C, k=K, seed=0, **options):
    """A classifier of random 4x4 images, with random weights, and training and test samples."""
    torch.manual_seed(seed)
    backbone = torch_nn.Sequential(torch_nn.Flatten(), torch_nn.Linear(48, D))
    head = nn.DNCClassifier(D, classes, k, memory_size=0, **options)
    labels = torch.arange(classes).repeat(per_class)

    def drawn(name):
        return Samples(torch.randint(0, 256, (len(labels), 3, 4, 4), dtype=torch.uint8), labels.clone(), name=name)

    return ImageClassifier(backbone, head), drawn("train"), drawn("test")


def of_maps(images=5, height=40, width=60, k=K, stride=4, seed=0, **options):
    """A segmenter of pictures whose pixels hold their row, column and picture number, and random labels in blocks."""
    torch.manual_seed(seed)
    backbone = torch_nn.Conv2d(3, D, stride, stride=stride)
    head = nn.DNCHead(D, C, k, **options)

    def drawn(name):
        pictures = torch.zeros(images, 3, height, width, dtype=torch.uint8)
        pictures[:, 0], pictures[:, 1] = torch.arange(height)[:, None], torch.arange(width)
        pictures[:, 2] = torch.arange(images)[:, None, None]
        blocks = torch.randint(-1, C, (images, -(-height // 8), -(-width // 8)))
        labels = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width]
        return Samples(pictures, torch.where(labels < 0, 255, labels), batch=2, name=name)

    return DNCSegmenter(backbone, head), drawn("train"), drawn("test")


def digits():
    """scikit-learn's digits, and a classifier of their pixels by class means: right for most, in an instant."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    data = load_digits()
    images = torch.from_numpy((data.images * 255 / 16).astype("uint8"))[:, None].repeat(1, 3, 1, 1)
    labels, held_out = torch.from_numpy(data.target), torch.arange(len(images)) % 5 == 0
    train, test = (Samples(images[kept], labels[kept], 300, name) for kept, name in ((~held_out, "train"), (held_out, "test")))
    model = ImageClassifier(torch_nn.Flatten(), nn.DNCClassifier(192, 10, 4, memory_size=0)).eval()
    model.head.initialize_from_(model.backbone(prepare(train.images)), train.labels)
    return model, train, test


def opened(model, train, test, classes=None):
    """As `open_run` gives it."""
    classes = classes or [f"class {i}" for i in range(model.head.num_classes)]
    return SimpleNamespace(
        model=model, classes=classes, train=train, test=test, prepare=prepare, ignore_index=model.head.ignore_index
    )
