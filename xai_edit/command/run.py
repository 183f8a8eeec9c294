"""One run of a command: inputs from the options, plans with their costs, figures, files, table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any
from warnings import catch_warnings, showwarning, simplefilter

import torch
from torch import nn
from tqdm import tqdm

from xai_edit.command.categories import card_of
from xai_edit.command.expected_answers import not_expected
from xai_edit.command.inputs import Batches, images_of, model_of, note, preprocessing_given
from xai_edit.command.load import spread
from xai_edit.command.output import say
from xai_edit.command.own_data import is_own
from xai_edit.command.run_parts import marks_in, read_attribute
from xai_edit.core.checks import in_range
from xai_edit.core.cost import measured
from xai_edit.core.data import Data, batches
from xai_edit.core.files import checksum
from xai_edit.core.guard import preserved
from xai_edit.core.layers import predict, run
from xai_edit.core.outputs import label_chosen, outputs_of
from xai_edit.core.wrapped import unwrapped
from xai_edit.discovery.marks import Marks
from xai_edit.edits.model_edit import ModelEdit, versions
from xai_edit.pages.page import as_json, checksums, clear_results, write_run
from xai_edit.pages.verdict import Outcome, verdict, verdict_text, warnings

PACKAGE = Path(__file__).parents[1]
CHECKED = 64  # images whose accuracy is looked at before the long part
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
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as problem:
                reason = f"no folder can be made ({problem.strerror})"
                raise type(problem)(f"out: {self.out}: {reason}") from problem
        self.edits: dict[str, ModelEdit] = {}
        self.seconds: dict[str, float] = {}
        self.withheld: dict[str, str] = {}
        self.noticed: list[str] = []
        self.images = images_of(options, options.data)
        self.attribute: list[int] | None = None
        self.marks: Marks | None = None
        if getattr(options, "attribute", None) is not None:
            data = Path(options.data)
            folder = data if data.is_dir() else data.parent
            self.attribute = read_attribute(options.attribute, self.images, folder)
            self.marks = marks_in(options.attribute)
            having, count = sum(self.attribute), len(self.attribute)
            told = f"attribute: {having} of {count} images have it"
            note(options, f"{told}; the other {count - having} count as without it")
            planted = getattr(options, "plant", None) is not None
            labels = self.images.labels if self.images.labelled and not planted else []
            if labels and len({*zip(labels, self.attribute, strict=True)}) == len({*labels}):
                self.warn(
                    "the attribute is the same for all images of each class, so that it cannot be "
                    "told from the class; --plant mark.png makes the missing groups"
                )

    @cached_property
    def model(self) -> nn.Module:
        """The model with its weights. Planning leaves it as it was, bit for bit.

        With it all inputs are known, and the results of an earlier run in the folder are removed.
        ValueError if the attribute is that of marks of another model.
        """
        model = model_of(self.options)
        if self.marks is not None:
            self.marks.require_model(model)
        if self.out is not None:
            clear_results(self.out)
        return model

    def read(self, images: Any, doing: str, *, shuffled: bool = False) -> Data:
        """Return images as batches; ``doing`` is the text of the progress bar."""
        return Batches(self.options, images, doing, shuffled=shuffled)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Name on stderr what is done without a bar, for the length of a ``with`` block."""
        how: dict[str, Any] = {"bar_format": "{desc}", "leave": False}
        with tqdm(desc=f"{what} …", disable=self.options.quiet, **how):
            yield

    def check_labels(self) -> None:
        """Look, before the long part, at the labels and at the accuracy on a few images.

        ValueError if a label is not a class of the model. What is `not_expected` becomes a warning:
        the images may not be what the model expects.
        """
        count = min(CHECKED, len(self.images))
        few = self.images.only(spread(len(self.images), count))
        labels, answers = [], []
        with preserved(self.model), torch.no_grad():
            for batch in batches(self.read(few, "checking"), self.options.device):
                logits = predict(self.model, batch.inputs)
                in_range(self.images.labels, logits.shape[1], "labels")
                assert batch.labels is not None
                labels.append(batch.labels.cpu())
                answers.append(logits.argmax(1).cpu())
        given = torch.cat(labels), torch.cat(answers)
        metrics = card_of(self.options.model, self.options.weights).get("_metrics", {})
        card = next((one["acc@1"] / 100 for one in metrics.values()), 0.0)
        own = is_own(self.options.data)
        right = int((given[0] == given[1]).sum())
        text = f"{right} of {count} {'samples' if own else 'images'} are classified right"
        if expected := not_expected(*given, logits.shape[1], card, self.images.classes):
            steps = "the inputs" if own else "--mean, --std, --resize"
            self.warn(
                f"{text}, {expected}; {steps} or the order of the classes may not be those of the "
                f"training: {self.images}"
            )
        else:
            note(self.options, text)

    def warn(self, message: str | None) -> None:
        """Print a warning, which goes on top of the page too; None is none."""
        if message is not None:
            self.noticed.append(message)
            note(self.options, f"warning: {message}")

    def plan(
        self, name: str, plan: Callable[[], ModelEdit], *, empty: str | None = None
    ) -> ModelEdit:
        """Plan the edit of a method and keep it with its cost; what it warns of goes on the page.

        With ``empty``, an edit without changes is not kept; this is the reason unless its origin
        has one.
        """
        with measured() as cost, catch_warnings(record=True) as caught:
            simplefilter("always", UserWarning)
            edit = plan()
        for one in {str(one.message): one for one in caught}.values():  # each once
            if one.category is UserWarning and PACKAGE in Path(one.filename).parents:
                self.warn(f"{name}: {one.message}")
            else:
                showwarning(one.message, one.category, one.filename, one.lineno)
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
            "warnings": self.noticed,
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
        outcome = outcome_of(json.loads(as_json(results)))
        self.noticed += self._other_labels()
        told = {"warnings": [*self.noticed, *warnings(outcome)], "verdict": verdict(outcome)}
        results = {**results, **told}
        made = datetime.now(timezone.utc).isoformat(timespec="seconds")  # not in an edit: same bits
        weights = checksum(unwrapped(self.model).state_dict(), "")
        (self.out / "edits").mkdir(exist_ok=True)
        judged = self.edits.get(outcome.method)
        for path, edit in edits.items():
            if edit is None:
                (self.out / path).unlink(missing_ok=True)  # of an earlier run
            else:
                origin = {**edit.origin, "command": self.options.repeatable}
                if edit is judged:
                    origin = {**origin, **told, "measured_on": weights}
                replace(edit, origin=origin).save(self.out / path)
        results["checksums"] = checksums(self.out)
        report = write_run(self.out, results, {"made": made, **timing})
        text = f"{report.text()}\n\n{verdict_text(results)}"
        return self.show(results, text, "report.html")

    def _other_labels(self) -> list[str]:
        """Return a warning of what edits do to the decisions about labels not of ``--label``."""
        if (label := label_chosen()) is None:
            return []
        given: dict[str, torch.Tensor] = {}
        for name, edit in {"": ModelEdit({}), **self.edits}.items():
            with edit.applied(self.model), preserved(self.model), torch.no_grad():
                read = batches(self.read(self.images, "other labels"), self.options.device)
                outputs = [outputs_of(run(self.model, one.inputs), one.inputs) > 0 for one in read]
            given[name] = torch.cat(outputs)
            given[name][:, label] = False
        before = given.pop("")
        decisions = len(before) * (before.shape[1] - 1)
        if not given or not decisions:
            return []
        changed = [
            f"{int((after != before).sum()) / decisions:.1%} by {name}"
            for name, after in given.items()
        ]
        return [
            f"changed decisions about the {before.shape[1] - 1} other labels, on {len(before)} "
            f"images: {', '.join(changed)}"
        ]

    def show(self, results: Mapping[str, Any], text: str, file: str | None = None) -> int:
        """Print the results as JSON or the text, name the file and return exit code 0."""
        say(as_json(results) if self.options.json else text)
        if file is not None:
            note(self.options, f"written: {self.out / file}")
        return 0
