"""Quality loss of precisions, measured on a checkpoint's own weights.

All precisions of smolstack, the given quantized folders, and llama.cpp's types of the same weights
read the same tokens, and are compared with smolstack in float32. Text is judged by next-token
distributions (divergence.py), images by their visual tokens and by forced answers.
"""
