"""The tables and figures of papers that can be run anew, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from xai_edit.reproduce import few_shot, groups, pruning, removal, unlearning
from xai_edit.reproduce.experiments import EXPERIMENTS, Options
from xai_edit.reproduce.few_shot_tables import few_shot_tables
from xai_edit.reproduce.groups_tables import groups_tables
from xai_edit.reproduce.pruning_tables import pruning_tables
from xai_edit.reproduce.removal_tables import classes_tables, digits_tables, several_tables
from xai_edit.reproduce.tables import Table, methods_table, sweep_tables

Results = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """What is run under a name, and the tables that its results become."""

    told: str
    run: Callable[[Options], Results]
    tables: Callable[[Mapping[str, Any]], dict[str, Table]]


def _unlearning_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    return {"methods": methods_table(results), **sweep_tables(results)}


CATALOGUE = {
    name: Entry(
        f"class unlearning, {experiment.network} on {experiment.read.__name__}",
        partial(unlearning.reproduce, name),
        _unlearning_tables,
    )
    for name, experiment in EXPERIMENTS.items()
}
for _name, _told, _run, _tables in (
    ("fcr-cifar10", "one class removed by one weight", removal.remove_classes, classes_tables),
    ("fcr-multi", "several of ten classes removed", removal.remove_several, several_tables),
    ("fcr-multi-100", "several of CIFAR-100's classes", removal.remove_several, several_tables),
    ("fcr-parity", "digits removed from odd and even", removal.remove_digits, digits_tables),
    ("fcr-colored", "coloured digits", groups.neutralize_colours, groups_tables),
    ("fcr-waterbirds", "Waterbirds", groups.neutralize_published, groups_tables),
    ("fcr-celeba", "CelebA, hair and gender", groups.neutralize_published, groups_tables),
    ("fcr-metashift", "MetaShift, cats and dogs", groups.neutralize_published, groups_tables),
):
    CATALOGUE[_name] = Entry(
        f"spurious features neutralised: {_told}", partial(_run, _name), _tables
    )
for _name, _told in (
    ("cnp-cifar10", "CIFAR-10, trucks with a planted mark"),
    ("cnp-fine-tuned", "the same in steps, with fine-tuning"),
    ("cnp-mnist", "MNIST, a digit with a planted mark"),
    ("cnp-subspaces", "subspaces of cartons, which have a watermark, and dugongs"),
    ("cnp-carton-dugong", "cartons and dugongs"),
    ("cnp-crate-packet", "crates and packets"),
):
    CATALOGUE[_name] = Entry(
        f"concept-aware pruning: {_told}", partial(pruning.prune_pairs, _name), pruning_tables
    )
CATALOGUE["cnp-few-shot"] = Entry(
    "pruning from ten images a class, without a watermark and without fine-tuning",
    partial(few_shot.prune_few_shot, "cnp-few-shot"),
    few_shot_tables,
)
