"""The samples that show a finding to a person, and their pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from xai_edit.concepts.collect import require_same_values
from xai_edit.concepts.explanations import subspace_maps
from xai_edit.core.checks import require
from xai_edit.core.data import Data, model_device
from xai_edit.core.files import checksum
from xai_edit.core.guard import preserved
from xai_edit.core.inputs import Inputs, joined, real_positions
from xai_edit.core.layers import unit_axis_of, values_at
from xai_edit.core.precision import in_float32
from xai_edit.core.wrapped import unwrapped
from xai_edit.discovery.findings import Finding, Findings
from xai_edit.discovery.samples import Samples, known_length
from xai_edit.lrp.contexts import ContextGather
from xai_edit.lrp.lrp import LRP

SHOWN = 12  # samples in a row
SIDE = 72  # of a picture, at most
STRETCHES = 96  # of a signal's time, at most
CHANNELS = 4  # of a signal, at most
PADDING = -1  # in place of a token


class Rows(NamedTuple):
    """Numbers of samples, int64, at most 12 of each.

    The strongest in the class, the strongest in other classes, and the class's least like it.
    Without a sample of the class, the last are of all classes.
    """

    strongest: Tensor
    elsewhere: Tensor
    least: Tensor


def shown_rows(finding: Finding, findings: Findings) -> Rows:
    """Return the samples that show a finding."""
    of_class = in_class(finding, findings)
    order = finding.scores.argsort(descending=True, stable=True)
    inside = order[of_class[order]]
    elsewhere = order[~of_class[order]][:SHOWN]
    others = inside[SHOWN:] if len(inside) else order[SHOWN:]
    return Rows(inside[:SHOWN], elsewhere, others.flip(0)[:SHOWN])


def in_class(finding: Finding, findings: Findings) -> Tensor:
    """Return which samples have the label of a finding's class, bool, shape (samples,).

    Without labels, which are predicted as it.
    """
    truth = findings.predicted if findings.labels is None else findings.labels
    return truth == finding.target


def pictures(
    model: nn.Module,
    data: Data,
    findings: Findings,
    *,
    pixels: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Return the shown samples as pictures, and for each the relevance through the subspace.

    Samples are images, shape (samples, 1 or 3, height, width), signals of at most four channels,
    (samples, channels, time), or whole-number tokens, (samples, length). Of several inputs by
    name or position it is `xai_edit.core.inputs.ModelInputs.first`.

    Parameters
    ----------
    model, data
        Those of `xai_edit.discover`; the model is not changed.
    findings : Findings
    pixels : callable, optional
        Makes images in [0, 1], shape (samples, 1 or 3, height, width), of inputs that are images;
        by default they are stretched to their extremes.
    progress : bool
        Show a bar on stderr.

    Returns
    -------
    dict of Tensor
        ``"samples"``, int64, shape (pictures,), and one of ``"images"``, uint8, shape (pictures,
        channels, height, width), at most 72 pixels a side; ``"signals"``, float32, shape (pictures,
        channels, 2, stretches), the least and the largest value in each of at most 96 stretches of
        time; ``"tokens"``, int64, shape (pictures, length), −1 where the attention mask is 0. And
        by the number of a finding, where its layer has positions, ``"0"``, float32, shape (shown
        samples, height, width), (…, stretches) or (…, length), divided by the largest absolute
        value: of each image, of all shown signals or texts. Nothing for other inputs.

    Raises
    ------
    ValueError
        If the data are not those of the findings.

    Examples
    --------
    >>> from xai_edit.discovery.shown import pictures
    >>> findings = xe.discover(model, data, target=0, layers=["relu1"])
    >>> shown = pictures(model, data, findings)
    >>> [*shown], shown["images"].shape[1:]
    (['samples', 'images', '0'], torch.Size([3, 4, 4]))
    """
    model = in_float32(unwrapped(model))
    how: dict[str, Any] = {"unit": "sample", "disable": not progress, "leave": False}
    with tqdm(desc="reading", total=known_length(data), **how) as bar:
        samples = Samples(data, model_device(model), bar.update)
        for _ in samples.first_pass():
            pass
    same = checksum({"samples": torch.from_numpy(samples.contents.view("i8"))}, "")
    if same != findings.origin["data"]:
        raise ValueError("data: other samples than those of the findings; give the same data")
    rows = [torch.cat(shown_rows(one, findings)) for one in findings]
    if not rows:
        return {}
    wanted = torch.cat(rows).unique()
    inputs = joined([batch.inputs for _, batch in samples.read(wanted)])
    drawn = _drawn(inputs, pixels)
    if not drawn:
        return {}
    ((kind, picture),) = drawn.items()
    size = picture.shape[1:] if kind == "tokens" else picture.shape[2 + (kind == "signals") :]
    made = {"samples": wanted, **drawn}
    shown = zip(tqdm(findings, "pictures", disable=not progress, leave=False), rows, strict=True)
    for number, (finding, own) in enumerate(shown):
        at = torch.searchsorted(wanted, own)
        try:
            R = _relevance(model, inputs[at.to(inputs.device)], finding)
        except ValueError:  # such as a layer whose relevance does not reach the input
            continue
        if R.ndim != 1 + len(size):  # such as of a layer behind the mean over positions
            continue
        resized = nn.functional.interpolate(R[:, None].cpu().float(), size, mode="area")[:, 0]
        if kind == "tokens":
            resized = resized.masked_fill(picture[at] == PADDING, 0)
        largest = resized.abs()
        if kind == "images":  # of each; colours of texts and signals are compared at a glance
            largest = largest.amax((1, 2), keepdim=True)
        else:
            largest = largest.amax()
        made[str(number)] = resized / largest.clamp_min(torch.finfo(resized.dtype).tiny)
    return made


