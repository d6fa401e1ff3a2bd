"""A chain goes on beyond its horizon as its user chose, exactly, and only where that was recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from trained_runs import assert_identical, final_weights, train_to_the_end

import finetuning
from training.config import Extension, ExtensionPolicy, TrainingConfig
from training.run import FinetuningRun
from training.schedule import Horizon, chain_learning_rate

MakeRun = Callable[..., FinetuningRun]

ROWS = 40


def rates(training: TrainingConfig) -> list[float]:
    """At every step of a chain of 10 steps an epoch."""
    horizon = Horizon.of(training, num_rows=ROWS, world_size=1)
    return [
        chain_learning_rate(step, peak=training.lr, training=training, horizon=horizon)
        for step in range(horizon.total_steps)
    ]


def settings(lr_scheduler: str, jobs: int, *extensions: Extension, warmup: float = 0.1) -> TrainingConfig:
    return TrainingConfig(
        lr=1e-3,
        batch_size=4,
        total_jobs=jobs,
        warmup=warmup,
        lr_scheduler=lr_scheduler,  # type: ignore[arg-type]
        extensions=list(extensions),
    )


def added(policy: ExtensionPolicy, *, jobs: int, from_step: int) -> Extension:
    return Extension(jobs=jobs, lr_policy=policy, from_step=from_step)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "inverse_sqrt", "constant", "constant_with_warmup"])
def test_no_policy_changes_a_rate_before_the_seam(schedule: str) -> None:
    old = rates(settings(schedule, 2))
    for policy, seam in (("constant", 20), ("rewarm", 20), ("stretch", 20), ("stretch", 13)):
        extended = rates(settings(schedule, 2, added(policy, jobs=3, from_step=seam)))  # type: ignore[arg-type]
        assert extended[:seam] == old[:seam]
        assert len(extended) == 50


def test_constant_keeps_the_rate_that_the_old_horizon_ended_with() -> None:
    after = rates(settings("inverse_sqrt", 2, added("constant", jobs=1, from_step=20)))[20:]
    assert after == [rates(settings("inverse_sqrt", 3, warmup=2))[20]] * 10
    assert rates(settings("constant", 2, added("constant", jobs=3, from_step=20))) == rates(settings("constant", 5))


def test_rewarm_warms_up_from_the_old_end_and_repeats_the_schedule_over_the_added_epochs() -> None:
    after = rates(settings("cosine", 2, added("rewarm", jobs=4, from_step=20)))[20:]
    assert after == rates(settings("cosine", 4))
    assert max(after) == after[4] == 1e-3
    from_above_zero = rates(settings("inverse_sqrt", 2, added("rewarm", jobs=4, from_step=20)))
    old_end = rates(settings("inverse_sqrt", 3, warmup=2))[20]
    assert from_above_zero[20:24] == pytest.approx([old_end + (1e-3 - old_end) * step / 4 for step in range(4)])
    assert from_above_zero[24:] == rates(settings("inverse_sqrt", 4))[4:]


def test_stretch_follows_the_schedule_of_the_longer_horizon_from_the_seam_on() -> None:
    longer = rates(settings("cosine", 5))
    assert rates(settings("cosine", 2, added("stretch", jobs=3, from_step=20)))[20:] == longer[20:]
    assert rates(settings("cosine", 2, added("stretch", jobs=3, from_step=0))) == longer


def test_an_extended_chain_is_extended_again() -> None:
    first, second = added("rewarm", jobs=1, from_step=20), added("stretch", jobs=2, from_step=25)
    twice = rates(settings("cosine", 2, first, second))
    assert twice[:25] == rates(settings("cosine", 2, first))[:25]
    assert twice[25:] == rates(settings("cosine", 5))[25:]


@pytest.mark.parametrize(("policy", "from_step"), [("constant", 10), ("rewarm", 21), ("stretch", 21)])
def test_an_extension_that_begins_nowhere_is_refused(policy: ExtensionPolicy, from_step: int) -> None:
    training = settings("cosine", 2, added(policy, jobs=1, from_step=from_step))
    with pytest.raises(ValueError, match=r"training.extensions: .* a horizon that ended after 20 steps"):
        Horizon.of(training, num_rows=ROWS, world_size=1)


def extended(run: FinetuningRun, *extensions: Extension) -> FinetuningRun:
    return replace(run, training=replace(run.training, extensions=list(extensions)))


STEPS_PER_EPOCH = 7


@pytest.mark.chain
def test_constant_after_a_constant_schedule_equals_one_longer_run_bit_for_bit(make_run: MakeRun) -> None:
    training = {"lr": 1e-3, "lr_scheduler": "constant"}
    longer = make_run("longer", training={**training, "total_jobs": 3})
    run = make_run("run", training={**training, "total_jobs": 1})
    train_to_the_end(longer)
    train_to_the_end(run)
    train_to_the_end(extended(run, added("constant", jobs=2, from_step=STEPS_PER_EPOCH)))
    assert_identical(final_weights(run), final_weights(longer))


@pytest.mark.chain
@pytest.mark.parametrize(("policy", "seam"), [("rewarm", 14), ("stretch", 14), ("stretch", 9)])
def test_an_extended_chain_equals_the_run_that_had_its_extension_from_the_beginning(
    policy: ExtensionPolicy, seam: int, make_run: MakeRun
) -> None:
    extension = added(policy, jobs=2, from_step=seam)
    training = {"lr": 1e-3, "total_jobs": 2, "log_every": 1}
    known = extended(make_run("known", training=training), extension)
    run = make_run("run", training=training)
    finetuning.train(run)
    if seam == 14:
        train_to_the_end(run)
    else:
        stop_at(run, step=seam)
    train_to_the_end(known)
    train_to_the_end(extended(run, extension))
    assert_identical(final_weights(run), final_weights(known))

    seen = {line["step"]: line["lr"] for line in run.folder.metrics()}
    horizon = Horizon.of(known.training, num_rows=13, world_size=1)
    assert len(seen) == horizon.total_steps == 28
    for step in range(28):
        wanted = chain_learning_rate(step, peak=1e-3, training=known.training, horizon=horizon)
        assert seen[step + 1] == pytest.approx(wanted, rel=1e-12), step


def stop_at(run: FinetuningRun, *, step: int) -> None:
    """Have the chain train step by step until it is there."""
    run.folder.stop.touch()
    while finetuning.train(run).step < step:
        pass
    run.folder.stop.unlink()


@pytest.mark.chain
def test_only_what_was_recorded_may_follow_a_checkpoint(make_run: MakeRun) -> None:
    run = make_run("run", training={"lr": 1e-3, "total_jobs": 1})
    train_to_the_end(run)
    recorded = added("rewarm", jobs=2, from_step=STEPS_PER_EPOCH)
    with pytest.raises(ValueError, match=r"horizon_steps: 7 -> 21 .*go on beyond them with ./train.sh extend"):
        finetuning.train(replace(run, training=replace(run.training, total_jobs=3)))
    with pytest.raises(ValueError, match=r"optimization: .* -> lr 0.002"):
        finetuning.train(extended(replace(run, training=replace(run.training, lr=2e-3)), recorded))
    finetuning.train(extended(run, recorded))

    with pytest.raises(ValueError, match="step_00000014 lies beyond the horizon of 7 steps"):
        finetuning.train(run)
    for other in ([added("stretch", jobs=2, from_step=STEPS_PER_EPOCH)], [replace(recorded, jobs=3)]):
        with pytest.raises(ValueError, match="this run is not the one that wrote it"):
            finetuning.train(extended(run, *other))
    again = added("rewarm", jobs=1, from_step=3 * STEPS_PER_EPOCH)
    assert not finetuning.train(extended(run, recorded, again)).finished


def test_the_past_cannot_be_extended(make_run: MakeRun) -> None:
    run = make_run("run", training={"lr": 1e-3, "total_jobs": 1})
    train_to_the_end(run)
    with pytest.raises(ValueError, match="optimization: "):
        finetuning.train(extended(run, added("stretch", jobs=1, from_step=3)))
