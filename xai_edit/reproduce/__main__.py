"""Write the summary of a run: ``python -m xai_edit.reproduce RUN/results.json SUMMARY.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from xai_edit.reproduce.catalogue import CATALOGUE
from xai_edit.reproduce.summaries import write_json


def summarize(results: Path, out: Path) -> None:
    """Write the means and spreads of a run's ``results.json``, from which its tables are made."""
    content = json.loads(results.read_text(encoding="utf-8"))
    write_json(out, CATALOGUE[content["run"]].summary(content))


if __name__ == "__main__":
    summarize(*map(Path, sys.argv[1:]))
