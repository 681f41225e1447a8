"The ledger takes the newest finished run and nothing else, and says what it left out."
import json
from pathlib import Path

import pandas as pd
import pytest

from clinllm.core.tables import Estimate, claim
from clinllm.governance.ledger import anchor, newest_runs, read_ledger, read_runs, run_link, run_notes, show_ledger, write_run

EVIDENCE = claim("clinical accuracy", "auroc", "lora", Estimate(.74, .69, .79, 400), cell="Discrimination")


def test_no_reports_folder_gives_an_empty_ledger(tmp_path):
    assert read_ledger(tmp_path / "none").empty and read_runs(tmp_path / "none").empty and run_notes(read_runs(tmp_path)) == []


def test_newest_is_by_time_finished_and_not_by_name(tmp_path):
    write_run(tmp_path, "e", "zzz", EVIDENCE, finished="2026-01-01T00:00:00+00:00")
    write_run(tmp_path, "e", "aaa", EVIDENCE, finished="2026-01-01T01:30:00+02:00")     # 23:30 UTC of the day before
    assert newest_runs(read_runs(tmp_path))["run_id"].tolist() == ["zzz"]


def test_each_source_has_its_own_newest(tmp_path):
    write_run(tmp_path, "e", "one", EVIDENCE); write_run(tmp_path, "e", "two", EVIDENCE, source="ours", kind="real")
    assert set(read_ledger(tmp_path)["kind"]) == {"synthetic", "real"}


@pytest.mark.parametrize("breakage", [b"", b"{", b"[]", b'{"run_id": "x"}', b"\xff\xfe", b"null"])
def test_a_damaged_manifest_is_named_and_not_fatal(tmp_path, breakage):
    write_run(tmp_path, "e", "good", EVIDENCE)
    (write_run(tmp_path, "e", "bad", EVIDENCE) / "manifest.json").write_bytes(breakage)
    assert read_ledger(tmp_path)["run_id"].tolist() == ["good"]
    assert "e/bad" in run_notes(read_runs(tmp_path))[0]


def test_wrong_types_in_a_manifest_are_damage(tmp_path):
    folder = write_run(tmp_path, "e", "bad", EVIDENCE); m = json.loads((folder / "manifest.json").read_text())
    for key, value in (("data", "synthetic"), ("finished", "yesterday-ish"), ("data", {"source": "x"})):
        (folder / "manifest.json").write_text(json.dumps(m | {key: value}))
        assert read_runs(tmp_path)["status"].tolist() == ["damaged"]


def test_drafts_hidden_folders_and_the_site_are_no_runs(tmp_path):
    for where in ("e/draft", "e/.tmp-1", ".site-1/stage", "site/runs"):
        Path(tmp_path, where).mkdir(parents=True)
    assert read_runs(tmp_path).empty


def test_the_run_id_is_that_of_the_folder_and_not_of_the_table(tmp_path):
    wrong = EVIDENCE.frame.assign(run_id="somebody else's")
    write_run(tmp_path, "e", "mine", type(EVIDENCE)(wrong))
    assert read_ledger(tmp_path)["run_id"].tolist() == ["mine"]


@pytest.mark.parametrize("heading", ["Does fusion beat both parts?", "What came out", "The 2nd test: AUROC & more", "Zero-shot", "3. Limits", "Über-test"])
def test_anchors_are_those_of_the_renderer(heading):
    from smalldocs.markdown import pandoc_id
    assert anchor(heading) == pandoc_id(heading)


def test_links_on_the_site_and_in_jupyterlab(tmp_path, monkeypatch):
    write_run(tmp_path, "e", "abc", EVIDENCE); row = read_ledger(tmp_path).iloc[0]
    monkeypatch.delenv("CLINLLM_SITE", raising=False)
    assert run_link(row, 1, "What came out") == "../../reports/e/abc/notebook.ipynb#what-came-out"
    monkeypatch.setenv("CLINLLM_SITE", "1")
    assert run_link(row, 1, "What came out") == "../runs/e/abc.html#what-came-out" and run_link(row, 0) == "runs/e/abc.html"


def test_the_table_escapes_what_it_shows(tmp_path):
    write_run(tmp_path, "e", "abc", claim("fairness", "auroc", "<script>x</script>", .5, n=3, cell="<b>"))
    shown = show_ledger(read_ledger(tmp_path)).data
    assert "<script>" not in shown and "<b>" not in shown


def test_an_empty_evidence_table_is_a_run_without_claims(tmp_path):
    write_run(tmp_path, "e", "abc", type(EVIDENCE)(pd.DataFrame()))
    assert read_runs(tmp_path)["status"].tolist() == ["ok"] and read_ledger(tmp_path).empty
