"""Rows of values in chunks: the form that all codecs with one scale a chunk have in common.

A row's bytes are its chunks' heads (scales and the like), then its codes of a few bits a value. The last chunk may be
shorter. A small chunk follows the values' magnitude more closely; a large one spends fewer bytes on heads.
"""

from __future__ import annotations

import abc
from typing import Annotated, ClassVar

import pydantic
import torch
from torch import Tensor

from shoal.strategy.codec.packing import pack, section, unpack

ChunkSize = Annotated[int, pydantic.Field(ge=8, le=65536, multiple_of=8)]


def chunked(values: Tensor, chunk: int) -> Tensor:
    """Cut rows, shape (rows, n), into shape (rows, ceil(n / chunk), chunk), filled up with zeros.

    A view where nothing has to be filled up.
    """
    missing = -values.shape[1] % chunk
    filled = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return torch.unflatten(filled, 1, (filled.shape[1] // chunk, chunk))


def chunk_sizes(num_values: int, chunk: int, like: Tensor) -> Tensor:
    """How many values each chunk holds: shape (chunks, 1), fp32, on the device of `like`."""
    num_chunks = -(-num_values // chunk)
    sizes = torch.full((num_chunks, 1), float(chunk), device=like.device)
    sizes[-1:] = num_values - (num_chunks - 1) * chunk
    return sizes


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to compute in: fp32, or fp64 for fp64 values."""
    return torch.promote_types(dtype, torch.float32)


class ChunkedCodec(abc.ABC):
    """A head and codes of `bits` bits for each chunk."""

    linear: ClassVar[bool] = False

    def __init__(self, chunk: int, bits: int, head_dtype: torch.dtype, head_length: int) -> None:
        self._chunk = chunk
        self._bits = bits
        self._head_dtype = head_dtype
        self._head_length = head_length

    @abc.abstractmethod
    def _quantize(self, chunks: Tensor, num_values: int, key: int) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize shape (rows, c, chunk): heads, shape (rows, c, head length), in the head's dtype or a wider one;
        codes, uint8, contiguous, of the chunks' shape; and what they decode to, in the working dtype.
        """

    @abc.abstractmethod
    def _restore(self, heads: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The reverse, to the bit: values of the codes' shape (rows, c, chunk)."""

    def encode(self, values: Tensor, key: int) -> Tensor:
        """Heads, then codes: see `size_bytes`."""
        return self.encode_decoded(values, key)[0]

    def encode_decoded(self, values: Tensor, key: int) -> tuple[Tensor, Tensor]:
        """The bytes, and what they decode to."""
        rows, n = values.shape
        if values.numel() == 0:
            return values.new_empty((rows, self.size_bytes(n, 0)), dtype=torch.uint8), torch.empty_like(values)
        heads, codes, decoded = self._quantize(chunked(values, self._chunk), n, key)
        head_bytes = heads.to(self._head_dtype).view(rows, -1).view(torch.uint8)
        code_bytes = pack(codes, self._bits).view(rows, -1)[:, : -(-n * self._bits // 8)]
        return torch.cat([head_bytes, code_bytes], dim=1), decoded.view(rows, -1)[:, :n].to(values.dtype)

    def decode(self, payload: Tensor, num_values: int, like: Tensor) -> Tensor:
        """Values of the dtype of `like`, shape (rows, num_values)."""
        rows = len(payload)
        if rows * num_values == 0:
            return like.new_empty((rows, num_values))
        num_chunks = -(-num_values // self._chunk)
        head_bytes = num_chunks * self._head_length * self._head_dtype.itemsize
        heads = section(payload, 0, head_bytes, self._head_dtype).view(rows, num_chunks, -1)
        full_bytes = num_chunks * self._chunk * self._bits // 8
        packed = payload[:, head_bytes:]
        packed = torch.nn.functional.pad(packed, (0, full_bytes - packed.shape[1])).view(rows, num_chunks, -1)
        values = self._restore(heads, unpack(packed.contiguous(), self._bits), working_dtype(like.dtype))
        return values.view(rows, -1)[:, :num_values].to(like.dtype)

    def size_bytes(self, num_values: int, item_bytes: int) -> int:
        """The head of every chunk begun, and `bits` bits a value."""
        head_bytes = self._head_length * self._head_dtype.itemsize
        return -(-num_values // self._chunk) * head_bytes + -(-num_values * self._bits // 8)
