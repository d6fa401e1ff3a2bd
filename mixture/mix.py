"""How many rows of each source make up a mixture: exact counts, epochs and shortfalls, solved before any writing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from mixture.recipe import Mixture, SourceConfig

MANY_EPOCHS = 4
"""Beyond about four passes repeated rows teach little (Muennighoff et al. 2023, arXiv 2305.16264)."""


ROW_OVERHEAD_BYTES = 200
"""Of a line of JSON beyond its text: id, source, category, roles, quotes."""


@dataclass(frozen=True, kw_only=True)
class Supply:
    """What pass 1 found in one source."""

    read: int
    """Rows read."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason, duplicates included."""
    rows: int
    """Distinct rows left for training."""
    tokens: float
    """Tokens in them, counted or estimated."""
    held_out_rows: int = 0
    """Distinct rows kept out of training."""
    download_bytes: int = 0
    """What has yet to be fetched."""
    text_bytes: int = 0
    """Bytes of text in the rows left for training."""
    short_prompts: int = 0
    """Rows left for training whose prompt is short enough for a first stage of short prompts."""


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """One source's part of the mix."""

    name: str
    category: str | None
    share: float
    """Share of the mix that was asked for, in what `by` counts."""
    supply: Supply
    pool: int
    """Distinct rows to draw from: those left for training, at most max_samples."""
    rows: int
    tokens: int
    held_out_rows: int
    row_share: float
    token_share: float

    @property
    def epochs(self) -> float:
        """How often the pool is gone through."""
        return self.rows / self.pool if self.pool else 0.0

    @property
    def whole_epochs(self) -> int:
        """How often every row of the pool is there."""
        return self.rows // self.pool if self.pool else 0

    @property
    def remainder(self) -> int:
        """Rows of the pool that are there once more than the others."""
        return self.rows - self.whole_epochs * self.pool

    @property
    def shortfall(self) -> int:
        """Rows that are there only because others are repeated."""
        return max(0, self.rows - self.pool)


@dataclass(frozen=True, kw_only=True)
class MixPlan:
    """What a mixture will hold."""

    sources: tuple[PlannedSource, ...]
    by: Literal["rows", "tokens"]
    layouts: int = 1
    """How many times the rows are written: mixed, by category, or both."""
    notes: tuple[str, ...] = ()
    """What a user should know before the data is written."""

    @property
    def rows(self) -> int:
        """Rows of the training split."""
        return sum(source.rows for source in self.sources)

    @property
    def tokens(self) -> int:
        """Tokens of the training split."""
        return sum(source.tokens for source in self.sources)

    @property
    def held_out_rows(self) -> int:
        """Rows of the held-out split."""
        return sum(source.held_out_rows for source in self.sources)

    @property
    def download_bytes(self) -> int:
        """Bytes that have yet to be fetched."""
        return sum(source.supply.download_bytes for source in self.sources)

    @property
    def output_bytes(self) -> int:
        """Bytes of one layout of the mix, about."""
        text = 0.0
        for source in self.sources:
            mean = source.supply.text_bytes / max(1, source.supply.rows) + ROW_OVERHEAD_BYTES
            text += mean * (source.rows + source.held_out_rows)
        return round(text)


def solve(supplies: Mapping[str, Supply], mixture: Mixture) -> MixPlan:
    """The exact number of rows of each source.

    Counts follow the shares by largest remainder, so they sum to the total and each lies within one row of its exact
    share. Shares of tokens are turned into shares of rows by each source's mean tokens a row.

    Raises:
        ValueError: a source has no rows, or fewer than its share needs within its max_epochs; says what would do.
    """
    sources = mixture.sources
    pools = [pool_of(source, supplies[source.name]) for source in sources]
    check_not_empty(sources, supplies)
    tokens_per_row = [Fraction(supplies[source.name].tokens) / supplies[source.name].rows for source in sources]
    shares = row_shares(mixture, pools, tokens_per_row)
    total = total_rows(mixture, shares, pools, tokens_per_row)
    counts = largest_remainder(total, shares)
    check_epochs(mixture, supplies, shares, pools, counts)
    held_out = held_out_counts(mixture, supplies, shares, total)
    tokens = [round(count * mean) for count, mean in zip(counts, tokens_per_row, strict=True)]
    planned = tuple(
        PlannedSource(
            name=source.name,
            category=source.category,
            share=pools[index] / sum(pools) if source.share is None else source.share,
            supply=supplies[source.name],
            pool=pools[index],
            rows=counts[index],
            tokens=tokens[index],
            held_out_rows=held_out[index],
            row_share=counts[index] / total,
            token_share=tokens[index] / max(1, sum(tokens)),
        )
        for index, source in enumerate(sources)
    )
    return MixPlan(
        sources=planned,
        by=mixture.by,
        layouts=2 if mixture.layout == "both" else 1,
        notes=tuple(notes(mixture, planned)),
    )


