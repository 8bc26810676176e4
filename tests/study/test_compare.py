"""Tables compare audits that differ in nothing else, and stand beside what the paper says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from audit.study.compare import alike_but, at_usual
from audit.study.factors import AuditFactors, TrainingFactors
from audit.study.paper import markdown, tables_of
from audit.study.results import COSTS, FIGURES, gains_table

VARIED = ["method", "steps", "rank", "augmentation", "extraction", "w", "k"]


def cell(few_shot: str, value: float, **said: Any) -> dict[str, Any]:
    training = TrainingFactors.of({name: said[name] for name in said if name in TrainingFactors().as_dict()})
    audit = AuditFactors.of({name: said[name] for name in said if name in AuditFactors().as_dict()})
    figures = dict.fromkeys([*FIGURES, *COSTS, "extraction_rate_07"], value)
    return {"few_shot": few_shot, **training.as_dict(), **audit.as_dict(), **figures, "references": None}


def one_at_a_time() -> list[dict[str, Any]]:
    """Two sets under a reference, and one factor after the other beside it; DreamBooth by other steps."""
    rows = []
    for add, name in enumerate("ab"):
        more = 0.1 * add
        for number, extraction in enumerate(("direct", "cfg", "model-guidance")):
            rows.append(cell(name, 0.2 + 0.1 * number + more, extraction=extraction, steps=30))
            rows.append(cell(name, 0.1 * number, extraction=extraction, steps=20, method="dreambooth"))
        rows += [cell(name, 0.6 + more, steps=30, w=w) for w in (3.0, 5.0)]
        rows += [cell(name, 0.0, steps=30, augmentation="cutout"), cell(name, 0.9, steps=60)]
        rows += [cell(name, 0.3, steps=30, rank=4), cell(name, 0.25, steps=20, method="dreambooth", k=-0.02)]
    return rows


def test_what_differs_in_something_else_is_not_compared() -> None:
    rows = one_at_a_time()
    plain = at_usual(rows, [name for name in VARIED if name not in ("method", "extraction")])
    assert len(plain) == 12
    assert {(row["method"], row["steps"]) for row in plain} == {("lora", 30), ("dreambooth", 20)}
    assert {row["k"] for row in plain if row["method"] == "dreambooth"} == {None, 0.0}
    by_w = alike_but(rows, "w", VARIED)
    assert sorted({(row["w"] or 0, row["extraction"], row["steps"]) for row in by_w}) == [
        (w, "model-guidance", 30) for w in (0, 3.0, 5.0)
    ]
    assert len(by_w) == 6
    assert {row["method"] for row in alike_but(rows, "k", VARIED)} == {"dreambooth"}
    assert sorted(row["steps"] for row in alike_but(rows, "steps", VARIED)) == [30, 30, 60, 60]
    assert alike_but(rows, "images", VARIED) == []
    crossed = [cell("a", 0.1, steps=s, rank=r) for s in (1, 2) for r in (4, 8)]
    assert alike_but(crossed, "steps", ["steps", "rank"]) == crossed
    assert at_usual(crossed, ["steps", "rank"]) == crossed


def test_what_is_defended_is_in_no_main_table_however_often_it_is() -> None:
    rows = [cell("a", 0.1, defence="dp-sgd", noise_multiplier=noise, captions="trigger") for noise in (0.1, 1.0)]
    plain = cell("a", 0.5)
    assert at_usual([*rows, plain], ["defence", "noise_multiplier", "captions"]) == [plain]
    assert at_usual(rows, ["defence", "captions"]) == rows


def test_the_papers_tables_have_what_it_says_beside_them(tmp_path: Path) -> None:
    rows = one_at_a_time()
    tables = {one.name: one for one in tables_of(rows, VARIED)}
    assert [line[:4] for line in tables["methods"].rows][3:] == [
        ["lora", "direct", "2", "2"], ["lora", "cfg", "2", "2"], ["lora", "model-guidance", "2", "2"],
    ]  # fmt: skip
    assert tables["methods"].rows[3][4].startswith("0.25 ")
    weights = tables["by-w"]
    assert weights.head[-1] == "the paper"
    assert [(line[2], line[-1]) for line in weights.rows] == [("3", ""), ("5", "its setting"), ("auto", "")]
    assert [(line[2], line[-1]) for line in tables["by-k"].rows] == [("-0.02", "its setting"), ("0", "")]
    assert [line[-1] for line in tables["by-augmentation"].rows] == ["", "weaker, and the pictures ruined"]
    names = list(rows[0])
    file = tmp_path / "study.json"
    file.write_text(
        json.dumps({"study": "s", "varied": VARIED, "columns": {name: [row[name] for row in rows] for name in names}})
    )
    text = markdown(file)
    assert text.count("**") == 2 * len(tables)
    assert "| lora | model-guidance | 5 | 2 | 2 |" in text


def test_gains_are_paired_by_set() -> None:
    rows = [row for row in one_at_a_time() if row["method"] == "lora" and row["steps"] == 30]
    plain = at_usual(rows, [name for name in VARIED if name != "extraction"])
    found = gains_table(plain)
    assert found is not None
    assert [line[:4] for line in found.rows] == [
        ["lora", "direct", "2", "+0.20 (+0.20 to +0.20)"], ["lora", "cfg", "2", "+0.10 (+0.10 to +0.10)"],
    ]  # fmt: skip
    assert [line[5] for line in found.rows] == ["1.8", "1.3"]
    assert gains_table([row for row in plain if row["extraction"] != "model-guidance"]) is None
