"""Torch-Pruning's importances as scorers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.core.guard import copied
from xai_edit.core.layers import predict
from xai_edit.core.targets import Targets, classes_of
from xai_edit.pruning.coupled_channels import LAYERS, groups_of, pruning_group, traced


class TorchPruningImportance:
    """Torch-Pruning's importance of each channel and those coupled to it, split among their layers.

    The parameters have the gradients of the batch's cross-entropy loss.

    Parameters
    ----------
    importance : callable
        Such as ``torch_pruning.importance.GroupTaylorImportance()``: returns one score per channel
        of a pruning group. TypeError for those that collect gradients sample by sample.
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
        convolution, or the importance does not return one number per channel.
        """
        for name in layers:
            if not isinstance(model.get_submodule(name), LAYERS):
                raise ValueError(
                    f"layer {name!r}: only linear and convolution layers have an importance"
                )
        with torch.inference_mode(False), torch.enable_grad():
            found = traced(copied(model), inputs)
            logits = predict(found.model, inputs)
            nn.functional.cross_entropy(logits, classes_of(targets, logits)).backward()
            coupled = [group.layers for group in groups_of(found)]
            scores = {name: self._scores(found, name, coupled) for name in layers}
        return {name: of_layer.expand(len(inputs), -1) for name, of_layer in scores.items()}

    def _scores(self, found: Any, name: str, coupled: list[dict[str, Tensor]]) -> Tensor:
        module = found.model.get_submodule(name)
        width = found.graph.get_out_channels(module)
        scores = self.importance(pruning_group(found, module, range(width)))
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
