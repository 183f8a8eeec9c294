"""Action: operators that plan edits of a model, and the edit itself."""
