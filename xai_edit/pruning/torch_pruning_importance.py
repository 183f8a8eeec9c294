"""Torch-Pruning's importances as scorers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.errors import out_of_memory
from xai_edit.core.guard import copied
from xai_edit.core.layers import WEIGHTED, predict
from xai_edit.core.targets import Targets, classes_of
from xai_edit.pruning.coupled_channels import channel_groups
from xai_edit.pruning.unit_flow import PADDED


class TorchPruningImportance:
    """Torch-Pruning's importance of each channel and those coupled to it, split among their layers.

    The parameters have the gradients of the batch's cross-entropy loss.

    Parameters
    ----------
    importance : callable
        Such as ``torch_pruning.importance.GroupTaylorImportance()``: returns one score per channel
        of a pruning group. TypeError for those that collect gradients sample by sample.

    Examples
    --------
    >>> import torch_pruning
    >>> importance = torch_pruning.importance.GroupTaylorImportance()
    >>> scorer = xe.pruning.TorchPruningImportance(importance)
    >>> scores = xe.score_units(model, data, scorer, layers=["conv"])
    >>> scores.top("conv", count=4).sort().values
    tensor([0, 1, 2, 3])
    """

    per_sample = False

    def __init__(self, importance: Callable[[Any], Tensor]) -> None:
        if not callable(importance) or hasattr(importance, "accumulate_grad"):
            raise TypeError(
                f"importance: {importance!r} given; give one of Torch-Pruning's that scores a "
                "group at once, such as torch_pruning.importance.GroupTaylorImportance()"
            )
        self.importance = importance

    def __repr__(self) -> str:
        return f"TorchPruningImportance({type(self.importance).__name__})"

    def __call__(
        self, model: nn.Module, inputs: Tensor, targets: Targets, layers: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the batch's importances, the same for each sample, (samples, channels) per layer.

        ValueError if Torch-Pruning cannot trace the model, a layer is neither linear nor a
        convolution, its channels are padded with constants, or the importance does not return one
        number per channel.
        """
        for name in layers:
            if not isinstance(model.get_submodule(name), WEIGHTED):
                raise ValueError(
                    f"layer {name!r}: only linear and convolution layers have an importance"
                )
        with torch.inference_mode(False), torch.enable_grad():
            network = copied(model).eval().requires_grad_()
            graph = _graph(network, inputs)
            logits = predict(network, inputs)
            nn.functional.cross_entropy(logits, classes_of(targets, logits)).backward()
            groups = channel_groups(model, inputs)
            coupled = [group.layers for group in groups]
            for group in groups:  # Torch-Pruning takes wrong channels for those it is added to
                padded = [name for name in layers if name in group.layers]
                if padded and PADDED in (group.fixed or ""):
                    raise ValueError(
                        f"layer {padded[0]!r}: {group.fixed}, which Torch-Pruning does not follow, "
                        "so its importances would be of other channels; name other layers"
                    )
            scores = {
                name: self._scores(graph, network.get_submodule(name), name, coupled)
                for name in layers
            }
        return {name: of_layer.expand(len(inputs), -1) for name, of_layer in scores.items()}

    def _scores(
        self, graph: Any, module: Any, name: str, coupled: list[dict[str, Tensor]]
    ) -> Tensor:
        width = graph.get_out_channels(module)
        prune = graph.get_pruner_of_module(module).prune_out_channels
        try:
            scores = self.importance(graph.get_pruning_group(module, prune, [*range(width)]))
        except (IndexError, RuntimeError) as problem:
            if out_of_memory(problem):
                raise
            raise ValueError(
                f"layer {name!r}: Torch-Pruning cannot follow its channels "
                f"({type(problem).__name__}: {problem}); name other layers"
            ) from problem
        if not isinstance(scores, Tensor) or scores.shape != (width,):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"importance: {self.importance!r} gave {got} for the {width} channels of "
                f"{name!r}; one number for each is needed"
            )
        sharing = torch.ones(width)
        for layers in coupled:
            if name in layers:
                sharing[layers[name].flatten()] = len(layers)
        split = scores.detach() / sharing.to(scores)
        # Torch-Pruning sums in float32 whatever the model is.
        return split.to(torch.promote_types(split.dtype, module.weight.dtype))


def _graph(network: nn.Module, inputs: Tensor) -> Any:
    """Return Torch-Pruning's dependency graph; ValueError if it cannot trace a network."""
    import torch_pruning  # only here: slow to import

    graph = torch_pruning.DependencyGraph()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parameters outside of layers
            return graph.build_dependency(network, inputs[:1].clone(), verbose=False)
    except Exception as problem:
        raise ValueError(
            f"model: Torch-Pruning cannot trace {type(network).__name__} "
            f"({type(problem).__name__}: {problem}), so its importances cannot be used"
        ) from problem
