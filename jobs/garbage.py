"""When Python looks for garbage, in processes that import torch and transformers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEW_OBJECTS = 10_000
"""How many are made before Python looks through them for garbage; its own number is below a thousand."""


@contextmanager
def collected_rarely() -> Iterator[None]:
    """For all that a process does: fewer looks for garbage, and none at its end.

    torch and transformers make 400,000 objects that live as long as the process. Looking through them again and again
    while they are imported, and once more at the end, takes 1.4 s.
    """
    gc.set_threshold(NEW_OBJECTS)
    try:
        yield
    finally:
        gc.freeze()
