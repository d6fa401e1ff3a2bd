"""Coloured shapes and a question about each, drawn from a seed: learned in minutes by a tiny model. No network.

Keys in `dataset:`: `num_rows` (200), `seed` (42), and `size` (32), the side of an image in pixels.
"""

import random

from PIL import Image, ImageDraw

from mixture.hub import HubSource

SOURCE = HubSource(id=None, licence="CC0-1.0", commercial_use=True, format="images")

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "triangle")
QUESTIONS = {"colour": "What colour is the shape?", "shape": "Which shape is it?"}


def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    """Rows with `images`, one image drawn when it is read, and `messages`: a question and its answer in one word."""
    num_rows = dataset_config.get("num_rows", 200)
    cut = round(split_ratio * num_rows)
    numbers = {dataset_config.train_split: range(cut), dataset_config.test_split: range(cut, num_rows)}[split]
    return DrawnRows(numbers, seed=dataset_config.get("seed", 42), size=dataset_config.get("size", 32))


class DrawnRows:
    """A row for each of the numbers, the same for the same seed."""

    def __init__(self, numbers, *, seed, size):
        self.numbers = numbers
        self.seed = seed
        self.size = size

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        generator = random.Random(f"{self.seed} {self.numbers[index]}")
        answers = {"colour": generator.choice(list(COLOURS)), "shape": generator.choice(SHAPES)}
        asked = generator.choice(list(QUESTIONS))
        return {
            "images": [drawing(answers["shape"], COLOURS[answers["colour"]], self.size, generator)],
            "messages": [
                {"role": "user", "content": QUESTIONS[asked]},
                {"role": "assistant", "content": answers[asked]},
            ],
        }


def drawing(shape, colour, size, generator):
    """A white image with the shape somewhere in it."""
    image = Image.new("RGB", (size, size), "white")
    side = generator.randint(size // 2, size * 3 // 4)
    left, top = generator.randint(0, size - side - 1), generator.randint(0, size - side - 1)
    right, bottom = left + side, top + side
    canvas = ImageDraw.Draw(image)
    if shape == "circle":
        canvas.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        canvas.rectangle((left, top, right, bottom), fill=colour)
    else:
        canvas.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)
    return image


def score(prediction, row):
    """1.0 where the prediction is the answer, case and full stop aside."""
    return float(prediction.strip().strip(".").lower() == row["messages"][-1]["content"])
