"""Train an EAGLE-3 draft head for a frozen target: one block of a chain, and the scores after the last.

train(run)      resume the newest valid checkpoint, train to the next boundary, commit a checkpoint
evaluate(run)   how many guesses of the newest valid checkpoint are accepted: told from the true tokens, and measured
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

from drafting.run import Eagle3Run
from training import block
from training.block import BlockStart, build_data, device_of_process, export_folder, make_trainer, train_block
from training.checkpoints import Checkpoint
from training.distributed import Ranks
from training.run import BlockResult

# torch and transformers take seconds to import, and a block with nothing left to do should not wait for them.
if TYPE_CHECKING:
    import torch

    from drafting.config import Eagle3Config
    from drafting.evaluation import AcceptanceLog, HeldOutAcceptance
    from drafting.model import DraftModel
    from drafting.target import Target
    from training.batches import Collate, PackedDataset
    from training.trainer import BlockTrainer


def train(run: Eagle3Run) -> BlockResult:
    """Train one block: from the newest valid checkpoint to the next boundary. Nothing left to do: returns at once."""
    target = cache(lambda: build_target(run, with_layers=run.eagle3.features == "live"))
    return train_block(
        run,
        build_trainer=lambda start: build_trainer(run, target(), start),
        score_block=lambda trainer: block_scores(run, target(), trainer),
        export=lambda end: export(run, end),
    )


def build_trainer(run: Eagle3Run, target: Target, start: BlockStart) -> BlockTrainer:
    from drafting.evaluation import AcceptanceLog

    if start.ranks.is_main:
        vocabulary = target.vocabulary
        run.folder.record_event("draft_vocabulary", tokens=len(vocabulary), coverage=vocabulary.coverage)
        print(
            f"draft vocabulary: {len(vocabulary)} tokens, {vocabulary.coverage:.2%} of the supervised ones", flush=True
        )
    if run.eagle3.features == "cached":
        prepare_features(run, target, start.ranks)
    log = AcceptanceLog(run.eagle3.steps)
    rows, collate = rows_and_collate(run, target, "train")
    return make_trainer(
        run,
        start,
        model=build_model(run, target, start.checkpoint),
        rows=rows,
        compute_loss=partial(
            compute_loss,
            target=target,
            config=run.eagle3,
            micro_batches=run.training.gradient_accumulation * start.ranks.world_size,
            log=log,
        ),
        objective=objective(run, target),
        collate=collate,
        extra_metrics=log,
        tied_to_split=(
            "eagle3.loss_mean: all_tokens is a mean over each micro-batch"
            if run.eagle3.loss_mean == "all_tokens"
            else None
        ),
    )


def prepare_features(run: Eagle3Run, target: Target, ranks: Ranks) -> None:
    """Have the target's hidden states of all data on the disk; what is there already stays."""
    from drafting.features import write_features
    from training.models import precision

    write_features(
        target,
        partial(build_target, run),
        run.model,
        block.open_prepared(run),
        precision=precision(run.model),
        ranks=ranks,
        report=partial(print, flush=True),
        # A block that does no more than this has got on all the same.
        shard_written=lambda: run.folder.record_event("captured", shards=1),
    )


def rows_and_collate(run: Eagle3Run, target: Target, split: str) -> tuple[PackedDataset, Collate]:
    """The packs of a split, with the target's states where they are cached, and what makes batches of them."""
    from drafting.evaluation import collate_for_draft
    from drafting.features import CollateWithStates, FeaturedPacks, FeatureIdentity, features_folder, splits_of

    if run.eagle3.features == "live":
        return build_data(run, split), collate_for_draft
    prepared = block.open_prepared(run)
    folder = features_folder(prepared, FeatureIdentity.of(target, run.model, prepared))
    features = splits_of(folder, target, prepared)[split]
    return FeaturedPacks(features), CollateWithStates(collate_for_draft, target.states_width, target.network.dtype)


def build_target(run: Eagle3Run, *, with_layers: bool = True) -> Target:
    """The frozen model on this process's device, and the tokens that its draft may guess."""
    from drafting.target import load_target

    return load_target(run.model, block.open_prepared(run), run.eagle3, device_of_process(), with_layers=with_layers)


def build_model(run: Eagle3Run, target: Target, start: Checkpoint | None) -> DraftModel:
    """The draft as the chain left it, or as it begins. Its forward pass returns the loss: see `compute_loss`."""
    from drafting.model import load_draft, new_draft

    shape = target.network.config.get_text_config()
    if start:
        return load_draft(shape, start.path, draft_vocabulary=len(target.vocabulary))
    return new_draft(shape, target.head_VH[target.draft_ids_D], seed=run.seed)


def objective(run: Eagle3Run, target: Target) -> str:
    """All that shapes the loss, in words: a draft of other features, tokens or weights would be another one."""
    settings = run.eagle3
    weights = ", ".join(f"{weight:.6g}" for weight in settings.step_weights)
    return (
        f"eagle3: target {run.model.name} {run.model.revision or ''}, layers {list(target.layers)}, "
        f"step weights {weights}, mean over {settings.loss_mean}, {len(target.vocabulary)} draft tokens "
        f"{target.vocabulary.digest}"
    )


