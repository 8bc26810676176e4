"""The schema of every table of a workspace. ``docs`` holds a sentence a column: unit, range, meaning.

All times are UTC. ``audit_id`` joins audits, generations, extractions, matches and evaluations.
"""

from __future__ import annotations

import pyarrow as pa

VECTOR = pa.list_(pa.float32())
PDQ = pa.binary(32)


def _schema(doc: str, *columns: tuple[str, pa.DataType, str]) -> pa.Schema:
    fields = [pa.field(name, kind, metadata={"doc": text}) for name, kind, text in columns]
    return pa.schema(fields, metadata={"doc": doc})


CHECKPOINTS = _schema(
    "The catalog: one row a place where a checkpoint file was seen. The newest row of an item is the one that holds.",
    ("item_id", pa.string(), "the place: civitai:MODEL:VERSION:FILE, huggingface:OWNER/NAME:PATH, folder:, file:"),
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
    ("family", pa.string(), "sd1, sd2, sdxl, sd3, flux or other; by the tensors' shapes where they tell, else claimed"),
    ("family_source", pa.string(), "shapes, or the claiming field"),
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
    ("seen_at", pa.timestamp("us", "UTC"), "when this row was written; the newest of an item holds"),
)

CAPTIONS = _schema(
    "Captions claimed for the items of the catalog, the likeliest first. Those of an item's newest row are the ones "
    "that hold.",
    ("item_id", pa.string(), "joins checkpoints"),
    ("rank", pa.int32(), "1 is the likeliest"),
    ("caption", pa.string(), "cleaned text"),
    ("source", pa.string(), "the field it comes from, such as trainedWords or instance_prompt"),
    ("confidence", pa.float64(), "0 to 1: how likely training used it; grows with every source that claims it"),
    ("seen_at", pa.timestamp("us", "UTC"), "equals seen_at of the item's row"),
)

RECOVERIES = _schema(
    "Captions and keywords that were recovered from a model itself, because nobody told them: estimates, no facts.",
    ("recovery_id", pa.string(), "hash of what the result depends on: network, base, words, method and budget"),
    ("identity", pa.string(), "the network, as in checkpoints"),
    ("base_revision", pa.string(), "the base model it was compared with"),
    ("method", pa.string(), "attention or gradient"),
    ("kind", pa.string(), "keyword, or caption: what is sampled with"),
    ("rank", pa.int32(), "1 is the likeliest of its kind"),
    ("text", pa.string(), "the word or the caption"),
    ("confidence", pa.float64(), "0 to 1, to rank by: a share of all candidates' weight, no measured probability"),
    ("score", pa.float64(), "what it is ranked by: standard deviations above the mean candidate"),
    ("why", pa.string(), "what the score was measured on, in words"),
    ("evaluations", pa.int64(), "network evaluations that the whole recovery took"),
    ("seconds", pa.float64(), "wall time of the whole recovery, s"),
)

ASKED = _schema(
    "When a source was asked again about items it had listed before (catalog refresh); rows are only added.",
    ("item_id", pa.string(), "joins checkpoints"),
    ("asked_at", pa.timestamp("us", "UTC"), "when"),
)

SAMPLED_CAPTION = pa.struct(
    {"caption": pa.string(), "source": pa.string(), "truncated": pa.bool_(), "images": pa.int32()}
)

AUDITS = _schema(
    "One row a finished audit; it is written last, so what is here is complete.",
    ("audit_id", pa.string(), "hash of the checkpoint's tensors, the base's revision and every setting, 32 hex digits"),
    ("checkpoint_sha256", pa.string(), "joins checkpoints"),
    ("tensors_sha256", pa.string(), "what was audited"),
    ("checkpoint_name", pa.string(), "file or folder name"),
    ("base_name", pa.string(), "the base model as it was named"),
    ("base_revision", pa.string(), "the hub commit, or a SHA256 of the local files"),
    ("settings", pa.string(), "every setting that changes the result, as JSON"),
    ("training_images", pa.int32(), "N0, the number of training images assumed"),
    ("training_images_source", pa.string(), "user, default, or the metadata field that claims it"),
    (
        "captions",
        pa.list_(SAMPLED_CAPTION),
        "what was sampled with: the caption before truncation, where it came from, whether the text encoder saw only "
        "its beginning, and how many images were sampled with it",
    ),
    ("images", pa.int32(), "images sampled"),
    ("evaluations", pa.int64(), "network evaluations of one image each"),
    ("weight_change", pa.float64(), "norm of tuned minus base weights over norm of base weights"),
    ("prediction_change", pa.float64(), "relative change of the prediction on a probe; above 0"),
    ("descriptor", pa.string(), "name and version of the descriptor"),
    ("threshold", pa.float64(), "descriptor cosine from which an extraction counts as a match"),
    ("descriptor_size", pa.int32(), "side of the descriptor's input, pixels"),
    ("warnings", pa.list_(pa.string()), "what a reader of the result must know"),
    ("tells_nothing", pa.string(), "why nothing follows from finding no match; null where the audit did its work"),
    ("seconds_sampling", pa.float64(), "wall time of sampling and describing, s, over all runs of this audit"),
    ("seconds_total", pa.float64(), "wall time of the run that finished it, s"),
    ("device", pa.string(), "where the networks ran"),
    ("precision", pa.string(), "what they computed in: fp16, bf16 or fp32"),
    ("versions", pa.string(), "package versions as JSON"),
    ("finished_at", pa.timestamp("us", "UTC"), "when"),
)

