"""Sketches: a few hundred numbers of what an adapter changes, by which it is found again however it was saved."""
