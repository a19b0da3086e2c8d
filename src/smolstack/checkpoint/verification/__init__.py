"""Checks that a checkpoint is complete and its files are consistent (``smolstack verify``)."""
