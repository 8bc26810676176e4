"""Steer sampling into the fine-tuning data: captions, guidance, and the sampler."""
