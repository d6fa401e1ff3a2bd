"""What the distillation trainer is told. No torch here, so a login node can check a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from answering.config import AnswersConfig

TeacherMode = Literal["cache", "live", "text", "none"]
DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
    "adaptive_kl",
]
CacheKind = Literal["topk", "sampled", "hybrid"]

DEFAULT_K = {"topk": 64, "sampled": 0, "hybrid": 16}
DEFAULT_DRAWS = {"topk": 0, "sampled": 50, "hybrid": 8}


@dataclass(kw_only=True, frozen=True)
class TeacherModelConfig:
    """The model that is learned from."""

    name: str
    """Hub id, or a folder with config.json."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Its weights and arithmetic. `auto`: bfloat16 on a GPU that has it, float32 elsewhere."""

    trust_remote_code: bool = False
    """Run Python code shipped with the model. Read it first."""


@dataclass(kw_only=True, frozen=True)
class CacheConfig:
    """What is kept of the teacher's distributions, and who makes it; read where `distillation.teacher` is `cache`."""

    kind: CacheKind = "topk"
    """`topk`: the most probable tokens and the mass of the rest. `sampled`: random draws, unbiased. `hybrid`: the most
    probable tokens, and draws from the rest."""

    k: int | None = None
    """Most probable tokens kept of each position. Unset: 64 for `topk`, 16 for `hybrid`."""

    draws: int | None = None
    """Random draws of each position. Unset: 50 for `sampled`, 8 for `hybrid`."""

    temperatures: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0, 3.0, 4.0])
    """Temperatures that the cache can be read at (`topk` only); 8 bytes a position each."""

    keep_tokens: list[str] = field(default_factory=list)
    """Tokens whose probability is kept at every position, whatever it is, for example tool-call marks. The end of
    text and the right token are always kept."""

    shard_tokens: int = 1 << 20
    """Tokens of a shard, about: what one interruption can cost, and what is captured as one piece."""

    tasks: int = 1
    """Jobs that capture side by side, one Slurm array; each takes the next shard that nobody has."""

    gpus_per_task: int = 1
    """GPUs of each of them, where `slurm.gpus_per_node` is set; a teacher too large for one is spread over them."""

    batch_tokens: int = 8192
    """Tokens of a forward pass of the teacher."""

    folder: str | None = None
    """A cache made before, to be read and not made. Unset: under `data_dir`, by all that shapes it."""

    def __post_init__(self) -> None:
        problems = []
        for key in ("shard_tokens", "tasks", "gpus_per_task", "batch_tokens"):
            if getattr(self, key) < 1:
                problems.append(f"distillation.cache.{key} must be at least 1, got {getattr(self, key)}")
        if self.kind == "sampled" and self.k:
            problems.append("distillation.cache.k: a sampled cache keeps draws only; use kind: hybrid for both")
        if self.kind == "topk" and self.draws:
            problems.append("distillation.cache.draws: a topk cache has no draws; use kind: hybrid for both")
        if self.kind != "sampled" and self.top_tokens < 1:
            problems.append(f"distillation.cache.k must be at least 1, got {self.k}")
        if self.kind != "topk" and not 1 <= self.num_draws <= 255:
            problems.append(f"distillation.cache.draws must be 1 to 255, got {self.draws}")
        if not self.temperatures or any(temperature <= 0 for temperature in self.temperatures):
            problems.append(f"distillation.cache.temperatures must be above 0, got {self.temperatures}")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def top_tokens(self) -> int:
        """`k`, or its default."""
        return DEFAULT_K[self.kind] if self.k is None else self.k

    @property
    def num_draws(self) -> int:
        """`draws`, or its default."""
        return DEFAULT_DRAWS[self.kind] if self.draws is None else self.draws


