"""Rows with images on disk: images stay encoded as they came, and are decoded when a row is read, one row at a time.

An image inside a row is written as {"$image": its number among the row's images, "as": what it was}:

    picture     a PIL image
    feature     an image that Hugging Face datasets would have decoded
    bytes       a dict {bytes, path}, which stays one
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import orjson
import pyarrow as pa
import xxhash

from mixture.shards import MEGABYTE

Kind = Literal["picture", "feature", "bytes"]
Row = Mapping[str, Any]

SCHEMA = pa.schema(
    [
        # The row of the dataset module that it is.
        pa.field("sample_id", pa.string(), nullable=False),
        # The data set it comes from.
        pa.field("source", pa.string(), nullable=False),
        # The row as JSON, with numbers in place of its images.
        pa.field("row", pa.large_binary(), nullable=False),
        # The images as files: PNG, JPEG, TIFF or what the module gave.
        pa.field("images", pa.large_list(pa.field("item", pa.large_binary(), nullable=False)), nullable=False),
        # Tokens of the row alone, without padding, and how many of them count in the loss.
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("loss_tokens", pa.int32(), nullable=False),
    ]
)
"""Columns of the shards of rows with images: Arrow files, each row a record batch, so that any can be read alone."""

IMAGE = "$image"
IMAGE_COLUMNS = ("image", "images")
"""Columns whose texts are paths of image files, where rows are read by our own collator."""

PNG_MODES = {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}
PLAIN_TYPES = (str, bool, int, float, type(None))


# --- encoded


@dataclass(frozen=True)
class EncodedRow:
    """A row as it is stored."""

    text: bytes
    images: list[bytes]

    def read(self) -> dict[str, Any]:
        """The row as the module gave it, its images decoded. ValueError names the key of one that cannot be."""
        row: dict[str, Any] = restored(orjson.loads(self.text), self.images, "")
        return row


@dataclass
class RowEncoder:
    """Takes the images out of one row after another."""

    features_are_images: bool = False
    """Whether a dict {bytes, path} stands for an image that the module's rows hold decoded."""

    reads_files: bool = False
    """Whether a text in one of IMAGE_COLUMNS is the path of an image."""

    images: list[bytes] = field(default_factory=list)

    def encoded(self, row: Row) -> EncodedRow:
        """The row to be stored; ValueError names the key of what cannot be."""
        self.images = []
        values = {str(key): self.value(value, str(key)) for key, value in row.items()}
        return EncodedRow(orjson.dumps(values), self.images)

    def value(self, value: Any, key: str) -> Any:
        from PIL import Image

        if isinstance(value, Image.Image):
            return self.image(image_file(value), "picture")
        if isinstance(value, Mapping):
            if value.keys() == {"bytes", "path"}:
                return self.feature(value, key)
            return {str(name): self.value(item, f"{key}.{name}") for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item, f"{key}[{place}]") for place, item in enumerate(value)]
        if isinstance(value, str) and self.reads_files and key.partition("[")[0] in IMAGE_COLUMNS:
            return self.image(file_content(Path(value), key), "picture")
        if not isinstance(value, PLAIN_TYPES):
            raise ValueError(
                f"{key}: {type(value).__name__} cannot be stored; rows hold texts, numbers, lists, dicts and images "
                "(of PIL, or {bytes, path})"
            )
        return value

    def feature(self, value: Row, key: str) -> dict[str, Any]:
        """An image that is a dict of its bytes or its path."""
        content = value["bytes"] if value["bytes"] is not None else file_content(Path(str(value["path"])), key)
        if not isinstance(content, bytes):
            raise ValueError(f"{key}: an image's bytes are of type {type(content).__name__}")
        if self.features_are_images or self.reads_files:
            return self.image(content, "feature")
        return {**self.image(content, "bytes"), "path": value["path"]}

    def image(self, content: bytes, kind: Kind) -> dict[str, Any]:
        self.images.append(content)
        return {IMAGE: len(self.images) - 1, "as": kind}


def image_file(image: Any) -> bytes:
    """A PIL image as a file: the one that it was opened from where nobody has read it yet, else without loss."""
    opened = getattr(image, "fp", None)
    if opened is not None and not getattr(image, "is_animated", False):
        opened.seek(0)
        content: bytes = opened.read()
        return content
    buffer = io.BytesIO()
    image.save(buffer, format="PNG" if image.mode in PNG_MODES else "TIFF")
    return buffer.getvalue()


def file_content(path: Path, key: str) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"{key}: no image can be read from {path}: {error.strerror}") from error


def restored(value: Any, images: Sequence[bytes], key: str) -> Any:
    """A stored value with its images decoded."""
    if isinstance(value, dict):
        if IMAGE not in value:
            return {name: restored(item, images, f"{key}.{name}" if key else name) for name, item in value.items()}
        content = images[value[IMAGE]]
        if value["as"] == "bytes":
            return {"bytes": content, "path": value["path"]}
        return decoded(content, value["as"], key)
    if isinstance(value, list):
        return [restored(item, images, f"{key}[{place}]") for place, item in enumerate(value)]
    return value


def decoded(content: bytes, kind: Kind, key: str) -> Any:
    """The PIL image of a file's bytes, as the module's row held it."""
    from PIL import Image, ImageOps

    try:
        image: Any = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{key}: {len(content)} bytes that cannot be decoded as an image: {error}") from error
    # As Hugging Face datasets turn what a camera held sideways.
    return ImageOps.exif_transpose(image) if kind == "feature" else image


