"""File formats: what a checkpoint's tensors are called, what they do to the base's weights, and how they are read."""
