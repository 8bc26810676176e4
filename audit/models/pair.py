"""Base and fine-tuned model side by side: what extraction asks for predictions."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from audit.choices import Expert
from audit.config import Compile, Precision, Settings
from audit.devices import raise_fault
from audit.errors import CheckpointError, ConfigError, NoEffectError, NotFiniteError
from audit.evidence.levels import edge, timesteps_of
from audit.evidence.membership import SCALE, Level, level_of
from audit.fits import Fits
from audit.models.base import BaseModel
from audit.models.batches import batch_to_decode
from audit.models.checkpoint import Checkpoint
from audit.models.codec import Codec
from audit.models.experts import PAIR
from audit.models.families.base import Condition
from audit.models.formats.adapter import Tuned
from audit.models.formats.parts import set_parameter, sharing_copy
from audit.models.placement import NAMES, choose_precision, decoder_precision, place
from audit.models.text_once import text_once
from audit.models.tuning import family_warnings, tune

SAME_AS_NOISE = 0.5  # cosine of prediction and noise at the first timestep: near 1 for eps, near 0 for v
MOST_SHAPES = 64  # a block is compiled for: one a resolution of the network and batch size
ENCODED = 64  # captions that are encoded at once, where they fit


@dataclass(frozen=True)
class Effect:
    """Evidence that the checkpoint changed the model: relative changes. Weights are 0 where it only brings tokens."""

    weights: float
    prediction: float


class ModelPair(Codec):
    """A base model and one checkpoint of it.

    Both denoisers are resident, and of both sides only what differs: weights that the checkpoint leaves alone, VAE and
    tokenizers are shared. ``precision`` says what the networks compute in (``Settings.precision``); all are
    channels-last. ``resolution`` is the side of the sampled images in pixels, None for the model's own. ``tuned`` is
    what ``tune`` has made of the checkpoint where that was done before, and ``fits`` what a worker knows of how much
    fits into memory. Of videos ``frames`` are sampled: ``sampled_shape`` is that of their latents, and pictures are
    still of one. ``soft`` has the soft prompts float32 [V, width] that captions may name (audit/models/soft.py).
    Raises CheckpointError where the checkpoint does not fit, NoEffectError where it changes nothing, NotFiniteError
    where predictions overflow, and DeviceMemoryError where the networks do not fit into memory.
    """

    def __init__(
        self,
        base: BaseModel,
        checkpoint: Checkpoint,
        device: str = "cpu",
        lora_scale: float = 1.0,
        adapter: str | None = None,
        resolution: int | None = None,
        embedded_guidance: float = Settings.embedded_guidance,
        precision: Precision = Precision.auto,
        tuned: Tuned | None = None,
        fits: Fits | None = None,
        frames: int = 1,
    ) -> None:
        self.device = torch.device(device)
        self.architecture = base.architecture
        self.dtype = choose_precision(precision, base.architecture.half, self.device)
        self.embedded_guidance, self.resolution = embedded_guidance, resolution
        self.fits = fits or Fits()
        self.compiled = Compile.off
        self.soft: Mapping[str, torch.Tensor] = {}
        self.scheduler = base.pipeline.scheduler
        self.warnings = [*family_warnings(checkpoint, base), *base.architecture.warnings(base.pipeline)]
        tuned = tuned or tune(base, checkpoint, lora_scale, adapter, self.dtype)
        self.warnings += tuned.warnings
        self.changes, self.tokens = tuned.changes, sorted(tuned.embeddings)
        self.boundary = base.architecture.boundary(base.pipeline)
        self.experts = self._experts(tuned)
        weights = _weight_change(base, tuned, checkpoint)
        self.model = base
        try:
            self.base = self._base_side(base)
            self.tuned = self._tuned_side(base, tuned, checkpoint)
        except RuntimeError as error:
            raise_fault(error, f"{base.name} with {checkpoint.path.name}", str(self.device))
            raise
        self.vae = self.base.vae
        self._check_resolution(base.name)
        self.sampled_shape = self.architecture.sampled_shape(self.base, self.latent_shape, frames)
        # six digits: the last bits of a norm depend on threads and memory layout, and an audit is to repeat exactly
        self.effect = Effect(float(f"{weights:.6g}"), float(f"{self._prediction_change(checkpoint):.6g}"))
        self.problem = self._problem(base.name)

    def _experts(self, tuned: Tuned) -> tuple[Expert, ...]:
        """Which of a base's two experts are changed; both where only what they are given is. Empty of one network."""
        if self.boundary is None:
            return ()
        moved = {change.part for change in tuned.changes if change.norm > 0}
        named = zip(PAIR, self.architecture.denoisers, strict=True)
        return tuple(expert for expert, part in named if part in moved) or PAIR

    def _base_side(self, base: BaseModel) -> Any:
        side = copy.copy(base.pipeline)
        for part in base.architecture.networks:
            dtype = self.dtype if part != "vae" else decoder_precision(base.part(part), self.dtype, self.device)
            setattr(side, part, base.part_on(part, self.device, dtype))
        return side

    def _tuned_side(self, base: BaseModel, tuned: Tuned, checkpoint: Checkpoint) -> Any:
        side = copy.copy(self.base)
        for part, network in tuned.networks.items():
            before, there = base.part(part), getattr(self.base, part)
            placed = network if there is before else place(network, self.device, self.dtype, like=(before, there))
            setattr(side, part, placed.requires_grad_(False).eval())
        if tuned.embeddings:
            self._add_tokens(side, tuned, checkpoint)
        return side

    def _add_tokens(self, side: Any, tuned: Tuned, checkpoint: Checkpoint) -> None:
        """Textual inversion by diffusers, on copies of the tokenizers and encoders."""
        if not hasattr(side, "load_textual_inversion"):
            raise CheckpointError(f"{checkpoint.path} brings tokens, which this family's models cannot take up")
        pairs = dict(zip(self.architecture.encoders, self.architecture.tokenizers, strict=True))
        for encoder in {name for vectors in tuned.embeddings.values() for name in vectors}:
            network = sharing_copy(getattr(side, encoder))
            table = network.get_input_embeddings()  # transformers enlarges it in place: not the base's own
            set_parameter(table, "weight", table.weight.detach())
            setattr(side, encoder, network)
            setattr(side, pairs[encoder], copy.deepcopy(getattr(side, pairs[encoder])))
        for token, by_encoder in tuned.embeddings.items():
            for encoder, vectors in by_encoder.items():
                try:
                    side.load_textual_inversion(
                        {token: vectors}, token=token,
                        tokenizer=getattr(side, pairs[encoder]), text_encoder=getattr(side, encoder),
                    )  # fmt: skip
                except (ValueError, RuntimeError, TypeError, KeyError) as error:
                    raise CheckpointError(
                        f"{checkpoint.path}: its token cannot be added: {str(error)[:200]}"
                    ) from error

    @property
    def prediction_type(self) -> str:
        """What the denoiser answers: "epsilon", "v_prediction", "sample", or "flow_prediction"."""
        return "flow_prediction" if self.architecture.flow else self.scheduler.config.prediction_type

    @property
    def caption_tokens(self) -> int:
        """Tokens the text encoder reads, its start and end token included."""
        return self.architecture.caption_tokens(self.base)

    def is_truncated(self, caption: str) -> bool:
        """Whether the text encoder sees only the beginning of ``caption``."""
        return self.architecture.is_truncated(self.tuned, caption)

    @torch.inference_mode()
    def encode(self, captions: Sequence[str], tuned: bool) -> Condition:
        """The condition of ``captions`` by the fine-tuned or the base text encoders, as many at a time as fit.

        A caption that ``soft`` names is its vectors'.
        """
        side = self.tuned if tuned else self.base

        def encoded(some: Sequence[str]) -> Condition:
            return self.architecture.encode(side, list(some), self.device).to(self.dtype)

        kind = "encode", self.architecture.name, self.dtype
        found = [one for _, one in self.fits.slices(kind, list(captions), encoded, ENCODED, self.device)]
        condition = Condition.joined(found)
        for row, caption in enumerate(captions):
            if caption in self.soft:
                states = self.architecture.encode_soft(side, self.soft[caption][None], self.device).states
                condition.states[row] = states[0].to(condition.states.dtype)
        return condition

    def compile(self, how: Compile) -> None:
        """Let torch.compile have the denoisers: their repeated blocks, or the whole of them with CUDA graphs.

        Nothing is compiled again for another checkpoint: shapes and code are the same, and weights are inputs.
        """
        if how is not Compile.off and not self.architecture.compiles:
            raise ConfigError(f"--compile {how}: networks of family {self.architecture.name} are not compiled; use off")
        self.compiled = how
        if how is Compile.off:
            return
        torch._dynamo.config.recompile_limit = MOST_SHAPES
        networks = [getattr(side, part) for side in (self.base, self.tuned) for part in self.architecture.denoisers]
        for network in networks:
            if network is None:
                continue
            if how is Compile.blocks:
                network.compile_repeated_blocks(fullgraph=True, dynamic=False)
            elif getattr(network, "_compiled_call_impl", None) is None:
                network.compile(mode="reduce-overhead", fullgraph=True, dynamic=False)

    def text_once(self) -> AbstractContextManager[None]:
        """While it is entered, what cross attention makes of captions is computed once, not at every step."""
        part = self.architecture.denoiser
        if self.compiled is not Compile.off or part != "unet":  # a transformer's layers before it answer anew each time
            return nullcontext()  # compiled code does not see what is exchanged behind it
        return text_once(getattr(self.base, part), getattr(self.tuned, part))

    def predict_base(self, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The base's prediction [N, C, H, W] at one timestep (0-dim)."""
        return self._predict(self.base, latents, timestep, condition)

    def predict_tuned(self, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The fine-tuned model's prediction [N, C, H, W] at one timestep (0-dim)."""
        return self._predict(self.tuned, latents, timestep, condition)

    def _predict(self, side: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition) -> torch.Tensor:
        if self.compiled is not Compile.graphs:
            return self.architecture.predict(side, latents, timestep, condition, self.embedded_guidance)
        torch.compiler.cudagraph_mark_step_begin()
        found = self.architecture.predict(side, latents, timestep, condition, self.embedded_guidance)
        return found.clone()  # the graph writes its next answer into the same memory

    def _widen(self) -> None:
        super()._widen()
        self.base.vae = self.tuned.vae = self.vae

    def _decoded_at_once(self) -> int:
        return batch_to_decode(self)

    @torch.inference_mode()
    def _prediction_change(self, checkpoint: Checkpoint) -> float:
        """Relative change of the prediction, as v, on seeded noise at a middle timestep.

        With the empty caption, or with the family's own probe.

        As v, so that models that predict eps or x_0 have comparable numbers: v = (eps - sigma x_t) / alpha, and
        v = (alpha x_t - x_0) / sigma (Salimans and Ho, arXiv 2202.00512). A flow model is asked where noise and picture
        stand in the same proportion as in the middle of Stable Diffusion's schedule (``level_of``), on noise of the
        size that x_t has there, and its velocity u is made a v: with n^2 = (1 - t)^2 + t^2, v is that of x_t / n,
        n u + (1 - 2 t) x_t / n. A file with tokens of its own is asked with them: they may be all it changes.

        Of two experts each that is changed is asked in the middle of its own levels, and the larger change counts: a
        weight that is too large for either spoils the picture.
        """
        if not self.experts:
            return self._change_at(SCALE // 2, f"{checkpoint.path}")
        return max(
            self._change_at(max(timesteps_of(self.boundary, [one])), f"{checkpoint.path} in the {one} expert")
            for one in self.experts
        )

    def _change_at(self, t: int, what: str) -> float:
        """Raises NotFiniteError and NoEffectError, which name ``what``."""
        noise = torch.randn(2, *self.latent_shape, generator=torch.Generator().manual_seed(0))
        steps = self.scheduler.config.num_train_timesteps
        timestep, size = torch.tensor(steps // 2, device=self.device), 1.0
        if self.architecture.flow:
            level = self._level(t)
            timestep, size = level.asked(self.device), math.hypot(level.alpha, level.sigma)
        latents = (noise * size).to(self.device, self.dtype)
        captions = [" ".join(self.tokens) or self.architecture.probe] * 2
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for two latents
            base = self.predict_base(latents, timestep, self.encode(captions, tuned=False)).float()
            tuned = self.predict_tuned(latents, timestep, self.encode(captions, tuned=True)).float()
        if self.prediction_type in ("epsilon", "sample"):
            alpha = float(self.scheduler.alphas_cumprod[steps // 2]) ** 0.5
            sigma = (1 - alpha**2) ** 0.5
            if self.prediction_type == "epsilon":
                base, tuned = ((eps - sigma * latents.float()) / alpha for eps in (base, tuned))
            else:
                base, tuned = ((alpha * latents.float() - x0) / sigma for x0 in (base, tuned))
        if self.architecture.flow:
            base, tuned = (size * u + (level.alpha - level.sigma) * latents.float() / size for u in (base, tuned))
        change = float((tuned - base).norm() / base.norm().clamp(min=1e-12))
        if not math.isfinite(change):
            raise NotFiniteError(
                f"{what}: its predictions are not finite in {NAMES[self.dtype]}"
                + ("" if self.dtype is torch.float32 else "; a wider --precision may do")
            )
        if not change > 1e-6:
            raise NoEffectError(f"{what} does not change the base's predictions: there is nothing to extract")
        return change

    def _level(self, t: int) -> Level:
        return level_of(t, self.prediction_type, self.scheduler)

    @torch.inference_mode()
    def _problem(self, name: str) -> str | None:
        """Why sampling would give noise, in words; None where base and fine-tuned side predict what they are said to.

        Of pure noise nothing but the noise can be told: a model that predicts eps, or the velocity of a flow, answers
        nearly its input at the first timestep, one that predicts v or x_0 something independent of it. Of two experts
        the one for little noise is asked at its noisiest level.
        """
        first = torch.tensor(self.scheduler.config.num_train_timesteps - 1, device=self.device)
        asked = [first] if self.boundary is None else [first, self._level(edge(self.boundary) - 1).asked(self.device)]
        return next((found for one in asked if (found := self._problem_at(one, name))), None)

    def _problem_at(self, timestep: torch.Tensor, name: str) -> str | None:
        noise = torch.randn(2, *self.latent_shape, generator=torch.Generator().manual_seed(1))
        latents = noise.to(self.device, self.dtype)
        sees_noise = self.prediction_type in ("epsilon", "flow_prediction")
        captions = [self.architecture.probe] * 2
        found = []
        with torch.compiler.set_stance("force_eager"):
            for predict, tuned in ((self.predict_base, False), (self.predict_tuned, True)):
                answer = predict(latents, timestep, self.encode(captions, tuned)).float()
                found.append(
                    float(torch.nn.functional.cosine_similarity(answer.flatten(), latents.float().flatten(), 0))
                )
        wrong = [(cosine >= SAME_AS_NOISE) != sees_noise for cosine in found]
        said = f"{self.prediction_type.removesuffix('_prediction')} predictions"
        if wrong[0]:
            return (
                f"{name} does not give the {said} that its configuration says: its weights, or the prediction type of "
                "its scheduler, are others"
            )
        if wrong[1]:
            return (
                f"the fine-tuned model does not give {said} as {name} does: the file was trained on another base, for "
                "another prediction type, or is broken"
            )
        return None


def _weight_change(base: BaseModel, tuned: Tuned, checkpoint: Checkpoint) -> float:
    """Norm of tuned minus base over norm of base; NoEffectError where nothing differs."""
    weights = sum(change.norm**2 for change in tuned.changes) ** 0.5 / max(base.weight_norm, 1e-6)
    if not np.isfinite(weights):
        raise NoEffectError(f"{checkpoint.path} holds weights that are not finite: the file is broken")
    if not weights > 0 and not tuned.embeddings:
        raise NoEffectError(
            f"{checkpoint.path} has the same weights as the base model: nothing was fine-tuned, or the file is an "
            "adapter whose weights are all zero; there is nothing to extract"
        )
    return weights
