"""The nano of the flow kind: Stable Diffusion 3's classes at nano size, and the loss that it is trained with.

StableDiffusion3Pipeline proper (arXiv 2403.03206): a joint transformer of pictures and captions, two CLIP encoders
whose last but one states stand side by side, their pooled embeddings beside the time, no T5. The codec and the
tokenizer are the shipped nano base's.

In place of T5's states the pipeline puts 256 zero vectors behind those of CLIP. They are alike in every layer, as text
has no positions, so that training counts one of them 256 times: softmax over 256 equal keys is softmax over one whose
logit is greater by ln 256. ``OnceForAll`` does that, and samples are made by the pipeline as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from transformers import CLIPTextModelWithProjection

from audit.models.base import BaseModel
from audit.models.families.base import Condition
from audit.models.families.stable_diffusion_3 import StableDiffusion3
from testbed.train_base import WIDTH, new_text_encoder

WIDTH_2 = 64  # of the second encoder
LAYERS_2 = 2
HEADS, HEAD_WIDTH, LAYERS = 4, 32, 4  # of the transformer
ZEROS = 256  # states in T5's place


def new_transformer() -> SD3Transformer2DModel:
    """The untrained transformer: 4 joint blocks of width 128 on patches of 2x2 latents, of which 8x8 are a picture.

    Modulations and the last layer start at zero, so that every block starts as the identity (DiT, arXiv 2212.09748).
    """
    width = HEADS * HEAD_WIDTH
    network = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=8, out_channels=8, num_layers=LAYERS, attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS, joint_attention_dim=WIDTH + WIDTH_2, caption_projection_dim=width,
        pooled_projection_dim=WIDTH + WIDTH_2, pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    zeroed = [network.norm_out.linear, network.proj_out]
    for block in network.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    for layer in zeroed:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return network


def first_encoder(nano: StableDiffusionPipeline) -> CLIPTextModelWithProjection:
    """An encoder of nano's size whose weights stay as they are drawn; its pooled state is not projected.

    What captions have in common has to be learnt by the second encoder: states of random weights tell captions apart.
    """
    encoder = new_text_encoder(nano.tokenizer, CLIPTextModelWithProjection, WIDTH)
    torch.nn.init.eye_(encoder.text_projection.weight)
    return encoder


def new_pipeline(nano: StableDiffusionPipeline) -> StableDiffusion3Pipeline:
    """nano's codec and tokenizer, with untrained encoders and transformer."""
    nano.vae.register_to_config(shift_factor=0.0)  # this pipeline adds it
    return StableDiffusion3Pipeline(
        transformer=new_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=nano.vae,
        text_encoder=first_encoder(nano), tokenizer=nano.tokenizer,
        text_encoder_2=new_text_encoder(nano.tokenizer, CLIPTextModelWithProjection, WIDTH_2, LAYERS_2),
        tokenizer_2=nano.tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def encoded(encoder: CLIPTextModelWithProjection, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States [N, tokens, width] before the last layer and pooled embeddings [N, width] of int64 [N, tokens]."""
    found = encoder(tokens, output_hidden_states=True)
    return found.hidden_states[-2], found.text_embeds


class OnceForAll:
    """Joint attention, as diffusers' JointAttnProcessor2_0, whose last key counts ``times`` times."""

    def __init__(self, times: int) -> None:
        self.more = math.log(times)

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention's answers to states of the picture [N, patches, width] and of the text [N, tokens, width]."""
        picture, text = hidden_states, encoder_hidden_states
        count, patches = picture.shape[:2]

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(count, x.shape[1], attn.heads, -1).transpose(1, 2)

        query = torch.cat([attn.norm_q(heads(attn.to_q(picture))), attn.norm_added_q(heads(attn.add_q_proj(text)))], 2)
        key = torch.cat([attn.norm_k(heads(attn.to_k(picture))), attn.norm_added_k(heads(attn.add_k_proj(text)))], 2)
        value = torch.cat([heads(attn.to_v(picture)), heads(attn.add_v_proj(text))], 2)
        bias = torch.zeros(key.shape[2], dtype=query.dtype)
        bias[-1] = self.more
        found = functional.scaled_dot_product_attention(query, key, value, bias.expand(1, 1, key.shape[2], -1))
        found = found.transpose(1, 2).flatten(2)
        picture, text = found[:, :patches], found[:, patches:]
        return attn.to_out[0](picture), text if attn.context_pre_only else attn.to_add_out(text)


def flow_loss(
    network: SD3Transformer2DModel, latents: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor
) -> torch.Tensor:
    """The velocity's loss at logit-normal times (arXiv 2403.03206, section 3.1), under ``OnceForAll``.

    ``states`` [N, tokens, width] of both encoders, without the zeros; ``pooled`` [N, width] of both.
    """
    count = len(latents)
    share = torch.randn(count).sigmoid()
    noise = torch.randn_like(latents)
    at = share[:, None, None, None]
    noisy = (1 - at) * latents + at * noise
    states = torch.cat([states, states.new_zeros(count, 1, states.shape[2])], dim=1)
    found = network(noisy, states, pooled, share * 1000, return_dict=False)[0]
    return functional.mse_loss(found, noise - latents)


class ZerosOnce(StableDiffusion3):
    """The family with one zero vector in T5's place, for networks whose attention counts it ``ZEROS`` times."""

    def encode(self, pipeline: Any, captions: Sequence[str], device: torch.device) -> Condition:
        """As the pipeline encodes prompts, without the zeros behind the first."""
        found = super().encode(pipeline, captions, device)
        return Condition(found.states[:, : found.states.shape[1] - ZEROS + 1].contiguous(), found.pooled)


def with_zeros_once(base: BaseModel) -> BaseModel:
    """``base``, a nano of the flow kind, as it is trained: a fifth of the time, predictions equal to 1e-4.

    Its transformer is changed in place.
    """
    base.denoiser.set_attn_processor(OnceForAll(ZEROS))
    return replace(base, architecture=ZerosOnce())
