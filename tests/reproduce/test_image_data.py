"""The readers of published files, against torchvision and by hand."""

from __future__ import annotations

import gzip
import pickle
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import as_idx
from PIL import Image

from xai_edit.reproduce.image_data import cifar10, cifar100, imagenet, mnist


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("folder", "suffix", "packed"), [("mnist", ".gz", gzip.compress), ("MNIST/raw", "", bytes)]
)
def test_mnist_reads_both_layouts(tmp_path, random, folder, suffix, packed):
    images = random.integers(256, size=(7, 28, 28), dtype=np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    (tmp_path / folder).mkdir(parents=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        (tmp_path / folder / f"t10k-{kind}-ubyte{suffix}").write_bytes(packed(as_idx(array)))
    found = mnist(tmp_path, "test")
    assert found.source[:, 0].tolist() == images.tolist()
    assert found.labels.tolist() == labels.tolist()
    ((inputs, given),) = list(found)
    expected = torchvision.transforms.functional.normalize(
        torch.tensor(images)[:, None] / 255, (0.1307,), (0.3081,)
    )
    assert torch.allclose(inputs, expected)
    assert given.tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("read", "folder", "files", "key"),
    [
        (cifar10, "cifar-10-batches-py", [*(f"data_batch_{n}" for n in range(1, 6))], "labels"),
        (cifar100, "cifar-100-python", ["train"], "fine_labels"),
    ],
)
def test_cifar_reads_torchvisions_files(tmp_path, random, monkeypatch, read, folder, files, key):
    kind = {cifar10: torchvision.datasets.CIFAR10, cifar100: torchvision.datasets.CIFAR100}[read]
    (tmp_path / folder).mkdir()
    for file in files:
        rows = random.integers(256, size=(3, 3072), dtype=np.uint8)
        content = {"data": rows, key: [4, 0, 4]}
        (tmp_path / folder / file).write_bytes(pickle.dumps(content))
    meta = {kind.meta["key"]: ["name"] * 10}
    (tmp_path / folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(kind, "_check_integrity", lambda _: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    found = read(tmp_path, "train")
    assert found.source.shape == (3 * len(files), 3, 32, 32)
    assert found.source[-1].numpy().tobytes() == rows[-1].tobytes()
    assert found.labels.tolist() == [4, 0, 4] * len(files)
    (inputs, _), *_ = read(tmp_path, "train", side=48)
    assert inputs.shape[1:] == (3, 48, 48)


def test_cifar100_reads_a_folder_of_images_a_class(tmp_path, random):
    pixels = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
    for name, count in {"apple": 2, "bear": 1}.items():
        folder = tmp_path / "cifar100" / "train" / name
        folder.mkdir(parents=True)
        for at in range(count):
            Image.fromarray(pixels + np.uint8(at)).save(folder / f"{at}.png")
    found = cifar100(tmp_path, "train")
    assert found.labels.tolist() == [0, 0, 1]
    assert found.source[1].movedim(0, 2).tolist() == (pixels + np.uint8(1)).tolist()
    with pytest.raises(FileNotFoundError, match="no CIFAR100"):
        cifar100(tmp_path, "test")


def test_imagenet_opens_a_folder_a_class(tmp_path, random):
    for name, count in {"n01": 2, "n02": 1}.items():
        folder = tmp_path / "val" / name
        folder.mkdir(parents=True)
        for at in range(count):
            pixels = np.full((40, 60, 3), 100 + at, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{at}.JPEG")
    found = imagenet(tmp_path, "test", side=32)
    assert found.labels.tolist() == [0, 0, 1]
    ((inputs, _),) = list(found)
    assert inputs.shape == (3, 3, 32, 32)
    values = inputs[:, 0].flatten(1)
    assert torch.allclose(values[1], torch.tensor((101 / 255 - 0.485) / 0.229), atol=0.05)
    assert len(next(iter(found[found.labels == 1]))[0]) == 1
    with pytest.raises(FileNotFoundError, match="train is missing"):
        imagenet(tmp_path, "train")
    shutil.copytree(tmp_path / "val", tmp_path / "train")
    assert imagenet(tmp_path, "train", side=32).labels.tolist() == [0, 0, 1]
    shutil.rmtree(tmp_path / "val" / "n01")  # n02 would be class 0 there and 1 in train
    for split in ("train", "test"):
        with pytest.raises(ValueError, match="has 'n01' in one of train and val alone"):
            imagenet(tmp_path, split)


def test_what_is_missing_is_named_with_what_would_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MNIST.*download=True"):
        mnist(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"CIFAR10.*download=True"):
        cifar10(tmp_path, "train")


def test_the_shared_files_hold_what_was_published(data_folder):
    train, test = mnist(data_folder, "train"), mnist(data_folder, "test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.labels.bincount().tolist()[:2] == [5923, 6742]
    images = cifar10(data_folder, "test")
    assert images.labels.bincount().tolist() == [1000] * 10
    mean = images.source.float().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.4942, 0.4851, 0.4504]), atol=1e-3)


@pytest.mark.parametrize("wrong", ["cut short or damaged", "not one label for each train image"])
def test_mnist_of_which_a_part_is_missing_is_refused(tmp_path, random, wrong):
    images = random.integers(256, size=(7, 28, 28), dtype=np.uint8)
    labels = np.arange(5 if wrong.startswith("not") else 7, dtype=np.uint8)
    (tmp_path / "mnist").mkdir()
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        packed = gzip.compress(as_idx(array))
        end = len(packed) // 2 if wrong.startswith("cut") and array is images else None
        (tmp_path / "mnist" / f"train-{kind}-ubyte.gz").write_bytes(packed[:end])
    with pytest.raises(ValueError, match=wrong):
        mnist(tmp_path, "train")
