"""Make the tokenizer and the model configs of tiny/ and small/: models for tests and first runs, without a download.

    python configs/models/make_tiny.py

The byte-level BPE is trained on text that Python itself carries (3.11 made the files beside this one).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 4096
PAD, BEGIN, END, END_OF_TURN = "<|pad|>", "<|begin|>", "<|end|>", "<|im_end|>"
CONTROL_TOKENS = [PAD, BEGIN, END, "<|im_start|>", END_OF_TURN]

# ChatML; the generation block marks what the assistant says, so that masks can be taken from the template.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 7, "num_attention_heads": 5},
}


def main() -> None:
    folder = Path(__file__).parent
    tokenizer = train_tokenizer()
    for name, shape in SHAPES.items():
        tokenizer.save_pretrained(folder / name)
        model_config(tokenizer, **shape).save_pretrained(folder / name)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML control tokens, and digits split one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens={"start_of_turn_token": "<|im_start|>", "end_of_turn_token": END_OF_TURN},
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def text() -> Iterator[str]:
    """Python's own reference manual, and word problems in arithmetic."""
    yield from (topics[name] for name in sorted(topics))
    yield from word_problems(4000)


def word_problems(number: int) -> Iterator[str]:
    generator = random.Random(0)
    names = ["Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "James"]
    things = ["apples", "books", "cookies", "dollars", "eggs", "flowers", "games", "hats", "marbles", "pencils"]
    for _ in range(number):
        name, other = generator.sample(names, 2)
        thing = generator.choice(things)
        first, second, times = generator.randint(2, 90), generator.randint(2, 90), generator.randint(2, 9)
        yield (
            f"{name} has {first} {thing} and {other} gives {name} {second} more. Then {name} buys {times} times as "
            f"many {thing}. How many {thing} does {name} have in total? First we add: {first} + {second} = "
            f"{first + second}. Then we multiply: {first + second} * {times} = {(first + second) * times}. "
            f"The answer is {(first + second) * times}."
        )


def model_config(tokenizer: PreTrainedTokenizerFast, **shape: int) -> LlamaConfig:
    return LlamaConfig(
        **shape,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
    )


if __name__ == "__main__":
    main()
