"""A student on policy answers its batches' prompts itself, the same way whenever a run is repeated."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from answering.generation import Draws, continuations
from distilling.config import OnPolicyConfig
from distilling.on_policy import samples_of, students_answers
from training.batches import collate, flat_batch
from training.config import ModelConfig
from training.models import build_model, stop_token_ids

CONFIG = OnPolicyConfig(share=0.5, max_new_tokens=12)


@pytest.fixture(scope="module")
def student(tiny_model: Path):
    return build_model(ModelConfig(name=str(tiny_model), from_scratch=True), seed=1).train()


@pytest.fixture(scope="module")
def stops(student, tiny_model: Path):
    return stop_token_ids(student, AutoTokenizer.from_pretrained(tiny_model))


def make_batch():
    ids = [np.arange(10, 10 + length) for length in (9, 5, 14, 7)]
    masks = [np.arange(len(row)) >= start for row, start in zip(ids, (4, 3, 20, 1), strict=True)]
    return flat_batch(ids, masks)


def answered(student, stops, seed, config=CONFIG, max_length=20):
    torch.manual_seed(seed)
    return students_answers(student, stops, make_batch(), config, max_length)


def test_prompts_are_kept_and_loss_lies_on_all_of_the_answers(student, stops):
    before, after = samples_of(make_batch()), samples_of(answered(student, stops, 1))
    for (old_ids, old_mask), (ids, mask) in zip(before, after, strict=True):
        prompt = int(np.argmax(old_mask)) if old_mask.any() else len(old_ids)
        assert np.array_equal(ids[:prompt], old_ids[:prompt])
        assert not mask[:prompt].any() and mask[prompt:].all()
        assert len(ids) - prompt <= CONFIG.max_new_tokens and len(ids) <= 20
    assert [len(ids) for ids, _ in before] != [len(ids) for ids, _ in after]
    assert np.array_equal(after[2][0], before[2][0]), "nothing is supervised in it, so nothing is asked"


def test_an_answer_ends_with_its_stop_token_which_is_learned(student, stops):
    every_token = list(range(student.config.vocab_size))
    after = samples_of(answered(student, every_token, 1))
    assert [len(ids) for ids, _ in after] == [5, 4, 14, 2]
    assert all(mask[-1] for ids, mask in after if len(ids) < 14)


def test_the_same_random_state_gives_the_same_answers_and_another_one_others(student, stops):
    first, again, other = (answered(student, stops, seed)["input_ids"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_the_student_trains_on_as_before(student, stops):
    own = student.generation_config
    answered(student, stops, 1)
    assert student.training and student.generation_config is own
    batch = answered(student, stops, 1)
    student(**{key: batch[key] for key in ("input_ids", "position_ids")}).logits.sum().backward()
    assert all(weight.grad is not None for weight in student.parameters())
    student.zero_grad()


def test_an_empty_batch_of_a_rank_stays_empty(student, stops):
    empty = collate([])
    assert students_answers(student, stops, empty, CONFIG, 20) is empty


def test_tokens_are_drawn_as_often_as_they_are_probable_at_the_temperature(student, stops):
    prompt, draws = np.array([11, 12, 13]), 2000
    with torch.no_grad():
        logits = student.eval()(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1].double()
    expected = (logits * 20).softmax(0)  # an untrained model finds all tokens alike, so it is made bolder
    by_key = Draws(range(draws), temperature=1 / 20)
    found = continuations(student, [prompt] * draws, stops=stops, room=[1] * draws, draws=by_key)
    counts = Counter(int(answer.ids[0]) for answer in found)
    for token in expected.topk(5).indices.tolist():
        share = expected[token].item()
        assert counts[token] / draws == pytest.approx(share, abs=4 * (share / draws) ** 0.5)


def test_greedy_answers_do_not_depend_on_the_batch_or_on_the_models_own_settings(student, stops):
    prompts = [np.arange(10, 10 + length) for length in (3, 9, 6)]
    together = continuations(student, prompts, stops=stops, room=[8] * 3)
    student.generation_config.repetition_penalty = 5.0
    alone = [continuations(student, [prompt], stops=stops, room=[8])[0] for prompt in prompts]
    student.generation_config.repetition_penalty = None
    assert [one.ids.tolist() for one in together] == [one.ids.tolist() for one in alone]
