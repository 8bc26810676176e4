"""What the benchmarks of extraction share: checkpoints of the testbed, audited under many settings, scored.

Jobs are (checkpoint, settings); each runs the real engine into a workspace, so a stopped benchmark goes on where it
was, and both clusterings are scored on the same generated images. The independent judge (benchmarks/judge.py) looks at
the pictures that the workspace has kept of the extractions: finished audits are judged without sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from audit.config import Clustering, Method, Settings, StoredImages
from audit.demo import ASSETS, load_set
from audit.evidence import Cluster, density_peaks, greedy_cliques, rank_score, score
from audit.processes import spread, threads_each

try:
    from benchmarks import judge
    from benchmarks.judge import JudgeName
    from testbed.controls import controls, near_misses
    from testbed.finetune import RECIPES, Recipe, Tuning
    from testbed.sets import few_shot_set
except ModuleNotFoundError as error:
    if error.name != "testbed":
        raise
    raise SystemExit(
        "the benchmarks of extraction need testbed/, which is in the repository and not in the wheel: run them from "
        "the top folder of a checkout of lora-audit"
    ) from None

METHOD_NAMES = {Method.direct: "direct", Method.cfg: "cfg", Method.model_guidance: "model_guidance"}
CLUSTERING_NAMES = {Clustering.peaks: "default", Clustering.cliques: "paper"}
SHIPPED = ASSETS / "checkpoints"


def available(checkpoints: Path, only: Sequence[str] | None = None) -> list[Recipe]:
    """The testbed's checkpoints that are in the folder ``checkpoints``, all or those named ``only``.

    Raises FileNotFoundError where there is none, or one that is named is missing.
    """
    found = [recipe for recipe in RECIPES if recipe.file(checkpoints).exists()]
    if only:
        missing = sorted(set(only) - {recipe.name for recipe in found})
        if missing:
            raise FileNotFoundError(
                f"not in {checkpoints}: {', '.join(missing)}; train them with `python -m testbed.finetune` and give "
                "their folder with --checkpoints"
            )
        found = [recipe for recipe in found if recipe.name in only]
    if not found:
        raise FileNotFoundError(f"no checkpoint of the testbed is in {checkpoints}")
    return found


@dataclass(frozen=True)
class Job:
    """One checkpoint under several settings that differ in how images are sampled, not in how they are clustered."""

    recipe: Recipe
    settings: tuple[Settings, ...]
    checkpoints: Path
    base: Path
    workspace: Path
    clusterings: tuple[Clustering, ...] = (Clustering.peaks,)
    clique_limit: float = 30.0
    judge: JudgeName = JudgeName.none


def run_job(job: Job, threads: int = 1) -> list[dict[str, Any]]:
    """The rows of a job, one a setting and clustering."""
    import torch

    from audit.bench import Bench
    from audit.engine.work import Place
    from audit.workspace import Workspace

    torch.set_num_threads(threads)
    place = Place(Workspace(job.workspace), Bench())
    return [row for settings in job.settings for row in rows_at(job, place, settings, threads)]


def kept_pictures(settings: Settings, clusterings: Sequence[Clustering]) -> Settings:
    """``settings`` under which a workspace keeps the pictures that the judge is to see of these clusterings.

    Those of the audit's own extractions are kept anyway; the paper's cliques choose others.
    """
    return replace(settings, stored_images=StoredImages.all) if Clustering.cliques in clusterings else settings


def request_of(job: Job, settings: Settings) -> Any:
    """The ``Request`` of a job's checkpoint under ``settings``, with its set's captions and N0."""
    from audit.job import Request

    few_shot = few_shot_set(job.recipe.few_shot)
    return Request(
        job.recipe.file(job.checkpoints),
        str(job.base),
        captions=few_shot.captions,
        n0=len(few_shot.train),
        settings=settings,
    )


def pictures_of(name: str) -> dict[str, np.ndarray]:
    """What extractions of the set ``name`` are compared with, uint8 [N, 64, 64, 3]: "train", "control" and "near"."""
    return {"train": load_set(name, "train"), "control": controls(name), "near": near_misses(name)}


def rows_at(job: Job, place: Any, settings: Settings, threads: int) -> Iterator[dict[str, Any]]:
    """The rows of a job under one of its settings, a clustering each; ``place`` is a ``Place``, with what is loaded."""
    from audit.engine.local import run_stages
    from audit.job import resolve
    from audit.sampling.spooled import vectors_of
    from audit.stages import Cluster, Sample, Scores
    from audit.states import Known

    few_shot = few_shot_set(job.recipe.few_shot)
    resolved = resolve(request_of(job, kept_pictures(settings, job.clusterings)), "nano", place.bench)
    pictures = pictures_of(few_shot.name)
    parts = ((Known.training, "train"), (Known.control, "control"))
    scores_of = [Scores(kind, [Image.fromarray(one) for one in pictures[part]]) for kind, part in parts]
    run_stages([Sample(), Cluster(), *scores_of], resolved, place)
    workspace, audit_id = place.workspace, resolved.id
    descriptor = place.bench.descriptor(resolved)
    scores = {row["kind"]: row for row in workspace.rows("SELECT * FROM evaluations WHERE audit_id = ?", [audit_id])}
    (audit,) = workspace.rows("SELECT evaluations, seconds_sampling FROM audits WHERE audit_id = ?", [audit_id])
    row = {
        "checkpoint": job.recipe.name,
        "set": few_shot.name,
        "holdout": few_shot.holdout,
        "tuning": "dreambooth" if job.recipe.tuning is Tuning.dreambooth else "lora",
        "strength": str(job.recipe.strength),
        "defence": str(job.recipe.defence),
        "method": METHOD_NAMES[settings.method],
        "clustering": "default",
        "w": None if settings.method is Method.direct else settings.w,
        "k": settings.k,
        "solver": str(settings.solver),
        "steps": settings.steps,
        "images": resolved.images,
        "evaluations": audit["evaluations"],
        "as": scores["training"]["average_similarity"],
        "a_esr_07": scores["training"]["extraction_rate_07"],
        "a_esr_06": scores["training"]["extraction_rate_06"],
        "control_as": scores["control"]["average_similarity"],
        "control_a_esr_07": scores["control"]["extraction_rate_07"],
        "ceiling": scores["training"]["ceiling"],
        "seconds": audit["seconds_sampling"],
        "audit_id": audit_id,
    }
    table = workspace.select('SELECT descriptor FROM generations WHERE audit_id = ? ORDER BY "index"', [audit_id])
    vectors = vectors_of(table)
    extracted = workspace.select("SELECT descriptor FROM extractions WHERE audit_id = ?", [audit_id])
    training, control, near = (descriptor.describe(some) for some in pictures.values())

    def by_judge(query: str, numbers: Sequence[int] | None = None) -> dict[str, Any]:
        """What the judge says of the pictures that ``query`` gives, all or those of these numbers."""
        if job.judge is not JudgeName.sscd:
            return judge.absent(job.judge)
        pngs = workspace.select(query, [audit_id])["image"]
        seen = judge.opened(pngs[int(number)].as_py() for number in (range(len(pngs)) if numbers is None else numbers))
        reconstructed = place.bench.codec(resolved).reconstruct(pictures["train"])
        return judge.figures(seen, pictures, reconstructed, threads)

    def beside_near(found: np.ndarray) -> dict[str, Any]:
        """Scores against the near-misses, where there are some."""
        scored = score(found, near) if len(near) else None
        return {
            "near_as": scored and scored.average_similarity,
            "near_a_esr_07": scored and scored.extraction_rate_07,
        }

    def ranking(clusters: list[Any]) -> dict[str, float]:
        """How the order of extractions does, and AS, where N0 is not known."""
        found = vectors[[cluster.representative for cluster in clusters]]
        return {f"ranking_{name}": value for name, value in asdict(rank_score(found, training)).items()} | {
            "ranking_extractions": len(found),
            "ranking_as": score(found, training).average_similarity,
        }

    cliques: list[Any] = []
    timed_out = False
    if Clustering.cliques in job.clusterings:
        cliques, _, timed_out = greedy_cliques(vectors, len(few_shot.train), job.clique_limit)
    if Clustering.peaks in job.clusterings:
        yield (
            row
            | beside_near(
                vectors_of(workspace.select("SELECT descriptor FROM extractions WHERE audit_id = ?", [audit_id]))
            )
            | by_judge("SELECT image FROM extractions WHERE audit_id = ? ORDER BY rank")
            | ranking(density_peaks(vectors, None, descriptor.threshold))
            | {
                "extractions": extracted.num_rows,
                **at_equal_number(vectors, training, len(cliques), descriptor.threshold),
            }
        )
    if cliques:
        found = vectors[[cluster.representative for cluster in cliques]]
        against, beside = score(found, training), score(found, control)
        yield (
            row
            | beside_near(found)
            | by_judge(
                'SELECT image FROM generations WHERE audit_id = ? ORDER BY "index"',
                [cluster.representative for cluster in cliques],
            )
            | ranking(cliques)
            | {
                "clustering": "paper",
                "extractions": len(cliques),
                "equal_as": against.average_similarity,
                "equal_a_esr_07": against.extraction_rate_07,
                "as": against.average_similarity,
                "a_esr_07": against.extraction_rate_07,
                "a_esr_06": against.extraction_rate_06,
                "control_as": beside.average_similarity,
                "control_a_esr_07": beside.extraction_rate_07,
                "timed_out": timed_out,
            }
        )


def exactly(vectors: np.ndarray, count: int, reach: float) -> list[Cluster]:
    """The first ``count`` density peaks; where there are fewer, of the least larger reach at which there are enough."""
    for wider in (reach, 0.8, 0.9, 0.95, 1.0):
        clusters = density_peaks(vectors, count, wider)
        if len(clusters) >= count:
            break
    return clusters[:count]


def at_equal_number(vectors: np.ndarray, training: np.ndarray, extractions: int, reach: float) -> dict[str, Any]:
    """The default clustering's scores with as many extractions as the paper's gives; None where it gave none.

    The paper counts every clique as an extraction, often several times N0, and every extraction can only raise AS: at
    different numbers the scores do not compare.
    """
    if not extractions:
        return {"equal_as": None, "equal_a_esr_07": None}
    clusters = exactly(vectors, extractions, reach)
    found = score(vectors[[cluster.representative for cluster in clusters]], training)
    return {"equal_as": found.average_similarity, "equal_a_esr_07": found.extraction_rate_07}


def run_all(jobs: Sequence[Job], workers: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of every job as it finishes, in ``workers`` processes of their share of the cores (OMP_NUM_THREADS)."""
    return spread(run_job, jobs, workers, threads_each(workers))


def split_settings(job: Job) -> list[Job]:
    """A job for each of the settings, so that more processes have work."""
    return [replace(job, settings=(settings,)) for settings in job.settings]


def interval(values: Sequence[float], seed: int = 0, draws: int = 4000) -> tuple[float, float, float]:
    """Mean and its 95 % percentile bootstrap interval over ``values`` (Efron & Tibshirani 1993, chapter 13)."""
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(len(data), size=(draws, len(data)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(data.mean()), float(low), float(high)
