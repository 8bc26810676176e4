"""What a model family has to know: how to encode captions, predict and size latents. Everything else is shared."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from audit.errors import CheckpointError
from audit.models.families.keys import Target

if TYPE_CHECKING:
    import torch

    from audit.models.safetensors_header import TensorInfo


@dataclass(frozen=True)
class Condition:
    """What a batch is conditioned on: text states [N, tokens, width], and what some families have besides.

    ``pooled`` [N, width]: the caption as one vector; ``mask`` [N, tokens]: which states count. ``lengths``: how many of
    each caption's states there are, the first, where a network takes captions of their own lengths; on the host, since
    to read them from a device would wait for it.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def select(self, rows: torch.Tensor) -> Condition:
        """The conditions of captions ``rows`` (int64 [M])."""
        lengths = None if self.lengths is None else tuple(self.lengths[row] for row in rows.tolist())
        states, pooled, mask = (None if part is None else part[rows] for part in self._parts())
        assert states is not None
        return Condition(states, pooled, mask, lengths)

    def each(self) -> list[torch.Tensor]:
        """The states of each caption alone [its own tokens, width]."""
        assert self.lengths is not None
        return [states[:length] for states, length in zip(self.states, self.lengths, strict=True)]

    @staticmethod
    def joined(conditions: Sequence[Condition]) -> Condition:
        """All of them, one behind the other, as one batch."""
        if len(conditions) == 1:
            return conditions[0]
        import torch

        columns = zip(*(one._parts() for one in conditions), strict=True)
        states, pooled, mask = (None if parts[0] is None else torch.cat(parts) for parts in columns)
        assert states is not None
        known = [one.lengths for one in conditions if one.lengths is not None]
        return Condition(states, pooled, mask, tuple(length for one in known for length in one) if known else None)

    def to(self, dtype: torch.dtype) -> Condition:
        """In ``dtype``; mask and lengths stay as they are."""
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return Condition(self.states.to(dtype), pooled, self.mask, self.lengths)

    def _parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.states, self.pooled, self.mask


@dataclass(frozen=True)
class TextShape:
    """The shape of a Condition: text states, width of a state, width of the pooled vector if any, whether masked.

    ``length``: of the longest caption, where captions have lengths of their own.
    """

    tokens: int
    width: int
    pooled: int | None = None
    masked: bool = False
    length: int | None = None

    @classmethod
    def of(cls, condition: Condition) -> TextShape:
        """The shape of ``condition``, whatever its batch."""
        tokens, width = condition.states.shape[1:]
        pooled = None if condition.pooled is None else condition.pooled.shape[-1]
        length = None if condition.lengths is None else max(condition.lengths)
        return cls(tokens, width, pooled, condition.mask is not None, length)

    def condition(self, batch: int, dtype: torch.dtype) -> Condition:
        """A condition of this shape on the meta device."""
        import torch

        meta = torch.device("meta")
        return Condition(
            torch.empty(batch, self.tokens, self.width, dtype=dtype, device=meta),
            None if self.pooled is None else torch.empty(batch, self.pooled, dtype=dtype, device=meta),
            torch.empty(batch, self.tokens, dtype=dtype, device=meta) if self.masked else None,
            None if self.length is None else (self.length,) * batch,
        )


