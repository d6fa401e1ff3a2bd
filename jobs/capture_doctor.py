"""What the doctor says of a distillation: the tokens of teacher and student, and whether a cache is what it claims."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from distilling.config import DistillationConfig
from jobs.capture_plan import capture_lines
from jobs.capturing import distillation_of, folder_of_cache, key_of_cache
from jobs.distillation_checks import check_tokens_in_full
from jobs.findings import Finding, fine, note, problem
from jobs.plan import count_parameters, plan_of_cache
from jobs.preflight import CheckedRun, visible_gpus
from mixture.prepare import PreparedData, data_key, prepared_folder
from training.shard_folder import capture_progress

if TYPE_CHECKING:
    from distilling.cache import TeacherCache
    from mixture.shards import TokenRow

ROWS_LOOKED_AT = 200
ROWS_ASKED_AGAIN = 4
LARGEST_TEACHER_WITHOUT_GPU = 1_000_000_000
"""Parameters; a larger one would keep a login node busy for minutes."""

SAME_ARITHMETIC = 0.02
OTHER_ARITHMETIC = 0.2
"""Nats that log p of a token may differ by on average, with the teacher's numbers in the same format and in another."""

CAPTURE_AGAIN = "remove the cache's folder, and ./train.sh capture makes it again"


def distillation_findings(checked: CheckedRun) -> Iterator[Finding]:
    """What can be seen of a distillation before it trains. Loads tokenizers, and the teacher where that is quick."""
    config = checked.config
    distillation = distillation_of(config)
    if distillation.teacher != "text":
        yield from token_findings(checked)
    key = data_key(checked.preparation)
    folder = folder_of_cache(config, key_of_cache(config, key))
    if folder is None:
        return
    prepared = PreparedData.open(prepared_folder(config.data_folder, key))
    plan = plan_of_cache(config, key, prepared.splits["train"] if prepared else None)
    if plan is not None:
        make_room = "free space there, or name another data_dir"
        words = " ".join(line.strip() for line in capture_lines(plan)[:2])
        yield fine("cache", words, "./train.sh plan has the costs") if plan.fits else problem("cache", words, make_room)
    progress = capture_progress(folder)
    if prepared is None or progress.done != progress.total:
        there = f"{progress.done} of {progress.total} shards" if progress.total else "nothing captured yet"
        yield note("cache", there, "./train.sh capture makes what is missing; ask again then for what is in it")
        return
    yield from cache_findings(distillation, folder, prepared)


def token_findings(checked: CheckedRun) -> Iterator[Finding]:
    """Whether all models of the run read the same tokens, and write conversations the same way."""
    words: list[str] = []
    try:
        check_tokens_in_full(checked.config, words.append)
    except ValueError as error:
        *table, advice = str(error).splitlines()
        yield problem("tokens", " ".join(line.strip() for line in table), advice)
        return
    differing = [line for line in words if "templates differ" in line]
    agreeing = [line for line in words if line not in differing] or ["one tokenizer for all"]
    yield fine("tokens", "; ".join(agreeing), "logits are learned over the smaller of the two output layers")
    if differing:
        yield note("chat template", "; ".join(differing), "the student learns and is exported with that one")
    else:
        yield fine("chat template", "conversations are written one way", "nothing to do")


def cache_findings(distillation: DistillationConfig, folder: Path, prepared: PreparedData) -> Iterator[Finding]:
    """Whether a finished cache belongs to its tokens, sums up, and says what the teacher says now."""
    from distilling.cache import TeacherCache, offset_check  # torch
    from mixture.shards import TokenRows

    try:
        cache = TeacherCache.open(folder)
        rows = list(islice(TokenRows.open(prepared.folder, "train"), ROWS_LOOKED_AT))
        check = offset_check(cache, rows)
    except ValueError as error:
        yield problem("cache", " ".join(str(error).split()), CAPTURE_AGAIN)
        return
    rates = ", ".join(f"{rate:.1%} at {offset:+d}" for offset, rate in check.rates.items())
    found = f"{check.positions:,} tokens of {len(rows)} rows, found among the likely ones {rates}"
    if check.problems:
        yield problem("cache offset and mass", f"{found}; {'; '.join(check.problems)}", CAPTURE_AGAIN)
    else:
        advice = f"probabilities sum to 1 within {check.largest_mass_error:.1g}"
        yield fine("cache offset and mass", found, advice)
    yield fresh_pass_finding(distillation, cache, rows[:ROWS_ASKED_AGAIN])


def fresh_pass_finding(distillation: DistillationConfig, cache: TeacherCache, rows: list[TokenRow]) -> Finding:
    """The teacher asked again for a few rows, against what the cache says of them."""
    about = "teacher asked again"
    parameters = count_parameters(distillation.teacher_model.name)
    if not visible_gpus() and (parameters is None or parameters > LARGEST_TEACHER_WITHOUT_GPU):
        return note(about, "not here: it is large, and there is no GPU", "run the doctor where there is one")
    import numpy as np

    from distilling.capture import kept_of
    from distilling.teacher import load_teacher

    teacher = load_teacher(distillation.teacher_model)
    fresh = np.concatenate([row.label_logp_N for row in kept_of(teacher, rows, cache.manifest)])
    stored = np.concatenate([cache.kept(row).label_logp_N for row in rows]).astype(np.float32)
    dtype = str(teacher.model.dtype).removeprefix("torch.")
    difference = float(np.abs(fresh - stored).mean())
    allowed = SAME_ARITHMETIC if dtype == cache.manifest.dtype else OTHER_ARITHMETIC
    found = (
        f"log p of {len(fresh)} tokens in {dtype} is {difference:.2g} away from the cache ({cache.manifest.dtype}) "
        "on average"
    )
    if difference > allowed:
        return problem(about, f"{found}, more than {allowed}", CAPTURE_AGAIN)
    return fine(about, found, f"up to {allowed} is rounding")
