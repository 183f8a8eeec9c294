"""``discover``: features that a model's classes depend on, found without labels of a feature."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Literal

import torch
from torch import Tensor, nn

from xai_edit.core.checks import one_of, require, require_type, whole_number, with_labels
from xai_edit.core.data import Data
from xai_edit.core.files import checksum
from xai_edit.core.guard import require_finite
from xai_edit.core.layers import resolve_layers
from xai_edit.core.outputs import Outputs, outputs_as
from xai_edit.core.precision import in_float32, precision_origin
from xai_edit.core.wrapped import unwrapped
from xai_edit.datasets.image_set import ImageSet
from xai_edit.discovery.class_search import estimated_cost, search_class
from xai_edit.discovery.conclude import concluded
from xai_edit.discovery.findings import Finding, Findings, Searched
from xai_edit.discovery.marks import Marks
from xai_edit.discovery.progress import Progress
from xai_edit.discovery.proposals import METHODS, Method
from xai_edit.discovery.samples import known_length
from xai_edit.discovery.search import Search
from xai_edit.discovery.strategies import SMALLEST
from xai_edit.lrp.lrp import LRP


def discover(
    model: nn.Module,
    data: Data,
    target: int | Sequence[int] | None = None,
    layers: Sequence[str] | str | None = None,
    *,
    images: Literal["predicted", "all"] = "predicted",
    method: Method = "relevance",
    scorer: LRP | None = None,
    limit: int = 1000,
    seed: int = 0,
    marks: Marks | None = None,
    unit_axis: int | None = None,
    outputs: Outputs = None,
    progress: bool = False,
) -> Findings:
    """Find features that speak for a class, such as a watermark, without labels of the feature.

    For each class and layer: relevance by channel of the samples predicted as the class, divided
    into strategies; a subspace by contrast of each strategy with the others; its presence in each
    sample; and the evidence on a third of the samples, which is not used to find. A person decides
    what a finding is: a feature that belongs to the class transfers as well as a spurious one.

    Parameters
    ----------
    model : nn.Module
        Not changed. In half precision, a float32 copy is searched.
    data : iterable or Dataset
        See `xai_edit.core.data.batches`; read several times, in the same order. Labels are used
        for accuracies alone. Positions where an input ``attention_mask`` is 0 are left out.
    target : int or sequence of int, optional
        Classes that features speak for; by default all, those with the fewest samples first.
    layers : sequence of str, optional
        By default `xai_edit.discovery.default_layers`.
    images : {"predicted", "all"}
        Explain a class on the samples predicted as it, or on all.
    method : {"relevance", "spray", "activations", "errors", "npca"}
        How samples are divided, see `xai_edit.discovery.proposals`.
    scorer : LRP, optional
        By default ``LRP("epsilon-plus", initial="one")``.
    limit : int
        Samples of a class, at most, drawn at random; 48 or more.
    seed : int
    marks : Marks, optional
        Of an earlier search of this model and data. The samples of a class are divided by
        ``marks.attribute`` then, ticks included, so that the subspaces are fitted to it.
    unit_axis : int, optional
        The axis of the layers' channels, see `xai_edit.core.axes.unit_axes`.
    outputs : str or callable, optional
        Where the logits are in what the model returns, see `xai_edit.outputs_as`.
    progress : bool
        Whether to show a bar on stderr, with the time left. It moves with each batch.

    Raises
    ------
    UnknownLayerError, NonFiniteError, TypeError, ValueError
        On bad input, before anything is looked for.

    Examples
    --------
    >>> findings = xe.discover(model, data, target=0, layers=["relu1"])
    >>> [finding.layer for finding in findings.standing_out]
    ['relu1']
    >>> findings.found[0].has.equal(attribute)
    True
    """
    one_of(images, ("predicted", "all"), "images")
    one_of(method, METHODS, "method")
    limit = whole_number(limit, "limit", least=6 * SMALLEST)  # a third of them judge
    seed = whole_number(seed, "seed")
    scorer = LRP("epsilon-plus", initial="one") if scorer is None else scorer
    require_type(scorer, LRP, "scorer", "give xai_edit.LRP(composite)")
    named = images == "predicted" or target is not None
    require(named, "target", target, "with images='all', name the target classes")
    model = unwrapped(model)
    require_finite(model)
    if marks is not None:
        require_type(marks, Marks, "marks", "give xai_edit.Marks.load(file)")
        require(method == "relevance", "method", method, "marks divide the samples instead")
        marks.require_model(model)
    if layers is not None:
        layers = resolve_layers(model, layers)
    with outputs_as(outputs), closing(Progress(progress, known_length(data))) as bar:
        search = Search.begin(in_float32(model), data, layers, unit_axis, seed, bar.add)
        if method == "errors":
            with_labels(search.labels)
        data_sum = checksum({"samples": torch.from_numpy(search.samples.contents.view("i8"))}, "")
        same = marks is None or (marks.data, len(marks)) == (data_sum, len(search.predicted))
        if not same:
            raise ValueError("marks: of other data; give the data that the marks were made on")
        marked = None if marks is None else marks.attribute
        targets = search.targets(target)
        found: list[Finding] = []
        searched: list[Searched] = []
        costs = [estimated_cost(search, one, images, limit) for one in targets]
        bar.plan([*costs, len(search.predicted)])
        for at, one in enumerate(targets, start=1):
            bar.begin(f"class {one} ({at} of {len(targets)})")
            more, notes = search_class(search, one, images, method, scorer, limit, marked)
            found += more
            searched += notes
        bar.begin("presence in all samples")
        finished = concluded(search, found)
    return Findings(
        tuple(finished),
        tuple(searched),
        search.predicted,
        search.labels,
        _names(data),
        {
            "target": None if target is None else [*targets],
            "layers": [*search.axes],
            "images": images,
            "method": method,
            "scorer": repr(scorer),
            "limit": limit,
            "seed": seed,
            "model": checksum(model.state_dict(), ""),
            "data": data_sum,
            "marks": None if marks is None else marks.discovery,
            **precision_origin(model),
        },
    )


def _names(data: Data) -> tuple[str, ...]:
    files = isinstance(data, ImageSet) and not isinstance(data.source, Tensor)
    return tuple(data.source) if files else ()  # type: ignore[union-attr]
