"""Captions that nobody told: read out of what fine-tuning has changed."""
