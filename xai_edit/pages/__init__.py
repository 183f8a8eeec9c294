"""One HTML page for each command's run."""

RESULTS = ("results.json", "comparison.json")  # the second of `xai-edit score --compare`
