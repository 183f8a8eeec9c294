"""The tables of which-method.md: operators and comparison methods in each committed setting."""

from statistics import mean

CLASS, FEATURE = "the class", "the class and the feature"
MARKED = "the class; the feature is discovered"
ONE, OTHERS, ALL = "images of the class only", "the class, of images of all", "training images"
GROUPS = {  # method in a result -> operator, and the labels that planning needs
    "unedited (ERM)": ("before", "–"),
    "unedited": ("before", "–"),
    "unpruned": ("before", "–"),
    "FCR: SCA": ("`FictitiousClass()`", FEATURE),
    "FCR: exact": ('`FictitiousClass("exact")`', FEATURE),
    "LEACE": ("`comparisons.LEACE`", FEATURE),
    "DFR": ("`LastLayerRetraining`", FEATURE),
    "DFR, true values": ("`LastLayerRetraining`", FEATURE),
    "LEACE, discovered values": ("`comparisons.LEACE`", MARKED),
    "FCR: exact, discovered values": ('`FictitiousClass("exact")`', MARKED),
    "DFR, discovered values": ("`LastLayerRetraining`", MARKED),
    "ablation: relevance": ("`ablated`", MARKED),
    "last-layer retraining: relevance": ("`LastLayerRetraining`", MARKED),
    "counterfactual retraining: relevance": ("`CounterfactualRetraining`", MARKED),
    "last-layer retraining on each image without and with the mark": (
        "`LastLayerRetraining`, on each image without and with the mark",
        "every image both ways",
    ),
    "LRP": ("`RelevancePruning`", CLASS),
    "LRP, clean references": ("`RelevancePruning`, references without the mark", FEATURE),
    "LRP, R_diff": ("`RelevancePruning`, `against=` images with the mark", FEATURE),
    "weight magnitude": ("`RelevancePruning`, `WeightMagnitude()`", "none"),
    "Taylor": ("`RelevancePruning`, `Taylor()`", CLASS),
    "random": ("`RelevancePruning`, `Random()`", "none"),
    "CNP: contrastive PCA": ("`ConceptAwarePruning`", FEATURE),
    "CNP, ablation kept: contrastive PCA": ("`ConceptAwarePruning`, ablation kept", FEATURE),
    "ablation alone: contrastive PCA": ("`ablated`, nothing pruned", FEATURE),
}
CLASSES = {
    **{"before": "–", "path perturbation": ONE, "path perturbation (auto)": ONE},
    **{"path perturbation (class row)": ONE, "path noise (Gaussian)": ONE},
    **{"path perturbation (auto class row)": ONE, "path noise (Laplacian)": ONE},
    **{"one weight (SCA)": OTHERS, "logit mask": "none"},
}  # the other methods train on, or weigh, training images
SHARE = 0.3  # pruned
WHICH_METHOD = {
    "which-groups": (
        ("fcr-colored", "coloured digits, the colour right for 97 %"),
        ("discover-colored", "the same, the colour discovered"),
        ("discover-cifar10", "trucks of CIFAR-10 with a mark, discovered"),
    ),
    "which-pruned": (
        ("cnp-cifar10", "trucks of CIFAR-10 with a mark, 30 % of the filters pruned"),
        ("cnp-cifar10-ships", "ships with a mark, 30 % pruned"),
        ("cnp-cifar10-resnet20", "trucks, ResNet-20, 30 % pruned"),
    ),
    "which-classes": (
        ("npp-mnist", "a digit of MNIST, all-cnn"),
        ("npp-cifar10-resnet20", "a class of CIFAR-10, ResNet-20"),
        ("npp-cifar10-conv2net", "a class of CIFAR-10, a small network"),
    ),
}


def compared(results):
    """Return the table of one setting, a row a method."""
    if results["run"].startswith("npp-"):
        rows = [
            ["method", "labels needed", "the class", "the others", "weights changed", "seconds"]
        ]
        for row in results["rows"]:
            cells = [row["method"], CLASSES.get(row["method"], ALL)]
            figures = (("forgotten_test", ".3f"), ("rest_test", ".3f"))
            figures += (("weights_changed", ",.0f"), ("seconds", ",.2f"))
            rows.append(cells + [format(row[k][0], f) if k in row else "–" for k, f in figures])
    else:
        part = [*results["parts"].values()][-1]  # the strongest shortcut
        coloured = results["run"] == "fcr-colored"  # of the others each network is listed
        found = part.get("rows") or [{"method": key} | one for key, one in part["edits"].items()]
        rows = [["operator", "labels needed", "worst group", "balanced", "weights changed"]]
        for row in found:
            if row["method"] in GROUPS and row.get("share") in (None, SHARE):
                worst = row["worst"] if coloured else [mean(row["worst"])]
                balanced = f"{row['balanced'][0]:.3f}" if "balanced" in row else "–"
                weights = "–".join(map(str, row.get("weights_changed", ()))) or "–"
                rows.append([*GROUPS[row["method"]], f"{worst[0]:.3f}", balanced, weights])
    return rows