def without_decoding(rows: Any) -> tuple[Any, bool]:
    """The rows of a Hugging Face data set with their images left as files, and whether any were to be decoded."""
    features = getattr(rows, "features", None)
    if features is None or getattr(rows, "format", {"type": None})["type"] is not None:
        return rows, False
    from datasets import Features, Image, List

    found = False

    def undecoded(feature: Any) -> Any:
        nonlocal found
        if isinstance(feature, Image):
            found |= feature.decode
            return Image(mode=feature.mode, decode=False)
        if isinstance(feature, List):
            return List(undecoded(feature.feature), length=feature.length)
        if isinstance(feature, dict):
            return {name: undecoded(item) for name, item in feature.items()}
        return feature

    files = Features({name: undecoded(feature) for name, feature in features.items()})
    return (rows.cast(files) if found else rows), found


def holds_image(value: Any) -> bool:
    """Whether a row, or a value in it, holds an image of PIL or one that is a dict {bytes, path}."""
    if isinstance(value, Mapping):
        return value.keys() == {"bytes", "path"} or any(map(holds_image, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds_image, value))
    return type(value).__module__.partition(".")[0] == "PIL"


# --- on disk


@dataclass(frozen=True, slots=True)
class ImageRow:
    """A stored row, with its images still encoded."""

    sample_id: str
    source: str
    content: EncodedRow
    tokens: int
    loss_tokens: int

    def read(self) -> dict[str, Any]:
        """The row as the module gave it, its images decoded."""
        try:
            return self.content.read()
        except ValueError as error:
            raise ValueError(f"row {self.sample_id}, {error}") from error


def shard_file(prepared_folder: Path, split: str, shard: int) -> Path:
    return prepared_folder / "images" / f"{split}-{shard:05d}.arrow"


class ImageRowWriter:
    """Writes the rows of one split, one in memory at a time; a context manager.

    `digest` covers what was added. A shard is closed before it would pass `shard_size_mb`, or holds a single row.
    """

    def __init__(self, prepared_folder: Path, split: str, *, shard_size_mb: int) -> None:
        self.folder = prepared_folder
        self.split = split
        self.shard_bytes = shard_size_mb * MEGABYTE
        self.rows = 0
        self.shards = 0
        self.hash = xxhash.xxh3_128()
        self.file: BinaryIO | None = None
        self.arrow: pa.ipc.RecordBatchFileWriter | None = None
        shard_file(prepared_folder, split, 0).parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ImageRowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close_shard()

    @property
    def digest(self) -> bytes:
        return self.hash.digest()

    def add(self, row: ImageRow) -> None:
        """Append a row."""
        values = (row.sample_id, row.source, row.content.text, row.content.images, row.tokens, row.loss_tokens)
        batch = pa.RecordBatch.from_arrays(
            [pa.array([value], column.type) for value, column in zip(values, SCHEMA, strict=True)], schema=SCHEMA
        )
        for part in (row.content.text, *row.content.images, orjson.dumps([row.tokens, row.loss_tokens])):
            self.hash.update(len(part).to_bytes(8, "little"))
            self.hash.update(part)
        if self.file is not None and self.file.tell() + batch.nbytes > self.shard_bytes:
            self.close_shard()
        if self.file is None:
            self.file = shard_file(self.folder, self.split, self.shards).open("wb")
            self.arrow = pa.ipc.new_file(self.file, SCHEMA)
        assert self.arrow is not None
        self.arrow.write_batch(batch)
        self.rows += 1

    def close_shard(self) -> None:
        """Finish the current file; the next row opens another."""
        if self.arrow is not None and self.file is not None:
            self.arrow.close()
            self.file.close()
            self.arrow = self.file = None
            self.shards += 1


class ImageRows(Sequence[ImageRow]):
    """The rows of one split, read from memory-mapped files: memory stays flat however many there are. Picklable."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)
        self.readers = [pa.ipc.open_file(pa.memory_map(str(path))) for path in self.paths]
        self.ends: list[int] = []
        for reader in self.readers:
            self.ends.append((self.ends[-1] if self.ends else 0) + reader.num_record_batches)

    @classmethod
    def open(cls, prepared_folder: Path, split: str) -> ImageRows:
        """The rows of `split` (`train` or `test`) in a prepared folder; FileNotFoundError if it has no such split."""
        paths = sorted((Path(prepared_folder) / "images").glob(f"{split}-*.arrow"))
        if not paths:
            raise FileNotFoundError(shard_file(Path(prepared_folder), split, 0))
        return cls(paths)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> Any:
        """Row `index`: an int, counted from the end if negative."""
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = next(shard for shard, end in enumerate(self.ends) if index < end)
        first = self.ends[shard - 1] if shard else 0
        (values,) = self.readers[shard].get_batch(index - first).to_pylist()
        content = EncodedRow(values.pop("row"), values.pop("images"))
        return ImageRow(content=content, **values)

    def __iter__(self) -> Iterator[ImageRow]:
        return (self[index] for index in range(len(self)))

    def sample_ids(self) -> Iterator[str]:
        """The sample id of each row, without reading its images."""
        for reader in self.readers:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number).column(0)[0].as_py()

    def __reduce__(self) -> tuple[type[ImageRows], tuple[list[Path]]]:
        return ImageRows, (self.paths,)
