"""Answers of llama.cpp through mtmd, for a Python that has llama-cpp-python (mtmd included).

    python gguf_answers.py TEXT.gguf MMPROJ.gguf PROMPT TOKENS NEWLINES IMAGE …

PROMPT has <image> in it. NEWLINES are the ids, as JSON, that stand for an empty line where the
vocabulary has no token of its own for it. One JSON list of token ids per image.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from typing import Any

import llama_cpp  # type: ignore[import-not-found, unused-ignore]
import numpy as np
from llama_cpp import mtmd_cpp  # type: ignore[import-not-found, unused-ignore]

ROOM = 2048


def chunks_of(mtmd: Any, prompt: str, image: str) -> Iterator[Any]:
    """The prompt as mtmd cuts it: runs of text tokens, and tiles."""
    marker = mtmd_cpp.mtmd_default_marker().decode()
    text = mtmd_cpp.mtmd_input_text()
    text.text = prompt.replace("<image>", marker).encode()
    text.text_len, text.add_special, text.parse_special = len(text.text), False, True
    read = mtmd_cpp.mtmd_helper_bitmap_init_from_file(mtmd, image.encode(), False)
    bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(getattr(read, "bitmap", read))
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    assert mtmd_cpp.mtmd_tokenize(mtmd, chunks, ctypes.byref(text), bitmaps, 1) == 0
    for index in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        yield mtmd_cpp.mtmd_input_chunks_get(chunks, index)


def read_text(context: Any, chunk: Any, place: int, newlines: list[int]) -> int:
    """Have the decoder read a run of text tokens; the place after it."""
    count = ctypes.c_size_t()
    found = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
    ids = [i for k in range(count.value) for i in ([found[k]] if found[k] >= 0 else newlines)]
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for k, token in enumerate(ids):
        batch.token[k], batch.pos[k], batch.n_seq_id[k] = token, place + k, 1
        batch.seq_id[k][0], batch.logits[k] = 0, k == len(ids) - 1
    assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_batch_free(batch)
    return place + len(ids)


def answer(llm: Any, mtmd: Any, prompt: str, image: str, newlines: list[int]) -> Iterator[int]:
    """Greedy token ids after the prompt, without end."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
    place = 0
    for chunk in chunks_of(mtmd, prompt, image):
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == 0:
            place = read_text(llm.ctx, chunk, place, newlines)
            continue
        after = llama_cpp.llama_pos(0)
        failed = mtmd_cpp.mtmd_helper_eval_chunk_single(
            mtmd, llm.ctx, chunk, place, 0, ROOM, False, ctypes.byref(after)
        )
        assert not failed
        place = after.value
    while True:
        pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        token = int(np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).argmax())
        yield token
        one = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
        assert llama_cpp.llama_decode(llm.ctx, one) == 0


def main() -> None:
    text, projector, prompt, tokens, newlines, *images = sys.argv[1:]
    llm = llama_cpp.Llama(text, n_ctx=ROOM, n_batch=ROOM, n_ubatch=ROOM, verbose=False)
    options = mtmd_cpp.mtmd_context_params_default()
    options.use_gpu = False
    mtmd = mtmd_cpp.mtmd_init_from_file(projector.encode(), llm.model, options)
    for image in images:
        ids = []
        for token in answer(llm, mtmd, prompt, image, json.loads(newlines)):
            ids.append(token)
            if token == llm.token_eos() or len(ids) == int(tokens):
                break
        print(json.dumps(ids), flush=True)


if __name__ == "__main__":
    main()
