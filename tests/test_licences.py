"""Licence names come to SPDX identifiers, and the gate lets only allowed ones through."""

from __future__ import annotations

import pytest

from mixture.licences import compile_licence_gate, is_non_commercial, is_share_alike, normalised_licence

ALLOWED = ("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "mpl-2.0")

SPELLINGS = {
    "apache-2.0": (
        "Apache 2.0",
        "apache-2.0",
        "Apache-2.0",
        "APACHE-2",
        "Apache License, Version 2.0",
        "Apache License 2.0",
        "The Apache Software License, Version 2.0",
        "Apache License v2.0",
        "apache2.0",
        "http://www.apache.org/licenses/LICENSE-2.0",
        "https://www.apache.org/licenses/LICENSE-2.0.txt",
        "https://opensource.org/licenses/Apache-2.0",
        " apache_2.0 ",
    ),
    "mit": (
        "MIT",
        "mit",
        "MIT License",
        "The MIT License",
        "The MIT Licence (MIT)",
        "https://opensource.org/licenses/MIT",
    ),
    "bsd-3-clause": (
        "BSD-3-Clause",
        'BSD 3-Clause "New" or "Revised" License',
        "New BSD License",
        "3-Clause BSD License",
        "BSD 3 Clause",
        "Modified BSD",
    ),
    "bsd-2-clause": ("BSD-2-Clause", "BSD 2-Clause License", "Simplified BSD", 'BSD 2-Clause "Simplified" License'),
    "mpl-2.0": ("MPL 2.0", "MPL-2.0", "Mozilla Public License 2.0", "Mozilla Public License, v. 2.0", "MPLv2"),
    "gpl-3.0": ("GPL-3.0", "GPLv3", "gpl-3.0-only", "GPL-3.0-or-later", "GPL-3.0+", "GNU General Public License v3.0"),
    "lgpl-2.1": ("LGPL-2.1", "GNU Lesser General Public License v2.1 only", "LGPLv2.1"),
    "agpl-3.0": ("AGPL-3.0", "GNU Affero General Public License, version 3"),
    "cc-by-nc-4.0": (
        "CC-BY-NC-4.0",
        "CC BY-NC 4.0",
        "Creative Commons Attribution-NonCommercial 4.0 International",
        "https://creativecommons.org/licenses/by-nc/4.0/",
    ),
    "cc-by-sa-3.0": ("cc-by-sa-3.0", "CC BY-SA 3.0", "Creative Commons Attribution-ShareAlike 3.0 Unported"),
    "cc0-1.0": ("CC0", "CC0-1.0", "CC0 1.0 Universal", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "unlicense": ("Unlicense", "The Unlicense"),
    "isc": ("ISC", "ISC License"),
    "odc-by": ("odc-by", "ODC-BY"),
    "": ("", "unknown", "None", "NOASSERTION", "no_license", "N/A"),
}


@pytest.mark.parametrize(("expected", "name"), [(key, name) for key, names in SPELLINGS.items() for name in names])
def test_every_spelling_of_a_licence_comes_to_its_spdx_identifier(expected: str, name: str) -> None:
    assert normalised_licence(name) == expected


def test_spellings_of_different_licences_stay_apart() -> None:
    apart = ["mit", "mit-0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "bsd", "cc-by-4.0", "cc-by-3.0", "cc-by-nd-4.0", "other"]
    assert [normalised_licence(name) for name in apart] == apart


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"license": "MIT License"}, None),
        ({"licence": "Apache License, Version 2.0"}, None),
        ({"license": "GPL-3.0"}, "licence not allowed: gpl-3.0"),
        ({"detected_licenses": ["MIT", "Apache-2.0"]}, None),
        ({"detected_licenses": ["MIT", "GPL-2.0-or-later"]}, "licence not allowed: gpl-2.0"),
        ({"detected_licenses": []}, "licence missing"),
        ({"detected_licenses": [None]}, "licence missing"),
        ({"max_stars_repo_licenses": ["BSD-3-Clause"]}, None),
        ({"metadata": {"license": "mit"}}, None),
        ({"license": "MIT OR GPL-3.0"}, None),
        ({"license": "MIT AND GPL-3.0"}, "licence not allowed: mit-and-gpl-3.0"),
        ({"license": "(MIT OR GPL-3.0) AND Apache-2.0"}, None),
        ({"license": "GPL-3.0 OR LGPL-3.0 AND MIT"}, "licence not allowed: gpl-3.0-or-lgpl-3.0-and-mit"),
        ({"license": "(MIT OR GPL-3.0"}, "licence not allowed: mit-or-gpl-3.0"),
        ({"license": "other"}, "licence not allowed: other"),
        ({"license": None, "content": "x"}, "licence missing"),
        ({"content": "x"}, "licence missing"),
    ],
)
def test_rows_pass_only_with_allowed_licences(row: dict[str, object], reason: str | None) -> None:
    refusal = compile_licence_gate(ALLOWED, "drop")
    assert refusal(row) == reason
    assert refusal(row) == reason, "asked again, from memory"


def test_a_row_without_licence_has_that_of_its_source() -> None:
    assert compile_licence_gate(ALLOWED, "fail", source_licence="MIT")({"content": "x"}) is None
    by_source = compile_licence_gate(ALLOWED, "keep", source_licence="CC BY-NC 4.0")
    assert by_source({"content": "x"}) == "licence not allowed: cc-by-nc-4.0"
    assert by_source({"license": "mit"}) is None, "the row's own licence counts first"


def test_missing_licences_are_dropped_kept_or_an_error_as_asked() -> None:
    assert compile_licence_gate(ALLOWED, "drop")({}) == "licence missing"
    assert compile_licence_gate(ALLOWED, "keep")({"license": "unknown"}) is None
    with pytest.raises(ValueError, match=r"names no licence .* or filters\.missing_licence to drop or keep"):
        compile_licence_gate(ALLOWED, "fail")({})


def test_an_allowlist_cannot_name_no_licence() -> None:
    with pytest.raises(ValueError, match="missing_licence: keep"):
        compile_licence_gate(["mit", "unknown"], "drop")


def test_licences_that_forbid_commercial_use_or_ask_to_share_alike_are_known_by_name() -> None:
    assert is_non_commercial("CC BY-NC-SA 4.0") and is_non_commercial("Creative Commons Attribution-NonCommercial 4.0")
    assert not any(map(is_non_commercial, ("cc-by-4.0", "mit", "CC-BY-SA-4.0", "ncsa")))
    assert is_share_alike("CC-BY-SA-4.0") and is_share_alike("GPLv3") and not is_share_alike("cc-by-4.0")
