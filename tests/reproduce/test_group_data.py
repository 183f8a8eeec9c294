"""Readers of data sets with a spurious attribute, on small folders in the published layouts."""

from __future__ import annotations

import shutil
import tarfile

import pytest
import torch
from PIL import Image

from xai_edit.datasets.image_set import IMAGENET_MEAN, IMAGENET_STD
from xai_edit.reproduce.group_data import celeba, metashift, parity_mnist, waterbirds

BIRDS = "waterbird_complete95_forest2water2"
HEADER = "img_id,img_filename,y,split,place,place_filename"
# label, split and place of each bird; its red value tells the images apart
ROWS = [(0, 0, 0), (1, 0, 1), (1, 2, 0), (0, 1, 1), (0, 0, 1), (1, 2, 1)]
NAMES = ["5_o_Clock_Shadow", "Blond_Hair", "Male", "Young"]
FACES = [(-1, 1, 0), (1, -1, 0), (1, 1, 2), (-1, -1, 1), (1, -1, 2)]  # blond, male, split


def picture(path, red, size=(40, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 20, 30)).save(path, quality=100)


def reds(images):
    """The red value of each image, as its batches have it, and all labels and attributes."""
    inputs, labels, attribute = (torch.cat(part) for part in zip(*images, strict=True))
    assert inputs.shape[1:] == (3, images.side, images.side)
    values = (inputs[:, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]).mean((1, 2)) * 255
    return values.round().int().tolist(), labels.tolist(), attribute.tolist()


@pytest.fixture
def birds(tmp_path):
    lines = [HEADER]
    for number, (label, split, place) in enumerate(ROWS):
        name = f"{number:03}.Some_Bird/Bird_{number}.jpg"
        picture(tmp_path / BIRDS / name, 10 * number)
        lines.append(f"{number},{name},{label},{split},{place},/f/forest/1.jpg")
    (tmp_path / BIRDS / "metadata.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ([0, 10, 40], [0, 1, 0], [0, 1, 1])),
        ("val", ([30], [0], [1])),
        ("test", ([20, 50], [1, 1], [0, 1])),
    ],
)
def test_waterbirds_gives_bird_and_background_of_each_split(birds, split, expected):
    values, labels, places = reds(waterbirds(birds, split, side=16))
    assert values == pytest.approx(expected[0], abs=2)
    assert (labels, places) == expected[1:]


def packed(folder, table, names, header, rows, size):
    folder.mkdir()
    with tarfile.open(folder / "all.tar", "w") as archive:
        for number, name in enumerate(names):
            picture(folder.parent / "one.jpg", 10 * number, size)
            archive.add(folder.parent / "one.jpg", name)
    (folder / table).write_text("\n".join([header, *rows]) + "\n")


def test_waterbirds_in_one_tar_file_are_squashed(tmp_path):
    names = [f"bird/{number}.jpg" for number in range(len(ROWS))]
    rows = [f"{n},{names[n]},{y},{split},{place},-" for n, (y, split, place) in enumerate(ROWS)]
    packed(tmp_path / "waterbirds", "metadata.csv", names, HEADER, rows, (40, 50))
    values, labels, places = reds(waterbirds(tmp_path, "train", side=16))
    assert values == pytest.approx([0, 10, 40], abs=2)
    assert (labels, places) == ([0, 1, 0], [0, 1, 1])
    with tarfile.open(tmp_path / "waterbirds" / "all.tar", "w"):
        pass
    with pytest.raises(FileNotFoundError, match=r"all.tar has no bird/0.jpg"):
        waterbirds(tmp_path, "train", side=16)


def test_faces_in_one_tar_file_are_whole_and_those_added_are_left_out(tmp_path):
    header = "file,split,natural_sample,Blond_Hair,Male"
    rows = ["0.jpg,0,1,1,0", "1.jpg,0,0,1,1", "2.jpg,0,1,0,1", "3.jpg,2,1,0,0"]
    packed(tmp_path / "celeba", "celeba.csv", [f"{n}.jpg" for n in range(4)], header, rows, (8, 10))
    images = celeba(tmp_path, "train")
    assert next(iter(images))[0].shape == (2, 3, 10, 8)
    assert (images.labels.tolist(), images.attribute.tolist()) == ([1, 0], [0, 1])


