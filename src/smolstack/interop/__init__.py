"""Interoperability with other implementations; transformers is the reference.

This is the only package that imports transformers, so running a model does not require it.
"""
