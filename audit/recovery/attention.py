"""Which words' encodings fine-tuning has changed most, where text enters the denoiser: nothing is sampled for it.

Cross attention makes values v = W e of a text's states e. For each word alone, at its own tokens j of the text,

    change(word) = sqrt( 1/J sum over layers and j  | (W' e'_j - W e_j) - (W' e'_0j - W e_0j) |^2 )
    moved(word)  = sqrt( 1/J sum over j  | e'_j - e'_0j |^2 )
    score(word)  = change / sqrt(moved)

where W', e' are fine-tuned, W, e the base's, and e_0 the states of the empty caption. Of a text encoder that was
trained, what it has changed counts with the rest. The root of ``moved`` keeps words with long states from coming first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from audit.errors import NotRecoverableError
from audit.models.pair import ModelPair

ROWS = 256  # words whose states are in memory at once


def require_cross_attention(pair: ModelPair) -> None:
    """Raise NotRecoverableError where the family's captions are not recovered: its text enters in another way.

    Several text encoders do where their states stand side by side: all of them have to cut a text into the same tokens.
    """
    entered = bool(pair.architecture.denoiser == "unet" and _values(pair.base.unet))  # Wan's has a layer before it
    vocabularies = [getattr(pair.tuned, one).get_vocab() for one in pair.architecture.tokenizers] if entered else []
    if not entered or any(one != vocabularies[0] for one in vocabularies):
        raise NotRecoverableError(
            f"captions are recovered from models whose text enters a UNet by cross attention (Stable Diffusion 1, 2, "
            f"XL), not from {pair.architecture.name}: give the caption with --caption"
        )


def _values(network: Any) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in network.named_modules()
        if name.endswith(".attn2.to_v") and isinstance(module, torch.nn.Linear)
    }


@torch.inference_mode()
def attention_scores(
    pair: ModelPair, words: Sequence[str], tell: Callable[[int, int], None] = lambda done, total: None
) -> torch.Tensor:
    """float32 [W]: the score of each word."""
    before = _values(getattr(pair.base, pair.architecture.denoiser))
    after = _values(getattr(pair.tuned, pair.architecture.denoiser))
    weights = [(before[name].weight.float(), after[name].weight.float()) for name in before]
    shared = all(getattr(pair.base, one) is getattr(pair.tuned, one) for one in _text_parts(pair))
    empty = [pair.encode([""], tuned).states.float() for tuned in (False, True)]
    lengths = token_counts(pair, words)
    found = torch.empty(len(words))
    for start in range(0, len(words), ROWS):
        some = slice(start, start + ROWS)
        base = pair.encode(words[some], False).states.float()
        tuned = base if shared else pair.encode(words[some], True).states.float()
        places = torch.arange(base.shape[1])[None]
        own = ((places > 0) & (places <= lengths[some, None])).to(base.device)
        moved = ((tuned - empty[1]).square().sum(2) * own).sum(1) / own.sum(1)
        change = torch.zeros_like(moved)
        for w, w2 in weights:
            difference = (tuned - empty[1]) @ w2.T - (base - empty[0]) @ w.T
            change += (difference.square().sum(2) * own).sum(1) / own.sum(1)
        found[some] = (change.sqrt() / moved.clamp(min=1e-12).sqrt().sqrt()).cpu()
        tell(min(start + ROWS, len(words)), len(words))
    return found


def _text_parts(pair: ModelPair) -> tuple[str, ...]:
    return (*pair.architecture.encoders, *pair.architecture.tokenizers)


def token_counts(pair: ModelPair, words: Sequence[str]) -> torch.Tensor:
    """int64 [W]: of how many tokens each word is, one at least, and no more than the encoder sees."""
    most = pair.caption_tokens - 2
    ids = pair.tuned.tokenizer(list(words), add_special_tokens=False).input_ids
    return torch.tensor([max(1, min(most, len(one))) for one in ids])
