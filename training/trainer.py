"""One block of a chain: transformers.Trainer, told where the block ends and how a checkpoint is committed."""

from __future__ import annotations

import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from training import checkpoints, sharding
from training.adapters import AdapterSteps, save_adapter_state, trained_names
from training.batches import (
    IGNORED,
    ROW_NUMBERS,
    Batch,
    BlockSampler,
    Collate,
    ComputeLoss,
    NumberedPacks,
    PackedDataset,
    collate_numbered,
)
from training.checkpoints import Checkpoint, Progress, ResumeTerms
from training.config import DeepspeedConfig, FsdpConfig, SaveInterval, TrainingConfig
from training.distributed import Ranks, agree_on_any, failing_together, from_main, gather_on_all
from training.ledger import Ledger, RowCounter, refuse_wrong_rows
from training.owner import LostOwnershipError, Owner
from training.run import NonFiniteLossError
from training.run_folder import RunFolder
from training.schedule import Horizon, chain_learning_rate


def training_arguments(
    config: TrainingConfig, *, folder: RunFolder, horizon: Horizon, seed: int, precision: torch.dtype
) -> TrainingArguments:
    """What transformers.Trainer is told. Logging and saving are ours, so its own strategies are off."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.path / "tensorboard"))
    # Every trained parameter takes part in every forward pass: looking for unused ones would cost a walk each time.
    defaults = {"report_to": "tensorboard", "ddp_find_unused_parameters": False}
    arguments = TrainingArguments(
        **{**defaults, **config.arguments},
        output_dir=str(folder.checkpoints),
        seed=seed,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        # The horizon, never the block: the schedule and the data order span the whole chain.
        num_train_epochs=horizon.epochs,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        # The names that every transformers in the lock file knows. None, not False: 5.23 warns of any other value.
        gradient_checkpointing=config.gradient_checkpointing or None,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        bf16=precision == torch.bfloat16,
        fp16=precision == torch.float16,
        # Of DeepSpeed, transformers hears only where it is not told of a device.
        use_cpu=not torch.cuda.is_available() and not uses_deepspeed(config),
        deepspeed=deepspeed_settings(config) if uses_deepspeed(config) else None,
        average_tokens_across_devices=True,
        remove_unused_columns=False,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        # It would read the loss back from the device at every micro-batch.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        log_level="warning",
    )
    if arguments.n_gpu > 1:
        # One process drives one GPU; transformers would split our flat batches over all that it sees.
        arguments._n_gpu = 1
    return arguments


def uses_deepspeed(config: TrainingConfig) -> bool:
    """Whether DeepSpeed trains this block; one process has nothing to spread, and trains without."""
    return config.parallelism == "deepspeed" and distributed.is_initialized()


def deepspeed_settings(config: TrainingConfig) -> dict[str, Any]:
    """DeepSpeed's own config; `auto` is what transformers fills in from its arguments."""
    deepspeed = config.deepspeed or DeepspeedConfig()
    zero = {"stage": deepspeed.stage, **deepspeed.options.get("zero_optimization", {})}
    if deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        # Of torch, as for the other ways; DeepSpeed's own on the CPU would have to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        **deepspeed.options,
        "zero_optimization": zero,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
    }


class ExtraMetrics(Protocol):
    """Further metrics, which the passes of the loss measure, or what comes before a step."""

    def take(self) -> dict[str, float]:
        """Those since the last call; asked on all processes at every line that is logged."""

    def forget_passes(self) -> None:
        """Count nothing of what passes of the loss have measured since the last call."""


@contextmanager
def failing_afterwards(engine: Any) -> Iterator[None]:
    """Have a file that DeepSpeed's engine cannot write fail at the end, as processes wait for each other before."""
    errors: list[Exception] = []
    save = engine.save

    def save_or_note(*arguments: Any, **options: Any) -> None:
        try:
            save(*arguments, **options)
        except Exception as error:
            errors.append(error)

    engine.save = save_or_note
    try:
        yield
    finally:
        engine.save = save
    if errors:
        raise errors[0]


BeginStep = Callable[[list[Batch]], float]
"""Asked on all processes before an optimizer step, with the micro-batches of this one: the items of the step over all
of them, which the loss is divided by."""


