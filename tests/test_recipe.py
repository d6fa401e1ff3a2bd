"""Reading a mixture's YAML: both dialects, shares at two levels, and every mistake with its line and its cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixture.recipe import Mixture, Total, read_mixture
from settings.yaml_tree import ConfigError

PROJECT = Path(__file__).parent.parent

LIST_DIALECT = """
metadata:
  phase: "pretrain_phase1"

datasets:
  - name: "tinystories"
    mix_ratio: 0.6  # 60%
    max_samples: 50000

  - name: "custom_data"
    mix_ratio: 0.4  # 40%
    max_samples: 30000
"""

MAP_DIALECT = """
total_samples: 100000
output_dir: "/path/to/data/distillation"
category_ratios:
  instruction_chat: 0.35
  code: 0.30
  math_reasoning: 0.25
  factual_qa: 0.10
datasets:
  openhermes: {enabled: true, category: instruction_chat, allocation: 0.40, license: apache-2.0}
  ultrachat: {enabled: true, category: instruction_chat, allocation: 0.40}
  open_orca: {enabled: true, category: instruction_chat, allocation: 0.20, streaming: true}
  the_stack_python: {enabled: true, category: code, allocation: 0.85, filters: {licences: [mit], min_chars: 100}}
  code_contests: {enabled: true, category: code, allocation: 0.15}
  gsm8k: {enabled: true, category: math_reasoning, allocation: 1.0}
  hotpot_qa: {enabled: true, category: factual_qa, allocation: 1.0}
