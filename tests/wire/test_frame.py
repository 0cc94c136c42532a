"""Frames: what goes in comes out, and no header that lies is believed."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.wire.frame import DTYPES, FrameError, Header, Operation, decode, encode, text

HEADER = Header(Operation.PUSH, request=7, rank=3, clock=5, sequence=9, oldest=8, flags=1)
FIXED = struct.calcsize("<4sHBBQiqQQIIQ")


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (5, 7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frame_brings_every_tensor_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 100).to(dtype)
    head, parts = encode(HEADER, [("ä name", tensor), ("other", torch.arange(3))])
    message = decode(head, [bytes(part) for part in parts])
    assert message.header == HEADER
    assert torch.equal(message.tensors()["ä name"], tensor)
    assert message.tensor(0).shape == shape
    assert message.tensors()["other"].tolist() == [0, 1, 2]


def test_a_document_is_json() -> None:
    head, parts = encode(HEADER, [("text", text({"a": [1, "ü"]}))])
    assert decode(head, [bytes(part) for part in parts]).document() == {"a": [1, "ü"]}
    with pytest.raises(FrameError, match="not JSON"):
        decode(head, [b"\xff" * len(parts[0])]).document()


@given(st.binary(max_size=200), st.lists(st.binary(max_size=20), max_size=3))
def test_noise_is_never_a_frame(head: bytes, parts: list[bytes]) -> None:
    with pytest.raises(FrameError):
        decode(head, parts)


@given(place=st.integers(0, FIXED + 60), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_changes_only_what_it_says(place: int, bit: int) -> None:
    """A frame with one wrong bit may still be one (another clock), but never takes memory that did not come."""
    head, parts = encode(HEADER, [("weight", torch.zeros(4, 4)), ("bias", torch.zeros(4))])
    lying = bytearray(head)
    lying[place % len(lying)] ^= 1 << bit
    try:
        message = decode(bytes(lying), [bytes(part) for part in parts])
        assert [message.tensor(i).nbytes for i in range(2)] == [64, 16]
    except FrameError:
        pass


@pytest.mark.parametrize(
    ("shape", "words"),
    [((2**40, 2**40), "takes"), ((-1, -16), "has the shape"), ((17,), "takes")],
)
def test_a_shape_that_is_not_there_is_refused(shape: tuple[int, ...], words: str) -> None:
    head, parts = encode(HEADER, [("x", torch.zeros(1, 16)[:, :16]), ("y", torch.zeros(1))])
    old = struct.pack("<2q", 1, 16)
    new = struct.pack("<2q", *(shape if len(shape) == 2 else (1, *shape)))
    with pytest.raises(FrameError, match=words):
        decode(head.replace(old, new), [bytes(part) for part in parts])


def test_parts_must_be_as_many_and_as_long_as_the_header_says() -> None:
    head, parts = encode(HEADER, [("x", torch.zeros(4))])
    for wrong in ([], [bytes(15)], [bytes(17)], [bytes(16), b""]):
        with pytest.raises(FrameError):
            decode(head, wrong)
    with pytest.raises(FrameError, match="table of"):
        decode(head + b"x", [bytes(part) for part in parts])
