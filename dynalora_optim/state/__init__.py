"""Between a run and its state dict: packed, checked, and filled up where state is missing."""
