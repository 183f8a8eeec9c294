"""Figures of Chang et al., *Zero-shot class unlearning*, Tables III to X."""

from __future__ import annotations

METHODS = {
    # method: A_t, A_g, F_r, GB, seconds
    "mnist": {
        "retrain": (0.00, 0.97, 1.00, 0.74, 71.37),
        "random labels": (0.00, 0.97, 1.00, 0.70, 15.64),
        "amnesiac": (0.38, 0.98, 0.78, 0.44, 38.72),
        "boundary expanding": (0.13, 0.95, 0.91, 0.65, 69.21),
        "boundary shrink": (0.05, 0.58, 1.00, 0.71, 18.55),
        "path noise (Gaussian)": (0.35, 0.68, 0.61, 0.64, 0.77),
        "path noise (Laplacian)": (0.21, 0.53, 0.78, 0.64, 0.83),
        "path perturbation": (0.00, 0.97, 1.00, 0.64, 0.68),
    },
    "cifar10": {
        "retrain": (0.00, 0.96, 1.00, 6.89, 484.17),
        "random labels": (0.00, 0.90, 0.99, 6.89, 107.99),
        "amnesiac": (0.91, 0.84, 0.13, 1.75, 3.30),
        "boundary expanding": (0.83, 0.89, 0.01, 4.07, 150.22),
        "boundary shrink": (0.19, 0.58, 0.09, 6.76, 20.41),
        "path noise (Gaussian)": (0.95, 0.79, 0.00, 2.82, 14.17),
        "path noise (Laplacian)": (0.99, 0.71, 0.00, 2.82, 15.51),
        "path perturbation": (0.03, 0.97, 0.99, 2.82, 14.44),
    },
    "cifar100": {
        "retrain": (0.00, 0.82, 1.00, 6.89, 607.89),
        "random labels": (0.00, 0.82, 1.00, 6.89, 122.55),
        "amnesiac": (0.03, 0.70, 0.29, 1.75, 18.45),
        "boundary expanding": (0.77, 0.81, 0.00, 4.07, 83.36),
        "boundary shrink": (0.14, 0.45, 0.07, 7.02, 21.20),
        "path noise (Gaussian)": (0.21, 0.56, 0.00, 2.83, 0.28),
        "path noise (Laplacian)": (0.00, 0.29, 0.00, 2.83, 0.37),
        "path perturbation": (0.01, 0.82, 1.00, 2.77, 0.53),
    },
    "imagenet": {
        "retrain": (0.00, 0.83, 1.00, 6.51, 2865.87),
        "random labels": (0.17, 0.14, 0.74, 2.47, 582.32),
        "amnesiac": (0.53, 0.80, 0.44, 7.61, 20.09),
        "boundary expanding": (0.03, 0.64, 1.00, 7.68, 697.89),
        "boundary shrink": (0.35, 0.67, 0.76, 9.13, 4.03),
        "path noise (Gaussian)": (0.91, 0.00, 1.00, 0.93, 1.16),
        "path noise (Laplacian)": (0.14, 0.00, 1.00, 0.93, 1.37),
        "path perturbation": (0.00, 0.83, 1.00, 0.93, 1.35),
    },
}
"""Tables III (MNIST), IV (CIFAR-10), V (CIFAR-100) and VI (mini-ImageNet)."""


def _parsed(cells: str) -> list[tuple[float, float]]:
    """Read "A_g/A_t …", in percent."""
    pairs = (cell.split("/") for cell in cells.split())
    return [(float(rest) / 100, float(own) / 100) for rest, own in pairs]


