"""Looking at data before training: what a module returns, which tokens carry loss, which modules there are."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from mixture.dataset_modules import check_module, data_collator, load_rows, parse_module, score_function
from mixture.formats import canonical_sample, detect_format
from mixture.hub import HubSource
from mixture.image_dialogues import IGNORED, NotForDialogueError
from mixture.image_preparation import check_settings, collator_for, has_images, token_counts
from mixture.image_rows import RowEncoder
from mixture.preferences import renderer_for
from mixture.prepare import PreparationRequest, load_processor, with_first
from mixture.shards import TokenRow

ROWS_SHOWN = 2
DOCUMENT_HEAD = """# Datasets

Made from the modules in `datasets/` by `python -m mixture.inspection`; a test keeps it current. `./train.sh datasets`
prints the same table.

Use one by its name, as `dataset.name` in a run or as a source in a mixture; local files with the same columns go in
`dataset.data_files`, or `path` in a mixture. Sources that do not allow commercial use are refused in a mixture unless
it says `allow_non_commercial: true`. A gated source needs its terms accepted on the hub, and a token in `HF_TOKEN`.
Licences are as their publishers state them; "unknown" means that nobody does, or that it differs from row to row: read
the terms before you rely on them. Rows are those on the hub; a module may make several of one, or leave some out.
"""


@dataclass(frozen=True)
class RowReport:
    """One row as the trainer would see it."""

    format: str
    columns: dict[str, str]
    """Each column with its type and length."""
    tokens: int
    segments: list[tuple[str, bool]]
    """Decoded text in order, each piece with whether it carries loss."""
    labelled_share: float
    dropped: str | None
    """Why the row would be left out, if it would."""


@dataclass(frozen=True)
class DatasetReport:
    """What `check-dataset` found."""

    module: Path
    splits: dict[str, list[RowReport]]
    notes: list[str]
    unpicklable: dict[str, str]
    """Objects of the module that data loading workers could not receive, with the error."""
    has_score: bool
    has_collator: bool


def check_dataset(request: PreparationRequest) -> DatasetReport:
    """Load two rows of each split and make tokens of them; ValueError as the prepare step would raise it."""
    assert request.module is not None, "a mixture's rows come from no module"
    check_module(request.module)
    processor = load_processor(request)
    limit = min(ROWS_SHOWN, request.dataset.limit or ROWS_SHOWN)
    dataset = replace(request.dataset, limit=limit)
    notes: list[str] = []
    loaded: dict[str, Any] = {}
    for split in dict.fromkeys((dataset.train_split, dataset.test_split)):
        loaded[split] = load_rows(request.module, dataset, split, processor, None if loaded else notes.append)
    collator = data_collator(request.module, processor, dataset)
    score = score_function(request.module)
    objects = {"get_data_collator's result": collator, "score": score}
    source = request.module.path.stem
    first, loaded[dataset.train_split] = with_first(loaded[dataset.train_split])
    if first is not None and has_images(first, request.module, processor):
        report_on = ImageRowReports(request, processor).report
    else:
        tokenizer = getattr(processor, "tokenizer", processor)
        report_on = partial(report_row, request, tokenizer, source=source)
    return DatasetReport(
        module=request.module.path,
        splits={
            split: [report_on(row, row_id=f"{split}-{index}") for index, row in enumerate(islice(rows, 2))]
            for split, rows in loaded.items()
        },
        notes=notes,
        unpicklable={name: error for name, value in objects.items() if (error := pickling_error(value))},
        has_score=score is not None,
        has_collator=collator is not None,
    )


def report_row(
    request: PreparationRequest, tokenizer: Any, row: Mapping[str, Any], *, source: str, row_id: str
) -> RowReport:
    """The report on one row."""
    renderer = renderer_for(
        request.objective,
        tokenizer,
        max_length=request.dataset.max_length,
        over_length=request.dataset.over_length,
        mask_rationale=request.dataset.mask_rationale,
    )
    token_rows = renderer.token_rows([canonical_sample(row, source=source, row_id=row_id)])
    tokens = sum(len(token_row.input_ids) for token_row in token_rows)
    labelled = sum(int(token_row.loss_mask[1:].sum()) for token_row in token_rows)
    return RowReport(
        format=detect_format(row).name,
        columns={str(name): described(value) for name, value in row.items()},
        tokens=tokens,
        segments=[segment for token_row in token_rows for segment in decoded_segments(tokenizer.decode, token_row)],
        labelled_share=labelled / tokens if tokens else 0.0,
        dropped=", ".join(renderer.dropped) or None,
    )


class ImageRowReports:
    """Reports on rows with images, from the batches that training would get of them."""

    def __init__(self, request: PreparationRequest, processor: Any) -> None:
        check_settings(request.objective, request.dataset)
        self.max_length = request.dataset.max_length
        self.decode = processor.tokenizer.decode
        self.collate, is_own = collator_for(request.module, processor, request.dataset)
        self.encoder = RowEncoder(reads_files=not is_own)

    def report(self, row: Mapping[str, Any], *, row_id: str) -> RowReport:
        """The report on one row; ValueError names the key that is wrong."""
        columns = {str(name): described(value) for name, value in row.items()}
        try:
            batch = self.collate([self.encoder.encoded(row).read()])
        except NotForDialogueError as error:
            return RowReport("images", columns, 0, [], 0.0, str(error))
        except ValueError as error:
            raise ValueError(f"row {row_id}: {error}") from error
        counts = token_counts(batch)
        labels = np.asarray(batch["labels"])[0]
        tokens = TokenRow(row_id, np.asarray(batch["input_ids"])[0], labels != IGNORED, "")
        return RowReport(
            format="images",
            columns=columns,
            tokens=counts.tokens,
            segments=decoded_segments(self.decode, tokens),
            labelled_share=counts.loss_tokens / counts.tokens,
            dropped="longer than max_length" if counts.tokens > self.max_length else None,
        )


def described(value: Any) -> str:
    """Type and length of a column's value."""
    return f"{type(value).__name__}[{len(value)}]" if hasattr(value, "__len__") else type(value).__name__


