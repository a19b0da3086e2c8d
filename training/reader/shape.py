"""The reader's shape: towers, tile, tokens, prompt. Everything that its files say is said here."""

from __future__ import annotations

from smolstack.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from smolstack.processor.settings import ImageSettings

TILE, PATCH, SCALE = 128, 8, 2
EDGE = 3 * TILE  # an image's longer side: three tiles, and one of the whole
GRID = TILE // PATCH
CELLS = GRID // SCALE  # visual tokens along a tile's side
TOKENS_PER_TILE = CELLS**2
SIDE = EDGE // TILE * CELLS  # of them, along the longer side of an image
HALVES = GRID // CELLS  # a cell that is pointed at is one of this many parts, side by side

START, IMAGE, AROUND = "<|im_start|>", "<image>", "<fake_token_around_image>"
WHOLE, END, PAD = "<global-img>", "<end_of_utterance>", "<|pad|>"
TILE_MARKERS = tuple(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7))
CELL_TOKENS = tuple(  # of all tiles, then of the tile of the whole
    f"<{name}_{row}_{col}>"
    for name, side in (("cell", SIDE), ("whole", CELLS))
    for row in range(1, side + 1)
    for col in range(1, HALVES * side + 1)
)
RIGHT = "<right>"  # a character further right in the cell of the one before
POINT = "<point>"  # begins an answer that points at what it reads
SPECIAL_TOKENS = (
    *(START, IMAGE, AROUND, WHOLE, END, PAD),
    *TILE_MARKERS,
    *CELL_TOKENS,
    *(RIGHT, POINT),
)
FIRST_SPECIAL = 256  # ids below are the bytes
VOCABULARY = FIRST_SPECIAL + len(SPECIAL_TOKENS)
IDS = {token: FIRST_SPECIAL + index for index, token in enumerate(SPECIAL_TOKENS)}

FIRST_CELL = IDS[CELL_TOKENS[0]]

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,:;!?'\"-_()/&%$#@+*="
MAX_LINES, MAX_LENGTH = 4, 24

NOTHING = "nothing"
QUESTION = "What does it say?"
QUESTIONS = (
    QUESTION,
    "What is written here?",
    "What does this image say?",
    "Read it.",
    "Read the text.",
    "What is the text?",
    "What number is it?",
    "Read the number.",
    "Transcribe this.",
)
COUNT_QUESTIONS = (
    "How many lines?",
    "How many lines are there?",
    "How many lines of text are there?",
    "Count the lines.",
)
LINE_QUESTIONS = ("Read line {}.", "Read line {}", "What does line {} say?", "What is on line {}?")
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
        hidden_size=224,
        intermediate_size=896,
        num_layers=6,
        num_heads=7,
        image_size=TILE,
        patch_size=PATCH,
    ),
    text=TextConfig(
        rope=RopeConfig(theta=1e6),
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=448,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=48,
        max_positions=2048,
        bos_token_id=IDS[START],
        eos_token_ids=(IDS[END],),
        pad_token_id=IDS[PAD],
    ),
    scale=SCALE,
    image_token_id=IDS[IMAGE],
    tied=True,
)
