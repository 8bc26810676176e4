"""Steer sampling into the fine-tuning data: guidance, the sampler, and what collects its images in the spool."""
