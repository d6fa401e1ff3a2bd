"""Licence names in any spelling, brought to SPDX identifiers, and the gate that lets only allowed ones through."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any, Literal

Row = Mapping[str, Any]
MissingLicence = Literal["drop", "keep", "fail"]

LICENCE_COLUMNS = (
    "license",
    "licence",
    "licenses",
    "licences",
    "detected_licenses",
    "max_stars_repo_licenses",
    "max_stars_repo_license",
)
"""Columns in which data sets name the licence of a row; the first that is filled counts."""

UNSTATED = frozenset({"", "unknown", "none", "null", "nan", "n-a", "no-license", "noassertion", "unlicensed"})
"""Normalised names that state no licence."""

SYNONYMS = {
    "apache": "apache-2.0",
    "asl-2.0": "apache-2.0",
    "expat": "mit",
    "mit-expat": "mit",
    "bsd-new": "bsd-3-clause",
    "bsd-modified": "bsd-3-clause",
    "bsd-revised": "bsd-3-clause",
    "new-bsd": "bsd-3-clause",
    "modified-bsd": "bsd-3-clause",
    "revised-bsd": "bsd-3-clause",
    "bsd-3": "bsd-3-clause",
    "3-clause-bsd": "bsd-3-clause",
    "bsd-3-clause-new-or-revised": "bsd-3-clause",
    "bsd-simplified": "bsd-2-clause",
    "simplified-bsd": "bsd-2-clause",
    "freebsd": "bsd-2-clause",
    "bsd-2": "bsd-2-clause",
    "2-clause-bsd": "bsd-2-clause",
    "bsd-2-clause-simplified": "bsd-2-clause",
    "bsd-2-clause-freebsd": "bsd-2-clause",
    "zero-clause-bsd": "0bsd",
    "bsd-zero-clause": "0bsd",
    "boost-software-1.0": "bsl-1.0",
    "boost-1.0": "bsl-1.0",
    "isc-isc": "isc",
    "mit-mit": "mit",
    "postgresql-license": "postgresql",
    "cc-0": "cc0-1.0",
    "cc0": "cc0-1.0",
    "cc-zero-1.0": "cc0-1.0",
    "cc0-universal-1.0": "cc0-1.0",
    "cc0-1.0-universal": "cc0-1.0",
    "python": "python-2.0",
    "psf-2.0": "python-2.0",
}
"""Normalised names that mean an SPDX identifier, beyond what normalising finds."""

WHOLE_NAMES = (
    ("gnu lesser general public", "lgpl"),
    ("gnu library general public", "lgpl"),
    ("gnu affero general public", "agpl"),
    ("gnu general public", "gpl"),
    ("lesser general public", "lgpl"),
    ("affero general public", "agpl"),
    ("general public", "gpl"),
    ("mozilla public", "mpl"),
    ("eclipse public", "epl"),
    ("european union public", "eupl"),
    ("academic free", "afl"),
    ("creative commons", "cc"),
    ("open data commons", "odc"),
    ("open database", "odbl"),
    ("attribution", "by"),
    ("noncommercial", "nc"),
    ("non commercial", "nc"),
    ("sharealike", "sa"),
    ("share alike", "sa"),
    ("noderivatives", "nd"),
    ("noderivs", "nd"),
    ("no derivatives", "nd"),
    ("no derivs", "nd"),
)
"""Names written out and what SPDX calls them, longer ones first."""

FILLERS = r"\b(?:the|license[ds]?|software|version|under|public domain dedication|international|unported)\b"
"""Words that names written out carry and identifiers do not."""

UNDER_TWO_DIGITS = ("apache", "asl", "gpl", "lgpl", "agpl", "mpl", "epl", "afl", "bsl", "eupl", "cc-by", "cc0", "odbl")
"""Families whose versions SPDX writes with two numbers: `apache-2` is apache-2.0."""


def compile_licence_gate(
    allowed: Collection[str], missing: MissingLicence, *, source_licence: str | None = None
) -> Callable[[Row], str | None]:
    """A function that gives None for a row with an allowed licence, else the reason to drop it.

    The row's own licence counts, else `source_licence`. A list of licences found in one file passes only where every
    one is allowed; so does an SPDX expression, whose `OR` asks for one side and `AND` for both. `missing` says what
    happens to rows for which neither the row nor its source names one; `fail` raises ValueError.
    """
    allowed_ids = frozenset(normalised_licence(name) for name in allowed)
    if "" in allowed_ids:
        raise ValueError("licences lists a name that states no licence; use missing_licence: keep for such rows")
    verdicts: dict[str | tuple[str, ...], str | None] = {}

    def verdict(names: list[str]) -> str | None:
        if not names:
            if missing == "fail":
                raise ValueError(
                    f"a row names no licence (columns looked at: {', '.join(LICENCE_COLUMNS)}) and its source has "
                    "none; set the source's licence, or filters.missing_licence to drop or keep"
                )
            return "licence missing" if missing == "drop" else None
        refused = [name for name in names if not expression_allowed(name, allowed_ids)]
        return f"licence not allowed: {normalised_licence(refused[0])}" if refused else None

    def refusal(row: Row) -> str | None:
        value = licence_value(row)
        if value not in verdicts:
            verdicts[value] = verdict(stated(value) or stated(source_licence or ""))
        return verdicts[value]

    return refusal


def licence_value(row: Row) -> str | tuple[str, ...]:
    """What the row's first filled licence column holds, also inside `metadata`; "" where there is none."""
    metadata = row.get("metadata")
    for columns in (row, metadata) if isinstance(metadata, Mapping) else (row,):
        for column in LICENCE_COLUMNS:
            value = columns.get(column)
            if isinstance(value, str) and value:
                return value
            if isinstance(value, (list, tuple)) and value:
                return tuple(str(name) for name in value if name is not None)
    return ""


