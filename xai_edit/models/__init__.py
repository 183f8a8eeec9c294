"""Small networks of the papers and of the demo."""
