"""A draft unrolled over all positions at once computes what it computes when it decodes one token after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drafting_models import TARGETS, packed, random_draft, target_config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from drafting import attention
from drafting.config import Eagle3Config, feature_layers
from drafting.model import DraftCache, DraftModel, draft_config

STEPS = 5


def random_inputs(draft: DraftModel, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(1, tokens, draft.fc.in_features, dtype=torch.float64, generator=generator)
    return features, torch.randn(1, tokens, draft.fc.out_features, dtype=torch.float64, generator=generator)


def chain_logits(draft: DraftModel, features: torch.Tensor, embeddings: torch.Tensor, index: int) -> list[torch.Tensor]:
    """Logits of every step of a chain that begins behind `index`, decoded with a cache of keys and values."""
    cache = DraftCache()
    hidden = draft.extend(draft.fuse(features[:, : index + 1]), embeddings[:, 1 : index + 2], 0, cache)[:, -1:]
    logits = [draft.logits(hidden)[0, 0]]
    for step in range(1, min(STEPS, embeddings.shape[1] - 1 - index)):
        token = index + 1 + step
        hidden = draft.extend(hidden, embeddings[:, token : token + 1], index + step, cache)
        logits.append(draft.logits(hidden)[0, 0])
    return logits


def largest_difference(draft: DraftModel, *lengths: int) -> float:
    """Between the unrolled logits of samples packed into one row, and those of chains in each sample alone."""
    features, embeddings = random_inputs(draft, sum(lengths))
    with torch.no_grad():
        unrolled = draft.logits(draft.unroll(features, embeddings, packed(*lengths), steps=STEPS))
        differences, start = [0.0], 0
        for length in lengths:
            sample = slice(start, start + length)
            for index in range(length - 1):
                chain = chain_logits(draft, features[:, sample], embeddings[:, sample], index)
                differences += [
                    (unrolled[step, start + index] - logits).abs().max().item() for step, logits in enumerate(chain)
                ]
            start += length
    return max(differences)


@pytest.mark.parametrize("family", TARGETS)
def test_unrolled_logits_are_those_of_a_chain_with_a_cache(family: str) -> None:
    assert largest_difference(random_draft(target_config(family)), 13) < 1e-12


def test_unrolled_logits_are_those_of_a_chain_under_a_scaled_rotation() -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    assert largest_difference(random_draft(target_config(rope_parameters=scaled)), 13) < 1e-12


def test_samples_that_share_a_row_do_not_see_each_other() -> None:
    assert largest_difference(random_draft(target_config()), 4, 1, 9, 2) < 1e-12


def test_without_its_offset_of_the_rotation_an_unrolled_step_is_no_step_of_a_chain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft = random_draft(target_config())
    rotate = LlamaRotaryEmbedding.forward

    def at_the_first_step(rotary: LlamaRotaryEmbedding, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        return rotate(rotary, hidden, torch.arange(positions.shape[1])[None] if positions.shape[1] > 1 else positions)

    assert largest_difference(draft, 13) < 1e-12
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", at_the_first_step)
    assert largest_difference(draft, 13) > 1e-3


def test_attention_in_blocks_is_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = random_draft(target_config())
    features, embeddings = random_inputs(draft, 30)

    def outputs() -> list[torch.Tensor]:
        draft.zero_grad()
        hidden = draft.unroll(features, embeddings, packed(19, 11), steps=STEPS)
        hidden.square().sum().backward()
        return [hidden.detach(), *(weight.grad for weight in draft.midlayer.parameters() if weight.grad is not None)]

    whole = outputs()
    monkeypatch.setattr(attention, "_BLOCK_QUERIES", 4)
    for one, other in zip(whole, outputs(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradients_flow_through_all_steps_and_are_the_same_where_steps_are_made_anew() -> None:
    draft = random_draft(target_config())
    features, embeddings = random_inputs(draft, 9)

    def gradient() -> torch.Tensor:
        draft.zero_grad()
        draft.unroll(features, embeddings, packed(9), steps=STEPS)[-1].square().sum().backward()
        assert draft.fc.weight.grad is not None
        return draft.fc.weight.grad

    kept = gradient()
    assert kept.abs().max() > 0
    draft.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), kept, rtol=1e-12, atol=1e-14)


def test_an_unrolled_draft_equals_one_that_attends_by_one_softmax_over_all_it_may_see() -> None:
    """The attention of the published code: a dense causal mask over the first step, one column for each later one."""
    generator = torch.Generator().manual_seed(3)
    query, *others = (torch.randn(1, heads, 6, 4, dtype=torch.float64, generator=generator) for heads in [4] + 6 * [2])
    keys, values = others[:3], others[3:]
    repeated_keys, repeated_values = ([t.repeat_interleave(2, dim=1) for t in tensors] for tensors in (keys, values))
    scores = query @ repeated_keys[0].mT / 2 + torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)
    for key in repeated_keys[1:]:
        scores = torch.cat([scores, (query * key).sum(-1, keepdim=True) / 2], dim=-1)
    weights = scores.softmax(-1)
    expected = weights[..., :6] @ repeated_values[0]
    for column, value in enumerate(repeated_values[1:], start=6):
        expected = expected + weights[..., column : column + 1] * value
    attended = attention.attend_to_guesses(query, keys, values, lengths=[6], scaling=0.5)
    torch.testing.assert_close(attended, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", TARGETS)
def test_a_draft_has_the_shapes_and_names_that_engines_read(family: str) -> None:
    config = target_config(family)
    draft = DraftModel(draft_config(config, draft_vocabulary=20))
    heads, keys, width, middle = config.num_attention_heads, config.num_key_value_heads, 24, 40
    assert {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()} == {
        "fc.weight": (width, 3 * width),
        "midlayer.self_attn.q_proj.weight": (heads * config.head_dim, 2 * width),
        "midlayer.self_attn.k_proj.weight": (keys * config.head_dim, 2 * width),
        "midlayer.self_attn.v_proj.weight": (keys * config.head_dim, 2 * width),
        "midlayer.self_attn.o_proj.weight": (width, heads * config.head_dim),
        "midlayer.mlp.gate_proj.weight": (middle, width),
        "midlayer.mlp.up_proj.weight": (middle, width),
        "midlayer.mlp.down_proj.weight": (width, middle),
        "midlayer.hidden_norm.weight": (width,),
        "midlayer.input_layernorm.weight": (width,),
        "midlayer.post_attention_layernorm.weight": (width,),
        "norm.weight": (width,),
        "lm_head.weight": (20, width),
    }
    assert draft.config.rope_parameters["rope_theta"] == 5000.0
    assert draft.config.max_position_embeddings == config.max_position_embeddings


def test_features_of_another_width_are_refused() -> None:
    draft = random_draft(target_config())
    with pytest.raises(ValueError, match="fc takes features 72 wide, got 48"):
        draft.fuse(torch.zeros(1, 3, 48, dtype=torch.float64))


def test_a_target_whose_rotation_changes_with_the_length_is_refused() -> None:
    config = target_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0})
    with pytest.raises(ValueError, match="rotary embedding is of type dynamic"):
        draft_config(config, draft_vocabulary=20)


@pytest.mark.parametrize(("depth", "layers"), [(7, (2, 3, 4)), (8, (2, 4, 5)), (32, (2, 16, 29))])
def test_features_enter_the_second_the_middle_and_the_third_last_layer(depth: int, layers: tuple[int, ...]) -> None:
    assert feature_layers(None, depth=depth) == layers


@pytest.mark.parametrize("depth", range(1, 7))
def test_a_target_too_shallow_for_three_features_needs_layers_of_its_own(depth: int) -> None:
    with pytest.raises(ValueError, match=f"target's {depth}; name three"):
        feature_layers(None, depth=depth)


@pytest.mark.parametrize("layers", [[1, 2], [2, 2, 3], [3, 2, 1], [-1, 2, 3]])
def test_layers_that_do_not_rise_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"eagle3\.layers must be 3 layers"):
        Eagle3Config(layers=layers)


def test_a_layer_that_the_target_does_not_have_is_refused() -> None:
    assert feature_layers([1, 2, 7], depth=7) == (1, 2, 7)
    with pytest.raises(ValueError, match="there is no layer 8; the target has layers 0 to 6"):
        feature_layers([1, 2, 8], depth=7)


def test_steps_weigh_less_and_less_and_may_be_normalised() -> None:
    assert Eagle3Config(steps=3).step_weights == pytest.approx((1, 0.8, 0.64))
    assert sum(Eagle3Config(normalised_decay=True).step_weights) == pytest.approx(1)
