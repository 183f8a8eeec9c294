"""Pictures and the page that shows a finished run."""