@dataclass(kw_only=True, frozen=True)
class StudentConfig:
    """A student cut from the teacher, instead of a model of its own."""

    layers: list[int] | None = None
    """The teacher's layers that the student begins with, counted from 0."""

    every: int | None = None
    """Every n-th layer of the teacher instead, its first and last among them."""

    def __post_init__(self) -> None:
        if (self.layers is None) == (self.every is None):
            raise ValueError("distillation.from_teacher needs `layers: [0, 2, ...]` or `every: 2`, and not both")
        if self.layers is not None and (not self.layers or sorted(set(self.layers)) != self.layers):
            raise ValueError(f"distillation.from_teacher.layers must rise, got {self.layers}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"distillation.from_teacher.every must be at least 1, got {self.every}")


@dataclass(kw_only=True, frozen=True)
class HiddenStatesConfig:
    """Matching of the teacher's hidden states beside its distribution; needs `distillation.teacher: live`."""

    weight: float = 0.0
    """Weight of this loss beside the others; 0 turns it off."""

    distance: Literal["mse", "cosine"] = "mse"
    """Mean squared difference, or one minus the cosine, of the states at each learned position."""

    layers: dict[int, int] = field(default_factory=dict)
    """Student layer to teacher layer, counted from 1 as outputs of layers. Unset: each student layer to the one at
    the same share of the depth."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"distillation.hidden_states.weight must not be negative, got {self.weight}")


@dataclass(kw_only=True, frozen=True)
class OnPolicyConfig:
    """Learning from the student's own answers, scored by a live teacher (GKD, arXiv:2306.13649)."""

    share: float = 0.0
    """Share of the micro-batches whose answers the student writes itself; 0 turns it off."""

    max_new_tokens: int = 256
    """Longest answer that it writes."""

    temperature: float = 1.0
    """Of its sampling."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.share <= 1:
            problems.append(f"distillation.on_policy.share must be in [0, 1], got {self.share}")
        if self.max_new_tokens < 1:
            problems.append(f"distillation.on_policy.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature <= 0:
            problems.append(f"distillation.on_policy.temperature must be above 0, got {self.temperature}")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(kw_only=True, frozen=True)
class DistillationConfig:
    """The distillation trainer."""

    teacher: TeacherMode = "cache"
    """Where the student meets the teacher. `cache`: its distributions, captured once before training. `live`: the
    teacher runs beside the student. `text`: the student learns from answers that the teacher writes once, with cross
    entropy. `none`: no teacher, the control that all others are to be compared with."""

    teacher_model: TeacherModelConfig
    """The teacher. Its tokenizer and chat template make the tokens, unless `model.tokenizer` names others."""

    shard_teacher: bool = False
    """Share the layers of a teacher beside the student, live or in the evaluation, out over the processes of the job:
    each keeps a part, and gathers a layer when it computes. For one that does not fit into a GPU beside the student."""

    divergence: DivergenceName = "forward_kl"
    """Distance of the two distributions. All but `forward_kl` need the whole of the teacher's: `teacher: live`."""

    weight: float = 0.5
    """Share of the divergence in the loss; the rest is cross entropy with the data."""

    temperature: float = 1.0
    """Both distributions are flattened by it in the divergence, which is scaled by its square."""

    skew: float = 0.1
    """Share of the other distribution that the skewed divergences mix in."""

    mixing: float = 0.5
    """Share of the teacher in the middle distribution of `jensen_shannon`."""

    tail: Literal["bucket", "renormalised"] = "bucket"
    """What becomes of the mass outside a topk cache: one more class, or left out and the rest scaled up to 1."""

    category_weights: dict[str, float] = field(default_factory=dict)
    """Weight of the tokens of each category or source of the mixture; 1 where it is not named."""

    from_teacher: StudentConfig | None = None
    """Cut the student from the teacher; `model.name` then stays unset or names the teacher."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    """The teacher's cache."""

    answers: AnswersConfig = field(default_factory=AnswersConfig)
    """How the teacher writes answers; read where `teacher` is `text`."""

    hidden_states: HiddenStatesConfig = field(default_factory=HiddenStatesConfig)
    """Matching of hidden states."""

    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    """Learning from the student's own answers."""

    control: str | None = None
    """A model trained on the same tokens without a teacher, scored beside the student in the evaluation."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.weight <= 1:
            problems.append(f"distillation.weight must be in [0, 1], got {self.weight}")
        if self.temperature <= 0:
            problems.append(f"distillation.temperature must be above 0, got {self.temperature}")
        if not 0 < self.skew < 1:
            problems.append(f"distillation.skew must be in (0, 1), got {self.skew}")
        if not 0 < self.mixing < 1:
            problems.append(f"distillation.mixing must be in (0, 1), got {self.mixing}")
        problems += [
            f"distillation.category_weights.{name} must not be negative, got {weight}"
            for name, weight in self.category_weights.items()
            if weight < 0
        ]
        if self.teacher == "cache":
            problems += self.cache_problems()
        if self.shard_teacher and self.teacher in ("text", "none"):
            problems.append(
                f"distillation.shard_teacher: with teacher: {self.teacher} no teacher is beside the student"
            )
        if self.teacher != "live":
            if self.hidden_states.weight:
                problems.append("distillation.hidden_states needs the teacher beside the student: teacher: live")
            if self.on_policy.share:
                problems.append("distillation.on_policy needs a teacher that scores what is written: teacher: live")
        if problems:
            raise ValueError("\n".join(problems))

    def cache_problems(self) -> list[str]:
        """What a cache cannot give."""
        problems = []
        if self.divergence != "forward_kl":
            problems.append(
                f"distillation.divergence: {self.divergence} asks for the teacher's probability of every token that "
                "the student finds likely, and a cache holds only what the teacher found likely; use forward_kl, or "
                "teacher: live"
            )
        if self.cache.kind == "topk" and self.temperature not in self.cache.temperatures:
            problems.append(
                f"distillation.temperature: {self.temperature} is not among distillation.cache.temperatures "
                f"({', '.join(map(str, self.cache.temperatures))}); add it there"
            )
        if self.cache.kind != "topk" and self.temperature != 1:
            problems.append(
                f"distillation.temperature: {self.cache.kind} draws were made at temperature 1 and tell nothing about "
                f"{self.temperature}; use 1, or cache.kind: topk"
            )
        if self.cache.kind != "topk" and self.tail != "bucket":
            problems.append(
                "distillation.tail: draws stand for the tail already; leave it out, or use cache.kind: topk"
            )
        return problems
