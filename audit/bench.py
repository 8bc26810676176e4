"""The bench of a worker: everything opened or loaded that the next job may need too. Nothing else keeps any of it."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

import torch

from audit.config import Compile, Expert, Precision
from audit.descriptors import Descriptor, load_descriptor
from audit.descriptors.facts import DescriptorFacts
from audit.descriptors.registry import facts_of
from audit.devices import release
from audit.errors import CheckpointError, ConfigError, DeviceMemoryError
from audit.fits import Fits
from audit.models.base import BaseLocation, BaseModel, load_base, load_vae, locate_base
from audit.models.checkpoint import Checkpoint, open_checkpoint
from audit.models.codec import Codec
from audit.models.formats.adapter import Tuned
from audit.models.pair import ModelPair
from audit.models.placement import choose_precision
from audit.models.tuning import tune
from audit.progress import Tell, quiet

if TYPE_CHECKING:
    from audit.job import Job
    from audit.workspace import Workspace

_OpenedKey = tuple[str | None, str, Expert | None]  # path, identity, and the expert that the file is for
KEPT_CHECKPOINTS = 4  # opened: headers and hashes, no tensors


class Bench:
    """What a worker has in memory, by what it was made of: each thing is opened, located or loaded once.

    Kept are every descriptor and where bases are, the last opened checkpoints, one base model, the pair of the last
    job, and the next one's merged weights; ``fits`` is what was learnt of how much fits into memory. A file that was
    found at a path is taken to stay as it is while the bench lives. Its methods may be called from several threads;
    networks of ``pair`` and ``codec`` are used by one at a time.
    """

    def __init__(self, device: str = "cpu", batch_size: int = 0, compile: Compile = Compile.off) -> None:
        self.device, self.batch_size, self.compile = device, batch_size, compile
        self.fits = Fits()
        self._lock = RLock()  # of the networks
        self._finding = RLock()  # of locations and descriptors
        self._opening = RLock()  # of the list of checkpoints
        self._locations: dict[tuple[str, str | None], BaseLocation] = {}
        self._descriptors: dict[str, Descriptor] = {}
        self._opened: OrderedDict[_OpenedKey, Future[Checkpoint]] = OrderedDict()
        self._base: tuple[str, BaseModel] | None = None
        self._vae: tuple[str, BaseModel] | None = None
        self._pair: tuple[_PairKey, ModelPair] | None = None
        self._ahead: tuple[_PairKey, Future[Tuned]] | None = None
        self._opener = ThreadPoolExecutor(1)
        self._merging = ThreadPoolExecutor(1)

    # Bases and descriptors

    def locate(self, source: str, config: str | None = None) -> BaseLocation:
        """Where a base model is. Raises what ``locate_base`` raises."""
        with self._finding:
            if (source, config) not in self._locations:
                self._locations[source, config] = locate_base(source, config)
            return self._locations[source, config]

    def location(self, job: Job) -> BaseLocation:
        """Where the base of ``job`` is. Raises ConfigError where it is another one than the job was made for."""
        found = self.locate(job.base.source, job.base.config)
        if found.revision != job.base.revision:
            raise ConfigError(
                f"the base model {job.base.source} is another here than where the job was made: use the same everywhere"
            )
        return found

    def described_by(self, source: str) -> DescriptorFacts:
        """What the descriptor ``source`` is; it is loaded, so that one that cannot be had is refused now."""
        return facts_of(self.load_descriptor(source), source)

    def descriptor(self, job: Job) -> Descriptor:
        """The descriptor of ``job``. Raises ConfigError where it is another one than the job was made for."""
        found = self.load_descriptor(job.descriptor.source)
        if found.name != job.descriptor.name:
            raise ConfigError(
                f"the descriptor {job.descriptor.source} is {found.name} here, the job wants {job.descriptor.name}: "
                "use the same everywhere"
            )
        return found

    def load_descriptor(self, source: str) -> Descriptor:
        """The descriptor ``source``. Raises DescriptorError where it cannot be had."""
        with self._finding:
            if source not in self._descriptors:
                self._descriptors[source] = load_descriptor(source, self.device)
            return self._descriptors[source]

    # Checkpoints

    def open(self, path: Path, low_noise: Path | None = None) -> Checkpoint:
        """Open and hash the checkpoint at ``path`` as it is now; jobs made of it find it opened."""
        checkpoint = open_checkpoint(path, low_noise)
        self.keep(str(path), checkpoint)
        return checkpoint

    def keep(self, path: str, checkpoint: Checkpoint) -> None:
        """Have jobs of ``checkpoint``, as it is now, find it opened."""
        done: Future[Checkpoint] = Future()
        done.set_result(checkpoint)
        with self._opening:
            self._keep((path, checkpoint.identity, checkpoint.expert), done)

    def checkpoint(self, job: Job, workspace: Workspace) -> Checkpoint:
        """The opened checkpoint of ``job``. Raises CheckpointError where it is gone, or is not what it was."""
        opened, claimed = self._opened_of(job, workspace).result(), job.checkpoint.claimed_bases
        return opened if opened.claimed_bases == claimed else replace(opened, claimed_bases=claimed)

    def _opened_of(self, job: Job, workspace: Workspace) -> Future[Checkpoint]:
        key = job.checkpoint.path, job.checkpoint.identity, job.settings.expert
        with self._opening:
            known = self._opened.get(key)
            if known is None or (known.done() and known.exception() is not None):
                known = self._opener.submit(_open, job, workspace)
            self._keep(key, known)
            return known

    def _keep(self, key: _OpenedKey, checkpoint: Future[Checkpoint]) -> None:
        self._opened[key] = checkpoint
        self._opened.move_to_end(key)
        while len(self._opened) > KEPT_CHECKPOINTS:
            self._opened.popitem(last=False)

    # Networks

    def base(self, job: Job) -> BaseModel:
        """The base model of ``job``."""
        return self.base_at(self.location(job))

    def base_at(self, location: BaseLocation) -> BaseModel:
        """A located base model; the one that was in memory before goes."""
        with self._lock:
            if self._base is None or self._base[0] != location.revision:
                self._base = self._vae = self._pair = self._ahead = None
                release(self.device)
                self._base = location.revision, load_base(location, as_stored=self.device != "cpu")
            return self._base[1]

    def loaded_base(self) -> BaseModel | None:
        """The base model that is in memory."""
        return None if self._base is None else self._base[1]

    def pair(self, job: Job, workspace: Workspace, precision: Precision | None = None, tell: Tell = quiet) -> ModelPair:
        """The base and the fine-tuned networks of ``job``, loaded unless they are those of the last one.

        With the soft prompts that its captions name. Raises WorkspaceError where the workspace has not kept them.
        """
        from audit.recovery.kept import soft_prompts  # it stands on models

        key = _pair_key(job, precision or job.settings.precision)
        with self._lock:
            if self._pair is None or self._pair[0] != key:
                tell("loading", 0, 1)
                self._pair = None  # the old fine-tuned side goes before the new one comes
                checkpoint = self.checkpoint(job, workspace)
                base = self.base(job)
                made, self._ahead = self._ahead, None
                tuned = made[1].result() if made and made[0] == key else None
                try:
                    pair = self._made(base, checkpoint, key, tuned)
                except DeviceMemoryError:
                    self.forget()  # what another precision has left there
                    pair = self._made(base, checkpoint, key, tuned)
                pair.compile(self.compile)
                self._pair = key, pair
                tell("loading", 1, 1)
            self._pair[1].soft = soft_prompts(workspace, job.captions)
            return self._pair[1]

    def _made(self, base: BaseModel, checkpoint: Checkpoint, key: _PairKey, tuned: Tuned | None) -> ModelPair:
        return ModelPair(
            base, checkpoint, self.device, *key.options, precision=key.precision, tuned=tuned, fits=self.fits,
            frames=key.frames,
        )  # fmt: skip

    def codec(self, job: Job) -> Codec:
        """What pictures go through in the base of ``job``: no denoiser is loaded for it."""
        return self.codec_of(self.location(job), job.settings.resolution, job.settings.precision)

    def codec_of(
        self, location: BaseLocation, resolution: int | None = None, precision: Precision = Precision.auto
    ) -> Codec:
        """The same of a located base."""
        with self._lock:
            for known in (self._base, self._vae):
                if known is not None and known[0] == location.revision:
                    return Codec(known[1], self.device, resolution, precision, self.fits)
            with suppress(CheckpointError):  # a base whose parts are not to be had alone is loaded whole
                self._vae = location.revision, load_vae(location, as_stored=self.device != "cpu")
                return Codec(self._vae[1], self.device, resolution, precision, self.fits)
            return Codec(self.base_at(location), self.device, resolution, precision, self.fits)

    def ahead(self, job: Job, workspace: Workspace) -> None:
        """Open the checkpoint of ``job``, and merge it into copies of its base's weights, while another is sampled.

        Merged on a GPU alone, and where the base is the one in memory. What goes wrong shows when it is used.
        """
        opened = self._opened_of(job, workspace)
        opened.add_done_callback(lambda done: None if done.exception() else self._merge(job, done.result()))

    def _merge(self, job: Job, checkpoint: Checkpoint) -> None:
        known = self._base
        if self.device == "cpu" or known is None or known[0] != job.base.revision:
            return
        key = _pair_key(job, job.settings.precision)
        base = known[1]
        dtype = choose_precision(key.precision, base.architecture.half, torch.device(self.device))
        scale, adapter, *_ = key.options
        self._ahead = key, self._merging.submit(tune, base, checkpoint, scale, adapter, dtype)

    def forget(self) -> None:
        """Let go of everything on the device, so that the networks have room in another precision."""
        with self._lock:
            self._pair = self._ahead = None
            for known in (self._base, self._vae):
                if known is not None:
                    known[1].forget()
            release(self.device)


def _open(job: Job, workspace: Workspace) -> Checkpoint:
    facts = job.checkpoint
    try:
        if facts.path is None:
            from crawlers.store import Store

            path = Store(workspace).fetch(facts.identity)
            if path is None:
                raise FileNotFoundError(facts.key)
        else:
            path = Path(facts.path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{facts.item_id} has no stored file any more: fetch it again with 'lora-audit catalog fetch'"
        ) from None
    second = None if facts.low_noise is None else Path(facts.low_noise)
    checkpoint = replace(open_checkpoint(path, second), label=facts.name, expert=job.settings.expert)
    if checkpoint.identity == facts.identity:
        return checkpoint
    if facts.path is None:
        raise CheckpointError(f"the stored file of {facts.item_id} is not what was recorded: run 'lora-audit verify'")
    raise CheckpointError(f"{path} has changed since the audit was asked for: ask again")


@dataclass(frozen=True)
class _PairKey:
    """What a pair of networks is made of."""

    identity: str
    revision: str
    options: tuple[float, str | None, int | None, float]
    precision: Precision
    expert: Expert | None
    frames: int


def _pair_key(job: Job, precision: Precision) -> _PairKey:
    settings = job.settings
    options = settings.lora_scale, settings.adapter, settings.resolution, settings.embedded_guidance
    return _PairKey(job.checkpoint.identity, job.base.revision, options, precision, settings.expert, settings.frames)
