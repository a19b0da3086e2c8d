"""What a precision costs in quality, measured on a checkpoint's own weights.

Every precision of smolstack, every quantized folder given beside it and llama.cpp's types of the
same weights read the same tokens; each is held against smolstack in float32. Text is judged by the
distributions of the next token (divergence.py), images by their visual tokens and by answers that
every precision is made to give.
"""
