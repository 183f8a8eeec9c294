"""Turn attributions of Zennit and Captum into edits of a model, and prove what each edit did."""

from __future__ import annotations

from typing import Any

import lazy_loader

from xai_edit._version import __version__  # noqa: F401

# Those of __init__.pyi. PyTorch and what needs it are imported when the first of them is used.
_found, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        _require_torchvision()
        globals()[name] = _found(name)
        return globals()[name]
    return _found(name)


def _require_torchvision() -> None:
    try:
        import torchvision  # noqa: F401  # Zennit imports it
    except (ImportError, RuntimeError, OSError, AttributeError) as problem:
        raise ImportError(
            "xai_edit needs a torchvision that matches the installed torch, and this one cannot be "
            f"imported ({type(problem).__name__}: {problem}); install both anew together, for "
            "example with: pip install --upgrade --force-reinstall torch torchvision"
        ) from None
