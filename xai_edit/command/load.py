"""A model and images from the strings of a command line."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.utils.data import Dataset
from torchvision import datasets, models
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from xai_edit.command.tables import image_table, is_number
from xai_edit.core.checks import require_type, whole_number
from xai_edit.core.text import require_utf8
from xai_edit.core.wrapped import unwrapped
from xai_edit.datasets.image_files import image_files, is_image, read_image

TORCHVISION = "torchvision:"
# Heads that only training uses: in evaluation they take no part, so their units have no score.
TRAINING_HEADS = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: resized, cut out at the centre, normalised.

    ``shape`` is channels (1: grey, 3: colour), height and width of an input; ``resize`` the image's
    shorter side before the cut, by default the input's longer side; ``mean`` and ``std`` have one
    number a channel, or one for all, for values in [0, 1].
    """

    shape: tuple[int, int, int] = (3, 224, 224)
    resize: int | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.shape[0] not in (1, 3) or min(self.shape) < 1 or self.side < max(self.shape[1:]):
            raise ValueError(f"images: {self} given; 1 (grey) or 3 channels, resized to no less")
        if {len(self.mean), len(self.std)} - {1, self.shape[0]} or min(self.std) <= 0:
            raise ValueError(f"images: {self} given; one mean and one std > 0 for each channel")

    @property
    def side(self) -> int:
        """Length of the image's shorter side before the cut."""
        return max(self.shape[1:]) if self.resize is None else self.resize

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest values that an input can have, each of shape (1, channels, 1, 1)."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        low, high = (((edge - mean) / std).view(1, -1, 1, 1) for edge in (0.0, 1.0))
        return low, high

    def pixels(self, inputs: Tensor) -> Tensor:
        """Return the images in [0, 1] that inputs were made of, on the CPU."""
        low, high = self.bounds
        return (inputs.cpu() - low) / (high - low)

    def __call__(self, image: Any) -> Tensor:
        """Return the input made of a PIL image, in the steps of torchvision's presets."""
        channels, height, width = self.shape
        image = image.convert("RGB" if channels == 3 else "L")
        image = F.resize(image, [self.side], interpolation=InterpolationMode(self.interpolation))
        pixels = F.to_tensor(F.center_crop(image, [height, width]))
        return F.normalize(pixels, list(self.mean), list(self.std))  # type: ignore[no-any-return]

    def __str__(self) -> str:
        size = "×".join(map(str, self.shape))
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{size}, shorter side resized to {self.side}, mean {mean}, std {std}"


IMAGENET = Preprocessing(resize=256)


def preprocessing_of(
    spec: str, weights: str | None = None, *, shape: tuple[int, ...] | None = None, **asked: Any
) -> Preprocessing:
    """Return torchvision's preset for a model of `load_model`, or ImageNet's, changed.

    With another ``shape`` the whole image is taken, unless ``resize`` is asked; one channel has no
    usual normalisation. Of ``asked``, other fields, None keeps the preset's value.
    """
    usual = IMAGENET
    if spec.startswith(TORCHVISION):
        known = models.get_model_weights(torchvision_name(spec)).__members__
        chosen = [known[weights]] if weights in known else known.values()
        # Of several, the smallest: the size that a network built without weights is made for.
        preset = min((each.transforms() for each in chosen), key=lambda one: one.crop_size[0])
        (size,), (side,) = preset.crop_size, preset.resize_size
        numbers = (tuple(preset.mean), tuple(preset.std))
        usual = Preprocessing((3, size, size), side, *numbers, preset.interpolation.value)
    if shape is not None and shape != usual.shape:
        if len(shape) != 3:
            raise ValueError(f"images: inputs of {shape} given; give channels, height and width")
        mean, std = (usual.mean, usual.std) if shape[0] == 3 else ((0.0,), (1.0,))
        usual = replace(usual, shape=shape, resize=None, mean=mean, std=std)
    return replace(usual, **{name: value for name, value in asked.items() if value is not None})


def load_model(spec: str, *, weights: str | None = None, classes: int | None = None) -> nn.Module:
    """Return the model that ``spec`` names, in evaluation mode, on the CPU.

    ``spec`` is ``"torchvision:resnet18"`` or ``"package.module:function"``, imported from the
    current directory too and called without arguments or with ``num_classes``, the number
    ``classes`` of outputs. ``weights`` is a safetensors file or a checkpoint, of which only tensors
    are read; or the name of torchvision's weights, such as ``"DEFAULT"``, which are downloaded.
    """
    config: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    heads: tuple[str, ...] = ()
    if spec.startswith(TORCHVISION):
        name = torchvision_name(spec)
        own = weights if weights in models.get_model_weights(name).__members__ else None
        if heads := TRAINING_HEADS.get(name, ()):
            # The published weights, from a file too, were trained with transformed inputs.
            config |= {"aux_logits": False, "transform_input": True}
            config |= {} if own else {"init_weights": False}  # True warns and is slow
        what = f"weights: torchvision's {weights} of {name}" if own else f"model: {spec}"
        with _one_sentence(f"{what} cannot be loaded"):
            model: nn.Module = models.get_model(name, weights=own, **config)
        weights = None if own else weights
    else:
        model = imported(spec, "model", config)
        require_type(model, nn.Module, f"model: {spec}", "it returns an nn.Module")
    if weights is not None:
        _put_weights(unwrapped(model), Path(weights), heads)
    return model.eval()


