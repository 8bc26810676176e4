"""A start for an AutoencoderKL from which it is a good linear codec at once: training adds what linearity lacks.

The encoder's strided convolutions gather 2x2 squares and keep their principal components, so that the latents are
principal components of whole blocks of pixels, of unit variance.

The decoder is harder. Nearest-neighbour enlargement gives the four children of a cell the same numbers, and no
convolution can tell them apart where the cells around are alike: its answer to equal cells is one flat colour. So it
is given what it lacks, where each child is. A ramp over the rows and one over the columns grow out of the zeros around
the picture, one step a convolution (eight from each side, which fits 16x16 latents and no others); enlarged and
subtracted from its neighbour, a ramp tells odd from even. In the two residual blocks behind, units that are shut where
the child is not theirs give each of the four children its own least-squares prediction.

Group normalisation takes a picture's own scale away. A channel of a large constant in each group, the anchor, makes it
nearly the same fixed scaling for all pictures; shifted, the activation behind it works where it is nearly linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from testbed.held import Held
from testbed.least_squares import bias_of, fit

ANCHOR = 100.0  # times the root of a group's size: so that nothing else counts in its deviation
SHIFT, GAIN = 8.0, 0.4  # SiLU of SHIFT + GAIN x is near a line for x of unit variance, heavy tails included
SHUT = -20.0  # what shuts a unit, for each of row and column that is not its own
LOUD = 64.0  # what walkers and oddness are instead of 1: little precision is enough to tell them
SPARE = 4  # channels of a level of the encoder that stay random: a beginning for what is not linear
INNER = (3, 7, 24)  # components that the decoder rebuilds at full, half and quarter size
NOISE_LOG_VARIANCE = -7.0  # about the noise that the decoder is trained with
SIDE = 16  # of the latents


@torch.no_grad()
def start_linear(codec: AutoencoderKL, pictures: torch.Tensor) -> Held:
    """Set the weights of an untrained codec; ``pictures`` float32 [N, 3, H, W] in [-1, 1], some hundreds.

    Returns what training has to hold. Each level of the codec needs more channels than the one before. Raises
    ValueError where they are too few.
    """
    held = Held(codec)
    for module in codec.modules():
        if hasattr(module, "conv1") and hasattr(module, "conv2"):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(bias_of(module.conv2))
    states = _start_encoder(codec, pictures, held)
    for layer in (codec.quant_conv, codec.post_quant_conv):
        _pass_on(layer, layer.out_channels)
        bias_of(layer).zero_()
    _start_decoder(codec, codec.encode(pictures).latent_dist.mean, states, held)
    return held


def _start_encoder(codec: AutoencoderKL, pictures: torch.Tensor, held: Held) -> list[torch.Tensor]:
    """Set the encoder's weights; the components of each level, from the pictures to the smallest."""
    encoder, latents, groups = codec.encoder, codec.config["latent_channels"], codec.config["norm_num_groups"]
    components, deviations = [pictures], torch.ones(3)
    _pass_on(encoder.conv_in, 3)
    state = encoder.conv_in(pictures)
    for block in encoder.down_blocks[:-1]:
        kept = len(deviations)
        _pass_on(block.resnets[0].conv_shortcut, kept)
        for resnet in block.resnets:
            state = resnet(state, None)
        conv = block.downsamplers[0].conv
        deviations = _keep_components(conv, state[:, :kept], deviations)
        state = block.downsamplers[0](state)
        components.append(state[:, : len(deviations)])
    block, kept = encoder.down_blocks[-1], len(deviations)
    places = _carry(block.resnets[0].conv_shortcut, list(range(kept)), groups)
    _hold_fixed(held, block.resnets[0].conv_shortcut, groups)
    _hold_fixed(held, block.resnets[0].conv2, groups)
    state = block.resnets[0](state, None)
    for resnet in (*block.resnets[1:], *encoder.mid_block.resnets):
        _tame(resnet.norm1, state, held, gain=1.0, shift=0.0)
        _hold_fixed(held, resnet.conv2, groups)
        state = resnet(state, None)
    _tame(encoder.conv_norm_out, state, held)
    _count_from_zero(held, encoder.conv_out, groups)
    active = _active(encoder.conv_norm_out, state)
    fit(encoder.conv_out, range(latents), active, places, components[-1][:, :latents], groups)
    encoder.conv_out.weight[latents:] = 0
    bias_of(encoder.conv_out)[latents:] = NOISE_LOG_VARIANCE
    return components


