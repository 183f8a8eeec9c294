import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_idx
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from xai_edit.command.categories import by_category
from xai_edit.command.load import (
    IMAGENET,
    Preprocessing,
    load_images,
    load_model,
    preprocessing_of,
    spread,
)
from xai_edit.core.data import batches
from xai_edit.core.wrapped import unwrapped

TINY = Preprocessing((3, 32, 32))
NET = """
import torch
from torch import nn

def build(num_classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, num_classes))

def parallel():
    return nn.DataParallel(build())

def compiled():
    return torch.compile(build())

def both():
    return torch.compile(parallel())

def both_turned():
    return nn.DataParallel(compiled())

def broken():
    raise RuntimeError("no such luck\\nat all. Try again")

def dictionary():
    return {}
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Crops of scikit-learn's two photographs, a folder each."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photos")
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir()
        for at in range(3):
            crop = pixels[30 * at : 30 * at + 250, 40 * at : 40 * at + 320]
            Image.fromarray(crop).save(folder / name / f"{at}.png")
    return folder


@pytest.fixture
def net(tmp_path, monkeypatch):
    """The current directory, with a module of the user's own."""
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))  # also restores the path afterwards
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "user_net", raising=False)
    Path("user_net.py").write_text(NET)
    return tmp_path


def same(model: nn.Module, state) -> bool:
    own = model.state_dict()
    return all(torch.equal(own[name], state[name]) for name in own if name in state)


# The model


