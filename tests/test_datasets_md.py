"""DATASETS.md says what the dataset modules say."""

import re
from pathlib import Path

from mixture.inspection import COLUMNS, datasets_document, list_datasets

PROJECT = Path(__file__).parents[1]


def test_the_document_is_current():
    written = (PROJECT / "DATASETS.md").read_text()
    assert written == datasets_document(list_datasets(PROJECT)), (
        "run `python -m mixture.inspection` and commit the result"
    )


def test_every_module_has_a_row_with_all_columns_and_a_section():
    text = (PROJECT / "DATASETS.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    names = [path.stem for path in sorted((PROJECT / "datasets").glob("*.py"))]
    assert [re.match(r"\| \[(\w+)\]", row)[1] for row in rows] == names
    assert all(row.count(" | ") == len(COLUMNS) - 1 for row in rows)
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == names


def test_fallbacks_options_and_what_is_not_known_are_told(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/one.py").write_text(
        '"""One."""\nSOURCE = HubSource(id="a/b", licence=None, commercial_use=None, format="text", gated=True,'
        ' rows={"train": None, "test": 1500}, options={"language": "go"}, fallback=[{"files": {"train": "x.json"}},'
        ' {"id": "c/d"}])'
    )
    text = datasets_document(list_datasets(tmp_path))
    assert "| none stated | unknown | text | unknown / 1,500 | yes | train / test |" in text
    assert "Options, with their defaults: `language: go`." in text
    assert "Where it cannot be had: a/b (x.json), then c/d." in text
    assert "No revision is pinned: the newest is taken, and recorded." in text
