"""Applying a choice to the model: which modules train, what is recomputed, where the graph ends."""
