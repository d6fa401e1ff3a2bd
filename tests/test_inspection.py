"""`check-dataset` shows rows as the trainer sees them, and the listing reads modules without running them."""

from dataclasses import replace
from pathlib import Path

import pytest
from chat_tokenizers import CHATML, chat_tokenizer
from rich.console import Console

from mixture.config import DatasetConfig
from mixture.dataset_modules import ModuleFile
from mixture.inspection import check_dataset, list_datasets, rendered_listing, rendered_report
from mixture.prepare import PreparationRequest

MODULE = """
def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    return [{"question": f"{split} {i}?", "answer": "Yes."} for i in range(5)]

def get_data_collator(processor):
    return lambda samples: samples
"""


def make_request(folder: Path, text: str = MODULE, **dataset) -> PreparationRequest:
    chat_tokenizer(CHATML).save_pretrained(folder / "tokenizer")
    (folder / "mine.py").write_text(text)
    return PreparationRequest(
        dataset=DatasetConfig(name="mine", **dataset),
        module=ModuleFile(folder / "mine.py"),
        tokenizer=str(folder / "tokenizer"),
        objective="sft",
    )


def test_two_rows_of_each_split_are_shown_with_the_tokens_that_carry_loss(tmp_path):
    report = check_dataset(make_request(tmp_path))
    assert {split: len(rows) for split, rows in report.splits.items()} == {"train": 2, "test": 2}
    row = report.splits["test"][1]
    assert row.format == "question/answer" and row.columns == {"question": "str[7]", "answer": "str[4]"}
    assert row.segments == [
        ("<|im_start|>user\ntest 1?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes.<|im_end|>", True),
        ("\n", False),
    ]
    assert 0 < row.labelled_share < 1 and row.dropped is None


def test_objects_that_workers_cannot_receive_and_notes_are_told(tmp_path):
    report = check_dataset(make_request(tmp_path, split_ratio=0.9))
    assert list(report.unpicklable) == ["get_data_collator's result"]
    assert report.notes == ["split_ratio 0.9 from the config; the module's default is 0.8"]
    assert report.has_collator and not report.has_score


def test_a_row_that_would_be_dropped_says_why(tmp_path):
    request = make_request(tmp_path)
    report = check_dataset(replace(request, dataset=replace(request.dataset, max_length=8)))
    assert report.splits["train"][0].dropped == "longer than max_length"


def test_the_report_prints_text_without_loss_dimmed(tmp_path):
    console = Console(width=200, record=True, force_terminal=True)
    console.print(rendered_report(check_dataset(make_request(tmp_path))))
    html = console.export_text(styles=True)
    assert "\x1b[32mYes.<|im_end|>" in html and "\x1b[2m<|im_start|>user" in html


def test_the_listing_never_runs_a_module_and_shows_those_without_a_source(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "bare.py").write_text('"""Bare rows."""\nraise SystemExit("ran")')
    (tmp_path / "datasets" / "full.py").write_text(
        'SOURCE = HubSource(id="a/b", revision="0123456789", licence="MIT", commercial_use=True, format="text")'
    )
    bare, full = list_datasets(tmp_path)
    assert (bare.name, bare.summary, bare.source) == ("bare", "Bare rows.", None)
    assert full.source.id == "a/b"
    console = Console(width=200, record=True)
    console.print(rendered_listing([bare, full]))
    text = console.export_text()
    assert "not stated" in text and "a/b@01234567 " in text and "MIT" in text
    narrow = Console(width=60, record=True)
    narrow.print(rendered_listing([bare, full]))
    assert "…" not in narrow.export_text(), "nothing is cut off where there is little room"


def test_a_source_that_is_not_literal_is_refused_with_its_line(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "odd.py").write_text("import x\nSOURCE = HubSource(id=x.ID)")
    with pytest.raises(ValueError, match=r"odd\.py:2: SOURCE must be HubSource\(\.\.\.\) with literal values"):
        list_datasets(tmp_path)