class ModelFamily(ABC):
    """One architecture, in one file, as its constant FAMILY.

    ``name`` is what tables call it; ``precedence`` its turn where families are told apart, the lowest first;
    ``called`` a pattern of lower-case words that people call its base models by. ``pipeline`` is the name of its
    diffusers pipeline class, ``denoiser_class`` that of its denoiser; ``encoders`` its text encoders, of which
    ``optional`` may be missing, and ``conditioners`` what stands between them and the denoiser. ``encoder_names`` says
    which of them a file's te1, te2, te3 and conditioner are, ``encoder_prefixes`` where a single file has the first,
    the second, ... ``left_out`` are parts that only judge or embed pictures.

    A family with ``flow`` predicts the velocity eps - x_0 at x_t = (1 - t) x_0 + t eps; the others predict what their
    scheduler's configuration says. ``own_sigmas``: its pipeline spaces the noise levels evenly itself. ``shaped_like``
    names families whose shapes it shares. ``compiles``: whether torch.compile can have its denoiser.
    """

    name: ClassVar[str]
    pipeline: ClassVar[str]
    denoiser_class: ClassVar[str]
    precedence: ClassVar[int] = 100
    called: ClassVar[re.Pattern[str] | None] = None
    shaped_like: ClassVar[tuple[str, ...]] = ()
    denoiser: ClassVar[str] = "unet"
    further_denoisers: ClassVar[tuple[str, ...]] = ()  # which a base may lack
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    conditioners: ClassVar[tuple[str, ...]] = ()
    encoder_names: ClassVar[Mapping[str, str]] = {"te1": "text_encoder"}
    longest_caption: ClassVar[int] = 1 << 30  # tokens that the pipeline lets through, where that is less
    optional: ClassVar[tuple[str, ...]] = ()
    encoder_prefixes: ClassVar[tuple[tuple[str, ...], ...]] = ()
    left_out: ClassVar[Mapping[str, Any]] = {"feature_extractor": None}
    flow: ClassVar[bool] = False
    own_sigmas: ClassVar[bool] = False
    half_name: ClassVar[str] = "float16"
    default_config: ClassVar[str | None] = None
    compiles: ClassVar[bool] = True
    probe: ClassVar[str] = ""  # the caption with which the change of the prediction is measured

    @property
    def denoisers(self) -> tuple[str, ...]:
        """The components that denoise: one, or the experts that share the noise levels, the noisiest first."""
        return (self.denoiser, *self.further_denoisers)

    @property
    def networks(self) -> tuple[str, ...]:
        """The pipeline's components that have weights."""
        return (*self.denoisers, *self.encoders, *self.conditioners, "vae")

    @property
    def half(self) -> torch.dtype:
        """The half precision that it runs in."""
        import torch

        found: torch.dtype = getattr(torch, self.half_name)
        return found

    def told_by(self, tensors: Mapping[str, TensorInfo]) -> str | None:
        """The family that a file's names and shapes show: this one's name, or of a variant; None where neither."""
        return None

    def told_by_name(self, name: str) -> str | None:
        """The family that a base model's name, in lower case with "-" for "_", stands for; None where it is another."""
        return self.name if self.called is not None and self.called.search(name) else None

    def variant_of(self, pipeline: Any) -> str:
        """The family of a loaded base model: of several that share this architecture, the one its sizes show."""
        return self.name

    def originals(self, network: Any) -> Iterator[tuple[str, Target]]:
        """The names of the denoiser's modules in the model's first code, where they differ, and where they are."""
        return iter(())

    def own_parameter(self, name: str) -> str:
        """diffusers' name of a parameter of the denoiser that is no module's weight, by its name in the first code."""
        return name

    def check_folder(self, folder: Path, index: Mapping[str, Any]) -> None:
        """Raise CheckpointError where ``folder``, whose model_index.json is ``index``, lacks what a base model needs.

        Its weights may not be there yet.
        """
        return

    def check(self, pipeline: Any, name: str) -> None:
        """Raise CheckpointError where ``pipeline`` is a variant that cannot be audited."""
        return

    def doubts(self, pipeline: Any, name: str) -> list[str]:
        """What the name of a file says against its being for the base ``pipeline``, a sentence each."""
        return []

    def settle(self, pipeline: Any) -> None:
        """Change what would make a step of the sampler wait for a GPU, once the model is loaded."""
        return

    def load(self, folder: Path, options: dict[str, Any]) -> Any:
        """The pipeline that save_pretrained() wrote into ``folder``; raises what diffusers raises."""
        import diffusers

        return getattr(diffusers, self.pipeline).from_pretrained(folder, **options)

    def assemble(self, folder: Path, parts: Mapping[str, Any]) -> Any:
        """The pipeline of ``folder`` with ``parts`` for its networks: None for one that is left out."""
        import diffusers

        left_out = dict.fromkeys(self.tokenizers if all(parts[name] is None for name in self.encoders) else ())
        options = {**self.left_out, **left_out, "image_encoder": None, **parts}
        return getattr(diffusers, self.pipeline).from_pretrained(folder, local_files_only=True, **options)

    @abstractmethod
    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """The condition of ``captions`` by the pipeline's text encoders."""

    def encode_soft(self, pipeline: Any, vectors: torch.Tensor, device: torch.device) -> Condition:
        """The condition of soft prompts [N, V, width]. Raises CheckpointError where the family has none."""
        raise CheckpointError(f"{self.name} is not sampled with soft prompts: give the caption with --caption")

    @abstractmethod
    def predict(
        self, pipeline: Any, latents: torch.Tensor, timestep: torch.Tensor, condition: Condition, embedded: float
    ) -> torch.Tensor:
        """The denoiser's answer, of the latents' shape, at one timestep (0-dim).

        ``embedded`` is the guidance weight that guidance-distilled models take as an input.
        """

    def boundary(self, pipeline: Any) -> float | None:
        """The share of the schedule from which on the first of two experts is asked; None where there is one network.

        Where there are two, ``predict`` reads the timestep's value: the sampler gives it on the host then.
        """
        return None

    def boundary_in(self, index: Mapping[str, Any]) -> float | None:
        """The same of a folder, by its model_index.json."""
        return None

    def warnings(self, pipeline: Any) -> list[str]:
        """What has to be known of audits against ``pipeline``, a sentence each."""
        return []

    def time_shift(self, scheduler: Mapping[str, Any], latent_shape: Sequence[int], steps: int) -> float:
        """mu of a flow whose ``scheduler`` (its configuration) shifts larger pictures further towards noise.

        Linear in the number of 2 x 2 patches, between the two that the configuration names.
        """
        *_, height, width = latent_shape
        few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        found: float = low + (high - low) * (height * width // 4 - few) / (many - few)
        return found

    def latent_statistics(self, vae: Any, latents: torch.Tensor) -> tuple[Any, Any]:
        """Mean and deviation of the VAE's latents, of which the denoiser sees (x - mean) / deviation.

        Numbers, or tensors that go with ``latents`` [N, C, ..., H, W].
        """
        import torch

        config = vae.config
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return config.get("shift_factor") or 0.0, 1 / config.scaling_factor
        axes = (1, -1, *[1] * (latents.ndim - 2))
        mean, deviation = (torch.tensor(one, device=latents.device).view(axes) for one in (mean, deviation))
        return mean, deviation / config.get("scaling_factor", 1.0)

    def guided(self, empty: torch.Tensor, caption: torch.Tensor, w: float) -> torch.Tensor:
        """Classifier-free guidance as the model's own pipeline does it: of two predictions, by the weight ``w``."""
        import torch

        return torch.lerp(empty, caption, w)

    def to_pixels(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """One picture [N, 3, H, W] from -1 to 1 of each of the VAE's latents; of a video, the one that is looked at."""
        found: torch.Tensor = vae.decode(latents, return_dict=False)[0]
        return found

    def to_latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """The VAE's latents of pictures [N, 3, H, W] from -1 to 1."""
        found: torch.Tensor = vae.encode(pixels).latent_dist.mean
        return found

    def latent_channels(self, vae: Any) -> int:
        """Channels of the VAE's latents."""
        found: int = vae.config.latent_channels
        return found

    def vae_scale_factor(self, pipeline: Any) -> int:
        """Pixels along a side of one latent."""
        found: int = pipeline.vae_scale_factor
        return found

    def latent_shape(self, pipeline: Any, resolution: int | None) -> tuple[int, ...]:
        """The shape of one image's latents: channels, perhaps a time axis, height and width.

        They are of ``resolution`` pixels, or of the model's own size.
        """
        config = getattr(pipeline, self.denoiser).config
        if resolution is not None:
            side = resolution // pipeline.vae_scale_factor
            return config.in_channels, side, side
        size = config.sample_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return config.in_channels, height, width

    def sampled_shape(self, pipeline: Any, latent_shape: Sequence[int], frames: int) -> tuple[int, ...]:
        """The shape of the latents that are sampled for a picture, or for ``frames`` of a video, of which it is one.

        Raises CheckpointError where the family draws no videos.
        """
        if frames != 1:
            raise CheckpointError(f"--frames {frames}: {self.name} draws pictures, no videos; leave it out")
        return tuple(latent_shape)

    def text_shape(self, denoiser: Any, tokens: int) -> TextShape:
        """What a denoiser with the configuration ``denoiser`` is conditioned on by a caption of ``tokens`` states."""
        pooled = denoiser.get("pooled_projection_dim")
        return TextShape(tokens, denoiser.joint_attention_dim, pooled, masked=pooled is None)

    def caption_tokens(self, pipeline: Any) -> int:
        """Tokens that the encoder with the longest sight reads, its start and end token included."""
        return max(
            min(
                getattr(pipeline, tokenizer).model_max_length,
                self._positions(getattr(pipeline, encoder)),
                self.longest_caption,
            )
            for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True)
            if getattr(pipeline, encoder) is not None
        )

    def is_truncated(self, pipeline: Any, caption: str) -> bool:
        """Whether every text encoder sees only the beginning of ``caption``."""
        limit = self.caption_tokens(pipeline)
        lengths = [
            len(getattr(pipeline, tokenizer)(caption).input_ids)
            for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True)
            if getattr(pipeline, encoder) is not None
        ]
        return min(lengths) > limit

    def _positions(self, encoder: Any) -> int:
        return getattr(encoder.config, "max_position_embeddings", None) or 1 << 30
