"""The tables and figures of papers that can be run anew: data, network, methods and figures."""

from __future__ import annotations

from functools import partial
from typing import Any

from xai_edit.reproduce.backdoors import BackdoorDiscovery
from xai_edit.reproduce.class_subspaces import SubspaceRemoval
from xai_edit.reproduce.corrected_pruning import CorrectedPairPruning
from xai_edit.reproduce.discovered_groups import ColourDiscovery
from xai_edit.reproduce.discovery import ClassDiscovery, PairDiscovery
from xai_edit.reproduce.experiments import Reproduction
from xai_edit.reproduce.few_shot import FewShotPruning
from xai_edit.reproduce.group_data import celeba, metashift, parity_mnist, waterbirds
from xai_edit.reproduce.groups import NeutralizingColours
from xai_edit.reproduce.image_data import cifar10, cifar100, imagenet, mnist
from xai_edit.reproduce.neutralized_photographs import NeutralizingPhotographs
from xai_edit.reproduce.photographs import LITE0
from xai_edit.reproduce.pruning import PairPruning, TunedPairPruning
from xai_edit.reproduce.removal import ClassRemoval, DigitRemoval, SeveralClassesRemoval
from xai_edit.reproduce.unlearning import PATTERNS, RULES, Unlearning

AT_HIGH_RATE: dict[str, Any] = {"training": {"learning_rate": 3e-3, "weight_decay": 1e-2}}
COLOURED: dict[str, Any] = {**AT_HIGH_RATE, "flip": True}
SMALL: dict[str, Any] = {"read": cifar10, "side": 32, "network": "conv-2net", "epochs": 10}
SMALL |= COLOURED

