"""Distil a teacher into a student: one block of a chain, and the scores after the last."""