@dataclass
class BlockSchedule(TrainerCallback):
    """Decides after every optimizer step whether to log, to save and to end the block."""

    block_end: int
    save_interval: SaveInterval
    log_every: int
    stop_requested: Callable[[], bool]
    keeps_random_states: bool
    """Steps of several micro-batches can be abandoned between them."""

    abandoned_step: bool = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first_step = state.global_step + 1
        self.saved_step = state.global_step
        self.saved_at_s = time.monotonic()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.keeps_random_states:
            self.random_states = random_states()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Between micro-batches: a stop abandons the step, and what was committed last is the step before it."""
        (stop,) = agree_on_any(self.stop_requested())
        if stop:
            restore_random_states(self.random_states)
            self.abandoned_step = True
            control.should_training_stop = True
            control.should_save = state.global_step > self.saved_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        seconds = self.save_interval.seconds
        # Clocks and signals differ between processes; all must save at the same step, and leave at the same step.
        stop, save_time_is_up = agree_on_any(
            self.stop_requested(), seconds is not None and time.monotonic() - self.saved_at_s >= seconds
        )
        save_step = self.save_interval.steps is not None and step % self.save_interval.steps == 0
        control.should_training_stop = step >= self.block_end or stop
        control.should_save = control.should_training_stop or save_step or save_time_is_up
        control.should_log = control.should_save or step % self.log_every == 0 or step == self.first_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved_at_s = time.monotonic()
        self.saved_step = state.global_step


def random_states() -> list[Any]:
    """The states of all generators that training may draw from."""
    devices = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), *devices]


def are_same_states(states: list[Any], others: list[Any]) -> bool:
    (python, numpy_state, *torch_states), (other_python, other_numpy, *other_torch) = states, others
    return (
        python == other_python
        and all(map(np.array_equal, numpy_state, other_numpy))
        and all(map(torch.equal, torch_states, other_torch))
    )


def restore_random_states(states: list[Any]) -> None:
    python_state, numpy_state, cpu_state, *devices = states
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(cpu_state)
    for state in devices:
        torch.cuda.set_rng_state(state)


@dataclass
class CountRows(TrainerCallback):
    """Has the rows of an optimizer step counted once it is completed."""

    rows: RowCounter

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.rows.complete_step()


class BlockTrainer(Trainer):
    """transformers.Trainer for one block. Call `train_block`."""

    def __init__(
        self,
        model: torch.nn.Module,
        rows: PackedDataset,
        loss: ComputeLoss,
        *,
        collate: Collate,
        extra_metrics: ExtraMetrics | None,
        begin_step: BeginStep | None,
        has_adapter: bool,
        adapter: AdapterSteps | None,
        precision: torch.dtype,
        config: TrainingConfig,
        arguments: TrainingArguments,
        horizon: Horizon,
        terms: ResumeTerms,
        tied_to_split: str | None,
        folder: RunFolder,
        ranks: Ranks,
        start: Checkpoint | None,
        owner: Owner | None,
        stop_requested: Callable[[], bool],
    ):
        self.control: TrainerControl
        self.lr_scheduler: LambdaLR | None
        self.loss = loss
        self.collate_packs = partial(collate_numbered, collate=collate)
        self.extra_metrics = extra_metrics
        self.begin_step = begin_step
        self.has_adapter = has_adapter
        self.adapter = adapter
        # As they are called before the model is spread over processes.
        self.trained_names = trained_names(model)
        self.config = config
        self.horizon = horizon
        self.terms = terms
        self.tied_to_split = tied_to_split or (start.tied_to_split if start else None)
        if config.parallelism == "deepspeed":
            self.tied_to_split = "DeepSpeed keeps the optimizer's state by process, for as many as wrote it"
        self.folder = folder
        self.ranks = ranks
        self.start = start
        self.owner = owner
        self.checkpoint = start
        self.ledger = start.ledger if start else Ledger(rows_per_epoch=len(rows))
        self.counter = RowCounter()
        self.logged_loss: float | None = None
        self.tokens_of_step = 0
        self.has_settled_buckets = False
        self.uncounted_tokens = 0
        self.logged_tokens = 0
        self.logged_at_s: float | None = None
        start_step = start.step if start else 0
        self.schedule = BlockSchedule(
            block_end=horizon.block_end(start_step),
            save_interval=config.save_interval,
            log_every=config.log_every,
            stop_requested=stop_requested,
            keeps_random_states=config.gradient_accumulation > 1,
        )
        if config.parallelism == "fsdp":
            # Before it is moved: the device may have no room for the whole model.
            sharding.shard(model, config.fsdp or FsdpConfig(), device=arguments.device, precision=precision)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=self.collate_packs,
            callbacks=[CountRows(self.counter), self.schedule, *([adapter] if adapter else [])],
        )
        self.remove_callback(PrinterCallback)
        # Placed already, and not to be wrapped for DDP.
        self.is_distributed_loading_by_transformers = sharding.is_sharded(model)
        self.first_random_states = random_states()
        # Have the supervised tokens of an optimizer step counted, over micro-batches and ranks.
        self.model_accepts_loss_kwargs = True

    def train_block(self) -> Checkpoint | None:
        """Train from the start checkpoint to the block's end or to a requested stop, and commit a checkpoint there.

        None where a stop came before the first step of the whole chain was done.
        """
        if self.ranks.is_main:
            self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
            checkpoints.sweep_unfinished(self.folder.checkpoints)
        self.train(resume_from_checkpoint=str(self.start.path) if self.start else None)
        if not self.schedule.abandoned_step:
            assert self.checkpoint is not self.start, "a block ends with a checkpoint"
        return self.checkpoint

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """Nothing where it is spread over the devices already."""
        if not sharding.is_sharded(model):
            super()._move_model_to_device(model, device)

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Not deferred to the last micro-batch: the gradients of the whole model never lie on one device."""
        return nullcontext()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Nothing: the model was built from the checkpoint."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Whole weights, also of a model in shards: the first process alone holds them all."""
        if not sharding.is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        weights = sharding.whole_weights(self.model, only_trained=self.has_adapter)
        if self.args.should_save:
            self._save(output_dir, weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.config.parallelism != "fsdp":
            zero = uses_deepspeed(self.config)
            with failing_afterwards(self.model_wrapped.checkpoint_engine) if zero else nullcontext():
                super()._save_optimizer_and_scheduler(output_dir)
            return
        sharding.save_optimizer(self.model, self.optimizer.optimizer, Path(output_dir))
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing where steps were split otherwise: nothing was drawn, so all are still where the seed put them."""
        if self.start and self.start.terms.split == self.terms.split:
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Of an adapter, what is trained and no more; else the whole model."""
        if not self.has_adapter:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            assert output_dir is not None
            save_adapter_state(self.model, Path(output_dir), names=self.trained_names, weights=state_dict)

    # What is trained on, in which order, at which rate

    def get_train_dataloader(self) -> DataLoader[Any]:
        assert isinstance(self.train_dataset, PackedDataset)
        sampler = BlockSampler(
            len(self.train_dataset),
            batch_size=self.config.batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=self.args.seed,
            stages=self.train_dataset.packs.stages.tolist(),
        )
        return DataLoader(
            NumberedPacks(self.train_dataset),
            batch_sampler=sampler,  # type: ignore[arg-type]  # arrays of row numbers, which are sequences of them
            collate_fn=self.collate_packs,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            # Its own generator: a loader that drew from the global one would shift the dropout masks.
            generator=torch.Generator(),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        if self.logged_at_s is None:
            self.logged_tokens, self.logged_at_s = self.state.num_input_tokens_seen, time.monotonic()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        epoch = self.state.global_step // self.horizon.steps_per_epoch
        self.counter.begin_step(epoch, [batch.pop(ROW_NUMBERS) for batch in batches])
        if self.begin_step:
            num_items = torch.tensor(self.begin_step(batches), device=device)
        # Last: a step that begins with answers to be written has more tokens than were read.
        self.tokens_of_step = sum(batch["input_ids"].numel() for batch in batches)
        self.uncounted_tokens += self.tokens_of_step
        return batches, num_items

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        if isinstance(model, DistributedDataParallel) and not self.has_settled_buckets:
            self.settle_buckets(model, inputs, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def settle_buckets(
        self, model: DistributedDataParallel, inputs: Batch, num_items_in_batch: torch.Tensor | None
    ) -> None:
        """One pass for nothing. DDP sums the gradients of its first pass in one bucket and those of all others in
        several, and where a number lies in a bucket decides in which order the ranks' shares of it are added. Without
        this the first step of every block would round as no step of an uninterrupted run does."""
        states = random_states()
        is_synced = model.require_backward_grad_sync
        model.require_backward_grad_sync = True
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        model.require_backward_grad_sync = is_synced
        model.zero_grad()
        restore_random_states(states)
        if self.extra_metrics:
            self.extra_metrics.forget_passes()
        if self.adapter:
            self.adapter.take()
        self.has_settled_buckets = True

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert num_items_in_batch is not None and not return_outputs
        loss = self.loss(model, inputs, num_items_in_batch)
        added = self.adapter.loss() if self.adapter else None
        if added is not None:
            # Once per optimizer step, shared out over its micro-batches by the tokens that each is taught.
            loss = loss + added * (inputs["labels"] != IGNORED).sum() / num_items_in_batch.clamp(min=1)
        # Gradients are averaged over the ranks and the loss was divided by the tokens of all: take the average back.
        return loss * self.ranks.world_size

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Optimizer:
        optimizer: Optimizer = super().create_optimizer(model)
        if self.config.parallelism == "fsdp":
            # torch.distributed.checkpoint cannot load a group of no weights, and adapters have none to decay.
            optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        assert num_training_steps == self.horizon.total_steps, (num_training_steps, self.horizon)
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, partial(self.learning_rate, peak=1.0))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def learning_rate(self, step: int, *, peak: float) -> float:
        return chain_learning_rate(step, peak=peak, training=self.config, horizon=self.horizon)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both; the rate of the next step is computed anew, as an extension may have changed it since."""
        if checkpoint is None:
            return
        assert self.lr_scheduler is not None
        if self.config.parallelism == "fsdp":
            sharding.load_optimizer(self.model, self.optimizer.optimizer, Path(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler.state_dict()
        # Not the optimizer steps: float16's scaler skips some of them, and the schedule with them.
        factor = self.learning_rate(schedule["last_epoch"], peak=1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.lr_scheduler.load_state_dict({**schedule, "_last_lr": rates})

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: transformers would walk over all parameters at every micro-batch."""
        return 0

    # What is written down

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Append the metrics to metrics.jsonl and give them to the trackers. Called on every rank."""
        if "loss" not in logs:  # the summary that transformers gives at the end of train()
            return
        # float16 has a scaler, which skips the steps whose gradients overflowed.
        gradient_norm = 0.0 if self.accelerator.scaler else logs.get("grad_norm", 0.0)
        if not math.isfinite(logs["loss"]) or not math.isfinite(gradient_norm):
            raise NonFiniteLossError(
                f"the loss is {logs['loss']} and the norm of the gradient {gradient_norm}, at or shortly before step "
                f"{self.state.global_step}. The newest checkpoint is from before. Try a lower training.lr, "
                "more warmup, or model.dtype: float32."
            )
        self.count_tokens()
        now_s = time.monotonic()
        assert self.logged_at_s is not None
        tokens_per_s = (self.state.num_input_tokens_seen - self.logged_tokens) / (now_s - self.logged_at_s)
        self.logged_tokens, self.logged_at_s = self.state.num_input_tokens_seen, now_s
        self.logged_loss = logs["loss"]
        metrics = {
            "step": self.state.global_step,
            "horizon_steps": self.horizon.total_steps,
            "epoch": self.state.epoch,
            "block": self.horizon.block_of(self.state.global_step - 1),
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens": self.state.num_input_tokens_seen,
            "tokens_per_s": tokens_per_s,
            **(self.extra_metrics.take() if self.extra_metrics else {}),
            **(self.adapter.take() if self.adapter else {}),
        }
        if self.ranks.is_main:
            self.folder.record_metrics(**metrics)
            print(
                f"step {metrics['step']}/{self.horizon.total_steps}  epoch {metrics['epoch']:.2f}  "
                f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  {metrics['tokens_per_s']:,.0f} tokens/s",
                flush=True,
            )
        self.control = self.callback_handler.on_log(
            self.args, self.state, self.control, dict(logs, epoch=self.state.epoch)
        )

    def count_tokens(self) -> None:
        """Add the tokens since the last call, of all ranks, to those that the chain has seen."""
        tokens = torch.tensor(self.uncounted_tokens, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens).item())
        self.uncounted_tokens = 0

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Commit a checkpoint of this step. Raises OSError where any process could not write; older ones are intact."""
        started_s = time.monotonic()
        folder = self.folder.checkpoints
        step = self.state.global_step
        temporary = from_main(checkpoints.temporary_folder(folder, step, f"{os.uname().nodename}-{os.getpid()}"))
        if self.schedule.abandoned_step:
            self.uncounted_tokens -= self.tokens_of_step
            self.refuse_damaged_weights()
        self.count_tokens()
        self.ledger = self.ledger.adding(chain.from_iterable(gather_on_all(self.counter.take())))
        (has_drawn,) = agree_on_any(not are_same_states(random_states(), self.first_random_states))
        if has_drawn:
            self.tied_to_split = "random numbers were drawn, as dropout does, by each process for its own rows"
        try:
            with failing_together():
                self.prepare_folder(temporary)
            with failing_together():
                self.write_state(temporary)
            with failing_together():
                # Every process: what a rank on another node wrote is in that node's cache.
                checkpoints.sync_files(temporary)
            with failing_together():
                if self.ranks.is_main:
                    if self.owner:
                        self.owner.check()
                    self.checkpoint = checkpoints.commit(temporary, self.progress(), keep=self.config.keep_checkpoints)
        except Exception as error:
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, LostOwnershipError):
                raise
            newest = self.checkpoint.path.name if self.checkpoint else "none yet"
            raise OSError(
                f"the checkpoint of step {step} could not be written to {folder}: {error}\n"
                f"Newest whole checkpoint: {newest}. Free on that disk: {shutil.disk_usage(folder).free / 1e9:.2f} GB."
            ) from error
        self.checkpoint = from_main(self.checkpoint)
        assert self.checkpoint is not None
        if self.ranks.is_main:
            self.folder.record_event(
                "checkpoint",
                step=step,
                epoch=self.checkpoint.epoch,
                loss=self.logged_loss,
                seconds=round(time.monotonic() - started_s, 3),
                num_bytes=self.checkpoint.num_bytes,
                path=self.checkpoint.path.name,
                whole_epochs=self.checkpoint.whole_epochs,
            )
        self.refuse_new_wrong_epochs(self.checkpoint)

    def refuse_new_wrong_epochs(self, checkpoint: Checkpoint) -> None:
        """Raise WrongRowsError where an epoch of this block ended without every row once; earlier blocks told theirs.

        The checkpoint is committed already: it holds the evidence, and the user may decide to go on with it.
        """
        known = self.start.wrong_epochs if self.start else []
        wrong = [epoch for epoch in checkpoint.wrong_epochs if epoch not in known]
        if wrong and self.ranks.is_main:
            self.folder.record_event(
                "wrong_rows",
                step=checkpoint.step,
                rows_per_epoch=self.ledger.rows_per_epoch,
                epochs=[{"epoch": epoch.epoch + 1, "rows": epoch.rows} for epoch in wrong],
            )
        refuse_wrong_rows(self.ledger, wrong)

    def prepare_folder(self, folder: Path) -> None:
        """The folder of a checkpoint; OSError where the disk has no room for it."""
        if self.ranks.is_main:
            num_bytes = self.checkpoint.num_bytes if self.checkpoint else self.estimated_bytes()
            checkpoints.require_free_disk(folder.parent, num_bytes)
        folder.mkdir(exist_ok=True)

    def write_state(self, folder: Path) -> None:
        """All that the next block needs: weights, optimizer, schedule, random states of every rank, position."""
        # Weights and optimizer in shards are written by all processes together: none begins what another will not.
        with failing_together():
            self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.ranks.is_main:
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def refuse_damaged_weights(self) -> None:
        """The loss of a step that was not logged is not known to be finite, but then its weights are."""
        trained = (weight for weight in self.model.parameters() if weight.requires_grad)
        (damaged,) = agree_on_any(not all(bool(sharding.own_part(weight).isfinite().all()) for weight in trained))
        if damaged:
            raise NonFiniteLossError(f"weights are not finite after step {self.state.global_step}; see training.lr")

    def progress(self) -> Progress:
        step = self.state.global_step
        epoch, step_in_epoch = divmod(step, self.horizon.steps_per_epoch)
        rows = len(self.train_dataset)
        return Progress(
            step=step,
            epoch=step / self.horizon.steps_per_epoch,
            samples=epoch * rows + min(step_in_epoch * self.terms.split.rows_per_step, rows),
            learning_rate=self.learning_rate(step, peak=self.config.lr),
            terms=self.terms,
            ledger=self.ledger,
            tied_to_split=self.tied_to_split,
        )

    def estimated_bytes(self) -> int:
        """Of a first checkpoint: weights and AdamW's two moments of what is trained, 4 bytes each."""
        return 12 * sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
