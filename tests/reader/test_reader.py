"""The bundled checkpoint reads, here and in transformers.

The images are drawn on the spot in fonts that training never saw: DejaVu, where it is installed,
and the font that comes with Pillow.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import smolstack
from smolstack.vlm import VLM

BUNDLED = Path(smolstack.__file__).parent / "reader"
QUESTION = "What does it say?"
DEJAVU = Path("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf")
SIZES = ((200, 80), (400, 200), (320, 240), (256, 256))

pytestmark = pytest.mark.skipif(
    not (BUNDLED / "model.safetensors").is_file(), reason="no reader is bundled"
)


@pytest.fixture(scope="module")
def reader() -> VLM:
    return smolstack.load()


def draw_number(seed: int) -> tuple[Image.Image, str]:
    """A number of one to six digits, dark on light, somewhere in an image."""
    rng = random.Random(seed)
    width, height = rng.choice(SIZES)
    text = str(rng.randrange(10 ** rng.randint(0, 5), 10**6))[: rng.randint(1, 6)]
    size = rng.uniform(0.35, 0.8) * min(height, width * 1.6 / len(text))
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont = ImageFont.load_default(size)
    if DEJAVU.is_file() and seed % 2:
        font = ImageFont.truetype(str(DEJAVU), size)
    image = Image.new("RGB", (width, height), rng.choice(["white", "lightyellow", "lightblue"]))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    place = (
        rng.uniform(0, max(0, width - (right - left))) - left,
        rng.uniform(0, max(0, height - (bottom - top))) - top,
    )
    draw.text(place, text, fill=rng.choice(["black", "navy", "darkred"]), font=font)
    return image, text


def test_it_reads_numbers_in_fonts_it_never_saw(reader: VLM) -> None:
    drawn = [draw_number(seed) for seed in range(60)]
    answers = [reader.ask(image, QUESTION, max_new_tokens=40).text.strip() for image, _ in drawn]
    wrong = [(text, answer) for (_, text), answer in zip(drawn, answers, strict=True)]
    wrong = [(text, answer) for text, answer in wrong if text != answer]
    assert len(wrong) <= 2, wrong


def draw_block(lines: list[str]) -> Image.Image:
    """Lines one under the other, in the font that comes with Pillow."""
    image = Image.new("RGB", (400, 200), "white")
    text = "\n".join(lines)
    font = ImageFont.load_default(34)
    ImageDraw.Draw(image).multiline_text((20, 20), text, fill="black", font=font, spacing=8)
    return image


BLOCKS = (
    ["Hello 42"],
    ["Thank you!"],
    ["smolstack"],
    ["Total:", "19.90"],
    ["Monday", "9:00-17:00"],
    ["Platform 9", "Train 17:45", "London"],
    ["Open", "Mon-Fri", "9:00-17:00", "closed today"],
)


def test_it_reads_words_and_lines_and_counts_them(reader: VLM) -> None:
    wrong = []
    for lines in BLOCKS:
        asked = [(QUESTION, "\n".join(lines)), ("How many lines?", str(len(lines)))]
        asked += [(f"Read line {number}", line) for number, line in enumerate(lines, start=1)]
        for question, truth in asked:
            answer = reader.ask(draw_block(lines), question).text
            wrong += [(question, truth, answer)] if answer != truth else []
    assert len(wrong) <= 4, wrong  # of 28


def test_it_says_nothing_on_an_empty_image(reader: VLM) -> None:
    for color in ("white", "black", "lightblue"):
        answer = reader.ask(Image.new("RGB", (300, 150), color), QUESTION, max_new_tokens=40)
        assert answer.text.strip() == "nothing"


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 12_000_000


def test_transformers_gives_the_same_answers(reader: VLM) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        BUNDLED, dtype=torch.float32
    ).eval()
    processor = transformers.AutoProcessor.from_pretrained(BUNDLED)
    for seed in range(4):
        image, _ = draw_number(seed)
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=prompt, images=[image], return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        theirs = processor.tokenizer.decode(new, skip_special_tokens=True)
        assert reader.ask(image, QUESTION, max_new_tokens=40).text.strip() == theirs.strip()
