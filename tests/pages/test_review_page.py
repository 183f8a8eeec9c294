"""The review page as HTML: what it shows of findings, offline, escaped, and small."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_runs import HARMFUL
from safetensors.torch import load_file
from test_page_markup import Page

import xai_edit as xe
from xai_edit.core.text import escape
from xai_edit.discovery.evidence import GROUPS
from xai_edit.discovery.findings import Searched
from xai_edit.discovery.shown import CHANNELS, SIDE, STRETCHES, pictures, shown_rows
from xai_edit.pages.discover import FEW, LIMITS, review_page


@pytest.fixture(scope="module")
def found(discovered) -> xe.Findings:
    return xe.Findings.load(discovered / "findings.safetensors")


@pytest.fixture(scope="module")
def drawn(discovered):
    return load_file(discovered / "pictures.safetensors")


@pytest.fixture(scope="module")
def page(discovered):
    return Page((discovered / "report.html").read_text(encoding="utf-8"))


def test_rows_are_the_strongest_and_the_weakest_by_brute_force(found):
    for one in found:
        of_class = found.labels == one.target
        ranked = sorted(range(len(one.scores)), key=lambda at: -float(one.scores[at]))
        inside = [at for at in ranked if of_class[at]]
        outside = [at for at in ranked if not of_class[at]]
        rows = [row.tolist() for row in shown_rows(one, found)]
        assert rows == [inside[:12], outside[:12], inside[::-1][:12]]
    few = replace(found, labels=torch.where(torch.arange(len(found.labels)) < 5, 2, 0))
    strongest, elsewhere, least = shown_rows(few[0], few)
    assert (len(strongest), len(elsewhere), len(least)) == (5, 12, 0)  # no sample twice
    none = replace(found, labels=torch.zeros_like(found.labels))
    strongest, elsewhere, least = shown_rows(none[0], none)
    assert (len(strongest), len(elsewhere), len(least)) == (0, 12, 12)


def test_each_finding_has_its_pictures_controls_evidence_and_groups(found, page):
    cards = [one for one in page.all("article") if one["class"] == "finding"]
    assert [int(card["data-finding"]) for card in cards] == [*range(len(found))]
    for card, one in zip(cards, found, strict=True):
        dtype = {"32": "<f4", "64": "<f8"}[card["data-bits"]]
        scores = np.frombuffer(base64.b64decode(card["data-scores"]), dtype)
        assert scores.tolist() == one.scores.tolist()  # to the bit
        assert float(card["data-threshold"]) == one.threshold
    ticks = [box for box in page.all("input") if box["type"] == "checkbox"]
    shown = [rows for one in found for rows in shown_rows(one, found)]
    assert [int(box["data-sample"]) for box in ticks] == torch.cat(shown).tolist()
    wanted = [str(at % 3 == 2).lower() for at, rows in enumerate(shown) for _ in rows]
    assert [box["data-has"] for box in ticks] == wanted
    photos = [image for image in page.all("img") if "photo" in image["class"]]
    assert [image["alt"] for image in photos] == [found.names[at] for at in torch.cat(shown)]
    assert len(page.all("img")) == 2 * len(photos)  # each with its map
    radios = [box["value"] for box in page.all("input") if box["type"] == "radio"]
    four = ["spurious", "belongs to the class", "not one thing", "unsure"]
    assert radios == four * len(found)
    text = " ".join(page.text.values())
    for limit in LIMITS:
        assert limit in text
    assert all(str(one).split(" it turns ")[1][:4] in text for one in found)
    cells = [page.text.get(at, "") for at, (tag, *_) in enumerate(page.found) if tag == "td"]
    for number, one in enumerate(found):
        for at, name in enumerate(GROUPS):
            own, row = one.evidence.groups[name], cells[12 * number + 3 * at :][:3]
            has = one.has if at % 2 == 0 else ~one.has
            group = has & ((found.labels == one.target) == (at < 2))
            assert own.samples == int(group.sum())
            assert row[0] == (str(own.samples) if own.samples else "0 (empty)")
            if own.samples:
                right = float((found.predicted == found.labels)[group].double().mean())
                assert row[1].startswith(f"{100 * right:.0f} %")
            assert ("[" in row[1]) == (0 < own.samples < FEW)


def test_a_small_group_has_wilsons_interval(found, drawn):
    groups = dict(found[0].evidence.groups)
    groups["class without"] = replace(groups["class without"], samples=4, accuracy=0.75)
    one = replace(found[0], evidence=replace(found[0].evidence, groups=groups))
    html = review_page(replace(found, found=(one,)), {}).html()
    z, p, n = 1.959964, 0.75, 4  # Wilson 1927
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    ends = [(p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert f"75 % [{100 * ends[0]:.0f} %, {100 * ends[1]:.0f} %]" in html


def test_names_of_files_classes_and_layers_stay_text(found, drawn):
    names = tuple(f"{at}{HARMFUL}" for at in range(len(found.names)))
    hostile = replace(
        found,
        names=names,
        found=tuple(replace(one, layer=HARMFUL, also=((1, HARMFUL),)) for one in found),
        searched=(Searched(0, HARMFUL, 1, 1, HARMFUL),),
    )
    html = review_page(hostile, drawn, names={2: HARMFUL, 0: HARMFUL}).html()
    page = Page(html)
    assert "<b class" not in html
    assert "<img class=evil" not in html
    assert page.open == []
    assert not {*html} & {*"\u2028\u202e\x1b\x9b"}
    (review,) = [one for one in page.all("div") if one.get("id") == "review"]
    assert json.loads(review["data-about"])["names"] == [*names]
    assert len(page.all("script")) == 1


def test_without_pictures_and_without_findings_it_says_so(found):
    bare = Page(review_page(found, {}).html())
    assert bare.all("img") == []
    assert any("they are not shown here" in text for text in bare.text.values())
    assert any(found.names[0] in text for text in bare.text.values()) or found.names
    searched = (Searched(1, "4", 9, 0, "too few samples (9) to tell"),)
    none = Page(review_page(replace(found, found=(), searched=searched), {}).html())
    text = [*none.text.values()]
    assert "nothing could be judged" in text
    assert "class 1, layer 4: too few samples (9) to tell" in text
    assert none.all("article") == none.all("textarea") == []


@pytest.mark.parametrize("kind", ["images", "tokens", "signals"])
def test_twenty_findings_are_within_four_megabytes(found, kind):
    generator = torch.Generator().manual_seed(0)
    many = replace(found, found=(found[0],) * 20)
    rows = torch.cat(shown_rows(found[0], found))
    samples = rows.unique()
    count = len(samples)
    if kind == "images":  # as detailed as photographs: noise over all scales
        scales = [torch.rand(count, 3, side, side, generator=generator) for side in (3, 9, 24, 72)]
        noise = sum(torch.nn.functional.interpolate(one, SIDE, mode="bicubic") for one in scales)
        shown = (255 * noise / len(scales)).clamp(0, 255).byte()
        maps = torch.randn(36, 18, 18, generator=generator)
        maps = torch.nn.functional.interpolate(maps[None], SIDE, mode="bilinear")[0]
        maps = maps / maps.abs().amax((1, 2), keepdim=True)
    elif kind == "tokens":
        shown = torch.randint(9, (count, 512), generator=generator)
        maps = torch.rand(len(rows), 512, generator=generator)
    else:
        noise = torch.randn(count, CHANNELS, 2, STRETCHES, generator=generator)
        shown, maps = noise.sort(2).values, torch.rand(len(rows), STRETCHES, generator=generator)
    drawn = {"samples": samples, kind: shown, **{str(at): maps for at in range(20)}}
    size = len(review_page(many, drawn, words=lambda _: "wordpiece").html())
    assert size <= 4_000_000, size


def test_pictures_of_other_data_or_no_images_are_refused_or_left_out(found):
    with pytest.raises(ValueError, match="data: other samples than those of the findings"):
        pictures(torch.nn.Identity(), [torch.zeros(3, 1, 4, 4)], found)


def shown_as(found, **kind):
    """The page with samples that are no images, each with the same map."""
    number = torch.cat(shown_rows(found[0], found))
    samples = number.unique()
    (name, one), *maps = kind.items()
    drawn = {"samples": samples, name: one.expand(len(samples), *one.shape)}
    for _, values in maps:
        drawn["0"] = values.expand(len(number), -1)
    words = {7: HARMFUL, 8: "good", 9: "far"}
    return review_page(replace(found, found=found[:1]), drawn, words=words.get).html()


def test_a_text_is_its_words_in_the_colour_of_their_relevance_without_padding(found):
    tokens = torch.tensor([*[9] * 70, 7, 8, 8, 8, -1])
    R = torch.tensor([*[0.0] * 70, -0.42, 1.0, 0.3, 0.04, 1.0])
    html = shown_as(found, tokens=tokens, maps=R)
    assert Page(html).open == []
    assert "<img class=evil" not in html
    first = html.split('class="passage">')[1].split("</span>")[0]
    assert first == (  # of 74 words the last 60, and no padding
        f"… {'far ' * 56}"
        f'<mark class="against" style="--r:0.4">{escape(HARMFUL)}</mark> '
        '<mark class="for" style="--r:1.0">good</mark> '
        '<mark class="for" style="--r:0.3">good</mark> good'
    )


def test_without_words_a_text_is_its_numbers(found):
    drawn = {"samples": torch.cat(shown_rows(found[0], found)).unique()}
    drawn["tokens"] = torch.tensor([5, 6, -1]).expand(len(drawn["samples"]), 3)
    html = review_page(replace(found, found=found[:1]), drawn).html()
    assert '<span class="passage">5 6</span>' in html


def test_a_signal_is_a_waveform_shaded_by_relevance(found):
    ends = torch.tensor([[[-1.0, 0.0, -1.0], [1.0, 0.0, 0.0]]])
    html = shown_as(found, signals=ends, maps=torch.tensor([0.0, -1.0, 0.5]))
    svg = html.split('<svg class="signal"')[1].split("</svg>")[0]
    assert 'viewBox="-0.5 0 3 40"' in svg
    assert 'class="wave" d="M0 2v36M1 20v1M2 20v18"' in svg  # 36 of 40 for 2
    assert 'class="against" style="--r:1.0" d="M1 0v40"' in svg
    assert 'class="for" style="--r:0.5" d="M2 0v40"' in svg
    assert "with relevance for" in svg