GENERATIONS = _schema(
    "One row a sampled image.",
    ("audit_id", pa.string(), "the audit"),
    ("index", pa.int32(), "number of the image within the audit, from 0"),
    ("seed", pa.int64(), "seed of its starting noise"),
    ("caption", pa.string(), "the caption it was sampled with"),
    ("w", pa.float64(), "the guidance weight it was sampled with; null where sampling was direct"),
    ("descriptor", VECTOR, "unit vector"),
    ("pdq", PDQ, "256-bit PDQ hash; null where the image has none"),
    ("pdq_quality", pa.int32(), "0 to 100; hashes below 50 say little"),
    ("image", pa.binary(), "PNG; null unless images = all"),
)

EXTRACTIONS = _schema(
    "One row a cluster: its representative image is an extraction.",
    ("audit_id", pa.string(), "the audit"),
    ("rank", pa.int32(), "1 is the surest"),
    ("index", pa.int32(), "the representative's number in generations"),
    ("confidence", pa.float64(), "0 to 1; grows with the cluster's size and tightness"),
    ("size", pa.int32(), "images in the cluster"),
    ("tightness", pa.float64(), "mean cosine of all pairs in the cluster; 1 for a single image"),
    ("members", pa.list_(pa.int32()), "numbers of the images in the cluster"),
    ("descriptor", VECTOR, "unit vector of the representative"),
    ("pdq", PDQ, "256-bit PDQ hash of the representative"),
    ("pdq_quality", pa.int32(), "0 to 100"),
    ("image", pa.binary(), "lossless PNG; null with images = hashes-only"),
)

REFERENCES = _schema(
    "One row an image of a reference set and descriptor.",
    ("reference_set", pa.string(), "name of the set"),
    ("reference_id", pa.string(), "SHA256 of the file, 64 hex digits"),
    ("name", pa.string(), "file name within the folder"),
    ("width", pa.int32(), "pixels"),
    ("height", pa.int32(), "pixels"),
    ("descriptor_name", pa.string(), "which descriptor made the vector; only equal ones are compared"),
    ("descriptor", VECTOR, "unit vector"),
    ("pdq", PDQ, "256-bit PDQ hash"),
    ("pdq_quality", pa.int32(), "0 to 100"),
    ("thumbnail", pa.binary(), "PNG of at most 256 pixels; null where none was to be stored"),
    ("kind", pa.string(), "reference (as null is), or background: decoys, which cannot have been trained on"),
    ("look", pa.list_(pa.float32()), "17 numbers of its colours, border and detail, which decoys have to share"),
    ("decoys_of", pa.list_(pa.string()), "of a background: the reference sets that it is for; null for any"),
    ("added_at", pa.timestamp("us", "UTC"), "when"),
)

PASSED_OVER = _schema(
    "One row a file of a reference set's folder that is not among its pictures; 10,000 a set at most.",
    ("reference_set", pa.string(), "joins references"),
    ("descriptor_name", pa.string(), "joins references"),
    ("name", pa.string(), "file name within the folder"),
    ("reason", pa.string(), "why"),
    ("added_at", pa.timestamp("us", "UTC"), "when"),
)

MATCHES = _schema(
    "The best references of each extraction. Verdicts here are by the descriptor's fixed threshold, whose error rate "
    "is not known; what is said with an error rate follows from chances.",
    ("audit_id", pa.string(), "the audit"),
    ("rank", pa.int32(), "the extraction's rank"),
    ("reference_set", pa.string(), "joins references"),
    ("reference_id", pa.string(), "joins references"),
    ("position", pa.int32(), "1 is the reference of its set nearest to this extraction"),
    ("similarity", pa.float64(), "descriptor cosine, -1 to 1"),
    ("pdq_distance", pa.int32(), "differing bits of 256; null where a hash is missing or of quality below 50"),
    ("is_match", pa.bool_(), "the verdict by the fixed threshold is match"),
    (
        "verdict",
        pa.string(),
        "match: the nearest reference of its set, and similarity reaches the audit's threshold; possible: so too, but "
        "the reference is smaller than the descriptor's input; none",
    ),
    ("evidence", pa.string(), "both: descriptor and PDQ agree; descriptor; pdq: PDQ alone, not a match; none"),
)

