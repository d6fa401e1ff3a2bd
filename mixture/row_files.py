"""Files of rows in any form as JSONL, in bounded memory: JSON arrays, Parquet, CSV and text, plain or compressed."""

from __future__ import annotations

import base64
import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from mixture.whole_files import remove_leftovers, whole_file

READ_BYTES = 1 << 22
MOST_ROW_CHARACTERS = 1 << 28
"""Longest element of a JSON array: one that never ends must not fill the memory."""
PARQUET_BATCH_ROWS = 256

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
"""What a file holds, by its ending, with a compression's ending after it or not. In text, each line is a row."""

ENDINGS = f"{', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}"
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)
BLANKS = re.compile(r"[ \t\r\n]*")
LINE_BREAK = re.compile(r"\s*[\r\n]\s*")


def kind_of(path: Path | str) -> str | None:
    """What a file holds, by its name; None where the name does not tell."""
    name = Path(path)
    return KINDS.get((Path(name.stem) if name.suffix in COMPRESSIONS else name).suffix)


def is_plain_jsonl(path: Path) -> bool:
    """Whether the file can be scanned as it is: JSON objects, one a line, neither compressed nor with a BOM."""
    if kind_of(path) != "json" or path.suffix in COMPRESSIONS:
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    starts_otherwise = head.lstrip().startswith((b"[", codecs.BOM_UTF8)) or begins_with_part_of_an_object(head)
    return not starts_otherwise


