"""The schemas of the tables of studies; audit/schemas.py has them among all."""

from __future__ import annotations

import pyarrow as pa

from audit.columns import table_schema as _schema

STUDIES = _schema(
    "One row a study that was begun: what its fine-tunes and audits follow from.",
    ("study", pa.string(), "its name"),
    ("base", pa.string(), "the base model as it was asked for"),
    ("base_revision", pa.string(), "the hub commit, or a SHA256 of the local files"),
    ("descriptor", pa.string(), "the descriptor as it was asked for"),
    ("few_shots", pa.list_(pa.string()), "names of its few-shot sets"),
    ("cells", pa.int32(), "audits it consists of"),
    ("fine_tunes", pa.int32(), "fine-tunes these are of"),
    ("varied", pa.list_(pa.string()), "factors with more than one level"),
    ("document", pa.string(), "the study file, and the hashes and captions of the sets' pictures, as JSON"),
    ("folder", pa.string(), "where its sets were looked for: the folder of the study file"),
    ("began_at", pa.timestamp("us", "UTC"), "when"),
)

FINE_TUNES = _schema(
    "One row a checkpoint that was fine-tuned here for studies. One fine-tune serves every study that asks for it.",
    ("fine_tune_id", pa.string(), "hash of base, pictures, captions, factors and seed, 32 hex digits"),
    ("few_shot", pa.string(), "name of the few-shot set"),
    ("family", pa.string(), "family of the base model"),
    ("base_revision", pa.string(), "the hub commit, or a SHA256 of the local files"),
    ("method", pa.string(), "lora, or dreambooth: all weights of the denoiser"),
    ("layout", pa.string(), "layout of a LoRA's file: kohya, peft or diffusers; null for dreambooth"),
    ("rank", pa.int32(), "rank of a LoRA"),
    ("targets", pa.string(), "what a LoRA adapts: attention, transformer or everything"),
    ("text_encoder", pa.bool_(), "whether the text encoder was trained too"),
    ("prior", pa.bool_(), "whether class pictures of the base were trained on beside (prior preservation)"),
    ("steps", pa.int32(), "optimiser steps for each training picture"),
    ("optimiser_steps", pa.int32(), "optimiser steps in all"),
    ("lr", pa.float64(), "peak learning rate"),
    ("batch", pa.int32(), "pictures a step"),
    ("schedule", pa.string(), "learning rate over the steps: constant or cosine"),
    ("n0", pa.int32(), "training pictures"),
    ("augmentation", pa.string(), "none, mirrored, cutout or randaugment"),
    ("defence", pa.string(), "what was done against extraction beside: none, weight-filter or dp-sgd"),
    ("filter_kept", pa.float64(), "share of a LoRA's directions that weight-filter kept; null for others"),
    ("noise_multiplier", pa.float64(), "noise of dp-sgd over the length gradients are clipped to; null for others"),
    ("repeat", pa.int32(), "number of the repetition: another seed"),
    ("captions", pa.list_(pa.string()), "captions of the training pictures, each once"),
    ("picture_sha256", pa.list_(pa.string()), "SHA256 of the training pictures' files"),
    ("identity", pa.string(), "SHA256 of the tensors and their layout, as that of an audited checkpoint"),
    ("file", pa.string(), "the file or folder within the workspace"),
    ("final_loss", pa.float64(), "mean loss of the last 100 steps"),
    ("seconds", pa.float64(), "wall time of the run that finished it, s"),
    ("device", pa.string(), "where it was trained"),
    ("finished_at", pa.timestamp("us", "UTC"), "when"),
)

STUDY_CELLS = _schema(
    "One row a finished cell of a study: an audit of a fine-tune. Joins fine_tunes, quality, audits and evaluations.",
    ("study", pa.string(), "joins studies"),
    ("cell_id", pa.string(), "hash of set and levels, 16 hex digits"),
    ("few_shot", pa.string(), "name of the few-shot set"),
    ("fine_tune_id", pa.string(), "joins fine_tunes"),
    ("audit_id", pa.string(), "joins audits and evaluations"),
    ("extraction", pa.string(), "how sampling was steered: direct, cfg or model-guidance"),
    ("w", pa.float64(), "guidance weight that was asked for; null for auto, and for direct"),
    ("k", pa.float64(), "correction term of model guidance; null for others"),
    ("images", pa.int32(), "images sampled for each training picture"),
    ("captions", pa.string(), "what the auditor knew of them: known, partial, trigger, wrong, empty or unknown"),
    ("caption_share", pa.float64(), "share of each caption's words that partial ones have; null for others"),
    ("clustering", pa.string(), "peaks or cliques"),
    ("lora_scale", pa.float64(), "strength at which a LoRA was applied"),
    ("rule", pa.string(), "rule of the verdict: none (nothing was asked), fixed or calibrated"),
    ("evidence", pa.string(), "what the verdict rests on: extraction or both; null where nothing was asked"),
    ("references", pa.int32(), "training pictures that were asked about; null where nothing was asked"),
    ("recalled", pa.int32(), "of these, called a match"),
    ("innocent", pa.int32(), "held-out pictures that were asked about among them"),
    ("accused", pa.int32(), "of these, called a match: wrongly"),
    ("finished_at", pa.timestamp("us", "UTC"), "when"),
)

QUALITY = _schema(
    "One row a fine-tune of a study: what it is worth to its owner, and so what a defence costs.",
    ("fine_tune_id", pa.string(), "joins fine_tunes"),
    ("base_training_loss", pa.float64(), "mean denoising loss of the base on the training pictures, on fixed noise"),
    ("training_loss", pa.float64(), "the same of the fine-tune"),
    ("base_held_out_loss", pa.float64(), "the base's on control pictures; null where the set has none"),
    ("held_out_loss", pa.float64(), "the same of the fine-tune: above the base's where it has forgotten its kind"),
    ("samples", pa.int32(), "pictures drawn from it with its captions"),
    ("similarity", pa.float64(), "mean cosine of these and the training pictures, by the study's descriptor"),
    (
        "sharpness",
        pa.float64(),
        "their variance of the Laplacian over that of the training pictures: below 1 is blurred",
    ),
    (
        "epsilon",
        pa.float64(),
        "what dp-sgd bounds the loss of privacy of one picture by, at delta 1e-5; null without, and without noise",
    ),
    ("descriptor", pa.string(), "which descriptor judged the similarity"),
)
