"""A mixture's YAML file as checked dataclasses: which sources, in which shares, filtered and split how."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from settings.typed import build, unknown_key
from settings.yaml_tree import ConfigError, ConfigTree, KeyPath, Problem, read_config_file

SUM_TOLERANCE = Fraction(1, 2000)
"""How far written ratios may miss 1, for 0.3333 three times; they are scaled to 1 then."""


FILE_NAME = re.compile(r"[\w-][\w.-]*")
"""What names of sources and categories may be, as files and folders are named by them."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which rows of a source are left out. Lengths are those of a sample's text, all turns together."""

    min_chars: int | None = None
    """Shorter rows are dropped."""

    max_chars: int | None = None
    """Longer rows are dropped."""

    min_words: int | None = None
    """Rows with fewer words, parted by white space, are dropped."""

    max_words: int | None = None
    """Rows with more words are dropped."""

    languages: list[str] = field(default_factory=list)
    """Natural languages to keep, as ISO 639-1 codes: [en, de]. Empty: all."""

    licences: list[str] = field(default_factory=list)
    """Licences of rows to keep, in any spelling of their SPDX names. Empty: all."""

    missing_licence: Literal["drop", "keep", "fail"] = "drop"
    """What happens to rows without a licence of their own or of their source, where `licences` is given."""

    min_exchanges: int | None = None
    """Conversations with fewer pairs of question and answer are dropped."""

    quality: list[str] = field(default_factory=list)
    """Names of published sets of quality rules, see mixture/quality.py."""

    def __post_init__(self) -> None:
        problems = []
        for unit in ("chars", "words"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and high is not None and low > high:
                problems.append(f"min_{unit} {low} is more than max_{unit} {high}, so no row could pass")
        for key in ("min_chars", "max_chars", "min_words", "max_words", "min_exchanges"):
            if (getattr(self, key) or 0) < 0:
                problems.append(f"{key} must be at least 0, got {getattr(self, key)}")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class FallbackConfig:
    """Another place to read a source from, tried where the places before it fail."""

    path: str | list[str] | None = None
    hub: str | None = None
    file: str | list[str] | None = None
    split: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a mixture: where its rows are, its share of the mix, and which of its rows count."""

    name: str
    """Name in reports and in each row's `source`; the dataset module where neither path, hub nor file is given."""

    category: str | None = None
    """Category of the source; its share is then a share of the category's ratio."""

    share: float | None = None
    """Share of the whole mix, categories multiplied in. None for all sources: each row once."""

    path: str | list[str] | None = None
    """Files, folders or globs; relative ones start at the recipe's folder. Paths of images in their rows start at the
    folder of the file that names them."""

    hub: str | None = None
    """Hub data set: ORG/NAME[:CONFIG][@REVISION]."""

    file: str | list[str] | None = None
    """Files inside the hub data set, as patterns; or, without `hub` and `path`, a dataset module's path."""

    split: str | None = None
    """Split to read; the dataset's training split where unset."""

    options: dict[str, Any] = field(default_factory=dict)
    """Keys that the dataset module offers, see DATASETS.md: {language: Python}."""

    fallback: list[FallbackConfig] = field(default_factory=list)
    """Further places, tried in order."""

    max_samples: int | None = None
    """At most this many distinct rows are drawn from."""

    max_epochs: float | None = None
    """How often a row may be repeated; a share that needs more is an error."""

    format: str = "auto"
    """Row format by its name in mixture/formats.py; found per row where `auto`."""

    licence: str | None = None
    """Licence of all rows that name none themselves, as an SPDX name."""

    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which rows are left out."""

    enabled: bool = True
    """Whether the source is in the mix; the others of its category share its place where it is not."""

    def __post_init__(self) -> None:
        problems = []
        for key in ("name", "category"):
            value = getattr(self, key)
            if value is not None and not FILE_NAME.fullmatch(value):
                problems.append(f"{key} {value!r} names a file: letters, digits, _, - and . only, no . in front")
        if self.max_samples is not None and self.max_samples < 1:
            problems.append(f"max_samples must be at least 1, got {self.max_samples}")
        if self.max_epochs is not None and self.max_epochs <= 0:
            problems.append(f"max_epochs must be more than 0, got {self.max_epochs}")
        if self.path is not None and (self.hub is not None or self.file is not None):
            problems.append("path is given beside hub or file; keep one of them")
        if self.share is not None and not 0 <= self.share <= 1:
            problems.append(f"share must lie between 0 and 1, got {self.share}")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Which rows count as the same; the first one stays, by the priority of sources."""

    exact: bool = True
    """Drop rows whose text is the same but for case and white space, in one source or across sources."""

    near: bool = False
    """Drop rows whose text is nearly the same too, by MinHash."""

    similarity: float = 0.8
    """Jaccard similarity of word runs from which two texts are nearly the same."""

    priority: list[str] = field(default_factory=list)
    """Sources that keep a row that others have too, the first the strongest; then the order of `datasets`."""

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1:
            raise ValueError(f"dedup.similarity must be more than 0 and at most 1, got {self.similarity}")


@dataclass(frozen=True, kw_only=True)
class Total:
    """How large the mix is to be: rows, or tokens, or as large as it gets without repeating a row."""

    rows: int | None = None
    tokens: int | None = None
    without_repeat: bool = False


@dataclass(frozen=True, kw_only=True)
class ShortPromptsFirst:
    """A first stage of training with short prompts only."""

    tokens: int
    """Prompts of the first stage are shorter than this."""

    share: float = 0.5
    """Share of each source's rows in the first stage."""

    def __post_init__(self) -> None:
        problems = []
        if self.tokens < 1:
            problems.append(f"short_prompts_first.tokens must be at least 1, got {self.tokens}")
        if not 0 < self.share < 1:
            problems.append(f"short_prompts_first.share must lie between 0 and 1, got {self.share}")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A recipe, checked: what run_mixture makes."""

    name: str
    sources: tuple[SourceConfig, ...]
    """Enabled sources, in the order of the file."""
    folder: Path = Path()
    """Folder of the recipe: relative paths start here."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Free words about the mixture, kept in its lock file."""
    seed: int = 42
    total: Total | None = None
    """None: the sum of max_samples, with all rows of sources that set none."""
    by: Literal["rows", "tokens"] = "rows"
    """What shares count."""
    dedup: DedupConfig = DedupConfig()
    decontaminate: tuple[str, ...] = ()
    """Evaluation files; rows that share text with them are dropped."""
    held_out: float = 0.01
    """Share of rows kept out of training, by a hash of their prompt."""
    short_prompts_first: ShortPromptsFirst | None = None
    allow_non_commercial: bool = False
    layout: Literal["mixed", "categories", "both"] = "mixed"
    """`mixed`: train-*.jsonl, shuffled as a whole. `categories`: CATEGORY/SOURCE.jsonl. Or both."""
    turns: Literal["messages", "conversations"] = "messages"
    """How conversations are written: `messages` [{role, content}], or `conversations` [{from, value}] with human and
    gpt, which holds plain text only."""
    compress: Literal["zstd"] | None = None
    part_megabytes: int = 256
    output_dir: Path | None = None
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer that counts tokens; four bytes are taken for one where unset."""

    def only(self, name: str) -> Mixture:
        """The part of the mixture that one source makes up, with the rows that it has in the whole.

        Raises:
            ValueError: no enabled source has that name.
        """
        names = [source.name for source in self.sources]
        if name not in names:
            raise ValueError(f"--dataset: {unknown_name(name, names)}")
        source = self.sources[names.index(name)]
        total = self.total
        if total is not None and source.share is not None and not total.without_repeat:
            total = Total(rows=scaled(total.rows, source.share), tokens=scaled(total.tokens, source.share))
        share = None if source.share is None else 1.0
        return replace(self, sources=(replace(source, share=share),), total=total)


def scaled(count: int | None, share: float) -> int | None:
    return None if count is None else round(count * Fraction(str(share)))


def unknown_name(name: str, known: Sequence[str]) -> str:
    """The message for a source that the mixture does not have."""
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(known)}"
    return f"the mixture has no dataset {name!r}; {hint}"


# --- reading


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """The top level of a mixture's YAML file, but for `datasets` and the sections that have their own readers."""

    name: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    seed: int = 42
    total: int | str | dict[str, Any] | None = None
    total_samples: int | None = None
    by: Literal["rows", "tokens"] = "rows"
    category_ratios: dict[str, float] = field(default_factory=dict)
    datasets: Any = None
    filters: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: str | list[str] | None = None
    split: dict[str, float] = field(default_factory=dict)
    short_prompts_first: Any = None
    allow_non_commercial: bool = False
    layout: Literal["mixed", "categories", "both"] | None = None
    turns: Literal["messages", "conversations"] = "messages"
    compress: Literal["zstd"] | None = None
    part_megabytes: int = 256
    output_dir: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.total_samples is not None and self.total is not None:
            problems.append("total_samples is given beside total; keep one of them")
        if self.total_samples is not None and self.total_samples < 1:
            problems.append(f"total_samples must be at least 1, got {self.total_samples}")
        if self.part_megabytes < 1:
            problems.append(f"part_megabytes must be at least 1, got {self.part_megabytes}")
        for category, ratio in self.category_ratios.items():
            if not 0 <= ratio <= 1:
                problems.append(f"category_ratios.{category} must lie between 0 and 1, got {ratio}")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class SourceEntry(SourceConfig):
    """One entry of `datasets`: a source with the spellings that files use."""

    share: float | None = field(default=None, metadata={"internal": True})
    fallback: list[Any] = field(default_factory=list)
    mix_ratio: float | None = None
    allocation: float | None = None
    license: str | None = None
    target_samples: int | None = None
    streaming: bool = True
    description: str | None = None

    def __post_init__(self) -> None:
        problems = []
        for key in ("mix_ratio", "allocation"):
            ratio = getattr(self, key)
            if ratio is not None and not 0 <= ratio <= 1:
                problems.append(f"{key} must lie between 0 and 1, got {ratio}")
        for key, other in (("license", "licence"), ("target_samples", "max_samples"), ("mix_ratio", "allocation")):
            if getattr(self, key) is not None and getattr(self, other) is not None:
                problems.append(f"{key} is given beside {other}, which means the same; keep one of them")
        if not self.streaming:
            problems.append("streaming: false has no meaning here: sources are read in pieces, whatever their size")
        try:
            super().__post_init__()
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def ratio(self) -> float | None:
        """The written ratio, in either spelling."""
        return self.mix_ratio if self.allocation is None else self.allocation


def read_mixture(path: Path, overrides: Iterable[tuple[KeyPath, Any]] = ()) -> Mixture:
    """The mixture of one YAML file, with keys from the command line set over it.

    Raises:
        ConfigError: everything wrong with the file, each with its line.
    """
    tree = read_config_file(path)
    problems: list[Problem] = []
    name_entries(tree, problems)
    if problems:
        raise ConfigError(problems)
    for key_path, value in overrides:
        tree.override(tuple(key.replace("-", "_") for key in key_path), value)
    mixture = read_tree(tree, path, problems)
    if problems:
        raise ConfigError(problems)
    assert mixture is not None
    return mixture


def name_entries(tree: ConfigTree, problems: list[Problem]) -> None:
    """Turn the list spelling of `datasets` into the mapping one, lines included."""
    entries = tree.values.get("datasets")
    if entries is None or isinstance(entries, dict):
        return
    if not isinstance(entries, list):
        problems.append(Problem(tree.place(("datasets",)), f"datasets: expected a list or a mapping, got {entries!r}"))
        return
    named: dict[str, Any] = {}
    for number, entry in enumerate(entries):
        here = ("datasets", str(number))
        place = tree.place((*here, "name"))
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            problems.append(Problem(place, f"datasets: entry {number + 1} needs a name, got {entry!r}"))
            continue
        name = entry["name"]
        if name in named:
            problems.append(
                Problem(place, f"datasets: {name} is there twice; give one another name, and `path`, `hub` or `file`")
            )
            continue
        named[name] = {key: value for key, value in entry.items() if key != "name"}
        for path in [path for path in tree.places if path[: len(here)] == here]:
            tree.places[("datasets", name, *path[len(here) :])] = tree.places.pop(path)
        tree.places[("datasets", name)] = place
    tree.values["datasets"] = named


def read_tree(tree: ConfigTree, path: Path, problems: list[Problem]) -> Mixture | None:
    top = build(RecipeFile, tree.values, (), tree, problems)
    total = read_total(tree, problems)
    short_prompts = read_short_prompts(tree, problems)
    entries = read_entries(tree, problems, clean_filters=top is not None)
    if top is None or len(entries) < len(tree.values.get("datasets") or {}):
        return None
    sources = resolved_shares(top, entries, tree, problems)
    held_out = read_split(top.split, tree, problems)
    for name in top.dedup.priority:
        if name not in entries:
            message = f"dedup.priority: {unknown_name(name, list(entries))}"
            problems.append(Problem(tree.place(("dedup", "priority")), message))
    if short_prompts is not None and top.layout == "categories":
        message = (
            "short_prompts_first orders the mixed files, which layout: categories does not write; set layout: both"
        )
        problems.append(Problem(tree.place(("short_prompts_first",)), message))
    if problems:
        return None
    decontaminate = [top.decontaminate] if isinstance(top.decontaminate, str) else top.decontaminate or []
    return Mixture(
        name=top.name or path.stem,
        sources=tuple(sources),
        folder=path.parent.absolute(),
        metadata=top.metadata,
        seed=top.seed,
        total=total,
        by=top.by,
        dedup=top.dedup,
        decontaminate=tuple(decontaminate),
        held_out=held_out,
        short_prompts_first=short_prompts,
        allow_non_commercial=top.allow_non_commercial,
        layout=top.layout or ("both" if top.category_ratios else "mixed"),
        turns=top.turns,
        compress=top.compress,
        part_megabytes=top.part_megabytes,
        output_dir=None if top.output_dir is None else Path(top.output_dir).expanduser(),
        tokenizer=top.tokenizer,
    )


TOTAL_FORMS = "a number of rows, {rows: N}, {tokens: N} or max_without_repeat"


def read_total(tree: ConfigTree, problems: list[Problem]) -> Total | None:
    """`total_samples` or `total`, in any of its forms."""
    value, place = tree.values.get("total"), tree.place(("total",))
    if value is None:
        samples = tree.values.get("total_samples")
        return Total(rows=samples) if isinstance(samples, int) else None
    if value == "max_without_repeat" or value == {"max_without_repeat": True}:
        return Total(without_repeat=True)
    unit, count = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else ("rows", value)
    whole = isinstance(count, int | float) and not isinstance(count, bool) and count >= 1 and count == int(count)
    if unit in ("rows", "tokens") and whole:
        return Total(rows=int(count)) if unit == "rows" else Total(tokens=int(count))
    problems.append(Problem(place, f"total: expected {TOTAL_FORMS}, got {value!r}"))
    return None


def read_short_prompts(tree: ConfigTree, problems: list[Problem]) -> ShortPromptsFirst | None:
    value, here = tree.values.get("short_prompts_first"), ("short_prompts_first",)
    if value is None:
        return None
    if not isinstance(value, dict):
        message = f"short_prompts_first: expected {{tokens: 256, share: 0.5}}, got {value!r}"
        problems.append(Problem(tree.place(here), message))
        return None
    return build(ShortPromptsFirst, value, here, tree, problems)


def read_split(split: Mapping[str, float], tree: ConfigTree, problems: list[Problem]) -> float:
    """The share that is held out: `validation` or `test`, which mean the same."""
    place = tree.place(("split",))
    if not split:
        return Mixture.held_out
    for name in split:
        if name not in ("train", "validation", "test"):
            message = unknown_key(("split", name), ["train", "validation", "test"])
            problems.append(Problem(tree.place(("split", name)), message))
            return 0.0
    if "validation" in split and "test" in split:
        problems.append(Problem(place, "split: one set is held out; give validation or test, not both"))
    held_out = sum(share for name, share in split.items() if name != "train")
    held_out = 1 - split["train"] if len(split) == 1 and "train" in split else held_out
    total = held_out + split.get("train", 1 - held_out)
    if abs(total - 1) > SUM_TOLERANCE:
        problems.append(Problem(place, f"split: the shares sum to {total:.6g}, not to 1"))
    elif not 0 <= held_out < 1:
        problems.append(Problem(place, f"split: the held-out share must be at least 0 and below 1, got {held_out:g}"))
    return float(held_out)


def read_entries(tree: ConfigTree, problems: list[Problem], *, clean_filters: bool) -> dict[str, SourceEntry]:
    """Every entry of `datasets`, the common `filters` below its own."""
    raw = tree.values.get("datasets") or {}
    if not raw:
        problems.append(Problem(tree.place(("datasets",)), "datasets is missing or empty: list what is to be mixed"))
    common = tree.values.get("filters") if clean_filters else None
    entries: dict[str, SourceEntry] = {}
    for name, values in raw.items():
        here = ("datasets", name)
        if not isinstance(values, dict | None):
            problems.append(Problem(tree.place(here), f"{'.'.join(here)} is a section, got {values!r}"))
            continue
        values = dict(values or {})
        if "share" in values:
            known = [item.name for item in dataclasses.fields(SourceEntry) if item.name != "share"]
            problems.append(Problem(tree.place((*here, "share")), unknown_key((*here, "share"), known)))
            continue
        if isinstance(common, dict) and isinstance(values.get("filters", {}), dict):
            values["filters"] = {**common, **values.get("filters", {})}
        entry = build(SourceEntry, {**values, "name": name}, here, tree, problems)
        if entry is not None:
            fallback = read_fallback(entry.fallback, here, tree, problems)
            entries[name] = replace(entry, fallback=fallback)
    return entries


def read_fallback(
    values: Sequence[Any], here: KeyPath, tree: ConfigTree, problems: list[Problem]
) -> list[FallbackConfig]:
    """Further places of a source: mappings with hub, path, file, split; or plain texts, which name hub data sets."""
    places = []
    for number, value in enumerate(values):
        path = (*here, "fallback", str(number))
        section = {"hub": value} if isinstance(value, str) else value
        if not isinstance(section, dict) or not section:
            message = f"{'.'.join(path)}: expected a hub data set, or a section with hub, path or file, got {value!r}"
            problems.append(Problem(tree.place(path), message))
            continue
        section = {"licence" if key == "license" else key: item for key, item in section.items()}
        if (fallback := build(FallbackConfig, section, path, tree, problems)) is not None:
            places.append(fallback)
    return places


# --- shares


def resolved_shares(
    top: RecipeFile, entries: Mapping[str, SourceEntry], tree: ConfigTree, problems: list[Problem]
) -> list[SourceConfig]:
    """Enabled sources with their shares of the whole mix; sources whose share is 0 are left out."""
    enabled = {name: entry for name, entry in entries.items() if entry.enabled}
    if not enabled:
        problems.append(Problem(tree.place(("datasets",)), "datasets: none is enabled; set enabled: true for one"))
        return []
    if top.category_ratios:
        shares = category_shares(top.category_ratios, entries, tree, problems)
    else:
        shares = group_shares(entries, ("datasets",), "mix_ratio", tree, problems)
    return [source_config(entry, shares.get(name)) for name, entry in enabled.items() if shares.get(name) != 0]


def category_shares(
    ratios: Mapping[str, float], entries: Mapping[str, SourceEntry], tree: ConfigTree, problems: list[Problem]
) -> dict[str, Fraction | None]:
    """Share of the whole mix of each enabled source: its category's ratio times its allocation in it."""
    here = ("category_ratios",)
    total = sum(map(exact, ratios.values()), Fraction())
    if abs(total - 1) > SUM_TOLERANCE:
        listed = " + ".join(f"{ratio:g}" for ratio in ratios.values())
        problems.append(Problem(tree.place(here), f"category_ratios sum to {float(total):g} ({listed}), not to 1"))
    for name, entry in entries.items():
        if entry.enabled and entry.category not in ratios:
            got = "is missing" if entry.category is None else f"{entry.category!r} is not in category_ratios"
            nearest = difflib.get_close_matches(entry.category or "", list(ratios), n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(ratios)}"
            place = tree.place(("datasets", name, "category"))
            problems.append(Problem(place, f"datasets.{name}.category {got}; {hint}"))
    shares: dict[str, Fraction | None] = {}
    empty = []
    for category, ratio in ratios.items():
        members = {name: entry for name, entry in entries.items() if entry.category == category}
        if not any(entry.enabled for entry in members.values()):
            empty += [category] if ratio else []
            continue
        allocations = group_shares(members, ("datasets",), "allocation", tree, problems, label=f"category {category}: ")
        for name, allocation in allocations.items():
            if allocation is None:
                message = f"datasets.{name}.allocation is missing: the share of {category} that it makes up"
                problems.append(Problem(tree.place(("datasets", name)), message))
            else:
                shares[name] = allocation * exact(ratio) / (total or 1)
    if empty:
        problems.append(Problem(tree.place((*here, empty[0])), empty_categories(empty, ratios, entries)))
    return shares


def empty_categories(empty: Sequence[str], ratios: Mapping[str, float], entries: Mapping[str, SourceEntry]) -> str:
    """What is wrong with categories of which no dataset is enabled, and ratios that would do."""
    disabled = [name for name, entry in entries.items() if entry.category in empty]
    left = {category: exact(ratio) for category, ratio in ratios.items() if category not in empty}
    total = sum(left.values(), Fraction())
    scaled_up = (
        ", ".join(f"{category}: {float(ratio / total):.4g}" for category, ratio in left.items()) if total else ""
    )
    one = f"enable {' or '.join(disabled)}" if disabled else "add a dataset"
    return (
        f"no dataset of {', '.join(empty)} is enabled, which {'has' if len(empty) == 1 else 'have'} "
        f"{float(sum(exact(ratios[name]) for name in empty)):g} of the mix: {one}, or set "
        f"{', '.join(f'{name}: 0' for name in empty)}" + (f" and, in the same proportion, {scaled_up}" if total else "")
    )


def group_shares(
    entries: Mapping[str, SourceEntry],
    here: KeyPath,
    key: str,
    tree: ConfigTree,
    problems: list[Problem],
    label: str = "",
) -> dict[str, Fraction | None]:
    """Shares of the enabled entries among themselves; None for all where no entry gives a ratio.

    Ratios must sum to 1 over all entries, or over the enabled ones; what is disabled leaves its place to the others.
    """
    enabled = {name: entry for name, entry in entries.items() if entry.enabled}
    ratios = {name: exact(entry.ratio) for name, entry in entries.items() if entry.ratio is not None}
    missing = [name for name in enabled if name not in ratios]
    if len(missing) == len(enabled):
        return dict.fromkeys(enabled)
    for name in missing:
        message = f"datasets.{name}.{key} is missing, but {', '.join(ratios)} give theirs"
        problems.append(Problem(tree.place((*here, name)), message))
    total = sum(ratios.values(), Fraction())
    of_enabled = sum((ratios[name] for name in enabled if name in ratios), Fraction())
    if missing:
        return {}
    if abs(total - 1) > SUM_TOLERANCE and abs(of_enabled - 1) > SUM_TOLERANCE:
        listed = ", ".join(f"{name} {float(ratio):g}" for name, ratio in ratios.items())
        place = tree.place((*here, next(iter(ratios))))
        problems.append(Problem(place, f"{label}{key} must sum to 1, got {float(total):g} ({listed})"))
        return dict.fromkeys(enabled, Fraction(1, len(enabled)))
    if not of_enabled:
        place = tree.place((*here, next(iter(enabled))))
        problems.append(Problem(place, f"{label}every enabled dataset has {key} 0; give one a larger share"))
        return dict.fromkeys(enabled, Fraction(1, len(enabled)))
    return {name: ratios[name] / of_enabled for name in enabled}


def exact(number: float) -> Fraction:
    """The number as it was written: 0.1 is a tenth."""
    return Fraction(str(number))


def source_config(entry: SourceEntry, share: Fraction | None) -> SourceConfig:
    """The source that an entry of the file means."""
    values = {item.name: getattr(entry, item.name) for item in dataclasses.fields(SourceConfig)}
    values |= {
        "share": None if share is None else float(share),
        "licence": entry.licence or entry.license,
        "max_samples": entry.max_samples or entry.target_samples,
    }
    return SourceConfig(**values)
