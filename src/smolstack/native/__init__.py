"""Kernels in C for the processor at hand, compiled on first use; optional in every respect."""
