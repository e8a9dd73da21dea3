"""Training data: distil, select, clean."""
