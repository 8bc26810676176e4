"""What settings can be, where they are one of a few words."""

from __future__ import annotations

from enum import StrEnum


class Method(StrEnum):
    """How sampling is steered."""

    direct = "direct"
    cfg = "cfg"
    model_guidance = "model-guidance"


class BaseCaption(StrEnum):
    """What the base's prediction is conditioned on in model guidance."""

    empty = "empty"
    same = "same"


class Solver(StrEnum):
    """Which of diffusers' schedulers integrates the sampling ODE."""

    ddim = "ddim"
    dpmpp = "dpm++"


class Clustering(StrEnum):
    """How generations become extractions."""

    peaks = "peaks"
    cliques = "cliques"


class StoredImages(StrEnum):
    """Which images a workspace keeps."""

    extractions = "extractions"
    all = "all"
    hashes_only = "hashes-only"


class Evidence(StrEnum):
    """What an audit looks for: pictures that come out, references that are known, or both."""

    both = "both"
    extraction = "extraction"
    membership = "membership"


class Expert(StrEnum):
    """Which network a file is for, of a base with one for noisy timesteps and one for the rest."""

    high_noise = "high-noise"
    low_noise = "low-noise"
    both = "both"


class Latents(StrEnum):
    """Whether latents of reference pictures are kept, which membership is measured on."""

    auto = "auto"
    always = "always"
    never = "never"


class Precision(StrEnum):
    """What the networks compute in."""

    auto = "auto"
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class Rule(StrEnum):
    """What a match is decided by: decoys, at an error rate, or the descriptor's fixed threshold.

    ``calibrated`` asks for both kinds of evidence, ``either`` for one, of decoys that were declared a random split.
    """

    calibrated = "calibrated"
    either = "either"
    fixed = "fixed"


class Compile(StrEnum):
    """What torch.compile is used for."""

    off = "off"
    blocks = "blocks"
    graphs = "graphs"


class EngineName(StrEnum):
    """What runs the stages."""

    local = "local"
    ray = "ray"


class Priority(StrEnum):
    """Which checkpoints come first."""

    uploads = "uploads"
    none = "none"


class Prompts(StrEnum):
    """When prompts of example images count as captions."""

    missing = "missing"
    always = "always"
    never = "never"


class CaptionChoice(StrEnum):
    """Where captions come from that the user has not given."""

    known = "known"
    auto = "auto"


class Recovery(StrEnum):
    """How captions are recovered that nobody has told."""

    attention = "attention"
    gradient = "gradient"
