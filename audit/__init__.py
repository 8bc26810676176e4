"""lora-audit: which images was this fine-tuned diffusion model trained on?"""

import os
from importlib.metadata import version

__version__ = version("lora-audit")
# Libraries beneath us report their use to their makers unless they are told not to. What is audited here is private.
for _name, _value in (
    ("ORT_DISABLE_TELEMETRY", "1"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
):
    os.environ.setdefault(_name, _value)
