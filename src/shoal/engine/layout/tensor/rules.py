"""Which modules tensor parallelism divides, and how: the one table.

After Shoeybi et al. 2019, Megatron-LM: the first matrix of a pair by its output columns, the last by its input rows, so
that each rank computes its part of what lies between alone, and one sum over the ranks follows.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from shoal.errors import JobError

How = Literal["columns", "fused", "rows", "vocabulary", "head", "attention"]
"""How a module is divided.

columns: a Linear's outputs; fused: the same for matrices stacked in one (query, key and value); rows: a Linear's
inputs, and the outputs are summed; vocabulary: an Embedding's rows; head: a Linear's outputs, which are gathered
again; attention: the heads of an nn.MultiheadAttention.
"""

ATTENTION: Sequence[tuple[tuple[str, ...], tuple[str, ...]]] = (
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj")),
    (("query", "key", "value"), ("dense", "out", "proj")),
    (("wq", "wk", "wv"), ("wo",)),
    (("to_q", "to_k", "to_v"), ("to_out",)),
    (("q", "k", "v"), ("o", "out", "proj")),
    (("qkv",), ("out", "proj", "out_proj", "o_proj")),
    (("qkv_proj",), ("o_proj", "out_proj", "proj")),
    (("c_attn",), ("c_proj",)),
    (("Wqkv",), ("out_proj",)),
    (("query_key_value",), ("dense",)),
    (("in_proj",), ("out_proj",)),
)
"""Names of the matrices before attention (one of them: fused), and of the one behind."""
FEED_FORWARD: Sequence[tuple[tuple[str, ...], tuple[str, ...]]] = (
    (("fc1",), ("fc2",)),
    (("linear1",), ("linear2",)),
    (("lin1",), ("lin2",)),
    (("c_fc",), ("c_proj",)),
    (("gate_proj", "up_proj"), ("down_proj",)),
    (("up_proj",), ("down_proj",)),
    (("w1", "w3"), ("w2",)),
    (("w1",), ("w2",)),
    (("wi",), ("wo",)),
    (("up",), ("down",)),
    (("dense_h_to_4h",), ("dense_4h_to_h",)),
)
"""Names of the matrices that widen, and of the one that narrows again."""
HEADS = ("heads", "num_heads", "n_heads", "n_head", "nheads", "num_attention_heads", "n_kv_heads", "num_kv_heads")
"""Attributes that count attention heads: a rank has its part of them."""
LEAST_ROWS = 128
"""An embedding is divided if each rank keeps so many rows."""


@dataclass(frozen=True)
class Split:
    """A group of modules to divide together.

    Attributes:
        owner: the name of the module that computes with them and nothing else divided.
        modules: of each, by its name, how.
        heads: attributes of the owner that count heads.
        fused: matrices stacked in a "fused" one.
        between: names of dropouts whose inputs are divided.
    """

    owner: str
    modules: Mapping[str, How]
    heads: tuple[str, ...] = ()
    fused: int = 3
    between: tuple[str, ...] = ()


def find(model: nn.Module) -> list[Split]:
    """What the table knows in a model, outer modules first. A module is in one split at most."""
    named = dict(model.named_modules())
    found: list[Split] = []
    taken: set[str] = set()
    for name, module in named.items():
        prefix = f"{name}." if name else ""
        for split in _splits(prefix, name, module):
            if not taken & split.modules.keys():
                taken |= split.modules.keys()
                found.append(split)
    return found + list(_vocabulary(model, named, taken))


def given(model: nn.Module, rules: Mapping[str, str]) -> list[Split]:
    """A job's own rules: patterns of module names -> how; "whole" leaves a module alone.

    Raises:
        JobError: a pattern fits no module, or names no way to divide it.
    """
    ways = ("columns", "fused", "rows", "vocabulary", "head", "attention", "whole")
    named = dict(model.named_modules())
    modules: dict[str, How] = {}
    for pattern, how in rules.items():
        if how not in ways:
            raise JobError(f"Job(tensor=...): {pattern!r} got {how!r}, expected one of {', '.join(ways)}")
        matching = fnmatch.filter(named, pattern)
        if not matching:
            raise JobError(f"Job(tensor=...): {pattern!r} fits none of the model's modules, such as {list(named)[1:4]}")
        for name in matching:
            modules.pop(name, None)
            if how != "whole":
                modules[name] = how  # type: ignore[assignment]  # it is one of `ways`
    return [Split("", modules)] if modules else []


def _splits(prefix: str, name: str, module: nn.Module) -> Iterator[Split]:
    children = dict(module.named_children())
    if isinstance(module, nn.MultiheadAttention):
        yield Split(name, {name: "attention"})
        return
    for first, last in ATTENTION:
        end = _only(children, last)
        if end is not None and all(isinstance(children.get(child), nn.Linear) for child in first):
            how: How = "fused" if len(first) == 1 else "columns"
            heads = tuple(key for key in HEADS if isinstance(getattr(module, key, None), int))
            yield Split(name, {**{prefix + child: how for child in first}, prefix + end: "rows"}, heads)
            break
    for first, last in FEED_FORWARD:
        end = _only(children, last)
        if end is not None and all(isinstance(children.get(child), nn.Linear) for child in first):
            inside = (f"{prefix}dropout",) if isinstance(module, nn.TransformerEncoderLayer) else ()
            wide: dict[str, How] = dict.fromkeys((prefix + child for child in first), "columns")
            yield Split(name, {**wide, prefix + end: "rows"}, between=inside)
            break
    if isinstance(module, nn.Sequential):
        linear = [child for child, part in children.items() if isinstance(part, nn.Linear)]
        if len(linear) == 2 and _elementwise_between(list(children.items()), linear):
            names = list(children)
            between = names[names.index(linear[0]) : names.index(linear[1])]
            dropouts = tuple(prefix + child for child in between if "Dropout" in type(children[child]).__name__)
            yield Split(name, {prefix + linear[0]: "columns", prefix + linear[1]: "rows"}, between=dropouts)


def _vocabulary(model: nn.Module, named: Mapping[str, nn.Module], taken: set[str]) -> Iterator[Split]:
    """The embedding of tokens and the output head: together if they are one matrix."""
    embeddings = {name: m for name, m in named.items() if isinstance(m, nn.Embedding)}
    for name, embedding in embeddings.items():
        heads = [
            other
            for other, m in named.items()
            if isinstance(m, nn.Linear) and m.weight is embedding.weight and other not in taken
        ]
        yield Split("", {name: "vocabulary", **dict.fromkeys(heads, "head")})
    tied = {id(embedding.weight) for embedding in embeddings.values()}
    for name, module in model.named_children():
        if name.endswith("head") and isinstance(module, nn.Linear) and id(module.weight) not in tied:
            yield Split("", {name: "head"})


def _only(children: Mapping[str, nn.Module], names: Sequence[str]) -> str | None:
    return next((name for name in names if isinstance(children.get(name), nn.Linear)), None)


def _elementwise_between(children: Sequence[tuple[str, nn.Module]], linear: Sequence[str]) -> bool:
    """Whether only functions of single values lie between two matrices."""
    names = [name for name, _ in children]
    between = children[names.index(linear[0]) + 1 : names.index(linear[1])]
    return all(
        type(module).__module__ in ("torch.nn.modules.activation", "torch.nn.modules.dropout") for _, module in between
    )