def decoded_segments(decode: Callable[[list[int]], str], row: TokenRow) -> list[tuple[str, bool]]:
    """Runs of tokens with and without loss, decoded; the first token never carries loss."""
    labelled = [False, *row.loss_mask[1:].tolist()]
    changes = [place for place in range(1, len(labelled)) if labelled[place] != labelled[place - 1]]
    bounds = [0, *changes, len(labelled)]
    return [(decode(row.input_ids[first:last].tolist()), labelled[first]) for first, last in pairwise(bounds)]


def marked_text(segments: Sequence[tuple[str, bool]]) -> Text:
    """Decoded text for a terminal: what carries loss is green, all else dimmed."""
    return Text.assemble(*((piece, "green" if loss else "dim") for piece, loss in segments))


def pickling_error(value: Any) -> str | None:
    """Why the value cannot be pickled, or None if it can."""
    try:
        pickle.dumps(value)
    except Exception as error:  # pickle raises whatever an object's own code raises; the report is the answer
        return f"{type(error).__name__}: {error}"
    return None


def rendered_report(report: DatasetReport) -> RenderableType:
    """The report for a terminal: text without loss is dimmed."""
    parts: list[RenderableType] = [Text(str(report.module), style="bold"), *(Text(note) for note in report.notes)]
    for split, rows in report.splits.items():
        for number, row in enumerate(rows):
            columns = ", ".join(f"{name} {kind}" for name, kind in row.columns.items())
            parts.append(Text(f"\n{split} row {number}: {row.format} ({columns})", style="bold"))
            parts.append(Text(f"{row.tokens} tokens, {row.labelled_share:.0%} with loss"))
            if row.dropped:
                parts.append(Text(f"dropped: {row.dropped}", style="red"))
            parts.append(marked_text(row.segments))
    for name, error in report.unpicklable.items():
        parts.append(Text(f"{name} cannot be sent to data loading workers: {error}", style="red"))
    parts.append(Text(f"\nscore: {'yes' if report.has_score else 'no'}"))
    return Group(*parts)


# --- the modules of a project


