"""From float weights to integers: what is folded where, how a weight is rounded, on what it is
calibrated. What a quantized layer is stands in config/quantization.py and model/quantized.py."""
