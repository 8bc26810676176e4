"""The embedded model made again: data, training scripts and few-shot sets. Outside the wheel; run from a checkout."""
