# %% [markdown]
# # What `xai-edit score` takes on a folder of JPEG files
#
#     python examples/benchmarks/files.py [--out FILE] [--quick] [--files 5000] [--device cuda]
#
# The command, from start to written report, over what it cannot do without: decoding the files, and
# the passes that score as many images in memory. Pictures of 500 × 375 pixels are made for it.
# CPU time on one thread; elsewhere wall time. Decoding is in this process, without `--workers`.

# %%
from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.models import get_model

import xai_edit as xe
from xai_edit.command.load import load_images, preprocessing_of
from xai_edit.command.main import main as xai_edit
from xai_edit.edits.model_edit import versions
from xai_edit.reproduce.summaries import write_json

BATCH = 32
CLASSES = 2


def pictures(folder: Path, count: int) -> None:
    """Write smooth pictures with some grain, in a folder a class."""
    seed = torch.Generator().manual_seed(0)
    for number in range(count):
        coarse = torch.rand(1, 3, 12, 16, generator=seed)
        smooth = torch.nn.functional.interpolate(coarse, (375, 500), mode="bicubic")[0]
        pixels = (smooth + 0.05 * torch.randn(3, 375, 500, generator=seed)).clamp(0, 1)
        path = folder / str(number % CLASSES) / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        array = (255 * pixels).byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(path, quality=90)


def seconds(task, device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    task()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="xai-edit score on a folder of JPEG files.")
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--model", default="squeezenet1_1")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="48 files")
    given = parser.parse_args()
    files = 48 if given.quick else given.files
    torch.set_num_threads(1)
    name = f"torchvision:{given.model}"
    torch.manual_seed(0)
    model = get_model(given.model).eval().to(given.device)
    preprocessing = preprocessing_of(name, None)
    batch = torch.randn(BATCH, *preprocessing.shape, device=given.device)
    counts = [min(BATCH, files - start) for start in range(0, files, BATCH)]
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        pictures(images, files)
        loaded = load_images(str(images), preprocessing=preprocessing)
        command = ["score", "--model", name, "--data", str(images), "--target", "predicted"]
        command += ["--out", str(Path(folder, "run")), "--batch-size", str(BATCH), "--quiet"]
        command += ["--device", str(given.device)]
        tasks = {
            "decoding": lambda: [None for _ in DataLoader(loaded, BATCH)],
            "passes": lambda: xe.score_units(
                model, (batch[:count] for count in counts), xe.LRP("epsilon"), target="predicted"
            ),
            "xai-edit score": lambda: xai_edit(command),
        }
        xe.score_units(
            model, [batch[:1]], xe.LRP("epsilon"), target="predicted"
        )  # what is done once
        told = {key: seconds(task, given.device) for key, task in tasks.items()}
    ratio = (told["decoding"] + told["passes"]) / told["xai-edit score"]
    for key, value in told.items():
        print(f"{key:<16} {value:.1f} s, {files / value:.1f} images a second")
    print(f"speed of decoding and passes alone that is reached: {ratio:.0%}")
    if given.out:
        about = {
            "command": f"python examples/benchmarks/files.py --files {files} --out FILE",
            "device": platform.processor() or platform.machine(),
            "versions": versions(),
            "model": given.model,
            "files": files,
            "seconds": {key: round(value, 2) for key, value in told.items()},
            "reached": round(ratio, 4),
        }
        write_json(given.out, about)


if __name__ == "__main__":
    main()
