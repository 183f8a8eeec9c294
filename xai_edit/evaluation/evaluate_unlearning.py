"""Evaluation of class unlearning: accuracies, probe, membership attack and relearning."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.checks import ascending, readable_again, whole_number
from xai_edit.core.cost import Cost, measured
from xai_edit.core.data import Data, model_device, peek
from xai_edit.core.errors import NonFiniteError
from xai_edit.core.guard import copied, preserved
from xai_edit.core.inputs import Inputs
from xai_edit.core.layers import predict, resolve_layers
from xai_edit.core.outputs import Outputs, outputs_as
from xai_edit.core.sampling import ClassSample
from xai_edit.core.targets import class_list
from xai_edit.core.wrapped import unwrapped
from xai_edit.edits.model_edit import ModelEdit
from xai_edit.evaluation.membership import forgetting_rates
from xai_edit.evaluation.outputs import Overlap, naming, read, split_accuracy
from xai_edit.evaluation.recovery import Readers, near_boundary
from xai_edit.evaluation.relearning import STEPS, Relearning, lessons_kept, relearning_curves
from xai_edit.evaluation.unlearning_figures import Divergence, NetworkFigures, Unlearning
from xai_edit.last_layer.find_head import Head, find_head

KEPT = 5000
"""Samples whose features (for the probe) or outputs (for the attack) are kept, as many of each
class."""


def evaluate_unlearning(
    model: nn.Module,
    edit: ModelEdit | nn.Module,
    *,
    train: Data,
    test: Data,
    target: int | Sequence[int],
    retrained: ModelEdit | nn.Module | None = None,
    analysis: Data | None = None,
    relearn: Sequence[int] = STEPS,
    layers: Sequence[str] = (),
    cost: Cost | None = None,
    seed: int = 0,
    outputs: Outputs = None,
) -> Unlearning:
    """Measure the effect of an edit on the classes to forget and on the rest, before and after.

    A_t, A_g and F_r are those of Chang et al., *Zero-shot class unlearning*, Sec. V-B. In addition:
    linear probes of the features, a head fitted anew on 2 % of the training samples, the class mean
    of ten samples as the head's row (`xai_edit.evaluation.recovery.prototype`), a relearning curve,
    the accuracy on others' samples near the boundary to the classes, and the divergence from a
    network retrained without them.

    Takes one pass over ``train`` and one over ``test``, and one more over ``test`` for each step of
    the relearning. Holds copies of the network, features and outputs of about 10,000 samples, and
    640 training samples for the relearning, at least one of each class.

    Parameters
    ----------
    model : nn.Module
        The original classifier; only read, like the other networks.
    edit : ModelEdit or nn.Module
        An edit of ``model``, not applied; or the unlearned network itself.
    train, test : iterable or Dataset
        Labelled samples that the model was trained on, and that neither model nor edit has seen.
    target : int or sequence of int
        The class or classes to forget.
    retrained : ModelEdit or nn.Module, optional
        A network trained without the classes, with as many outputs, or its edit of ``model``.
    analysis : iterable or Dataset, optional
        Data that the edit was planned from; must not share a sample with ``train`` or ``test``.
    relearn : sequence of int
        Optimiser steps after which the relearning is measured, ascending; empty to leave it out.
    layers : sequence of str
        Layers of all networks, at whose outputs, means over positions, a probe is fitted too; of a
        wrapped network, such as a compiled one, by their names in the model inside.
    cost : Cost, optional
        Of the edit itself, to report with the rest.
    seed : int
        Of the random samples kept, the attack and the batches of the relearning. On a CPU the same
        seed gives the same bits for data in the same order.
    outputs : str or callable, optional
        Where the logits are in what the models return, see `xai_edit.outputs_as`.

    Raises
    ------
    EditMismatchError, ValueError, TypeError, NonFiniteError
        If the edit is of another model, or already applied; if labels are missing or out of range,
        a forgotten class or all others have no samples in a split, the networks' outputs differ in
        number, or ``analysis`` overlaps with a split; if data can be read only once; if an input or
        an output is not finite.

    Examples
    --------
    >>> edit = xe.SingleWeight().plan(model, data, target=1)
    >>> result = xe.evaluate_unlearning(model, edit, train=train, test=test, target=1, relearn=[])
    >>> result.before.test.forgotten, result.after.test.forgotten, result.after.test.rest
    (0.75, 0.0, 0.875)
    """
    steps = ascending(relearn, "relearn", whole_number, "give steps from 0 on, ascending")
    seed = operator.index(seed)
    readable_again(train, "the evaluation", "train")
    readable_again(test, "the evaluation", "test")
    parts: dict[str, Cost] = {}
    with outputs_as(outputs), ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # whose tensors cannot be trained on
        networks = {"before": model, "after": _edited(model, edit, "edit")}
        if retrained is not None:
            networks["retrained"] = _edited(model, retrained, "retrained")
        networks = {name: unwrapped(one) for name, one in networks.items()}
        for network in networks.values():
            stack.enter_context(preserved(network))
        stack.enter_context(torch.no_grad())
        with naming("train"):
            first = peek(train, model_device(model))[0].inputs[:1]
        classes = _classes(networks, first)
        targets = tuple(class_list(target, classes))
        heads, headless = _heads(networks, first)
        for network in networks.values() if layers else ():
            layers = resolve_layers(network, layers)
        overlap = Overlap(analysis)
        counts: dict[str, dict[str, Tensor]] = {"train": {}, "test": {}}
        evenly = [max(1, KEPT // classes)] * classes

        with measured() as parts["train"]:
            own = max(1, KEPT // len(targets))  # more, since F_r is over them
            limits = [own if one in targets else rest for one, rest in enumerate(evenly)]
            said, features = ClassSample(limits, seed), ClassSample(evenly, seed)
            lessons = ClassSample(lessons_kept(classes, targets), seed)
            for batch in read(networks, heads, train, "train", counts["train"], layers):
                overlap.add(batch.inputs, "train")
                said.add(batch.labels, {n: p.float() for n, p in batch.probabilities.items()})
                features.add(batch.labels, batch.features)
                if steps:
                    lessons.add(batch.labels, {"inputs": batch.inputs})
            trained = {n: split_accuracy(c, targets, "train") for n, c in counts["train"].items()}
        with measured() as parts["probe"]:
            sample, per_class = features.rows(), counts["train"]["before"][1].tolist()
            readers = {
                name: Readers(name, heads.get(name), layers, sample, per_class, targets)
                for name in networks
            }
        with measured() as parts["test"]:
            unseen = ClassSample(evenly, seed)
            near = {name: torch.zeros(2, dtype=torch.long) for name in networks}
            compared = () if retrained is None else ("before", "after")
            divergence = {name: torch.zeros(2, dtype=torch.double) for name in compared}
            for batch in read(networks, heads, test, "test", counts["test"], layers):
                overlap.add(batch.inputs, "test")
                p = batch.probabilities
                unseen.add(batch.labels, {"before": p["before"].float()})
                forgotten = torch.isin(batch.labels, torch.tensor(targets))
                close = near_boundary(p["before"], batch.labels, targets)
                for name, reader in readers.items():
                    reader.read(batch.features, batch.labels)
                    right = p[name].argmax(1) == batch.labels
                    near[name] += torch.stack([(right & close).sum(), close.sum()])
                for name, sums in divergence.items():
                    each = jensen_shannon(p[name], p["retrained"])
                    sums += torch.stack([each[forgotten].sum(), each[~forgotten].sum()])
            tested = {n: split_accuracy(c, targets, "test") for n, c in counts["test"].items()}
        overlap.refuse()
        with measured() as parts["attack"]:
            given: dict[str, Any] = {"target": targets, "seed": seed}
            attack, rates = forgetting_rates(said.rows(), unseen.rows(), **given)
        curves: dict[str, Relearning] = {}
        if steps:
            with measured() as parts["relearning"]:
                others = {name: network for name, network in networks.items() if name != "before"}
                given |= {"steps": steps, "start": tested}
                curves = relearning_curves(others, heads, lessons.rows(), test, **given)
        changed = _weights_changed(model, edit)

    figures = {}
    for name, on_test in tested.items():
        mean, samples = None, on_test.forgotten_samples
        if name in divergence:
            own, rest = divergence[name].tolist()
            mean = Divergence(own / samples, rest / on_test.rest_samples)
        recovered = readers[name].found()
        probed = recovered.get("probe")
        right, close_samples = near[name].tolist()
        figures[name] = NetworkFigures(
            trained[name],
            on_test,
            rates.get(name),
            mean,
            None if probed is None else probed.forgotten,
            headless.get(name),
            curves.get(name),
            right / close_samples if close_samples else None,
            {layer: recovered[f"probe:{layer}"].forgotten for layer in layers},
            recovered.get("head_from_few"),
            recovered.get("prototype"),
        )
    networks_figures = figures["before"], figures["after"], figures.get("retrained")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    counted = len(sample["labels"]) if heads or layers else 0, changed, parameters
    boundary = int(near["before"][1])
    return Unlearning(targets, *networks_figures, attack, *counted, boundary, seed, cost, parts)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Return the Jensen–Shannon divergence of each two rows, in nats, 0 to ln 2.

    H((p + q)/2) − (H(p) + H(q))/2, where 0·log 0 = 0; float64, shape (samples,).
    """
    mixed, own = torch.special.entr((p + q) / 2), torch.special.entr(p) + torch.special.entr(q)
    divergence: Tensor = mixed.sum(1) - own.sum(1) / 2
    return divergence.clamp(min=0)  # rounding may take equal rows below it


