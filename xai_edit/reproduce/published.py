"""Figures that the papers print, for the tables that show them beside ours."""

from __future__ import annotations

_METHODS = """
mnist     retrain                0.00 0.97 1.00 0.74 71.37
mnist     random labels          0.00 0.97 1.00 0.70 15.64
mnist     amnesiac               0.38 0.98 0.78 0.44 38.72
mnist     boundary expanding     0.13 0.95 0.91 0.65 69.21
mnist     boundary shrink        0.05 0.58 1.00 0.71 18.55
mnist     path noise (Gaussian)  0.35 0.68 0.61 0.64 0.77
mnist     path noise (Laplacian) 0.21 0.53 0.78 0.64 0.83
mnist     path perturbation      0.00 0.97 1.00 0.64 0.68
cifar10   retrain                0.00 0.96 1.00 6.89 484.17
cifar10   random labels          0.00 0.90 0.99 6.89 107.99
cifar10   amnesiac               0.91 0.84 0.13 1.75 3.30
cifar10   boundary expanding     0.83 0.89 0.01 4.07 150.22
cifar10   boundary shrink        0.19 0.58 0.09 6.76 20.41
cifar10   path noise (Gaussian)  0.95 0.79 0.00 2.82 14.17
cifar10   path noise (Laplacian) 0.99 0.71 0.00 2.82 15.51
cifar10   path perturbation      0.03 0.97 0.99 2.82 14.44
cifar100  retrain                0.00 0.82 1.00 6.89 607.89
cifar100  random labels          0.00 0.82 1.00 6.89 122.55
cifar100  amnesiac               0.03 0.70 0.29 1.75 18.45
cifar100  boundary expanding     0.77 0.81 0.00 4.07 83.36
cifar100  boundary shrink        0.14 0.45 0.07 7.02 21.20
cifar100  path noise (Gaussian)  0.21 0.56 0.00 2.83 0.28
cifar100  path noise (Laplacian) 0.00 0.29 0.00 2.83 0.37
cifar100  path perturbation      0.01 0.82 1.00 2.77 0.53
imagenet  retrain                0.00 0.83 1.00 6.51 2865.87
imagenet  random labels          0.17 0.14 0.74 2.47 582.32
imagenet  amnesiac               0.53 0.80 0.44 7.61 20.09
imagenet  boundary expanding     0.03 0.64 1.00 7.68 697.89
imagenet  boundary shrink        0.35 0.67 0.76 9.13 4.03
imagenet  path noise (Gaussian)  0.91 0.00 1.00 0.93 1.16
imagenet  path noise (Laplacian) 0.14 0.00 1.00 0.93 1.37
imagenet  path perturbation      0.00 0.83 1.00 0.93 1.35
"""
_SWEEPS = """
mnist     50   epsilon               98/99 98/99 97/64 96/13 96/0.5 97/0.1
mnist     50   gamma+epsilon         98/99 98/99 98/59 96/13 96/0.1 97/0.1
mnist     50   alpha1beta0           98/99 98/99 97/56 96/13 96/0.3 97/0.1
mnist     50   alpha2beta1           98/99 98/99 97/61 96/13 96/0.7 97/0.1
mnist     50   patternnet            98/99 98/99 98/95 97/59 97/38 95/19
mnist     50   patternnet+-          98/99 98/99 98/93 97/62 96/52 96/28
mnist     50   patternattribution    98/99 98/99 97/99 97/97 97/93 97/83
mnist     50   patternattribution+-  98/99 98/99 97/55 96/21 96/2 95/0
mnist     100  epsilon               98/99 98/99 98/99 97/89 97/34 96/9 97/7
mnist     100  gamma+epsilon         98/99 98/99 98/99 97/89 96/38 96/9 97/7
mnist     100  alpha1beta0           98/99 98/99 98/99 97/89 97/36 96/9 96/8
mnist     100  alpha2beta1           98/99 98/99 98/99 97/89 96/40 96/9 97/7
mnist     100  patternnet            98/99 98/99 98/95 96/59 96/38 95/19 95/12
mnist     100  patternnet+-          98/99 98/99 98/93 97/62 96/52 96/28 95/28
mnist     100  patternattribution    98/99 98/99 98/99 97/97 97/93 97/83 97/75
mnist     100  patternattribution+-  98/99 98/99 97/55 96/21 96/2 95/0 96/0
cifar10   150  epsilon               98/99 98/67 98/34 98/11 97/3 97/6
cifar10   150  gamma+epsilon         98/99 98/67 98/34 98/11 97/1 93/0
cifar10   150  alpha1beta0           98/99 98/67 98/34 98/11 97/2 93/1
cifar10   150  alpha2beta1           98/99 98/67 98/33 98/11 97/2 95/1
cifar10   200  epsilon               98/99 98/67 98/33 98/11 97/1 95/0
cifar10   200  gamma+epsilon         98/99 98/67 98/33 97/11 97/1 95/0
cifar10   200  alpha1beta0           98/99 98/67 98/33 98/11 97/2 96/0
cifar10   200  alpha2beta1           98/99 98/67 98/33 98/11 97/2 95/0
cifar100  150  epsilon,gamma+epsilon,alpha2beta1 82/96 81/7 81/1 81/0
cifar100  150  alpha1beta0           82/96 81/5 81/1 81/0
cifar100  200  epsilon               82/96 81/8 81/1 81/0
cifar100  200  gamma+epsilon         82/96 81/10 81/1 81/0
cifar100  200  alpha1beta0,alpha2beta1 82/96 81/9 81/1 81/0
imagenet  100  epsilon               83/88 83/88 83/61 83/32 83/8 83/8
imagenet  100  gamma+epsilon,alpha1beta0,alpha2beta1 83/88 83/88 83/62 83/32 83/8 83/8
imagenet  150  epsilon,gamma+epsilon,alpha1beta0,alpha2beta1 83/88 83/85 83/56 83/18 83/0 83/0
imagenet  200  epsilon,gamma+epsilon,alpha1beta0,alpha2beta1 83/88 83/88 83/56 83/18 83/0 83/0
"""
_WORST_GROUPS = """
waterbirds  unedited (ERM)        75.3 24.4
waterbirds  group DRO             91.4 2.1
waterbirds  JTT                   86.7 6.6
waterbirds  DFR                   92.9 1.3
waterbirds  FCR: SCA (least gap)  93.2 1.9
celeba      unedited (ERM)        48.8 47.1
celeba      group DRO             88.9 4.0
celeba      JTT                   88.0 6.9
celeba      DFR                   88.3 3.0
celeba      FCR: SCA (least gap)  84.9 5.4
metashift   unedited (ERM)        62.1 10.8
metashift   group DRO             66.0 7.6
metashift   JTT                   64.6 9.8
metashift   DFR                   72.8 4.7
metashift   FCR: SCA (least gap)  78.3 0.1
"""


