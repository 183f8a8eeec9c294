"""Files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write ``content`` to a temporary file beside ``path``, then rename it into place.

    Raises
    ------
    OSError
        If the folder is missing or cannot be written; ``path`` is then as it was.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {str(path.parent)!r} does not exist")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result is as readable as any other new file.
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], kind: str, header: str
) -> None:
    """Write tensors and a header text to a safetensors file, atomically.

    The metadata has one entry, ``kind``: safetensors writes several in random order, and equal
    content shall give equal bytes.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(contiguous, metadata={kind: header}))


def read_safetensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], str]:
    """Read what `write_safetensors` wrote: the tensors and the header text.

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
