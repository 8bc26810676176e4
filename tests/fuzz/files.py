"""Files of strangers: weights, pictures, archives."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, features

from audit.demo import ASSETS
from audit.descriptors import open_image
from audit.files import Files
from audit.models.checkpoint import layout_of, metadata_json
from audit.models.formats.detect import detect_format
from audit.models.formats.headers import is_gguf, read_any_header
from audit.models.formats.scaling import identifying, problems, read_scaling
from crawlers.items import Item, conclude
from crawlers.training_data import unpack
from tests.fuzz.kind import FindingError, Kind
from tests.fuzz.mutate import TEXTS, as_bytes, chance, changed_bytes, changed_json, one_of, spliced

CORPUS = Path(__file__).parents[1] / "models/corpus"
CHECKPOINTS = sorted(ASSETS.glob("checkpoints/*/*.safetensors"))
ITEM = Item("file:1", "file", "1", "1", "a.safetensors", "")
METADATA = {
    "ss_network_dim": "8", "ss_steps": "1200", "ss_unet_lr": "1e-4", "ss_sd_model_name": "v1-5-pruned.safetensors",
    "ss_num_train_images": "30", "ss_tag_frequency": '{"10_sks dog": {"sks dog": 3, "grass": 2}}',
    "ss_dataset_dirs": '{"10_sks dog": {"n_repeats": 10, "img_count": 3}}', "modelspec.trigger_phrase": "sks dog",
    "ss_datasets": '[{"subsets": [{"img_count": 3, "class_tokens": "sks dog", "is_reg": false}]}]',
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 8}',
}  # fmt: skip


def header_seeds() -> list[dict[str, Any]]:
    """Headers of the files that come along, cut to their first tensors, and some of other formats' names."""
    found = []
    for path in CHECKPOINTS:
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        metadata = header.pop("__metadata__", {}) or {}
        found.append({"__metadata__": {**METADATA, **metadata}, **_packed(dict(list(header.items())[:12]))})
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    for names in (
        (f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha", f"{stem}.dora_scale"),
        (f"{stem}.hada_w1_a", f"{stem}.hada_w1_b", f"{stem}.hada_w2_a", f"{stem}.hada_w2_b"),
        (f"{stem}.lokr_w1", f"{stem}.lokr_w2_a", f"{stem}.lokr_w2_b", f"{stem}.lokr_t2"),
        ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "txt_in.weight"),
        ("unet.mid_block.x.lora_A.weight", "unet.mid_block.x.lora_B.weight", "text_encoder.y.lora_A.weight"),
        ("conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"), ("clip_l", "clip_g"),
        ("lora_unet_single_blocks_0_linear1.lora_down.weight", "lora_unet_single_blocks_0_linear1.lora_up.weight"),
        ("diffusion_model.layers.0.attention.qkv.lora_A.weight", "diffusion_model.noise_refiner.0.ff.w1.alpha"),
        ("layers.0.attention.qkv.weight", "layers.0.self_attention.to_q.weight", "txtfusion.projector.weight"),
        ("transformer.transformer_blocks.59.img_mlp.net.0.proj.lora_A.weight", "transformer.x.txt_mod.1.lokr_w1"),
        ("blocks.0.attn.wq.weight", "blocks.0.mod.lin", "blocks.0.self_attn.q.weight", "head.modulation"),
        ("net.blocks.0.adaln_modulation_mlp.1.weight", "net.llm_adapter.embed.weight", "net.pos_embedder.seq"),
        ("lora_unet_llm_adapter_blocks_0_mlp_0.lora_down.weight", "text_conditioner.blocks.0.mlp.0.lora_B.weight"),
    ):  # fmt: skip
        entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
        found.append({"__metadata__": dict(METADATA), **_packed({name: dict(entry) for name in names})})
    return found


def _packed(header: dict[str, Any]) -> dict[str, Any]:
    """``header`` with offsets one after the other."""
    at, found = 0, {}
    for name, entry in header.items():
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        found[name] = {**entry, "data_offsets": [at, at + size]}
        at += size
    return found