"""


def read(tmp_path: Path, text: str, *overrides: tuple[str, object]) -> Mixture:
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    return read_mixture(path, [(tuple(key.split(".")), value) for key, value in overrides])


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def test_the_list_dialect_loads_as_written(tmp_path: Path) -> None:
    mixture = read(tmp_path, LIST_DIALECT)
    assert [(source.name, source.share, source.max_samples) for source in mixture.sources] == [
        ("tinystories", 0.6, 50_000),
        ("custom_data", 0.4, 30_000),
    ]
    assert mixture.metadata == {"phase": "pretrain_phase1"}
    assert (mixture.name, mixture.total, mixture.layout) == ("mix", None, "mixed")


def test_the_category_dialect_multiplies_ratios_with_allocations(tmp_path: Path) -> None:
    mixture = read(tmp_path, MAP_DIALECT)
    shares = {source.name: source.share for source in mixture.sources}
    assert shares == {
        "openhermes": 0.14,
        "ultrachat": 0.14,
        "open_orca": 0.07,
        "the_stack_python": 0.255,
        "code_contests": 0.045,
        "gsm8k": 0.25,
        "hotpot_qa": 0.1,
    }
    assert mixture.total == Total(rows=100_000)
    assert mixture.output_dir == Path("/path/to/data/distillation")
    assert mixture.sources[0].licence == "apache-2.0"
    assert mixture.sources[3].filters.min_chars == 100
    assert mixture.layout == "both"


def test_disabling_a_dataset_leaves_its_place_to_its_category(tmp_path: Path) -> None:
    mixture = read(tmp_path, MAP_DIALECT, ("datasets.ultrachat.enabled", False))
    shares = {source.name: source.share for source in mixture.sources}
    assert "ultrachat" not in shares
    assert shares["openhermes"] == pytest.approx(0.35 * 2 / 3)
    assert shares["open_orca"] == pytest.approx(0.35 / 3)
    assert sum(shares.values()) == pytest.approx(1)


def test_allocations_that_sum_without_the_disabled_ones_are_right_too(tmp_path: Path) -> None:
    text = MAP_DIALECT.replace("allocation: 0.40}", "allocation: 0.40}\n  extra: {category: code, enabled: false}")
    text = text.replace("enabled: true, category: code, allocation: 0.15", "enabled: false, category: code")
    mixture = read(tmp_path, text.replace("allocation: 0.85", "allocation: 1"))
    assert {source.name: source.share for source in mixture.sources}["the_stack_python"] == 0.3


def test_an_emptied_category_says_what_to_do_and_that_works(tmp_path: Path) -> None:
    text = MAP_DIALECT.replace("gsm8k: {enabled: true", "gsm8k: {enabled: false")
    (problem,) = problems(tmp_path, text)
    assert problem == (
        "mix.yaml:7: no dataset of math_reasoning is enabled, which has 0.25 of the mix: enable gsm8k, or set "
        "math_reasoning: 0 and, in the same proportion, instruction_chat: 0.4667, code: 0.4, factual_qa: 0.1333"
    )
    for old, new in (("chat: 0.35", "chat: 0.4667"), ("code: 0.30", "code: 0.4"), ("reasoning: 0.25", "reasoning: 0")):
        text = text.replace(old, new)
    mixture = read(tmp_path, text.replace("factual_qa: 0.10", "factual_qa: 0.1333"))
    assert sum(source.share or 0 for source in mixture.sources) == pytest.approx(1)


def test_ratios_that_do_not_sum_show_their_sum(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, LIST_DIALECT.replace("0.4 ", "0.5 "))
    assert problem == "mix.yaml:6: mix_ratio must sum to 1, got 1.1 (tinystories 0.6, custom_data 0.5)"
    first, second = problems(tmp_path, MAP_DIALECT.replace("code: 0.30", "code: 0.20").replace("0.85", "0.80"))
    assert first == "mix.yaml:4: category_ratios sum to 0.9 (0.35 + 0.2 + 0.25 + 0.1), not to 1"
    assert "category code: allocation must sum to 1, got 0.95" in second


def test_every_mistake_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    text = LIST_DIALECT.replace("mix_ratio: 0.4", "mix_raito: 0.4").replace("50000", "many") + "sead: 3\n"
    assert problems(tmp_path, text) == [
        "mix.yaml:13: unknown key sead; did you mean seed?",
        "mix.yaml:8: datasets.tinystories.max_samples: expected a whole number, got 'many'",
        "mix.yaml:11: unknown key datasets.custom_data.mix_raito; did you mean datasets.custom_data.mix_ratio?",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("custom_data", "tinystories"), "tinystories is there twice"),
        (('name: "custom_data"', "mix: 1"), "entry 2 needs a name"),
        (("mix_ratio: 0.4", "weight: 0.4"), "unknown key datasets.custom_data.weight"),
        (("    mix_ratio: 0.4  # 40%\n", ""), "datasets.custom_data.mix_ratio is missing, but tinystories give theirs"),
        (("mix_ratio: 0.4", "mix_ratio: -0.4"), "mix_ratio must lie between 0 and 1, got -0.4"),
        (("mix_ratio: 0.4", "share: 0.4"), "unknown key datasets.custom_data.share"),
        (("max_samples: 30000", "max_samples: 0"), "max_samples must be at least 1, got 0"),
        (("max_samples: 30000", "max_epochs: 0"), "max_epochs must be more than 0"),
        (("max_samples: 30000", "streaming: false"), "streaming: false has no meaning"),
        (("max_samples: 30000", "filters: {min_words: 9, max_words: 3}"), "min_words 9 is more than max_words 3"),
        (("max_samples: 30000", "fallback: [{hubb: a/b}]"), "did you mean datasets.custom_data.fallback.0.hub?"),
        (("max_samples: 30000", "path: a.jsonl\n    hub: a/b"), "path is given beside hub"),
        (("max_samples: 30000", "category: ../up"), "category '../up' names a file"),
        (('name: "custom_data"', 'name: "a/b"'), "name 'a/b' names a file"),
        (("metadata:", "total: lots\nmetadata:"), "total: expected a number of rows"),
        (("metadata:", "total: 5\ntotal_samples: 6\nmetadata:"), "total_samples is given beside total"),
        (("metadata:", "split: {train: 0.9, validation: 0.2}\nmetadata:"), "split: the shares sum to 1.1"),
        (("metadata:", "split: {dev: 0.2}\nmetadata:"), "unknown key split.dev"),
        (("metadata:", "short_prompts_first: {tokens: 256, share: 1.5}\nmetadata:"), "must lie between 0 and 1"),
        (("metadata:", "layout: categories\nshort_prompts_first: {tokens: 9}\nmetadata:"), "set layout: both"),
        (("metadata:", "dedup: {priority: [tinystory]}\nmetadata:"), "did you mean tinystories?"),
        (("metadata:", "by: bytes\nmetadata:"), "by: expected one of rows, tokens"),
        (("metadata:", "filters: {min_char: 3}\nmetadata:"), "did you mean filters.min_chars?"),
    ],
)
def test_a_wrong_recipe_names_the_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    found = problems(tmp_path, LIST_DIALECT.replace(*change))
    assert len(found) == 1
    assert message in found[0]
    assert found[0].startswith("mix.yaml:")


@pytest.mark.parametrize("text", ["datasets: []", "datasets: 3", "name: x", "datasets: [a]"])
def test_a_recipe_without_datasets_is_refused(tmp_path: Path, text: str) -> None:
    assert "datasets" in problems(tmp_path, text)[0]


def test_unknown_and_missing_categories_are_named(tmp_path: Path) -> None:
    found = problems(
        tmp_path, MAP_DIALECT.replace("gsm8k: {enabled: true, category: math_", "gsm8k: {category: maths_")
    )
    assert (
        "datasets.gsm8k.category 'maths_reasoning' is not in category_ratios; did you mean math_reasoning?" in found[0]
    )


def test_totals_are_read_in_every_form(tmp_path: Path) -> None:
    for written, total in (
        ("1000", Total(rows=1000)),
        ("{rows: 1e3}", Total(rows=1000)),
        ("{tokens: 2e9}", Total(tokens=2_000_000_000)),
        ("max_without_repeat", Total(without_repeat=True)),
    ):
        assert read(tmp_path, f"total: {written}\n{LIST_DIALECT}").total == total


def test_the_command_line_overrides_totals_and_entries(tmp_path: Path) -> None:
    mixture = read(tmp_path, MAP_DIALECT, ("total-samples", 1000), ("output-dir", "elsewhere"))
    assert (mixture.total, mixture.output_dir) == (Total(rows=1000), Path("elsewhere"))
    mixture = read(tmp_path, LIST_DIALECT, ("datasets.custom_data.max_samples", 5))
    assert mixture.sources[1].max_samples == 5


def test_common_filters_apply_where_a_source_says_nothing_else(tmp_path: Path) -> None:
    mixture = read(tmp_path, "filters: {min_chars: 7, min_words: 2}\n" + MAP_DIALECT)
    filters = {source.name: source.filters for source in mixture.sources}
    assert (filters["gsm8k"].min_chars, filters["gsm8k"].min_words) == (7, 2)
    assert (filters["the_stack_python"].min_chars, filters["the_stack_python"].min_words) == (100, 2)


def test_the_held_out_share_has_two_names(tmp_path: Path) -> None:
    assert read(tmp_path, LIST_DIALECT).held_out == 0.01
    assert read(tmp_path, "split: {validation: 0.05}\n" + LIST_DIALECT).held_out == 0.05
    assert read(tmp_path, "split: {train: 0.9, test: 0.1}\n" + LIST_DIALECT).held_out == 0.1
    assert read(tmp_path, "split: {train: 1}\n" + LIST_DIALECT).held_out == 0


def test_one_dataset_of_a_mixture_keeps_the_rows_that_it_has_in_the_whole(tmp_path: Path) -> None:
    mixture = read(tmp_path, MAP_DIALECT).only("gsm8k")
    assert [(source.name, source.share) for source in mixture.sources] == [("gsm8k", 1.0)]
    assert mixture.total == Total(rows=25_000)
    with pytest.raises(ValueError, match="did you mean gsm8k"):
        read(tmp_path, MAP_DIALECT).only("gsmk8")


@pytest.mark.parametrize("file", sorted((PROJECT / "configs/mixtures").glob("*.yaml")), ids=lambda path: path.name)
def test_mixtures_that_come_along_are_right(file: Path) -> None:
    shares = [source.share for source in read_mixture(file).sources]
    in_full = all(share is None for share in shares)
    assert in_full or sum(share or 0 for share in shares) == pytest.approx(1)
