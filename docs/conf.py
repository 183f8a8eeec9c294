import json
import os
import re
import sys
from html import escape
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.stats import t

from xai_edit import __version__
from xai_edit.reproduce.catalogue import CATALOGUE
from xai_edit.reproduce.tables import markdown

sys.path.insert(0, str(Path(__file__).parent))
from which_method import WHICH_METHOD, compared

project = "xai_edit"
author = "the xai_edit authors"
copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = f"xai_edit {release}"
html_use_index = False  # pages of the reference and the search list every name
exclude_patterns = ["_build", "_tables"]
default_role = "code"
templates_path = ["_templates"]
myst_enable_extensions = ["dollarmath", "colon_fence", "html_image"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_ivar = True

HERE = Path(__file__).parent

# Pages with code cells are run at build; what they write stays out of the repository.
nb_execution_mode = "auto"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds a cell
nb_merge_streams = True
nb_output_stderr = "remove"
os.environ["PYTHONPATH"] = os.pathsep.join(  # of the kernels: pages import network.py
    filter(None, (str(HERE / "how-to"), os.environ.get("PYTHONPATH")))
)
os.environ.pop("MPLBACKEND", None)  # the kernel's own shows figures


def write_tables(_app):
    """Write the tables that pages include, from the committed results."""
    (HERE / "_tables").mkdir(exist_ok=True)
    for path in sorted((HERE / "results").glob("*-*.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary.get("run") not in CATALOGUE:
            continue
        tables = CATALOGUE[summary["run"]].tables(summary)
        if path.stem.startswith("npp-"):
            write(f"{path.stem}-methods", markdown(tables.pop("methods")))
        name = f"{path.stem}-shares" if path.stem.startswith("npp-") else path.stem
        write(name, "\n\n".join(titled(n, t) for n, t in tables.items()))
        if path.stem in FIGURES:
            axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
            FIGURES[path.stem](summary, axes)
            axes.figure.savefig(HERE / "_tables" / f"{path.stem}.svg")
    for name, settings in WHICH_METHOD.items():
        parts = [(title, read(result)) for result, title in settings]
        made = (f"{titled(t, compared(r))}\n\nMade by `{r['command']}`." for t, r in parts)
        write(name, "\n\n".join(made))
    corrected, one_shot = (
        [read(path.stem) for path in sorted((HERE / "results").glob(f"cnp-{what}*.json"))]
        for what in ("corrected", "penalized")
    )
    write("cnp-pairs", titled("Worst group, by pair", pairs_table(corrected)))
    write("cnp-one-shot", markdown(one_shot_table([*one_shot, *corrected])))
    write("rules-by-network", titled("By network and rule", rules_table(read("rules-by-network"))))
    write("watermark", markdown(watermark_table(read("watermark"))))
    write("discover-watermark", markdown(discovered_table(read("discover-watermark"))))
    for name in ("scoring", "selection", "smaller"):
        write(name, markdown(speed_table(read(name))))
    write("speed", markdown(speed_summary()))
    write("speed-networks", markdown(networks_table(read("networks"))))
    write("throughput", markdown(throughput_table(read("throughput-cpu"))))
    write("speed-drsa", markdown(drsa_table(read("drsa"))))
    write("scaling", titled("How each step grows", scaling_table(read("scaling"))))
    scaling_figure(read("scaling")).savefig(HERE / "_tables" / "scaling.svg")


def titled(title, table):
    """Return a table below its title; one of more than six rows is folded."""
    if len(table) <= 7:
        return f"**{title}**\n\n{markdown(table)}"
    return f"<details>\n<summary>{escape(title)}</summary>\n\n{markdown(table)}\n\n</details>"


def read(name):
    """Return a committed result."""
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def discovered_table(results):
    """Return what was found on photographs, by the share with the watermark, a row a draw."""
    rows = [["with the watermark", "draw", "findings", "of the 12 strongest", "AUROC"]]
    rows[0] += ["p(carton) with it: before, ablated", "without it: same answer"]
    rows[0] += ["with it as without: before, ablated"]
    for one in results["draws"]:
        cells = [f"{one['share']:.0%}", str(one["draw"]), str(one["findings"])]
        if one["findings"]:
            _, before, after = one["p_carton"]
            cells += [str(one["of_12_strongest"]), f"{one['auroc']:.3f}"]
            cells += [f"{before:.4f}, {after:.4f}", f"{one['unchanged_without']:.0%}"]
            cells += [f"{one['as_without_before']:.0%}, {one['as_without_after']:.0%}"]
        rows.append(cells + ["–"] * (len(rows[0]) - len(cells)))
    return rows


def one_shot_table(results):
    """Return worst groups at a fifth pruned by network, and how much more "penalized" has."""
    of_labels = ": contrastive PCA"
    methods = ["LRP", "LRP, clean references", "Taylor", "LRP, R_diff", "CNP", "CNP, penalized"]
    rows, values = [["worst group", *methods]], []
    for each in results:
        part = next(iter(each["parts"].values()))
        found = {row["method"]: row["worst"] for row in part["rows"] if row["share"] == 0.2}
        columns = [found.get(m) or found[m + of_labels] for m in methods]
        name = "/".join(CIFAR10[at] for at in each["classes"])
        name += ", discovered" if "CNP" in found else ", labelled"
        for worst in zip(*columns, strict=True):
            rows.append([name, *(f"{one:.3f}" for one in worst)])
            values.append(worst)
    rows.append(["mean", *(f"{mean(one):.3f}" for one in zip(*values, strict=True))])
    more = [[one[-1] - other for other in one] for one in values]
    cells = []
    for column in list(zip(*more, strict=True))[:-1]:
        half = t.ppf(0.975, len(column) - 1) * stdev(column) / len(column) ** 0.5
        cells.append(f"{mean(column):.3f} [{mean(column) - half:.2f}, {mean(column) + half:.2f}]")
    return [*rows, ['"penalized" is higher by', *cells, ""]]


def rules_table(results):
    """Return the figures of LRP rules, a row a network and rule."""
    figures = ["agreement", "deletion", "localisation", "last layer new", "all weights new", "cost"]
    rows = [
        [name, rule, *(f"{row[figure]:.2f}" if figure in row else "" for figure in figures)]
        for name, told in results["networks"].items()
        for rule, row in told["rules"].items()
    ]
    return [["network", "rule", *figures], *rows]


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def pairs_table(results):
    """Return worst groups after pruning a fifth, and three fifths with a new head, by pair."""
    parts = [next(iter(each["parts"].values())) for each in results]
    head = [
        f"{CIFAR10[each['classes'][0]]}/{CIFAR10[each['classes'][1]]}, {each['pattern']} "
        f"({part['networks']})"
        for each, part in zip(results, parts, strict=True)
    ]
    worst = [
        {(row["method"], row["share"]): row["worst"] for row in part["rows"]} for part in parts
    ]
    keys = [("unpruned", None), ("ablation alone", None), ("unpruned, corrected", None)]
    every = dict.fromkeys(key for each in worst for key in each)
    keys += [key for key in every if key[1] == 0.2]
    keys += [key for key in every if key[1] == 0.6 and key[0].endswith("corrected")]
    rows = []
    for method, share in keys:
        found = [[v for v in each.get((method, share), []) if v is not None] for each in worst]
        named = method if share is None else f"{method}, {share:.0%} pruned"
        rows.append([named, *(f"{mean(one):.3f}" if one else "refused" for one in found)])
    return [["worst group", *head], *rows]


def watermark_table(results):
    """Return p(carton) and accuracy, without and with the watermark, before and after."""
    rows = [["", "before", "after"]]
    for name in ("without", "with"):
        for key, title in (("p_carton", "p(carton)"), ("top_1", "top-1 accuracy")):
            cells = [f"{results[when][name][key]:.4f}" for when in ("before", "after")]
            rows.append([f"photographs {name} the watermark: {title}", *cells])
    for name, told in results["tiles"].items():
        cells = [f"{told[when]['p_carton']:.4f}" for when in ("before", "after")]
        rows.append([f"small images, {name} ({told['images']}): p(carton)", *cells])
    return rows


def several_classes(summary, axes):
    """Draw Fig. 7: accuracy by the number of classes removed."""
    for select, style in (("sca", "-"), ("exact", "--"), ("logit mask", ":")):
        rows = [row for row in summary["rows"] if row["select"] == select]
        for key in ("removed", "retained"):
            means = [row[key][0] for row in rows]
            axes.plot([row["count"] for row in rows], means, style, label=f"{key}, {select}")
    axes.set(xlabel="classes removed", ylabel="accuracy")
    axes.legend()


def digits_by_rate(summary, axes):
    """Draw Fig. 8: accuracy on removed and retained digits by rate, means over digits and seeds."""
    for select, style in (("sca", "-"), ("gradient-activation", "--")):
        for key in ("removed", "retained"):
            values = summary["curves"][select][key]
            axes.plot(summary["rates"], values, style, label=f"{key}, {select}")
    axes.set_xscale("symlog", linthresh=1e-4)
    axes.set(xlabel="neutralisation rate r", ylabel="accuracy")
    axes.legend()


def groups_by_rate(summary, axes):
    """Draw Fig. 9 for the first seed: worst group and average by rate."""
    for strength, part in summary["parts"].items():
        for key, style in (("worst", "-"), ("average", "--")):
            sweep = part["sweep"]
            axes.plot(sweep["rates"], sweep[key], style, label=f"{key}, ρ = {strength}")
    axes.set_xscale("symlog", linthresh=1e-5)
    axes.set(xlabel="neutralisation rate r", ylabel="accuracy")
    axes.legend()


def pruned(summary, axes):
    """Draw the worst group by share pruned, means over networks, for the first strength."""
    rows = next(iter(summary["parts"].values()))["rows"]
    for method, style in (
        ("CNP: contrastive PCA", "C0-o"),
        ("CNP, ablation kept: contrastive PCA", "C0--o"),
        ("CNP: DRSA", "C1-o"),
        ("CNP: CAV", "C2-o"),
        ("LRP", "k-s"),
        ("LRP, clean references", "k--s"),
        ("LRP, R_diff", "k:s"),
        ("Taylor", "C4-^"),
        ("weight magnitude", "C5-v"),
        ("random", "0.6"),
    ):
        mine = [row for row in rows if row["method"] == method]
        if mine:  # some runs have some methods
            shares = [100 * row["share"] for row in mine]
            axes.plot(shares, [mean(row["worst"]) for row in mine], style, label=method)
    (alone,) = [mean(row["worst"]) for row in rows if row["method"] == ALONE]
    axes.axhline(alone, color="C0", linestyle=":", label=ALONE)
    axes.set_xlabel("filters pruned, %")
    axes.set_ylabel("accuracy of the worst group")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


ALONE = "ablation alone: contrastive PCA"
FIGURES = {
    "fcr-multi": several_classes,
    "fcr-multi-100": several_classes,
    "fcr-parity": digits_by_rate,
    "fcr-colored": groups_by_rate,
    **dict.fromkeys(("cnp-cifar10", "cnp-cifar10-ships", "cnp-cifar10-resnet20"), pruned),
    "cnp-mnist": pruned,
}


def speed_table(results):
    """Return the ratios, a row each, a column a network."""
    ratios = results["ratios"]
    keys = dict.fromkeys(key for told in ratios.values() for key in told)
    rows = [
        [key, *(f"{told[key]:.3g}" if key in told else "" for told in ratios.values())]
        for key in keys
    ]
    return [["ratio", *ratios], *rows]


PASS = "a forward and backward pass"
RANGES = (  # step, beside, result, its keys, and whether these are theirs over ours
    ("scoring all layers, epsilon rule", PASS, "scoring", r"epsilon / forward\+backward", False),
    ("… other rules", PASS, "scoring", r"(?!epsilon /|zennit|peak).* / forward\+backward", False),
    ("… each rule", "Zennit's attributor", "scoring", ".* / zennit", False),
    ("… peak memory", PASS, "scoring", r"peak .* / forward\+backward", False),
    ("… peak memory of 20 batches", "of one", "scoring", "peak .* / of 1", False),
    ("scoring the last hidden layer", "a forward pass", "scoring", "last .* / forward", False),
    ("SCA scores of a row", "a backward pass a sample", "selection", "a backward .*", True),
    ("SCA scores of a row", "`vmap` of the gradient", "selection", "vmap .*", True),
    ("exact selection", "evaluating each dose", "selection", "evaluations .*", True),
    ("planning NPP, 36 images", "an epoch, 60,000 images", "unlearning-cost", "one epoch .*", True),
    ("sweep over 24 shares", "24 evaluations", "unlearning-cost", "evaluating .*", True),
    ("planning pruning, 4 or 20 samples", PASS, "smaller", "planning over a .*", False),
    ("… 5 samples a class", PASS, "smaller", "planning over the .*", False),
    ("… concept-aware", PASS, "smaller", "concept-aware .*", False),
    ("making the network smaller", PASS, "smaller", "removal .*", False),
    ("latency, half of each layer off", "the whole network", "smaller", "seconds, local", False),
    ("latency, half of all filters off", "the whole network", "smaller", "seconds, global", False),
)


def speed_summary():
    """Return what steps take over a peer or a limit, from the least to the most measured."""
    rows = []
    for step, beside, name, keys, theirs in RANGES:
        ratios = read(name)["ratios"]
        tables = [*ratios.values()] if name != "unlearning-cost" else [ratios]
        found = [v for told in tables for key, v in told.items() if re.fullmatch(keys, key)]
        ends = sorted(1 / value if theirs else value for value in found)
        cells = dict.fromkeys(f"{ends[at]:.2g}" for at in (0, -1))  # once where they are equal
        rows.append([step, beside, " – ".join(cells)])
    return [["step", "beside", "ours / theirs"], *rows]


def networks_table(results):
    """Return time and memory of scoring over those of a forward and backward pass."""
    rows = []
    for name, told in results["networks"].items():
        for rule in ("epsilon", "epsilon-plus"):
            steps = ("first batch", "later batches", "peak memory", "Zennit", "LXT")
            ratios = [told.get(f"{rule}: {step}", "") for step in steps]
            cells = [one if isinstance(one, str) else f"{one:.2f}" for one in ratios]
            far = told.get("LXT: largest difference") if rule == "epsilon" else None
            rows.append([name, rule, *cells, "" if far is None else f"{far:.0e}"])
    head = ["network", "rule", "first batch", "later batches", "peak memory", "Zennit", "LXT"]
    return [[*head, "difference from LXT"], *rows]


def throughput_table(results):
    """Return images a second by network, rule and what attributes."""
    told = results["networks"]
    methods = [*dict.fromkeys(method for each in told.values() for method in each)]
    rows = [
        [name, *(_rate(each[method]) if method in each else "" for method in methods)]
        for name, each in told.items()
    ]
    return [["images a second", *methods], *rows]


def _rate(one):
    return one["refused"] if "refused" in one else f"{one['images a second']:.2f}"


def drsa_table(results):
    """Return CPU time and objective of DRSA and of the published procedure."""
    rows = []
    for case in results["cases"]:
        ours, published = case["ours"], case["published"]
        seconds = ours["CPU s"], published["CPU s of all"]
        full = published["all steps run"]
        reached = [value for key, value in published.items() if key.startswith("J")][-1]
        rows.append(
            [
                f"{case['case']}, {case['channels']} channels",
                *(f"{value:,.0f}" for value in seconds),
                "run" if full else f"from {published['steps timed']} steps",
                f"{seconds[0] / seconds[1]:.2g}",
                f"{ours['J']:.4f}",
                f"{reached:.4f}" + ("" if full else " (helped)"),
            ]
        )
    head = ["features", "ours, s", "published, s", "which was", "ours / theirs", "J, ours"]
    return [[*head, "J, published"], *rows]


def scaling_table(results):
    """Return sizes, time and memory at the largest, and the exponents."""
    rows = []
    for case in results["cases"]:
        exponents = [
            cell
            for told in (case["time"], case["memory"])
            for cell in (f"{told['exponent']:.2f} ± {told['error']:.2f}", f"{told['expected']:g}")
        ]
        sizes = f"{case['axis']}, {case['sizes'][0]:,} to {case['sizes'][-1]:,}"
        largest = f"{case['seconds'][-1]:.2g} s", f"{case['megabytes'][-1]:,.0f} MB"
        rows.append([f"{case['what']}: {case['fixed']}", sizes, *largest, *exponents])
    head = ["step", "grows", "time", "memory", "exponent of time", "at most"]
    return [[*head, "exponent of memory", "at most"], *rows]


def scaling_figure(results):
    """Draw time and memory against size, each over its first value, a panel a case."""
    figure = Figure(figsize=(10, 11), layout="constrained")
    panels = figure.subplots(-(-len(results["cases"]) // 3), 3).flatten()
    for axes, case in zip(panels, results["cases"], strict=False):
        sizes = case["sizes"]
        for key, name, style in (("seconds", "time", "C0-o"), ("megabytes", "memory", "C1-s")):
            values = [value / case[key][0] for value in case[key]]
            label = f"{name}, {case[name]['exponent']:.2f}"
            axes.plot(sizes, values, style, markersize=4, label=label)
        axes.set(xscale="log", yscale="log", xlabel=case["axis"])
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize="small")
        axes.set_xticks([], minor=True)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.5), max(high, 15))
        axes.yaxis.set(major_formatter="{x:g}", minor_formatter=NullFormatter())
        axes.set_title(case["what"].replace("`", ""), fontsize="medium")
        axes.legend(fontsize="small")
    for axes in panels[len(results["cases"]) :]:
        axes.remove()
    figure.supylabel("times the value at the smallest size")
    return figure


def write(name, text):
    """Write one file, unless it is as it was, so that nothing is built anew for it."""
    path = HERE / "_tables" / f"{name}.md"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def say_what_examples_go_on_from(_app, _what, _name, _object, _options, lines):
    """Put a link to the network and data of the reference above the examples of a docstring."""
    heading = ".. rubric:: Examples"
    if heading in lines:
        link = "They go on from :ref:`this network and data <reference-prelude>`."
        at = lines.index(heading) + 1
        lines[at:at] = ["", link]


def setup(app):
    """Write the tables before pages are read."""
    app.connect("builder-inited", write_tables)
    app.connect("autodoc-process-docstring", say_what_examples_go_on_from, priority=900)
