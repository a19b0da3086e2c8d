"""The reader's shape: towers, tile, tokens, prompt. Everything that its files say is said here."""

from __future__ import annotations

from smolstack.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from smolstack.processor.settings import ImageSettings

TILE, PATCH, SCALE = 192, 12, 2
EDGE = 2 * TILE  # a picture's longer side: two tiles, and one of the whole
GRID = TILE // PATCH
TOKENS_PER_TILE = (GRID // SCALE) ** 2

START, IMAGE, AROUND = "<|im_start|>", "<image>", "<fake_token_around_image>"
WHOLE, END, PAD = "<global-img>", "<end_of_utterance>", "<|pad|>"
TILE_MARKERS = tuple(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7))
SPECIAL_TOKENS = (START, IMAGE, AROUND, WHOLE, END, PAD, *TILE_MARKERS)
FIRST_SPECIAL = 256  # ids below are the bytes
VOCABULARY = FIRST_SPECIAL + len(SPECIAL_TOKENS)
IDS = {token: FIRST_SPECIAL + index for index, token in enumerate(SPECIAL_TOKENS)}

NOTHING = "nothing"
QUESTION = "What does it say?"
QUESTIONS = (
    QUESTION,
    "What number is it?",
    "Read the number.",
    "What is written here?",
    "Which number is in the picture?",
    "What does this picture say?",
    "Read it.",
    "What number is this?",
)
CHAT_TEMPLATE = (
    "<|im_start|>"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'] is not string and message['content'][0]['type'] == 'image' "
    "else ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>' }}"
    "{% endfor %}{% endif %}"
    "<end_of_utterance>{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

SETTINGS = ImageSettings(longest_edge=EDGE, tile_edge=TILE)
CONFIG = ModelConfig(
    vision=VisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_layers=4,
        num_heads=4,
        image_size=TILE,
        patch_size=PATCH,
    ),
    text=TextConfig(
        rope=RopeConfig(theta=10000.0),
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=48,
        max_positions=1024,
        bos_token_id=IDS[START],
        eos_token_ids=(IDS[END],),
        pad_token_id=IDS[PAD],
    ),
    scale=SCALE,
    image_token_id=IDS[IMAGE],
)
