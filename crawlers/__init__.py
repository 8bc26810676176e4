"""Where checkpoints come from: the sources that fill the catalog which ``audit`` works through."""
