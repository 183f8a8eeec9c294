"""Export of a network to files that run without its Python code."""

from __future__ import annotations

import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from xai_edit.command.load import first_sentence
from xai_edit.core.guard import copied
from xai_edit.core.outputs import relative_error, tensor_of

TOLERANCE = 1e-5  # of the largest logit
TOLERANCE_ONNX = 1e-4  # whose runtime has its own kernels
NEEDED = ("onnx", "onnxscript", "onnxruntime")
SIZES = {"any number of samples": None, "one sample at a time": 1}

Made = tuple[bytes | None, dict[str, Any]]
Program = Callable[[Tensor], Tensor]
Maker = Callable[[nn.Module, Tensor, Any], tuple[bytes, Program]]


def exported(network: nn.Module, sample: Tensor) -> Made:
    """Export a network by ``torch.export``, or trace it where that fails.

    For any number of samples where PyTorch can, else for one at a time. ``sample`` has the shape
    (samples, ...). The content of a file, for the CPU, is returned only if it gave the network's
    outputs for each; and its ``kind``, "torch.export" or "TorchScript", the number of
    samples at a time, ``batch``, None for any, and each ``failed`` attempt with PyTorch's error.
    """
    makers = {"torch.export": _torch_export, "TorchScript": _torchscript}
    return _first_right(network, sample, makers, TOLERANCE)


def as_onnx(network: nn.Module, sample: Tensor) -> Made:
    """Export a network to ONNX, as `exported`; its outputs are those that onnxruntime gives.

    Without the packages that this needs, ``failed`` says how to install them.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        failed = {"ONNX": f"pip install {' '.join(missing)}"}
        return None, {"kind": None, "batch": None, "failed": failed}
    return _first_right(network, sample, {"ONNX": _onnx}, TOLERANCE_ONNX)


def _first_right(
    network: nn.Module, sample: Tensor, makers: Mapping[str, Maker], tolerance: float
) -> Made:
    """Return the first program that gives the network's outputs."""
    network = copied(network).cpu().eval()
    sample = sample.detach().cpu()
    one = sample[:1]
    failed: dict[str, str] = {}
    for (kind, make), (of, batch) in itertools.product(makers.items(), SIZES.items()):
        # Two samples, as PyTorch takes the number one for a constant.
        inputs = one if batch else torch.cat([one, one])
        shapes = None if batch else ({0: torch.export.Dim("samples")},)
        try:
            with _quiet(), torch.no_grad():
                content, program = make(network, inputs, shapes)
                # Each alone, as a trace keeps the branches that the first took.
                for given in (inputs, *sample.split(1)):
                    error = relative_error(tensor_of(program(given)), tensor_of(network(given)))
                    if not error <= tolerance:
                        raise ValueError(
                            f"outputs differ from the network's by {error:.3g} of the largest"
                        )
        except Exception as problem:  # of any kind, from the depth of the compiler
            failed[f"{kind}, {of}"] = first_sentence(problem)
        else:
            return content, {"kind": kind, "batch": batch, "failed": failed}
    return None, {"kind": None, "batch": None, "failed": failed}


def _torch_export(network: nn.Module, inputs: Tensor, shapes: Any) -> tuple[bytes, Program]:
    file = io.BytesIO()
    made = torch.export.export(network, (inputs,), dynamic_shapes=shapes)
    torch.export.save(made, file)
    return file.getvalue(), made.module()


def _torchscript(network: nn.Module, inputs: Tensor, _: Any) -> tuple[bytes, Program]:
    file = io.BytesIO()
    program: Any = torch.jit.trace(network, inputs)
    torch.jit.save(program, file)
    return file.getvalue(), program


def _onnx(network: nn.Module, inputs: Tensor, shapes: Any) -> tuple[bytes, Program]:
    import onnxruntime

    made: Any = torch.onnx.export(
        network, (inputs,), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # paths of this machine, in traces of the call stack
    content: bytes = made.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    return content, lambda given: torch.from_numpy(session.run(None, {name: given.numpy()})[0])


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