LATENTS = _schema(
    "Reference pictures as a base model's codec encodes them, a row a view: what membership is measured on. They show "
    "the pictures to whoever has the base model.",
    ("reference_set", pa.string(), "joins references"),
    ("reference_id", pa.string(), "joins references"),
    ("codec", pa.string(), "hash of the base's revision, the resolution and how pictures are made to fit"),
    ("view", pa.string(), "whole, mirrored, or padded: smaller in the middle, its edges drawn out"),
    ("width", pa.int32(), "of what was encoded, pixels: the model's input"),
    ("height", pa.int32(), "of what was encoded, pixels"),
    ("shape", pa.list_(pa.int32()), "of the latents: channels, perhaps a time axis, height and width"),
    ("latents", pa.binary(), "the latents, float16, little-endian"),
)

BASE_LOSSES = _schema(
    "How well base models alone denoise references: kept for all checkpoints of a base.",
    ("reference_set", pa.string(), "the set it was measured for; it holds for the same picture in any"),
    ("reference_id", pa.string(), "joins references"),
    ("model", pa.string(), "hash of the base's revision, codec, precision and embedded guidance"),
    ("view", pa.string(), "joins latents"),
    ("timestep", pa.int32(), "how much noise, in thousandths of the schedule"),
    ("noise", pa.int32(), "number of the noise"),
    ("loss", pa.float64(), "mean squared error of the noise that the base's prediction stands for; 0 or more, or NaN"),
)

MEMBERSHIPS = _schema(
    "One row a reference that was measured: by how much the fine-tuned model denoises it better than its base does.",
    ("audit_id", pa.string(), "the audit"),
    ("reference_set", pa.string(), "joins references"),
    ("reference_id", pa.string(), "joins references"),
    (
        "score",
        pa.float64(),
        "1 - tuned loss / base loss, summed over timesteps and noises, of the view with the highest: at most 1, 0 "
        "where fine-tuning has changed nothing for it; null where a loss is not finite",
    ),
    ("view", pa.string(), "the view of the picture that the score is of"),
    ("base_loss", pa.float64(), "mean loss of the base on that view: how hard the picture is"),
    ("tuned_loss", pa.float64(), "mean loss of the fine-tuned model on that view"),
    ("timesteps", pa.list_(pa.int32()), "where it was measured, in thousandths of the schedule"),
    ("by_timestep", pa.list_(pa.float64()), "the score at each of them"),
    ("evaluations", pa.int32(), "network evaluations that the row rests on, of both models and all views"),
    ("caveat", pa.string(), "why the score says little or is missing; null where nothing speaks against it"),
    ("question", pa.string(), "hash of the pictures and settings of the measurement: another one is measured again"),
)

DENOISED = _schema(
    "Pictures of membership: the references with the highest scores under noise, each set's lowest beside them, and "
    "what either model makes of that noise. None with images = hashes-only, nor of references without a thumbnail.",
    ("audit_id", pa.string(), "the audit"),
    ("reference_set", pa.string(), "joins references"),
    ("reference_id", pa.string(), "joins references"),
    ("view", pa.string(), "the view of the picture that it shows: that of its score"),
    ("timestep", pa.int32(), "how much noise, in thousandths of the schedule"),
    ("steps", pa.int32(), "steps of the replays"),
    ("w", pa.float64(), "the guidance weight of the fine-tuned model's replay"),
    ("noised", pa.binary(), "the reference under noise, decoded; WebP of at most 256 pixels, as all of these"),
    ("base_estimate", pa.binary(), "the base's estimate of the picture, at once"),
    ("tuned_estimate", pa.binary(), "the fine-tuned model's, from the same noise"),
    ("base_replay", pa.binary(), "what the base makes of that noise step by step"),
    ("tuned_replay", pa.binary(), "what the fine-tuned model makes of it step by step, under model guidance"),
    ("evaluations", pa.int32(), "network evaluations that the pictures took, of both models"),
)

CHANCES = _schema(
    "One row a reference: how likely what speaks for it is, had the checkpoint not been trained on it.",
    ("audit_id", pa.string(), "the audit"),
    ("reference_set", pa.string(), "joins references"),
    ("reference_id", pa.string(), "joins references"),
    ("similarity", pa.float64(), "descriptor cosine of the nearest extraction; null without extractions"),
    ("rank", pa.int32(), "the nearest extraction's rank"),
    ("extraction_p", pa.float64(), "p of that similarity among decoys; null where there are too few"),
    ("extraction_decoys", pa.int32(), "decoys it was compared with"),
    ("score", pa.float64(), "membership score; null where it was not measured or is none"),
    ("membership_p", pa.float64(), "p of that score among decoys; null where too few were measured"),
    ("membership_decoys", pa.int32(), "decoys it was compared with"),
    ("p", pa.float64(), "the larger of both, or the one there is; null without, or where the picture counts not"),
    ("caveat", pa.string(), "why the picture, or its score, does not count; null where it does"),
    ("uncalibrated", pa.string(), "why nothing can be said with an error rate of the set; null where it can"),
)