def _drawn(inputs: Inputs, pixels: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    """Return samples as ``"images"``, ``"signals"`` or ``"tokens"``, or nothing of other inputs."""
    x = inputs if isinstance(inputs, Tensor) else inputs.first
    if x.ndim == 4 and x.shape[1] in (1, 3):
        images = _stretched(x) if pixels is None else pixels(x)
        require(
            images.shape[:1] == x.shape[:1], "pixels", tuple(images.shape), "one image a sample"
        )
        images = images.cpu().float()
        factor = min(1.0, SIDE / max(images.shape[2:]))
        size = [max(1, round(side * factor)) for side in images.shape[2:]]
        small = nn.functional.interpolate(images, size, mode="area")
        return {"images": (small.clamp(0, 1) * 255).round().byte()}
    if x.ndim == 3 and x.is_floating_point() and x.shape[1] <= CHANNELS:
        x = x.cpu().float()
        highest, lowest = (
            nn.functional.adaptive_max_pool1d(one, min(STRETCHES, x.shape[2])) for one in (x, -x)
        )
        return {"signals": torch.stack([-lowest, highest], 2)}
    if x.ndim == 2 and not x.is_floating_point():
        return {"tokens": torch.where(real_positions(inputs, x), x, PADDING).long().cpu()}
    return {}


def _relevance(model: nn.Module, inputs: Inputs, finding: Finding) -> Tensor:
    """Return the relevance for the class that passes through the subspace, by position.

    Of a single input of floating numbers at its positions, else at those of the finding's layer.
    """
    scorer = LRP("epsilon-plus")  # of the logit, so that what speaks for a negative one is red too
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        maps, _ = subspace_maps(
            model,
            inputs,
            finding.subspaces,
            layer=finding.layer,
            scorer=scorer,
            target=finding.target,
            unit_axis=finding.axis,
        )
        return maps[:, 0].sum(1).detach()

    def channels_last(values: Tensor) -> Tensor:
        return values.movedim(unit_axis_of(values, finding.axis), -1)

    layer = finding.layer
    gather = ContextGather(lambda _, __: channels_last)
    with preserved(model):
        plain = values_at(model, layer, inputs[:1])
        with scorer.session(model, inputs, [layer], gather) as (score, canonizers):
            target = torch.full((len(inputs),), finding.target, device=inputs.device)
            a, c = score(inputs, target)[layer].unbind(1)
            require_same_values(layer, plain, gather, canonizers)
    U = finding.subspaces.basis.to(a)
    return ((a @ U) * (c @ U)).sum(-1)  # Σ_i a_i (U Uᵀc)_i


def _stretched(inputs: Tensor) -> Tensor:
    low, high = inputs.aminmax()
    return (inputs - low) / (high - low).clamp_min(torch.finfo(inputs.dtype).tiny)
