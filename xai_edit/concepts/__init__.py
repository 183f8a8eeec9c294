"""What: concept subspaces of a layer."""
