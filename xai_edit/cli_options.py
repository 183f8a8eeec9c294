"""The options of the command ``xai-edit``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from xai_edit._version import __version__

DEFAULT = "; default: %(default)s"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage that argparse puts above it."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``xai-edit``; ``command`` is the name of what is to be run."""
    made = _Parser(
        prog="xai-edit",
        description="Turn attributions of Zennit and Captum into edits of a model, and prove what "
        "each edit did.",
    )
    made.add_argument("--version", action="version", version=f"xai_edit {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="edit a real classifier in the three ways of the three papers (no download, 2 min)",
        description="Trains a small network on real handwritten digits with a watermark planted "
        "on one class, then forgets a class, takes the watermark's influence away and prunes. "
        "Writes results.json, timing.json, edits/*.safetensors and report.html.",
    )
    add = demo.add_argument
    add("--out", type=Path, default="xai-edit-demo", metavar="DIR", help="where to write")
    add("--seed", type=int, default=0, metavar="N", help="of data and training")
    add("--quick", action="store_true", help="fewer shares, for a first look")
    add("--quiet", action="store_true", help="no progress bar and no table")

    check = commands.add_parser(
        "check",
        help="see whether a model and an LRP rule go together, before anything long",
        description="Runs one batch through a model with an LRP rule and says what is wrong. "
        "Exit code 0: fine, 1: something is wrong with the model, 2: bad input.",
        epilog="example: xai-edit check --model torchvision:resnet18 --composite epsilon-plus",
    )
    check.add_argument("--composite", default="epsilon", metavar="NAME", help="LRP rule" + DEFAULT)
    _add_model_and_data(check, needs_data=False)

    score = commands.add_parser(
        "score",
        help="score the units of a model's layers, or compare several scorers",
        description="Gives every unit of the layers a relevance. Writes scores.safetensors and "
        "results.json, or comparison.json and pictures, to the folder of --out.",
        epilog="example: xai-edit score --model torchvision:resnet18 --weights DEFAULT --data "
        "photos/ --target predicted --composite epsilon-plus --layers layer4.1.conv2 --out scores",
    )
    add = score.add_mutually_exclusive_group().add_argument
    scorers = "an LRP rule such as epsilon-plus (a wrong name lists all), random, taylor, …"
    add("--composite", default="epsilon", metavar="NAME", help=scorers + DEFAULT)
    add("--compare", type=_names, metavar="NAME,…", help="several of these, and how alike they are")
    _add_model_and_data(score, needs_data=True)
    add = score.add_argument
    add("--held-out", metavar="DATA", help="other labelled data, for deletion curves of --compare")
    target = "what is explained: a class number, label or predicted"
    add("--target", type=_target, default="label", metavar="CLASS", help=target + DEFAULT)
    how = "over samples: sum, mean, abs or positive"
    add("--aggregate", default="sum", metavar="HOW", help=how + DEFAULT)
    share = "of a layer's units that are its top"
    add("--share", type=float, default=0.1, metavar="S", help=share + DEFAULT)
    add("--out", type=Path, metavar="DIR", help="where to write; made if missing")

    unlearn = commands.add_parser(
        "unlearn",
        help="make a model stop predicting classes, and measure what that did",
        description="Switches off the neurons most relevant for classes (neuronal path "
        "perturbation), planned from a few samples, and measures it on others beside a single "
        "weight and a masked logit. Writes edits/unlearn.safetensors, results.json, timing.json, "
        "maps.png and report.html. The model's own file is not changed.",
        epilog="example: xai-edit unlearn --model torchvision:resnet18 --weights DEFAULT --data "
        "photos/ --classes 3,7 --share auto --out forget-3-7",
    )
    add = unlearn.add_argument
    forget = "the classes to forget, by number or by the name of their folder"
    add("--classes", dest="forget", type=_names, required=True, metavar="A,B", help=forget)
    add("--out", type=Path, required=True, metavar="DIR", help="where to write; made if missing")
    share = "of each layer's neurons; auto: the smallest that reaches --bound on other samples"
    add("--share", type=_share, default="auto", metavar="S", help=share + DEFAULT)
    bound = "share of a class that may still be predicted with --share auto"
    add("--bound", type=float, default=0.05, metavar="B", help=bound + DEFAULT)
    samples = "of each class to plan from"
    add("--samples", type=_whole, default=36, metavar="N", help=samples + DEFAULT)
    add("--composite", default="epsilon", metavar="NAME", help=scorers + DEFAULT)
    rank = "sum of relevance, or count of samples with the neuron among their --k first"
    add("--rank", default="sum", metavar="HOW", help=rank + DEFAULT)
    add("--k", type=_whole, metavar="N", help="for --rank count")
    scope = "neuron, or class_row to cut only its weight to the class"
    add("--scope", default="neuron", metavar="HOW", help=scope + DEFAULT)
    layers = "default: the hidden linear layer before the output, or the output's inputs"
    _add_model_and_data(
        unlearn, needs_data=True, outputs="--outputs", layers=layers, kinds=LABELLED
    )
    train = "labelled training data, for a probe and relearning; of torchvision's the split train"
    add("--train-data", metavar="DATA", help=train)

    neutralize = commands.add_parser(
        "neutralize",
        help="make a model lean less on a spurious feature, and measure every group",
        description="Edits one weight of the last layer for each class that a spurious feature "
        "speaks for (fictitious class removal), planned from a part of the images and measured on "
        "another, group by group, beside last-layer retraining. Writes edits/*.safetensors, "
        "results.json, timing.json and report.html. The model's own file is not changed.",
        epilog="example: xai-edit neutralize --model torchvision:resnet18 --weights DEFAULT --data "
        "photos/ --spurious watermarked.csv --out no-watermark",
    )
    add = neutralize.add_argument
    marked = "CSV file of path,1 (has the feature) and path,0, or a folder of the images with it"
    add("--spurious", required=True, metavar="FOLDER_OR_CSV", help=marked)
    add("--out", type=Path, required=True, metavar="DIR", help="where to write; made if missing")
    select = "sca, the paper's; exact: the weight and dose best for the worst group; …"
    add("--select", default="sca", metavar="HOW", help=select + DEFAULT)
    rate = "in [0, 1]; auto: the best for the worst group; least-gap: the paper's"
    add("--rate", type=_rate, default="auto", metavar="R", help=rate + DEFAULT)
    favoured = "the classes the feature speaks for, by number or by the name of their folder; "
    found = "default: the one predicted most with the feature"
    add("--target", type=_names, metavar="A,B", help=favoured + found)
    _add_model_and_data(neutralize, needs_data=True, layers=None, kinds=LABELLED)

    prune = commands.add_parser(
        "prune",
        help="make a model smaller by the relevance of its units, and measure what that did",
        description="Removes the units of lowest relevance; with --spurious, those that matter "
        "least once the subspaces of a spurious feature are taken out (concept-aware pruning). "
        "Planned from a half of the images and measured on the other, beside weight magnitude, "
        "random and plain LRP. Writes edits/prune.safetensors, smaller.safetensors, smaller.pt2, "
        "results.json, timing.json and report.html. The model's own file is not changed.",
        epilog="example: xai-edit prune --model torchvision:resnet18 --weights DEFAULT --data "
        "photos/ --share 0.3 --spurious watermarked.csv --layer layer2 --out smaller",
    )
    add = prune.add_argument
    share = "of all units of the convolutions, or of hidden linear layers where there are none"
    add("--share", type=float, required=True, metavar="S", help=share)
    add("--out", type=Path, required=True, metavar="DIR", help="where to write; made if missing")
    add("--spurious", metavar="FOLDER_OR_CSV", help=marked)
    where = "in which the feature's subspaces are looked for, where it forms rather than late"
    add("--layer", metavar="LAYER", help=where)
    finders = "contrastive-pca, cav, prca, pca or drsa; default: contrastive-pca"
    add("--finder", metavar="NAME", help=finders)
    steps = "in which the share is reached, each scored anew"
    add("--steps", type=_whole, default=1, metavar="N", help=steps + DEFAULT)
    tuning = "of training after each step, on the images planned from"
    add("--fine-tune", type=_whole, metavar="EPOCHS", help=tuning + "; default: none")
    add("--protect", type=_names, default=(), metavar="A,B", help="layers that keep all units")
    _add_model_and_data(prune, needs_data=True, layers=None, kinds=LABELLED)

    show = commands.add_parser(
        "show",
        help="say what the file of an edit would change",
        description="Prints which weights an edit changes, from what to what, and where it came "
        "from. Reads no code from the file.",
        epilog="example: xai-edit show out/edits/unlearn.safetensors",
    )
    show.add_argument("edit", type=Path, metavar="EDIT", help="file of an edit")
    show.add_argument("--json", action="store_true", help="print JSON instead of text")
    for name, does in (
        ("apply", "apply an edit to a model's weights, into a new file"),
        ("undo", "take an edit back from a model's weights, into a new file"),
    ):
        made_of = commands.add_parser(
            name,
            help=does,
            description=f"Loads a model and its weights, checks that the edit fits them bit for "
            f"bit, and writes the weights {'with' if name == 'apply' else 'without'} it. The "
            "file of the weights that are given is left as it is.",
            epilog=f"example: xai-edit {name} out/edits/unlearn.safetensors --model "
            "torchvision:resnet18 --weights own.safetensors --out new.safetensors",
        )
        add = made_of.add_argument
        add("edit", type=Path, metavar="EDIT", help="file of an edit")
        _add_model(made_of)
        add("--out", type=Path, required=True, metavar="FILE", help="a new .safetensors file")

    reproduce = commands.add_parser(
        "reproduce",
        help="run a table of a paper anew, with the paper's figures beside it",
        description="npp-* train the network, forget one class at a time by every method of the "
        "paper, measure what is left, and sweep rule × share × k. fcr-* remove classes, or what a "
        "spurious feature adds, by one weight, beside other methods. cnp-* prune networks that "
        "learned a watermark. Nothing is downloaded. "
        "A run cut short goes on where it stopped. Writes results.json to the folder of --out.",
        epilog="example: xai-edit reproduce npp-mnist --data-root data --network all-cnn:0.25 "
        "--epochs 2 --classes 1 --out npp-mnist",
    )
    add = reproduce.add_argument
    add("name", nargs="?", metavar="NAME", help="of the table; --list shows all")
    add("--list", action="store_true", help="show what can be run")
    add("--data-root", type=Path, metavar="DIR", help="the data; default: XAI_EDIT_DATA")
    add("--out", type=Path, metavar="DIR", help="where to write; default: the name")
    nets = "all-cnn, vgg-like, vgg-like:0.25 (a quarter of the filters), conv-2net, resnet20 or "
    nets += "torchvision's"
    add("--network", metavar="NAME", help=nets + "; default: the paper's")
    add("--weights", metavar="FILE", help="of a trained network, or torchvision's own: DEFAULT")
    add("--epochs", type=_whole, metavar="N", help="of training; default: the table's")
    add("--limit", type=_whole, metavar="N", help="at most N images a class")
    add("--side", type=_whole, metavar="N", help="pixels of an input's side; default: the paper's")
    classes = "to forget, or the pair of cnp-*, that with the watermark second; "
    add("--classes", type=_numbered, metavar="A,B", help=classes + "default: the table's")
    strengths = "shares of a class that have the watermark of cnp-*; default: the table's"
    add("--strengths", type=_shares, metavar="A,B", help=strengths)
    add("--seeds", type=_numbered, default=(0,), metavar="A,B", help="default: 0")
    methods = "default: all; a semicolon parts them where a name has a comma, as in 'A, b; C'"
    add("--methods", type=_methods, metavar="A,B", help=methods)
    add("--device", help="such as cuda; default: cuda if there is one, else cpu")
    add("--quiet", action="store_true", help="no progress bar and no tables")

    report = commands.add_parser(
        "report",
        help="write the HTML page of a finished run anew",
        description="Writes report.html from the results in DIR.",
    )
    report.add_argument("folder", type=Path, metavar="DIR", help="of a finished run")
    return made


