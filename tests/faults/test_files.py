"""Damaged and foreign files, files that cannot be written, Ctrl-C: a clear error, nothing lost."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import xai_edit as xe
from xai_edit.core.files import sealed, write_atomically, write_safetensors
from xai_edit.edits import model_edit as edits
from xai_edit.pruning import schedule


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()


class Edit:
    kind, error = edits.KIND, xe.core.EditFileError

    def save(self, path):
        new = {"0.weight": (torch.tensor([1, 4]), torch.tensor([2.0, 3.0]))}
        xe.ModelEdit.between(small(), new, {"operator": "test"}).save(path)

    def load(self, path):
        return xe.ModelEdit.load(path)

    def use(self, path, model):
        self.load(path).apply(model)


class Subspaces:
    kind, error = "xai_edit.subspaces", ValueError

    def save(self, path):
        basis = torch.linalg.qr(torch.arange(9.0).double().view(3, 3) + torch.eye(3)).Q
        xe.Subspaces(basis[:, :2].contiguous(), (1, 1), torch.ones(3).double()).save(path)

    def load(self, path):
        return xe.Subspaces.load(path)

    def use(self, path, model):
        with xe.ablated(model, "0", self.load(path), [0]):
            model(torch.rand(2, 2))


class Scores:
    kind, error = "xai_edit.unit_scores", ValueError

    def save(self, path):
        data = [(torch.rand(8, 2), torch.arange(8) % 2)]
        xe.score_units(small(), data, xe.Taylor(), k=1).save(path)

    def load(self, path):
        return xe.UnitScores.load(path)

    def use(self, path, model):
        width = model[0].in_features
        xe.deletion_curve(model, [(torch.rand(4, width), torch.arange(4) % 2)], self.load(path))


class Checkpoint:
    kind, error = schedule.KIND, ValueError

    def at(self, path, model):
        return schedule._Checkpoint(Path(path), schedule.checksum(model.state_dict(), "a plan"))

    def save(self, path):
        self.at(path, small()).write(small(), [torch.tensor([1])], [{"share": 0.25, "removed": 1}])

    def load(self, path):
        self.use(path, small())

    def use(self, path, model):
        self.at(path, model).restored(model, [torch.zeros(0)])


KINDS = [Edit(), Subspaces(), Scores(), Checkpoint()]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)


@pytest.fixture
def path(tmp_path, kind):
    kind.save(tmp_path / "saved.safetensors")
    return tmp_path / "saved.safetensors"


# Damaged and foreign files


def changed(path, kind, header=None, tensors=None):
    """Write a file anew with another header or tensors, and a checksum that is right."""
    with safe_open(path, "pt") as file:
        own = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        text = file.metadata()[kind.kind].partition("\n")[2]
    text = json.dumps({**json.loads(text), **(header or {})})
    own |= tensors or {}
    write_safetensors(path, own, kind.kind, sealed(own, text))


@every_kind
def test_a_file_of_a_newer_format_says_so(kind, path):
    changed(path, kind)
    kind.load(path)
    changed(path, kind, {"format": 2, "more": "news"})
    with pytest.raises(kind.error, match=r"saved\.safetensors: format 2 is newer .* update"):
        kind.load(path)


@every_kind
def test_a_file_of_another_kind_says_so(kind, path, tmp_path):
    for other in KINDS:
        if other is not kind:
            other.save(tmp_path / "other")
            with pytest.raises(kind.error, match=f"other: .* but not of {kind.kind}"):
                kind.load(tmp_path / "other")


def features(path):
    xe.collect_features(small(), [torch.ones(2, 2)], layer="0").save(path)


def patterns(path):
    xe.fit_patterns(small(), [torch.linspace(-1, 1, 16).view(8, 2)]).save(path)


def log(path):
    log, model = xe.comparisons.AmnesiacLog(), small()
    with log.recording(model, torch.tensor([0])):
        model[0].weight.data += 1
    log.save(path)


SEALED_FILES = [  # the kind that files had from the beginning, what writes one, what reads it
    ("xai_edit.edit", KINDS[0].save, KINDS[0].load),
    ("xai_edit.subspaces", KINDS[1].save, KINDS[1].load),
    ("xai_edit.unit_scores", KINDS[2].save, KINDS[2].load),
    ("xai_edit.pruning", KINDS[3].save, KINDS[3].load),
    ("xai_edit.patterns", patterns, xe.lrp.Patterns.load),
    ("xai_edit.amnesiac", log, xe.comparisons.AmnesiacLog.load),
]
# Features have no checksum, since they stay on the disk.
WRITTEN = [*SEALED_FILES, ("xai_edit.features", features, xe.concepts.Features.load)]


@pytest.mark.parametrize(("kind", "write", "read"), SEALED_FILES, ids=[n[0] for n in SEALED_FILES])
def test_a_damaged_file_is_refused_by_name(tmp_path, kind, write, read):
    path = tmp_path / "saved.safetensors"
    write(path)
    read(path)
    content = path.read_bytes()
    assert len(content) < 3000
    cut_short = [content[:length] for length in range(len(content))]
    flipped = [bytearray(content) for _ in content]
    for at, damaged in enumerate(flipped):
        damaged[at] ^= 1 << at % 8
    for damaged in (*cut_short, *flipped, content + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"saved\.safetensors: "):
            read(path)


@pytest.mark.parametrize(("kind", "write", "read"), WRITTEN, ids=[one[0] for one in WRITTEN])
def test_files_of_the_first_kinds_are_read(tmp_path, kind, write, read):
    path = tmp_path / "file"
    write(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        (header,) = file.metadata().values()
    write_safetensors(path, tensors, kind, header)
    read(path)


def test_all_kinds_follow_one_pattern():
    package = Path(xe.__file__).parent
    code = "\n".join(file.read_text("utf-8") for file in package.rglob("*.py"))
    kinds = re.findall(r'(?m)^KIND = "(.*)"$', code)
    assert len(kinds) >= len(WRITTEN)
    assert [kind for kind in kinds if not re.fullmatch(r"xai_edit\.[a-z_]+", kind)] == []


def test_a_file_of_another_model_is_refused_and_the_model_stays(tmp_path, unchanged):
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    wider = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    for kind in KINDS:
        kind.save(tmp_path / "saved")
        kind.use(tmp_path / "saved", small())
    refused = [
        (KINDS[0], other, "'0.weight' differs from the model"),
        (KINDS[0], wider, "'0.weight' has shape"),
        (KINDS[1], wider, "subspaces: of 3 channels, but the layer has 4"),
        (KINDS[2], wider, "scores: 3 for the 4 units of layer '0'"),
        (KINDS[3], other, "of another model, data or plan"),
    ]
    for kind, model, message in refused:
        kind.save(tmp_path / "saved")
        check = unchanged(model)
        with pytest.raises(ValueError, match=message):
            kind.use(tmp_path / "saved", model)
        check()


WRONG_SHAPES = [["3", 2], [2], [2**40, 2**40], [-3, -2]]
WRONG_HEADERS = [{"shapes": []}, {"shapes": {"w": [2]}}, {"origin": 0}, {"format": "1"}]
WRONG_HEADERS += [{"shapes": {"0.weight": shape}} for shape in WRONG_SHAPES]
WRONG_INDICES = [[4, 1], [-1, 1], [1, 1], [1.0, 4.0], [0, 1, 4]]
WRONG = [(header, {}) for header in WRONG_HEADERS]
WRONG += [({}, {"0.weight/index": torch.tensor(index)}) for index in WRONG_INDICES]
WRONG += [({}, {"0.weight/old": torch.zeros(2).double()})]
WRONG += [({}, {"0.weight/new": torch.tensor([2.0, value])}) for value in (torch.nan, torch.inf)]


@pytest.mark.parametrize("kind", [Edit()], ids=["Edit"])
def test_an_edit_that_is_none_is_refused_though_its_checksum_is_right(kind, path):
    for header, tensors in WRONG:
        kind.save(path)
        changed(path, kind, header, tensors)
        with pytest.raises(xe.core.EditFileError, match=r"saved\.safetensors: "):
            kind.load(path)


@every_kind
def test_what_was_loaded_stays_when_the_file_is_written_over(kind, path):
    loaded = kind.load(path)
    printed = str(loaded)
    path.write_bytes(b"")  # a mapped file would end the process with a bus error
    assert str(loaded) == printed
    if isinstance(kind, Subspaces):
        assert torch.isfinite(loaded.basis).all()


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@every_kind
def test_a_pickle_is_never_opened(kind, tmp_path):
    path, mark = tmp_path / "evil.safetensors", tmp_path / "mark"
    torch.save(Evil(mark), tmp_path / "torch")
    for content in (pickle.dumps(Evil(mark)), (tmp_path / "torch").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(kind.error, match=r"evil\.safetensors"):
            kind.load(path)
        assert not mark.exists()


# Files that cannot be written


@contextmanager
def no_room():
    """Let no file grow beyond 64 bytes."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def plan_with_checkpoint(path, model, batches):
    operator = xe.RelevancePruning(0.5, xe.WeightMagnitude(), steps=2)
    operator.plan(model, batches, checkpoint=path)


