"""The verdict on figures that are made up, so that what has to be said is known."""

from dataclasses import replace

import pytest

from xai_edit.evaluation.intervals import Interval
from xai_edit.pages.verdict import Figure, Outcome, Part, verdict, verdict_html, warnings

BAND: Interval = (0.40, 0.60)
GOOD = Part("class 0", 100, 0.9, (0.83, 0.94), {"edit": 0.9, "DFR": 0.9})
BAD = Part("class 1", 100, 0.5, BAND, {"edit": 0.7, "DFR": 0.6})


def worst(after, other=0.6, **more):
    """Return the worst group before (0.5), after the edit and by a comparison method."""
    intervals = {"before": BAND, "edit": (after - 0.1, after + 0.1)}
    return Figure("worst group", {"before": 0.5, "edit": after, "DFR": other}, intervals, **more)


AVERAGE = Figure("average", {"before": 0.7, "edit": 0.6, "DFR": 0.65}, {"before": (0.65, 0.75)})


def outcome(after=0.7, other=0.6, parts=(GOOD, BAD), **more):
    more = {"advice": {"DFR": "use it with labels"}, "further": "more images", **more}
    return Outcome("edit", "changes 1 weight", [worst(after, other)], parts, **more)


FEW_IN = Part("class 2", 1, 1.0, (0.21, 1.0), {"edit": 1.0, "DFR": 0.0})
OF_ONE = "0.000 [class 2, 1 image; {} over groups of at least 10 images]"


def hardly(after=0.7, other=0.6, last=FEW_IN):
    """Return an outcome whose groups are the usual two, with these figures, and one of few."""
    many = replace(BAD, after={"edit": after, "DFR": other})
    low = {name: min(last.after[name], many.after[name]) for name in last.after}
    one = worst(low["edit"], low["DFR"], lowest=True)
    return replace(outcome(parts=[GOOD, many, last]), figures=[one])


HARDLY = (
    "Hardly measured, fewer than 10 images, with the interval before: class 2 (1 image, "
    "0.210–1.000)."
)
HARM = "It did harm, below the 95% interval before the edit, to class 0 (from 0.900 to 0.820)."
NO_HARM = "No group that was measured fell below its 95% interval before the edit."
ALL = "All 2 groups were measured."
GAIN = (
    "Edit changes 1 weight: worst group goes from 0.500 to 0.700, beyond its interval before "
    "(0.400–0.600)."
)
NOT_BETTER = "No comparison method does better here; the best, DFR, has 0.600 against 0.700."
AS_IT_IS = (
    "No comparison method does better here; the best, DFR, has 0.500 against 0.500 of the network "
    "as it is."
)
SAFE = "Without harm to any group that was measured: DFR (0.600)."
NEXT = "To try next: more images."


