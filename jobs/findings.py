"""What the doctor has looked at, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["fine", "note", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    about: str
    level: Level
    found: str
    advice: str
    """What the kit does about it, or what the user can do."""


def fine(about: str, found: str, advice: str) -> Finding:
    return Finding(about=about, level="fine", found=found, advice=advice)


def note(about: str, found: str, advice: str) -> Finding:
    return Finding(about=about, level="note", found=found, advice=advice)


def problem(about: str, found: str, advice: str) -> Finding:
    return Finding(about=about, level="problem", found=found, advice=advice)
