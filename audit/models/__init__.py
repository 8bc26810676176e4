"""What is audited: checkpoint files, base models, and the pair of the two that extraction samples from."""
