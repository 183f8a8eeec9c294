"""Where: the relevance of units and edges."""
