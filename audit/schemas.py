"""The schema of every table of a workspace. ``docs`` holds a sentence a column: unit, range, meaning.

All times are UTC. ``audit_id`` joins audits, generations, extractions, matches and evaluations.
"""

from __future__ import annotations

import pyarrow as pa

from audit.catalog_schemas import ASKED as ASKED
from audit.catalog_schemas import BASE_DISTANCES as BASE_DISTANCES
from audit.catalog_schemas import CAPTIONS as CAPTIONS
from audit.catalog_schemas import CHECKPOINTS as CHECKPOINTS
from audit.catalog_schemas import RECOVERIES as RECOVERIES
from audit.catalog_schemas import SKETCHES as SKETCHES
from audit.columns import table_schema as _schema
from audit.set_schemas import PASSED_OVER as PASSED_OVER
from audit.set_schemas import POLICIES as POLICIES
from audit.study.tables import FINE_TUNES, QUALITY, STUDIES, STUDY_CELLS

VECTOR = pa.list_(pa.float32())
PDQ = pa.binary(32)
_PART = "the part that similarity is of: left, top, right, bottom as shares of its sides; null for the whole"

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

CONTROL_GENERATIONS = _schema(
    "One row a control generation: what the base alone draws for the caption and seed of a sampled image. A picture "
    "that it draws as well says nothing of fine-tuning.",
    ("audit_id", pa.string(), "the audit"),
    ("index", pa.int32(), "number of the sampled image whose caption and seed it has"),
    ("seed", pa.int64(), "seed of its starting noise"),
    ("caption", pa.string(), "the caption it was sampled with"),
    ("w", pa.float64(), "the weight of classifier-free guidance by the base"),
    ("descriptor", VECTOR, "unit vector"),
    ("pdq", PDQ, "256-bit PDQ hash; null where the image has none"),
    ("pdq_quality", pa.int32(), "0 to 100; hashes below 50 say little"),
    ("image", pa.binary(), "WebP of at most 256 pixels; null with images = hashes-only"),
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
    (
        "drawn_with",
        pa.list_(pa.string()),
        "of a background that was declared a random split of one collection with reference sets: the SHA256 of the "
        "pictures of each (their ids, sorted, with commas between), so that it holds for just these; null for none",
    ),
    ("metadata", pa.string(), "what its input says of it, an object of JSON of 4096 characters at most; null for none"),
    ("added_at", pa.timestamp("us", "UTC"), "when"),
    ("parts_layout", pa.string(), "the parts that are described as well: five-70, crops of 70 %; null for none"),
    ("parts", VECTOR, "unit vectors of these: the centre, then the corners from the top left on; null without"),
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
        "the reference is smaller than the descriptor's input, or a part of it alone reaches it; none, also where the "
        "base alone draws it as well",
    ),
    ("evidence", pa.string(), "both: descriptor and PDQ agree; descriptor; pdq: PDQ alone, not a match; none"),
    (
        "control_similarity",
        pa.float64(),
        "descriptor cosine of the reference and the control generation nearest to it: where it reaches the threshold, "
        "or similarity, the base alone draws it as well; null without control generations",
    ),
    ("allowed_by", pa.string(), "the allow bank that holds a copy of the reference, which is no match; null for none"),
    (
        "inliers",
        pa.int32(),
        "second look: points of the reference that are found in the extraction, where one turn, size and place puts "
        "them (SIFT, RANSAC); null where it was not looked at, as pictures are not kept or OpenCV is not installed",
    ),
    ("coverage", pa.float64(), "second look: share of the reference's area that these points span"),
    ("mirrored", pa.bool_(), "second look: they are points of the mirrored reference"),
    (
        "normalized_similarity",
        pa.float64(),
        "similarity less the mean cosine of the extraction to the 10 nearest pictures of the set's backgrounds; it "
        "decides nothing; null with fewer pictures",
    ),
    ("part", pa.list_(pa.float64()), _PART),
    ("whole_similarity", pa.float64(), "descriptor cosine of the whole reference; null where it has no parts"),
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
    (
        "question",
        pa.string(),
        "hash of the pictures and settings of the measurement: another one is measured again; after whole- where the "
        "budget covered all noises of all pictures",
    ),
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
    (
        "extraction_p",
        pa.float64(),
        "p of that similarity among decoys, 1 where the base alone draws the reference as well; null where there are "
        "too few",
    ),
    ("extraction_decoys", pa.int32(), "decoys it was compared with"),
    ("score", pa.float64(), "membership score; null where it was not measured or is none"),
    ("membership_p", pa.float64(), "p of that score among decoys; null where too few were measured"),
    ("membership_decoys", pa.int32(), "decoys it was compared with"),
    ("p", pa.float64(), "the larger of both, or the one there is; null without, or where the picture counts not"),
    ("caveat", pa.string(), "why the picture, or its score, does not count; null where it does"),
    ("uncalibrated", pa.string(), "why nothing can be said with an error rate of the set; null where it can"),
    ("control_similarity", pa.float64(), "descriptor cosine of the control generation nearest to it; null without"),
    ("control_index", pa.int32(), "number of that one in control_generations"),
    ("part", pa.list_(pa.float64()), _PART),
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
    (
        "compared",
        pa.int32(),
        "pictures that have a p; of a large set those without a row in chances too, whose p counts as 1",
    ),
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
    (
        "decoy_similarities",
        pa.list_(pa.float64()),
        "the decoys' similarities to the nearest extractions, without names",
    ),
    ("decoy_scores", pa.list_(pa.float64()), "membership scores of those decoys that have one that counts"),
    (
        "policy",
        pa.string(),
        "what the set was matched by, as JSON: its policy, how many of its references each allow bank has silenced, "
        "and the policies of these; null where there were none",
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
    (
        "stage",
        pa.string(),
        "sample, control, membership, cluster, match or report; several where a process died in one of them",
    ),
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
    "sketches": SKETCHES,
    "base_distances": BASE_DISTANCES,
    "asked": ASKED,
    "audits": AUDITS,
    "generations": GENERATIONS,
    "control_generations": CONTROL_GENERATIONS,
    "extractions": EXTRACTIONS,
    "references": REFERENCES,
    "policies": POLICIES,
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
    "studies": STUDIES,
    "fine_tunes": FINE_TUNES,
    "study_cells": STUDY_CELLS,
    "quality": QUALITY,
}

# The columns whose values, joined with ".", are the key of an audit's rows in these tables.
KEY_COLUMNS = {
    "audits": ("audit_id",),
    "generations": ("audit_id",),
    "control_generations": ("audit_id",),
    "extractions": ("audit_id",),
    "matches": ("audit_id", "reference_set"),
    "evaluations": ("audit_id", "kind"),
    "memberships": ("audit_id", "reference_set"),
    "denoised": ("audit_id", "reference_set"),
    "chances": ("audit_id", "reference_set"),
    "set_chances": ("audit_id", "reference_set"),
}
