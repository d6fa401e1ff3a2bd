"""Distil a teacher into a student: one block of a chain, and the scores after the last.

train(run)      resume the newest valid checkpoint, train to the next boundary, commit a checkpoint
evaluate(run)   compare the student with its teacher, with itself before, and with a control, on the test split
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from distilling.run import DistillationRun
from training.block import (
    BlockStart,
    build_data,
    checkpoint_to_evaluate,
    device_of_process,
    export_trained,
    held_out_scores,
    make_trainer,
    open_prepared,
    placed_to_ask,
    record_evaluation,
    scores_on_test_split,
    train_block,
)
from training.checkpoints import Checkpoint
from training.config import ModelConfig
from training.distributed import Ranks, sum_over_ranks
from training.run import BlockResult

# torch and transformers take seconds to import, and a block with nothing left to do should not wait for them.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from distilling.cache import TeacherCache
    from distilling.live import LiveTeacher
    from distilling.teacher import Teacher
    from training.batches import PackedDataset
    from training.trainer import BlockTrainer


def train(run: DistillationRun) -> BlockResult:
    """Train one block: from the newest valid checkpoint to the next boundary. Nothing left to do: returns at once."""
    return train_block(
        run,
        build_trainer=lambda start: build_trainer(run, start),
        score_block=lambda trainer: held_out_scores(run, trainer, cross_entropy),
        export=lambda end: export_trained(
            run, build_model(run, end, with_projections=False), build_tokenizer(run), end
        ),
    )


def build_trainer(run: DistillationRun, start: BlockStart) -> BlockTrainer:
    from distilling.data import DistillationCollate, source_categories, source_weights

    model = build_model(run, start.checkpoint)
    parts = LossParts()
    weights = source_weights(run.distillation.category_weights, source_categories(run.prepared))
    return make_trainer(
        run,
        start,
        model=model,
        rows=build_data_with_targets(run),
        compute_loss=loss_function(run, model, build_teacher(run), parts),
        collate=DistillationCollate(weights, has_targets=run.distillation.teacher == "cache"),
        objective=objective(run),
        extra_metrics=parts,
    )


def objective(run: DistillationRun) -> str:
    """All that shapes the loss, in words: a checkpoint is resumed under these settings only."""
    settings = {
        key: value
        for key, value in asdict(run.distillation).items()
        if key not in ("cache", "answers", "control", "shard_teacher")
    }
    return json.dumps({**settings, "cache": run.cache.name if run.cache else None}, sort_keys=True)


# --- student, teacher, data


def build_model(run: DistillationRun, start: Checkpoint | None, *, with_projections: bool = True) -> torch.nn.Module:
    """The student as the chain left it, or as it begins. Its forward pass returns the loss: see `compute_loss`."""
    from distilling.hidden_states import add_projections, load_projections
    from distilling.student import use_distillation_loss
    from training import models
    from training.adapters import is_adapter

    student = models.build_model(
        student_model(run), seed=run.seed, checkpoint=start.path if start else None, layers=kept_layers(run)
    )
    network: Any = student.get_base_model() if is_adapter(student) else student
    use_distillation_loss(network, vocabulary=shared_vocabulary(run))
    if run.distillation.hidden_states.weight and with_projections:
        width = teacher_shape(run).hidden_size
        add_projections(network, matched_layers(run), teacher_width=width, has_adapter=network is not student)
        if start:
            load_projections(network, start.path)
    return student


def student_model(run: DistillationRun) -> ModelConfig:
    """The model that the student begins as; cut from the teacher it carries the teacher's name."""
    if run.distillation.from_teacher is None:
        return run.model
    teacher = run.distillation.teacher_model
    return replace(run.model, name=teacher.name, revision=teacher.revision)


