"""The text tower: a small decoder that is not trained on images.

In place of visual tokens, it receives the embeddings of its own digit tokens, laid out in a grid as
a number would be in an image, and it learns to output the number. It has its own width, depth,
tokenizer and chat template. After this training it is frozen, so a connector has to map visual
tokens to these embeddings.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional

from smolstack.checkpoint.new import random_model
from smolstack.checkpoint.save import save_checkpoint, to_json
from smolstack.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from smolstack.processor import prompt as prompts
from smolstack.processor.geometry import TilePlan, plan_tiles
from smolstack.processor.processor import Processor, Prompt
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tokenizer import TextTokenizer

QUESTION = "Which number is it?"
SPECIAL = ["<|end|>", "<|start|>", "<|pad|>", "<image>", "<fake_token_around_image>"]
SPECIAL += ["<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))]
# A digit's token states in which half of a visual token the digit is: left or right.
WORDS = ["<nothing>", *(f"<left {d}>" for d in range(10)), *(f"<right {d}>" for d in range(10))]
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}{% endif %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WIDTHS = (1.4, 3.5)  # minimum and maximum width of a digit, in patches
SIZES = ((200, 80), (320, 160), (400, 200), (256, 256), (320, 240), (300, 100))


def build_tokenizer() -> tokenizers.Tokenizer:
    """Return a tokenizer of bytes, digit tokens and special tokens, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *WORDS])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    return tokenizer


def make_config(vision: VisionConfig, scale: int, tokenizer: tokenizers.Tokenizer) -> ModelConfig:
    """Return a config of the text tower and a given vision tower."""
    text = TextConfig(
        rope=RopeConfig(theta=10000.0),
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=96,
        intermediate_size=256,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        max_positions=2048,
        bos_token_id=tokenizer.token_to_id("<|start|>"),
        eos_token_ids=(tokenizer.token_to_id("<|end|>"),),
        pad_token_id=tokenizer.token_to_id("<|pad|>"),
    )
    return ModelConfig(vision, text, scale, image_token_id=tokenizer.token_to_id("<image>"))


@dataclass(frozen=True)
class NumberLayout:
    """A number laid out on an image's plan: token weights ``cells``, (tiles, S, len(WORDS))."""

    number: str
    plan: TilePlan
    cells: Tensor


