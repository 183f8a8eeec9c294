"""The options of the command ``xai-edit``, as a table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from xai_edit._version import __version__
from xai_edit.command.option import (
    Option,
    classes,
    count,
    fractions,
    names,
    numbers,
    outputs,
    rate,
    size,
    subspaces,
    whole,
)
from xai_edit.command.output import say

LABELLED = "class folders, CSV file of path,label, or torchvision:CIFAR10"
SCORERS = "an LRP rule such as epsilon-plus (a wrong name lists all), random, taylor, …"
ATTRIBUTE = "which have the feature: CSV file of path,1 (and path,0), a folder, or marks.json"

PLANT = Option(
    "--plant FILE",
    "picture of the feature, transparent around it, planted into images of classes that have none "
    "with it, at the upper left corner: their figures are on planted images",
    Path,
)

EDIT = Option("EDIT", "file of an edit", Path, required=True)
OUT = Option("--out DIR", "where to write; made if missing", Path, required=True)
COMPOSITE = Option("--composite NAME", SCORERS, default="epsilon")
JSON = Option("--json", "print JSON instead of text")
LAYERS = Option("--layers A,B", "default: all convolution and linear layers", names)
MODEL = (
    Option("--model NAME", "torchvision:NAME, or package.module:function", required=True),
    Option("--weights FILE", "safetensors or checkpoint; torchvision's own: DEFAULT"),
    Option("--outputs N", "their number, or the name of the logits in what it returns", outputs),
    Option("--device NAME", "such as cuda", default="cpu"),
    Option("--quiet", "no progress bar and no notes"),
)
ANY_DATA = Option(
    "--data DATA",
    f"folder of images or of {LABELLED}, or package.module:function that returns samples, such as "
    "mappings, which go to the model as they are",
)
INPUTS = (
    Option("--data-root DIR", "where torchvision's data set is"),
    Option("--split NAME", "of torchvision's data set", default="test"),
    Option(
        "--label LABEL",
        "one of a multi-label model, number or name in a CSV file path,0,1,…; class 1 has it",
    ),
    Option("--limit N", "at most N samples, spread over the data", whole),
    Option("--batch-size N", "samples at a time", whole, 32),
    Option("--workers N", "processes that read images beside this one", count, 0),
    Option("--input-size CxHxW", "such as 3x224x224; 1 channel is grey", size),
    Option("--resize N", "shorter side before the centre is cut out", whole),
    Option("--mean R,G,B", "subtracted from values in [0, 1]", numbers),
    Option("--std R,G,B", "then divided by", numbers),
)
IMAGES = (Option("--data DATA", LABELLED, required=True), *INPUTS)
RESNET = "--model torchvision:resnet18 --weights DEFAULT --data photos/"
APPLIED = (
    (EDIT, *MODEL, JSON, Option("--out FILE", "a new .safetensors file", Path, required=True)),
    (),
    "out/edits/unlearn.safetensors --model torchvision:resnet18 --weights own.safetensors "
    "--out new.safetensors",
)


class Command(NamedTuple):
    """A command: its help (the list shows the first sentence) and options; ``data`` on data."""

    help: str
    options: tuple[Option, ...]
    data: tuple[Option, ...] = ()
    example: str | None = None


COMMANDS = {
    "demo": Command(
        "Edit a real classifier in the ways of three papers (no download, about a minute). Takes a "
        "small network, trained on real handwritten digits with a watermark planted on one class, "
        "forgets a class, takes the watermark's influence away and prunes. Writes results.json, "
        "timing.json, edits/*.safetensors and report.html.",
        (
            Option("--out DIR", "where to write", Path, "xai-edit-demo"),
            Option("--seed N", "of data and training; the network of 0 is trained already", int, 0),
            Option("--quick", "fewer shares, for a first look"),
            Option("--quiet", "no progress bar and no table"),
            JSON,
        ),
    ),
    "check": Command(
        "See what can be trusted on a model, before anything long. Runs one batch through a model "
        "with an LRP rule, tries every part of the library on it and says what works, what is "
        "refused and why. Writes results.json, timing.json and report.html to the folder of --out. "
        "Exit code 0: fine, 1: something is wrong with the model and the rule, 2: bad input.",
        (
            Option("--composite NAME", "LRP rule", default="epsilon"),
            *MODEL,
            LAYERS,
            JSON,
            OUT._replace(required=False),
        ),
        (ANY_DATA, *INPUTS),
        "--model torchvision:resnet18 --composite epsilon-plus",
    ),
    "score": Command(
        "Score the units of a model's layers, or compare several scorers. Writes "
        "scores.safetensors and results.json, or comparison.json and pictures, and report.html to "
        "the folder of --out.",
        (
            COMPOSITE._replace(instead=True),
            Option("--compare NAME,…", "several, and how alike they are", names, instead=True),
            *MODEL,
            LAYERS,
            JSON,
            Option("--held-out DATA", "other labelled data, for deletion curves of --compare"),
            Option("--attribute FILE", f"compare with and without: {ATTRIBUTE}"),
            Option("--target CLASS", "to explain: number, name, label, predicted", str, "label"),
            Option("--aggregate HOW", "over samples: sum, mean, abs or positive", default="sum"),
            Option("--share S", "of a layer's units that are its top", float, 0.1),
            OUT._replace(required=False),
        ),
        (ANY_DATA._replace(required=True), *INPUTS),
        f"{RESNET} --target predicted --composite epsilon-plus --layers fc --out scores",
    ),
    "discover": Command(
        "Find what a model's classes depend on, without labels, and review it on a page. Looks for "
        "features that change a class's answer, such as a watermark, each with its evidence on "
        "images that were not used to find it. The page saves marks.json, which --attribute of "
        "neutralize and prune takes. Writes findings.safetensors, pictures.safetensors, "
        "results.json, timing.json and report.html. Exit code 0 also where nothing stands out.",
        (
            OUT,
            Option("--target A,B", "classes to look at, numbers or names; default: all", names),
            Option(
                "--images WHICH", "to explain a class on: predicted as it, or all", str, "predicted"
            ),
            Option(
                "--method HOW", "relevance, or spray, activations, errors, npca", str, "relevance"
            ),
            Option("--marks FILE", "marks.json: look anew, classes divided as it says", Path),
            Option("--seed N", "of what is drawn", int, 0),
            *MODEL,
            LAYERS._replace(help="default: three stages and the inputs of the last layer"),
            JSON,
        ),
        (ANY_DATA._replace(required=True), *INPUTS),
        f"{RESNET} --target 3,7 --out found",
    ),
    "unlearn": Command(
        "Make a model stop predicting classes, and measure what that did. Cuts the neurons most "
        "relevant for classes from them (neuronal path perturbation), planned from a few samples, "
        "and measures it on others beside a single weight and a masked logit. Writes "
        "edits/unlearn.safetensors, results.json, timing.json, maps.png and report.html.",
        (
            Option("--target A,B", "classes to forget, numbers or names", names, required=True),
            OUT,
            Option("--share S", "of each layer's neurons, or auto: just enough", rate, "auto"),
            Option(
                "--bound B",
                "with auto: share of a class still predicted; default: 0.01; of neurons 0.05",
                float,
            ),
            Option("--samples N", "of each class to plan from", whole, 36),
            COMPOSITE,
            Option("--rank HOW", "sum of relevance, or count of samples in --k", default="sum"),
            Option("--k N", "for --rank count: a sample counts for its first N neurons", whole),
            Option("--scope HOW", "class_row, or neuron: off for all classes", str, "class_row"),
            *MODEL,
            LAYERS._replace(
                help="default: the last hidden linear layer, or the output's inputs; others need "
                "--scope neuron"
            ),
            JSON,
            Option("--train-data DATA", "labelled training data, for a probe and relearning"),
        ),
        IMAGES,
        f"{RESNET} --target 3,7 --share auto --out forget-3-7",
    ),
    "neutralize": Command(
        "Make a model lean less on a spurious feature, and measure every group. Edits one weight "
        "of the last layer for each class that the feature speaks for (fictitious class removal), "
        "planned from a part of the images and measured on another, beside last-layer retraining. "
        "Writes edits/*.safetensors, maps.safetensors, results.json, timing.json and report.html.",
        (
            Option("--attribute FILE", ATTRIBUTE, required=True),
            OUT,
            PLANT,
            Option("--select HOW", "sca (the paper's), exact (for the worst group), …", str, "sca"),
            Option("--rate R", "in [0, 1], auto or least-gap (the paper's)", rate, "auto"),
            Option("--target A,B", "classes the feature speaks for; default: found", names),
            Option(
                "--findings FILE",
                "findings.safetensors that marks.json is about: adds "
                "counterfactual retraining, for groups without images",
                Path,
            ),
            *MODEL,
            JSON,
        ),
        IMAGES,
        f"{RESNET} --attribute watermarked.csv --out no-watermark",
    ),
    "prune": Command(
        "Make a model smaller by the relevance of its units, and measure what that did. Removes "
        "the units of lowest relevance; with --attribute, those that matter least once the "
        "subspaces of a spurious feature are taken out (concept-aware pruning). Planned from one "
        "half of the images and measured on the other, beside Taylor, weight magnitude, random and "
        "plain LRP. Writes edits/prune.safetensors, maps.safetensors, smaller.safetensors, "
        "smaller.pt2, "
        "results.json, timing.json and report.html; and smaller.onnx where onnx, onnxscript and "
        "onnxruntime are installed.",
        (
            Option("--share S", "of all units of convolutions (or linear)", float, required=True),
            OUT,
            Option("--attribute FILE", ATTRIBUTE),
            PLANT,
            Option("--target CLASS", "that the feature speaks for, number or name; default: found"),
            Option("--layer LAYER", "where the feature's subspaces are; best where it forms"),
            Option("--finder NAME", "contrastive-pca (default), cav, prca, pca or drsa"),
            Option("--subspaces FILE", "saved subspaces instead of a finder's", Path),
            Option("--ablate 0,3", "numbers of subspaces, as on the page, or none", subspaces),
            Option("--steps N", "in which the share is reached, each scored anew", whole, 1),
            Option("--fine-tune EPOCHS", "after each step, on the planning images", whole),
            Option("--correct", "with --attribute: then retrain the last layer, groups completed"),
            Option("--protect A,B", "layers that keep all units", names, ()),
            COMPOSITE._replace(default=None, help=f"{SCORERS}; default: epsilon-plus"),
            *MODEL,
            JSON,
        ),
        IMAGES,
        f"{RESNET} --share 0.3 --attribute watermarked.csv --layer layer2 --out smaller",
    ),
    "show": Command(
        "Say what the file of an edit would change. Prints which weights, from what to what, and "
        "where the edit came from. Reads no code from the file.",
        (EDIT, JSON),
        example="out/edits/unlearn.safetensors",
    ),
    "apply": Command(
        "Apply an edit to a model's weights, into a new file. Checks that the edit fits the "
        "weights bit for bit.",
        *APPLIED,
    ),
    "undo": Command(
        "Take an edit back from a model's weights, into a new file. Checks that the weights hold "
        "the edit bit for bit.",
        *APPLIED,
    ),
    "log": Command(
        "List the edits of the weights in a folder, in order. Reads the records that apply and "
        "undo write beside new weights, as NAME.edits.json, and says where weights were changed "
        "since.",
        (Option("DIR", "of weights that apply or undo wrote", Path, required=True), JSON),
    ),
    "reproduce": Command(
        "Run a table of a paper anew, with the paper's figures beside it. npp-* forget one class "
        "at a time by every method of the paper, subspace-removal by a subspace of the class. "
        "fcr-* remove classes, or what a spurious feature adds, by one weight. cnp-* prune "
        "networks that learned a watermark, discover-* look for it without labels. Nothing is "
        "downloaded. A run cut short goes on where it stopped. Writes results.json to the folder "
        "of --out. Each default is the table's.",
        (
            Option("NAME", "of the table; --list shows all"),
            Option("--list", "show what can be run"),
            Option("--data-root DIR", "the data; default: XAI_EDIT_DATA", Path),
            Option("--out DIR", "where to write; default: the name", Path),
            Option("--network NAME", "such as all-cnn, vgg-like:0.25 (filters), resnet18"),
            Option("--weights FILE", "of a trained network, or torchvision's own: DEFAULT"),
            Option("--epochs N", "of training", whole),
            Option("--limit N", "at most N images a class", whole),
            Option("--side N", "pixels of an input's side", whole),
            Option("--target A,B", "classes to forget", classes),
            Option(
                "--only-classes A,B",
                "of cnp-*, discover-*: the pair, watermarked one last",
                classes,
            ),
            Option("--strengths A,B", "shares with the watermark of cnp-*, discover-*", fractions),
            Option("--seeds A,B", "default: 0", classes, (0,)),
            Option("--methods A,B", "default: all; 'A, b; C' where names have commas", names),
            Option("--device NAME", "such as cuda; default: cuda if there is one, else cpu"),
            Option("--quiet", "no progress bar and no tables"),
            JSON,
        ),
        example="npp-mnist --data-root data --network all-cnn:0.25 --epochs 2 --target 1",
    ),
    "report": Command(
        "Write the HTML page of a finished run anew. Writes report.html from the results in DIR.",
        (Option("DIR", "of a finished run", Path, required=True), JSON),
    ),
}


RUNS = ("demo", "check", "score", "discover", "unlearn", "neutralize", "prune")  # into a folder
OF_RUNS = (
    Option("--config FILE", "options, such as run.toml of an earlier run; given ones come first"),
    Option("--force", "write over the run in the folder of --out"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with a message of one line, without the usage that argparse prints above it."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        say(message.rstrip("\n"), file)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``xai-edit``; its ``command`` is the name of the command."""
    made = _Parser(
        prog="xai-edit",
        description="Turn attributions of Zennit and Captum into edits of a model, and prove what "
        "each edit did. No command changes the file of a model.",
    )
    made.add_argument("--version", action="version", version=f"xai_edit {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        first = command.help.split(". ")[0]
        example = command.example and f"example: xai-edit {name} {command.example}"
        how: dict[str, Any] = {"help": first, "description": command.help, "epilog": example}
        own = commands.add_parser(name, allow_abbrev=False, **how)  # as --config knows whole names
        either = own.add_mutually_exclusive_group() if name == "score" else own
        for option in (*command.options, *(OF_RUNS if name in RUNS else ())):
            option.add_to(either if option.instead else own)
        if command.data:
            usual = "Images are resized, cut and normalised as usual for the model or ImageNet."
            group = own.add_argument_group("data", usual)
            for option in command.data:
                option.add_to(group)
    return made
