"""``python -m smolstack.interop.parity``: compares every published shape with transformers, by
stage.
"""