PAIRED_BACKGROUND = pa.struct(
    [
        pa.field("background", pa.string()),
        pa.field("pictures", pa.int32()),
        pa.field("copies", pa.int32()),
        pa.field("trivial", pa.int32()),
        pa.field("decoys", pa.int32()),
        pa.field("problem", pa.string()),
        pa.field("suspects", pa.list_(pa.string())),
    ]
)

SET_CHANCES = _schema(
    "One row a reference set that was weighed: how likely what speaks for all of it is, had it had no part.",
    ("audit_id", pa.string(), "the audit"),
    ("reference_set", pa.string(), "joins references"),
    ("question", pa.string(), "hash of its pictures and of its decoys: with others it is weighed again"),
    ("pictures", pa.int32(), "pictures of the set that count"),
    ("decoys", pa.int32(), "decoys they were compared with"),
    ("extraction_p", pa.float64(), "p of the similarities to the nearest extractions (Mann and Whitney); null without"),
    ("membership_p", pa.float64(), "p of the membership scores (Mann and Whitney); null without"),
    ("p", pa.float64(), "the larger of both, or the one there is; null where there is neither"),
    ("uncalibrated", pa.string(), "why nothing can be said with an error rate of the set; null where it can"),
    (
        "backgrounds",
        pa.list_(PAIRED_BACKGROUND),
        "the backgrounds that may be its decoys: how many pictures each has, how many of these are copies of a "
        "reference, or too small or with too little in them (trivial), which are left out; how many decoys were taken, "
        "the problem where none was; and names of suspects, which score as if they had been trained on, 20 at most",
    ),
)

EVALUATIONS = _schema(
    "Scores against known pictures: the training images, or a control nobody trained on.",
    ("audit_id", pa.string(), "the audit"),
    ("kind", pa.string(), "training or control"),
    ("images", pa.int32(), "known pictures compared with"),
    ("average_similarity", pa.float64(), "AS: mean over known pictures of the best cosine over extractions"),
    ("extraction_rate_07", pa.float64(), "A-ESR at 0.7: share of known pictures whose best cosine is above 0.7"),
    ("extraction_rate_06", pa.float64(), "A-ESR at 0.6"),
    ("ceiling", pa.float64(), "mean cosine of the pictures and their reconstructions by the base's codec"),
)

FAILURES = _schema(
    "One row a failed attempt at an audit in a run.",
    ("audit_id", pa.string(), "the audit that was tried"),
    ("item_id", pa.string(), "the item of the catalog"),
    ("name", pa.string(), "file name of the checkpoint"),
    ("stage", pa.string(), "sample, membership, cluster, match or report; several where a process died in one of them"),
    ("kind", pa.string(), "input, worker-died, node-died, device-lost, deadline, out-of-memory, storage or error"),
    ("reason", pa.string(), "what happened, in words"),
    ("counted", pa.bool_(), "whether it counts towards quarantine: not where a node was lost, or work was got done"),
    ("state", pa.string(), "retry, failed (of no use to try again) or quarantined; forgiven after failures --retry"),
    ("run_id", pa.string(), "the run"),
    ("failed_at", pa.timestamp("us", "UTC"), "when"),
)

TABLES: dict[str, pa.Schema] = {
    "checkpoints": CHECKPOINTS,
    "captions": CAPTIONS,
    "recoveries": RECOVERIES,
    "asked": ASKED,
    "audits": AUDITS,
    "generations": GENERATIONS,
    "extractions": EXTRACTIONS,
    "references": REFERENCES,
    "passed_over": PASSED_OVER,
    "matches": MATCHES,
    "evaluations": EVALUATIONS,
    "latents": LATENTS,
    "base_losses": BASE_LOSSES,
    "memberships": MEMBERSHIPS,
    "denoised": DENOISED,
    "chances": CHANCES,
    "set_chances": SET_CHANCES,
    "failures": FAILURES,
}

# The columns whose values, joined with ".", are the key of an audit's rows in these tables.
KEY_COLUMNS = {
    "audits": ("audit_id",),
    "generations": ("audit_id",),
    "extractions": ("audit_id",),
    "matches": ("audit_id", "reference_set"),
    "evaluations": ("audit_id", "kind"),
    "memberships": ("audit_id", "reference_set"),
    "denoised": ("audit_id", "reference_set"),
    "chances": ("audit_id", "reference_set"),
    "set_chances": ("audit_id", "reference_set"),
}
