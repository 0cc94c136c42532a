"""A small float64 language model with all that layouts have to cope with, to be held against a single process."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import LBFGS, AdamW
from torch.utils.data import TensorDataset

import shoal

VOCABULARY, LENGTH, DIM, HEADS = 13, 6, 8, 2


class Block(nn.Module):
    """Attention with fused projections, and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, dim), twice."""
        # (batch, length, 3, heads, dim / heads) -> (3, batch, heads, length, dim / heads)
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, DIM // HEADS)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Embedding and head are one matrix; a buffer, a parameter of the model's own, and one frozen."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.place = nn.Parameter(torch.randn(LENGTH, DIM) / 10)
        self.frozen = nn.Linear(DIM, DIM).requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, VOCABULARY, bias=False)
        self.register_buffer("scale", torch.tensor([1.5]))
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, text: Tensor) -> Tensor:
        """(batch, length) to (batch, length, vocabulary)."""
        places = torch.arange(text.shape[1], device=text.device)
        x = self.embed(text) + self.place[places]
        x = self.frozen(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x) * self.scale) / text.shape[1]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and the logits."""
    text, following = batch
    logits = model(text)
    return functional.cross_entropy(logits.flatten(0, 1), following.flatten()), logits


def accuracy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> float:
    """The part of all characters that were foreseen."""
    return float((logits.argmax(-1) == batch[1]).double().mean())


def samples(count: int, seed: int) -> TensorDataset:
    """Random walks through the vocabulary."""
    steps = torch.randint(1, 4, (count, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    text = steps.cumsum(1) % VOCABULARY
    return TensorDataset(text[:, :-1].contiguous(), text[:, 1:].contiguous())


def job(layers: int = 4, num_samples: int = 50) -> shoal.Job:
    """AdamW with decay groups and a warm-up."""
    return shoal.Job(
        model=lambda: Model(layers),
        data=lambda: (samples(num_samples, 3), samples(11, 4)),
        loss=loss,
        optimizer=lambda p: AdamW(shoal.decay_groups(p, 0.1), 1e-2),
        schedule=shoal.warmup(3),
        metrics={"accuracy": accuracy},
    )


class Encoder(nn.Module):
    """PyTorch's own encoder layers under a causal mask, over a vocabulary large enough to divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, DIM)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(DIM, 256, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, text: Tensor) -> Tensor:
        """(batch, length) to (batch, length, vocabulary)."""
        x = self.embed(text)
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1], dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return self.head(x)


def encoder() -> shoal.Job:
    """Attention and embedding that PyTorch's styles alone cannot divide."""
    return dataclasses.replace(job(), model=Encoder)


class Untraceable(Model):
    """Looks at values on its way."""

    def forward(self, text: Tensor) -> Tensor:
        """As the model's."""
        x = self.embed(text)
        if x.sum() > 1e9:
            return self.head(x)
        return self.head(self.blocks[1](self.blocks[0](x)))


def untraceable() -> shoal.Job:
    """A forward that no graph can hold."""
    return dataclasses.replace(job(), model=lambda: Untraceable(4))


def indivisible() -> shoal.Job:
    """A rule of the job's own that does not fit."""
    return dataclasses.replace(job(), tensor={"embed": "vocabulary"})


def whole_matrices() -> shoal.Job:
    """An optimizer that no part of a matrix is enough for."""
    return dataclasses.replace(job(), optimizer=LBFGS)
