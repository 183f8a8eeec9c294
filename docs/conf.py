import json
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from xai_edit import __version__
from xai_edit.reproduce.catalogue import CATALOGUE
from xai_edit.reproduce.tables import markdown, methods_table, sweep_tables

project = "xai_edit"
author = "the xai_edit authors"
copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = f"xai_edit {release}"
exclude_patterns = ["_build", "_tables"]
default_role = "code"
myst_enable_extensions = ["dollarmath", "colon_fence"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_ivar = True

HERE = Path(__file__).parent


def write_tables(_app):
    """Write the tables that pages include, from the committed results."""
    (HERE / "_tables").mkdir(exist_ok=True)
    for path in sorted((HERE / "results").glob("npp-*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        write(f"{path.stem}-methods", markdown(methods_table(results)))
        tables = sweep_tables(results).items()
        write(f"{path.stem}-shares", "\n\n".join(f"**{n}**\n\n{markdown(t)}" for n, t in tables))
    for path in sorted((HERE / "results").glob("fcr-*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        tables = CATALOGUE[results["run"]].tables(results).items()
        write(path.stem, "\n\n".join(f"**{n}**\n\n{markdown(t)}" for n, t in tables))
        if results["run"] in FIGURES and not path.stem.endswith("-small"):
            axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
            FIGURES[results["run"]](results, axes)
            axes.set_ylabel("accuracy")
            axes.legend()
            axes.figure.savefig(HERE / "_tables" / f"{path.stem}.svg")
    for path in sorted((HERE / "results").glob("cnp-*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        tables = CATALOGUE[results["run"]].tables(results).items()
        write(path.stem, "\n\n".join(f"**{n}**\n\n{markdown(t)}" for n, t in tables))
        if path.stem in PRUNED:
            axes = Figure(figsize=(7, 4), layout="constrained").subplots()
            pruned(results, axes)
            axes.figure.savefig(HERE / "_tables" / f"{path.stem}.svg")
    write("watermark", markdown(watermark_table(read("watermark"))))
    for name in ("scoring", "selection", "smaller"):
        write(name, markdown(speed_table(read(name))))


def read(name):
    """Return a committed result."""
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


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


def several_classes(results, axes):
    """Draw Fig. 7: accuracy by the number of classes removed."""
    rows = [row for run in results["seeds"].values() for row in run["rows"]]
    counts = sorted({row["count"] for row in rows})
    for select, style in (("sca", "-"), ("exact", "--")):
        for key in ("removed", "retained"):
            of = [
                [r[key] for r in rows if (r["count"], r["select"]) == (n, select)] for n in counts
            ]
            axes.plot(counts, [mean(values) for values in of], style, label=f"{key}, {select}")
    axes.set_xlabel("classes removed")


def digits_by_rate(results, axes):
    """Draw Fig. 8: accuracy on removed and retained digits by rate, means over digits and seeds."""
    runs = [*results["seeds"].values()]
    for select, style in (("sca", "-"), ("gradient-activation", "--")):
        curves = [c for run in runs for c in run["curves"] if c["select"] == select]
        for key in ("removed", "retained"):
            values = [mean(at) for at in zip(*(curve[key] for curve in curves), strict=True)]
            axes.plot(runs[0]["rates"], values, style, label=f"{key}, {select}")
    axes.set_xscale("symlog", linthresh=1e-4)
    axes.set_xlabel("neutralisation rate r")


def groups_by_rate(results, axes):
    """Draw Fig. 9 for the first seed: worst group and average by rate."""
    for strength, run in next(iter(results["seeds"].values())).items():
        (sweep,) = run["sweeps"]
        for key, style in (("worst", "-"), ("average", "--")):
            axes.plot(sweep["rates"], sweep[key], style, label=f"{key}, ρ = {strength}")
    axes.set_xscale("symlog", linthresh=1e-5)
    axes.set_xlabel("neutralisation rate r")


PRUNED = ("cnp-cifar10", "cnp-mnist")


def pruned(results, axes):
    """Draw the worst group by share pruned, means over networks, for the first strength."""
    runs = [next(iter(run.values()))["rows"] for run in results["seeds"].values()]
    for method, style in (
        ("CNP: contrastive PCA", "C0-o"),
        ("CNP, ablation kept: contrastive PCA", "C0--o"),
        ("CNP: DRSA", "C1-o"),
        ("CNP: CAV", "C2-o"),
        ("LRP", "k-s"),
        ("LRP, clean references", "k--s"),
        ("Taylor", "C4-^"),
        ("weight magnitude", "C5-v"),
        ("random", "0.6"),
    ):
        shares = results["shares"]
        means = [
            mean(
                row["worst"]
                for rows in runs
                for row in rows
                if (row["method"], row.get("share")) == (method, share)
            )
            for share in shares
        ]
        axes.plot([100 * share for share in shares], means, style, label=method)
    alone = [r["worst"] for rows in runs for r in rows if r["method"] == ALONE]
    axes.axhline(mean(alone), color="C0", linestyle=":", label=ALONE)
    axes.set_xlabel("filters pruned, %")
    axes.set_ylabel("accuracy of the worst group")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


ALONE = "ablation alone: contrastive PCA"
FIGURES = {
    "fcr-multi": several_classes,
    "fcr-parity": digits_by_rate,
    "fcr-colored": groups_by_rate,
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


def write(name, text):
    """Write one file, unless it is as it was, so that nothing is built anew for it."""
    path = HERE / "_tables" / f"{name}.md"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def setup(app):
    """Write the tables before pages are read."""
    app.connect("builder-inited", write_tables)
