"""The draft: three hidden states of the target, fused, and one decoder layer over them and the next token's embedding.

At index p it sees what the target computed at token x_p and the token x_{p + 1}, and guesses x_{p + 2}. Later guesses
stand on its own hidden states: at step i, index p holds the token x_{p + 1 + i} and guesses x_{p + 2 + i}.

Parameters have the names of the format that engines read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, PretrainedConfig, set_seed
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, apply_rotary_pos_emb

from drafting.attention import attend_to_guesses
from drafting.config import NUM_FEATURES, check_family
from drafting.loss import Teacher, UnrolledLoss, unrolled_cross_entropy
from training.attention import varlen_attention

# Tensors are named by shape. I steps, T tokens, H hidden width, F width of three hidden states, N heads, K key/value
# heads, D width of a head.

_STATIC_ROTATIONS = ("default", "linear", "llama3", "yarn")

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(query [1, N, T, D], key, value [1, K, T, D]) -> [1, T, N, D]."""


def draft_config(target: PretrainedConfig, *, draft_vocabulary: int) -> LlamaConfig:
    """The shape of a draft for a target: one layer as wide as the target's, with the target's rotation and context.

    ValueError for a target whose family or rotary embedding the format cannot say.
    """
    check_family(target.model_type)
    rotation = dict(target.rope_parameters)
    if rotation.get("rope_type") not in _STATIC_ROTATIONS:
        raise ValueError(
            f"model.name: its rotary embedding is of type {rotation.get('rope_type')}; a draft head can be served with "
            f"{', '.join(_STATIC_ROTATIONS)}"
        )
    heads = target.num_attention_heads
    config = LlamaConfig(
        architectures=["LlamaForCausalLMEagle3"],
        hidden_act=target.hidden_act,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=getattr(target, "head_dim", None) or target.hidden_size // heads,
        rms_norm_eps=target.rms_norm_eps,
        rope_parameters=rotation,
        max_position_embeddings=target.max_position_embeddings,
        vocab_size=target.vocab_size,
        initializer_range=target.initializer_range,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        bos_token_id=target.bos_token_id,
        eos_token_id=target.eos_token_id,
        pad_token_id=target.pad_token_id,
    )
    config.draft_vocab_size = draft_vocabulary
    return config


class RMSNorm(nn.Module):
    """Root mean square norm, in the wider of the precisions of its input and its weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, self.weight.dtype))
        return rms_norm(wide, self.weight.shape, self.weight, self.eps).to(hidden.dtype)


class DraftAttention(nn.Module):
    """Projections of an attention that reads the embedding and the hidden state side by side."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.q_proj = nn.Linear(2 * config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def heads(self, projected_1TM: torch.Tensor) -> torch.Tensor:
        return projected_1TM.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class DraftLayer(nn.Module):
    """One decoder layer; what its queries see is decided by the caller."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.self_attn = DraftAttention(config)
        self.mlp = LlamaMLP(config)
        self.hidden_norm = RMSNorm(width, eps=epsilon)
        self.input_layernorm = RMSNorm(width, eps=epsilon)
        self.post_attention_layernorm = RMSNorm(width, eps=epsilon)

    def forward(
        self,
        hidden_1TH: torch.Tensor,
        embeddings_1TH: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next hidden state, before any norm, and the key and value that later queries may see."""
        attention = self.self_attn
        both = torch.cat([self.input_layernorm(embeddings_1TH), self.hidden_norm(hidden_1TH)], dim=-1)
        query, key = apply_rotary_pos_emb(
            attention.heads(attention.q_proj(both)), attention.heads(attention.k_proj(both)), *rotation
        )
        value = attention.heads(attention.v_proj(both))
        # The rotation is in the precision of the hidden states, which autocast may keep wider than its products.
        query, key = query.to(value.dtype), key.to(value.dtype)
        hidden_1TH = hidden_1TH + attention.o_proj(attend(query, key, value).flatten(-2))
        return hidden_1TH + self.mlp(self.post_attention_layernorm(hidden_1TH)), key, value


@dataclass
class DraftCache:
    """Keys and values of the draft while it decodes one sequence, [1, K, T, D] each; empty at first."""

    key: torch.Tensor | None = None
    value: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key = key if self.key is None else torch.cat([self.key, key], dim=2)
        self.value = value if self.value is None else torch.cat([self.value, value], dim=2)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[:, :, :length], self.value[:, :, :length]


@dataclass(frozen=True)
class PackedSamples:
    """Which tokens of one flat row belong together."""

    position_ids_1T: torch.Tensor
    cu_seq_lens: torch.Tensor
    max_length: int
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", self.cu_seq_lens.diff().tolist())