def _edited(model: nn.Module, edit: ModelEdit | nn.Module, name: str) -> nn.Module:
    """Return the edited network: a copy of the model where an edit is given."""
    if edit is model:
        raise ValueError(f"{name}: the model itself was given; give a ModelEdit or a network")
    if isinstance(edit, nn.Module):
        return edit
    if not isinstance(edit, ModelEdit):
        raise TypeError(f"{name}: {type(edit).__name__} given; give a ModelEdit or a network")
    edit.check(model)
    return edit.apply(copied(model))


def _classes(networks: Mapping[str, nn.Module], inputs: Inputs) -> int:
    """Return the number of classes, the same for all networks."""
    counts = {}
    for name, network in networks.items():
        with naming(f"network {name!r}"):
            counts[name] = predict(network, inputs.to(model_device(network))).shape[1]
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"model: the networks' numbers of classes differ: {listed}")
    return counts["before"]


def _heads(
    networks: Mapping[str, nn.Module], inputs: Inputs
) -> tuple[dict[str, Head], dict[str, str]]:
    """Return the head of the networks that have one, and why the others have none."""
    heads, headless = {}, {}
    for name, network in networks.items():
        try:
            heads[name] = find_head(network, inputs.to(model_device(network)))
        except NonFiniteError as problem:
            raise NonFiniteError(f"network {name!r}: {problem}") from problem
        except ValueError as problem:  # the outputs themselves were checked before
            headless[name] = str(problem)
    return heads, headless


def _weights_changed(model: nn.Module, edit: ModelEdit | nn.Module) -> int | None:
    """Return the number of changed weights; None where the edited network has other parameters."""
    if isinstance(edit, ModelEdit):
        return edit.size
    old, new = (dict(unwrapped(network).named_parameters()) for network in (model, edit))
    if {name: one.shape for name, one in old.items()} != {n: one.shape for n, one in new.items()}:
        return None
    return sum(int((one != new[name].to(one.device)).sum()) for name, one in old.items())