LargeUnlearning = partial(Unlearning, side=224, epochs=10, **COLOURED)
CHANG = (  # Zero-shot class unlearning, Tables III to X
    Unlearning(
        name="npp-mnist",
        title="class unlearning, all-cnn on mnist",
        read=mnist,
        network="all-cnn",
        epochs=5,
        share=0.2,
        shares=(0.04, 0.08, 0.12, 0.16, 0.2, 0.24),
        ks=(50, 100),
        classes=tuple(range(10)),
        rules=(*RULES, *PATTERNS),
    ),
    LargeUnlearning(
        name="npp-cifar10",
        title="class unlearning, resnet50 on cifar10",
        read=cifar10,
        network="resnet50",
        share=0.25,
        shares=(0.1, 0.15, 0.2, 0.25, 0.3),
        ks=(150, 200),
        classes=tuple(range(10)),
    ),
    LargeUnlearning(
        name="npp-cifar100",
        title="class unlearning, resnet50 on cifar100",
        read=cifar100,
        network="resnet50",
        share=0.1,
        shares=(0.075, 0.1, 0.125),
        ks=(150, 200),
        classes=(0,),
    ),
    LargeUnlearning(
        name="npp-imagenet",
        title="class unlearning, vgg16 on imagenet",
        read=imagenet,
        network="vgg16",
        share=0.1,
        shares=(0.02, 0.04, 0.08, 0.1, 0.12),
        ks=(100, 150, 200),
        classes=(0,),
    ),
)
SUBSPACES = SubspaceRemoval(
    name="subspace-removal",
    title="class unlearning by a subspace at each stage, and what a new probe finds",
    **SMALL | {"network": "resnet20"},
    classes=(0, 3, 7),
)
DIGITS: dict[str, Any] = {
    **{"read": mnist, "network": "conv-2net", "epochs": 2, "strengths": (0.9, 0.95, 0.97)},
    **{"erm": {"learning_rate": 1e-2}, "jtt": {"learning_rate": 1e-2}},
    **{"group_dro": {"learning_rate": 1e-2, "weight_decay": 1e-2}},
    **{"first_epochs": 1, "upweight": 10},
}
HAKEMI = (  # Post-hoc spurious correlation neutralization, Figures 6 to 9 and Table 1
    ClassRemoval(name="fcr-cifar10", title="one class removed by one weight", **SMALL),
    SeveralClassesRemoval(
        name="fcr-multi", title="several of ten classes removed", counts=(2, 4, 6, 8), **SMALL
    ),
    SeveralClassesRemoval(
        name="fcr-multi-100",
        title="several of CIFAR-100's classes removed",
        counts=(1, 10, 50, 98),
        **SMALL | {"read": cifar100, "network": "resnet18"},
    ),
    DigitRemoval(
        name="fcr-parity",
        title="digits removed from odd and even",
        read=parity_mnist,
        network="conv-2net",
        epochs=2,
        **AT_HIGH_RATE,
    ),
    NeutralizingColours(
        name="fcr-colored", title="a spurious feature neutralised: coloured digits", **DIGITS
    ),
    NeutralizingPhotographs(
        name="fcr-waterbirds",
        title="a spurious feature neutralised: Waterbirds",
        read=waterbirds,
        network=LITE0,
        side=128,
        epochs=5,
        erm={"learning_rate": 1e-3},
        group_dro={"learning_rate": 1e-5, "weight_decay": 1.0},
        jtt={"learning_rate": 1e-5, "weight_decay": 1.0},
        first_epochs=60,
        upweight=100,
    ),
    NeutralizingPhotographs(
        name="fcr-celeba",
        title="a spurious feature neutralised: CelebA, hair and gender",
        read=celeba,
        network=LITE0,
        side=89,
        epochs=4,
        erm={"learning_rate": 1e-4},
        group_dro={"learning_rate": 1e-5, "weight_decay": 0.1},
        jtt={"learning_rate": 1e-5, "weight_decay": 0.1},
        first_epochs=1,
        upweight=50,
    ),
    # No source gives numbers for these groups: those of Waterbirds, with fewer epochs.
    NeutralizingPhotographs(
        name="fcr-metashift",
        title="a spurious feature neutralised: MetaShift, cats and dogs",
        read=metashift,
        network=LITE0,
        side=128,
        epochs=5,
        batch_size=16,
        erm={"learning_rate": 1e-4},
        group_dro={"learning_rate": 1e-5, "weight_decay": 1.0},
        jtt={"learning_rate": 1e-5, "weight_decay": 1.0},
        first_epochs=20,
        upweight=20,
    ),
)
TRUCKS: dict[str, Any] = {
    **{"read": cifar10, "side": 32, "network": "vgg-like", "epochs": 30, "classes": (1, 9)},
    **{"layer": "relu2", "shift": 4, "flip": True, "training": {"learning_rate": 3e-3}},
}
CARTONS: dict[str, Any] = {
    **{"read": imagenet, "side": 224, "network": "vgg16", "epochs": 5, "layer": "features.28"},
    **{"classes": ("n02074367", "n02971356"), "rows": (149, 478), "flip": True},
    "training": {"learning_rate": 3e-3},
}
CNP = "concept-aware pruning"
PRUNING = (  # Concept-aware network pruning
    PairPruning(name="cnp-cifar10", title=f"{CNP}: CIFAR-10, trucks with a planted mark", **TRUCKS),
    PairPruning(
        name="cnp-checkerboard",
        title=f"{CNP}: CIFAR-10, dogs with another mark",
        **TRUCKS | {"classes": (3, 5), "pattern": "checkerboard"},
    ),
    TunedPairPruning(
        name="cnp-fine-tuned", title=f"{CNP}: the same in steps, with fine-tuning", **TRUCKS
    ),
    CorrectedPairPruning(
        name="cnp-corrected",
        title=f"{CNP}: by a discovered subspace, then a retrained last layer",
        **TRUCKS,
    ),
    CorrectedPairPruning(
        name="cnp-corrected-checkerboard",
        title=f"{CNP}: the same, dogs with another mark",
        **TRUCKS | {"classes": (3, 5), "pattern": "checkerboard"},
    ),
    PairPruning(
        name="cnp-mnist",
        title=f"{CNP}: MNIST, a digit with a planted mark",
        read=mnist,
        network="vgg-like:0.5",
        epochs=2,
        classes=(3, 8),
        layer="relu2",
        strengths=(0.9, 0.95, 0.99),
        training={"learning_rate": 3e-3},
    ),
    PairPruning(
        name="cnp-subspaces",
        title=f"{CNP}: subspaces of cartons, which have a watermark, and dugongs",
        **CARTONS,
    ),
    PairPruning(name="cnp-carton-dugong", title=f"{CNP}: cartons and dugongs", **CARTONS),
    PairPruning(
        name="cnp-crate-packet",
        title=f"{CNP}: crates and packets",
        **CARTONS | {"classes": ("n03871628", "n03127925"), "rows": (692, 519)},
    ),
    FewShotPruning(
        name="cnp-few-shot",
        title="pruning from ten images a class, without a watermark and without fine-tuning",
        **SMALL | {"network": "resnet20"},
    ),
)
OF_TEN: dict[str, Any] = {**TRUCKS, "epochs": 15, "classes": (9, 3)}
BACKDOORS: dict[str, Any] = {
    **{"read": cifar10, "side": 32, "network": "vgg-like", "epochs": 15, "flip": True},
    **{"training": {"learning_rate": 3e-3}, "targets": (0, 3, 7), "poisoned": 0.03},
}
DISCOVERY = (
    ColourDiscovery(name="discover-colored", title="discovery: coloured digits", **DIGITS),
    PairDiscovery(
        name="discover-cifar10", title="discovery: CIFAR-10, trucks with a planted mark", **TRUCKS
    ),
    PairDiscovery(
        name="discover-checkerboard",
        title="discovery: CIFAR-10, dogs with another mark",
        **TRUCKS | {"classes": (3, 5), "pattern": "checkerboard"},
    ),
    PairDiscovery(
        name="discover-clean",
        title="discovery: CIFAR-10, trucks without a mark",
        **TRUCKS,
        strengths=(0.0,),
    ),
    ClassDiscovery(
        name="discover-ten", title="discovery: ten classes, one with a planted mark", **OF_TEN
    ),
    BackdoorDiscovery(
        name="discover-backdoor",
        title="discovery: three triggers in images shown to a network with backdoors",
        **BACKDOORS,
        strengths=(0.1, 0.03, 0.01, 0.005, 0.0),
    ),
)
CATALOGUE: dict[str, Reproduction] = {
    each.name: each for each in (*CHANG, SUBSPACES, *HAKEMI, *PRUNING, *DISCOVERY)
}
"""All of them by name."""
