"""Make tokenizers, processor and configs of tiny/, small/ and tiny_vision/: models for first runs, without a download.

    python configs/models/make_tiny.py

The byte-level BPE is trained on text that Python itself carries (3.11 made the files beside this one).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics3Config, Idefics3Processor, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

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

# The tokens that Idefics3 and SmolVLM put around an image, and in its place.
IMAGE_TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
IMAGE_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
IMAGE_PIXELS, PATCH_PIXELS, PATCHES_PER_TOKEN = 32, 8, 2  # of a side each

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
    processor = image_processor(tokenizer)
    processor.save_pretrained(folder / "tiny_vision")
    image_text_config(processor.tokenizer).save_pretrained(folder / "tiny_vision")


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


def image_processor(tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
    """The tokenizer with tokens for images, and what makes one square of pixels of any image."""
    tokenizer.add_special_tokens({"additional_special_tokens": IMAGE_TOKENS})
    tokenizer.chat_template = None
    size = {"longest_edge": IMAGE_PIXELS}
    return Idefics3Processor(
        Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False),
        tokenizer,
        image_seq_len=(IMAGE_PIXELS // PATCH_PIXELS // PATCHES_PER_TOKEN) ** 2,
        chat_template=IMAGE_CHAT_TEMPLATE,
    )


def image_text_config(tokenizer: PreTrainedTokenizerFast) -> Idefics3Config:
    text = model_config(tokenizer, **SHAPES["tiny"])
    text.vocab_size = len(tokenizer)
    text.tie_word_embeddings = False
    return Idefics3Config(
        text_config=text.to_dict(),
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": IMAGE_PIXELS,
            "patch_size": PATCH_PIXELS,
        },
        scale_factor=PATCHES_PER_TOKEN,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Idefics3ForConditionalGeneration"],
    )


if __name__ == "__main__":
    main()