def lay_out_number(rng: random.Random, plan: TilePlan, side: int, scale: int) -> NumberLayout:
    """Lay out a random number at a random position: the weight of each digit token in each cell.

    Weights are largest at a digit's center and fall off towards its edges by a random amount, as
    a frozen vision tower's features are not sharper.
    """
    number = str(rng.randrange(10 ** rng.randint(0, 5), 10**6))[: rng.randint(1, 6)]
    aspect = plan.source[1] / plan.source[0]
    patch = 1 / (max(plan.cols, 1) * side)  # of the image's width
    digit = min(rng.uniform(*WIDTHS) * patch, 0.95 / len(number))
    width = digit * len(number)
    height = min(0.95, digit * rng.uniform(1.2, 1.9) / aspect)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    fade = (rng.uniform(0.3, 3.0), rng.uniform(0.2, 2.0))
    grid = (max(plan.rows, 1), max(plan.cols, 1))
    boxes = [
        (col / grid[1], row / grid[0], 1 / grid[1], 1 / grid[0])
        for row in range(plan.rows)
        for col in range(plan.cols)
    ]
    tiles = []
    for x, y, wide, high in [*boxes, (0.0, 0.0, 1.0, 1.0)]:
        columns = x + (np.arange(side) + 0.5) / side * wide
        rows = y + (np.arange(side) + 0.5) / side * high
        down = _falloff(rows, top + height / 2, height, high / side) ** fade[1]
        words = np.zeros((side, side, len(WORDS)), dtype=np.float32)
        for place, name in enumerate(number):
            centre = left + (place + 0.5) * digit
            across = _falloff(columns, centre, digit, wide / side) ** fade[0]
            strength = down[:, None] * across[None, :]
            for half in range(scale):  # even columns of patches are left halves, odd ones right
                word = 1 + 10 * (half * 2 // scale) + int(name)
                words[:, half::scale, word] += strength[:, half::scale]
        cells = words.reshape(side // scale, scale, side // scale, scale, -1).mean(axis=(1, 3))
        cells = cells.reshape(-1, len(WORDS)) * scale
        cells[:, 0] = np.clip(1 - cells[:, 1:].sum(axis=1), 0, 1)
        tiles.append(cells)
    return NumberLayout(number, plan, torch.from_numpy(np.stack(tiles)))


def _falloff(at: np.ndarray, centre: float, extent: float, step: float) -> np.ndarray:
    """Return weights that fall from 1 at the center to 0 at the edges, at least a patch wide."""
    reach = max(extent, step) / 2 + step / 4
    return np.clip(1 - np.abs(at - centre) / reach, 0, 1)


class LayoutBatches:
    """Random batches of layouts with the tokens of their chats."""

    def __init__(self, processor: Processor, settings: ImageSettings, seed: int) -> None:
        self.processor, self.settings, self.rng = processor, settings, random.Random(seed)

    def batch(self, count: int) -> tuple[list[NumberLayout], Tensor, int]:
        """Return layouts of one plan, right-padded token ids (B, T), and the answers' start."""
        processor, config = self.processor, self.processor.config
        plan = plan_tiles(
            self.rng.choice(SIZES), self.settings, processor.tokens_per_tile, split=False
        )
        side = self.settings.tile_edge // config.vision.patch_size
        layouts = [lay_out_number(self.rng, plan, side, config.scale) for _ in range(count)]
        prompt = _prompt(processor, plan)
        end = config.text.eos_token_ids[0]
        answers = [[*processor.tokenizer.encode(layout.number), end] for layout in layouts]
        longest = max(map(len, answers))
        rows = [
            [*prompt.token_ids, *answer, *[processor.pad_id] * (longest - len(answer))]
            for answer in answers
        ]
        return layouts, torch.tensor(rows), len(prompt.token_ids)


def _prompt(processor: Processor, plan: TilePlan) -> Prompt:
    text = processor.render([prompts.user_message(1, QUESTION)])
    text = prompts.expand_placeholders(text, [plan], processor.markers)
    return Prompt(text, tuple(processor.tokenizer.encode(text)), (), (plan,))


def train_text_tower(
    folder: Path,
    vision: VisionConfig,
    scale: int,
    settings: ImageSettings,
    *,
    steps: int,
    seed: int,
) -> Path:
    """Train the decoder and save it, with a random vision tower and connector."""
    tokenizer = build_tokenizer()
    config = make_config(vision, scale, tokenizer)
    side = side_files(tokenizer, settings, config)
    processor = Processor(config, settings, TextTokenizer(side["tokenizer.json"], {}), TEMPLATE)
    torch.manual_seed(seed)
    model = random_model(config, seed=seed).train()
    with torch.no_grad():
        model.decoder.embedding.weight.mul_(0.3)
    words = torch.tensor([tokenizer.token_to_id(word) for word in WORDS])
    images = LayoutBatches(processor, settings, seed)
    parameters = [*model.decoder.parameters(), *model.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
    began = time.time()
    for step in range(1, steps + 1):
        layouts, ids, start = images.batch(32)
        digit_embeddings = model.decoder.embedding(words)
        cells = torch.stack([layout.cells for layout in layouts])
        visual = cells @ digit_embeddings  # (B, tiles, S, D)
        visual = visual + torch.randn_like(visual) * digit_embeddings.detach().std() * 0.3
        embeddings = model.decoder.embedding(ids)
        positions = (ids[0] == config.image_token_id).nonzero().flatten()
        embeddings = embeddings.index_copy(1, positions, visual.flatten(1, 2))
        logits = model.logits(model.decoder(embeddings)[:, start - 1 : -1])
        labels = ids[:, start:]
        loss = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=processor.pad_id
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            correct = (logits.argmax(-1) == labels) | (labels == processor.pad_id)
            share = correct.all(dim=1).float().mean().item()
            seconds = time.time() - began
            line = f"text tower: step {step:5d}, loss {loss.item():.3f}, exact {share:.0%}"
            print(f"{line}, {seconds:.0f} s", flush=True)
    return save_checkpoint(folder, model.eval(), side, overwrite=True)


def side_files(
    tokenizer: tokenizers.Tokenizer, settings: ImageSettings, config: ModelConfig
) -> dict[str, bytes]:
    """Return the files of a checkpoint other than its weights."""
    named = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    files = {
        "preprocessor_config.json": settings.to_hf(),
        "processor_config.json": {"processor_class": "Idefics3Processor"},
        "generation_config.json": {"eos_token_id": [config.text.eos_token_ids[0]]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Idefics3Processor",
            "model_max_length": config.text.max_positions,
            "padding_side": "left",
            **named,
        },
        "chat_template.json": {"chat_template": TEMPLATE},
    }
    contents = {name: to_json(data).encode() for name, data in files.items()}
    contents["chat_template.jinja"] = TEMPLATE.encode()
    contents["tokenizer.json"] = tokenizer.to_str().encode()
    return contents
