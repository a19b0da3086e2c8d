"""The CPU backend: a model's towers by the compiled kernels of native/."""