def compute_loss(
    model: torch.nn.Module,
    batch: dict[str, Any],
    num_items: torch.Tensor,
    *,
    target: Target,
    config: Eagle3Config,
    micro_batches: int,
    log: AcceptanceLog,
) -> torch.Tensor:
    """Soft cross entropy of all steps with the target's distributions, summed over the batch, divided by `num_items`.

    `num_items` counts the supervised tokens of an optimizer step over micro-batches and ranks, so that neither changes
    the loss. With `loss_mean: all_tokens` it is the mean over every token of this micro-batch, of which an optimizer
    step averages `micro_batches`.
    """
    from drafting.evaluation import unrolled_loss

    result = unrolled_loss(model, target, batch, step_weights=config.step_weights)
    log.add(result, batch)
    if config.loss_mean == "all_tokens":
        return result.loss / (batch["input_ids"].numel() * micro_batches)
    return result.loss / num_items


def block_scores(run: Eagle3Run, target: Target, trainer: BlockTrainer) -> dict[str, float]:
    """Loss and accepted guesses on the test split, where there is one."""
    if not block.open_prepared(run).splits.get("test"):
        return {}
    scores = held_out(run, target, trainer.model, trainer.ranks, *rows_and_collate(run, target, "test"))
    return {"eval_loss": scores.loss, "eval_acceptance_length": scores.all.simulated_length}


def held_out(
    run: Eagle3Run, target: Target, draft: torch.nn.Module, ranks: Ranks, rows: PackedDataset, collate: Collate
) -> HeldOutAcceptance:
    from drafting.evaluation import held_out_acceptance
    from training.models import precision

    return held_out_acceptance(
        draft,
        target,
        rows,
        step_weights=run.eagle3.step_weights,
        batch_size=run.evaluation.batch_size or run.training.batch_size,
        precision=precision(run.model),
        ranks=ranks,
        collate=collate,
    )


def export(run: Eagle3Run, end: Checkpoint) -> None:
    """Write the draft as engines read it, and say what they would stumble over. Needs no weights of the target."""
    from drafting.export import export_draft
    from drafting.model import load_draft
    from drafting.target import tokens_and_layers
    from training.models import load_model_config, precision

    target = load_model_config(run.model).get_text_config()
    vocabulary, layers = tokens_and_layers(target, block.open_prepared(run), run.eagle3)
    draft = load_draft(target, end.path, draft_vocabulary=len(vocabulary))
    problems = export_draft(
        draft, target, vocabulary, layers, export_folder(run), step=end.step, dtype=precision(run.model)
    )
    for problem in problems:
        run.folder.record_event("export_problem", problem=problem)
        print(f"export: {problem}", flush=True)


def evaluate(run: Eagle3Run) -> dict[str, Any]:
    """Score the newest valid checkpoint and write evaluation.json: accepted guesses by source, told and measured."""
    from drafting.evaluation import collate_for_draft

    ranks = Ranks.of_environment()
    checkpoint = block.checkpoint_to_evaluate(run, ranks)
    target = build_target(run)
    draft = build_model(run, target, checkpoint).to(device_of_process())
    result: dict[str, Any] = {"step": checkpoint.step, "epoch": checkpoint.epoch}
    if block.open_prepared(run).splits.get("test"):
        result |= held_out(run, target, draft, ranks, build_data(run, "test"), collate_for_draft).as_json()
        if run.evaluation.limit:
            result |= measured(run, target, draft, ranks)
    if ranks.is_main:
        for name in (name for name in result if name.startswith("definition_of_")):
            score = name.removeprefix("definition_of_")
            print(f"{score.replace('_', ' ')} {result[score]:.3f}: {result[name]}", flush=True)
        for difference in result.get("divergences", []):
            print(
                f"a greedy answer of {difference['source']} parts from the target's own at token "
                f"{difference['token']}, where its two best logits lie {difference['logit_margin']:.2g} apart",
                flush=True,
            )
    block.record_evaluation(run, result, ranks)
    return result


def measured(run: Eagle3Run, target: Target, draft: DraftModel, ranks: Ranks) -> dict[str, Any]:
    """Held-out prompts really decoded by the draft as it is served, and whether greedy answers are the target's own."""
    from drafting.decoding import Limits
    from drafting.evaluation import held_out_prompts, measured_acceptance
    from mixture.shards import TokenRows
    from training.models import load_tokenizer, precision, stop_token_ids

    return measured_acceptance(
        draft.to(precision(run.model)),
        target,
        held_out_prompts(TokenRows.open(run.prepared, "test"), limit=run.evaluation.limit),
        Limits(
            max_new_tokens=run.evaluation.max_new_tokens,
            stop_ids=frozenset(stop_token_ids(target.network, load_tokenizer(run.model))),
        ),
        chain=run.eagle3.chain,
        temperature=run.eagle3.temperature,
        seed=run.seed,
        ranks=ranks,
    )