def _numbers(lines: str, count: int) -> dict[str, dict[str, tuple[float, ...]]]:
    """Read lines of a data set, a name of several words and some numbers."""
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for line in lines.strip().splitlines():
        (data, *name), numbers = line.split()[:-count], line.split()[-count:]
        found.setdefault(data, {})[" ".join(name)] = tuple(map(float, numbers))
    return found


def _pairs(lines: str) -> dict[str, dict[int, dict[str, list[tuple[float, float]]]]]:
    """Read lines of a data set, a k, rules and "A_g/A_t" in percent."""
    found: dict[str, dict[int, dict[str, list[tuple[float, float]]]]] = {}
    for line in lines.strip().splitlines():
        data, k, rules, *cells = line.split()
        pairs = (cell.split("/") for cell in cells)
        read = [(float(rest) / 100, float(own) / 100) for rest, own in pairs]
        by_rule = found.setdefault(data, {}).setdefault(int(k), {})
        by_rule |= dict.fromkeys(rules.split(","), read)
    return found


METHODS = _numbers(_METHODS, 5)
"""Chang et al., *Zero-shot class unlearning*, Tables III to VI: A_t, A_g, F_r, GB, seconds."""

SWEEPS = _pairs(_SWEEPS)
"""Their Tables VII to X: k → rule → (A_g, A_t) at no neuron off and at each share."""

WORST_GROUPS = _numbers(_WORST_GROUPS, 2)
"""Hakemi et al., *Post-hoc spurious correlation neutralization*, Table 1, in percent.

Worst-group accuracy and gap to the average, from their own and other papers.
"""