def torchvision_name(spec: str) -> str:
    """Return the name of torchvision's classifier, or raise ValueError."""
    name, known = spec.removeprefix(TORCHVISION).lower(), models.list_models(module=models)
    if name not in known:
        raise ValueError(f"model: torchvision has no image classifier {name!r}{near(name, known)}")
    return name


def imported(spec: str, what: str, config: Mapping[str, Any]) -> Any:
    """Return what ``package.module:function`` gives; ``what`` begins the message of an error."""
    module_name, _, name = spec.partition(":")
    if not name:
        works = "give torchvision:NAME or package.module:function"
        raise ValueError(f"{what}: {spec!r} given; {works}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as ``python -m`` does
    with _one_sentence(f"{what}: module {module_name!r} cannot be imported"):
        module = importlib.import_module(module_name)
    made = getattr(module, name, None)
    if not callable(made):
        guess = near(name, vars(module))
        raise ValueError(f"{what}: module {module_name!r} has no function {name!r}{guess}")
    with _one_sentence(f"{what}: {spec} failed"):
        return made(**config)


def _put_weights(model: nn.Module, file: Path, unused: tuple[str, ...]) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"weights: {file}: no such file")
    own = model.state_dict()
    with _one_sentence(f"weights: {file}: not a whole file of tensors; save model.state_dict()"):
        if file.suffix == ".safetensors":
            state: Any = OrderedDict(load_file(file))
            # The versions of the modules, which a safetensors file lacks.
            state._metadata = own._metadata  # type: ignore[attr-defined]
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        for prefix in ("module.", "_orig_mod.", "module."):  # of wrappers, also in each other
            if not any(name.startswith(prefix) for name in own):
                consume_prefix_in_state_dict_if_present(state, prefix)
    with _one_sentence(f"weights: {file} does not fit the model"):
        found = model.load_state_dict(state, strict=False)
    # Old files lack the counts of training batches, which have no part in evaluation.
    missing = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found.unexpected_keys if not name.startswith(unused)]
    if missing or unexpected:
        raise ValueError(
            f"weights: {file} does not fit the model: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )


def load_images(
    spec: str,
    *,
    root: str | Path | None = None,
    split: str = "test",
    preprocessing: Preprocessing = IMAGENET,
    limit: int | None = None,
    label: int | None = None,
) -> Images:
    """Return the images that ``spec`` names, at most ``limit`` of them, spread evenly.

    ``spec`` is a folder of images without labels; a folder of class folders, numbered in
    alphabetical order or by their names if all are numbers; a CSV file of ``path,label`` or
    ``path`` lines, relative to it; or ``"torchvision:CIFAR10"``, of which ``split`` is read in the
    folder ``root``, without download. A CSV file of several labels has ``path,0,1,…`` lines, of
    which ``label`` is the number of one.
    """
    path, others = Path(spec), 0
    classes: dict[int, str] = {}
    if spec.startswith(TORCHVISION):
        source, classes = _torchvision_data(spec.removeprefix(TORCHVISION), root, split)
    elif path.is_dir():
        source, classes, others = _folder(path)
    elif path.is_file():
        source, classes = image_table(path, label)
    else:
        raise FileNotFoundError(
            f"data: {spec}: no such folder or file; give a folder of images, a CSV file of "
            "path,label lines or torchvision:NAME"
        )
    if not len(source):
        raise ValueError(f"data: {spec}: no images")
    size = len(source) if limit is None else min(len(source), whole_number(limit, "limit", least=1))
    for file, _ in source if isinstance(source, list) else ():
        require_utf8(file, "data")
    return Images(source, spread(len(source), size), preprocessing, classes, left_out=others)


def spread(total: int, size: int) -> list[int]:
    """Return ``size`` numbers below ``total``, ascending: a random one of each of equal stretches.

    Every n-th would be of one kind where, say, every other image has a mark.
    """
    random = np.random.default_rng(0)
    edges = [at * total // size for at in range(size + 1)]
    return [int(random.integers(*pair)) for pair in pairwise(edges)]


@dataclass(frozen=True, eq=False)
class Images(Dataset[Any]):
    """Some ``rows`` of a ``source`` of (image or its path, label or None), made into inputs.

    ``marks`` has by row 1 with an attribute and 0 without, the third element of each sample;
    ``left_out`` is the number of files in the folder that are no images.
    """

    source: Any
    rows: Sequence[int]
    preprocessing: Preprocessing
    classes: Mapping[int, str]
    marks: Mapping[int, int] | None = None
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        image, label = self.source[self.rows[index]]
        if isinstance(image, str):
            with _one_sentence(f"data: {image} cannot be read as an image"):
                image = read_image(image)
        inputs, marks = self.preprocessing(image), self.marks
        own = () if marks is None else (marks[self.rows[index]],)
        return inputs if label is None else (inputs, label, *own)

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return hasattr(self.source, "targets") or self.source[self.rows[0]][1] is not None

    @property
    def labels(self) -> list[int]:
        """The label of each, read with the images only where nothing lists them."""
        listed = getattr(self.source, "targets", ())  # of torchvision's data sets
        if len(listed) == len(self.source):
            return [int(listed[row]) for row in self.rows]
        labels = [self.source[row][1] for row in self.rows]
        if None in labels:
            raise ValueError("data: has no labels; give class folders or a CSV file of path,label")
        return labels

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Class and attribute of each image."""
        marks = self.marks or {}
        return [
            (label, marks.get(row, 0)) for label, row in zip(self.labels, self.rows, strict=True)
        ]

    def only(self, chosen: Sequence[int]) -> Images:
        """Return some of the images, by their indices among these."""
        return replace(self, rows=[self.rows[index] for index in chosen])

    def joined(self, other: Images) -> Images:
        """Return these images and some others of the same source, in its order."""
        return replace(self, rows=sorted([*self.rows, *other.rows]))

    def __str__(self) -> str:
        named = [f"{label} = {name}" for label, name in self.classes.items()]
        es, more = "es" * (len(named) != 1), ", …" * (len(named) > 10)
        listed = f" of {len(named)} class{es} ({', '.join(named[:10])}{more})"
        others = f"; other files, left out: {self.left_out}" if self.left_out else ""
        return f"{len(self)} of {len(self.source)} images{listed if named else ''}{others}"


def _folder(folder: Path) -> tuple[list[tuple[str, int | None]], dict[int, str], int]:
    """Return images with their labels, the names of classes, and the number of other files."""
    entries = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    names = [each.name for each in entries if each.is_dir()]
    images = [(str(each), None) for each in entries if is_image(each.name) and not each.is_dir()]
    if images and names:
        raise ValueError(f"data: {folder}: both images and folders; give one kind")
    others = len(entries) - len(images) - len(names)
    if not names:
        return [*images], {}, others
    # "10" sorts before "2", and folders of some classes keep their numbers.
    numbered = all(map(is_number, names))
    labels = {name: int(name) if numbered else at for at, name in enumerate(names)}
    found: list[tuple[str, int | None]] = []
    for name, label in labels.items():
        of_class, more = image_files(folder / name, folder)
        if not of_class:
            raise ValueError(f"data: {folder / name}: no images of its own; take the folder away")
        found += [(file, label) for file in of_class]
        others += more
    return found, {label: name for name, label in labels.items()}, others


def _torchvision_data(name: str, root: str | Path | None, split: str) -> tuple[Any, dict[int, str]]:
    if name not in datasets.__all__:
        guess = near(name, datasets.__all__)
        raise ValueError(f"data: torchvision has no data set {name!r}{guess}")
    accepted = inspect.signature(kind := getattr(datasets, name)).parameters
    if "root" in accepted and root is None:
        raise ValueError(f"data: torchvision:{name} needs its root folder; give --data-root")
    arguments = {"root": root, "split": split, "train": split == "train"}
    problem = f"data: torchvision:{name} cannot be read from {root}; nothing is downloaded"
    with _one_sentence(problem):
        source = kind(**{key: value for key, value in arguments.items() if key in accepted})
        image, label = source[0]
    if not hasattr(image, "convert") or not isinstance(label, int):
        raise ValueError(f"data: torchvision:{name} is not a set of images with a class each")
    names = [each if isinstance(each, str) else each[0] for each in getattr(source, "classes", ())]
    return source, dict(enumerate(names))


def near(name: str, known: Iterable[str]) -> str:
    """Return the end of a message with similar names, or an empty one."""
    folded = {each.lower(): each for each in known if not each.startswith("_")}
    close = [folded[each] for each in difflib.get_close_matches(name.lower(), folded)]
    return f"; did you mean {', '.join(close)}?" if close else ""


@contextmanager
def _one_sentence(text: str) -> Iterator[None]:
    """Turn any exception of foreign code into a ValueError with one sentence."""
    try:
        yield
    except (Exception, SystemExit) as problem:
        raise ValueError(f"{text} ({first_sentence(problem)})") from problem


def first_sentence(problem: BaseException) -> str:
    """Return an exception in one line; the sentences after the first are for programmers."""
    return " ".join(f"{type(problem).__name__}: {problem}".split()).split(". ")[0]