@dataclass(frozen=True)
class DatasetListing:
    """One module of datasets/, read without running it."""

    name: str
    summary: str
    """First line of the module's docstring."""
    description: str
    """The module's docstring."""
    source: HubSource | None
    """Its SOURCE; None where it declares none."""


def list_datasets(project: Path) -> list[DatasetListing]:
    """The dataset modules of a project, by name; ValueError names a file that does not parse."""
    return [listing(path) for path in sorted((project / "datasets").glob("*.py"))]


def listing(path: Path) -> DatasetListing:
    """What a module says about itself."""
    tree = parse_module(path)
    description = ast.get_docstring(tree) or ""
    sources = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "SOURCE"
    ]
    calls = [value for value in sources if isinstance(value, ast.Call)]
    source = literal_source(path, calls[0]) if calls else None
    return DatasetListing(path.stem, description.partition("\n")[0], description, source)


def literal_source(path: Path, call: ast.Call) -> HubSource:
    """The HubSource that a call writes out in literals."""
    try:
        return HubSource(**{str(word.arg): ast.literal_eval(word.value) for word in call.keywords})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}:{call.lineno}: SOURCE must be HubSource(...) with literal values: {error}") from error


COLUMNS = ("name", "source", "licence", "commercial use", "format", "rows", "gated", "splits")


def rendered_listing(listings: list[DatasetListing]) -> RenderableType:
    """A table of dataset modules for a terminal."""
    name, *others = COLUMNS
    columns = [Column(name, no_wrap=True), *(Column(title, overflow="fold") for title in others)]  # nothing cut off
    table = Table(*columns, box=None)
    for item in listings:
        table.add_row(*map(escape, listing_cells(item)))
    return table


def listing_cells(item: DatasetListing) -> tuple[str, ...]:
    """One row of the table of datasets."""
    source = item.source
    if source is None:
        return (item.name, "not stated", "", "", "", "", "", "")
    revision = f"@{source.revision[:8]}" if source.revision else ""
    place = f"{source.id}{f':{source.config}' if source.config else ''}{revision}" if source.id else "made here"
    commercial = {True: "yes", False: "no", None: "unknown"}[source.commercial_use]
    counts = " / ".join("unknown" if count is None else f"{count:,}" for count in source.rows.values())
    splits = " / ".join(source.rows)
    gated = "yes" if source.gated else "no"
    licence = source.licence or "none stated"
    return (item.name, place, licence, commercial, source.format, counts or "any", gated, splits or "train / test")


def datasets_document(listings: list[DatasetListing]) -> str:
    """The text of DATASETS.md."""
    lines = [DOCUMENT_HEAD, f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    for item in listings:
        name, place, *others = listing_cells(item)
        if item.source is not None and item.source.id:
            place = f"[{place}](https://huggingface.co/datasets/{item.source.id})"
        lines.append(f"| {' | '.join([f'[{name}](#{name})', place, *others])} |")
    return "\n".join(lines) + "\n" + "".join(map(described_dataset, listings))


def described_dataset(item: DatasetListing) -> str:
    """The section of DATASETS.md on one module."""
    parts = [item.description]
    source = item.source
    if source is not None and source.options:
        keys = ", ".join(f"`{key}: {value}`" for key, value in source.options.items())
        parts.append(f"Options, with their defaults: {keys}.")
    if source is not None and source.fallback:
        places = [
            str(other.get("id", source.id)) + " " + names_of_files(other.get("files")) for other in source.fallback
        ]
        parts.append(f"Where it cannot be had: {', then '.join(place.strip() for place in places)}.")
    if source is not None and source.id and source.revision is None:
        parts.append("No revision is pinned: the newest is taken, and recorded.")
    text = "\n\n".join(parts)
    return f"\n## {item.name}\n\n{text}\n"


def names_of_files(files: Mapping[str, Any] | None) -> str:
    """The files of a fallback, in brackets."""
    if not files:
        return ""
    names = [name for value in files.values() for name in ([value] if isinstance(value, str) else value)]
    return f"({', '.join(names)})"


if __name__ == "__main__":
    project = Path(__file__).parents[1]
    (project / "DATASETS.md").write_text(datasets_document(list_datasets(project)))
