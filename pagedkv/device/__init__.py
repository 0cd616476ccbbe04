"""Moves tensors: the only part of pagedkv that may import torch."""
