"""Checks whether a checkpoint is complete and its files are consistent, for ``smolstack verify``."""
