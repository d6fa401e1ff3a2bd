"""Rows with images: cross entropy of what an image-text model is to write about them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phases import texts
from training.block import (
    BlockStart,
    build_data,
    export_trained,
    held_out_scores,
    loss_on_test_split,
    make_trainer,
    placed_to_ask,
)
from training.checkpoints import Checkpoint
from training.distributed import Ranks
from training.run import FinetuningRun

if TYPE_CHECKING:
    import torch
    from transformers import ProcessorMixin

    from training.trainer import BlockTrainer
    from training.vision import ImageCollate


def build_trainer(run: FinetuningRun, start: BlockStart) -> BlockTrainer:
    from training.sharding import network_of

    refuse_what_texts_alone_can(run)
    model = build_model(run, start.checkpoint)
    if run.training.parallelism == "fsdp":
        # A layer's gradients are summed once that of its input is there, and last of all where none is wanted. Below an
        # adapter none is of texts: the processes would sum in different orders.
        network_of(model).enable_input_require_grads()
    return make_trainer(
        with_unused_parameters(run),
        start,
        model=model,
        rows=build_data(run, "train"),
        compute_loss=compute_loss,
        objective=run.finetuning.objective,
        collate=image_collate(run),
    )


def refuse_what_texts_alone_can(run: FinetuningRun) -> None:
    """Raise ValueError for settings that rows with images cannot follow; only prepared data tells whether there are."""
    problems = []
    if run.training.parallelism == "deepspeed":
        problems.append(
            "training.parallelism: deepspeed sums gradients in the order in which a process has them, and one whose "
            "rows hold no image has none of what sees; use ddp, or fsdp where the model is too large for one GPU"
        )
    if run.evaluation.lm_eval is not None:
        problems.append(
            "evaluation.lm_eval: its tasks are asked of a model that was trained on texts, and the rows hold images; "
            "leave it out"
        )
    if problems:
        raise ValueError("\n".join(problems))


def with_unused_parameters(run: FinetuningRun) -> FinetuningRun:
    """The run, told that some batches leave a part of the model out: texts without images, and the heads of vision
    towers that the language model does not read."""
    arguments = {"ddp_find_unused_parameters": True, **run.training.arguments}
    return replace(run, training=replace(run.training, arguments=arguments))


def compute_loss(model: torch.nn.Module, batch: dict[str, Any], num_items: torch.Tensor) -> torch.Tensor:
    """The loss of texts, also where what sees is in shards and has a gradient on those processes alone whose rows hold
    images: it counts as zero on the others, and as none, which an optimizer passes over, where no row holds any."""
    from torch.distributed.fsdp import FSDPModule

    from training.distributed import agree_on_any

    if isinstance(model, FSDPModule):
        (any_sees,) = agree_on_any(any(name.startswith("pixel_values") for name in batch))
        model.set_reduce_scatter_unused_params(any_sees)
    return texts.compute_loss(model, batch, num_items)


def build_model(run: FinetuningRun, start: Checkpoint | None) -> torch.nn.Module:
    """The model as the chain left it, or as it begins. Its forward pass returns the loss."""
    from training.vision import let_texts_pass

    network = texts.build_model(run, start, reads_images=True)
    let_texts_pass(network)
    return network


def build_processor(run: FinetuningRun) -> ProcessorMixin:
    """The processor that made the data."""
    from training.models import load_processor

    return load_processor(run.model)


def image_collate(run: FinetuningRun) -> ImageCollate:
    """What makes batches of rows with images: the dataset module's collator, or ours where it has none."""
    from mixture.image_preparation import collator_for
    from training.vision import ImageCollate

    collate, _ = collator_for(run.module, build_processor(run), run.dataset)
    return ImageCollate(collate, filler=build_data(run, "train")[0][0])


def block_scores(run: FinetuningRun, trainer: BlockTrainer) -> dict[str, float]:
    """Loss and perplexity on the test split."""
    return held_out_scores(run, trainer, compute_loss, image_collate(run))


def scores(run: FinetuningRun, checkpoint: Checkpoint, ranks: Ranks) -> dict[str, Any]:
    """Test loss, and answers about images where the module scores."""
    from mixture.dataset_modules import module_score
    from training.evaluation import as_json
    from training.models import precision
    from training.sharding import convert
    from training.vision import scored_answers_about_images

    refuse_what_texts_alone_can(run)  # settings of the evaluation may have changed on the way
    model = placed_to_ask(run, build_model(run, checkpoint))
    collate = image_collate(run)
    loss = loss_on_test_split(run, model, compute_loss, ranks, collate)
    score = module_score(run.module, unprotected=run.evaluation.unprotected_code) if run.module else None
    generated = None
    if score and run.evaluation.limit:
        generated = scored_answers_about_images(
            convert(model, precision(run.model)),
            build_processor(run),
            build_data(run, "test"),
            collate,
            score,
            config=run.evaluation,
            batch_size=run.evaluation.batch_size or run.training.batch_size,
            ranks=ranks,
        )
    return as_json(loss, generated, step=checkpoint.step, epoch=checkpoint.epoch)


def export(run: FinetuningRun, end: Checkpoint) -> None:
    export_trained(run, build_model(run, end), build_processor(run), end)
