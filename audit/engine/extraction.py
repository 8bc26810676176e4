"""The stage that needs a GPU: networks, captions and sampling, from a plan to a full spool."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch

from audit.config import Compile, Precision, StoredImages
from audit.devices import device_name, peak_memory, raise_fault, release, reset_peak_memory
from audit.engine.plan import Plan
from audit.errors import DeviceMemoryError, NotFiniteError
from audit.extraction.extract import Extract
from audit.extraction.guidance import make_guidance, weight_of
from audit.extraction.sampling import Sampler
from audit.fits import Fits
from audit.models.base import BaseModel, load_base
from audit.models.formats.adapter import Tuned
from audit.models.pair import ModelPair
from audit.models.placement import NAMES, choose_precision, next_precision
from audit.models.tuning import tune
from audit.storage import Workspace


@dataclass(frozen=True)
class Extracted:
    """What is known of an audit once its images are in the spool, besides the images."""

    warnings: list[str]
    problem: str | None
    truncated: list[str]
    evaluations: int
    weight_change: float
    prediction_change: float
    device: str
    precision: str
    peak_memory: int
    seconds_loading: float
    seconds_total: float


class Extraction:
    """The stage that needs a GPU. One base model is kept in memory, and the pair of the last checkpoint.

    What a worker has learnt of how much fits into memory is kept for all checkpoints.
    """

    def __init__(
        self,
        workspace: Workspace,
        device: str = "cpu",
        batch_size: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
        compile: Compile = Compile.off,
    ) -> None:
        self.workspace, self.device, self.batch_size, self.compile = workspace, device, batch_size, compile
        self.progress = progress or (lambda stage, done, total: None)
        self.fits = Fits()
        self._base: tuple[str, BaseModel] | None = None
        self._pair: tuple[_PairKey, ModelPair] | None = None
        self._ahead: tuple[_PairKey, Future[Tuned]] | None = None
        self._merging = ThreadPoolExecutor(1)

    def run(self, plan: Plan) -> Extracted:
        """Sample what the spool lacks; in a wider precision where numbers overflow and none was asked for.

        Raises AuditError.
        """
        reset_peak_memory(self.device)
        spool = self.workspace.spool(plan.audit_id)
        kept = spool.precision()
        precision = Precision(kept) if kept else plan.settings.precision
        warnings: list[str] = []
        if kept:
            warnings.append(f"its numbers overflow in a narrower precision: it was sampled in {kept}")
        while True:
            try:
                return self._run(plan, precision, warnings)
            except NotFiniteError as error:
                wider = self._wider(plan, precision)
                if wider is None:
                    raise
                precision = wider
                warnings = [f"{str(error)[:200]}: it was sampled in {precision}"]
                spool.discard()  # all images of an audit are of one precision
                spool.begin()
                spool.keep_precision(precision)
            except RuntimeError as error:
                raise_fault(error, f"auditing {plan.checkpoint.name}", self.device)
                raise
            self._forget()

    def _wider(self, plan: Plan, precision: Precision) -> Precision | None:
        """What to try after ``precision``; None where there is nothing, or where the request fixes it."""
        if plan.settings.precision is not Precision.auto or self._base is None:
            return None
        device = torch.device(self.device)
        now = choose_precision(precision, self._base[1].architecture.half, device)
        wider = next_precision(now, device)
        return None if wider is None else NAMES[wider]

    def _forget(self) -> None:
        """Let go of everything on the device, so that the networks have room in another precision."""
        self._pair = self._ahead = None
        if self._base is not None:
            self._base[1].forget()
        release(self.device)

    def _run(self, plan: Plan, precision: Precision, warnings: list[str]) -> Extracted:
        started = time.monotonic()
        pair = self.pair(plan, precision)
        loading = time.monotonic() - started
        warnings = [*plan.warnings, *pair.warnings, *warnings]
        missing = [token for token in pair.tokens if not any(token in caption.text for caption in plan.captions)]
        if missing:
            warnings.append(f"the file brings tokens that are in no caption: {', '.join(missing[:10])[:200]}")
        truncated = [caption.text for caption in plan.captions if pair.is_truncated(caption.text)]
        warnings += [
            f"the caption {text[:60]!r}... is longer than the {pair.caption_tokens} tokens the text encoder takes: "
            "its end was cut off"
            for text in truncated
        ]
        sampler = Sampler(
            pair,
            make_guidance(plan.settings),
            [caption.text for caption in plan.captions],
            solver=plan.settings.solver,
            steps=plan.settings.steps,
            seed=plan.settings.seed,
            batch_size=self.batch_size,
            w=weight_of(plan.settings, pair.effect.prediction),
        )
        spool = self.workspace.spool(plan.audit_id)
        pixels = plan.settings.stored_images is not StoredImages.hashes_only
        extract = Extract(sampler, plan.descriptor, spool, plan.audit_id, plan.images, pixels)
        extract.run(lambda done, total: self.progress("sampling", done, total))
        extracted = Extracted(
            warnings=warnings,
            problem=pair.problem,
            truncated=truncated,
            evaluations=plan.images * plan.settings.steps * sampler.guidance.evaluations,
            weight_change=pair.effect.weights,
            prediction_change=pair.effect.prediction,
            device=device_name(self.device),
            precision=NAMES[pair.dtype],
            peak_memory=peak_memory(self.device),
            seconds_loading=loading,
            seconds_total=time.monotonic() - started,
        )
        spool.finish(asdict(extracted))
        return extracted

    def pair(self, plan: Plan, precision: Precision | None = None) -> ModelPair:
        """The base and the fine-tuned networks of ``plan``, loaded unless they are those of the last one."""
        key = _pair_key(plan, precision or plan.settings.precision)
        if self._pair is None or self._pair[0] != key:
            self.progress("loading", 0, 1)
            self._pair = None  # the old fine-tuned side goes before the new one comes
            base = self._load(plan)
            made, self._ahead = self._ahead, None
            tuned = made[1].result() if made and made[0] == key else None
            try:
                pair = self._made(base, plan, key, tuned)
            except DeviceMemoryError:
                self._forget()  # what another precision has left there
                pair = self._made(base, plan, key, tuned)
            pair.compile(self.compile)
            self._pair = key, pair
            self.progress("loading", 1, 1)
        return self._pair[1]

    def _made(self, base: BaseModel, plan: Plan, key: _PairKey, tuned: Tuned | None) -> ModelPair:
        return ModelPair(
            base, plan.checkpoint, self.device, *key.options, precision=key.precision, tuned=tuned, fits=self.fits
        )

    def _load(self, plan: Plan) -> BaseModel:
        if self._base is None or self._base[0] != plan.base.revision:
            self._base = self._ahead = None
            release(self.device)
            self._base = plan.base.revision, load_base(plan.base, as_stored=self.device != "cpu")
        return self._base[1]

    def ahead(self, plan: Plan) -> None:
        """Merge the checkpoint of ``plan`` into copies of its base's weights while another one is sampled on a GPU.

        On a CPU, and where the base is another one, there is nothing to do ahead. What goes wrong shows in ``run``.
        """
        key = _pair_key(plan, plan.settings.precision)
        if self.device == "cpu" or self._base is None or self._base[0] != plan.base.revision:
            return
        base = self._base[1]
        dtype = choose_precision(key.precision, base.architecture.half, torch.device(self.device))
        scale, adapter, *_ = key.options
        self._ahead = key, self._merging.submit(tune, base, plan.checkpoint, scale, adapter, dtype)


@dataclass(frozen=True)
class _PairKey:
    """What a pair of networks is made of."""

    identity: str
    revision: str
    options: tuple[float, str | None, int | None, float]
    precision: Precision


def _pair_key(plan: Plan, precision: Precision) -> _PairKey:
    settings = plan.settings
    options = settings.lora_scale, settings.adapter, settings.resolution, settings.embedded_guidance
    return _PairKey(plan.checkpoint.identity, plan.base.revision, options, precision)