def test_images_are_opened_with_their_batch(birds):
    images = waterbirds(birds, "train", side=8)
    (birds / BIRDS / "004.Some_Bird" / "Bird_4.jpg").unlink()
    two = images[torch.tensor([0, 1])]
    assert len(reds(two)[0]) == 2
    with pytest.raises(FileNotFoundError, match="Bird_4"):
        list(images)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (",1,2,0,", ",7,2,0,", r"metadata.csv, line 4: y is '7'; it is one of 0, 1"),
        (",1,2,0,", ",1,2,,", r"line 4: place is ''"),
        (",1,2,0,", ",1,3,0,", r"line 4: split is '3'; it is one of 0, 1, 2"),
        (",1,2,0,", ",1,2,", r"line 4: 5 values for 6 columns"),
        ("place,", "background,", r"has no column place"),
    ],
)
def test_a_wrong_row_of_metadata_is_named(birds, old, new, told):
    table = birds / BIRDS / "metadata.csv"
    text = table.read_text()
    assert text.count(old) == 1
    table.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=told):
        waterbirds(birds, "train")


def test_waterbirds_that_are_missing_are_named(birds, tmp_path_factory):
    shutil.rmtree(birds / BIRDS / "001.Some_Bird")
    with pytest.raises(FileNotFoundError, match=r"Bird_1.jpg is missing, and 0 more of the 3"):
        waterbirds(birds, "train")
    assert len(waterbirds(birds, "test")) == 2
    with pytest.raises(FileNotFoundError, match=r"metadata.csv is missing; https://nlp.stanford"):
        waterbirds(tmp_path_factory.mktemp("empty"), "train")
    with pytest.raises(
        ValueError, match="split: 'valid' given; it is one of 'train', 'val', 'test'"
    ):
        waterbirds(birds, "valid")


@pytest.fixture(params=["txt", "csv"])
def faces(request, tmp_path):
    """Five faces as torchvision keeps them, or as Kaggle does."""
    folder, names = tmp_path / "celeba", [f"{number:06}.jpg" for number in range(1, 6)]
    told = [["-1", str(blond), str(male), "1"] for blond, male, _ in FACES]
    rows = [[name, *values] for name, values in zip(names, told, strict=True)]
    parts = [[name, str(split)] for name, (*_, split) in zip(names, FACES, strict=True)]
    if request.param == "txt":
        images = folder / "img_align_celeba"
        lists = [["5"], NAMES, *rows], parts
        texts = ["\n".join("  ".join(row) for row in part) + "\n" for part in lists]
    else:
        images = folder / "img_align_celeba" / "img_align_celeba"
        lists = [["image_id", *NAMES], *rows], [["image_id", "partition"], *parts]
        texts = ["\r\n".join(",".join(row) for row in part) + "\r\n" for part in lists]
    for number, name in enumerate(names):
        picture(images / name, 10 * number, size=(36, 44))
    for name, text in zip(("list_attr_celeba", "list_eval_partition"), texts, strict=True):
        (folder / f"{name}.{request.param}").write_bytes(text.encode())
    return tmp_path, request.param


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ([0, 10], [0, 1], [1, 0])),
        ("val", ([30], [0], [0])),
        ("test", ([20, 40], [1, 1], [1, 0])),
    ],
)
def test_celeba_gives_hair_and_the_attribute_in_both_layouts(faces, split, expected):
    values, labels, male = reds(celeba(faces[0], split, side=16))
    assert values == pytest.approx(expected[0], abs=2)
    assert (labels, male) == expected[1:]