def pool_of(source: SourceConfig, supply: Supply) -> int:
    return supply.rows if source.max_samples is None else min(supply.rows, source.max_samples)


def check_not_empty(sources: Sequence[SourceConfig], supplies: Mapping[str, Supply]) -> None:
    """Every source must have at least one row to train on."""
    problems = []
    for source in sources:
        supply = supplies[source.name]
        if supply.rows:
            continue
        if not supply.read:
            problems.append(f"datasets.{source.name}: it holds 0 rows; correct its path, or set enabled: false")
            continue
        elsewhere = f"; {supply.held_out_rows} rows are held out" if supply.held_out_rows else ""
        problems.append(
            f"datasets.{source.name}: none of {supply.read:,} rows is left for training ({reasons(supply.dropped)})"
            f"{elsewhere}; loosen what drops them, or set enabled: false"
        )
    if problems:
        raise ValueError("\n".join(problems))


def row_shares(mixture: Mixture, pools: Sequence[int], tokens_per_row: Sequence[Fraction]) -> list[Fraction]:
    """Each source's share of the rows, summing to exactly 1."""
    if all(source.share is None for source in mixture.sources):
        weights = [Fraction(pool) for pool in pools]
    else:
        weights = [Fraction(str(source.share)) for source in mixture.sources]
        if mixture.by == "tokens":
            weights = [weight / mean for weight, mean in zip(weights, tokens_per_row, strict=True)]
    whole = sum(weights)
    return [weight / whole for weight in weights]


def total_rows(
    mixture: Mixture, shares: Sequence[Fraction], pools: Sequence[int], tokens_per_row: Sequence[Fraction]
) -> int:
    """Rows of the whole mix."""
    total = mixture.total
    if total is None:
        return sum(source.max_samples or pool for source, pool in zip(mixture.sources, pools, strict=True))
    if total.without_repeat:
        return largest_total(shares, pools)
    if total.tokens is not None:
        mean = sum(share * per_row for share, per_row in zip(shares, tokens_per_row, strict=True))
        return max(1, round(total.tokens / mean))
    assert total.rows is not None
    return total.rows


def largest_total(shares: Sequence[Fraction], caps: Sequence[int]) -> int:
    """The most rows for which no source's exact share, and so no count, is over its cap."""
    return min(math.floor(cap / share) for cap, share in zip(caps, shares, strict=True))


