"""Quantizing a checkpoint with data: what ``smolstack quantize`` does."""
