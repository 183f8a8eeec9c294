"""Files that are either whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def require_folder(path: str | Path) -> Path:
    """Return a path in whose folder a file can be made, or raise FileNotFoundError."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {str(path.parent)!r} does not exist")
    return path


@contextmanager
def _written(path: str | Path) -> Iterator[str]:
    """Yield the name of a temporary file beside ``path`` and rename it into place on leaving."""
    path = require_folder(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; a result is as readable as any other new file.
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write ``content`` to a temporary file beside ``path``, then rename it into place.

    Raises
    ------
    OSError
        If the folder is missing or cannot be written; ``path`` is then as it was.
    """
    with _written(path) as temporary:
        Path(temporary).write_bytes(content)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], kind: str, header: str
) -> None:
    """Write tensors and a header text to a safetensors file, atomically.

    The metadata has one entry, ``kind``: safetensors writes several in random order, and equal
    content shall give equal bytes. Memory-mapped tensors are not read into memory.
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
        except SafetensorError as problem:  # what it makes of a full disk
            raise OSError(f"{path}: cannot be written ({problem})") from problem


def read_safetensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], str]:
    """Read what `write_safetensors` wrote: the tensors, memory-mapped, and the header text.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a whole file of this kind.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")
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


def unsealed(path: str | Path, tensors: Mapping[str, Tensor], content: str) -> str:
    """Return the text of a header that `sealed` made, or raise ValueError if a bit differs."""
    given, _, text = content.partition("\n")
    if given != checksum(tensors, text):
        raise ValueError(f"{path}: the checksum does not match; the file was changed")
    return text


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return a digest of tensors, with their names, kinds and shapes, and a text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_header(path: str | Path, text: str, entries: Mapping[str, type]) -> dict[str, Any]:
    """Read a header text that is a JSON object with these entries, each of its type.

    Raises
    ------
    ValueError
        If it is not, or has other entries.
    """
    try:
        header = json.loads(text)
    except ValueError as problem:
        raise ValueError(
            f"{path}: the header is no JSON ({problem}); the file is damaged"
        ) from None
    if not isinstance(header, dict) or header.keys() != entries.keys():
        told = sorted(header) if isinstance(header, dict) else type(header).__name__
        raise ValueError(f"{path}: the header has {told}, expected {sorted(entries)}")
    for name, kind in entries.items():
        if not isinstance(header[name], kind):
            raise ValueError(
                f"{path}: {name!r} in the header is {header[name]!r}, expected a {kind.__name__}"
            )
    return header
