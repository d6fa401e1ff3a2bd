"""Accepted guesses: counted by hand, and by decoding that keeps the target's own distribution."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from chat_tokenizers import CHATML, CHATML_WITH_GENERATION, LLAMA_3, MISTRAL, chat_tokenizer
from drafting_models import target_config
from transformers import AutoModelForCausalLM

from drafting.acceptance import Acceptance, supervised_at_steps
from drafting.decoding import ChainDrafter, Greedy, Limits, Sampling, decode_plainly, decode_with_draft
from drafting.evaluation import Prompt, answer, collate_for_draft, divergences
from drafting.model import new_draft
from drafting.target import Target
from drafting.vocabulary import DraftVocabulary
from mixture.formats import Sample
from mixture.render import Renderer
from mixture.shards import TokenRow
from training.batches import IGNORED


def bits(*rows: str) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def test_joint_and_conditional_acceptance_by_hand() -> None:
    supervised = bits("xxxx.", "xxx..", "xx...")
    hits = bits("xx.x.", "x.x..", "xx...")
    counted = Acceptance.of_hits(hits, supervised)
    # Of four starts three hit; of three with two supervised guesses one hits both; of two with three, one hits all.
    assert counted.joint == pytest.approx([3 / 4, 1 / 3, 1 / 2])
    # After the first hit there were two second guesses, of which one hit; after that one third guess, which hit.
    assert counted.conditional == pytest.approx([3 / 4, 1 / 2, 1])
    assert counted.simulated_length == pytest.approx(1 + 3 / 4 + 1 / 3 + 1 / 2)
    twice = counted + counted
    assert (twice.joint, twice.conditional) == (counted.joint, counted.conditional)


def test_a_start_whose_next_tokens_are_not_all_supervised_counts_only_as_far_as_they_are() -> None:
    counted = Acceptance.of_hits(bits("x", ".", "x"), bits("x", ".", "x"))
    assert counted.counts_3I.tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0]]


def test_index_p_counts_at_step_i_exactly_where_token_p_plus_2_plus_i_is_supervised_in_its_sample() -> None:
    labels = torch.tensor([IGNORED, IGNORED, 5, 5, IGNORED, 5, IGNORED, 5, 5, 5])
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3])
    mask = supervised_at_steps(labels, positions, steps=3)
    for step, index in itertools.product(range(3), range(10)):
        token = index + 2 + step
        expected = token < 10 and (index < 6) == (token < 6) and labels[token].item() != IGNORED
        assert mask[step, index].item() == expected, (step, index)


@pytest.mark.parametrize("template", [LLAMA_3, CHATML, CHATML_WITH_GENERATION, MISTRAL])
def test_a_first_guess_counts_exactly_where_the_assistant_speaks(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    turns = [
        ("user", "What is the capital?"),
        ("assistant", "Paris."),
        ("user", "And 1 + 1?"),
        ("assistant", "It is 2."),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    renderer = Renderer(tokenizer, objective="sft", max_length=200, over_length="drop")
    (row,) = renderer.chats([Sample(id="a", source="s", content={"messages": messages})])
    assert row is not None
    batch = collate_for_draft([[TokenRow("a", *row, "s")]])
    mask = supervised_at_steps(batch["labels"][0], batch["position_ids"][0], steps=3)
    for step in range(3):
        tokens = mask[step].nonzero().squeeze(1) + 2 + step
        said = tokenizer.decode(batch["input_ids"][0, tokens])
        assert [text.strip() for text in re.split(r"<\S+?>", said) if text.strip()] == ["Paris.", "It is 2."]
        # The token that ends the turn is learned too.
        assert len(re.findall(r"<\S+?>", said)) == 2


# --- decoding

VOCABULARY = 12


def random_target(family: str = "llama", *, sharpness: float = 1.0) -> Target:
    torch.manual_seed(4)
    config = target_config(family, vocab_size=VOCABULARY, initializer_range=sharpness)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()
    ids = torch.tensor([1, 3, 4, 5, 7, 8, 9, 11]).numpy()
    return Target(network, (2, 3, 4), DraftVocabulary(ids, VOCABULARY, 1.0))


def random_draft(target: Target) -> torch.nn.Module:
    return new_draft(target.network.config, target.head_VH[target.draft_ids_D], seed=3).eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_greedy_decoding_with_any_draft_gives_the_tokens_of_the_target_alone(family: str) -> None:
    target = random_target(family)
    draft = random_draft(target)
    for chain, stop in itertools.product((1, 4), (frozenset(), frozenset({3}))):
        limits = Limits(max_new_tokens=15, stop_ids=stop)
        for prompt in ([1, 2], [5, 4, 3, 2, 1]):
            plain = decode_plainly(target, prompt, Greedy(), limits)
            drafted = decode_with_draft(target, draft, prompt, Greedy(), limits, chain=chain)
            assert drafted.tokens == plain.tokens
            assert drafted.passes <= plain.passes == len(plain.tokens) - 1


class Oracle(ChainDrafter):
    """A draft that knows what the target will say."""

    def __init__(self, target: Target, draft: object, *, answer: list[int], prompt: list[int]):
        super().__init__(target, draft)
        self.text = [*prompt, *answer, *([0] * 9)]

    def guess(self, choice: object, chain: int) -> tuple[list[int], list[torch.Tensor]]:
        known = self.cache.length + 1
        return self.text[known : known + chain], []


def test_a_draft_that_is_always_right_gives_all_its_guesses_and_one_token_more_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = random_target()
    limits = Limits(max_new_tokens=13, stop_ids=frozenset())
    prompt = [5, 4, 3]
    plain = decode_plainly(target, prompt, Greedy(), limits)
    monkeypatch.setattr(
        "drafting.decoding.ChainDrafter",
        lambda target, draft: Oracle(target, draft, answer=plain.tokens, prompt=prompt),
    )
    drafted = decode_with_draft(target, random_draft(target), prompt, Greedy(), limits, chain=3)
    assert drafted.tokens == plain.tokens
    assert drafted.passes == 12 / 4


def test_what_a_draft_guesses_next_does_not_depend_on_what_was_refused() -> None:
    """The cache after some passes is that of the text alone."""
    target = random_target()
    target.network.double()
    draft = random_draft(target).double()
    text = [5, 4, 3, 2, 1, 6, 7]
    with torch.inference_mode():
        whole = target.read(torch.tensor([text[:-1]]))
        at_once = ChainDrafter(target, draft)
        at_once.take_up(whole, text)
        in_parts = ChainDrafter(target, draft)
        for start, end in ((0, 2), (2, 3), (3, 6)):
            states = type(whole)(whole.features_1TF[:, start:end], whole.last_1TH[:, start:end])
            in_parts.take_up(states, text[: end + 1])
            in_parts.guess(Greedy(), 4)
        assert at_once.guess(Greedy(), 4) == in_parts.guess(Greedy(), 4)
        torch.testing.assert_close(in_parts.hidden_11H, at_once.hidden_11H, rtol=1e-10, atol=1e-10)


def test_accepted_and_redrawn_tokens_have_the_distribution_of_the_target() -> None:
    generator = torch.Generator().manual_seed(0)
    choice = Sampling(1.0, generator)
    logits_KV = torch.randn(3, 5, generator=generator) * 2
    draft_KV = (torch.randn(2, 5, generator=generator) * 2).softmax(-1)
    draft_KV[:, 4] = 0  # outside of the draft vocabulary
    draft_KV /= draft_KV.sum(-1, keepdim=True)
    rounds = 6000
    firsts, seconds = torch.zeros(5), torch.zeros(5)
    for _ in range(rounds):
        guesses = [choice.draw(q_V) for q_V in draft_KV]
        tokens = choice.accept(guesses, list(draft_KV), logits_KV)
        assert 1 <= len(tokens) <= 3
        firsts[tokens[0]] += 1
        if len(tokens) > 1:
            seconds[tokens[1]] += 1
    for counts, expected in ((firsts, logits_KV[0].softmax(-1)), (seconds, logits_KV[1].softmax(-1))):
        drawn = counts.sum()
        # Five standard deviations of each share.
        tolerance = 5 * (expected * (1 - expected) / drawn).sqrt()
        assert ((counts / drawn - expected).abs() < tolerance).all()


def test_sampling_with_a_draft_has_the_distribution_of_sampling_without() -> None:
    """The second token of an answer, the first that a draft can guess, over many answers."""
    target = random_target(sharpness=0.4)
    draft = random_draft(target)
    limits = Limits(max_new_tokens=2, stop_ids=frozenset())
    prompt = [5, 4, 3]
    choice = Sampling(0.8, torch.Generator().manual_seed(1))
    with torch.inference_mode():
        first = choice.probabilities(target.logits(target.read(torch.tensor([prompt])).last_1TH)[0, -1])
        rows = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
        states = target.network.base_model(input_ids=rows).last_hidden_state
        expected = first @ choice.probabilities(target.logits(states[:, -1]))
    rounds = 200
    counts = torch.zeros(VOCABULARY)
    for _ in range(rounds):
        counts[decode_with_draft(target, draft, prompt, choice, limits, chain=2).tokens[1]] += 1
    tolerance = 5 * (expected * (1 - expected) / rounds).sqrt()
    assert ((counts / rounds - expected).abs() < tolerance).all()


def test_where_answers_part_the_margin_of_the_target_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    target = random_target()
    limits = Limits(max_new_tokens=6, stop_ids=frozenset())
    result = answer(target=target, draft=random_draft(target), prompt=Prompt("s", [5, 4]), limits=limits, chain=2,
                    choice=Greedy())  # fmt: skip
    assert divergences([result]) == []
    result.drafted.tokens[3] = -1
    (found,) = divergences([result])
    assert (found["source"], found["token"]) == ("s", 3)
    assert found["logit_margin"] == result.plain.margins[3] > 0
