"""Images in files: bit depth, turning, transparency, links and other files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from xai_edit.command.load import load_images
from xai_edit.datasets.image_files import read_image

RAMP = np.linspace(0, 65535, 256).reshape(16, 16)
BYTES = (RAMP / 257).round().astype(np.uint8)  # 0 to 255
TURNED = [  # EXIF orientation, and what a viewer does with the stored pixels
    (1, lambda a: a),
    (2, np.fliplr),
    (3, lambda a: np.rot90(a, 2)),
    (4, np.flipud),
    (5, np.transpose),
    (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: np.rot90(a, 2).T),
    (8, np.rot90),
]


def pixels(file):
    return np.asarray(read_image(file))


@pytest.mark.parametrize("name", ["deep.png", "deep.tiff"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name):
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / name)
    assert np.array_equal(pixels(tmp_path / name), np.stack([BYTES] * 3, -1))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_of_unknown_range_are_refused(tmp_path, dtype):
    (tmp_path / "photos").mkdir()
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "photos" / "deep.tiff")
    with pytest.raises(ValueError, match=r"data: .*deep\.tiff .*32 bits .*; save it with 8"):
        load_images(str(tmp_path / "photos"))[0]


@pytest.mark.parametrize(("orientation", "turn"), TURNED)
def test_a_photo_is_turned_as_its_exif_entry_says(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = BYTES[:8]
    Image.fromarray(stored).save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "photo.png")[..., 0], turn(stored))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_lies_on_white(tmp_path, mode):
    colour = np.zeros((4, 2, 4), np.uint8)
    colour[..., 3] = np.array([0, 255, 255, 255])[:, None]
    colour[1] = 255
    image = Image.fromarray(colour)
    if mode in ("P", "RGB"):  # one colour is the transparent one
        image = Image.fromarray(np.array([[0, 0], [1, 1], [2, 2], [2, 2]], np.uint8), "P")
        image.putpalette([9, 9, 9, 255, 255, 255, 0, 0, 0])
        image = image.convert("RGB") if mode == "RGB" else image
        transparent = (9, 9, 9) if mode == "RGB" else 0
        image.save(tmp_path / "icon.png", transparency=transparent)
    else:
        image.convert(mode).save(tmp_path / "icon.png")
    assert pixels(tmp_path / "icon.png")[:, 0, 0].tolist() == [255, 255, 0, 0]


def test_the_first_picture_of_an_animation_is_read(tmp_path):
    first, second = (Image.fromarray(BYTES * at) for at in (1, 0))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    assert np.array_equal(pixels(tmp_path / "moving.gif")[..., 0], BYTES)
    assert len(load_images(str(tmp_path))) == 1


def test_links_that_lead_back_are_followed_once_and_other_files_are_counted(tmp_path):
    far = tmp_path / "far"
    for folder in ("data/a/x", "data/a/y", "data/b", "far"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(BYTES).save(tmp_path / folder / "0.png")
    data = tmp_path / "data"
    for name in ("b/words.txt", "b/.hidden", "b/.0.png", "notes.md"):
        (data / name).write_text("no image")
    for link, target in (("a/up", data), ("a/top", tmp_path), ("a/x/own", data / "a/x")):
        (data / link).symlink_to(target)
    (data / "a/x/other").symlink_to(data / "a/y")
    (data / "a/y/other").symlink_to(data / "a/x")
    (data / "c").symlink_to(far)
    (far / "back").symlink_to(data)
    images = load_images(str(data))
    found = [(path.removeprefix(f"{data}/"), label) for path, label in images.source]
    assert found == [("a/x/0.png", 0), ("a/y/0.png", 0), ("b/0.png", 1), ("c/0.png", 2)]
    assert str(images).startswith("4 of 4 images of 3 classes")
    assert str(images).endswith("; other files, left out: 2")
