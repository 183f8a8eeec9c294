"""The commands ``xai-edit check`` and ``xai-edit score``: they read a model and edit nothing."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from xai_edit.command.inputs import (
    SEED,
    Batches,
    images_of,
    lrp_of,
    model_of,
    note,
    preprocessing_given,
    require_known,
    scorer_of,
)
from xai_edit.command.load import Images, preprocessing_of, spread
from xai_edit.command.output import say
from xai_edit.command.own_data import is_own
from xai_edit.command.run import MODEL, Run
from xai_edit.command.run_parts import classes_named, indices_by
from xai_edit.core.cost import measured
from xai_edit.core.data import peek
from xai_edit.core.files import write_atomically
from xai_edit.core.inputs import Inputs, one_tensor
from xai_edit.core.targets import targets_of
from xai_edit.edits.model_edit import versions
from xai_edit.evaluation.check_model import check_model
from xai_edit.evaluation.compare import Comparison, compare_scorers
from xai_edit.evaluation.deletion_curve import SHARES
from xai_edit.lrp.lrp import Scorer
from xai_edit.pages.page import as_json, write_run
from xai_edit.report.comparison_figures import (
    deletion_curves,
    map_grid,
    rank_matrices,
    relevance_maps,
)
from xai_edit.scoring.unit_scores import score_units, share_of

DRAWN = 4  # images with their relevance maps


def check(options: argparse.Namespace) -> int:
    """Run ``xai-edit check``; the exit code is 1 where something is wrong with the model."""
    require_known(options.composite)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    images = None if options.data is None else images_of(options, options.data)
    inputs: Inputs
    batch: Any
    model = model_of(options)
    if images is not None:
        some = images.only(spread(len(images), min(options.batch_size, len(images))))
        first = peek(Batches(options, some, "reading"), options.device)[0]
        inputs = first.inputs
        batch = inputs if first.labels is None else (inputs, first.labels)
    else:
        shape = options.input_size or preprocessing_of(options.model, options.weights).shape
        generator = torch.Generator().manual_seed(SEED)
        batch = inputs = torch.randn(2, *shape, generator=generator).to(options.device)
        note(options, f"no --data: 2 inputs of random numbers, {'×'.join(map(str, shape))}")
    about = {
        "command": options.line,
        "versions": versions(),
        "model": {name: getattr(options, own) for name, own in MODEL.items()},
        "logits": getattr(options, "logits", None),
        "data": {"name": options.data, "samples": len(inputs)},
    }
    composite = lrp_of(options.composite, options, model, [inputs])
    note(options, "looking at each part of the network …")
    with measured() as cost:
        found = check_model(model, batch, composite, layers=options.layers)
    noticed = [str(one) for one in found.findings]
    results = {"run": "check", **about, "warnings": noticed, **found.to_dict()}
    if options.out is not None:
        write_run(options.out, results, {"check": {"seconds": cost.seconds}})
        note(options, f"written: {options.out / 'report.html'}")
    say(as_json(results) if options.json else str(found))
    return 0 if found.ok else 1


def score(options: argparse.Namespace) -> int:
    """Run ``xai-edit score``."""
    share_of(1, options.share)
    if options.held_out and not options.compare:
        raise ValueError("--held-out: given without --compare, whose deletion curves need it")
    if options.attribute is not None and not options.compare:
        raise ValueError("--attribute: given without --compare, which compares with and without it")
    if options.attribute is not None and is_own(options.data):
        raise ValueError(f"--attribute: {options.data} has no paths; give a folder or a CSV file")
    names = options.compare or [options.composite]
    require_known(*names)
    run = Run(options)
    if options.target not in ("label", "predicted"):
        (options.target,) = classes_named([options.target], run.images.classes)
    data = run.read(run.images, "scoring")
    curves: dict[str, Any] = {}
    if options.held_out:
        held_out = run.read(images_of(options, options.held_out), "deletion curves")
        curves = {"deletion": SHARES, "held_out": held_out}
    scorers = {name: scorer_of(name, options, run.model, data) for name in names}
    if options.target == "label" and run.images.labelled:
        run.check_labels()
    how = {name: getattr(options, name) for name in ("layers", "target", "aggregate")}
    results = {
        **run.about(held_out=options.held_out),
        **{name: getattr(options, name) for name in ("target", "aggregate", "share")},
    }
    if options.compare:
        results["run"] = "compare"
        texts = []
        for part, images in _parts(run).items():
            data = run.read(images, f"scoring {part}".strip())
            found = compare_scorers(run.model, data, scorers, share=options.share, **how, **curves)
            results |= {part: found.to_dict()} if part else found.to_dict()
            if run.out is not None:
                _draw(run, found, scorers, images, part)
            title = f"{part} the feature, {len(images)} images\n" if part else ""
            texts.append(f"{title}{found}")
        text = "\n\n".join(texts)
    else:
        scores = score_units(run.model, data, scorers[options.composite], **how)
        results |= {"scorer": scores.origin, "samples": scores.samples, "layers": {}}
        for layer in scores:
            units = scores.top(layer, share=options.share).tolist()
            top = [{"unit": unit, "score": float(scores[layer][unit])} for unit in units]
            results["layers"][layer] = {"units": len(scores[layer]), "top": top}
        if run.out is not None:
            scores.save(run.out / "scores.safetensors")
        text = str(scores)
    if run.out is None:
        return run.show(results, text)
    write_run(run.out, results)
    return run.show(results, text, "report.html")


def _parts(run: Run) -> dict[str, Images]:
    """Return all images, or those ``"with"`` the attribute and those ``"without"``."""
    if run.attribute is None:
        return {"": run.images}
    indices = indices_by(run.attribute)
    return {"with": run.images.only(indices[1]), "without": run.images.only(indices[0])}


def _draw(
    run: Run, found: Comparison, scorers: dict[str, Scorer], images: Images, part: str
) -> None:
    pictures = {"rank-correlation": rank_matrices(found)}
    if any(found.deletion.values()):
        pictures["deletion"] = deletion_curves(found.deletion)
    maps = any(hasattr(scorer, "heatmap") for scorer in scorers.values())
    if maps and not is_own(run.options.data):
        batch = peek(run.read(images, "drawing"), run.options.device)[0]
        batch = batch[torch.arange(len(batch)) < DRAWN]
        inputs = one_tensor(batch.inputs, "a picture")
        targets = targets_of(batch, run.options.target)
        drawn = relevance_maps(run.model, inputs, scorers, targets=targets)
        pixels = preprocessing_given(run.options).pixels(inputs)
        pictures["relevance-maps"] = map_grid(pixels, drawn)
    for name, picture in pictures.items():
        write_atomically(run.out / f"{name}{'-' * bool(part)}{part}.png", picture)
