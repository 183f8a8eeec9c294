"""The figures of a run as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDTH = 50  # of the first column


def demo_table(results: Mapping[str, Any], timing: Mapping[str, float]) -> str:
    """Return the tables of ``xai-edit demo``; arguments as in its JSON files."""
    before = results["before"]
    lines = [
        f"before any edit: average {before['average']:.3f}, worst group {before['worst']:.3f} "
        f"({before['worst_group']})",
        "",
        f"{'1. forget digit ' + str(results['forget']['class']):<{WIDTH}}"
        f"{'A_t':>8}{'A_g':>8}{'weights':>9}{'seconds':>9}",
    ]
    for row in results["forget"]["rows"]:
        seconds = f"{timing[row['edit']]:9.2f}" if row["edit"] else ""
        lines.append(
            f"  {row['method']:<{WIDTH - 2}}{row['class_accuracy']:8.3f}{row['rest_accuracy']:8.3f}"
            f"{row['weights_changed']:9d}{seconds}"
        )
    prune = results["prune"]
    alone = {"method": "ablation alone", **prune["ablation_alone"], "weights_changed": 0}
    pruned = [{**row, "method": f"{row['method']}, {row['share']:.0%}"} for row in prune["rows"]]
    for title, rows in (
        ("2. take away the watermark", results["neutralize"]["rows"]),
        ("3. prune filters", [alone, *pruned]),
    ):
        lines += ["", f"{title:<{WIDTH}}{'worst':>8}{'balanced':>10}{'average':>9}{'weights':>9}"]
        lines += [
            f"  {row['method']:<{WIDTH - 2}}{row['worst']:8.3f}{row['balanced']:10.3f}"
            f"{row['average']:9.3f}{row['weights_changed']:9d}"
            for row in rows
        ]
    checks = results["checks"]
    lines += [
        "",
        f"{checks['edits']} edits saved, loaded, applied and undone; {checks['restored']} left "
        "the network as it was, bit for bit",
    ]
    return "\n".join(lines)
