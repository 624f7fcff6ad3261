"""jbn beside Flax, NNX, Haiku, Equinox and PyTorch, whichever are installed: `python -m benchmarks`."""