def stated(value: str | tuple[str, ...]) -> list[str]:
    """The names in a licence column that state a licence."""
    names = (value,) if isinstance(value, str) else value
    return [name for name in names if normalised_licence(name)]


def expression_allowed(expression: str, allowed: Collection[str]) -> bool:
    """Whether an SPDX expression, or a plain name, can be met with allowed licences alone."""
    if normalised_licence(expression) in allowed:
        return True
    tokens = re.findall(r"[()]|\b(?:AND|OR)\b|(?:(?!\b(?:AND|OR)\b)[^()])+", expression)
    words = [token.strip() for token in tokens if token.strip()]
    if len(words) < 2 or not {"AND", "OR"} & set(words):
        return False
    result, rest = either(words, allowed)
    return result and not rest


def either(tokens: list[str], allowed: Collection[str]) -> tuple[bool, list[str]]:
    """Truth of `a OR b OR ...` at the head of the tokens, and the tokens behind it."""
    result, tokens = both(tokens, allowed)
    while tokens[:1] == ["OR"]:
        other, tokens = both(tokens[1:], allowed)
        result = result or other
    return result, tokens


def both(tokens: list[str], allowed: Collection[str]) -> tuple[bool, list[str]]:
    """Truth of `a AND b AND ...`, which binds closer than OR, and the tokens behind it."""
    result, tokens = operand(tokens, allowed)
    while tokens[:1] == ["AND"]:
        other, tokens = operand(tokens[1:], allowed)
        result = result and other
    return result, tokens


def operand(tokens: list[str], allowed: Collection[str]) -> tuple[bool, list[str]]:
    """Truth of one name or of a group in brackets. Anything malformed is not allowed."""
    if tokens[:1] == ["("]:
        result, rest = either(tokens[1:], allowed)
        return (result, rest[1:]) if rest[:1] == [")"] else (False, [])
    return (normalised_licence(tokens[0]) in allowed, tokens[1:]) if tokens else (False, [])


@lru_cache(maxsize=4096)
def normalised_licence(name: str) -> str:
    """The SPDX identifier of a licence name in lower case; "" where the name states none.

    Spellings, written-out names, `-only`, `-or-later` and the addresses of opensource.org, spdx.org, apache.org and
    creativecommons.org come to one form. What is not known stays as it is, in lower case with hyphens.
    """
    text = without_address(name.strip().lower())
    if text.startswith("licenseref-"):
        return text
    text = re.sub(r"[\"'\u2018\u2019\u201c\u201d(){}\[\]]", " ", text).replace("licence", "license")
    text = re.sub(r"[\s_,;:/-]+", " ", text).strip()
    if text.replace(" ", "-") in UNSTATED:
        return ""
    for written_out, short in WHOLE_NAMES:
        text = re.sub(rf"\b{written_out}\b", short, text)
    text = re.sub(FILLERS, " ", text)
    text = re.sub(r"\b(?:or later|or any later|only)\b|\+", " ", text)
    text = re.sub(r"\bv\.?\s*(?=\d)", " ", text)
    text = re.sub(r"(?<=[a-z]pl)v?(?=\d)", " ", text)
    text = re.sub(r"^gnu (?=[al]?gpl\b)", "", text.strip())
    text = re.sub(r"^([a-z]+)(?=\d+\.\d+$)", r"\1-", "-".join(text.split()))
    text = with_two_digits(SYNONYMS.get(text, text))
    return SYNONYMS.get(text, text)


def without_address(text: str) -> str:
    """The part of a licence's web address that names it; other text as it is."""
    address = re.sub(r"^https?://(?:www\.)?", "", text)
    if address == text:
        return text
    creative = re.match(r"creativecommons\.org/(licenses|publicdomain)/([a-z-]+)/(\d\.\d)", address)
    if creative:
        return "cc0-1.0" if creative[1] == "publicdomain" else f"cc-{creative[2]}-{creative[3]}"
    last = re.sub(r"\.(?:html?|txt|php)$", "", address.rstrip("/").rsplit("/", 1)[-1])
    return last.replace("license-", "apache-", 1) if address.startswith("apache.org") else last


def with_two_digits(text: str) -> str:
    """`apache-2` as apache-2.0, for the families that SPDX numbers so."""
    head, _, version = text.rpartition("-")
    return f"{text}.0" if version.isdigit() and head.startswith(UNDER_TWO_DIGITS) else text


def is_non_commercial(name: str) -> bool:
    """Whether a licence, in any spelling, forbids commercial use by its name."""
    return bool(re.search(r"(?:^|-)(?:nc|non-?commercial|research-only)(?:-|$)", normalised_licence(name)))


def is_share_alike(name: str) -> bool:
    """Whether a licence, in any spelling, asks that what is made from the data is shared under the same terms."""
    normalised = normalised_licence(name)
    return bool(re.search(r"(?:^|-)sa(?:-|$)|^[al]?gpl|^odbl", normalised))