def features_on_disk(path, model, batches):
    xe.collect_features(model, batches, layer="conv1", on_disk=path)


def plain_bytes(path, model, batches):
    write_atomically(path, bytes(5000))


WRITERS = [
    *(lambda path, model, batches, kind=kind: kind.save(path) for kind in KINDS),
    *(plan_with_checkpoint, features_on_disk, plain_bytes),
]
every_writer = pytest.mark.parametrize(
    "write", WRITERS, ids=["edit", "subspaces", "scores", "checkpoint", "plan", "features", "bytes"]
)


def old_file(folder, write):
    """Write a file that is to be written over, except where it would be read first."""
    path = folder / "saved.safetensors"
    if write is not plan_with_checkpoint:
        path.write_bytes(b"old")
    return path


def contents(folder):
    return {each.name: each.read_bytes() for each in folder.iterdir()}


@every_writer
def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path, write, plain, batches, unchanged):
    path = old_file(tmp_path, write)
    check, before = unchanged(plain), contents(tmp_path)
    with no_room(), pytest.raises(OSError, match=r"saved\.safetensors|activations"):
        write(path, plain, batches)
    check()
    assert contents(tmp_path) == before


@contextmanager
def as_nobody():
    """Give up the rights of the superuser, to whom no folder is closed."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def closed():
    """A folder that can be read but not written, with an old file."""
    folder = Path(tempfile.mkdtemp())
    (folder / "saved.safetensors").write_bytes(b"old")
    (folder / "saved.safetensors").chmod(0o444)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@every_writer
def test_a_closed_folder_is_an_error_and_stays_as_it_was(closed, write, plain, batches, unchanged):
    write(closed.parent / f"{closed.name}.first", plain, batches)  # imports all there is to import
    (closed.parent / f"{closed.name}.first").unlink()
    name = "new" if write is plan_with_checkpoint else "saved.safetensors"
    check = unchanged(plain)
    with as_nobody(), pytest.raises(PermissionError, match=name):
        write(closed / name, plain, batches)
    check()
    assert [each.read_bytes() for each in closed.iterdir()] == [b"old"]


@every_writer
def test_a_path_below_a_file_is_an_error(tmp_path, write, plain, batches):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match=r"file.*does not exist"):
        write(tmp_path / "file" / "saved.safetensors", plain, batches)
    assert contents(tmp_path) == {"file": b"old"}


@every_writer
def test_a_link_is_followed(tmp_path, write, plain, batches):
    link = tmp_path / "saved.safetensors"
    link.symlink_to(tmp_path / "target")
    write(link, plain, batches)
    assert link.is_symlink()
    assert (tmp_path / "target").stat().st_size > 64


def test_an_edit_is_not_saved_over_a_device(monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("/dev/null would be gone"))
    with pytest.raises(OSError, match=r"/dev/null: it is no regular file"):
        Edit().save("/dev/null")
    assert Path("/dev/null").is_char_device()


@every_writer
def test_what_is_no_regular_file_is_neither_replaced_nor_waited_for(
    tmp_path, write, plain, batches
):
    pipe = tmp_path / "saved.safetensors"
    os.mkfifo(pipe)
    with pytest.raises((OSError, ValueError), match=r"saved\.safetensors: .*it is no regular file"):
        write(pipe, plain, batches)
    assert pipe.is_fifo()
    assert [*tmp_path.iterdir()] == [pipe]


@every_kind
def test_a_pipe_is_refused_and_not_waited_for(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(kind.error, match="pipe: cannot be read; it is no regular file"):
        kind.load(tmp_path / "pipe")


# Ctrl-C


@pytest.fixture(autouse=True)
def ctrl_c():
    """Let SIGINT raise KeyboardInterrupt also where the tests run in the background."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


