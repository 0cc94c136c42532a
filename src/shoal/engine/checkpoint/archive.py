"""Checkpoints on disk: a folder each, whole or not there.

    checkpoints/step-00000200/
        tensors.safetensors   all tensors
        state.json            everything else
        rank-0.safetensors, rank-0.json ...   what each rank alone holds, where the sync has such
        manifest.json         sizes and SHA-256 of all others, written last

A checkpoint is written under a temporary name and renamed when all of it is on disk, so that a crash at any moment
leaves the old ones whole. Reading checks every byte against the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.run import sync_folder

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_FORMAT = 3
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
"""The names of dtypes in the safetensors format."""
_HASH_PIECE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk. `best`: it had the lowest validation loss when it was written."""

    path: Path
    step: int
    best: bool


@dataclass(frozen=True)
class Attachment:
    """A file that waits to become part of a checkpoint."""

    path: Path
    size_bytes: int
    sha256: str

    def to_plain(self) -> dict[str, Any]:
        """As JSON."""
        return {"path": str(self.path), "size_bytes": self.size_bytes, "sha256": self.sha256}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """The inverse of `to_plain`."""
        return cls(Path(plain["path"]), int(plain["size_bytes"]), str(plain["sha256"]))


class FileTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safetensors.safe_open(path, framework="pt") as file:
            self._names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safetensors.safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Archive:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int, keep_best: bool) -> None:
        self._folder = folder
        self._keep = keep
        self._keep_best = keep_best

    def write(
        self,
        step: int,
        state: Any,
        tensors: dict[str, Tensor],
        *,
        best: bool,
        attachments: Sequence[Attachment] = (),
    ) -> tuple[Path, int]:
        """Write one checkpoint and delete what need not be kept; return its path and size in bytes.

        `attachments` are moved into it.

        Raises:
            CheckpointError: the disk refused; what stood before is untouched.
        """
        final = self._folder / _name(step)
        temporary = self._folder / f".{_name(step)}.tmp"
        try:
            size_bytes = _write_folder(temporary, step, state, tensors, attachments, best=best)
            self._put_in_place(temporary, final)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(_refusal(final, error)) from None
        finally:
            for attachment in attachments:
                shutil.rmtree(attachment.path.parent, ignore_errors=True)
        self._prune(step)
        return final, size_bytes

    def write_private(self, name: str, rank: int, state: Any, tensors: dict[str, Tensor]) -> list[Attachment]:
        """Write what one rank alone holds, to be attached to a checkpoint; `name` is no other's.

        Raises:
            CheckpointError: the disk refused.
        """
        folder = self._folder / f".step-{name}.rank-{rank}.tmp"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            paths = [folder / f"rank-{rank}{suffix}" for suffix in (".safetensors", ".json")]
            save_tensors(tensors, paths[0])
            paths[1].write_text(json.dumps(state))
            for path in paths:
                _sync_file(path)
            return [Attachment(path, **_describe(path)) for path in paths]
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(_refusal(folder, error)) from None

    def list(self) -> list[Saved]:
        """All checkpoints, oldest first; a folder without a readable manifest counts as step -1, not best."""
        found = []
        for path in self._folder.glob("step-*"):
            try:
                manifest = _manifest(path)
                found.append(Saved(path, int(manifest["step"]), bool(manifest["best"])))
            except CheckpointError:
                found.append(Saved(path, -1, best=False))
        return sorted(found, key=lambda saved: (len(saved.path.name), saved.path.name))

    def path(self, name: str) -> Path:
        """The folder of the checkpoint called `name`."""
        return self._folder / name

    def sweep(self) -> None:
        """Delete what a crash left half written, and put back what it left aside."""
        for path in self._folder.glob(".step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self._folder.glob(".step-*.old"):
            final = self._folder / path.name.removeprefix(".").removesuffix(".old")
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(final)

    def _put_in_place(self, temporary: Path, final: Path) -> None:
        """Rename; what stood there stands aside until that is done, and comes back if it is refused."""
        aside = self._folder / f".{final.name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            final.rename(aside)
        try:
            temporary.rename(final)
        except OSError:
            if aside.exists():
                aside.rename(final)
            raise
        sync_folder(self._folder)
        shutil.rmtree(aside, ignore_errors=True)

    def _prune(self, written: int) -> None:
        """Keep what is to be kept of the steps up to `written`; later ones belong to a course that was given up."""
        everything = self.list()
        last = [saved.path.name for saved in everything].index(_name(written))
        for saved in everything[last + 1 :]:  # by name: a damaged one may not tell its step
            shutil.rmtree(saved.path, ignore_errors=True)
        everything = everything[: last + 1]
        kept = {saved.path for saved in everything[-self._keep :]}
        if self._keep_best:
            kept |= {saved.path for saved in [saved for saved in everything if saved.best][-1:]}
        for saved in everything:
            if saved.path not in kept:
                shutil.rmtree(saved.path, ignore_errors=True)


def read_private(path: Path, rank: int) -> tuple[Any, Mapping[str, Tensor]] | None:
    """What one rank alone held, checked; None if the checkpoint has no such part.

    Raises:
        CheckpointError: a file is missing, cut short or changed.
    """
    names = [f"rank-{rank}.safetensors", f"rank-{rank}.json"]
    with damage_named(path):
        manifest = _manifest(path)
        if names[0] not in manifest["files"]:
            return None
        for name in names:
            _verify(path / name, manifest["files"][name])
        return json.loads((path / names[1]).read_text()), FileTensors(path / names[0])


def verify(path: Path) -> None:
    """Check every file of a checkpoint.

    Raises:
        CheckpointError: a file is missing, cut short or changed.
    """
    with damage_named(path):
        for name, entry in _manifest(path)["files"].items():
            _verify(path / name, entry)


def read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Read a checkpoint, checking it whole; return its state and tensors (on the CPU).

    Raises:
        CheckpointError: a file is missing, cut short or changed.
    """
    with damage_named(path):
        manifest = _manifest(path)
        for name in (_TENSORS, _STATE):
            _verify(path / name, manifest["files"][name])
        state = json.loads((path / _STATE).read_text())
        return state, safetensors.torch.load_file(path / _TENSORS)


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Say which checkpoint it is that cannot be read.

    Raises:
        CheckpointError: it could not.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"checkpoint {path} is damaged: {reason}") from None


def _manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, checked: it carries its own digest, since all else is checked by it.

    Raises:
        CheckpointError: it is missing, damaged, or another version's.
    """
    with damage_named(path):
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            raise CheckpointError(
                f"{path} has format {manifest['format']}, expected {_FORMAT}; it is another version's"
            )
        if manifest.pop("sha256") != _digest(manifest):
            raise CheckpointError(f"checkpoint {path} is damaged: the content of {_MANIFEST} has changed")
        return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _write_folder(
    folder: Path,
    step: int,
    state: Any,
    tensors: dict[str, Tensor],
    attachments: Sequence[Attachment],
    *,
    best: bool,
) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_tensors(tensors, folder / _TENSORS)
    (folder / _STATE).write_text(json.dumps(state))
    files = {name: _describe(folder / name) for name in (_TENSORS, _STATE)}
    for attachment in attachments:
        attachment.path.rename(folder / attachment.path.name)
        files[attachment.path.name] = {"size_bytes": attachment.size_bytes, "sha256": attachment.sha256}
    manifest = {"format": _FORMAT, "step": step, "best": best, "files": files}
    manifest["sha256"] = _digest(manifest)
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2))
    for name in (_TENSORS, _STATE, _MANIFEST):
        _sync_file(folder / name)
    sync_folder(folder)
    return sum(int(entry["size_bytes"]) for entry in files.values())


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file one tensor after the other: the library's own function first copies all of them."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256. Large pieces: the hash runs without Python's lock, but has to take it back after each."""
    digest = hashlib.sha256()
    size_bytes = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for start in range(0, size_bytes, _HASH_PIECE_BYTES):
            with memoryview(content) as view:
                digest.update(view[start : start + _HASH_PIECE_BYTES])
    return {"size_bytes": size_bytes, "sha256": digest.hexdigest()}


def _verify(path: Path, expected: dict[str, Any]) -> None:
    size_bytes = path.stat().st_size
    if size_bytes != expected["size_bytes"]:
        raise CheckpointError(
            f"checkpoint {path.parent} is damaged: {path.name} has {size_bytes} bytes, expected "
            f"{expected['size_bytes']}"
        )
    if _describe(path)["sha256"] != expected["sha256"]:
        raise CheckpointError(f"checkpoint {path.parent} is damaged: the content of {path.name} has changed")


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refusal(path: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    try:
        free = shutil.disk_usage(path.parent).free
        room = f"; {free / 1e6:.0f} MB are free there"
    except OSError:
        room = ""
    return f"could not write checkpoint {path}: {reason}{room}; earlier checkpoints are untouched"
