"""Rows with images of a mixture's source as lines of JSON, whose `image_messages` name the images; these become files.

Images may be those of PIL, bytes, dicts {bytes, path}, or paths, in the columns `image` and `images` or in messages.
Paths start at the folder of the file that names them. In metadata.jsonl and metadata.csv, `file_name` is an image.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import orjson

from mixture.formats import Message, fitting
from mixture.image_dialogues import PLACE, dialogue_of
from mixture.image_files import ImageFolder
from mixture.image_rows import IMAGE_COLUMNS, Row, file_content, holds_image, image_file
from mixture.row_files import json_lines, kind_of, parquet_rows, row_line

NOTE = "HOLDS_IMAGES"
"""A file beside the lines of a source that name images."""

PATH_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
ROWS_LOOKED_AT = 100
"""The first rows of a file tell whether it names images."""
PARQUET_ROWS_AT_ONCE = 16
PARQUET_BUFFER_BYTES = 1 << 22
"""Images are large: neither many rows nor a whole column of a row group should be in memory."""
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
"""Files that name the images of their folder in the column `file_name`, as Hugging Face datasets read them."""


RowType = TypeVar("RowType")


# --- which rows


def file_holds_images(file: Path) -> bool:
    """Whether the rows of a file hold images or their paths."""
    if file.suffix == ".parquet":
        return columns_hold_images(file) or any(map(has_image, islice(file_rows(file), PARQUET_ROWS_AT_ONCE)))
    if kind_of(file) == "text":
        return False
    lines = islice(json_lines(file), ROWS_LOOKED_AT)
    rows = (line_row(line) for line in lines if b"image" in line or b"file_name" in line)
    return any(has_image(with_image_column(row, file)) for row in rows)


def columns_hold_images(file: Path) -> bool:
    """Whether a column of a Parquet file is made for images: {bytes, path}, or bytes where images are looked for."""
    import pyarrow as pa
    import pyarrow.parquet

    def is_image(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return {field.name for field in kind} == {"bytes", "path"} or any(is_image(field.type) for field in kind)
        return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_image(kind.value_type)

    def is_bytes(kind: Any) -> bool:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return is_bytes(kind.value_type)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    try:
        schema = pyarrow.parquet.read_schema(file)
    except pa.ArrowException:
        return False  # what is wrong with the file is told when it is read
    return any(is_image(field.type) or (field.name in IMAGE_COLUMNS and is_bytes(field.type)) for field in schema)


def has_image(row: Any) -> bool:
    """Whether a row holds an image, or names files of images where they are looked for."""
    if not isinstance(row, Mapping):
        return False
    named = [image for column in IMAGE_COLUMNS for image in as_list(row.get(column))]
    turns = row.get("messages")
    for turn in turns if isinstance(turns, (list, tuple)) else ():
        content = turn.get("content") if isinstance(turn, Mapping) else None
        parts = content if isinstance(content, (list, tuple)) else ()
        named += [part.get("image") for part in parts if isinstance(part, Mapping) and part.get("type") == "image"]
    return holds_image(row) or any(isinstance(image, bytes) or is_path(image) for image in named)


def is_path(value: Any) -> bool:
    """Whether a text is the path of an image, and not its address in the web."""
    return isinstance(value, str) and "://" not in value and value.lower().endswith(PATH_ENDINGS)


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


# --- reading


def file_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of any kind, the bytes of images as they are; ValueError names the file, and the row."""
    if kind_of(file) != "parquet":
        for number, line in enumerate(json_lines(file)):
            row = line_row(line)
            if not isinstance(row, dict):
                raise ValueError(f"{file}, row {number}: not a JSON object: {line[:80].decode(errors='replace')}")
            yield with_image_column(row, file)
        return
    try:
        with file.open("rb") as stream:
            yield from parquet_rows(stream, rows_at_once=PARQUET_ROWS_AT_ONCE, buffer_bytes=PARQUET_BUFFER_BYTES)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def line_row(line: bytes) -> Any:
    """The row of a line of JSON; None where it is none."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None


def with_image_column(row: Any, file: Path) -> Any:
    """The row, with what a metadata file calls `file_name` as its image."""
    if file.name not in METADATA_NAMES or not isinstance(row, Mapping) or "image" in row or "file_name" not in row:
        return row
    return {"image" if key == "file_name" else key: value for key, value in row.items()}


def rows_with_first(rows: Iterable[RowType]) -> tuple[RowType | None, Iterator[RowType]]:
    """The first row, or None, and all of them, each read once."""
    iterator = iter(rows)
    head = list(islice(iterator, 1))
    return (head[0] if head else None), chain(head, iterator)


# --- writing


@dataclass(frozen=True, kw_only=True)
class ImageLines:
    """Makes lines of JSON of a source's rows, and files of their images."""

    images: ImageFolder
    place: str
    """Where the rows are, for errors."""
    folder: Path | None = None
    """Where relative paths of images start; None: rows hold images, or absolute paths."""

    def lines(self, rows: Iterable[Row], target: Path) -> Iterator[bytes]:
        """The lines for the file `target`. ValueError names the row that has no image to be read, or no dialogue."""
        target.parent.mkdir(parents=True, exist_ok=True)
        (target.parent / NOTE).touch()
        self.images.remove_leftovers()
        for number, row in enumerate(rows):
            try:
                line = row_line(self.with_names(row))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.place}, row {number}: {error}") from error
            yield line
        os.sync()  # a line that outlasts a power cut must not name an image that did not

    def with_names(self, row: Row) -> dict[str, Any]:
        """The row as messages that name their images, with what else it holds."""
        filled = {key: value for key, value in row.items() if value is not None or key not in IMAGE_COLUMNS}
        dialogue = dialogue_of(self.with_files(filled))
        names = iter([self.images.store(encoded(image)) for image in dialogue.images])
        others = other_columns(filled)
        for column, value in others.items():
            if holds_image(value):
                raise ValueError(f"column {column} holds an image; they are read from image, images and messages alone")
        return {**others, "image_messages": [with_parts(message, names) for message in dialogue.messages]}

    def with_files(self, row: Row) -> Row:
        """The row with the content of files in place of their paths."""
        found = {column: self.opened(row[column], column) for column in IMAGE_COLUMNS if column in row}
        turns = row.get("messages")
        if isinstance(turns, (list, tuple)):
            found["messages"] = [self.turn_with_files(turn) for turn in turns]
        return {**row, **found}

    def turn_with_files(self, turn: Any) -> Any:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if not isinstance(content, (list, tuple)):
            return turn
        parts = [
            {**part, "image": self.opened(part["image"], "messages")}
            if isinstance(part, Mapping) and part.get("type") == "image" and part.get("image") is not None
            else part
            for part in content
        ]
        return {**turn, "content": parts}

    def opened(self, value: Any, key: str) -> Any:
        """What stands for one image or several, with the bytes of those that are paths."""
        if isinstance(value, (list, tuple)):
            return [self.opened(image, f"{key}[{place}]") for place, image in enumerate(value)]
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        if isinstance(value, Mapping) and value.keys() == {"bytes", "path"} and value["bytes"] is None:
            value = value["path"]
        if not isinstance(value, str):
            return value
        path = Path(value).expanduser()
        if self.folder is None and not path.is_absolute():
            raise ValueError(f"{key}: {value} is a path, and no file beside these rows; give images, or absolute paths")
        return {"bytes": file_content(path if self.folder is None else self.folder / path, key), "path": None}


def encoded(image: Any) -> bytes:
    """The bytes of an image as they came; of one that was made, as PNG."""
    content = image["bytes"] if isinstance(image, Mapping) else image_file(image)
    if not isinstance(content, bytes):
        raise ValueError(f"an image's bytes are of type {type(content).__name__}; give a path, or a Parquet file")
    return content


def with_parts(message: Message, names: Iterator[str]) -> Message:
    """The message with its images named, as parts; one without images as it is."""
    if PLACE not in message["content"]:
        return message
    first, *others = message["content"].split(PLACE)
    parts = [text_part(first)] if first else []
    for text in others:
        parts.append({"type": "image", "image": next(names)})
        parts += [text_part(text)] if text else []
    return {**message, "content": parts}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def other_columns(row: Row) -> dict[str, Any]:
    """What a row holds beside its images and what is said about them."""
    rest = {key: value for key, value in row.items() if key not in IMAGE_COLUMNS}
    if rest.get("messages") is not None or rest.get("texts") is not None:
        read: Sequence[str] = ("messages", "texts")
    else:
        candidate = fitting(rest, "auto")
        read = (*candidate.format.columns, *candidate.format.also_reads)
    return {key: value for key, value in rest.items() if key not in read}
