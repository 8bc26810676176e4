"""lora-audit: which images was this fine-tuned diffusion model trained on?"""

from importlib.metadata import version

__version__ = version("lora-audit")
