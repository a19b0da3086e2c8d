"""Optional C kernels: prebuilt for several instruction sets, or compiled on first use."""
