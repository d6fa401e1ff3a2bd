"""Images as files beside rows of JSON: each encoded as it came, stored once, and named by a hash of its bytes.

A part of a message names its image, relative to the folder that holds `images/`:

    {"role": "user", "content": [{"type": "image", "image": "images/ab/ab12....png"}, {"type": "text", "text": "..."}]}
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash

from mixture.whole_files import remove_leftovers, whole_file

FOLDER = "images"
REFERENCE = re.compile(rf"{FOLDER}/[0-9a-f]{{2}}/(?P<hash>[0-9a-f]{{32}})\.[a-z0-9]+")
ENDINGS = {"jpeg": "jpg"}
"""Of files of a format, where it is not the format's name."""
LINKS_REFUSED = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)
"""The other folder is on another disk, or its file system has no hard links, or not that many of one file."""


def is_image_part(part: Any) -> bool:
    """Whether a part of a message's content names a stored image."""
    return (
        isinstance(part, Mapping)
        and part.get("type") == "image"
        and isinstance(part.get("image"), str)
        and REFERENCE.fullmatch(part["image"]) is not None
    )


def image_names(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    """The stored images that messages name, in order."""
    return [
        part["image"]
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if is_image_part(part)
    ]


def image_ending(content: bytes) -> str:
    """The ending for a file of an image, by its format; ValueError where it is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            name = str(image.format).lower()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{len(content)} bytes that cannot be decoded as an image: {error}") from error
    return ENDINGS.get(name, name)


@dataclass(frozen=True)
class ImageFolder:
    """The images below `folder`/images."""

    folder: Path

    @property
    def has_any(self) -> bool:
        """Whether images are here."""
        return any((self.folder / FOLDER).glob("*/*"))

    def store(self, content: bytes) -> str:
        """Keep the bytes of an image, unless they are there; what names it from now on. ValueError: it is no image."""
        name = xxhash.xxh3_128_hexdigest(content)
        reference = f"{FOLDER}/{name[:2]}/{name}.{image_ending(content)}"
        path = self.folder / reference
        # A file of another size was lost half in a power cut: nothing else writes here, and always whole.
        if not path.is_file() or path.stat().st_size != len(content):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                file.write(content)
        return reference

    def read(self, reference: str) -> bytes:
        """The bytes of a stored image; ValueError where they are gone or not what they were."""
        path = self.folder / reference
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"no image can be read from {path}: {error.strerror}") from error
        match = REFERENCE.fullmatch(reference)
        assert match is not None
        if xxhash.xxh3_128_hexdigest(content) != match["hash"]:
            raise ValueError(f"{path} has changed since it was stored: remove it, and prepare the mixture again")
        return content

    def take(self, reference: str, other: ImageFolder) -> None:
        """Have an image that the other folder has: the same file where one disk holds both, else a copy."""
        path, source = self.folder / reference, other.folder / reference
        if path.is_file() and path.stat().st_size == source.stat().st_size:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            os.link(source, path)
        except OSError as error:
            if error.errno not in LINKS_REFUSED:
                raise
            with whole_file(path) as file, source.open("rb") as original:
                shutil.copyfileobj(original, file, 1 << 20)

    def remove_leftovers(self) -> None:
        """Remove the unfinished files of processes of this machine that were killed."""
        for folder in (self.folder / FOLDER).glob("*"):
            remove_leftovers(folder)

    def sizes(self) -> Iterator[int]:
        """The bytes of each image that is here."""
        return (path.stat().st_size for path in (self.folder / FOLDER).glob("*/*"))


@dataclass(frozen=True, kw_only=True)
class ImageCounts:
    """Images of some rows, by source; an image counts wherever it is named."""

    rows: Counter[str]
    """Rows with images."""
    images: Counter[str]


def take_images(lines: Iterable[bytes], target: ImageFolder, other: ImageFolder) -> ImageCounts:
    """Bring the images that canonical samples name from the other folder to the target, where they outlast a power
    cut; those that are there are left alone. FileNotFoundError: one is gone."""
    counts = ImageCounts(rows=Counter(), images=Counter())
    target.remove_leftovers()
    for line in lines:
        if FOLDER.encode() not in line:
            continue
        sample = orjson.loads(line)
        names = image_names(sample.get("messages", ()))
        for name in names:
            target.take(name, other)
        counts.rows[sample["source"]] += bool(names)
        counts.images[sample["source"]] += len(names)
    os.sync()
    return counts