# name → an outcome and what is said of it
CASES = {
    "gain": (outcome(), [GAIN, NO_HARM, ALL, NOT_BETTER]),
    "harm to a group": (
        outcome(parts=[replace(GOOD, after={"edit": 0.82}), BAD]),
        [GAIN, HARM, ALL, NOT_BETTER, SAFE],
    ),
    "harm to a group, and a comparison that changes nothing": (
        outcome(
            other=0.5,
            parts=[
                replace(GOOD, after={"edit": 0.82, "DFR": 0.9}),
                replace(BAD, after={"edit": 0.7, "DFR": 0.5}),
            ],
        ),
        [GAIN, HARM, ALL, NOT_BETTER.replace("0.600", "0.500")],
    ),
    "harm to a group by each method": (
        outcome(parts=[replace(GOOD, after={"edit": 0.82, "DFR": 0.7}), BAD]),
        [GAIN, HARM, ALL, NOT_BETTER],
    ),
    "a comparison of another kind": (
        outcome(other=0.75, apart=frozenset({"DFR"})),
        [
            GAIN,
            NO_HARM,
            ALL,
            "No comparison method was measured.",
            "DFR does a little better here (0.750 against 0.700), within the interval, which "
            "does not tell the two apart.",
        ],
    ),
    "gain within the interval": (
        outcome(0.55),
        [
            "Edit changes 1 weight: worst group goes from 0.500 to 0.550, within its interval "
            "before (0.400–0.600).",
            NO_HARM,
            ALL,
            "DFR does a little better here (0.600 against 0.550), within the interval, which "
            "does not tell the two apart.",
        ],
    ),
    "nothing better": (
        outcome(0.5, 0.5),
        [
            "Edit made nothing better: worst group stays at 0.500. Nothing speaks for this "
            "edit, though it changes 1 weight.",
            NO_HARM,
            ALL,
            AS_IT_IS,
            NEXT,
        ],
    ),
    "nothing better, average and balanced too": (
        replace(
            outcome(0.5, 0.5),
            beside=[
                Figure("average accuracy", {"before": 0.7, "edit": 0.6}),
                Figure("balanced accuracy", {"before": 0.6, "edit": 0.6}),
            ],
        ),
        [
            "Edit made nothing better: worst group stays at 0.500, average accuracy goes from "
            "0.700 to 0.600 and balanced accuracy stays at 0.600. Nothing speaks for this edit, "
            "though it changes 1 weight.",
            NO_HARM,
            ALL,
            AS_IT_IS,
            NEXT,
        ],
    ),
    "the average alone is better": (
        replace(
            outcome(0.5, 0.5),
            figures=[worst(0.5, 0.5, lowest=True)],
            beside=[Figure("average accuracy", {"before": 0.6, "edit": 0.7})],
        ),
        [
            "Edit changes 1 weight and did not raise the worst group: worst group stays at 0.500 "
            "and average accuracy goes from 0.600 to 0.700.",
            NO_HARM,
            ALL,
            AS_IT_IS,
            NEXT,
        ],
    ),
    "one image makes the comparison the worse": (
        hardly(0.7, 0.8),
        [
            GAIN,
            NO_HARM,
            HARDLY,
            f"Whether DFR does better here hangs on fewer than 10 images: {OF_ONE.format('0.800')} "
            "against 0.700, but it harms class 2 (from 1.000 to 0.000).",
        ],
    ),
    "one image, and the comparison is worse without it too": (
        hardly(),
        [
            GAIN,
            NO_HARM,
            HARDLY,
            f"No comparison method does better here; the best, DFR, has {OF_ONE.format('0.600')} "
            "against 0.700.",
        ],
    ),
    "one image makes the edit the worse": (
        hardly(last=replace(FEW_IN, after={"edit": 0.0, "DFR": 1.0})),
        [
            "Edit changes 1 weight and did not raise the worst group: worst group goes from 0.500 "
            f"to {OF_ONE.format('0.700')}.",
            "It did harm, below the 95% interval before the edit, to class 2 (from 1.000 to "
            "0.000).",
            HARDLY,
            "DFR does a little better here (0.600 against 0.500 of the network as it is), within "
            "the interval, which does not tell the two apart.",
            "Without harm to any group that was measured: DFR (0.600).",
            NEXT,
        ],
    ),
    "the averages fall for a gain within the interval": (
        replace(outcome(0.55), beside=[AVERAGE]),
        [
            "Edit changes 1 weight: worst group goes from 0.500 to 0.550, within its interval "
            "before (0.400–0.600), but average goes from 0.700 to 0.600, beyond its interval "
            "before (0.650–0.750).",
            NO_HARM,
            ALL,
            "DFR does a little better here (0.600 against 0.550), within the interval, which "
            "does not tell the two apart.",
            NEXT,
        ],
    ),
    "without harm, but the average falls": (
        replace(
            outcome(parts=[replace(GOOD, after={"edit": 0.8, "DFR": 0.9}), BAD]), beside=[AVERAGE]
        ),
        [
            f"{GAIN[:-1]}, but average goes from 0.700 to 0.600, beyond its interval before "
            "(0.650–0.750).",
            "It did harm, below the 95% interval before the edit, to class 0 (from 0.900 to "
            "0.800).",
            ALL,
            NOT_BETTER,
        ],
    ),
    "made smaller, with harm": (
        replace(
            outcome(0.2, 0.1, parts=[GOOD, replace(BAD, after={"edit": 0.2, "DFR": 0.1})]),
            figures=[replace(AVERAGE, values=AVERAGE.values | {"DFR": 0.5}), worst(0.2, 0.1)],
            smaller=True,
        ),
        [
            "Edit changes 1 weight: average goes from 0.700 to 0.600, beyond its interval before "
            "(0.650–0.750), and worst group goes from 0.500 to 0.200, beyond its interval before "
            "(0.400–0.600).",
            "It did harm, below the 95% interval before the edit, to class 1 (from 0.500 to "
            "0.200).",
            ALL,
            "No comparison method does better here; the best, DFR, has average 0.500, worst group "
            "0.100 against average 0.600, worst group 0.200.",
            NEXT,
        ],
    ),
    "worse, and so is the comparison": (
        outcome(0.2, 0.45),
        [
            "Edit made nothing better: worst group goes from 0.500 to 0.200. Nothing speaks "
            "for this edit, though it changes 1 weight.",
            NO_HARM,
            ALL,
            "No comparison method does better here; the best, DFR, has 0.450 against 0.500 of "
            "the network as it is.",
            NEXT,
        ],
    ),
    "a comparison is better": (
        outcome(other=0.87),
        [GAIN, NO_HARM, ALL, "DFR does better here (0.870 against 0.700); use it with labels."],
    ),
    "a comparison is as good and does harm": (
        outcome(parts=[replace(GOOD, after={"DFR": 0.8}), BAD], other=0.7),
        [
            GAIN,
            NO_HARM,
            ALL,
            "DFR does as well here (0.700 against 0.700), but it harms class 0 (from 0.900 to "
            "0.800); use it with labels.",
        ],
    ),
    "a group without images": (
        outcome(parts=[GOOD, BAD, Part("class 2", 0)], other=0.87),
        [
            f"{GAIN[:-1]}; not measured, 0 images: class 2.",
            NO_HARM,
            "Not measured, 0 images: class 2; harm there would not be seen.",
            "DFR does better on what was measured (0.870 against 0.700); use it with labels.",
        ],
    ),
    "a group of 3": (
        outcome(
            parts=[GOOD, replace(BAD, samples=3, interval=(0.21, 0.94))],
            unmeasured=["what a probe finds"],
        ),
        [
            GAIN,
            NO_HARM,
            "Not measured: what a probe finds.",
            "Hardly measured, fewer than 10 images, with the interval before: class 1 "
            "(3 images, 0.210–0.940).",
            NOT_BETTER,
        ],
    ),
    "planted": (
        outcome(parts=[GOOD, replace(BAD, planted=True)]),
        [
            GAIN,
            NO_HARM,
            ALL,
            "Measured on planted images, not on real ones: class 1.",
            NOT_BETTER,
        ],
    ),
    "no edit": (
        replace(
            outcome(parts=[BAD, Part("class 2", 0)]),
            figures=[Figure("worst measured group", {"before": 0.5})],
            reason="none fits",
        ),
        [
            "No edit, the network is as it was (worst measured group 0.500; not measured, 0 "
            "images: class 2): none fits.",
            "Nothing was changed, so nothing was harmed.",
            "Not measured, 0 images: class 2; harm there would not be seen.",
            "No comparison method was measured.",
            NEXT,
        ],
    ),
    "two figures": (
        replace(
            outcome(kind="class", which=" to keep"),
            figures=[
                Figure("A_t (of the class)", {"before": 0.9, "edit": 0.1, "mask": 0.0}, lower=True),
                Figure("A_g", {"before": 0.8, "edit": 0.8, "mask": 0.7}),
            ],
        ),
        [
            "Edit changes 1 weight: A_t (of the class) goes from 0.900 to 0.100 and A_g stays "
            "at 0.800.",
            "No class to keep that was measured fell below its 95% interval before the edit.",
            "All 2 classes to keep were measured.",
            "No comparison method does better here; the best, mask, has A_t 0.000, A_g 0.700 "
            "against A_t 0.100, A_g 0.800.",
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_on_made_up_figures(name):
    case, sentences = CASES[name]
    assert verdict(case) == sentences


def test_of_many_groups_a_sentence_names_some():
    parts = [Part(f"class {at}", 0) for at in range(12)]
    (sentence,) = (one for one in verdict(outcome(parts=parts)) if one.startswith("Not measured"))
    assert "class 7 and 4 more; harm" in sentence


def test_a_warning_names_what_is_missing_with_the_ways_out_and_what_is_planted():
    assert warnings(outcome()) == []
    missing, planted = Part("class 2", 0), replace(BAD, planted=True)
    (line,) = warnings(outcome(parts=[GOOD, missing]))
    assert line.startswith("0 images, not measured: class 2. The worst group may be there.")
    assert "--plant mark.png" in line
    assert "CounterfactualRetraining" in line
    lines = warnings(outcome(parts=[missing, planted]))
    assert "--plant" not in lines[0]  # which takes no mark away
    assert lines[1].startswith("planned and measured on images with a planted mark: class 1.")
    (line,) = warnings(hardly())
    assert line == f"the worst group has fewer than 10 images: DFR, {OF_ONE.format('0.600')}."
    none = hardly(last=replace(FEW_IN, samples=12))
    assert warnings(none) == []  # enough images
    none = replace(hardly(), parts=[FEW_IN])
    assert "class 2, 1 image; no groups of at least 10 images]" in warnings(none)[0]
    shown = verdict_html({"warnings": ["a < b"], "verdict": ["c"]})
    assert "<p><strong>Warning:</strong> a &lt; b</p><ul><li>c</li></ul>" in shown
