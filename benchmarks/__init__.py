"""What this project claims, printed by commands that anyone can run."""