def _start_decoder(codec: AutoencoderKL, latents: torch.Tensor, components: list[torch.Tensor], held: Held) -> None:
    """Set the decoder's weights: each level's state is fitted to the encoder's ``components`` there."""
    decoder, groups = codec.decoder, codec.config["norm_num_groups"]
    count = latents.shape[1]
    slots = _slots(decoder.conv_in.out_channels, groups)
    data, ramps, walkers = slots[:count], slots[count : count + 2], slots[count + 2 : count + 6]
    _clear(decoder.conv_in, data + ramps + walkers, groups)
    decoder.conv_in.weight[data, range(count), 1, 1] = 1
    bias_of(decoder.conv_in)[walkers] = LOUD
    bias_of(decoder.conv_in)[ramps] = -9 / SIDE
    _hold_fixed(held, decoder.conv_in, groups, ramps + walkers)
    state = decoder.conv_in(codec.post_quant_conv(latents))
    for number, resnet in enumerate((*decoder.mid_block.resnets, *decoder.up_blocks[0].resnets)):
        _walk(resnet, state, ramps, walkers, number, held)
        state = resnet(state, None)
    loud = ramps + walkers
    for block, following, size in zip(decoder.up_blocks, decoder.up_blocks[1:], INNER[::-1], strict=False):
        _take_no_anchors(held, block.upsamplers[0].conv, groups, loud)
        odd = _enlarge(block.upsamplers[0].conv, state, data, ramps, groups)
        _hold_fixed(held, block.upsamplers[0].conv, groups, ramps + odd)
        state = block.upsamplers[0](state)
        carried = data + odd + (ramps if following.upsamplers else [])
        first, second = following.resnets
        _take_no_anchors(held, first.conv_shortcut, groups, ramps + odd)
        places = _carry(first.conv_shortcut, carried, groups)
        new = [one for one in _slots(first.conv_shortcut.out_channels, groups) if one not in places][:size]
        _clear(first.conv_shortcut, new, groups)
        moved = dict(zip(carried, places, strict=True))
        place = [one for old, one in moved.items() if old not in data]
        _hold_fixed(held, first.conv_shortcut, groups, place)
        target = next(one for one in components if one.shape[-1] == state.shape[-1])[:, :size]
        _tell_children(first, state, data, odd, new, target, (0, 1), held)
        _hold_fixed(held, first.conv2, groups, place)
        state = first(state, None)
        data, odd, ramps = ([moved[one] for one in some if one in moved] for some in (data, odd, ramps))
        _tell_children(second, state, data, odd, new, target, (2, 3), held)
        _hold_fixed(held, second.conv2, groups, place)
        state = second(state, None)
        data, loud = new, ramps + odd
    _tame(decoder.conv_norm_out, state, held)
    _count_from_zero(held, decoder.conv_out, groups)
    decoder.conv_out.weight[:, loud] = 0
    held.hold(decoder.conv_out.weight, slice(None), loud)
    fit(decoder.conv_out, range(3), _active(decoder.conv_norm_out, state), data, components[0], groups)


def _walk(
    resnet: ResnetBlock2D, state: torch.Tensor, ramps: list[int], walkers: list[int], number: int, held: Held
) -> None:
    """Make a residual block move the ``walkers``, ones at first, two places away from the four sides.

    What they pass adds to the ramps: up from the left and the top, down from the right and the bottom (one step less).
    """
    groups = resnet.norm1.num_groups
    slots = _slots(resnet.conv1.out_channels, groups)
    units, free = slots[:4], slots[4:]
    before, between, after = (_walked(2 * number + steps, state) for steps in range(3))
    _tame(resnet.norm1, state, held)
    active = _active(resnet.norm1, state)
    _count_from_zero(held, resnet.conv1, groups)
    _count_from_zero(held, resnet.conv2, groups, units)
    _clear(resnet.conv1, units, groups)
    _hold_fixed(held, resnet.conv1, groups, units)
    _hold_fixed(held, resnet.conv2, groups, ramps + walkers)
    held.hold(resnet.conv1.weight, slice(None), walkers)
    held.hold(resnet.conv2.weight, slice(None), units)
    fit(resnet.conv1, units, active, walkers, LOUD * between, groups)
    hidden = resnet.conv1(active)
    _tame(resnet.norm2, hidden, held)
    resnet.norm2.weight[free] /= GAIN  # where training is free, SiLU is bent
    resnet.norm2.bias[free] = (resnet.norm2.bias[free] - SHIFT) / GAIN
    passed = between + after * torch.tensor([1.0, float(number < 3), 1.0, float(number < 3)])[:, None, None]
    steps = torch.stack([passed[:, 0] - passed[:, 1], passed[:, 2] - passed[:, 3]], 1) / SIDE
    target = torch.cat([steps, LOUD * (after - before)], 1)
    fit(resnet.conv2, ramps + walkers, _active(resnet.norm2, hidden), units, target, groups)


