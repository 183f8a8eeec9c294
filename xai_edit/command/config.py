"""Options in a TOML file: ``--config run.toml``, which each run writes into its folder."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from xai_edit._version import __version__
from xai_edit.command.options import COMMANDS
from xai_edit.pages import RESULTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG = "run.toml"
STARTED = "started-in"  # entry of the folder in which a run was started, relative to the file
OF_ONE_RUN = ("out", "config", "force", "quiet")  # not repeated


def with_config(arguments: Sequence[str]) -> tuple[list[str], Path]:
    """Return the arguments with those of ``--config FILE`` put before them, so that they yield.

    Where the file names the folder that its run was started in, its paths and modules are those
    that were meant there; that folder is the second value, else the current one. ValueError if the
    file is no TOML file of options, or of another command; OSError if it cannot be read.
    """
    command, *given = arguments
    file = Path(str(paired(given)["config"]))
    if not file.is_file():
        raise FileNotFoundError(
            f"config: {file}: no such file; give run.toml of a run, or your own"
        )
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"config: {file} is no TOML file ({problem})") from None
    if (of := content.pop("command", command)) != command:
        raise ValueError(f"config: {file} is of xai-edit {of}, not of xai-edit {command}")
    either = {one.name for one in COMMANDS[command].options if one.instead}
    instead = not either.isdisjoint(paired(given))
    started = (file.parent.resolve() / str(content.pop(STARTED, Path.cwd()))).resolve()
    if started != Path.cwd():
        sys.path[:0] = [str(started), str(Path.cwd())]
    read: list[str] = []
    for name, value in _moved(command, content, started, Path.cwd()).items():
        if not (instead and name in either):
            read += _arguments(file, name, value)
    return [command, *read, *given], started


def paired(arguments: Sequence[str]) -> dict[str, str | bool]:
    """Return the options of a command line by name; True for one without a value."""
    pairs: dict[str, str | bool] = {}
    name = None
    for one in arguments:
        if one.startswith("--"):
            name, _, value = one[2:].partition("=")
            pairs[name] = value or True
        elif name is not None:
            pairs[name], name = one, None
    return pairs


def repeatable(arguments: Sequence[str]) -> str:
    """Return a command line as text, without the options that change no edit."""
    command, *given = arguments
    words = ["xai-edit", command]
    for name, value in paired(given).items():
        if name not in (*OF_ONE_RUN, "json"):
            words += [f"--{name}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def write_config(folder: Path, arguments: Sequence[str], started: Path) -> None:
    """Write the options of a run, for `with_config`, which reads their paths from ``started``."""
    from xai_edit.core.files import write_atomically  # takes long to import

    command, *given = arguments
    lines = [f"# xai_edit {__version__}; repeat with xai-edit {command} --config {CONFIG} --out …"]
    lines.append(f"command = {json.dumps(command)}")
    with suppress(ValueError):  # on another drive
        place = Path(os.path.relpath(started, folder.resolve())).as_posix()
        lines.append(f"{STARTED} = {json.dumps(place, ensure_ascii=False)}")
    for name, value in _moved(command, paired(given), Path.cwd(), started).items():
        if name not in OF_ONE_RUN:
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    write_atomically(folder / CONFIG, "\n".join([*lines, ""]).encode())


def require_unused(folder: Path, command: str, *, force: bool) -> None:
    """Raise FileExistsError if a folder holds a run; with ``force``, one of another command.

    Its other files, such as a smaller network, would stay beside the new page.
    """
    for name in RESULTS:
        file = folder / name
        if file.is_file() and not force:
            raise FileExistsError(
                f"out: {folder} holds a run ({name}); give another folder, or --force to write "
                "over it"
            )
        if file.is_file() and (of := _command(file)) not in (command, None):
            raise FileExistsError(
                f"out: {folder} holds a run of xai-edit {of}; --force writes over one of the same "
                "command alone; give another folder"
            )


def _moved(command: str, values: Mapping[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """Return the values of options, of which paths from an old folder are now from a new one."""
    own = COMMANDS[command]
    kinds = {one.name: one.names.partition(" ")[2] for one in (*own.options, *own.data)}
    moved = dict(values)
    for name, value in values.items():
        path = old != new and kinds.get(name) in ("FILE", "DIR", "DATA") and isinstance(value, str)
        if path and (old / value).exists():
            moved[name] = Path(os.path.relpath(old / value, new)).as_posix()
    return moved


def _command(results: Path) -> str | None:
    """Return the command that wrote a file of results; None of a damaged file."""
    try:
        kind = json.loads(results.read_text(encoding="utf-8"))["run"]
    except (ValueError, KeyError, TypeError):
        return None
    return "score" if kind == "compare" else str(kind)


def _arguments(file: Path, name: str, value: Any) -> list[str]:
    """Return one entry of the file as arguments; a list is several values between commas."""
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str | int | float) for part in parts):
        raise ValueError(f"config: {file}: {name} is {value!r}; give a word, a number or a list")
    return [f"--{name}={','.join(map(str, parts))}"]
