"""Finding the named module groups of a model, in forward order."""
