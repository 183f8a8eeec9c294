# %% [markdown]
# # The demo over several seeds
#
# A group of the demo has about 50 test images, so one seed says little. This runs `xai-edit demo`
# for several seeds and writes of each figure the mean, the standard deviation and their number,
# and of each seed what was found. Where no finding is the watermark, the edits of that seed take
# its true labels and counterfactual retraining is left out.
#
#     python examples/demo_over_seeds.py --seeds 10 --out docs/results/demo-seeds.json

# %%
import argparse
import json
import tempfile
from pathlib import Path

from xai_edit.command.run_demo import run
from xai_edit.reproduce.summaries import spread, write_json

parser = argparse.ArgumentParser(description="The figures of xai-edit demo over several seeds.")
parser.add_argument("--seeds", type=int, default=10, help="seeds 0 to N-1")
parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
parser.add_argument("--quick", action="store_true", help="one seed, one share of pruning")
arguments = parser.parse_args()
seeds = range(1 if arguments.quick else arguments.seeds)

# %%
MARKED = ("finding", "agreement")
FIGURES = ("class_accuracy", "rest_accuracy", "worst", "worst_of_four", "balanced", "average")


def figures(results: dict) -> dict[str, dict[str, float]]:
    """Flatten the results of one run: method → its figures."""
    before, prune = results["before"], results["prune"]
    rows = {"unedited": before, "prune: ablation alone": prune["ablation_alone"]}
    for part in ("forget", "neutralize", "prune"):
        for row in results[part]["rows"]:
            share = f", {row['share']:.0%}" if "share" in row else ""
            rows[f"{part}: {row['method']}{share}"] = row
    return {
        name: {figure: row[figure] for figure in FIGURES if figure in row}
        for name, row in rows.items()
    }


runs, found = [], []
for seed in seeds:
    with tempfile.TemporaryDirectory() as folder:
        run(folder, seed=seed, quick=arguments.quick, quiet=True)
        results = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
    runs.append(figures(results))
    review = results["review"]  # its answer is empty where a finding stands out
    found.append({"stands_out": not review["answer"], **{key: review[key] for key in MARKED}})
    print(f"seed {seed} done")

# %%
table = {
    name: {figure: spread([one[name][figure] for one in runs if name in one]) for figure in row}
    for name, row in {name: row for one in runs for name, row in one.items()}.items()
}
for name, row in table.items():
    shown = []
    for figure, (mean, deviation, number) in row.items():
        shown.append(f"{figure} {mean:.3f}" + (f" ± {deviation:.3f}" if number > 1 else ""))
    print(f"{name:<56}", "   ".join(shown))

if arguments.out:
    command = f"python examples/demo_over_seeds.py --seeds {len(seeds)}"
    content = {
        "command": command + (" --quick" if arguments.quick else ""),
        "versions": results["versions"],
        "data": results["data"],
        "seeds": list(seeds),
        "found": found,
        "figures": table,
    }
    write_json(arguments.out, content)
