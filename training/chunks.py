"""How many tokens' logits exist at once. No torch, so that a plan can tell what they take."""

from __future__ import annotations

# Logits held at once, in elements. More would not run faster on a CPU; a GPU needs large matrices to be busy.
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**26}


def tokens_per_chunk(vocabulary: int, hidden: int, *, device_type: str) -> int:
    """Tokens whose logits are held at once."""
    # Each chunk costs a pass over the gradient of the whole head, so a wide head needs more tokens to share it.
    return max(CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"]) // vocabulary, hidden // 4, 1)
