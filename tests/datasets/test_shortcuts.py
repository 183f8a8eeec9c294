"""Planted shortcuts: exact shares, pixels against blends by hand, balanced groups."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

import xai_edit as xe
from xai_edit.datasets.image_set import ImageSet
from xai_edit.datasets.shortcuts import Colours, Mark, Shortcut

RED_GREEN = Colours([(255, 0, 0), (0, 255, 0)])
HUES = [colorsys.hsv_to_rgb(hue / 10, 1, 1) for hue in range(10)]
TEN = Colours([tuple(round(255 * value) for value in hue) for hue in HUES])


def image_set(labels, channels=1, side=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = len(labels), channels, side, side
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.as_tensor(labels), (0.5,) * channels, (0.25,) * channels, side)


def shown(images):
    """The pixels of all batches, 0…255, with labels and attributes."""
    inputs, labels, attribute = (torch.cat(part) for part in zip(*images, strict=True))
    return ((inputs * 0.25 + 0.5) * 255).round().int(), labels, attribute


@pytest.fixture
def half_red():
    """A mark of 2×3 whose opacities are 0, 51 and 255 of 255, in columns."""
    picture = torch.zeros(4, 2, 3, dtype=torch.uint8)
    picture[0], picture[1], picture[2] = 200, 100, 40
    picture[3] = torch.tensor([0, 51, 255])
    return picture


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.9, 0.95, 0.97, 1.0])
def test_the_strength_is_met_to_the_image_in_each_class(strength):
    labels = torch.tensor([0] * 131 + [1] * 60)[torch.randperm(191)]
    train = Shortcut(RED_GREEN, strength).train(image_set(labels), seed=0)
    for label, count in ((0, 131), (1, 60)):
        agreeing = (train.attribute == label)[train.labels == label].sum()
        assert int(agreeing) == round(strength * count)
    assert torch.equal(train.labels, labels)  # in their order


def test_ten_colours_share_what_does_not_agree():
    labels = torch.arange(10).repeat_interleave(100)
    train = Shortcut(TEN, 0.82).train(image_set(labels), seed=3)
    counts = torch.zeros(10, 10, dtype=torch.long)
    counts.index_put_((train.labels, train.attribute), torch.tensor(1), accumulate=True)
    assert torch.equal(counts, torch.eye(10, dtype=torch.long) * 80 + 2)


def test_a_function_of_the_labels_says_what_goes_with_them(half_red):
    labels = torch.arange(4).repeat(50)
    mark = Mark(half_red)
    train = Shortcut(mark, 0.9, goes_with=lambda label: label == 3).train(image_set(labels), 0)
    marked = [int(train.attribute[labels == label].sum()) for label in range(4)]
    assert marked == [5, 5, 5, 45]
    again = image_set(labels).regrouped(lambda label: label % 2)
    two = Shortcut(RED_GREEN, 0.9).train(again, seed=0)
    assert [int(two.attribute[two.labels == label].sum()) for label in (0, 1)] == [10, 90]


def test_a_seed_gives_the_same_images_again_and_another_gives_others():
    images, shortcut = image_set([0, 1] * 100), Shortcut(RED_GREEN, 0.7)
    uneven = image_set([0] * 30 + [1] * 20)
    one, again, other = (shortcut.train(images, seed).attribute for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    one, again, other = (shortcut.balanced(uneven, seed).source for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_balanced_has_each_image_once_with_each_attribute():
    images = image_set([0] * 7 + [1] * 5 + [2] * 9)
    balanced = Shortcut(TEN, 0.9).balanced(images, seed=0)
    _, sizes = torch.stack([balanced.labels, balanced.attribute]).unique(dim=1, return_counts=True)
    assert sizes.tolist() == [5] * 30  # the smallest class
    same = balanced.source.reshape(15, 10, -1)
    assert torch.equal(same, same[:, :1].expand_as(same))
    assert len(same[:, 0].unique(dim=0)) == 15
    assert balanced.attribute.reshape(15, 10).tolist() == [[*range(10)]] * 15
    every = Shortcut(RED_GREEN, 0.9).balanced(image_set([1, 0, 0, 1]), seed=0)
    assert len(every) == 8


@pytest.mark.parametrize("opacity", [1.0, 0.6])
def test_a_mark_is_blended_where_it_is_and_nowhere_else(half_red, opacity):
    images = image_set([0, 1], channels=3)
    mark = Mark(half_red, place=(3, 1), opacity=opacity)
    pixels, _, marked = shown(Shortcut(mark, 1.0).train(images, seed=0))
    assert marked.tolist() == [0, 1]
    expected = images.source.numpy().astype(float)
    for channel, colour in enumerate((200, 100, 40)):
        for row in (3, 4):
            for column, alpha in ((1, 0.0), (2, 0.2 * opacity), (3, opacity)):
                below = expected[1, channel, row, column]
                expected[1, channel, row, column] = (1 - alpha) * below + alpha * colour
    assert np.abs(pixels.numpy() - expected).max() <= 0.5 + 1e-4  # rounded to whole values
    assert torch.equal(pixels[0], images.source[0].int())


def test_a_mark_on_grey_images_has_its_brightness(half_red):
    images = image_set([0, 1])
    pixels, _, _ = shown(Shortcut(Mark(half_red), 1.0).train(images, seed=0))
    grey = 0.299 * 200 + 0.587 * 100 + 0.114 * 40
    assert pixels[1, 0, :2, 2].tolist() == [round(grey)] * 2
    assert torch.equal(pixels[1, 0, :, 3:], images.source[1, 0, :, 3:].int())


def test_a_shrunken_mark_takes_no_colour_from_what_is_transparent(tmp_path):
    picture = np.zeros((8, 8, 4), dtype=np.uint8)
    picture[:, :4] = (250, 0, 0, 255)
    picture[:, 4:] = (0, 0, 250, 0)  # blue, but not seen
    Image.fromarray(picture).save(tmp_path / "mark.png")
    images = image_set([1], channels=3)
    images.source[:] = 100
    for file in (tmp_path / "mark.png", str(tmp_path / "mark.png")):
        mark = Mark(file, size=(1, 1), place=(5, 5))
        pixels, *_ = shown(Shortcut(mark, 1.0).train(images, seed=0))
        # half of it is seen: the mean of the picture over the image below
        assert pixels[0, :, 5, 5].tolist() == [175, 50, 50]
        assert (pixels[0, :, :5] == 100).all()


def test_colours_multiply_and_leave_black():
    images = image_set([0, 1])
    images.source[0, 0, 0] = 0
    colours = Colours([(255, 100, 0), (10, 20, 30)])
    train = Shortcut(colours, 1.0).train(images, seed=0)
    assert train.mean == (0.5,) * 3
    assert train.std == (0.25,) * 3
    pixels, _, _ = shown(train)
    grey = images.source.numpy().astype(float)
    expected = grey * np.array(colours.colours)[:, :, None, None] / 255
    assert np.array_equal(pixels.numpy(), np.round(expected))
    assert not pixels[0, :, 0].any()


def test_planting_holds_no_second_set_and_changes_no_image(half_red):
    pixels = torch.full((2, 3, 6, 6), 90, dtype=torch.uint8)
    assert (Mark(half_red)(pixels, torch.tensor([1, 1])) != 90).any()
    assert (pixels == 90).all()
    images = image_set([0, 1] * 20)
    before = images.source.clone()
    train = Shortcut(RED_GREEN, 0.9).train(images, seed=0)
    assert train.source is images.source
    list(train)
    assert torch.equal(images.source, before)
    assert images.attribute is None
    part = train[train.attribute == 1]
    pixels, _, _ = shown(part)
    assert not pixels[:, [0, 2]].any()  # green all of it


def test_files_get_a_shortcut_as_they_are_opened(tmp_path, half_red):
    for number in range(2):
        picture = Image.new("RGB", (12, 10), (60, 60, 60))
        picture.save(tmp_path / f"{number}.png")
    files = [str(tmp_path / f"{number}.png") for number in range(2)]
    images = ImageSet(files, torch.arange(2), (0.5,) * 3, (0.25,) * 3, 6)
    pixels, _, attribute = shown(Shortcut(Mark(half_red), 0.9).balanced(images, seed=0))
    assert attribute.tolist() == [0, 1, 0, 1]
    assert pixels[:, 0, 0, 2].tolist() == [60, 200, 60, 200]


def test_a_shortcut_of_a_users_own_is_planted():
    class Inverted:
        values = 2

        def __call__(self, pixels, attribute):
            return torch.where(attribute[:, None, None, None] == 1, 255 - pixels, pixels)

    images = image_set([0, 1])
    pixels, _, _ = shown(xe.datasets.Shortcut(Inverted(), 1.0).train(images, seed=0))
    assert torch.equal(pixels[1], 255 - images.source[1].int())
