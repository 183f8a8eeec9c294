"""One run of a command: inputs from the options, plans with their costs, figures, files, table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xai_edit.command.inputs import Batches, images_of, model_of, note, preprocessing_given
from xai_edit.command.own_data import is_own
from xai_edit.command.run_parts import marks_in, read_attribute
from xai_edit.core.checks import in_range
from xai_edit.core.cost import measured
from xai_edit.core.data import Data
from xai_edit.core.guard import preserved
from xai_edit.core.layers import predict
from xai_edit.discovery.marks import Marks
from xai_edit.edits.model_edit import ModelEdit, versions
from xai_edit.pages.page import as_json, write_run
from xai_edit.pages.verdict import Outcome, verdict, verdict_text, warnings

MODEL = {"name": "model", "weights": "weights", "classes": "outputs"}  # option of each entry


class Run:
    """What the options of a command name, and the edits that are planned from it.

    By the name of a method are the ``edits``, the ``seconds`` of planning them, and ``withheld``,
    why it has no edit. ``attribute`` is 1 for each image that has that of ``--attribute``, else 0.
    The folder of ``--out`` is made at once, so that a wrong one fails before the long part.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
        self.images = images_of(options, options.data)
        self.attribute: list[int] | None = None
        self.marks: Marks | None = None
        if getattr(options, "attribute", None) is not None:
            data = Path(options.data)
            folder = data if data.is_dir() else data.parent
            self.attribute = read_attribute(options.attribute, self.images, folder)
            self.marks = marks_in(options.attribute)
        self.edits: dict[str, ModelEdit] = {}
        self.seconds: dict[str, float] = {}
        self.withheld: dict[str, str] = {}

    @cached_property
    def model(self) -> nn.Module:
        """The model with its weights. Planning leaves it as it was, bit for bit.

        ValueError if the attribute is that of marks of another model.
        """
        model = model_of(self.options)
        if self.marks is not None:
            self.marks.require_model(model)
        return model

    def read(self, images: Any, doing: str, *, shuffled: bool = False) -> Data:
        """Return images as batches; ``doing`` is the text of the progress bar."""
        return Batches(self.options, images, doing, shuffled=shuffled)

    def check_labels(self) -> None:
        """Raise ValueError, before the long part, if a label is not a class of the model."""
        inputs = self.images[0][0][None].to(self.options.device)
        with preserved(self.model), torch.no_grad():
            outputs = predict(self.model, inputs).shape[1]
        in_range(self.images.labels, outputs, "labels")

    def plan(
        self, name: str, plan: Callable[[], ModelEdit], *, empty: str | None = None
    ) -> ModelEdit:
        """Plan the edit of a method and keep it with its cost.

        With ``empty``, an edit without changes is not kept; this is the reason unless its origin
        has one.
        """
        with measured() as cost:
            edit = plan()
        if self.marks is not None:
            edit = replace(edit, origin={**edit.origin, "marks": self.marks.about()})
        self.seconds[name] = cost.seconds
        if edit.size or empty is None:
            self.edits[name] = edit
        else:
            self.withheld[name] = edit.origin.get("reason", empty)
        return edit

    def compare(self, name: str, plan: Callable[[], ModelEdit]) -> None:
        """Plan the edit of a comparison method, or keep the reason why there is none."""
        try:
            self.plan(name, plan)
        except ValueError as problem:
            self.withheld[name] = str(problem)

    def rows(
        self, methods: Sequence[str], figures: Mapping[str, Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return a row for each method: its figures, or None for each and the reason."""
        none = dict.fromkeys(next(iter(figures.values())))
        return [
            {"method": name, **figures.get(name, none), "withheld": self.withheld.get(name)}
            for name in methods
        ]

    def about(self, **data: Any) -> dict[str, Any]:
        """Return the first entries of ``results.json``; ``data`` goes to the entry of the data."""
        options = self.options
        about = {
            "run": options.command,
            "command": options.line,
            "versions": versions(),
            "model": {name: getattr(options, own) for name, own in MODEL.items()},
            "preprocessing": None if is_own(options.data) else asdict(preprocessing_given(options)),
            "data": {"name": options.data, "found": str(self.images), **data},
        }
        if self.attribute is not None:
            having = sum(self.attribute)
            without = len(self.attribute) - having
            about["spurious"] = {"name": options.attribute, "with": having, "without": without}
            if self.marks is not None:
                about["spurious"]["marks"] = self.marks.about()
        elif hasattr(options, "attribute"):
            about["spurious"] = None
        return about

    def finish(
        self,
        results: Mapping[str, Any],
        timing: Mapping[str, Any],
        edits: Mapping[str, ModelEdit | None],
        outcome_of: Callable[[Mapping[str, Any]], Outcome],
    ) -> int:
        """Write the edits by their paths, the JSON files and the page; print tables and verdict.

        ``outcome_of`` makes the outcome of the results as they are in ``results.json``.
        """
        (self.out / "edits").mkdir(exist_ok=True)
        for path, edit in edits.items():
            if edit is None:
                (self.out / path).unlink(missing_ok=True)  # of an earlier run
            else:
                edit.save(self.out / path)
        outcome = outcome_of(json.loads(as_json(results)))
        results = {**results, "warnings": warnings(outcome), "verdict": verdict(outcome)}
        report = write_run(self.out, results, timing)
        text = f"{report.text()}\n\n{verdict_text(results)}"
        return self.show(results, text, "report.html")

    def show(self, results: Mapping[str, Any], text: str, file: str | None = None) -> int:
        """Print the results as JSON or the text, name the file and return exit code 0."""
        print(as_json(results) if self.options.json else text)
        if file is not None:
            note(self.options, f"written: {self.out / file}")
        return 0
