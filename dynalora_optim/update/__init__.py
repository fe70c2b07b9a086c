"""From gradients to weights: param groups, rates, optimizer state, and the wrapped optimizer."""
