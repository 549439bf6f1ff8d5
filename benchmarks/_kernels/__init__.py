"""Kernels: the HLO that XLA compiles for an accelerator, counted."""
