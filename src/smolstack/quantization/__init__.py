"""Quantization of float weights: calibration, smoothing and rounding.

The format of a quantized layer is defined in config/quantization.py and model/quantized.py.
"""
