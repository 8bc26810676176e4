"""Sketches: re-saves of one adapter are near to each other, others are not; strangers' files cost no crash."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from audit.cli import app
from audit.errors import CheckpointError
from audit.models.checkpoint import Checkpoint, open_checkpoint
from audit.models.formats.names import read_names
from audit.models.formats.tensors import Tensors
from audit.models.safetensors_header import Header
from audit.models.sketches.reader import Reader
from audit.models.sketches.sketch import KIND, NEAR, SIZE, Sketch, sketch_of
from audit.similar import Attempt, attempt, make_up, nearest, row_of
from audit.untrusted.pool import RefusedError
from audit.workspace import Workspace
from crawlers.catalog import Catalog
from testbed.resaved import mixed, pruned, read_kohya, scaled, write_kohya
from tests.conftest import DREAMBOOTH, KOHYA, PEFT


def of(path: Path) -> Sketch:
    found = sketch_of(open_checkpoint(path).files.values())
    assert found is not None
    assert (found.vector.dtype, found.vector.shape) == (np.float32, (SIZE,))
    return found


def cosine(one: Sketch, other: Sketch) -> float:
    return float(one.vector @ other.vector)


@pytest.fixture(scope="module")
def original() -> Sketch:
    return of(KOHYA)


def test_the_cosine_is_that_of_the_changes(tmp_path: Path, original: Sketch) -> None:
    factors = read_kohya(KOHYA)
    small = pruned(factors, 8)
    whole, part = (
        torch.cat([(up.flatten(1) @ down.flatten(1)).flatten() for up, down in some.values()])
        for some in (factors, small)
    )
    wanted = float(whole @ part / whole.norm() / part.norm())
    found = cosine(original, of(write_kohya(small, tmp_path / "small.safetensors")))
    assert found == pytest.approx(wanted, abs=3 * (1 - wanted**2) / SIZE**0.5)
    assert original.norm == pytest.approx(float(whole.norm()), rel=0.2)
    assert (original.modules, original.left_out) == (len(factors), 0)


def test_re_saves_are_near(tmp_path: Path, original: Sketch) -> None:
    factors, path = read_kohya(KOHYA), tmp_path / "f.safetensors"
    assert cosine(original, of(write_kohya(factors, path, torch.float32))) > 0.99999
    assert cosine(original, of(write_kohya(factors, path, torch.bfloat16))) > 0.9999
    assert cosine(original, of(write_kohya(factors, path, alpha=1.0))) > 0.9999
    strong = of(write_kohya(scaled(factors, 0.5), path))
    assert cosine(original, strong) > 0.9999
    assert strong.norm == pytest.approx(original.norm / 2, rel=1e-2)
    assert cosine(original, of(write_kohya(pruned(factors, 12), path))) > NEAR
    another = {stem: (torch.randn_like(up) * up.std(), down) for stem, (up, down) in factors.items()}
    assert NEAR < cosine(original, of(write_kohya(mixed(factors, another, 0.2), path))) < 0.999


def test_the_spelling_of_names_does_not_matter(tmp_path: Path, original: Sketch) -> None:
    state = {}
    for name, tensor in load_file(KOHYA).items():
        stem, _, rest = name.partition(".")
        side = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}.get(rest)
        if side:
            state[f"unet.{stem.removeprefix('lora_unet_').replace('_', '.')}.{side}"] = tensor.contiguous()
    save_file(state, tmp_path / "peft.safetensors")
    assert cosine(original, of(tmp_path / "peft.safetensors")) > 0.99999


def test_other_adapters_are_not_near(tmp_path: Path, original: Sketch) -> None:
    assert abs(cosine(original, of(PEFT))) < 0.4
    factors = read_kohya(KOHYA)
    generator = torch.Generator().manual_seed(0)
    other = {s: (torch.randn(up.shape, generator=generator), down) for s, (up, down) in factors.items()}
    assert abs(cosine(original, of(write_kohya(other, tmp_path / "f.safetensors")))) < 0.4


@pytest.mark.parametrize("kind", ["loha", "lokr", "diff"])
def test_other_algorithms(tmp_path: Path, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    parts = {
        "loha": {"hada_w1_a": noise(8, 2), "hada_w1_b": noise(2, 12), "hada_w2_a": noise(8, 2),
                 "hada_w2_b": noise(2, 12), "alpha": torch.tensor(1.0)},
        "lokr": {"lokr_w1": noise(2, 3), "lokr_w2_a": noise(4, 2), "lokr_w2_b": noise(2, 4)},
        "diff": {"diff": noise(8, 12)},
    }  # fmt: skip
    whole = {
        "loha": lambda p: (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]),
        "lokr": lambda p: torch.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"]),
        "diff": lambda p: p["diff"],
    }  # fmt: skip
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file({f"{stem}.{name}": tensor for name, tensor in parts[kind].items()}, tmp_path / "a.safetensors")
    u, s, v = torch.linalg.svd(whole[kind](parts[kind]), full_matrices=False)
    write_kohya({stem: (u * s, v)}, tmp_path / "b.safetensors", torch.float32)
    assert cosine(of(tmp_path / "a.safetensors"), of(tmp_path / "b.safetensors")) > 0.9999


def test_types_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        save_file({"a.lora_A.weight": values.to(dtype), "pad": torch.ones(1)}, tmp_path / "f.safetensors")
        ((_, header),) = files = open_checkpoint(tmp_path / "f.safetensors").files.values()
        with Tensors(list(files)) as tensors:
            wanted = tensors.get("a.lora_A.weight").numpy()
        found = Reader(tmp_path / "f.safetensors", header).get("a.lora_A.weight")
        assert found is not None
        assert np.array_equal(found, wanted)


def test_what_has_none(tmp_path: Path) -> None:
    assert sketch_of(open_checkpoint(DREAMBOOTH).files.values()) is None
    zero = {"lora_unet_x.lora_up.weight": torch.zeros(4, 2), "lora_unet_x.lora_down.weight": torch.ones(2, 4)}
    save_file(zero, tmp_path / "zero.safetensors")
    assert sketch_of(open_checkpoint(tmp_path / "zero.safetensors").files.values()) is None
    broken = {**zero, "lora_unet_x.lora_up.weight": torch.full((4, 2), float("nan"))}
    save_file(broken, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        sketch_of(open_checkpoint(tmp_path / "nan.safetensors").files.values())
    save_file({**zero, "lora_unet_x.lora_up.weight": torch.ones(4, 3)}, tmp_path / "unfit.safetensors")
    with pytest.raises(ValueError, match="do not fit"):
        sketch_of(open_checkpoint(tmp_path / "unfit.safetensors").files.values())
    assert not read_names({}).groups


def test_the_look_up_from_crawl_to_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    factors = read_kohya(KOHYA)
    write_kohya(factors, uploads / "again.safetensors", torch.bfloat16)
    write_kohya(
        {stem: (up.flip(0), down.flip(0)) for stem, (up, down) in factors.items()}, uploads / "other.safetensors"
    )
    (uploads / "again.safetensors.json").write_text('{"uploader": "ann"}')
    where = ("--workspace", str(tmp_path / "w"))
    runner = CliRunner()
    crawled = runner.invoke(app, ["crawl", "folder", str(uploads), "--settle", "0", *where])
    assert crawled.exit_code == 0, crawled.output
    workspace = Workspace(tmp_path / "w")
    assert len(workspace.rows("SELECT * FROM sketches")) == 2
    assert make_up(workspace) == 0
    found = json.loads(runner.invoke(app, ["similar", str(KOHYA), "--json", *where]).stdout)
    assert [(one["name"], one["cosine"] > 0.999) for one in found["near"]] == [("again.safetensors", True)]
    item = found["near"][0]["item_ids"][0]
    assert json.loads(runner.invoke(app, ["similar", item, "--json", *where]).stdout)["near"] == []
    write_kohya(factors, uploads / "third.safetensors", torch.float32)
    runner.invoke(app, ["crawl", "folder", str(uploads), "--settle", "0", *where])
    listed = json.loads(runner.invoke(app, ["catalog", "--near", "--json", *where]).stdout)
    assert {row["name"]: [one["name"] for one in row["near"]] for row in listed} == {
        "again.safetensors": ["third.safetensors"], "third.safetensors": ["again.safetensors"], "other.safetensors": [],
    }  # fmt: skip
    text = runner.invoke(app, ["catalog", "--near", *where], env={"COLUMNS": "400"}).output
    assert "cosine 1.000" in text
    assert "again.safetensors" in runner.invoke(app, ["similar", str(KOHYA), *where], env={"COLUMNS": "200"}).output
    # what was stored without a sketch gets one, and what opted out leaves none
    workspace.erase("identity", found["near"][0]["identity"], "sketches")
    assert make_up(Workspace(tmp_path / "w")) == 1
    workspace.erase("identity", found["near"][0]["identity"], "sketches")

    def opened_while_opted_out(path: Path) -> Checkpoint:
        found = open_checkpoint(path)
        (tmp_path / "w" / "opt-out.txt").write_text("folder:user:ann\n")
        runner.invoke(app, ["crawl", "folder", str(uploads), "--settle", "0", *where])
        return found

    monkeypatch.setattr("audit.models.checkpoint.open_checkpoint", opened_while_opted_out)
    make_up(Workspace(tmp_path / "w"))
    left = Workspace(tmp_path / "w").rows("SELECT identity FROM sketches")
    assert found["near"][0]["identity"] not in [one["identity"] for one in left]
    assert len(left) == 2


def test_what_nobody_foresaw_costs_one_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        path = tmp_path / "uploads" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        write_kohya(read_kohya(KOHYA), path, torch.float32 if name == "a" else torch.float16)
    where = ["--workspace", str(tmp_path / "w")]
    CliRunner().invoke(app, ["crawl", "folder", str(path.parent), "--settle", "0", *where])
    workspace = Workspace(tmp_path / "w")
    for row in workspace.rows("SELECT identity FROM sketches"):
        workspace.erase("identity", row["identity"], "sketches")
    broken: list[Path] = []

    def unforeseen(path: Path) -> Checkpoint:
        if not broken:
            broken.append(path)
            raise RecursionError("nobody foresaw it")
        return open_checkpoint(path)

    monkeypatch.setattr("audit.models.checkpoint.open_checkpoint", unforeseen)
    assert make_up(workspace) == 2
    assert [row["n"] for row in workspace.rows("SELECT count(sketch) AS n FROM sketches")] == [1]


def uploads(folder: Path) -> list[str]:
    """A folder with one LoRA, which Ann uploaded, and how to crawl it."""
    folder.mkdir()
    write_kohya(read_kohya(KOHYA), folder / "a.safetensors")
    (folder / "a.safetensors.json").write_text('{"uploader": "ann"}')
    return ["crawl", "folder", str(folder), "--settle", "0", "--workspace", str(folder.parent / "w")]


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError(errno.ENOMEM, "no room")])
def test_what_failed_for_want_of_memory_is_tried_again_and_else_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(files: object) -> Sketch:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("audit.similar.sketch_of", failing)
        assert CliRunner().invoke(app, uploads(tmp_path / "uploads")).exit_code == 0
        workspace = Workspace(tmp_path / "w")
        assert workspace.rows("SELECT * FROM sketches") == []
        assert make_up(workspace) == 0
    assert make_up(workspace) == 1
    assert [row["modules"] > 0 for row in workspace.rows("SELECT modules FROM sketches")] == [True]


def test_whose_fault_a_failure_was() -> None:
    def after(cause: Exception) -> CheckpointError:
        error = CheckpointError("f is refused")
        error.__cause__ = cause
        return error

    late = (TimeoutError(), after(RefusedError("it takes more than 60 s", by_child=False)))
    for error in late:
        assert attempt(raising(error), "f") == Attempt(None, later=True)
    for error in (ValueError("no"), KeyError("no"), after(RefusedError("damaged", by_child=True)), OSError("gone")):
        assert attempt(raising(error), "f") == Attempt(None)


def raising(error: Exception) -> Iterator[tuple[Path, Header]]:
    yield from ()
    raise error


def test_an_older_kind_is_made_again(tmp_path: Path, original: Sketch) -> None:
    crawl = uploads(tmp_path / "uploads")
    CliRunner().invoke(app, crawl)
    workspace = Workspace(tmp_path / "w")
    [row] = workspace.rows("SELECT * FROM sketches")
    assert row["kind"] == KIND
    workspace.erase("identity", row["identity"], "sketches")
    workspace.append("sketches", [row | {"kind": "signs-1"}])
    assert nearest(workspace, original.vector.tolist()) == []
    assert make_up(workspace) == 1
    assert [one.name for one in nearest(workspace, original.vector.tolist())] == ["a.safetensors"]
    assert make_up(workspace) == 0


def test_rows_without_a_sketch_are_never_near(workspace: Workspace, original: Sketch) -> None:
    workspace.append("sketches", [row_of("1" * 64, None)])
    assert nearest(workspace, original.vector.tolist(), -1.0) == []
    assert Catalog(workspace).known([]) == {}