class SafetensorsHeaders(Kind):
    """Headers, as a crawl reads them: what they declare, and what is concluded from their metadata."""

    name, share = "safetensors", 365_000

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.texts = [json.dumps(seed) for seed in header_seeds()]
        self.raw = [path.read_bytes() for path in sorted(CORPUS.glob("*.safetensors")) if path.stat().st_size < 1 << 16]
        self.path = place / "a.safetensors"

    def make(self, choose: Random) -> bytes:
        if chance(choose, 0.05):
            return changed_bytes(one_of(self.raw, choose), choose)
        header = json.loads(one_of(self.texts, choose))
        if chance(choose, 0.5):
            self._metadata(header, choose)
        else:
            header = changed_json(header, choose)
        text = as_bytes(header, choose)
        length = len(text) if chance(choose, 0.9) else choose.choice((0, 1, len(text) - 1, len(text) + 1, 1 << 40))
        data = b"\0" * (_end_of(header) if chance(choose, 0.9) else choose.randint(0, 99))
        return struct.pack("<Q", length % 2**64) + text + data

    @staticmethod
    def _metadata(header: dict[str, Any], choose: Random) -> None:
        """Change what the metadata says, also within the JSON that its texts are."""
        metadata = header["__metadata__"]
        name = choose.choice(list(metadata) or ["x"])
        try:
            said = json.loads(metadata[name])
        except (KeyError, ValueError):
            said = None
        if isinstance(said, dict | list):
            metadata[name] = as_bytes(changed_json(said, choose), choose).decode("utf-8", "replace")
        else:
            metadata[name] = choose.choice(TEXTS)

    def check(self, data: bytes) -> None:
        self.path.write_bytes(data)
        header = read_any_header(self.path)
        layout_of(header)
        metadata_json(header.metadata)
        found = conclude(ITEM, header)
        json.dumps(found.claims)
        if len(found.captions) > 100:
            raise FindingError("more captions than are kept")
        if not is_gguf(self.path):
            read_scaling(header.metadata), problems(header.metadata), identifying(header.metadata)
        detect_format(self.path, header)


def _end_of(header: Any) -> int:
    """Where the last tensor ends, up to 64 KiB; what is no number counts as nothing."""
    ends = [0]
    for entry in header.values() if isinstance(header, dict) else ():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(offsets, list) and len(offsets) == 2 and type(offsets[1]) is int:
            ends.append(offsets[1])
    return max(0, min(max(ends), 1 << 16))


