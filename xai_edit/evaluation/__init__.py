"""Proof: figures of a model, never edits."""
