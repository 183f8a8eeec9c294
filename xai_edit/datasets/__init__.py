"""Real data with a shortcut planted in it."""
