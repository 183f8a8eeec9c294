"""The pictures on the pages of ``neutralize`` and ``prune``: which images, and whose relevance."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from command_runs import images_of, network, read
from PIL import Image
from safetensors.torch import load_file

import xai_edit as xe
from xai_edit.command.group_maps import GROUPS, OF_GROUP, STRONGEST, SUBSPACES, shown_images
from xai_edit.command.run_parts import read_attribute, split
from xai_edit.command.run_unlearn import SHOWN_FORGOTTEN, SHOWN_KEPT
from xai_edit.report.before_after import RULES
from xai_edit.report.map_slider import Maps, cards, wipe


def pictures(page: str) -> list[np.ndarray]:
    """Return the images of a figure as numbers in [0, 1]."""
    sources = re.findall(r'<img[^>]* src="data:image/webp;base64,([^"]+)"', page)
    files = [Image.open(io.BytesIO(base64.b64decode(one))) for one in sources]
    return [np.asarray(one.convert("RGB")) / 255 for one in files]


@pytest.mark.parametrize("kind", ["neutralize", "prune"])
def test_maps_on_the_page_are_those_of_the_library(kind, runs, here):
    images, model, done = images_of(), network(), runs[kind]
    attribute = None
    if kind == "neutralize":
        attribute = read_attribute("marks.csv", images, "test")
    held_out = split(images, attribute, validation=kind == "neutralize").held_out
    edit = xe.ModelEdit.load(done / f"edits/{kind}.safetensors")
    inputs = torch.stack([sample[0] for sample in held_out])
    with torch.no_grad():
        before = model(inputs).argmax(1)
        with edit.applied(model):
            after = model(inputs).argmax(1)
    shown, counts = shown_images(held_out.groups, before, after)
    about = read(done)["maps"]
    assert {name: about[name] for name in counts} == counts
    expected = []
    for at in shown:
        (label, has), said = held_out.groups[at], [int(before[at]), int(after[at])]
        wrong = [one for one in said if one != label]
        one = {"class": label, "attribute": has, "before": said[0], "after": said[1]}
        expected.append(one | {"other": wrong[0] if wrong else None})
    assert about["images"] == expected
    x, rule, tensors = inputs[shown], xe.LRP("epsilon-plus"), load_file(done / "maps.safetensors")
    torch.testing.assert_close(tensors["images"], held_out.preprocessing.pixels(x))
    classes = torch.tensor([one["class"] for one in expected])
    found = torch.tensor([one["other"] is not None for one in expected])
    others = torch.tensor([one["other"] for one in expected if one["other"] is not None])
    assert 0 < len(others) < len(shown)
    rows = {"relevance": (x, classes), "other": (x[found], others)}
    for side in (0, 1):
        for key, (some, targets) in rows.items():
            relevance = rule.heatmap(model, some, targets).sum(1)
            assert torch.equal(tensors[key][:, side], relevance.detach())
        edit.apply(model) if side == 0 else edit.undo(model)

    figures = re.findall('<figure class="wipe">.*?</figure>', (done / "report.html").read_text())
    for figure, key in zip(figures, rows, strict=True):
        drawn = pictures(figure)
        assert len(drawn) == 3 * len(tensors[key])
        for number, pair in enumerate(tensors[key]):
            shown = drawn[3 * number + 1 : 3 * number + 3]
            for values, picture in zip(pair / pair.abs().max(), shown, strict=True):
                # Blue, white, red for −1, 0, 1.
                colours = [1 + values.clamp(max=0), 1 - values.abs(), 1 - values.clamp(min=0)]
                np.testing.assert_allclose(picture, torch.stack(colours, 2).numpy(), atol=0.01)
        assert 'class="bar"' in figure


def test_two_of_each_group_the_most_changed_first_and_what_was_corrected_and_broken():
    groups = [(at // 4, 0) for at in range(24)]
    labels = torch.tensor([label for label, _ in groups])
    before = labels.clone()
    before[[3, 4, 5, 8]] = 9  # group 0 once wrong, group 1 twice, group 2 once
    after = before.clone()
    after[[4, 5]] = 1  # both corrected
    after[15] = 9  # broken, in group 3
    shown, about = shown_images(groups, before, after)
    # Changed: groups 1 and 3; then those that are lowest before: 0 and 2.
    assert shown == [0, 1, 4, 5, 8, 9, 12, 13, 15]
    assert about == {"groups": 4, "of_groups": 6}
    shown, _ = shown_images(groups[:1], before[:1], after[:1])
    assert shown == [0]


@pytest.mark.parametrize(
    ("pairs", "singles"),
    [
        ((SHOWN_FORGOTTEN + SHOWN_KEPT) * len(RULES), 0),
        (2 * (GROUPS * OF_GROUP + 2), STRONGEST * SUBSPACES),
    ],
    ids=["unlearn", "prune"],
)
def test_the_most_pictures_of_224_pixels_that_a_page_has_fit_in_three_megabytes(pairs, singles):
    from sklearn.datasets import load_sample_images

    photographs = torch.tensor(np.stack(load_sample_images().images)).permute(0, 3, 1, 2) / 255
    random = torch.Generator().manual_seed(0)
    shown = []
    for number in range(pairs + singles):
        top, left = (int(torch.randint(0, most, (), generator=random)) for most in (203, 416))
        crop = photographs[number % 2, :, top : top + 224, left : left + 224]
        # As rough as can be: relevance of a network is smoother.
        maps = torch.randn(2 if number < pairs else 1, 224, 224, generator=random)
        shown.append(Maps(crop, f"image {number}", maps.unbind(), [0, 0], "says 0 → 1"))
    size = len(wipe("before and after", shown[:pairs]) + cards(shown[pairs:]))
    assert size < 2.7e6  # the rest of a page has room
