"""Handwritten digits (scikit-learn's bundled set, 1,797 images of 8 x 8) with a small convolutional network.

shoal train examples/digits.py:job --nodes 4 --plan plans/digits.toml
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.utils.data import Dataset

import shoal

Batch = tuple[Tensor, Tensor]


class Digits(Dataset[Batch]):
    """Images with their labels; in training each is moved by up to one pixel, another way every epoch."""

    def __init__(self, images: Tensor, labels: Tensor, *, move: bool) -> None:
        self.images, self.labels, self.move = images, labels, move

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        image = self.images[index]
        if self.move:
            # Drawn anew in every epoch, and the same on whichever rank or worker this sample falls.
            image = image.roll(tuple(torch.randint(-1, 2, (2,)).tolist()), dims=(-2, -1))
        return image, self.labels[index]


def data() -> tuple[Digits, Digits]:
    """1,437 images to train on, 360 to validate on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise shoal.MissingExtra("scikit-learn", "examples", "this example's data") from None
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8), 0 to 1
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1437], order[1437:]
    return Digits(images[train], labels[train], move=True), Digits(images[held_out], labels[held_out], move=False)


def network(channels: int) -> nn.Module:
    """Two convolutions with batch norm, then a linear classifier."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(2 * channels * 16, 10),
    )


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and the logits for the metrics."""
    images, labels = batch
    logits = model(images)
    return functional.cross_entropy(logits, labels), logits


def accuracy(logits: Tensor, batch: Batch) -> Tensor:
    """The share of images whose most likely class is right."""
    return (logits.argmax(dim=1) == batch[1]).float().mean()


def job(channels: int = 32, lr: float = 2e-3) -> shoal.Job:
    """Reaches 99 % in half a minute."""
    return shoal.Job(
        model=lambda: network(channels),
        data=data,
        loss=loss,
        metrics={"accuracy": accuracy},
        optimizer=lambda parameters: AdamW(shoal.decay_groups(parameters, 0.05), lr),
        schedule=shoal.warmup(20),
    )
