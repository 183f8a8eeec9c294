"""Images in files: which files are images, and their pixels as a viewer shows them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

EXTENSIONS = (*IMG_EXTENSIONS, ".gif")


def is_image(name: str) -> bool:
    """Return whether a file's name is that of an image, and not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def image_files(folder: Path, home: Path) -> tuple[list[str], int]:
    """Return the images below a folder, in order, and how many other files there are.

    Links to folders are followed, but no folder is read twice, nor ``home``, where the folder is.
    """
    inside = [Path(os.path.realpath(one)) for one in (folder, home)]
    seen = {parent for one in inside for parent in (one, *one.parents)}
    found, others = [], 0
    for root, folders, names in os.walk(folder, followlinks=True):
        kept = []
        for name in sorted(folders):
            real = Path(os.path.realpath(Path(root, name)))
            if real not in seen and not name.startswith("."):
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        shown = [name for name in names if not name.startswith(".")]
        images = [os.path.join(root, name) for name in sorted(shown) if is_image(name)]
        found += images
        others += len(shown) - len(images)
    return found, others


def read_image(file: str | Path) -> Image.Image:
    """Return the picture in a file, the first of several, in RGB, as a viewer shows it.

    It is turned as its EXIF entry says, laid on white where it is transparent, and scaled to 8 bits
    a channel from 16. ValueError for other numbers, such as floating ones, whose range is unknown.
    """
    with Image.open(file) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
            values = np.asarray(image).astype(np.float64) / 257  # 65535 becomes 255
            return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise ValueError(
                f"its pixels are numbers of 32 bits (mode {image.mode}), whose range is unknown; "
                "save it with 8 or 16 bits a channel"
            )
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")
