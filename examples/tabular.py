"""Tabular classification: scikit-learn's bundled breast-cancer set, 569 patients with 30 measurements each.

shoal train examples/tabular.py:job --nodes 2 --plan plans/tabular.toml
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.utils.data import TensorDataset

import shoal

Batch = tuple[Tensor, Tensor]


def data() -> tuple[TensorDataset, TensorDataset]:
    """455 patients to train on, 114 to validate on; measurements scaled by the training part's mean and spread."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError:
        raise shoal.MissingExtra("scikit-learn", "examples", "this example's data") from None
    bunch = load_breast_cancer()
    features = torch.tensor(bunch.data, dtype=torch.float32)  # (569, 30)
    benign = torch.tensor(bunch.target, dtype=torch.float32)  # (569,), 0 malignant, 1 benign
    order = torch.randperm(len(benign), generator=torch.Generator().manual_seed(1))
    train, held_out = order[:455], order[455:]
    mean, spread = features[train].mean(dim=0), features[train].std(dim=0)
    features = (features - mean) / spread
    return TensorDataset(features[train], benign[train]), TensorDataset(features[held_out], benign[held_out])


def network(width: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(30, width),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 1),
    )


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy, and the logits for the metrics."""
    features, benign = batch
    logits = model(features).squeeze(1)
    return functional.binary_cross_entropy_with_logits(logits, benign), logits


def accuracy(logits: Tensor, batch: Batch) -> Tensor:
    """The share of right diagnoses."""
    return ((logits > 0) == (batch[1] > 0.5)).float().mean()


def missed(logits: Tensor, batch: Batch) -> Tensor:
    """The share of patients with a malignant tumour who are told that it is benign."""
    return ((logits > 0) & (batch[1] < 0.5)).float().mean()


def job(width: int = 64, lr: float = 1e-3) -> shoal.Job:
    """Stops by itself once the validation loss no longer falls; the best model is kept."""
    return shoal.Job(
        model=lambda: network(width),
        data=data,
        loss=loss,
        metrics={"accuracy": accuracy, "missed": missed},
        optimizer=lambda parameters: AdamW(shoal.decay_groups(parameters, 0.1), lr),
    )
