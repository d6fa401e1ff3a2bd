"""EAGLE-3 draft heads: the model, its loss, what a target gives it, how it is decoded, scored and exported."""
