"""Image sets: batches, parts, labels and orders."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from xai_edit.datasets.image_set import Epochs, ImageSet


def small(labels, **more):
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    return ImageSet(images, torch.tensor(labels), (0.0,), (1.0,), 2, **more)


def numbers(some):
    """The images that batches hold, by the number that all of their pixels have."""
    return [int(x) for batch in some for x in (batch[0][:, 0, 0, 0] * 255).round()]


def test_iterating_changes_nothing_and_gives_the_same_batches_again():
    images = small([0, 1, 0, 1, 0], attribute=torch.tensor([0, 0, 1, 1, 0]), batch_size=2)
    before = {field.name: getattr(images, field.name) for field in dataclasses.fields(images)}
    first, second = list(images), list(images)
    assert [len(batch[0]) for batch in first] == [2, 2, 1]
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(getattr(images, name) is value for name, value in before.items())


def test_epochs_go_through_orders_that_their_number_gives():
    images = small([*range(9)])
    training = Epochs(images, seed=3, batch_size=4)
    orders = [numbers(training) for _ in range(3)]
    assert all(sorted(order) == [*range(9)] for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert numbers(Epochs(images, seed=3, batch_size=4, epoch=2)) == orders[2]
    assert numbers(Epochs(images, seed=4, batch_size=4)) == orders[1]
    assert numbers(images) == [*range(9)]


def test_shifted_images_are_windows_of_their_reflected_selves_all_of_them_in_time():
    pixels = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6).repeat(64, 1, 1, 1)
    images = ImageSet(pixels, torch.zeros(64).long(), (0.0,), (1.0,), 6)
    wide = torch.nn.functional.pad(pixels[:1].float(), (1,) * 4, mode="reflect")[0, 0]
    windows = [wide[i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    ((inputs, _),) = Epochs(images, 0, 64, shift=1)
    seen = [[torch.allclose(255 * image, w) for w in windows].index(True) for image in inputs[:, 0]]
    assert {*seen} == {*range(9)}
    ((again, _),) = Epochs(images, 0, 64, shift=1)
    assert torch.equal(inputs, again)
    with pytest.raises(ValueError, match="shift: 6 given"):
        Epochs(images, 0, 64, shift=6)


def test_mirrored_images_are_some_of_them():
    pixels = torch.arange(4, dtype=torch.uint8).expand(32, 1, 4, 4)
    ((inputs, _),) = Epochs(
        ImageSet(pixels, torch.zeros(32).long(), (0.0,), (1.0,), 4), 0, 32, flip=True
    )
    rows = (255 * inputs[:, 0, 0]).round().long()
    kept, mirrored = (rows == torch.arange(4)).all(1), (rows == torch.arange(4).flip(0)).all(1)
    assert (kept ^ mirrored).all()
    assert 0 < mirrored.sum() < 32


def test_the_attribute_goes_wherever_its_images_go():
    labels, attribute = [0, 1, 0, 1, 0, 0, 1], torch.tensor([0, 0, 0, 1, 1, 0, 1])
    images = small(labels, attribute=attribute)

    def checked(some):
        found = numbers(some)
        assert torch.cat([batch[2] for batch in some]).tolist() == attribute[found].tolist()
        return found

    assert checked(images) == [*range(7)]
    assert checked(images[torch.tensor([4, 1])]) == [4, 1]
    assert checked(images[attribute == 1]) == [3, 4, 6]
    assert checked(images.first(1)) == [0, 1, 3, 4]  # of each group
    assert checked(images.first(2, start=1)) == [2, 5, 6]
    assert images.counts().tolist() == [[3, 1], [1, 2]]
    plain = small(labels)
    assert plain.counts().tolist() == [[4], [3]]
    assert [len(batch) for batch in plain] == [2]
    assert numbers(plain.first(2, start=1)) == [2, 3, 4, 6]  # of each class
    assert len(plain.first(0)) == len(plain.first(0).first(3)) == 0


def test_regrouping_makes_the_labels_the_attribute():
    images = small([3, 0, 4, 1]).regrouped(lambda digit: digit >= 3)
    assert images.labels.tolist() == [1, 0, 1, 0]
    assert images.labels.dtype == torch.int64
    assert images.attribute.tolist() == [3, 0, 4, 1]
    with pytest.raises(ValueError, match=r"classes: torch.float32 of shape \(4,\) given"):
        images.regrouped(lambda digit: digit / 2)
    with pytest.raises(ValueError, match=r"classes: .*whole number from 0"):
        images.regrouped(lambda digit: digit - 1)


def test_an_attribute_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"attribute: .*of shape \(3,\).* each of 4 images"):
        small([0, 1, 0, 1], attribute=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="planted: given without an attribute"):
        small([0, 1], planted=lambda pixels, attribute: pixels)