def _walked(steps: int, state: torch.Tensor) -> torch.Tensor:
    """Ones that have walked ``steps`` from the left, right, top and bottom: float32 [N, 4, H, W]."""
    height, width = state.shape[-2:]
    column, row = torch.arange(width).expand(height, width), torch.arange(height)[:, None].expand(height, width)
    there = torch.stack([column >= steps, column < width - steps, row >= steps, row < height - steps])
    return there.float().expand(len(state), -1, -1, -1)


def _enlarge(conv: nn.Conv2d, state: torch.Tensor, data: list[int], ramps: list[int], groups: int) -> list[int]:
    """Make the convolution behind an enlargement hand on the data, continue the ramps, and tell odd from even.

    Returns the two channels that are 1 in odd columns and in odd rows.
    """
    taken = set(data + ramps)
    odd = [one for one in _slots(conv.out_channels, groups) if one not in taken][:2]
    _clear(conv, data + ramps + odd, groups)
    conv.weight[data, data, 1, 1] = 1
    for ramp, one, (row, column) in zip(ramps, odd, ((1, 2), (2, 1)), strict=True):
        conv.weight[ramp, ramp, 1, 1] = conv.weight[ramp, ramp, row, column] = 0.5
        conv.weight[one, ramp, row, column] = LOUD * state.shape[-1]
        conv.weight[one, ramp, 1, 1] = -LOUD * state.shape[-1]
    return odd


def _tell_children(
    resnet: ResnetBlock2D,
    state: torch.Tensor,
    data: list[int],
    odd: list[int],
    new: list[int],
    target: torch.Tensor,
    children: tuple[int, int],
    held: Held,
) -> None:
    """Make a residual block add, for two of the four children, their fits of ``target`` to the ``new`` channels.

    Each child has a unit for every new channel and one more, which is the same without data: what it counts from.
    """
    groups, each = resnet.norm1.num_groups, len(new) + 1
    slots = _slots(resnet.conv1.out_channels, groups)
    units = {child: slots[number * each : (number + 1) * each] for number, child in enumerate(children)}
    used = slots[: 2 * each]
    _tame(resnet.norm1, state, held)
    active = _active(resnet.norm1, state)
    _count_from_zero(held, resnet.conv1, groups)
    _clear(resnet.conv1, used, groups)
    for child, mine in units.items():
        fit(resnet.conv1, mine[:-1], active, data, GAIN * target, groups, child=child)
        held.tie_columns(resnet.conv2.weight, mine[:-1], mine[-1])
    _balance(resnet.conv1, used, groups, held)
    _hold_fixed(held, resnet.conv1, groups, [mine[-1] for mine in units.values()])
    held.hold(resnet.conv1.weight, slice(None), odd)
    held.hold(resnet.conv2.weight, slice(None), [one for one in range(resnet.conv2.in_channels) if one not in slots])
    parity = nn.Conv2d(active.shape[1], 2, 3, padding=1).requires_grad_(False)
    parity.weight.zero_()
    fit(parity, range(2), active, odd, state[:, odd] / LOUD, groups, centre=True)
    wanted = torch.zeros_like(target)
    for child, mine in units.items():
        row, column = child // 2, child % 2
        bias_of(resnet.conv1)[mine] += SHIFT
        for side, own in enumerate((column, row)):  # shut where the child is not theirs
            resnet.conv1.weight[mine] += (-SHUT if own else SHUT) * parity.weight[side]
            bias_of(resnet.conv1)[mine] += (-SHUT if own else SHUT) * bias_of(parity)[side] + (SHUT if own else 0)
        wanted[:, :, row::2, column::2] = target[:, :, row::2, column::2]
    hidden = resnet.conv1(active)
    _tame(resnet.norm2, hidden, held, gain=1.0, shift=0.0)
    fit(resnet.conv2, new, _active(resnet.norm2, hidden), used, wanted, centre=True)


def _pass_on(conv: nn.Conv2d | None, count: int) -> None:
    """Make the first ``count`` channels of a convolution those of its input, as they are."""
    if conv is None:
        return
    middle = conv.kernel_size[0] // 2
    conv.weight[:count] = 0
    conv.weight[range(count), range(count), middle, middle] = 1
    bias_of(conv)[:count] = 0