class Gguf(Kind):
    """GGUF files with fields of every type."""

    name, share = "gguf", 280_000

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.path = place / "a.gguf"
        self.seeds = [self._seed(place / "seed.gguf", big) for big in (False, True)]
        self.seeds += [path.read_bytes() for path in CORPUS.glob("*.gguf")]

    @staticmethod
    def _seed(path: Path, big: bool) -> bytes:
        from gguf import GGUFEndian, GGUFWriter

        writer = GGUFWriter(path, "flux", endianess=GGUFEndian.BIG if big else GGUFEndian.LITTLE)
        writer.add_uint32("a.number", 3)
        writer.add_float64("a.fraction", 0.5)
        writer.add_bool("a.flag", True)
        writer.add_string("general.name", "a name")
        writer.add_array("a.shape", [1, 2, 3])
        writer.add_array("a.words", ["one", "two"])
        for number in range(3):
            writer.add_tensor(f"double_blocks.{number}.img_attn.qkv.weight", np.ones((4, 8), np.float32))
        for side in ("up", "down"):
            writer.add_tensor(f"lora_unet_single_blocks_0_linear1.lora_{side}.weight", np.ones((4, 4), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()

    def make(self, choose: Random) -> bytes:
        seed = one_of(self.seeds, choose)
        if chance(choose, 0.05):
            return spliced(seed, one_of(self.seeds, choose), choose)
        if chance(choose, 0.6):  # the header is what is read: leave the tensors as they are
            head = choose.randint(24, min(len(seed), 420)) if len(seed) > 24 else len(seed)
            return changed_bytes(seed[:head], choose, 2) + seed[head:]
        return changed_bytes(seed, choose)

    def check(self, data: bytes) -> None:
        self.path.write_bytes(data)
        header = read_any_header(self.path)
        layout_of(header)
        conclude(ITEM, header)
        detect_format(self.path, header)


def picture_seeds() -> dict[str, bytes]:
    """A small picture in every format that Pillow writes here, in the modes that each has."""
    Image.init()
    values = np.arange(24 * 20 * 3, dtype=np.uint32).reshape(20, 24, 3) * 7 % 256
    rgb = Image.fromarray(values.astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    modes = {mode: rgb.convert(mode) for mode in ("1", "L", "P", "RGBA", "LA", "CMYK", "I", "F", "YCbCr")}
    modes |= {"RGB": rgb, "I;16": Image.fromarray((values[:, :, 0] * 257).astype(np.uint16))}
    options: dict[str, list[dict[str, Any]]] = {
        "PNG": [{}, {"exif": exif}, {"save_all": True, "append_images": [rgb.rotate(90)]}],
        "JPEG": [{}, {"progressive": True}, {"exif": exif}, {"icc_profile": b"\0" * 200}],
        "WEBP": [{}, {"lossless": True}, {"save_all": True, "append_images": [rgb.rotate(90)]}],
        "GIF": [{}, {"save_all": True, "append_images": [rgb.rotate(90)]}],
        "TIFF": [{}, *({"compression": kind} for kind in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "group4"))],
    }
    found = {}
    for form in sorted(Image.SAVE):
        if form == "PDF" or (form == "AVIF" and not features.check("avif")):
            continue
        for mode, picture in modes.items():
            for number, option in enumerate(options.get(form, [{}])):
                content = io.BytesIO()
                try:
                    picture.save(content, form, **option)
                except Exception:  # most formats have few modes
                    continue
                if content.getvalue():
                    found[f"{form}-{mode}-{number}"] = content.getvalue()
    return found


def png_with_checksums(data: bytes) -> bytes:
    """``data`` with the checksums of its PNG chunks put right, as far as its lengths lead."""
    found, at = bytearray(data), 8
    while at + 12 <= len(found):
        length = int.from_bytes(found[at : at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(found):
            break
        found[end : end + 4] = zlib.crc32(found[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(found)


class Pictures(Kind):
    """Pictures of every format that Pillow writes here, also of those that are not read."""

    name, share, memory = "pictures", 100_000, 2048
    refusals = (ValueError,)

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        seeds = picture_seeds()
        self.seeds = list(seeds.values())
        self.read = [data for name, data in seeds.items() if name.startswith(_READ)]
        for data in self.read[:1]:
            open_image(data)

    def make(self, choose: Random) -> bytes:
        seed = one_of(self.read if chance(choose, 0.9) else self.seeds, choose)
        if chance(choose, 0.03):
            return spliced(seed, one_of(self.seeds, choose), choose)
        found = changed_bytes(seed, choose, 3)
        return png_with_checksums(found) if found.startswith(b"\x89PNG") and chance(choose, 0.8) else found

    def check(self, data: bytes) -> None:
        picture = open_image(data)
        if picture.mode != "RGB" or min(picture.size) < 1:
            raise FindingError(f"a picture of mode {picture.mode} and size {picture.size}")


_READ = ("AVIF", "BMP", "GIF", "JPEG-", "PNG", "TIFF", "WEBP")


class Archives(Kind):
    """Zip archives of training pictures with captions beside them."""

    name, share, memory = "archives", 9_000, 512

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        seeds = picture_seeds()
        self.pictures = [seeds[name] for name in ("PNG-RGB-0", "JPEG-RGB-0", "GIF-P-0", "WEBP-RGB-0", "BMP-RGB-0")]
        self.files = Files(place)

    def make(self, choose: Random) -> bytes:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for number in range(choose.choice((0, 1, 1, 2, 4))):
                method = choose.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
                picture = one_of(self.pictures, choose)
                if chance(choose, 0.4):
                    picture = changed_bytes(picture, choose)
                stem = (
                    choose.choice(TEXTS)[:200].encode("utf-8", "replace").decode()
                    if chance(choose, 0.2)
                    else str(number)
                )
                name = stem + choose.choice((".png", ".JPG", ".gif", ".webp", ".bmp", ".txt", "/", ".exe"))
                _add(archive, name, picture, method)
                _add(archive, f"{stem}.txt", choose.choice(TEXTS).encode("utf-8", "surrogatepass"), method)
                if chance(choose, 0.02):
                    _add(archive, f"bomb{number}.png", b"\0" * (4 << 20), zipfile.ZIP_DEFLATED)
        data = content.getvalue()
        return changed_bytes(data, choose, 3) if chance(choose, 0.7) else data

    def check(self, data: bytes) -> None:
        self.files.remove_folder("set")
        with io.BytesIO(data) as archive:
            found = unpack(archive, self.files, "set")
        there = {entry.key for entry in self.files.list("", recursive=True)}
        if there != {f"set/{picture['file']}" for picture in found}:
            raise FindingError(f"files outside the set, or missing: {sorted(there)[:5]}")


def _add(archive: zipfile.ZipFile, name: str, data: bytes, method: int) -> None:
    member = zipfile.ZipInfo(name.replace("\0", "") or "x", (2026, 1, 1, 0, 0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name that is there twice is meant
        archive.writestr(member, data, method)


class Inspected(Kind):
    """Whole small weight files, numbers included, as ``lora-audit inspect`` looks at them."""

    name, share, memory = "inspected", 5_000, 512

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        from safetensors.numpy import save

        stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        down, up = np.ones((2, 8), np.float32), np.ones((8, 2), np.float32)
        self.path = place / "a.safetensors"
        self.seeds = [
            save({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
                  f"{stem}.alpha": np.float32([2])}, METADATA),
            save({f"{stem}.hada_w1_a": up, f"{stem}.hada_w1_b": down, f"{stem}.hada_w2_a": up,
                  f"{stem}.hada_w2_b": down}),
            save({f"{stem}.lokr_w1": np.ones((2, 2), np.float32), f"{stem}.lokr_w2": np.ones((4, 4), np.float32)}),
            save({"unet.mid_block.x.to_q.lora_A.weight": down, "unet.mid_block.x.to_q.lora_B.weight": up}, METADATA),
            save({"emb_params": np.ones((2, 768), np.float32)}),
            save({"diffusion_model.llm_adapter.blocks.0.mlp.0.lora_A.weight": down,
                  "diffusion_model.llm_adapter.blocks.0.mlp.0.lora_B.weight": up}),
            save({f"net.blocks.0.adaln_modulation_mlp.{number}.weight": up for number in (1, 2)}),
            save({"layers.0.attention.qkv.weight": up, "layers.0.attention.out.weight": down}),
            save({f"{stem}.oft_blocks": np.zeros((2, 4, 4), np.float32), f"{stem}.alpha": np.float32([1])}),
        ]  # fmt: skip

    def make(self, choose: Random) -> bytes:
        seed = one_of(self.seeds, choose)
        length = int.from_bytes(seed[:8], "little")
        header, data = json.loads(seed[8 : 8 + length]), seed[8 + length :]
        if chance(choose, 0.5):
            data = changed_bytes(data, choose, 2)[: len(data)].ljust(len(data), b"\xff")
        if chance(choose, 0.6):
            self._shape(header, choose)
        text = as_bytes(header)
        return struct.pack("<Q", len(text)) + text + data

    @staticmethod
    def _shape(header: dict[str, Any], choose: Random) -> None:
        """Another shape or precision of as many bytes."""
        name = choose.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        kind, width = choose.choice((("F32", 4), ("F16", 2), ("BF16", 2), ("I8", 1), ("F8_E4M3", 1), ("F64", 8)))
        count = size // width
        shapes = ([count], [1, count], [count, 1], [count, 1, 1, 1], [], [0, count], [1] * 7 + [count])
        entry["dtype"], entry["shape"] = kind, choose.choice(shapes)

    def check(self, data: bytes) -> None:
        from audit.errors import CheckpointError
        from audit.models.inspect import as_json, inspect

        self.path.write_bytes(data)
        found = inspect(self.path)
        json.dumps(as_json(found))
        if found.problem is not None:
            raise CheckpointError(found.problem)