def largest_remainder(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Whole counts that sum to `total`, each its share of it rounded down or up (Hamilton's method)."""
    exact = [total * share for share in shares]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def epoch_cap(source: SourceConfig, pool: int) -> int | None:
    """Most rows that max_epochs allows."""
    return None if source.max_epochs is None else math.floor(pool * Fraction(str(source.max_epochs)))


def check_epochs(
    mixture: Mixture,
    supplies: Mapping[str, Supply],
    shares: Sequence[Fraction],
    pools: Sequence[int],
    counts: Sequence[int],
) -> None:
    """No source may be repeated more often than its max_epochs."""
    total = sum(counts)
    caps = [epoch_cap(source, pool) for source, pool in zip(mixture.sources, pools, strict=True)]
    short = [index for index, cap in enumerate(caps) if cap is not None and counts[index] > cap]
    if not short:
        return
    largest = largest_total(shares, [counts[index] if cap is None else cap for index, cap in enumerate(caps)])
    problems = []
    for index in short:
        source, pool, cap = mixture.sources[index], pools[index], caps[index]
        assert cap is not None
        supply = supplies[source.name]
        lost = f" of {supply.read:,} read ({reasons(supply.dropped)})" if supply.dropped else ""
        problems.append(
            f"datasets.{source.name}: asked for {counts[index]:,} rows, has {pool:,}{lost}, so it would need "
            f"{counts[index] / pool:.2f} epochs; max_epochs {source.max_epochs:g} allows {cap:,} rows. Set its "
            f"max_epochs to {math.ceil(counts[index] / pool * 100) / 100:g}, or lower its share of the rows from "
            f"{float(shares[index]):.4g} to {math.floor(cap / total * 10000) / 10000:.4g}, or total to {largest:,} rows"
        )
    raise ValueError("\n".join(problems))


def held_out_counts(
    mixture: Mixture, supplies: Mapping[str, Supply], shares: Sequence[Fraction], total: int
) -> list[int]:
    """Held-out rows of each source, in the shares of the mix as far as there are rows: they are never repeated."""
    held_out = Fraction(str(mixture.held_out))
    wanted = largest_remainder(round(total * held_out / (1 - held_out)), shares)
    return [
        min(count, supplies[source.name].held_out_rows) for source, count in zip(mixture.sources, wanted, strict=True)
    ]


def notes(mixture: Mixture, planned: Sequence[PlannedSource]) -> list[str]:
    """What a user should know before the data is written."""
    lines = []
    for config, source in zip(mixture.sources, planned, strict=True):
        if not source.rows:
            lines.append(f"{source.name}: its share of {source.share:.2%} is less than one row")
        if config.max_samples is not None and source.pool < config.max_samples and source.rows > source.pool:
            lines.append(f"{source.name}: has {source.pool:,} rows of the {config.max_samples:,} in max_samples")
        if source.epochs > MANY_EPOCHS:
            lines.append(
                f"{source.name}: every row is repeated about {source.epochs:.1f} times; max_epochs would forbid it, "
                "total: max_without_repeat would avoid it"
            )
    return lines


# --- showing


def render_plan(plan: MixPlan) -> str:
    """The plan as plain aligned text: a line for each source, then drops by reason, sizes and notes."""
    header = ("source", "category", "asked", "read", "dropped", "left", "epochs", "rows", "", "tokens", "", "held out")
    lines = [header, *(source_line(source) for source in plan.sources)]
    lines.append(
        (
            "total",
            "",
            f"by {plan.by}",
            f"{sum(source.supply.read for source in plan.sources):,}",
            f"{sum(sum(source.supply.dropped.values()) for source in plan.sources):,}",
            f"{sum(source.pool for source in plan.sources):,}",
            "",
            f"{plan.rows:,}",
            "",
            f"{plan.tokens:,}",
            "",
            f"{plan.held_out_rows:,}",
        )
    )
    if not any(source.category for source in plan.sources):
        lines = [(line[0], *line[2:]) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [aligned(line, widths, texts=2 if lines[0][1] == "category" else 1) for line in lines]
    text += [
        f"{source.name} dropped: {reasons(source.supply.dropped)}" for source in plan.sources if source.supply.dropped
    ]
    disk = [size(plan.output_bytes * layouts) for layouts in (plan.layouts, plan.layouts + 1)]
    text.append(f"download {size(plan.download_bytes)}; disk about {disk[0]}, {disk[1]} while it is made")
    return "\n".join(text + [f"note: {note}" for note in plan.notes])


def source_line(source: PlannedSource) -> tuple[str, ...]:
    return (
        source.name,
        source.category or "",
        f"{source.share:.2%}",
        f"{source.supply.read:,}",
        f"{sum(source.supply.dropped.values()):,}",
        f"{source.pool:,}",
        f"{source.epochs:.2f}",
        f"{source.rows:,}",
        f"{source.row_share:.2%}",
        f"{source.tokens:,}",
        f"{source.token_share:.2%}",
        f"{source.held_out_rows:,}",
    )


def aligned(cells: Sequence[str], widths: Sequence[int], *, texts: int) -> str:
    """The first `texts` cells to the left, numbers to the right."""
    padded = [
        cell.ljust(width) if column < texts else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def reasons(dropped: Mapping[str, int]) -> str:
    """Counts of rows left out, the largest first."""
    ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in ordered) or "nothing dropped"


def size(count: float) -> str:
    """Bytes in decimal units, as download pages give them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
