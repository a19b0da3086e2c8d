"""Quantizes checkpoints with calibration data (``smolstack quantize``)."""
