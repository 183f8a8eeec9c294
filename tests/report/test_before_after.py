import dataclasses
import io

import pytest
import torch
from PIL import Image

import xai_edit as xe


@pytest.fixture
def images(digits):
    return digits[0][200:204]


@pytest.fixture
def edit(plain, batches):
    return xe.PathPerturbation(share=0.3).plan(plain, batches, target=3)


def test_maps_are_those_of_each_network_for_what_it_predicts(plain, images, edit, unchanged):
    check = unchanged(plain)
    maps = xe.before_after_maps(plain, edit, images)
    check()
    assert maps.rules == ["epsilon", "gamma+epsilon", "alpha1beta0", "alpha2beta1"]
    said = plain(images).argmax(1)
    assert torch.equal(maps.predicted_before, said)
    assert torch.equal(maps.explained_before, said)
    for rule in maps.rules:
        assert torch.equal(maps.before[rule], xe.LRP(rule).heatmap(plain, images, said))
    edit.apply(plain)
    said = plain(images).argmax(1)
    assert torch.equal(maps.predicted_after, said)
    assert torch.equal(maps.explained_after, said)
    for rule in maps.rules:
        assert torch.equal(maps.after[rule], xe.LRP(rule).heatmap(plain, images, said))


@pytest.mark.parametrize(
    "targets", [3, [3, 3, 3, 3], torch.tensor([3] * 4), lambda z: torch.full((len(z),), 3)]
)
def test_one_class_is_explained_in_both_networks(plain, images, edit, targets):
    maps = xe.before_after_maps(plain, edit, images, targets, scorers=["epsilon"])
    assert maps.explained_before.tolist() == maps.explained_after.tolist() == [3] * 4
    expected = xe.LRP("epsilon").heatmap(plain, images, torch.tensor([3] * 4))
    assert torch.equal(maps.before["epsilon"], expected)
    assert not torch.equal(maps.after["epsilon"], expected)


def test_the_model_is_as_it_was_after_an_error(plain, images, edit, unchanged):
    class Failing:
        def __init__(self, calls):
            self.calls = calls  # that succeed

        def heatmap(self, model, inputs, targets):
            self.calls -= 1
            if self.calls < 0:
                raise RuntimeError("stop")
            return inputs

        def __call__(self, model, inputs, targets, layers):
            return {}

    check = unchanged(plain)
    for calls in (0, 1):
        with pytest.raises(RuntimeError, match="stop"):
            xe.before_after_maps(plain, edit, images, scorers={"a": Failing(calls)})
    check()


def test_those_without_a_map_are_left_out(plain, images, edit):
    maps = xe.before_after_maps(plain, edit, images, scorers=["epsilon", xe.Random()])
    assert maps.rules == ["epsilon"]
    with pytest.raises(ValueError, match=r"none of .* has a heatmap"):
        xe.before_after_maps(plain, edit, images, scorers=[xe.Random()])


def drawn(png):
    return Image.open(io.BytesIO(png)).convert("RGB")


def test_picture_grows_with_images_and_rules_and_is_the_same_again(plain, images, edit):
    maps = xe.before_after_maps(plain, edit, images)
    titles = ["class 3", "class 4", "a $ sign", "kept"]
    picture = maps.png(titles=titles)
    assert picture == maps.png(titles=titles)
    fewer = xe.before_after_maps(plain, edit, images[:2], scorers=["epsilon"])
    small, large = drawn(fewer.png(images[:2])), drawn(picture)
    assert small.width < large.width
    assert small.height < large.height


def test_the_maps_of_a_pair_share_a_scale_that_has_no_unit(plain, images, edit):
    maps = xe.before_after_maps(plain, edit, images[:2], scorers=["epsilon"])

    def times(before, after):
        scaled = {"before": before * maps.before["epsilon"], "after": after * maps.after["epsilon"]}
        maps_by_rule = {side: {"epsilon": values} for side, values in scaled.items()}
        return dataclasses.replace(maps, **maps_by_rule).png()

    assert times(8, 8) == maps.png() == maps._repr_png_()
    assert times(1, 0.25) != maps.png() != times(0.25, 1)


def test_an_edit_of_another_network_is_refused(plain, images, edit):
    edit.apply(plain)
    with pytest.raises(xe.core.EditMismatchError, match="already holds"):
        xe.before_after_maps(plain, edit, images)
