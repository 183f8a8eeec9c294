"""Atomic writes, and safetensors files with a kind, a header and a checksum."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xai_edit._version import __version__
from xai_edit.core.text import require_utf8

Kind: TypeAlias = type | UnionType
PART = ".part"


def require_folder(path: str | Path) -> Path:
    """Return a path, with links followed, at which a file can be made.

    FileNotFoundError without its folder, OSError for what is no regular file, such as a device.
    """
    given, path = Path(path), Path(os.path.realpath(path))
    if not path.parent.is_dir():
        folder = path.parent if given.is_symlink() else given.parent
        raise FileNotFoundError(f"{given}: the folder {str(folder)!r} does not exist")
    if path.exists() and not path.is_file():
        raise OSError(f"{given}: it is no regular file, and would be replaced; give another name")
    return path


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the file's name to an OSError without one, such as that of a full disk."""
    try:
        yield
    except OSError as problem:
        if problem.filename is not None:
            raise
        if problem.errno:
            raise OSError(problem.errno, problem.strerror, str(path)) from problem
        raise OSError(f"{path}: cannot be written ({problem})") from problem


@contextmanager
def part_of(path: str | Path) -> Iterator[Path]:
    """Yield a folder beside ``path`` for files that become part of it, removed on leaving."""
    path = require_folder(path)
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f".{path.name}.", suffix=PART
    ) as folder:
        yield Path(folder)


def clear_parts(folder: str | Path, name: str) -> None:
    """Remove what killed processes left of a file; no other process may write it."""
    for part in Path(folder).glob(f".{glob.escape(name)}.????????{PART}"):
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _written(path: str | Path) -> Iterator[Path]:
    """Yield the name of a temporary file, renamed to ``path`` on leaving."""
    path = require_folder(path)
    with naming(path), part_of(path) as folder:
        temporary = folder / "whole"
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # safetensors makes private files; a result is as readable as any other new file.
        os.umask(mask := os.umask(0))
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file atomically; after an OSError, ``path`` is as it was before."""
    with _written(path) as temporary:
        temporary.write_bytes(content)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], kind: str, header: str
) -> None:
    """Write tensors and a header text to a safetensors file, atomically.

    The metadata has one entry, ``kind``, so that equal content gives equal bytes: safetensors
    writes several in random order. Memory-mapped tensors are not read into memory.
    """
    contiguous: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        # safetensors refuses one tensor under two names.
        twice = any(own.data_ptr() == other.data_ptr() for other in contiguous.values())
        contiguous[name] = own.clone() if twice else own
    with _written(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata={kind: header})
        except SafetensorError as problem:  # such as on a full disk
            raise OSError(str(problem)) from problem


def read_safetensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], str]:
    """Read the memory-mapped tensors and the header text of `write_safetensors`.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it is not a whole file of this kind.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not Path(path).is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: cannot be read; it is no regular file")
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as problem:
        raise ValueError(
            f"{path}: cannot be read; it is cut short, damaged or another kind of file ({problem})"
        ) from None
    if header is None:
        raise ValueError(f"{path}: a safetensors file, but not of {kind}")
    return tensors, header


def sealed(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return a header text with a checksum over it and the tensors before it."""
    return f"{checksum(tensors, text)}\n{text}"


def read_sealed(
    path: str | Path, kind: str, entries: Mapping[str, Kind], *, newest: int = 1
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file with a header that `sealed` made: the tensors, in memory, and the header.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_safetensors` and `read_header`, and if a bit of the file differs.
    """
    tensors, content = read_safetensors(path, kind)
    expected, _, text = content.partition("\n")
    if expected != checksum(tensors, text):
        raise ValueError(f"{path}: the checksum does not match; the file was changed")
    # Copies: a mapped tensor would change, or end the process, with a file that is written over.
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return copies, read_header(path, text, entries, newest=newest)


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return a digest of a text and of tensors with their names, dtypes and shapes.

    ValueError for a name that is not UTF-8.
    """
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        require_utf8(name, "tensors", "module or parameter")
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_header(
    path: str | Path, text: str, entries: Mapping[str, Kind], *, newest: int = 1
) -> dict[str, Any]:
    """Read a header text that is a JSON object with these entries (name → type).

    A number ``format`` may stand beside them, at most ``newest``; without it, the format is 1.

    Raises
    ------
    ValueError
        If it is no such object, or of a newer format; the message begins with ``path``.
    """
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise ValueError(
            f"{path}: the header is no JSON ({problem}); the file is damaged"
        ) from None
    version = header.pop("format", 1) if isinstance(header, dict) else 1
    if type(version) is not int or version > newest:
        raise ValueError(
            f"{path}: format {version!r} is newer than this xai_edit {__version__} (format "
            f"{newest}); update xai_edit"
        )
    if not isinstance(header, dict) or header.keys() != entries.keys():
        found = sorted(header) if isinstance(header, dict) else type(header).__name__
        raise ValueError(f"{path}: the header has {found}, expected {sorted(entries)}")
    for name, kind in entries.items():
        if not isinstance(header[name], kind):
            raise ValueError(
                f"{path}: {name!r} in the header is {header[name]!r}, expected a "
                f"{getattr(kind, '__name__', kind)}"
            )
    return header
