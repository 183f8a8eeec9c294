"""One HTML page for each command's run."""
