"""The samples that show a finding to a person, and their pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xai_edit.concepts.explanations import subspace_maps
from xai_edit.core.checks import require
from xai_edit.core.data import Data, model_device
from xai_edit.core.files import checksum
from xai_edit.core.inputs import one_tensor
from xai_edit.core.wrapped import unwrapped
from xai_edit.discovery.findings import Finding, Findings
from xai_edit.discovery.samples import Samples
from xai_edit.lrp.lrp import LRP

SHOWN = 12  # samples in a row
SIDE = 72  # of a picture, at most


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
) -> dict[str, Tensor]:
    """Return pictures of the shown samples, and for each the relevance through the subspace.

    Parameters
    ----------
    model, data
        Those of `xai_edit.discover`; the model is not changed.
    findings : Findings
    pixels : callable, optional
        Makes images in [0, 1], shape (samples, 1 or 3, height, width), of inputs; by default they
        are stretched to their extremes.

    Returns
    -------
    dict of Tensor
        ``"samples"``, int64, shape (pictures,); ``"images"``, uint8, shape (pictures, channels,
        height, width), at most 72 pixels a side; and by the number of a finding, where its layer
        has maps, ``"0"``, float32, shape (shown samples, height, width), each map divided by its
        largest absolute value. Nothing where the inputs are not images.

    Raises
    ------
    ValueError
        If the data are not those of the findings.
    """
    model = unwrapped(model)
    samples = Samples(data, model_device(model))
    for _ in samples.first_pass():
        pass
    same = checksum({"samples": torch.from_numpy(samples.contents.view("i8"))}, "")
    if same != findings.origin["data"]:
        raise ValueError("data: other samples than those of the findings; give the same data")
    rows = [torch.cat(shown_rows(one, findings)) for one in findings]
    if not rows:
        return {}
    wanted = torch.cat(rows).unique()
    parts = []
    for _, batch in samples.read(wanted):
        inputs = batch.inputs
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
            return {}
        parts.append(one_tensor(inputs, "a picture"))
    inputs = torch.cat(parts)
    images = _stretched(inputs) if pixels is None else pixels(inputs)
    require(images.shape[:1] == wanted.shape, "pixels", tuple(images.shape), "one image a sample")
    small = (_small(images.cpu().float()).clamp(0, 1) * 255).round().byte()
    made = {"samples": wanted, "images": small}
    scorer = LRP("epsilon-plus", initial="one")
    for number, (finding, own) in enumerate(zip(findings, rows, strict=True)):
        chosen = inputs[torch.searchsorted(wanted, own).to(inputs.device)]
        try:
            maps, _ = subspace_maps(
                model,
                chosen,
                finding.subspaces,
                layer=finding.layer,
                scorer=scorer,
                target=finding.target,
                unit_axis=finding.axis,
            )
        except ValueError:  # such as a layer whose relevance does not reach the input
            continue
        drawn = _small(maps[:, 0].sum(1, keepdim=True).detach().cpu().float())[:, 0]
        largest = drawn.abs().amax((1, 2), keepdim=True)
        made[str(number)] = drawn / largest.clamp_min(torch.finfo(drawn.dtype).tiny)
    return made


def _stretched(inputs: Tensor) -> Tensor:
    low, high = inputs.aminmax()
    return (inputs - low) / (high - low).clamp_min(torch.finfo(inputs.dtype).tiny)


def _small(images: Tensor) -> Tensor:
    """Return images made smaller by the mean over their pixels."""
    factor = min(1.0, SIDE / max(images.shape[2:]))
    size = [max(1, round(side * factor)) for side in images.shape[2:]]
    return nn.functional.interpolate(images, size, mode="area")
