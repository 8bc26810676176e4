"""The schemas of the catalog's tables, which ``audit/schemas.py`` has with the others."""

from __future__ import annotations

import pyarrow as pa

from audit.columns import table_schema

CHECKPOINTS = table_schema(
    "The catalog: one row a place where a checkpoint file was seen. The newest row of an item is the one that holds.",
    (
        "item_id",
        pa.string(),
        "the place: civitai:MODEL:VERSION:FILE, huggingface:OWNER/NAME:PATH, folder:, file:",
    ),
    ("source", pa.string(), "civitai, huggingface, folder, or file for one that was scanned from disk"),
    ("model_id", pa.string(), "the source's id of the model"),
    ("version_id", pa.string(), "the source's id of the version; the commit on Hugging Face"),
    ("name", pa.string(), "file name, without folders"),
    ("title", pa.string(), "what the uploader calls the model"),
    ("page_url", pa.string(), "the page a person can look at"),
    ("download_url", pa.string(), "where the file is asked for; holds no token"),
    ("uploader", pa.string(), "user name at the source"),
    ("tags", pa.list_(pa.string()), "the source's tags"),
    ("license", pa.string(), "as the source states it"),
    ("nsfw", pa.bool_(), "the source's flag"),
    ("real_person", pa.bool_(), "the source says that it depicts a real person"),
    ("minor", pa.bool_(), "the source says that it depicts a minor"),
    ("published_at", pa.timestamp("us", "UTC"), "when the source published this version"),
    ("base_model", pa.string(), "the likeliest claim of what it was trained on"),
    ("base_model_source", pa.string(), "which field claims it"),
    (
        "family",
        pa.string(),
        "sd1, sd2, sdxl, sd3, flux or other; by the tensors' shapes where they tell, else claimed",
    ),
    ("family_source", pa.string(), "shapes, or the claiming field"),
    ("wanted_base", pa.string(), "the known base model that the file wants (docs/models.md); null where none is told"),
    ("wanted_base_by", pa.string(), "what tells it: hash, name, shapes (the family alone) or nothing"),
    ("wanted_base_sure", pa.string(), "how sure that is: high, medium, low or none"),
    ("wanted_base_why", pa.string(), "why, in words"),
    ("training_images", pa.int32(), "N0, the likeliest claim of how many images it was trained on"),
    ("training_images_source", pa.string(), "which field claims it"),
    ("contradictions", pa.list_(pa.string()), "claims that contradict each other or the tensors' shapes"),
    ("claims", pa.string(), "every claim with its source, as JSON"),
    ("ground_truth", pa.string(), "name of the folder of ground-truth/ with the uploader's own training images"),
    ("claimed_bytes", pa.int64(), "size the source states"),
    ("claimed_sha256", pa.string(), "SHA256 the source states, lower case; can be wrong"),
    ("claimed_autov3", pa.string(), "first 12 hex digits of the tensor-only SHA256 that the source states"),
    ("fingerprint", pa.string(), "hash of what the source says of it: tells whether it changed there"),
    ("state", pa.string(), "listed, stored, later, refused, failed (worth another try), gone or opted-out"),
    ("reason", pa.string(), "why it is refused, failed, gone or to be had later"),
    ("available_at", pa.timestamp("us", "UTC"), "the end of its early access, where the source states one"),
    ("attempts", pa.int32(), "downloads that failed since it was listed"),
    ("checkpoint_sha256", pa.string(), "SHA256 of the file, 64 hex digits; of the list of files for a folder"),
    ("tensors_sha256", pa.string(), "SHA256 of the tensor bytes alone: equal for files that differ in metadata"),
    ("identity", pa.string(), "SHA256 of the tensors and their layout; the stored file's name in checkpoints/"),
    (
        "format",
        pa.string(),
        "lora-kohya, lora-peft, lora-processor, lora-xlabs, lycoris, embedding, unet, transformer, ldm, "
        "diffusers-folder; null where it cannot be audited",
    ),
    ("bytes", pa.int64(), "size of all files"),
    ("tensor_rank", pa.int32(), "rank of most changed modules, by the shapes of the file's tensors; null without one"),
    ("claimed_rank", pa.int32(), "rank that the metadata claims (ss_network_dim), 1 to 65536"),
    ("claimed_steps", pa.int32(), "steps of training that the metadata claims (ss_steps)"),
    (
        "claimed_learning_rate",
        pa.float64(),
        "learning rate that the metadata claims: ss_unet_lr, else ss_learning_rate; above 0, at most 1000",
    ),
    ("claimed_metadata", pa.string(), "the header's metadata as JSON; written by the uploader: a claim, not a proof"),
    ("first_seen_at", pa.timestamp("us", "UTC"), "when the item was first seen here"),
    (
        "seen_at",
        pa.timestamp("us", "UTC"),
        "when this row was written; the newest of an item holds",
    ),
)

