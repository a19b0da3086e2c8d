"""Checkpoint folders: finding, reading, checking and writing them. Safetensors and JSON only."""
