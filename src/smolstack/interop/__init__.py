"""Other implementations next to smolstack, above all transformers as the reference.

This is the only package that imports transformers, so running a model does not require it.
"""