class DraftModel(nn.Module):
    """A draft head. Its parameters are all that is trained and saved; embedding and target belong to its caller."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(NUM_FEATURES * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = DraftLayer(config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        self.recomputes_steps = False

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Asked for by transformers.Trainer: keep only the hidden states between steps, and make the rest anew."""
        self.recomputes_steps = True

    gradient_checkpointing_enable = activation_checkpointing_enable

    def forward(
        self,
        features_1TF: torch.Tensor,
        embeddings_1TH: torch.Tensor,
        samples: PackedSamples,
        teacher: Teacher,
        labels_1T: torch.Tensor,
        step_weights: Sequence[float],
    ) -> UnrolledLoss:
        """The loss of all steps, summed over supervised tokens: see drafting/loss.py."""
        hidden_ITH = self.unroll(features_1TF, embeddings_1TH, samples, steps=len(step_weights))
        return unrolled_cross_entropy(
            self.norm(hidden_ITH),
            self.lm_head.weight,
            teacher,
            labels_T=labels_1T[0],
            positions_T=samples.position_ids_1T[0],
            step_weights=step_weights,
        )

    def fuse(self, features_1TF: torch.Tensor) -> torch.Tensor:
        """The target's hidden states as one of the draft's, [1, T, H]; ValueError where they are too wide."""
        if features_1TF.shape[-1] != self.fc.in_features:
            raise ValueError(
                f"fc takes features {self.fc.in_features} wide, got {features_1TF.shape[-1]}: hidden states of other "
                "layers, or of another target, than the draft was made for"
            )
        return self.fc(features_1TF)

    def unroll(
        self, features_1TF: torch.Tensor, embeddings_1TH: torch.Tensor, samples: PackedSamples, *, steps: int
    ) -> torch.Tensor:
        """Hidden states of all steps before the last norm, [I, T, H].

        `embeddings` are those of the row's tokens as they stand. Those of the last tokens of a sample at index p reach
        beyond it: nothing that is supervised sees them.
        """
        num_tokens = embeddings_1TH.shape[1]
        padded = pad(embeddings_1TH, (0, 0, 0, steps))
        hidden_1TH = self.fuse(features_1TF)
        keys: tuple[torch.Tensor, ...] = ()
        values: tuple[torch.Tensor, ...] = ()
        hidden_states = []
        for step in range(steps):
            arguments = (
                hidden_1TH,
                padded[:, 1 + step : 1 + step + num_tokens],
                self.rotary(hidden_1TH, samples.position_ids_1T + step),
                partial(self.attend_in_training, samples=samples, earlier_keys=keys, earlier_values=values),
            )
            if self.recomputes_steps and torch.is_grad_enabled():
                hidden_1TH, key, value = checkpoint(
                    self.midlayer, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_1TH, key, value = self.midlayer(*arguments)
            keys, values = (*keys, key), (*values, value)
            hidden_states.append(hidden_1TH[0])
        return torch.stack(hidden_states)

    def attend_in_training(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        samples: PackedSamples,
        earlier_keys: tuple[torch.Tensor, ...],
        earlier_values: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        scaling = self.midlayer.self_attn.scaling
        if not earlier_keys:
            attended, _ = varlen_attention(
                self.midlayer.self_attn,
                query,
                key,
                value,
                None,
                scaling=scaling,
                cu_seq_lens_q=samples.cu_seq_lens,
                max_length_q=samples.max_length,
            )
            return attended
        return attend_to_guesses(
            query, (*earlier_keys, key), (*earlier_values, value), lengths=samples.lengths, scaling=scaling
        ).transpose(1, 2)

    def extend(
        self, hidden_1TH: torch.Tensor, embeddings_1TH: torch.Tensor, position: int, cache: DraftCache
    ) -> torch.Tensor:
        """Hidden states of the next T tokens of one sequence, the first at `position`, before the last norm.

        `hidden`: fused features of the target, or the draft's own hidden state. The cache takes these tokens up.
        """
        positions_1T = torch.arange(position, position + hidden_1TH.shape[1], device=hidden_1TH.device)[None]

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            cache.append(key, value)
            assert cache.key is not None and cache.value is not None
            num_queries, num_keys = query.shape[2], cache.key.shape[2]
            visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            return scaled_dot_product_attention(
                query,
                cache.key,
                cache.value,
                visible.tril(num_keys - num_queries),
                scale=self.midlayer.self_attn.scaling,
                enable_gqa=True,
            ).transpose(1, 2)

        hidden_1TH, _, _ = self.midlayer(hidden_1TH, embeddings_1TH, self.rotary(hidden_1TH, positions_1T), attend)
        return hidden_1TH

    def logits(self, hidden_1TH: torch.Tensor) -> torch.Tensor:
        """Logits over the draft vocabulary."""
        return self.lm_head(self.norm(hidden_1TH))


def new_draft(target: PretrainedConfig, head_DH: torch.Tensor, *, seed: int) -> DraftModel:
    """A draft to train, in float32: random, but for its head, which begins as the target's rows of its tokens."""
    set_seed(seed)
    draft = DraftModel(draft_config(target, draft_vocabulary=len(head_DH)))
    with torch.no_grad():
        draft.lm_head.weight.copy_(head_DH)
    return draft


def load_draft(target: PretrainedConfig, folder: Path, *, draft_vocabulary: int) -> DraftModel:
    """The draft in a checkpoint; ValueError where it has another shape."""
    draft = DraftModel(draft_config(target, draft_vocabulary=draft_vocabulary))
    try:
        draft.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        raise ValueError(
            f"{folder} holds a draft of another target, draft vocabulary or shape; restore model.name and the eagle3 "
            f"section\n{error}"
        ) from error
    return draft
