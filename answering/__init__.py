"""Answers that a model writes to rows before others learn from them."""
