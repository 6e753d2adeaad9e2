"""Gated Slot Attention on a GPU, as Triton kernels: see README.md beside this file."""
