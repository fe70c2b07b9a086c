"""Updating weights: param groups, learning rates, optimizer state, and the wrapped optimizer."""
