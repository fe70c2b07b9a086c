"""The state dict of a run: packing and checking it, and filling in state that is missing."""