def _keep_components(conv: nn.Conv2d, state: torch.Tensor, deviations: torch.Tensor) -> torch.Tensor:
    """Make a strided convolution give the principal components of 2x2 squares, divided by their deviations.

    ``deviations`` [K] are those that ``state`` [N, K, H, W] was divided by; returns the new ones, as many as are kept.
    """
    kept = len(deviations)
    squares = functional.pixel_unshuffle(state, 2)  # channel, row, column of the square
    flat = squares.movedim(1, -1).flatten(0, -2)
    scale = deviations.repeat_interleave(4)
    middle = flat.mean(0)
    values, vectors = torch.linalg.eigh(((flat - middle) * scale).T.cov())
    count = min(4 * kept, conv.out_channels - SPARE)
    found = values[-count:].flip(0).clamp(min=1e-6).sqrt()  # what is never there is not made loud
    projection = vectors[:, -count:].flip(1).T * scale / found[:, None]
    conv.weight[:count] = 0
    conv.weight[:count, :kept, :2, :2] = projection.unflatten(1, (kept, 2, 2))
    bias_of(conv)[:count] = -projection @ middle
    return found


def _slots(channels: int, groups: int) -> list[int]:
    """The channels but the first two of each group, the anchor and the zero."""
    return [one for one in range(channels) if one % (channels // groups) >= 2]


def _clear(conv: nn.Conv2d, channels: list[int], groups: int) -> None:
    """Zero the convolution's ``channels``, and make the first two of each group an anchor and a zero."""
    size = conv.out_channels // groups
    fixed = [one for one in range(conv.out_channels) if one % size < 2]
    conv.weight[channels + fixed] = 0
    bias_of(conv)[channels + fixed] = 0
    bias_of(conv)[fixed[::2]] = ANCHOR * size**0.5


def _balance(conv: nn.Conv2d, channels: list[int], groups: int, held: Held) -> None:
    """Make the second channel of each group what its ``channels`` sum to, negated: they do not move the mean.

    The other channels become small, for the same reason.
    """
    size = conv.out_channels // groups
    for first in range(0, conv.out_channels, size):
        mine = [one for one in channels if first <= one < first + size]
        others = [one for one in range(first + 2, first + size) if one not in mine]
        conv.weight[others] *= 0.2
        conv.weight[first + 1] = -conv.weight[mine].sum(0)
        held.tie_rows(conv.weight, mine, first + 1)


def _carry(shortcut: nn.Conv2d, channels: list[int], groups: int) -> list[int]:
    """Make a 1x1 convolution hand on ``channels`` between anchors; where they are then."""
    places = _slots(shortcut.out_channels, groups)[: len(channels)]
    if len(places) < len(channels):
        raise ValueError(f"{len(channels)} channels and their anchors do not fit into {shortcut.out_channels}")
    _clear(shortcut, places, groups)
    shortcut.weight[places, channels] = 1
    return places


def _hold_fixed(held: Held, conv: nn.Conv2d, groups: int, channels: list[int] | None = None) -> None:
    """Hold what a convolution gives to anchors, zeros and ``channels``."""
    size = conv.out_channels // groups
    rows = [one for one in range(conv.out_channels) if one % size < 2] + (channels or [])
    held.hold(conv.weight, rows)
    held.hold(bias_of(conv), rows)


def _take_no_anchors(held: Held, conv: nn.Conv2d, groups: int, loud: list[int]) -> None:
    """Let a convolution of a state as it is take nothing from anchors and ``loud`` channels but what it is given.

    One step of training would shift everything by them.
    """
    anchors = list(range(0, conv.in_channels, conv.in_channels // groups))
    conv.weight[:, anchors + loud] = 0
    held.hold(conv.weight, slice(None), anchors + loud)


def _count_from_zero(held: Held, conv: nn.Conv2d, groups: int, inputs: list[int] | None = None) -> None:
    """Make a convolution, in training too, see ``inputs`` (by default all) less the zero of their group."""
    size = conv.in_channels // groups
    for first in range(0, conv.in_channels, size):
        mine = [one for one in range(first + 2, first + size) if inputs is None or one in inputs]
        conv.weight[:, first + 1] = -conv.weight[:, mine].sum(1)
        held.tie_columns(conv.weight, mine, first + 1)


def _tame(norm: nn.GroupNorm, state: torch.Tensor, held: Held, gain: float = GAIN, shift: float = SHIFT) -> None:
    """Make a normalisation of anchored groups ``gain`` x + ``shift`` for pictures like those of ``state``."""
    held.hold(norm.weight, slice(None))
    held.hold(norm.bias, slice(None))
    grouped = state.unflatten(1, (norm.num_groups, -1)).flatten(2)
    size = norm.num_channels // norm.num_groups
    deviation = grouped.std(2).mean(0).repeat_interleave(size)
    middle = grouped.mean(2).mean(0).repeat_interleave(size)
    norm.weight.copy_(gain * deviation)
    norm.bias.copy_(gain * middle + shift)
    anchors = list(range(0, norm.num_channels, size))
    norm.weight[anchors] = deviation[anchors] / (ANCHOR * size**0.5)
    norm.bias[anchors] = 0


def _active(norm: nn.GroupNorm, state: torch.Tensor) -> torch.Tensor:
    return functional.silu(norm(state))
