"""A character-level transformer language model, trained on the source of Python's own standard library."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.utils.data import Dataset

import shoal

Window = tuple[Tensor, Tensor]
CONTEXT = 128


@functools.cache
def standard_library() -> Tensor:
    """The bytes of every module of the standard library itself, one after another: about 13 MB on any machine."""
    root = Path(sysconfig.get_path("stdlib"))
    outside = {"site-packages", "test", "tests", "idlelib", "__pycache__", "lib2to3"}
    files = sorted(p for p in root.rglob("*.py") if not outside & set(p.relative_to(root).parts))
    text = b"".join(path.read_bytes() for path in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class TextWindows(Dataset[Window]):
    """Windows of `CONTEXT` characters, side by side, each with the characters that follow."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> Window:
        window = self.text[index * CONTEXT : (index + 1) * CONTEXT + 1].long()
        return window[:-1], window[1:]


class Block(nn.Module):
    """One layer: causal self-attention, then a feed-forward network, each behind a norm and around a residual."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # (3, batch, heads, length, dim of a head)
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class CharLM(nn.Module):
    """A decoder-only transformer over bytes; the embedding and the output head are one matrix."""

    def __init__(self, layers: int, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, dim), nn.Embedding(CONTEXT, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)
        for matrix in (p for p in self.parameters() if p.dim() == 2):
            nn.init.normal_(matrix, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, text: Tensor) -> Tensor:
        """(batch, length) of byte values to (batch, length, 256) of logits."""
        places = torch.arange(text.shape[1], device=text.device)
        return self.head(self.norm(self.blocks(self.embed(text) + self.position(places))))


def next_char_loss(model: nn.Module, batch: Window) -> Tensor:
    """Mean cross-entropy of the next character, in nats."""
    text, following = batch
    return functional.cross_entropy(model(text).flatten(0, 1), following.flatten())


def data() -> tuple[TextWindows, TextWindows]:
    """The first 99 % to train on, of the rest 512 windows to validate on."""
    text = standard_library()
    cut = len(text) // 100 * 99
    return TextWindows(text[:cut]), TextWindows(text[cut : cut + 512 * CONTEXT + 1])


def generate(model: nn.Module, prompt: str = "def ", length: int = 400, temperature: float = 0.7) -> str:
    """Let the model write on from `prompt`."""
    device = next(model.parameters()).device
    text = torch.tensor([list(prompt.encode())], device=device)
    dice = torch.Generator().manual_seed(0)
    for _ in range(length):
        logits = model(text[:, -CONTEXT:])[0, -1].float().cpu() / temperature
        text = torch.cat([text, torch.multinomial(logits.softmax(0), 1, generator=dice).to(device)[None]], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def job(layers: int = 4, dim: int = 256, heads: int = 4, lr: float = 1e-3, dropout: float = 0.0) -> shoal.Job:
    """About 3 M parameters as it stands; `--set layers=8 --set dim=512` makes 25 M."""
    return shoal.Job(
        model=lambda: CharLM(layers, dim, heads, dropout),
        data=data,
        loss=next_char_loss,
        optimizer=lambda parameters: AdamW(shoal.decay_groups(parameters, 0.1), lr, betas=(0.9, 0.95)),
        schedule=shoal.warmup(50),
        sample=generate,
    )
