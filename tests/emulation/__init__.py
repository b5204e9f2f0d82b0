"""Runs the CUDA kernels' own source on the CPU; see emulator.h for how and what it checks."""
