"""What the EAGLE-3 trainer is told. No torch here, so a login node can check a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from answering.config import AnswersConfig
from training.config import ModelConfig, TrainingConfig

NUM_FEATURES = 3
FEATURES_FOLDER = "features"
"""Below prepared data: what targets computed of it, a folder for each target, choice of layers and precision."""

TARGET_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the targets whose draft heads every engine serves, and whose embedding and head are plain."""

# The target is the run's `model:` section.


@dataclass(kw_only=True, frozen=True)
class Eagle3Config:
    """The EAGLE-3 trainer: a draft head for the model in `model:`, which stays frozen."""

    layers: list[int] | None = None
    """The three target layers whose inputs the draft sees, counted from 0; L of L layers is what the last one gives.
    Unset: 2, L // 2 and L - 3, which is what engines read; a target of fewer than 7 layers needs three of its own."""

    steps: int = 7
    """Tokens that the draft learns to guess in a row, each on top of its own hidden states (training-time test)."""

    decay: float = 0.8
    """Weight of each step in the loss, relative to the step before."""

    normalised_decay: bool = False
    """Divide the weights of the steps by their sum, so that `steps` and `decay` do not change the scale of the loss."""

    shard_target: bool = False
    """Share the layers of the target out over the processes of the job: each keeps a part, and gathers a layer when it
    computes. For one that does not fit into a GPU."""

    features: Literal["live", "cached"] = "live"
    """Where the target's hidden states come from. `live`: from the target, at every step anew. `cached`: written once
    beside the prepared data by the first block, and read from there; the target's layers leave the device."""

    draft_vocabulary: int = 32000
    """Tokens that the draft can guess: the most frequent supervised ones of the training data."""

    min_coverage: float = 0.9
    """Least share of the supervised training tokens that the draft vocabulary must hold."""

    loss_mean: Literal["supervised", "all_tokens"] = "supervised"
    """What the loss is a mean over. `supervised`: the supervised tokens of an optimizer step, so that neither padding
    nor long questions change the learning rate. `all_tokens`: every token of a micro-batch, as published."""

    chain: int = 3
    """Tokens drafted at a time where the evaluation decodes."""

    temperature: float = 1.0
    """Of the evaluation that decodes by sampling, beside the greedy one."""

    answers: AnswersConfig | None = None
    """Before training, the target writes the answers of the training rows anew, and the draft learns from those: they
    are what it meets where it is served. `{}` takes the defaults below it. Unset: the rows as they are."""

    def __post_init__(self) -> None:
        problems = []
        if self.layers is not None:
            problems += layer_problems(self.layers)
        for key in ("steps", "draft_vocabulary", "chain"):
            if getattr(self, key) < 1:
                problems.append(f"eagle3.{key} must be at least 1, got {getattr(self, key)}")
        if not 0 < self.decay <= 1:
            problems.append(f"eagle3.decay must be in (0, 1], got {self.decay}")
        if not 0 <= self.min_coverage <= 1:
            problems.append(f"eagle3.min_coverage must be in [0, 1], got {self.min_coverage}")
        if self.temperature <= 0:
            problems.append(f"eagle3.temperature must be above 0, got {self.temperature}")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def step_weights(self) -> tuple[float, ...]:
        """Weight of each step in the loss."""
        weights = [self.decay**step for step in range(self.steps)]
        total = sum(weights) if self.normalised_decay else 1.0
        return tuple(weight / total for weight in weights)


def layer_problems(layers: Sequence[int]) -> list[str]:
    """What is wrong with a choice of layers, whatever the target."""
    if len(layers) != NUM_FEATURES or sorted(set(layers)) != list(layers) or layers[0] < 0:
        return [f"eagle3.layers must be {NUM_FEATURES} layers, each above the one before, got {list(layers)}"]
    return []


def default_layers(depth: int) -> tuple[int, ...]:
    """The layers that engines read where an export names none; meaningful from 7 layers on."""
    return (2, depth // 2, depth - 3)


def feature_layers(layers: Sequence[int] | None, *, depth: int) -> tuple[int, ...]:
    """The layers of a target of `depth` layers whose inputs the draft sees; ValueError where they do not exist."""
    chosen = default_layers(depth) if layers is None else tuple(layers)
    if layers is None and layer_problems(chosen):
        raise ValueError(
            f"eagle3.layers: 2, L // 2 and L - 3 are not three rising layers of the target's {depth}; name three, for "
            "example [0, 1, 2]"
        )
    if chosen[-1] > depth:
        raise ValueError(
            f"eagle3.layers: there is no layer {chosen[-1]}; the target has layers 0 to {depth - 1}, and {depth} "
            "stands for what the last one gives"
        )
    return chosen


def check_family(model_type: str) -> None:
    """Raise ValueError for a target of a family that no draft is made for."""
    if model_type not in TARGET_FAMILIES:
        raise ValueError(
            f"model.name: a draft head is trained for {', '.join(TARGET_FAMILIES)} models; this is {model_type}"
        )


def count_draft_parameters(target: Mapping[str, Any], *, draft_vocabulary: int) -> int:
    """Trained parameters of the draft of a target, given by the values of its config.json; KeyError where one lacks."""
    hidden, heads, inner = target["hidden_size"], target["num_attention_heads"], target["intermediate_size"]
    head_size = target.get("head_dim") or hidden // heads
    # The projections of queries, keys and values read the embedding beside the hidden state.
    attention = hidden * head_size * (2 * (heads + 2 * (target.get("num_key_value_heads") or heads)) + heads)
    head = hidden * min(draft_vocabulary, target["vocab_size"])
    return NUM_FEATURES * hidden**2 + attention + 3 * hidden * inner + head + 4 * hidden


def embedding_parameters(target: Mapping[str, Any]) -> int:
    """Parameters of a target's embedding and head, which a draft reads even where the target's features are cached."""
    return int(target["vocab_size"] * target["hidden_size"] * (1 if target.get("tie_word_embeddings") else 2))


def target_problems(model: ModelConfig, training: TrainingConfig) -> list[str]:
    """What keeps a model from being the target of a draft, or its draft from being trained."""
    problems = []
    if model.from_scratch:
        problems.append("model.from_scratch: the target of a draft needs trained weights")
    if model.peft:
        problems.append("model.peft: the target of a draft is frozen and its draft is trained in full; leave it out")
    if training.parallelism != "ddp":
        problems.append(
            f"training.parallelism: {training.parallelism}: a draft is small, and each process holds it whole beside "
            "its target; use ddp"
        )
    if model.tokenizer is not None:
        problems.append(
            f"model.tokenizer: the target is served with its own tokenizer and chat template, not those of "
            f"{model.tokenizer}; leave it out"
        )
    return problems
