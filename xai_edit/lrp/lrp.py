"""The `LRP` scorer, and the protocol of all scorers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from zennit.canonizers import Canonizer
from zennit.core import Composite

from xai_edit.core.analysis import Analysis, analysed
from xai_edit.core.axes import unit_axes
from xai_edit.core.checks import one_of
from xai_edit.core.final_operation import note_final, without_final_module
from xai_edit.core.guard import Snapshot, copied, preserved
from xai_edit.core.inputs import Inputs, as_inputs, same_inputs
from xai_edit.core.layers import differentiable, embeddings_in_graph, run, sum_positions
from xai_edit.core.outputs import outputs_of, tensor_of
from xai_edit.core.precision import HALF, in_float32
from xai_edit.core.targets import Targets, weights_of
from xai_edit.core.trace import Trace, trace
from xai_edit.lrp import presets as rules
from xai_edit.lrp.accelerated import DirectHook, accelerated, direct
from xai_edit.lrp.canonizers import (
    along_the_data,
    canonized,
    choose_canonizers,
    refuse_difference,
    report_rounding,
    rounding,
    rules_of,
    same_logits,
    unmerged_norms,
    with_own_rules,
)
from xai_edit.lrp.diagnosis import Diagnosis, of_the_forward_pass, of_the_weights, refuse
from xai_edit.lrp.relevance_at_layers import Gather


class Scorer(Protocol):
    """A callable, such as a plain function, that scores the units of some layers for one batch.

    ``scorer(model, inputs, targets, layers)`` takes a batch of inputs, the target class of each
    sample (int64, shape (samples,)) and layer names, and returns for each name a tensor of shape
    (samples, units), summed over positions. The model is in evaluation mode and is restored
    afterwards, whatever the scorer does to it.

    A scorer that reads only the weights sets ``needs_data = False`` and is called once, with None
    for inputs and targets. A scorer of batches instead of samples sets ``per_sample = False`` for
    `xai_edit.testing.check_scorer`.

    Examples
    --------
    >>> def bias_size(model, inputs, targets, layers):
    ...     sizes = {name: model.get_submodule(name).bias.detach().abs() for name in layers}
    ...     return {name: size.expand(len(inputs), -1) for name, size in sizes.items()}
    >>> scores = xe.score_units(model, data, bias_size, layers=["conv"], aggregate="mean")
    >>> scores["conv"][:5]
    tensor([ 0.,  0.,  0., 32.,  0.], dtype=torch.float64)
    """

    def __call__(
        self, model: nn.Module, inputs: Any, targets: Any, layers: Sequence[str], /
    ) -> Mapping[str, Tensor]:
        """Score one batch."""
        ...


class LRP:
    """Layer-wise relevance propagation by a Zennit composite.

    The relevance of a unit is read at its layer's output and summed over positions.

    Parameters
    ----------
    composite : str or zennit.core.Composite
        A preset name (see `xai_edit.lrp.presets.PRESETS`) or any Zennit composite.
    initial : {"logit", "one"}
        Relevance at the target's output: its logit (Chang et al., Eq. 3), or 1, so that all samples
        have the same weight (used for pruning).
    canonizers : "auto" or sequence of zennit.canonizers.Canonizer
        "auto" takes the composite's own or, if it has none, chooses by a forward pass of one
        sample, see `xai_edit.lrp.canonizers.choose_canonizers`; ``()`` means none.
    **parameters
        Parameters of a preset, such as ``gamma=0.1``.

    Raises
    ------
    ValueError
        If the preset or ``initial`` is unknown.
    TypeError
        If the composite is of another kind, or a parameter does not belong to the preset.

    Notes
    -----
    Bach et al. 2015 (PLoS ONE 10(7)). A module without a rule in the composite uses the Zennit hook
    in its attribute ``lrp_rule``, if it has one. The hooks are those of `xai_edit.lrp.accelerated`.
    Scoring raises if an operation has no rule; see `xai_edit.check_model`.
    The stabiliser is Zennit's, 1e-6; that of Captum's ``EpsilonRule`` is 1e-9.
    A model with float16 or bfloat16 parameters is scored in a float32 copy.

    Examples
    --------
    >>> scorer = xe.LRP("gamma+epsilon", gamma=0.1)
    >>> xe.score_units(model, data, scorer, target=0).top("fc1", count=2)
    tensor([3, 0])
    >>> scorer.heatmap(model, images[:8], labels[:8]).shape
    torch.Size([8, 3, 4, 4])
    """

    def __init__(
        self,
        composite: str | Composite = "epsilon",
        *,
        initial: Literal["logit", "one"] = "logit",
        canonizers: Literal["auto"] | Sequence[Canonizer] = "auto",
        **parameters: Any,
    ) -> None:
        one_of(initial, ("logit", "one"), "initial")
        if isinstance(composite, str):
            self.name = repr(composite)
            for name, value in parameters.items():
                shown = value.flatten().tolist() if isinstance(value, Tensor) else value
                self.name += f", {name}={shown!r}"
            self.composite = rules.preset(composite, **parameters)
        elif isinstance(composite, Composite):
            if parameters:
                raise TypeError(
                    f"{[*parameters]} go with a preset name; set them on the composite itself"
                )
            self.name = f"{type(composite).__name__}(…)"
            self.composite = composite
        else:
            raise TypeError(
                f"composite: {composite!r} is neither a preset ({[*rules.PRESETS]}) nor an "
                "instance of a Zennit composite"
            )
        self.initial = initial
        self.canonizers = canonizers

    def __repr__(self) -> str:
        return f"LRP({self.name}, initial={self.initial!r})"

    def canonizers_for(self, model: nn.Module, found: Trace | None) -> list[Canonizer]:
        """Return the canonizers to apply in addition to the composite's own."""
        if found is None:
            return [] if self.canonizers == "auto" else list(self.canonizers)
        return choose_canonizers(model, found, self.composite)

    def __call__(
        self, model: nn.Module, inputs: Inputs, targets: Targets, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the relevance of each unit, shape (samples, units) per layer."""
        inputs = as_inputs(inputs, "inputs")
        with self.session(model, inputs, layers) as (score, _):
            return score(inputs, targets)

    def relevance(
        self, model: nn.Module, inputs: Inputs, targets: Targets, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the relevance per layer in the shape of the layer's output."""
        inputs = as_inputs(inputs, "inputs")
        with self.session(model, inputs, layers, Gather()) as (score, _):
            return score(inputs, targets)

    def heatmap(self, model: nn.Module, inputs: Inputs, targets: Targets) -> Tensor:
        """Return the relevance of each input value, in the shape of ``inputs``.

        Of several inputs, the first with floating numbers.
        """
        inputs = as_inputs(inputs, "inputs")
        if not inputs.is_floating_point():
            raise ValueError(
                f"inputs: {inputs.dtype}, such as token ids, have no relevance; take that at the "
                "embedding's output instead"
            )
        widened = in_float32(model)
        if widened is not model and inputs.dtype in HALF:
            inputs = inputs.to(torch.float32)
        with self._registered(widened, inputs, Gather(), ()) as ready:
            copy = differentiable(inputs)
            pixels = copy if isinstance(copy, Tensor) else copy.first
            outputs = ready.outputs(copy)
            if not outputs.requires_grad:
                raise ValueError(
                    "model: no relevance reaches the input: a part of the model runs under "
                    "torch.no_grad(), or detaches its values"
                )
            (relevance,) = torch.autograd.grad(outputs, pixels, self._seed(outputs, targets))
        return relevance

    @contextmanager
    def session(
        self,
        model: nn.Module,
        sample: Inputs,
        layers: Sequence[str],
        gather: Gather | None = None,
        *,
        analysis: Analysis | None = None,
    ) -> Iterator[tuple[Callable[[Inputs, Targets], dict[str, Tensor]], list[str]]]:
        """Prepare a model once for many batches, and restore it on leaving.

        Canonizers are chosen by the first sample of ``sample``; ``gather`` reduces the relevance at
        a layer, by default to sums over positions; ``analysis`` is that of the model for such
        inputs, if it exists already. Yields ``score(inputs, targets)``, which returns the gathered
        relevance of a batch per layer, and the names of the canonizers in use.
        """
        widened = in_float32(model)
        if widened is not model:
            model, analysis = widened, None
        if gather is None:
            axes = unit_axes(model, sample, layers)

            def reduce(relevance: Tensor, name: str) -> Tensor:
                return sum_positions(relevance, axes[name])

            gather = Gather(reduce)
        with self._registered(model, sample, gather, layers, analysis) as ready:

            def score(inputs: Inputs, targets: Targets) -> dict[str, Tensor]:
                gather.leaves.clear()
                outputs = ready.outputs(differentiable(inputs) if ready.whole else inputs.detach())
                relevance = gather.relevance(layers, outputs, self._seed(outputs, targets))
                for hook in ready.composite.hook_refs:
                    hook.tensor_handles.remove()  # Zennit's hooks add some with each batch
                return relevance

            yield score, [type(canonizer).__name__ for canonizer in ready.canonizers]

    def findings_as_canonized(
        self, model: nn.Module, sample: Inputs, layers: Sequence[str]
    ) -> list[Diagnosis]:
        """Return the findings of a forward pass under the composite's own canonizers."""
        canonizers = self.composite.canonizers
        with preserved(model), canonized(model, canonizers):
            found = trace(model, sample)
            return of_the_forward_pass(found, model, self.composite, layers, canonizers)

    def _seed(self, outputs: Tensor, targets: Targets) -> Tensor:
        weights = weights_of(targets, outputs)
        return weights * outputs.detach() if self.initial == "logit" else weights  # Eq. 3

    @contextmanager
    def _registered(
        self,
        model: nn.Module,
        sample: Inputs,
        gather: Gather,
        layers: Sequence[str],
        analysis: Analysis | None = None,
    ) -> Iterator[_Ready]:
        with (
            torch.inference_mode(False),
            torch.autocast(sample.device.type, enabled=False),
            preserved(model),
            ExitStack() as stack,
        ):
            refuse(of_the_weights(model))
            if self.canonizers == "auto" and not self.composite.canonizers:
                analysis = analysis or analysed(model, sample)
                found = analysis.trace
                canonizers = self.canonizers_for(model, found)
                refuse(of_the_forward_pass(found, model, self.composite, layers, canonizers))
                unmerged = unmerged_norms(model, found, canonizers)
                # A sum behind the layers needs the graph of both summands, from the inputs on.
                whole = not layers or any(one.joins for one in found.after(layers))
            else:
                analysis, whole, unmerged, found = None, True, set(), None
                if self.canonizers == "auto":
                    refuse(self.findings_as_canonized(model, sample, layers))
                canonizers = self.canonizers_for(model, None)
            ended = None if analysis is None else analysis.trace
            form = None if analysis is None else self._form(model, canonizers)
            if analysis is not None and form in analysis.verified:
                plain = None
            elif analysis is not None and same_inputs(analysis.trace.sample, sample[:1]):
                plain = outputs_of(analysis.trace.output, sample[:1])
            else:
                with torch.no_grad():
                    output = run(model, sample[:1])
                plain = outputs_of(output, sample[:1])
                if analysis is None and plain is not tensor_of(output):
                    ended = analysed(model, sample).trace
            before = None if plain is None else Snapshot(model)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            embeddings_in_graph(model)
            if ended is not None and (final := ended.final) is not None:
                note_final(final.name)
                without_final_module(model, final.module, ended.calls[final.module])
            gather.attach(model, layers, inputs=True)
            # On the stack before the composite, so that the hooks go first and the merge after.
            stack.enter_context(canonized(model, canonizers))
            rules = with_own_rules(self.composite)
            if found is not None:
                rules = along_the_data(rules, model, found)
            composite = accelerated(rules, unmerged=unmerged)
            stack.enter_context(composite.context(model))
            gather.attach(model, layers, inputs=False)
            stack.enter_context(torch.enable_grad())
            used = [*self.composite.canonizers, *canonizers]
            ready = _Ready(model, gather, composite, used, whole, sample[:1], plain, analysis, form)
            if before is not None:
                ready.in_double = functools.partial(self._in_double, ready, before, layers)
            yield ready

    def _in_double(
        self, ready: _Ready, before: Snapshot, layers: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return the sample's logits without and with canonizers, in float64 on a copy."""
        with preserved(ready.model):
            before.restore()
            model = copied(ready.model).double()
        sample = ready.sample
        if sample.is_floating_point():
            sample = sample.to(torch.float64)
        with torch.no_grad():
            plain = outputs_of(run(model, sample), sample)
        with self._registered(model, sample, Gather(), layers):
            return plain, outputs_of(run(model, differentiable(sample)), sample).detach()

    def _form(self, model: nn.Module, canonizers: Sequence[Canonizer]) -> Hashable:
        """Return a key of the canonical form, or None if rules may change the logits."""
        rules = rules_of(self.composite, model).values()
        if all(rule is None or isinstance(direct(rule), DirectHook) for rule in rules):
            return tuple((type(one), getattr(one, "operations", None)) for one in canonizers)
        return None


@dataclass
class _Ready:
    """A model under a composite."""

    model: nn.Module
    gather: Gather
    composite: Composite
    canonizers: list[Canonizer]
    whole: bool  # whether the graph has to begin at the inputs
    sample: Inputs
    plain: Tensor | None  # the sample's logits without canonizers; None after the comparison
    analysis: Analysis | None  # None if the user set the canonizers
    form: Hashable
    in_double: Callable[[], tuple[Tensor, Tensor]] | None = None  # with ``plain``

    def outputs(self, inputs: Inputs) -> Tensor:
        """Return the outputs under the composite."""
        outputs = outputs_of(run(self.model, inputs), inputs)
        self.require_same(inputs, outputs)
        return outputs

    def require_same(self, inputs: Inputs, logits: Tensor) -> None:
        """Compare the logits of the sample, once, with those without canonizers."""
        plain = self.plain
        if plain is None or not same_inputs(inputs[:1], self.sample):
            return
        self.plain = None
        got = logits[:1].detach()
        # A batch norm may use the statistics of the batch.
        if not same_logits(plain, got):
            leaves, self.gather.leaves = self.gather.leaves, {}
            got = outputs_of(run(self.model, differentiable(self.sample)), self.sample).detach()
            self.gather.leaves = leaves
        if same_logits(plain, got):
            if self.analysis is not None and self.form is not None:
                self.analysis.verified.add(self.form)
            return
        assert self.in_double is not None
        if (error := rounding(plain, got, self.in_double)) is not None:
            report_rounding(error)
        else:
            refuse_difference(plain, got, self.canonizers, chosen=self.analysis is not None)


def describe(scorer: Scorer) -> str:
    """Return a name for a scorer that is the same in every process."""
    if isinstance(scorer, functools.partial):
        return f"partial {describe(scorer.func)}"
    if hasattr(scorer, "__qualname__"):
        return str(scorer.__qualname__)
    plain = type(scorer).__repr__ is object.__repr__
    return type(scorer).__qualname__ if plain else repr(scorer)
