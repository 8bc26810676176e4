"""What a rented GPU can tell in six minutes: ``python -m benchmarks.gpu``."""
