"""The figures on the methods page are those of the committed result file."""

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
SHARES = ("20%", "30%", "40%")
ROWS = {
    "unedited": ["unedited"],
    '`FictitiousClass("sca")`, best rate': ["neutralize: FCR: SCA, best rate"],
    '`FictitiousClass("exact")`': ["neutralize: FCR: exact selection"],
    "last-layer retraining (DFR)": ["neutralize: last-layer retraining (DFR)"],
    "counterfactual retraining, from training images": ["neutralize: counterfactual retraining"],
    "last-layer retraining, from training images": [
        "neutralize: last-layer retraining, training images"
    ],
    "ablation alone, nothing pruned": ["prune: ablation alone"],
    "concept-aware, ablation kept, 20 % / 30 % / 40 % pruned": "concept-aware, ablation kept",
    "concept-aware, ablated for scoring only": "concept-aware",
    "plain LRP pruning": "plain LRP",
    "plain LRP, references without watermark": "plain LRP, references without watermark",
    "weight magnitude": "weight magnitude",
    "random": "random",
}


def test_the_table_shows_the_committed_means():
    content = json.loads((DOCS / "results" / "demo-seeds.json").read_text(encoding="utf-8"))
    figures = content["figures"]
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert content["command"] in page
    for label, names in ROWS.items():
        if isinstance(names, str):
            names = [f"prune: {names}, {share}" for share in SHARES]
        cells = [
            " / ".join(f"{figures[name][figure][0]:.3f}" for name in names)
            for figure in ("worst", "worst_of_four", "balanced")
        ]
        assert f"| {label} | {' | '.join(cells)} |" in page
