"""Descriptors: images to unit vectors whose cosine tells copies from different pictures, and the PDQ hash."""

from audit.descriptors.base import Descriptor
from audit.descriptors.pdq import pdq_distance, pdq_hash
from audit.descriptors.pictures import open_image
from audit.descriptors.registry import load_descriptor

__all__ = ["Descriptor", "load_descriptor", "open_image", "pdq_distance", "pdq_hash"]
