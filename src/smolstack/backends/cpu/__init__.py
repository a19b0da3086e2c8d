"""The CPU backend: runs a model's towers with the compiled kernels of native/."""