LABELLED = "class folders, CSV file of path,label, or torchvision:CIFAR10"


def _add_model_and_data(
    parser: argparse.ArgumentParser,
    *,
    needs_data: bool,
    outputs: str = "--classes",
    layers: str | None = "default: all convolution and linear layers",
    kinds: str = "folder of images or of " + LABELLED,
) -> None:
    _add_model(parser, outputs)
    add = parser.add_argument
    if layers is not None:
        add("--layers", type=_names, metavar="A,B", help=layers)
    add("--json", action="store_true", help="print JSON instead of text")
    usual = "Images are resized, cut and normalised as usual for the model, or for ImageNet."
    add = parser.add_argument_group("data", usual).add_argument
    add("--data", required=needs_data, help=kinds)
    add("--data-root", metavar="DIR", help="where torchvision's data set is")
    add("--split", default="test", metavar="NAME", help="of torchvision's data set" + DEFAULT)
    add("--limit", type=_whole, metavar="N", help="at most N samples, spread over the data")
    add("--batch-size", type=_whole, default=32, metavar="N", help="samples at a time" + DEFAULT)
    add("--input-size", type=_size, metavar="CxHxW", help="such as 3x224x224; 1 channel is grey")
    add("--resize", type=_whole, metavar="N", help="shorter side before the centre is cut out")
    add("--mean", type=_numbers, metavar="R,G,B", help="subtracted from values in [0, 1]")
    add("--std", type=_numbers, metavar="R,G,B", help="then divided by")


def _add_model(parser: argparse.ArgumentParser, outputs: str = "--outputs") -> None:
    add = parser.add_argument
    add("--model", required=True, help="torchvision:NAME, or package.module:function that makes it")
    add("--weights", metavar="FILE", help="safetensors or checkpoint; torchvision's own: DEFAULT")
    usual = "outputs, if not the model's usual number"
    add(outputs, dest="outputs", type=_whole, metavar="N", help=usual)
    add("--device", default="cpu", help="such as cuda" + DEFAULT)
    add("--quiet", action="store_true", help="no progress bar and no notes")


def _names(text: str, mark: str = ",") -> list[str]:
    return [name.strip() for name in text.split(mark) if name.strip()]


def _methods(text: str) -> list[str]:
    return (
        [name.strip() for name in text.split(";") if name.strip()] if ";" in text else _names(text)
    )


def _target(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _share(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _rate(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # one of the operator's words


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _size(text: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in text.split("x"))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers between commas") from None


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers from 0 to 1 between commas")
    return shares


def _numbered(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers between commas")
    return tuple(int(part) for part in text.split(","))
