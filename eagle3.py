"""Train an EAGLE-3 draft head for a frozen target: one block of a chain, and the scores after the last."""
