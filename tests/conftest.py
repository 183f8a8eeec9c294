"""Small networks, real digits and a snapshot that tells whether a model was touched."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest_plugins = ["command_runs"]  # finished runs of the commands


class PlainNet(nn.Module):
    """Two convolutions with in-place ReLU and max-pooling, one hidden linear layer, a head."""

    def __init__(self, classes: int = 10, width: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.relu1 = nn.ReLU(inplace=True)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.relu2 = nn.ReLU(inplace=True)
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(6 * 2 * 2, width)
        self.relu3 = nn.ReLU()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        return self.head(self.relu3(self.fc1(x.flatten(1))))


class NormNet(nn.Module):
    """Convolution, batch norm and ReLU twice, global average pooling, a head, no hidden layer."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, classes)
        with torch.no_grad():  # as after training: every statistic is its own number
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.body(x)).flatten(1))


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """The real digits of scikit-learn: images (1797, 1, 8, 8) in [0, 1] and labels."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    return torch.tensor(raw.images[:, None] / 16.0).float(), torch.tensor(raw.target)


def as_idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def as_mnist(tmp_path_factory: pytest.TempPathFactory, digits: tuple[Tensor, Tensor]) -> Path:
    """The digits in the files of MNIST: 1,100 for training, the others for testing."""
    root = tmp_path_factory.mktemp("data")
    (root / "mnist").mkdir()
    images, labels = digits
    large = torch.nn.functional.interpolate(images, size=28, mode="bilinear")
    pixels, numbers = (large[:, 0] * 255).byte().numpy(), labels.byte().numpy()
    for prefix, part in (("train", slice(0, 1100)), ("t10k", slice(1100, None))):
        for kind, array in (("images-idx3", pixels[part]), ("labels-idx1", numbers[part])):
            file = root / "mnist" / f"{prefix}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(as_idx(array)))
    return root


def trained(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 150) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _with_weights(model: nn.Module, name: str) -> nn.Module:
    """Load weights trained once, since training takes another course on another machine."""
    model.load_state_dict(load_file(Path(__file__).parent / "weights" / f"{name}.safetensors"))
    return model.eval()


@pytest.fixture
def plain() -> nn.Module:
    """A PlainNet of the test's own, trained on the digits."""
    return _with_weights(PlainNet(), "plain")


@pytest.fixture
def norm() -> nn.Module:
    """A NormNet of the test's own, trained on the digits."""
    return _with_weights(NormNet(), "norm")


@pytest.fixture
def batches(digits: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """200 digits in uneven labelled batches."""
    images, labels = digits
    return [
        (images[:64], labels[:64]),
        (images[64:150], labels[64:150]),
        (images[150:200], labels[150:200]),
    ]


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Return a function that asserts that nothing about ``model`` changed since."""

    def state() -> list[object]:
        told: list[object] = []
        for name, module in model.named_modules():
            hooks = [
                list(registry.items())
                for key, registry in sorted(vars(module).items())
                if "hooks" in key and hasattr(registry, "items")
            ]
            told.append((name, id(module), module.training, sorted(vars(module)), hooks))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            grad = None if tensor.grad is None else id(tensor.grad)
            told.append((name, id(tensor), tensor.data_ptr(), tensor.requires_grad, grad))
        return told

    before = state()
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def check() -> None:
        assert state() == before
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, values[name]), name

    return check


@pytest.fixture
def unchanged() -> Callable[[nn.Module], Callable[[], None]]:
    """`snapshot`, as a fixture."""
    return snapshot


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data and pretrained networks, or a skip that says what is missing."""
    folder = os.environ.get("XAI_EDIT_DATA", "")
    if not folder or not Path(folder, "cifar10").is_dir():
        pytest.skip("XAI_EDIT_DATA does not name the folder of real data")
    return Path(folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line what was skipped and how to run it."""
    reasons: dict[str, int] = {}
    for skipped in terminalreporter.stats.get("skipped", []):
        reason = skipped.longrepr[2].removeprefix("Skipped: ")
        reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.items())
        terminalreporter.write_line(f"skipped: {listed}")