def test_a_torchvision_model_is_ready_to_be_read():
    model = load_model("torchvision:ResNet18", classes=7)
    assert isinstance(model, models.ResNet)
    assert not model.training
    assert model.fc.out_features == 7


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_heads_of_training_are_left_out_and_nothing_warns(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(f"torchvision:{name}")
    assert not any("aux" in part.lower() for part, _ in model.named_modules())
    assert model.transform_input  # as for the published weights


def test_weights_with_heads_of_training_fit(tmp_path):
    whole = models.googlenet(weights=None, aux_logits=True, init_weights=False)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    model = load_model("torchvision:googlenet", weights=str(tmp_path / "w.pth"))
    assert same(model, whole.state_dict())


def test_a_function_of_the_current_directory_is_called(net):
    assert load_model("user_net:build")[-1].out_features == 10
    assert load_model("user_net:build", classes=4)[-1].out_features == 4


@pytest.mark.parametrize("kind", ["safetensors", "plain", "state_dict"])
def test_weights_of_each_kind_arrive(net, kind):
    state = load_model("user_net:build").state_dict()
    file = net / f"w.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file(state, file)
    elif kind == "state_dict":
        torch.save({"state_dict": state, "epoch": 3}, file)
    else:
        torch.save(state, file)
    assert same(load_model("user_net:build", weights=str(file)), state)


WRAPPERS = {
    "build": lambda model: model,
    "parallel": nn.DataParallel,
    "compiled": torch.compile,
    "both": lambda model: torch.compile(nn.DataParallel(model)),
    "both_turned": lambda model: nn.DataParallel(torch.compile(model)),
}


@pytest.mark.parametrize("built", WRAPPERS)
@pytest.mark.parametrize("saved", WRAPPERS)
def test_weights_of_wrapped_models_arrive_in_wrapped_models(net, saved, built):
    inside = load_model("user_net:build")
    torch.save(WRAPPERS[saved](inside).state_dict(), "w.pt")
    model = load_model(f"user_net:{built}", weights="w.pt")
    assert same(unwrapped(model), inside.state_dict())


def test_weights_without_versions_and_counts_of_batches_fit(tmp_path):
    # MNASNet refuses weights without its version, which safetensors cannot hold.
    state = models.mnasnet0_5().state_dict()
    old = {name: v for name, v in state.items() if "num_batches_tracked" not in name}
    save_file(old, tmp_path / "m.safetensors")
    model = load_model("torchvision:mnasnet0_5", weights=str(tmp_path / "m.safetensors"))
    assert same(model, old)


def test_weights_of_torchvision_go_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints"
    cached.mkdir(parents=True)
    state = models.resnet18().state_dict()
    for name in ("DEFAULT", "IMAGENET1K_V1"):
        file = Path(models.get_model_weights("resnet18")[name].url).name
        torch.save(state, cached / file)  # as if downloaded before
        assert same(load_model("torchvision:resnet18", weights=name), state)


def test_a_pickle_is_not_run(net):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (Path("harmed"),)

    torch.save({"state_dict": Harmful()}, "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: not a whole file of tensors; save model\.state"):
        load_model("user_net:build", weights="w.pt")
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:resnet81", r"no image classifier 'resnet81'; did you mean resnet18, "),
        ("user_net:", "give torchvision:NAME or"),
        ("user_net:buildd", r"'user_net' has no function 'buildd'; did you mean build\?"),
        ("user_nett:build", r"cannot be imported \(ModuleNotFoundError: No module named 'user_net"),
        ("user_net:broken", r"user_net:broken failed \(RuntimeError: no such luck at all\)"),
    ],
)
def test_a_model_that_cannot_be_made_is_one_clear_line(net, spec, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_model(spec)
    assert "\n" not in str(raised.value)


def test_what_is_made_must_be_a_module(net):
    with pytest.raises(TypeError, match=r"user_net:dictionary: dict given; it returns an nn\.M"):
        load_model("user_net:dictionary")


def test_weights_that_do_not_fit_are_one_clear_line(net):
    model = load_model("user_net:build")
    torch.save(load_model("user_net:build", classes=3).state_dict(), "three.pt")
    torch.save({**model.state_dict(), "1.bais": torch.zeros(4)}, "more.pt")
    torch.save({"1.weight": model[1].weight.data}, "less.pt")
    Path("cut.pt").write_bytes(Path("more.pt").read_bytes()[:500])
    Path("cut.safetensors").write_bytes(b"\0" * 20)
    for file, message in {
        "three.pt": r"three\.pt does not fit the model .*size mismatch for 3\.weight",
        "more.pt": r"0 missing \[\], 1 unexpected \['1\.bais'\]",
        "less.pt": r"3 missing \['1\.bias', '3\.weight', '3\.bias'\], 0 unexpected",
        "cut.pt": "not a whole file of tensors; save model.state_dict",
        "cut.safetensors": "not a whole file of tensors",
    }.items():
        with pytest.raises(ValueError, match=message) as raised:
            load_model("user_net:build", weights=file)
        assert "\n" not in str(raised.value)


# Preprocessing


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "inception_v3"])
def test_inputs_are_those_of_torchvisions_preset(photos, name):
    image = Image.open(photos / "china" / "0.png")
    preset = models.get_model_weights(name).DEFAULT.transforms()
    assert torch.equal(preprocessing_of(f"torchvision:{name}", "DEFAULT")(image), preset(image))


def test_every_classifier_has_a_preset_that_it_was_built_for():
    for name in models.list_models(module=models):
        assert preprocessing_of(f"torchvision:{name}").shape[0] == 3
    assert preprocessing_of("torchvision:vit_h_14").shape == (3, 224, 224)
    assert preprocessing_of("torchvision:vit_h_14", "DEFAULT").shape == (3, 518, 518)
    assert preprocessing_of("net:build") == IMAGENET


def test_black_and_white_are_the_bounds_of_inputs():
    low, high = IMAGENET.bounds
    for color, bound, value in (("black", low, 0.0), ("white", high, 1.0)):
        found = IMAGENET(Image.new("RGB", (300, 300), color))
        torch.testing.assert_close(found, bound.expand(1, 3, 224, 224)[0])
        torch.testing.assert_close(IMAGENET.pixels(found)[0], torch.full_like(found, value))


