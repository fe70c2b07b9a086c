"""From a model to its ordered, named module groups."""
