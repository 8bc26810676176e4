"""Strangers' bytes are parsed in child processes that can do little: whoever takes one over has gained little.

``pool`` is the parent's side; ``child`` is what runs on the other, with the parsers in ``parsers``.
"""