def test_faces_that_do_not_fit_are_told(faces):
    folder, kind = faces
    attributes = folder / "celeba" / f"list_attr_celeba.{kind}"
    text = attributes.read_text()
    head, fourth = text.partition("000004.jpg")[:2]
    line = 6 if kind == "txt" else 5
    separator = "  " if kind == "txt" else ","
    wrong = [fourth, "-1", "0", "-1", "1"]
    attributes.write_text(head + separator.join(wrong) + "\n")
    with pytest.raises(ValueError, match=rf"celeba.{kind}, line {line}: Blond_Hair is '0'"):
        celeba(folder, "train")
    attributes.write_text(head)  # cut off, as by a download that broke
    with pytest.raises(ValueError, match=r"2 are in one only, such as 000004.jpg"):
        celeba(folder, "train")
    attributes.write_text(text.replace("Male", "Female"))
    with pytest.raises(ValueError, match="has no column Male"):
        celeba(folder, "train")
    attributes.unlink()
    with pytest.raises(FileNotFoundError, match=r"list_attr_celeba.txt is missing.*download=True"):
        celeba(folder, "train")


def test_faces_without_images_are_told(faces):
    images = faces[0] / "celeba" / "img_align_celeba"
    next(images.glob("**/000003.jpg")).unlink()
    with pytest.raises(FileNotFoundError, match=r"000003.jpg is missing, and 0 more of the 2"):
        celeba(faces[0], "test")
    shutil.rmtree(images)
    with pytest.raises(FileNotFoundError, match=r"img_align_celeba is missing; torchvision"):
        celeba(faces[0], "train")


@pytest.fixture(params=["metashifts/MetaDatasetCatDog", "Domain-Generalization-Cat-Dog"])
def pets(request, tmp_path):
    counts = {"train/cat/cat(sofa)": 2, "train/cat/cat(bed)": 1, "train/dog/dog(bench)": 1}
    counts |= {"train/dog/dog(bike)": 2, "test/cat/cat(shelf)": 12, "test/dog/dog(shelf)": 8}
    counts["train/dog/dog(cabinet)"] = 1  # of another experiment of Liang and Zou
    start = 0
    for place, count in counts.items():
        for number in range(count):
            picture(tmp_path / request.param / place / f"{number:02}.jpg", 5 * (start + number))
        start += count
    return tmp_path


def test_metashift_trains_on_four_backgrounds_and_tests_on_a_fifth(pets):
    values, labels, outdoors = reds(metashift(pets, "train", side=16))
    assert values == pytest.approx([0, 5, 10, 15, 20, 25], abs=2)  # not dog(cabinet)
    assert labels == [0, 0, 0, 1, 1, 1]
    assert outdoors == labels
    parts = [reds(metashift(pets, split, side=16)) for split in ("val", "test")]
    assert [len(part[0]) for part in parts] == [3, 17]
    told = sorted(parts[0][0] + parts[1][0])  # each image on a shelf in one of the two
    assert told == pytest.approx([5 * number for number in range(6, 26)], abs=2)
    for values, labels, outdoors in parts:
        assert labels == [int(value > 5 * 17.5) for value in values]
        assert set(outdoors) == {0}
    assert reds(metashift(pets, "val", side=16)) == parts[0]


def test_pets_that_are_missing_are_named(pets, tmp_path_factory):
    (place,) = pets.glob("**/dog(bike)")
    for file in place.iterdir():
        file.unlink()
    assert len(metashift(pets, "train")) == 4
    place.rmdir()
    with pytest.raises(FileNotFoundError, match=r"dog\(bike\) is missing; https.*DISC"):
        metashift(pets, "train")
    with pytest.raises(FileNotFoundError, match=r"MetaDatasetCatDog/train/cat/cat\(sofa\)"):
        metashift(tmp_path_factory.mktemp("empty"), "train")


def test_parity_of_the_real_digits(data_folder):
    images = parity_mnist(data_folder, "test")
    assert torch.equal(images.labels, images.attribute % 2)
    # as published: 980 zeros, 1135 ones, ...
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert images.attribute.bincount().tolist() == counts
    assert images.labels.bincount().tolist() == [sum(counts[::2]), sum(counts[1::2])]
    assert images.first(5).attribute.bincount().tolist() == [5] * 10
