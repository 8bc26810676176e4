"""What strangers say of their work: configurations, captions, prompts, metadata, names, headers of answers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

from audit.claims.captions import (
    Caption,
    captions_from_metadata,
    clean_prompt,
    clean_text,
    n0_claims,
    rank_captions,
    read_caption_file,
)
from audit.demo import ASSETS
from audit.errors import CheckpointError
from audit.locations import shown as location_shown
from audit.models.base import load_base, locate_base
from audit.models.families.identify import family_of_name
from audit.models.formats.scaling import Scaling, identifying, problems, read_scaling, with_config_beside
from audit.models.trained import training_of
from audit.storable import path_as_text, path_of_text, storable
from audit.text import printable
from crawlers.civitai_answers import prompts_of
from crawlers.http import pause_asked, shown
from crawlers.items import clean_name, count_in_prose, hex_of, text_of, time_of
from crawlers.sources import civitai, huggingface
from tests.fuzz.files import METADATA
from tests.fuzz.kind import FindingError, Kind
from tests.fuzz.mutate import TEXTS, as_bytes, chance, changed_bytes, changed_json, changed_text, one_of

MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PEFT: tuple[dict[str, Any], ...] = (
    {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": False, "use_dora": False, "bias": "none",
     "target_modules": ["to_q", "to_k"], "alpha_pattern": {"to_q": 4}, "rank_pattern": {"mid_block.*to_k": 2},
     "init_lora_weights": True, "layers_to_transform": [0, 1], "layers_pattern": "blocks", "exclude_modules": None},
    {"peft_type": "OFT", "r": 4, "coft": True, "eps": 6e-5, "block_share": False, "use_cayley_neumann": True,
     "num_cayley_neumann_terms": 5, "target_modules": r".*attn\d\.to_[qkv]$"},
    {"peft_type": "LOKR", "r": 8, "alpha": 4, "decompose_both": True, "decompose_factor": -1,
     "target_modules": "all-linear"},
)  # fmt: skip


class PeftConfigurations(Kind):
    """adapter_config.json beside a file, and the same in a header."""

    name, share = "peft", 100_000

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.texts = [json.dumps(seed) for seed in PEFT]
        self.weights = place / "adapter_model.safetensors"
        self.weights.write_bytes(b"")
        Scaling(targets={"target_modules": ["x"]}).admits("x")  # imports what it takes seconds to import

    def make(self, choose: Random) -> bytes:
        return as_bytes(changed_json(json.loads(one_of(self.texts, choose)), choose), choose)

    def check(self, data: bytes) -> None:
        (self.place / "adapter_config.json").write_bytes(data)
        metadata = with_config_beside(self.weights, {}, "unet")
        json.dumps(identifying(metadata), allow_nan=False)
        refused = problems(metadata)
        scalings = read_scaling(metadata)
        if refused:
            raise CheckpointError("; ".join(refused))
        for scaling in scalings.values():
            for module in (MODULE, "a" * 290, "a." * 140):
                scaling.of(module), scaling.rank_of(module), scaling.admits(module)


class Bases(Kind):
    """The configurations of a base model's folder, with its weights as they are: found, checked and loaded."""

    name, share, memory, patience = "bases", 50, 1024, 30.0  # it makes the networks

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.folder = place / "base"
        shutil.copytree(ASSETS / "base", self.folder)
        self.parts = sorted(path.relative_to(self.folder) for path in self.folder.rglob("*.json"))
        self.originals = {part: (self.folder / part).read_bytes() for part in self.parts}

    def make(self, choose: Random) -> bytes:
        part = choose.choice(self.parts)
        original = self.originals[part]
        if chance(choose, 0.2) or len(original) > 20_000:
            content = changed_bytes(original, choose)
        else:
            content = as_bytes(changed_json(json.loads(original), choose, 2), choose)
        return str(part).encode() + b"\n" + content

    def check(self, data: bytes) -> None:
        name, _, content = data.partition(b"\n")
        path = self.folder / name.decode()
        path.write_bytes(content)
        try:
            load_base(locate_base(str(self.folder)))
        finally:
            path.write_bytes(self.originals[Path(name.decode())])


SENTENCES = (
    "a (sks:1.2) dog, <lora:dog:0.8>, ((masterpiece)), [blurry] BREAK best quality", "trained on 23 images of my cat",
    "<p>Trained with <b>120</b> pictures &amp; 4 repeats</p>", "https://civitai.com/models/12345?modelVersionId=67890",
    "urn:air:sd1:lora:civitai:101@201", "owner/name@0123456789abcdef0123456789abcdef01234567", "civitai:1:2:3",
    "https://huggingface.co/owner/name/blob/0123456789abcdef0123456789abcdef01234567/a.safetensors",
    "limit=10, remaining=0, reset=12", '"api";r=0;t=12', "2026-05-01T00:00:00.000Z", "folder/name.safetensors",
    "stable-diffusion-xl-base-1.0", "s3://key:sec/ret@bucket/prefix?scheme=https", "fe80::1%eth0", "10.0.0.1", "FLUX.1",
)  # fmt: skip


class Texts(Kind):
    """Captions, prompts, descriptions, names, addresses and metadata, read by everything that reads text."""

    name, share = "texts", 60_000

    def make(self, choose: Random) -> bytes:
        if chance(choose, 0.2):
            metadata = dict(METADATA)
            for _ in range(choose.randint(1, 3)):
                name = choose.choice(list(metadata))
                metadata[name] = changed_text(metadata[name], choose)
            return json.dumps(metadata).encode()
        text = choose.choice(TEXTS) if chance(choose, 0.1) else one_of(SENTENCES, choose)
        return changed_text(text, choose).encode("utf-8", "surrogatepass")

    def check(self, data: bytes) -> None:
        text = data.decode("utf-8", "surrogatepass")
        self._cleaned(text)
        self._read(text)
        path = self.place / "captions.txt"
        path.write_bytes(data)
        read_caption_file(path)

    @staticmethod
    def _cleaned(text: str) -> None:
        for made in (storable(text), printable(text), clean_text(text), clean_name(text), text_of(text)):
            made.encode()
        location_shown(text), location_shown(f"s3://{text}")
        for made in (shown(text), shown(f"https://{text}")):
            made.encode()
        raw = os.fsencode(text.encode("utf-8", "replace").decode().replace("\0", "") or "x")
        if os.fsencode(path_of_text(path_as_text(os.fsdecode(raw)))) != raw and b"//" not in raw:
            raise FindingError("a path does not come back")
        if len(rank_captions([Caption(text, "x"), Caption(clean_prompt(text), "y", 0.3)])) > 2:
            raise FindingError("more captions than there were")

    @staticmethod
    def _read(text: str) -> None:
        count_in_prose(text), family_of_name(text), time_of(text), hex_of(text, 64)
        civitai.reference_of(text), huggingface.reference_of(text), prompts_of([{"meta": {"prompt": text}}])
        wait = pause_asked({"RateLimit": text, "RateLimit-Remaining": "0", "RateLimit-Reset": text})
        if not 0 <= wait <= 300:
            raise FindingError(f"a wait of {wait} s")
        try:
            metadata = json.loads(text)
        except (ValueError, RecursionError):
            metadata = {}
        if not isinstance(metadata, dict) or not all(isinstance(one, str) for one in metadata.values()):
            metadata = {}
        for name in METADATA:
            metadata.setdefault(name, text)
        captions_from_metadata(metadata), n0_claims(metadata), training_of(metadata, {})
        read_scaling(metadata), problems(metadata), identifying(metadata)
