"""Checks for scorers and operators, also a user's own."""