@every_writer
@pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
def test_an_interrupted_write_leaves_the_old_file_and_no_part(
    tmp_path, write, call, plain, batches, unchanged, monkeypatch
):
    path = old_file(tmp_path, write)
    check, before = unchanged(plain), contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, lambda *_, **__: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            write(path, plain, batches)
    check()
    assert contents(tmp_path) == before


def scribbling(model, inputs, targets, layers):
    """A scorer that writes into the model and is interrupted."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.train()
    model.register_forward_hook(print)
    signal.raise_signal(signal.SIGINT)


@dataclass
class Twice:
    """Data whose second batch is interrupted."""

    batches: list

    def __iter__(self):
        yield self.batches[0]
        signal.raise_signal(signal.SIGINT)


PATH = xe.PathPerturbation("fc1", scorer=scribbling)
DAMPENING = xe.comparisons.SelectiveSynapticDampening(2)
SCORES = xe.UnitScores({"fc1": torch.arange(12.0).double()}, 1)
COLLECTED = {"layer": "relu1", "scorer": xe.LRP(), "on_disk": "features"}
INTERRUPTED = {
    "score_units": lambda m, d, cut: xe.score_units(m, d, scribbling),
    "compare_scorers": lambda m, d, cut: xe.compare_scorers(m, d, {"a": scribbling}),
    "RelevancePruning": lambda m, d, cut: xe.RelevancePruning(0.5, scribbling).plan(m, d),
    "PathPerturbation": lambda m, d, cut: PATH.plan(m, d, target=3),
    "LRP": lambda m, d, cut: xe.score_units(m, cut, xe.LRP("epsilon-plus")),
    "SingleWeight": lambda m, d, cut: xe.SingleWeight().plan(m, cut, target=3),
    "FictitiousClass": lambda m, d, cut: xe.FictitiousClass().plan(m, cut),
    "LEACE": lambda m, d, cut: xe.comparisons.LEACE().plan(m, cut),
    "SelectiveSynapticDampening": lambda m, d, cut: DAMPENING.plan(m, cut, target=3),
    "collect_features": lambda m, d, cut: xe.collect_features(m, cut, **COLLECTED),
    "evaluate_groups": lambda m, d, cut: xe.evaluate_groups(m, cut),
    "deletion_curve": lambda m, d, cut: xe.deletion_curve(m, cut, SCORES),
    "fit_patterns": lambda m, d, cut: xe.fit_patterns(m, cut),
    "random_labels": lambda m, d, cut: xe.comparisons.random_labels(m, cut, target=3),
    "boundary_shrink": lambda m, d, cut: xe.comparisons.boundary_shrink(m, cut, target=3),
}


@pytest.mark.parametrize("name", [*INTERRUPTED])
def test_a_model_stays_as_it_was_after_ctrl_c(
    name, plain, batches, unchanged, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = [(x, y, torch.arange(len(y)) % 2) for x, y in batches]
    check = unchanged(plain)
    with pytest.raises(KeyboardInterrupt):
        INTERRUPTED[name](plain, data, Twice(data))
    check()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("undo", [False, True])
def test_an_edit_that_is_interrupted_half_way_is_taken_back(
    plain, batches, unchanged, monkeypatch, undo
):
    edit = xe.RelevancePruning(0.5, xe.WeightMagnitude()).plan(plain, batches)
    assert len(edit.changes) > 1
    if undo:
        edit.apply(plain)
    check = unchanged(plain)
    put, calls = xe.edits.Change.put, []

    def interrupted(*arguments):
        put(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(xe.edits.Change, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        (edit.undo if undo else edit.apply)(plain)
    check()
    (edit.undo if undo else edit.apply)(plain)
