"""A choice put into force: which modules train, what is recomputed, where the graph ends."""
