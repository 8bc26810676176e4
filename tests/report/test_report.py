"""The page is safe, self-contained and says what the tables say."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
from PIL import Image

from audit.config import Rule, Settings, VerdictSettings
from audit.descriptors.base import to_png
from audit.errors import WorkspaceError
from audit.report import collect
from audit.report.page import render
from audit.workspace import Workspace

HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}"
ID = "ab" * 16
RED = to_png(Image.new("RGB", (8, 8), "red"))


def fill(workspace: Workspace, is_match: bool, image: bytes | None = RED) -> None:
    now = datetime.now(UTC)
    checkpoint = {"checkpoint_sha256": "c" * 64, "tensors_sha256": "d" * 64, "name": HOSTILE, "format": "lora-kohya",
                  "bytes": 123456, "claimed_metadata": json.dumps({HOSTILE: HOSTILE}), "seen_at": now}  # fmt: skip
    audit = {
        "audit_id": ID, "checkpoint_sha256": "c" * 64, "tensors_sha256": "d" * 64, "checkpoint_name": HOSTILE,
        "base_name": HOSTILE, "base_revision": "e" * 64, "settings": json.dumps(Settings().as_dict()),
        "training_images": 10, "training_images_source": "user", "images": 500, "evaluations": 50000,
        "weight_change": 0.1, "prediction_change": 0.2, "descriptor": "nano@1", "threshold": 0.7,
        "warnings": [HOSTILE], "seconds_sampling": 1.0, "seconds_total": 2.0, "device": "cpu",
        "versions": json.dumps({"torch": "2"}), "finished_at": now,
        "captions": [{"caption": HOSTILE, "source": "user", "truncated": True, "images": 500}],
    }  # fmt: skip
    extraction = {"audit_id": ID, "rank": 1, "index": 0, "confidence": 0.8, "size": 12, "tightness": 0.9,
                  "members": [0], "descriptor": [1.0, 0.0], "image": image}  # fmt: skip
    match = {"audit_id": ID, "rank": 1, "reference_set": "mine", "reference_id": "f" * 64, "position": 1,
             "similarity": 0.91, "pdq_distance": 12, "is_match": is_match, "evidence": "both",
             "verdict": "match" if is_match else "none"}  # fmt: skip
    reference = {"reference_set": "mine", "reference_id": "f" * 64, "name": HOSTILE, "descriptor_name": "nano@1",
                 "descriptor": [1.0, 0.0], "thumbnail": image, "added_at": now}  # fmt: skip
    for table, row in (
        ("checkpoints", checkpoint), ("audits", audit), ("extractions", extraction), ("matches", match),
        ("references", reference),
    ):  # fmt: skip
        workspace.write(table, "k", [row])


FIXED = VerdictSettings(Rule.fixed)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def tags_of(html: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(html)
    return parser.found


def test_nothing_from_outside_becomes_markup(workspace: Workspace) -> None:
    fill(workspace, True)
    html = render(collect(workspace, ID))
    assert "script" not in {tag for tag, _ in tags_of(html)}
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert(1)") >= 6
    assert "{{7*7}}" in html  # not evaluated as a template either


def test_the_page_loads_nothing(workspace: Workspace) -> None:
    fill(workspace, True)
    html = render(collect(workspace, ID))
    links = [v for _, a in tags_of(html) for k, v in a.items() if k in ("src", "href", "action") and v]
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "default-src 'none'" in html
    assert not re.search(r"url\(|@import", html)


@pytest.mark.parametrize(
    ("is_match", "words"),
    [
        (True, "1 of your 1 reference picture was recovered from this model, by a fixed threshold"),
        (False, "None of your 1 reference picture is a match"),
    ],
)
def test_by_the_fixed_rule_the_verdict_follows_the_threshold(workspace: Workspace, is_match: bool, words: str) -> None:
    fill(workspace, is_match)
    facts = collect(workspace, ID, asked=FIXED)
    page = " ".join(render(facts).split())
    assert words in page
    assert "judged by <bdi>nano@1, a descriptor of the user&#39;s choice</bdi>" in page
    assert "How often this rule is wrong is not known" in page
    assert len(facts.verdict.matched) == is_match
    assert len(facts.as_json()["matched_references"]) == is_match


def test_without_stored_pictures_the_page_has_none(workspace: Workspace) -> None:
    fill(workspace, True, image=None)
    html = render(collect(workspace, ID))
    assert "img" not in {tag for tag, _ in tags_of(html)}
    assert "hashes only" in html


def test_json_is_json_and_holds_no_pixels(workspace: Workspace) -> None:
    fill(workspace, True)
    text = json.dumps(collect(workspace, ID).as_json())
    found = json.loads(text)
    assert found["extractions"][0]["matches"][0]["similarity"] == 0.91
    assert found["audit"]["settings"]["w"] == Settings().w
    assert "thumbnail" not in text


def test_a_removed_reference_set_still_leaves_a_readable_report(workspace: Workspace) -> None:
    fill(workspace, True)
    workspace.remove("references", "k")
    assert "removed from the workspace" in render(collect(workspace, ID))


def test_what_the_base_alone_draws_as_well_is_shown_beside_it_and_is_no_match(workspace: Workspace) -> None:
    fill(workspace, is_match=False)
    [match] = workspace.rows("SELECT * FROM matches")
    workspace.write("matches", "k", [{**match, "control_similarity": 0.83}])
    of = {"audit_id": ID, "reference_set": "mine", "reference_id": "f" * 64}
    workspace.write("chances", "k", [{**of, "similarity": 0.91, "control_similarity": 0.83, "control_index": 4}])
    drawn = {"audit_id": ID, "index": 4, "caption": HOSTILE, "image": RED}
    workspace.write("control_generations", ID, [drawn, {**drawn, "index": 5, "image": None}])
    facts = collect(workspace, ID, asked=FIXED)
    page = render(facts)
    assert (facts.verdict.said, len(facts.verdict.common), facts.control_generations) == ("none", 1, 2)
    assert "1 of your 1 reference picture came out, and the base model alone" in page
    assert "What the base alone draws as well" in page
    assert "similarity by the base alone <b>0.83</b>, by the fine-tuned model 0.91" in page
    assert "<script" not in page
    assert facts.as_json()["common_references"][0]["control_similarity"] == 0.83
    assert "none: whether the base alone draws the references as well is not known" not in page
    workspace.remove("control_generations", ID)
    assert "none: whether the base alone draws the references as well is not known" in render(collect(workspace, ID))


def test_audits_are_found_by_the_beginning_of_their_id(workspace: Workspace) -> None:
    fill(workspace, True)
    assert collect(workspace, "abab").row["audit_id"] == ID
    with pytest.raises(WorkspaceError, match="no finished audit"):
        collect(workspace, "ff")


def test_the_page_says_what_was_used_and_what_its_figures_mean(workspace: Workspace) -> None:
    fill(workspace, True)
    workspace.write(
        "generations", "k", [{"audit_id": ID, "index": number, "seed": number, "w": 3.456} for number in range(3)]
    )
    [audit] = workspace.rows("SELECT * FROM audits")
    workspace.write("audits", "k", [audit | {"precision": "bf16"}])
    facts = collect(workspace, ID)
    assert facts.guidance_weights == facts.as_json()["guidance_weights"] == [3.456]
    text = " ".join(re.sub(r"<[^>]+>", " ", render(facts)).split())
    assert "guidance weight used 3.46 (auto" in text
    assert "precision used bf16" in text
    assert " w auto " in text
    assert "None" not in text
    for words in ("Change of the predictions: how far", "Confidence From 0 to 1", "Rank Extraction 1 is"):
        assert words in text


def test_direct_sampling_has_no_guidance_weight(workspace: Workspace) -> None:
    fill(workspace, True)
    [audit] = workspace.rows("SELECT * FROM audits")
    direct = json.dumps(Settings().as_dict() | {"method": "direct"})
    workspace.write("audits", "k", [audit | {"settings": direct}])
    assert "<td>none: direct sampling</td>" in render(collect(workspace, ID))


def test_alternative_texts_say_what_is_seen(workspace: Workspace) -> None:
    fill(workspace, True)
    html = render(collect(workspace, ID, asked=FIXED))
    drawn, reference = [a["alt"] or "" for tag, a in tags_of(html) if tag == "img"]
    assert drawn.startswith("Picture drawn from the model: extraction 1, for 12 drawn pictures alike; it matches the ")
    assert drawn.endswith(f"reference {HOSTILE}")
    assert reference == f"Reference picture {HOSTILE} of the set mine, at similarity 0.91 to extraction 1"


def test_print_cuts_no_card_and_leaves_out_no_claim(workspace: Workspace) -> None:
    fill(workspace, True)
    style = render(collect(workspace, ID)).partition("@media print")[2].partition("</style>")[0]
    assert re.search(r"\.pair,[^{]*\{ break-inside: avoid", style)
    assert "details::details-content { content-visibility: visible" in style
