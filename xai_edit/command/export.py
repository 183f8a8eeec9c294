"""Export of a network to one file that runs without its Python code."""

from __future__ import annotations

import io
import itertools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.command.load import first_sentence
from xai_edit.core.guard import copied

TOLERANCE = 1e-5  # of the largest logit


def exported(network: nn.Module, sample: Tensor) -> tuple[bytes | None, dict[str, Any]]:
    """Export a network by ``torch.export``, or trace it where that fails.

    For any number of samples where PyTorch can, else for one at a time. ``sample`` has the shape
    (samples, ...); its first is used. The content of a file, for the CPU, is returned only if it
    gave the network's outputs; and its ``kind``, "torch.export" or "TorchScript", the number of
    samples at a time, ``batch``, None for any, and each ``failed`` attempt with PyTorch's error.
    """
    network = copied(network).cpu().eval()
    one = sample[:1].detach().cpu()
    failed: dict[str, str] = {}
    sizes = {"any number of samples": None, "one sample at a time": 1}
    for kind, (of, batch) in itertools.product(("torch.export", "TorchScript"), sizes.items()):
        # Two samples, as PyTorch takes the number one for a constant.
        inputs = one if batch else torch.cat([one, one])
        file = io.BytesIO()
        try:
            with _quiet(), torch.no_grad():
                if kind == "torch.export":
                    shapes = None if batch else ({0: torch.export.Dim("samples")},)
                    made = torch.export.export(network, (inputs,), dynamic_shapes=shapes)
                    torch.export.save(made, file)
                    program: Any = made.module()
                else:
                    program = torch.jit.trace(network, inputs)
                    torch.jit.save(program, file)
                for given in (inputs, one):
                    found, expected = program(given), network(given)
                    difference = float((found - expected).abs().max())
                    if not difference <= TOLERANCE * float(expected.abs().max()):
                        raise ValueError(f"outputs differ from the network's by {difference:.3g}")
        except Exception as problem:  # of any kind, from the depth of the compiler
            failed[f"{kind}, {of}"] = first_sentence(problem)
        else:
            return file.getvalue(), {"kind": kind, "batch": batch, "failed": failed}
    return None, {"kind": None, "batch": None, "failed": failed}


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the compiler's logs and warnings; its error has the reason."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