def test_a_size_of_ones_own_takes_the_whole_image(photos):
    asked = preprocessing_of("torchvision:resnet18", shape=(3, 64, 64))
    assert (asked.side, asked.mean) == (64, IMAGENET.mean)
    assert preprocessing_of("net:build", shape=(3, 224, 224)) == IMAGENET
    assert preprocessing_of("net:build", shape=(3, 64, 64), resize=80, mean=(0.5,)).side == 80
    grey = preprocessing_of("net:build", shape=(1, 8, 16))
    assert (grey.mean, grey.std) == ((0.0,), (1.0,))
    assert grey(Image.open(photos / "china" / "0.png")).shape == (1, 8, 16)
    normalised = "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    assert str(asked) == f"3×64×64, shorter side resized to 64, {normalised}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (2, 8, 8)},
        {"shape": (3, 0, 8)},
        {"shape": (64,)},
        {"resize": 200},
        {"mean": (0.5, 0.5)},
        {"std": (0.5, 0.5, 0.0)},
        {"shape": (1, 8, 8), "mean": (0.4, 0.4, 0.4)},
    ],
)
def test_impossible_preprocessing_is_refused(wrong):
    with pytest.raises(ValueError, match=r"^images: .* given; "):
        preprocessing_of("net:build", **wrong)


# Data


def labels_of(images):
    return [label for batch in batches(images) for label in batch.labels.tolist()]


def test_class_folders_are_numbered_in_alphabetical_order(photos):
    images = load_images(str(photos), preprocessing=TINY)
    assert labels_of(images) == images.labels == [0, 0, 0, 1, 1, 1]
    assert next(batches(images)).inputs.shape == (6, 3, 32, 32)
    assert str(images) == "6 of 6 images of 2 classes (0 = china, 1 = flower)"
    first = TINY(Image.open(photos / "china" / "0.png"))
    assert torch.equal(images[0][0], first)


def test_folders_named_by_numbers_are_these_classes(photos, tmp_path):
    for name in ("2", "10", "553"):
        (tmp_path / name / "deeper").mkdir(parents=True)
        Image.open(photos / "china" / "0.png").save(tmp_path / name / "deeper" / "a.jpg")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert sorted(labels_of(load_images(str(tmp_path), preprocessing=TINY))) == [2, 10, 553]


@pytest.mark.parametrize("header", ["", "path,label\n"])
def test_a_table_names_images_relative_to_itself(photos, tmp_path, header):
    file, absolute = tmp_path / "table.csv", photos / "china" / "1.png"
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    file.write_text(f"{header}0.png,7\n\n{absolute}, 3\n", encoding="utf-8-sig")
    images = load_images(str(file), preprocessing=TINY)
    assert labels_of(images) == [7, 3]
    assert torch.equal(images[1][0], TINY(Image.open(absolute)))