_SWEEPS = {
    "mnist": {
        50: {
            "epsilon": "98/99 98/99 97/64 96/13 96/0.5 97/0.1",
            "gamma+epsilon": "98/99 98/99 98/59 96/13 96/0.1 97/0.1",
            "alpha1beta0": "98/99 98/99 97/56 96/13 96/0.3 97/0.1",
            "alpha2beta1": "98/99 98/99 97/61 96/13 96/0.7 97/0.1",
            "patternnet": "98/99 98/99 98/95 97/59 97/38 95/19",
            "patternnet+-": "98/99 98/99 98/93 97/62 96/52 96/28",
            "patternattribution": "98/99 98/99 97/99 97/97 97/93 97/83",
            "patternattribution+-": "98/99 98/99 97/55 96/21 96/2 95/0",
        },
        100: {
            "epsilon": "98/99 98/99 98/99 97/89 97/34 96/9 97/7",
            "gamma+epsilon": "98/99 98/99 98/99 97/89 96/38 96/9 97/7",
            "alpha1beta0": "98/99 98/99 98/99 97/89 97/36 96/9 96/8",
            "alpha2beta1": "98/99 98/99 98/99 97/89 96/40 96/9 97/7",
            "patternnet": "98/99 98/99 98/95 96/59 96/38 95/19 95/12",
            "patternnet+-": "98/99 98/99 98/93 97/62 96/52 96/28 95/28",
            "patternattribution": "98/99 98/99 98/99 97/97 97/93 97/83 97/75",
            "patternattribution+-": "98/99 98/99 97/55 96/21 96/2 95/0 96/0",
        },
    },
    "cifar10": {
        150: {
            "epsilon": "98/99 98/67 98/34 98/11 97/3 97/6",
            "gamma+epsilon": "98/99 98/67 98/34 98/11 97/1 93/0",
            "alpha1beta0": "98/99 98/67 98/34 98/11 97/2 93/1",
            "alpha2beta1": "98/99 98/67 98/33 98/11 97/2 95/1",
        },
        200: {
            "epsilon": "98/99 98/67 98/33 98/11 97/1 95/0",
            "gamma+epsilon": "98/99 98/67 98/33 97/11 97/1 95/0",
            "alpha1beta0": "98/99 98/67 98/33 98/11 97/2 96/0",
            "alpha2beta1": "98/99 98/67 98/33 98/11 97/2 95/0",
        },
    },
    "cifar100": {
        150: {
            "epsilon": "82/96 81/7 81/1 81/0",
            "gamma+epsilon": "82/96 81/7 81/1 81/0",
            "alpha1beta0": "82/96 81/5 81/1 81/0",
            "alpha2beta1": "82/96 81/7 81/1 81/0",
        },
        200: {
            "epsilon": "82/96 81/8 81/1 81/0",
            "gamma+epsilon": "82/96 81/10 81/1 81/0",
            "alpha1beta0": "82/96 81/9 81/1 81/0",
            "alpha2beta1": "82/96 81/9 81/1 81/0",
        },
    },
    "imagenet": {
        100: {
            "epsilon": "83/88 83/88 83/61 83/32 83/8 83/8",
            "gamma+epsilon": "83/88 83/88 83/62 83/32 83/8 83/8",
            "alpha1beta0": "83/88 83/88 83/62 83/32 83/8 83/8",
            "alpha2beta1": "83/88 83/88 83/62 83/32 83/8 83/8",
        },
        150: {
            "epsilon": "83/88 83/85 83/56 83/18 83/0 83/0",
            "gamma+epsilon": "83/88 83/85 83/56 83/18 83/0 83/0",
            "alpha1beta0": "83/88 83/85 83/56 83/18 83/0 83/0",
            "alpha2beta1": "83/88 83/85 83/56 83/18 83/0 83/0",
        },
        200: {
            "epsilon": "83/88 83/88 83/56 83/18 83/0 83/0",
            "gamma+epsilon": "83/88 83/88 83/56 83/18 83/0 83/0",
            "alpha1beta0": "83/88 83/88 83/56 83/18 83/0 83/0",
            "alpha2beta1": "83/88 83/88 83/56 83/18 83/0 83/0",
        },
    },
}
SWEEPS = {
    data: {k: {rule: _parsed(cells) for rule, cells in rules.items()} for k, rules in by_k.items()}
    for data, by_k in _SWEEPS.items()
}
"""Tables VII to X: k → rule → (A_g, A_t) at no neuron off and at each share."""

# Figures of Hakemi et al., *Post-hoc spurious correlation neutralization*, Table 1:
# worst-group accuracy and gap to the average, in percent, from their own and other papers.
WORST_GROUPS = {
    "waterbirds": {
        "unedited (ERM)": (75.3, 24.4),
        "group DRO": (91.4, 2.1),
        "JTT": (86.7, 6.6),
        "DFR": (92.9, 1.3),
        "FCR: SCA (least gap)": (93.2, 1.9),
    },
    "celeba": {
        "unedited (ERM)": (48.8, 47.1),
        "group DRO": (88.9, 4.0),
        "JTT": (88.0, 6.9),
        "DFR": (88.3, 3.0),
        "FCR: SCA (least gap)": (84.9, 5.4),
    },
    "metashift": {
        "unedited (ERM)": (62.1, 10.8),
        "group DRO": (66.0, 7.6),
        "JTT": (64.6, 9.8),
        "DFR": (72.8, 4.7),
        "FCR: SCA (least gap)": (78.3, 0.1),
    },
}