def json_lines(path: Path, columns: list[str] | None = None) -> Iterator[bytes]:
    """The rows of a file, each as one line of JSON; ValueError names the file and what is wrong with it.

    JSON rows pass as they are written, also malformed ones in JSONL: whoever reads the lines counts them. `columns`
    limits what is read of a Parquet file.
    """
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"{path}: a file of unknown kind; known endings: {ENDINGS}")
    if kind == "parquet" and path.suffix in COMPRESSIONS:
        raise ValueError(f"{path}: Parquet files are compressed inside; unpack this one")
    read: Callable[[io.BufferedReader], Iterator[bytes]] = {
        "json": json_file_lines,
        "csv": lambda file: csv_lines(file, "\t" if ".tsv" in path.suffixes else ","),
        "text": text_lines,
        "parquet": lambda file: parquet_lines(file, columns),
    }[kind]
    try:
        with opened(path) as file:
            yield from read(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: damaged or cut off: {error}") from error


def opened(path: Path) -> io.BufferedReader:
    """The file's bytes, unpacked."""
    if path.suffix == ".zst":
        import pyarrow

        raw: Any = pyarrow.input_stream(str(path), compression="zstd")
    else:
        openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        raw = openers.get(path.suffix, lambda plain: plain.open("rb", buffering=0))(path)
    return io.BufferedReader(raw, READ_BYTES)


def write_lines(lines: Iterable[bytes], target: Path) -> None:
    """Write the lines beside `target`, which appears when all of them are on disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    with whole_file(target, synced=True) as file:
        file.writelines(lines)


# --- one small function a kind


def json_file_lines(file: io.BufferedReader) -> Iterator[bytes]:
    """Rows of JSONL, or elements of one JSON array."""
    if file.peek(3).startswith(codecs.BOM_UTF8):
        file.read(3)
    head = file.peek(4096)
    if head.lstrip().startswith(b"["):
        yield from array_lines(iter(lambda: file.read(READ_BYTES), b""))
        return
    if begins_with_part_of_an_object(head):
        raise ValueError("holds one JSON object over several lines, not rows; give a JSON array or one object a line")
    for line in file:
        if not line.isspace():
            yield line if line.endswith(b"\n") else line + b"\n"


def begins_with_part_of_an_object(head: bytes) -> bool:
    """Whether the first line opens an object and leaves it open, as in indented JSON."""
    first = head.lstrip().partition(b"\n")[0].rstrip()
    return first == b"{" or (first.startswith(b"{") and first.endswith((b"[", b"{")))


def array_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The elements of a JSON array as they are written, without their line breaks."""
    # Bytes that are no UTF-8 pass through as they are: the row that holds them is counted when it is read.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    scan = json.JSONDecoder().raw_decode
    blocks = iter(blocks)
    buffer, place, ended, between = "", 0, False, ""
    while not buffer:
        buffer = decoder.decode(next(blocks)).lstrip()
    buffer = buffer[1:]
    while True:
        place = BLANKS.match(buffer, place).end()  # type: ignore[union-attr]
        mark = buffer[place : place + 1]
        if mark == "]":
            if buffer[place + 1 :].strip() or any(decoder.decode(block).strip() for block in blocks):
                raise ValueError("holds something after the JSON array")
            return
        if mark == "," and between == "element":
            place, between = place + 1, "comma"
            continue
        if mark:
            try:
                if between == "element":
                    raise ValueError(f"has {mark!r} between two elements of the JSON array")
                _, end = scan(buffer, place)
            except json.JSONDecodeError as error:
                if ended or len(buffer) - place > MOST_ROW_CHARACTERS:
                    raise ValueError(f"JSON array: {error.msg} in or after {buffer[place : place + 80]!r}") from error
            except RecursionError as error:
                raise ValueError(f"JSON array: nested too deeply at {buffer[place : place + 80]!r}") from error
            else:
                if end < len(buffer):  # a number at the end of the buffer may go on in the next block
                    element = buffer[place:end]
                    if "\n" in element or "\r" in element:
                        element = LINE_BREAK.sub(" ", element)
                    yield element.encode("utf-8", "surrogateescape") + b"\n"
                    place, between = end, "element"
                    continue
        if ended:
            raise ValueError("damaged or cut off: the JSON array does not end")
        # Twice as much each time, so that a row of many blocks is not parsed once for every block.
        wanted, pieces, read = max(READ_BYTES, len(buffer) - place), [buffer[place:]], 0
        while read < wanted and not ended:
            block = next(blocks, b"")
            ended = not block
            pieces.append(decoder.decode(block, final=ended))
            read += len(block)
        buffer, place = "".join(pieces), 0


def csv_lines(file: IO[bytes], delimiter: str) -> Iterator[bytes]:
    """Rows of a CSV file with a header; every value is text, empty ones are null."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=delimiter)
    try:
        header = next(reader, None)
        if not header or len(set(header)) != len(header):
            raise ValueError(f"its first line must name the columns, each once; got {header}")
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(values)} values for {len(header)} columns")
            yield orjson.dumps({key: value or None for key, value in zip(header, values, strict=True)}) + b"\n"
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"after line {reader.line_num}: not UTF-8: {error.reason}") from error


def text_lines(file: IO[bytes]) -> Iterator[bytes]:
    """A row {text} for each line that is not blank."""
    for number, line in enumerate(file, 1):
        stripped = line.strip(b"\r\n")
        if stripped.strip():
            try:
                yield orjson.dumps({"text": stripped.decode()}) + b"\n"
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number}: not UTF-8: {error.reason}") from error


def parquet_lines(file: IO[bytes], columns: list[str] | None = None) -> Iterator[bytes]:
    """Rows of a Parquet file as lines; of `columns` only, if given, nothing else is read or fetched."""
    yield from map(row_line, parquet_rows(file, columns))


def parquet_rows(
    file: IO[bytes],
    columns: list[str] | None = None,
    *,
    rows_at_once: int = PARQUET_BATCH_ROWS,
    buffer_bytes: int = 0,
) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, read batch by batch; ValueError where it is damaged or lacks a column.

    `buffer_bytes`: read so much of each column at a time, for rows that are large; 0 reads ahead.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=not buffer_bytes, buffer_size=buffer_bytes)
        missing = set(columns or ()) - set(table.schema_arrow.names)
        if missing:
            raise ValueError(f"has no column {', '.join(sorted(missing))}, only {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(rows_at_once, columns=columns):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"damaged, or no Parquet file: {error}") from error


def row_line(row: dict[str, Any]) -> bytes:
    """A row as one line of JSON: bytes in base64, lone surrogates kept, what JSON does not know as text."""
    try:
        return orjson.dumps(row, default=plain_value, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)
    except TypeError:  # lone surrogates, and integers beyond 64 bits
        return json.dumps(row, default=plain_value).encode() + b"\n"


def plain_value(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    return value.tolist() if hasattr(value, "tolist") else str(value)