def test_flat_folders_and_tables_of_paths_have_no_labels(photos, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("\n".join(str(photos / "china" / f"{at}.png") for at in range(3)))
    for spec in (photos / "china", table):
        (batch,) = batches(load_images(str(spec), preprocessing=TINY))
        assert batch.labels is None
        assert len(batch) == 3


@pytest.fixture
def mnist(tmp_path, digits):
    """Real digits as the files of MNIST."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = (digits[0][:20, 0] * 255).byte().numpy()
    labels = digits[1][:20].byte().numpy()
    for part, size in (("t10k", 20), ("train", 10)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(as_idx(pixels[:size]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(as_idx(labels[:size]))
    return tmp_path, torch.from_numpy(pixels), labels.tolist()


def test_a_torchvision_data_set_is_read(mnist):
    root, pixels, labels = mnist
    shape = Preprocessing((1, 8, 8), mean=(0.5,), std=(0.25,))
    images = load_images("torchvision:MNIST", root=root, preprocessing=shape, limit=10)
    (batch,) = batches(images)
    taken = spread(len(labels), 10)
    assert batch.labels.tolist() == [labels[at] for at in taken]
    torch.testing.assert_close(batch.inputs[:, 0], (pixels[taken] / 255 - 0.5) / 0.25)
    assert "10 of 20 images of 10 classes (0 = 0 - zero, " in str(images)
    training = load_images("torchvision:MNIST", root=root, split="train", preprocessing=shape)
    assert labels_of(training) == labels[:10]


def test_a_limit_takes_samples_of_every_class(photos):
    assert labels_of(load_images(str(photos), preprocessing=TINY, limit=4)) == [0, 0, 1, 1]
    assert len(load_images(str(photos), preprocessing=TINY, limit=100)) == 6


def test_an_image_that_cannot_be_read_is_named(photos, tmp_path):
    whole = (photos / "china" / "0.png").read_bytes()
    for content in (whole[:5000], b"mine", b""):
        (tmp_path / "a.png").write_bytes(content)
        images = load_images(str(tmp_path), preprocessing=TINY)
        with pytest.raises(ValueError, match=r"data: .*a\.png cannot be read as an image"):
            list(batches(images))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no images"),
        ("0.png,1\n0.png,1.5\n", r"table\.csv, line 2: label '1.5' is not a class number"),
        ("0.png,1\n0.png,100000000000000000000\n", "line 2: label .* is not a class number"),
        ("0.png,1\n0.png\n", "line 2: give path,label in every line"),
        ("0.png,1,1\n", "has 2 labels an image; choose one of them by --label"),
        ("path,label\n0.png,1\n9.png,1\n", r"line 3: .*9\.png: no such file"),
        ("\0\xff", "cannot be read as a CSV file|no such file"),
    ],
)
def test_a_table_that_is_wrong_says_where(photos, tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text, encoding="latin-1")
    (tmp_path / "0.png").write_bytes((photos / "china" / "0.png").read_bytes())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_images(str(tmp_path / "table.csv"))


def test_data_that_are_not_there_are_one_clear_line(tmp_path):
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    (tmp_path / "mixed" / "cat").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "mixed" / "a.png")
    for spec, root, message in [
        (f"{tmp_path}/classes", None, "classes/cat: no images of its own"),
        (f"{tmp_path}/mixed", None, "both images and folders"),
        (f"{tmp_path}/mixed/a.png", None, "cannot be read as a CSV file"),
        ("torchvision:cifar10", None, r"no data set 'cifar10'; did you mean CIFAR10"),
        ("torchvision:CIFAR10", None, "needs its root folder; give --data-root"),
        ("torchvision:CIFAR10", tmp_path, "cannot be read from .*; nothing is downloaded"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
            load_images(spec, root=root)
        assert "\n" not in str(raised.value)


def test_a_data_set_without_classes_is_refused(tmp_path, monkeypatch):
    import torchvision

    pairs = type("Pairs", (), {"__getitem__": lambda self, at: (torch.zeros(3), {"box": 1})})
    monkeypatch.setattr(torchvision.datasets, "FakeData", pairs)
    with pytest.raises(ValueError, match="not a set of images with a class each"):
        load_images("torchvision:FakeData")


def test_class_folders_have_the_numbers_of_the_categories_of_their_names(tmp_path):
    for name in ("Tabby_cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    images = load_images(str(tmp_path))
    named = by_category(images, ["dog", "fish", "tabby cat"])
    assert (named.labels, named.classes) == ([2, 0], {2: "Tabby_cat", 0: "dog"})
    with pytest.raises(ValueError, match="folder 'Tabby_cat' is no class of the weights; did you"):
        by_category(images, ["dog", "fish", "tabby cats"])
    assert by_category(images, ["one", "two", "three"]) is images
    assert by_category(images, ["cat", "dog"]) is images  # a full set of folders


def test_what_is_taken_of_the_data_is_no_every_other_sample():
    taken = np.array(spread(1000, 500))
    assert (np.diff(taken) > 0).all()
    assert (taken // 2 == np.arange(500)).all()  # one of each stretch of two
    assert 0.4 < (taken % 2).mean() < 0.6
    assert spread(7, 7) == [*range(7)]
