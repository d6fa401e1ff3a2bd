"""The solver: exact counts by largest remainder, caps, totals of every kind, and the table that shows them."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from mixture.mix import Supply, largest_remainder, largest_total, render_plan, solve
from mixture.recipe import Mixture, SourceConfig, Total


def mixture(*sources: SourceConfig, **keys: object) -> Mixture:
    return Mixture(name="test", sources=sources, **{"held_out": 0.0, **keys})  # type: ignore[arg-type]


def source(name: str, share: float | None, **keys: object) -> SourceConfig:
    return SourceConfig(name=name, share=share, **keys)  # type: ignore[arg-type]


def supply(rows: int, tokens_per_row: float = 100, **keys: object) -> Supply:
    return Supply(**{"read": rows, "rows": rows, "tokens": rows * tokens_per_row, **keys})  # type: ignore[arg-type]


def counts(plan) -> dict[str, int]:  # type: ignore[no-untyped-def]
    return {item.name: item.rows for item in plan.sources}


def test_the_toy_example_gives_48000_and_32000() -> None:
    toy = mixture(source("tinystories", 0.6, max_samples=50_000), source("custom_data", 0.4, max_samples=30_000))
    plan = solve({"tinystories": supply(2_000_000), "custom_data": supply(30_000)}, toy)
    assert counts(plan) == {"tinystories": 48_000, "custom_data": 32_000}
    custom = plan.sources[1]
    assert (custom.pool, custom.whole_epochs, custom.remainder, custom.shortfall) == (30_000, 1, 2_000, 2_000)


def test_counts_always_sum_and_lie_within_one_row_of_their_share() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        weights = [draw.randint(0, 1000) for _ in range(draw.randint(1, 12))] + [1]
        shares = [Fraction(weight, sum(weights)) for weight in weights]
        total = draw.randint(1, 10 ** draw.randint(1, 12))
        rows = largest_remainder(total, shares)
        assert sum(rows) == total
        assert all(abs(count - total * share) < 1 for count, share in zip(rows, shares, strict=True))


def test_the_largest_mix_without_repeat_uses_up_a_source_and_exceeds_none() -> None:
    draw = random.Random(2)
    for _ in range(500):
        weights = [draw.randint(1, 50) for _ in range(draw.randint(1, 5))]
        shares = [Fraction(weight, sum(weights)) for weight in weights]
        caps = [draw.randint(100, 400) for _ in weights]
        total = largest_total(shares, caps)
        assert all(count <= cap for count, cap in zip(largest_remainder(total, shares), caps, strict=True))
        assert any((total + 1) * share > cap for share, cap in zip(shares, caps, strict=True))


def test_random_mixtures_never_exceed_their_caps() -> None:
    draw = random.Random(3)
    solved = refused = 0
    for _ in range(500):
        names = [f"s{number}" for number in range(draw.randint(1, 6))]
        weights = [draw.randint(1, 20) for _ in names]
        sources = [
            source(
                name,
                weight / sum(weights),
                max_samples=draw.choice([None, draw.randint(1, 500)]),
                max_epochs=draw.choice([None, 1, 1.5, 3]),
            )
            for name, weight in zip(names, weights, strict=True)
        ]
        supplies = {name: supply(draw.randint(1, 1000), draw.randint(1, 500)) for name in names}
        by = draw.choice(["rows", "tokens"])
        total = draw.choice([None, Total(rows=draw.randint(1, 2000)), Total(without_repeat=True)])
        try:
            plan = solve(supplies, mixture(*sources, total=total, by=by))
        except ValueError as error:
            refused += 1
            assert "max_epochs" in str(error)
            continue
        solved += 1
        for config, item in zip(sources, plan.sources, strict=True):
            assert item.pool == min(supplies[config.name].rows, config.max_samples or 10**9)
            assert item.rows == item.whole_epochs * item.pool + item.remainder
            assert config.max_epochs is None or item.rows <= item.pool * config.max_epochs
            assert not (total and total.without_repeat) or item.rows <= item.pool
        if total and total.rows:
            assert plan.rows == total.rows
    assert solved > 100
    assert refused > 50


def test_what_the_error_of_a_short_source_advises_does() -> None:
    supplies = {"math": supply(98_211, read=110_000, dropped={"duplicate": 11_789}), "chat": supply(500_000)}
    asked = mixture(source("math", 0.3, max_epochs=1), source("chat", 0.7), total=Total(rows=400_000))
    with pytest.raises(ValueError, match="math") as caught:
        solve(supplies, asked)
    message = str(caught.value)
    assert "asked for 120,000 rows, has 98,211 of 110,000 read (11,789 duplicate)" in message
    assert "1.22 epochs" in message
    assert "max_epochs to 1.23" in message
    assert "total to 327,370 rows" in message
    largest = mixture(source("math", 0.3, max_epochs=1), source("chat", 0.7), total=Total(rows=327_370))
    assert solve(supplies, largest).sources[0].rows == 98_211
    assert solve(
        supplies, mixture(source("math", 0.3, max_epochs=1.23), source("chat", 0.7), total=Total(rows=400_000))
    )
    with pytest.raises(ValueError, match="98,212 rows"):
        solve(supplies, mixture(source("math", 0.3, max_epochs=1), source("chat", 0.7), total=Total(rows=327_372)))


def test_shares_of_tokens_are_met_in_tokens_and_both_are_told() -> None:
    supplies = {"code": supply(10_000, 2000), "chat": supply(50_000, 200), "math": supply(50_000, 150)}
    sources = [source("code", 0.2), source("chat", 0.5), source("math", 0.3)]
    by_rows = solve(supplies, mixture(*sources, total=Total(rows=10_000)))
    assert [item.rows for item in by_rows.sources] == [2000, 5000, 3000]
    assert [round(item.token_share, 3) for item in by_rows.sources] == [0.734, 0.183, 0.083]
    by_tokens = solve(supplies, mixture(*sources, total=Total(rows=10_000), by="tokens"))
    assert by_tokens.rows == 10_000
    assert [round(item.token_share, 2) for item in by_tokens.sources] == [0.2, 0.5, 0.3]
    sized = solve(supplies, mixture(*sources, total=Total(tokens=5_000_000), by="tokens"))
    assert sized.tokens == pytest.approx(5_000_000, rel=1e-3)


def test_without_shares_every_row_is_there_once() -> None:
    plan = solve({"a": supply(70), "b": supply(31)}, mixture(source("a", None), source("b", None)))
    assert counts(plan) == {"a": 70, "b": 31}
    plan = solve(
        {"a": supply(70), "b": supply(30)}, mixture(source("a", None), source("b", None), total=Total(rows=10))
    )
    assert counts(plan) == {"a": 7, "b": 3}


def test_held_out_rows_follow_the_shares_and_are_never_repeated() -> None:
    supplies = {"a": supply(1000, held_out_rows=300), "b": supply(1000, held_out_rows=5)}
    plan = solve(supplies, mixture(source("a", 0.5), source("b", 0.5), total=Total(rows=900), held_out=0.1))
    assert [item.held_out_rows for item in plan.sources] == [50, 5]


def test_a_source_without_rows_is_named_with_its_reasons() -> None:
    supplies = {"empty": supply(0), "strict": supply(0, read=12, dropped={"too short": 12}), "good": supply(5)}
    with pytest.raises(ValueError, match="empty") as caught:
        solve(supplies, mixture(source("empty", 0.3), source("strict", 0.3), source("good", 0.4)))
    assert "datasets.empty: it holds 0 rows" in str(caught.value)
    assert "datasets.strict: none of 12 rows is left for training (12 too short)" in str(caught.value)


def test_the_table_shows_what_was_asked_kept_and_dropped() -> None:
    supplies = {
        "gsm8k": supply(7000, read=7473, dropped={"duplicate": 473}, download_bytes=2_310_000, text_bytes=3_000_000),
        "code": supply(300, 400, text_bytes=400_000),
    }
    plan = solve(supplies, mixture(source("gsm8k", 0.6), source("code", 0.4), total=Total(rows=5000)))
    table = render_plan(plan)
    assert "473 duplicate" in table
    assert "6.67" in table
    assert "download 2.3 MB" in table
    assert "note: code: every row is repeated about 6.7 times" in table
    assert table.splitlines()[3].split() == ["total", "by", "rows", "7,773", "473", "7,300", "5,000", "1,100,000", "0"]
    assert "72.73%" in table  # 2000 x 400 of 3000 x 100 + 2000 x 400 tokens