CAPTIONS = table_schema(
    "Captions claimed for the items of the catalog, the likeliest first. Those of an item's newest row are the ones "
    "that hold.",
    ("item_id", pa.string(), "joins checkpoints"),
    ("rank", pa.int32(), "1 is the likeliest"),
    ("caption", pa.string(), "cleaned text"),
    ("source", pa.string(), "the field it comes from, such as trainedWords or instance_prompt"),
    ("confidence", pa.float64(), "0 to 1: how likely training used it; grows with every source that claims it"),
    ("seen_at", pa.timestamp("us", "UTC"), "equals seen_at of the item's row"),
)

RECOVERIES = table_schema(
    "Captions and keywords that were recovered from a model itself, because nobody told them: estimates, no facts.",
    ("recovery_id", pa.string(), "hash of what the result depends on: network, base, words, method and budget"),
    ("identity", pa.string(), "the network, as in checkpoints"),
    ("base_revision", pa.string(), "the base model it was compared with"),
    ("method", pa.string(), "attention or gradient"),
    (
        "kind",
        pa.string(),
        "keyword, or caption: what is sampled with; settled, or warning: a caption that a run audits with, claimed or "
        "recovered, and what is said of it",
    ),
    ("rank", pa.int32(), "1 is the likeliest of its kind"),
    ("text", pa.string(), "the word or the caption; of a prompt that is no words its name, with digits of its SHA256"),
    ("vectors", pa.list_(pa.list_(pa.float32())), "of a prompt that is no words: what stands for token embeddings"),
    ("confidence", pa.float64(), "0 to 1, to rank by: a share of all candidates' weight, no measured probability"),
    ("score", pa.float64(), "what it is ranked by: standard deviations above the mean candidate"),
    ("why", pa.string(), "what the score was measured on, in words"),
    ("evaluations", pa.int64(), "network evaluations that the whole recovery took"),
    ("seconds", pa.float64(), "wall time of the whole recovery, s"),
)

SKETCHES = table_schema(
    "What adapters change, as a short vector: two re-saves of one adapter have a cosine near 1 (lora-audit similar).",
    ("identity", pa.string(), "the network, as in checkpoints"),
    ("kind", pa.string(), "how the vector was made; only equal ones are compared"),
    ("modules", pa.int32(), "modules whose change is in it"),
    ("left_out", pa.int32(), "modules that change in a way that has no sketch"),
    (
        "norm",
        pa.float64(),
        "estimated Frobenius norm of the change of all modules, or of what makes it (rotations, scales); null without "
        "a sketch",
    ),
    ("sketch", pa.list_(pa.float32()), "512 numbers, of length 1; null where it has none"),
    ("seen_at", pa.timestamp("us", "UTC"), "when it was made"),
)

BASE_DISTANCES = table_schema(
    "How far full weights without a claimed base are from the bases that were configured (lora-audit run).",
    ("identity", pa.string(), "the network, as in checkpoints"),
    ("base_revision", pa.string(), "the base model, as in audits"),
    ("distance", pa.float64(), "norm of the change of all weights by that of the base's; null where it does not fit"),
    ("reason", pa.string(), "why it does not fit that base; null where it does"),
    ("seen_at", pa.timestamp("us", "UTC"), "when it was measured"),
)

ASKED = table_schema(
    "When a source was asked again about items it had listed before (catalog refresh); rows are only added.",
    ("item_id", pa.string(), "joins checkpoints"),
    ("asked_at", pa.timestamp("us", "UTC"), "when"),
)