def kept_layers(run: DistillationRun) -> list[int] | None:
    """The teacher's layers that a student cut from it begins with."""
    cut = run.distillation.from_teacher
    if cut is None:
        return None
    if cut.layers is not None:
        return cut.layers
    depth = teacher_shape(run).num_hidden_layers
    assert cut.every is not None
    kept = max(2, -(-depth // cut.every))
    return sorted({round(number * (depth - 1) / (kept - 1)) for number in range(kept)})


def teacher_shape(run: DistillationRun) -> Any:
    """Depth, width and vocabulary of the teacher, as its config.json has them."""
    from training.models import load_model_config

    teacher = run.distillation.teacher_model
    model = ModelConfig(name=teacher.name, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    return load_model_config(model).get_text_config()


def shared_vocabulary(run: DistillationRun) -> int | None:
    """The tokens that both heads have; what a head has beyond them is padding. None where there is no teacher."""
    from training.models import load_model_config

    if run.distillation.teacher not in ("cache", "live"):
        return None
    student = load_model_config(student_model(run)).get_text_config()
    return min(student.vocab_size, teacher_shape(run).vocab_size)


def matched_layers(run: DistillationRun) -> dict[int, int]:
    """Student layer to teacher layer, where hidden states are matched."""
    from distilling import hidden_states
    from training.models import load_model_config

    if not run.distillation.hidden_states.weight:
        return {}
    layers = kept_layers(run)
    student = load_model_config(student_model(run)).get_text_config()
    return hidden_states.matched_layers(
        run.distillation.hidden_states,
        student_layers=len(layers) if layers else student.num_hidden_layers,
        teacher_layers=teacher_shape(run).num_hidden_layers,
    )


def build_teacher(run: DistillationRun) -> LiveTeacher | None:
    """The teacher beside the student, where it is live."""
    if run.distillation.teacher != "live":
        return None
    from distilling.live import LiveTeacher

    teacher = load_teacher(run)
    vocabulary = shared_vocabulary(run)
    assert vocabulary is not None
    return LiveTeacher(teacher, vocabulary, run.distillation.hidden_states, matched_layers(run))


def load_teacher(run: DistillationRun) -> Teacher:
    """The teacher on this process's device, whole or its share of it."""
    from distilling import teacher

    return teacher.load_teacher(
        run.distillation.teacher_model, device_of_process(), in_shards=run.distillation.shard_teacher
    )


def build_tokenizer(run: DistillationRun) -> PreTrainedTokenizerBase:
    """The tokenizer that made the data: the one that is named, else the teacher's, since its distributions are over
    its tokens."""
    from training.models import load_tokenizer

    if run.model.tokenizer is not None or run.distillation.teacher == "text":
        return load_tokenizer(run.model)
    teacher = run.distillation.teacher_model
    return load_tokenizer(replace(run.model, name=teacher.name, revision=teacher.revision))


def build_data_with_targets(run: DistillationRun) -> PackedDataset:
    """The packs of the train split, with the teacher's targets where they come from its cache."""
    packs = build_data(run, "train")
    if run.distillation.teacher != "cache":
        return packs
    from distilling.cache import TeacherCache
    from distilling.data import TaughtPacks

    assert run.cache is not None
    cache = TeacherCache.open(run.cache)
    if run.distillation.cache.folder is not None:
        require_own_cache(run, cache, packs)
    vocabulary = shared_vocabulary(run)
    assert vocabulary is not None
    return TaughtPacks(packs, cache, run.distillation, vocabulary)


def require_own_cache(run: DistillationRun, cache: TeacherCache, packs: PackedDataset) -> None:
    """Raise ValueError where a cache that the user names is another teacher's, or lacks rows of this data."""
    from distilling.identity import CacheIdentity
    from training.models import load_tokenizer

    teacher, fingerprint = run.distillation.teacher_model, open_prepared(run).fingerprint
    tokenizer = load_tokenizer(replace(run.model, name=teacher.name, revision=teacher.revision, tokenizer=None))
    cache.require(CacheIdentity.of(teacher, tokenizer, data_fingerprint=fingerprint))
    if cache.manifest.identity.data_fingerprint != fingerprint:
        cache.require_rows(packs.rows.sample_ids())


# --- the loss


@dataclass
class LossParts:
    """What the loss was made of since it was last asked."""

    sums: dict[str, Any] = field(default_factory=dict)

    def add(self, **parts: torch.Tensor | None) -> None:
        """Take note of the sums of one batch; they stay on the device."""
        for name, value in parts.items():
            if value is not None:
                self.sums[name] = self.sums.get(name, 0) + value

    def take(self) -> dict[str, float]:
        """Means over the supervised tokens of all processes, in nats; on every process."""
        names = sorted(self.sums)
        totals = sum_over_ranks(*(float(self.sums[name]) for name in names))
        self.sums = {}
        found = dict(zip(names, totals, strict=True))
        tokens = found.pop("tokens", 0.0)
        return {name: value / tokens for name, value in found.items()} if tokens else {}

    def forget_passes(self) -> None:
        self.sums = {}


def loss_function(
    run: DistillationRun, student: torch.nn.Module, teacher: LiveTeacher | None, parts: LossParts
) -> Callable[[torch.nn.Module, dict[str, Any], torch.Tensor], torch.Tensor]:
    """`compute_loss` of this run."""
    from distilling.student import loss_settings

    settings = loss_settings(run.distillation)
    students_turn = students_turns(run, student)

    def loss(model: torch.nn.Module, batch: dict[str, Any], num_items: torch.Tensor) -> torch.Tensor:
        written = students_turn(batch) if students_turn else None
        if written is None:
            return compute_loss(model, batch, num_items, settings=settings, teacher=teacher, parts=parts)
        # The teacher alone says what is right; the micro-batch weighs as much as with its own answers.
        items = num_items * num_labels(written) / num_labels(batch).clamp(min=1)
        alone = replace(settings, weight=1.0)
        return compute_loss(model, written, items, settings=alone, teacher=teacher, parts=parts)

    return loss


def students_turns(run: DistillationRun, student: Any) -> Callable[[dict[str, Any]], dict[str, Any] | None] | None:
    """What writes a micro-batch's answers anew where it is the student's turn, and gives None where it is not.

    Turns and answers are drawn from torch's random state, which checkpoints keep.
    """
    config = run.distillation.on_policy
    if not config.share:
        return None
    import torch

    from distilling.on_policy import students_answers
    from training.frozen_shards import in_step
    from training.models import stop_token_ids

    stops = stop_token_ids(student, build_tokenizer(run))

    def written(batch: dict[str, Any]) -> dict[str, Any] | None:
        is_students_turn = bool(torch.rand(()) < config.share)
        # The student itself, not what wraps it for training on several processes, whose turns differ.
        with in_step(student):
            if not is_students_turn:
                return None
            return students_answers(student, stops, batch, config, max_length=run.dataset.max_length)

    return written


def num_labels(batch: dict[str, Any]) -> torch.Tensor:
    """Supervised tokens of a batch."""
    return (batch["labels"] != -100).sum()


def compute_loss(
    model: torch.nn.Module,
    batch: dict[str, Any],
    num_items: torch.Tensor,
    *,
    settings: Any,
    teacher: LiveTeacher | None,
    parts: LossParts,
) -> torch.Tensor:
    """(1 - weight) x cross entropy + weight x T^2 x divergence of the supervised tokens, divided by `num_items`.

    Summed over the batch; `num_items` counts the supervised tokens of an optimizer step over micro-batches and ranks,
    so that neither changes the loss. The student's forward pass computes it, in chunks (distilling/divergences.py).
    """
    hidden_states = None
    targets = batch.pop("teacher", None)
    if targets is not None:
        targets = targets.to(batch["input_ids"].device)
    elif teacher is not None:
        targets, hidden_states = teacher.of_batch({key: batch[key] for key in batch if key != "token_weights"})
    output = model(
        **batch, settings=settings, teacher=targets, hidden_states=hidden_states, num_items_in_batch=num_items
    )
    parts.add(tokens=num_labels(batch), cross_entropy=output.cross_entropy, divergence=output.divergence,
              hidden_states_distance=output.hidden_states_distance)  # fmt: skip
    return output.loss


def cross_entropy(model: torch.nn.Module, batch: dict[str, Any], num_items: torch.Tensor) -> torch.Tensor:
    """Cross entropy with the data alone, which all students can be compared by."""
    from distilling.student import CROSS_ENTROPY

    return model(**batch, settings=CROSS_ENTROPY, num_items_in_batch=num_items).loss


# --- scores


def evaluate(run: DistillationRun) -> dict[str, Any]:
    """Score the newest valid checkpoint and write evaluation.json.

    The test loss as for any model, and in `models` the distance from the teacher of the student, of the student before
    training and of the control, each with its perplexity and calibration, by category.
    """
    ranks = Ranks.of_environment()
    checkpoint = checkpoint_to_evaluate(run, ranks)
    student = placed_to_ask(run, build_model(run, checkpoint, with_projections=False))
    comparison = compare_with_teacher(run, student, ranks)
    # Last, as it turns the weights into the precision that answers are written in.
    result = {
        **scores_on_test_split(run, student, build_tokenizer(run), cross_entropy, checkpoint, ranks),
        **comparison,
    }
    record_evaluation(run, result, ranks)
    return result


def compare_with_teacher(run: DistillationRun, student: Any, ranks: Ranks) -> dict[str, Any]:
    """`models`: for teacher, student, student before and control, the scores of each category of the test split."""
    from distilling.data import source_categories
    from distilling.evaluation import compare
    from training.models import precision

    if not open_prepared(run).splits.get("test"):
        return {}
    before = placed_to_ask(run, build_model(run, None, with_projections=False))
    models = {"student": student, "student before": before}
    if run.distillation.control:
        models["control"] = placed_to_ask(run, build_control(run))
    teacher = None
    if run.distillation.teacher in ("cache", "live"):
        teacher = load_teacher(run).model
    scores = compare(
        models,
        teacher,
        build_data(run, "test"),
        vocabulary=shared_vocabulary(run),
        categories=source_categories(run.prepared),
        batch_size=run.evaluation.batch_size or run.training.batch_size,
        precision=precision(run.model),
        ranks=ranks,
    )
    return {"models": scores}


def build_control(run: DistillationRun) -> Any:
    """The model that the student is compared with: a run's export, or any folder or hub id of a model."""
    from training import models

    assert run.distillation.control is not None
    export = run.folder.path.parent / run.distillation.control / "export"
    name = str(export) if export.is_dir() else run.distillation.control
    return models.build_model(replace(run.model, name=name, revision=None, from_scratch=False, peft=False), seed=0)
