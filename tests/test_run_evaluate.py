"A file of predictions made elsewhere becomes a report; what cannot be read is refused with the rule, and nothing is left behind."
import os, shutil
import numpy as np, pandas as pd, pytest
from sklearn.metrics import roc_auc_score
from clinllm.core.errors import ClinllmError, DataError, ParameterError
from clinllm.core.settings import load_settings
from clinllm.core.tables import Evidence
from clinllm.evaluation.reading import read_predictions, read_source
from clinllm.run.runner import make_plan

GOOD = pd.DataFrame(dict(patient_id=["a", "a", "b", "c"], outcome=[0, 1, 0, 1], score=[.1, .9, .2, .7], sex=["Female", "Female", "Male", ""]))

def refused(tmp_path, f, match, **options):
    path = tmp_path / "table.csv"; f.to_csv(path, index=False)
    with pytest.raises(ClinllmError, match=match) as e: read_predictions(path, **options)
    assert "secret" not in str(e.value)

def test_what_cannot_be_read_is_refused_without_values(tmp_path):
    refused(tmp_path, GOOD.assign(score=[.1, 9, .2, .7]), r"\[0, 1\]")
    refused(tmp_path, GOOD.assign(outcome=[0, 2, 0, 1]), "must be 0 or 1")
    refused(tmp_path, GOOD.assign(outcome=["secret", 1, 0, 1]), "1 of 4 rows hold something else")
    refused(tmp_path, GOOD.drop(columns="patient_id"), "no column 'subject_id'")
    refused(tmp_path, GOOD.drop(columns="outcome"), "neither a column 'label'")
    refused(tmp_path, GOOD.drop(columns="score"), "no answer")
    refused(tmp_path, GOOD.assign(patient_id=["a", None, "b", "c"]), "missing in 1 of 4 rows")
    refused(tmp_path, GOOD.assign(prediction_time="2024-01-01"), "must be unique")          # two rows of one patient at one time
    refused(tmp_path, GOOD.assign(prediction_time=["2024-01-01", "secret", "2024-01-01", "2024-01-01"]), "1 of 4 rows")
    refused(tmp_path, GOOD.assign(weight=[1, 0, 1, 1]), "weight must be above 0")
    refused(tmp_path, GOOD.assign(risk=.5), "2 columns that may be y_prob")
    refused(tmp_path, GOOD[:0], "no rows")
    refused(tmp_path, GOOD, "unknown column", columns={"y_prob": "scores"})
    with pytest.raises(DataError, match="must end in"): read_predictions(shutil.copy(tmp_path / "table.csv", tmp_path / "table.xlsx"))
    (tmp_path / "table.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot be read"): read_predictions(tmp_path / "table.parquet")

def test_csv_tsv_and_parquet_say_the_same(tmp_path):
    GOOD.to_csv(tmp_path / "t.csv", index=False); GOOD.to_csv(tmp_path / "t.tsv", index=False, sep="\t"); GOOD.replace("", None).to_parquet(tmp_path / "t.parquet")
    a, b, c = (read_predictions(tmp_path / f"t.{k}").frame for k in ("csv", "tsv", "parquet"))
    for other in (b, c): pd.testing.assert_frame_equal(a[["subject_id", "label", "y_prob", "status"]], other[["subject_id", "label", "y_prob", "status"]], check_dtype=False)
    assert a["subject_id"].tolist() == ["a", "a", "b", "c"] and a["sex"].isna().sum() == 1

@pytest.fixture
def name(root):
    name = f"test-table-{os.getpid()}"; yield name
    shutil.rmtree(root / "data" / name, ignore_errors=True)

def test_a_file_becomes_a_report(root, tmp_path, name, monkeypatch):
    from clinllm.run.evaluate import evaluate_file
    monkeypatch.setenv("CLINLLM_REPORTS", str(tmp_path / "reports")); settings = load_settings()
    rng = np.random.default_rng(0); y = (np.arange(160) % 3 == 0).astype(int); p = np.clip(.3 + .3 * y + rng.normal(0, .15, 160), .01, .99)
    f = pd.DataFrame(dict(patient_id=range(160), outcome=y, score=p, sex=rng.choice(["Female", "Male"], 160))); f.loc[:4, "score"] = np.nan
    path = tmp_path / "vendor.csv"; f.to_csv(path, index=False)
    job, page, notes = evaluate_file(path, name, params=dict(n_boot="100", threshold="0.5"), kind="synthetic", settings=settings)
    assert job.status == "ok", job.reason
    evidence = Evidence.read(job.folder / "evidence.parquet").frame; found = evidence[evidence["metric"] == "auroc"].set_index("group")
    assert found.loc["all", "value"] == pytest.approx(roc_auc_score(y[5:], p[5:])) and found.loc["all", "n"] == 155
    assert found.loc["failures as wrong", "value"] == pytest.approx(roc_auc_score(y, np.r_[1. - y[:5], p[5:]])) and found.loc["failures as wrong", "n"] == 160
    text = page.read_text(); assert "<script" not in text and "5 answers failed" in text and "vendor" in text
    again, *_ = evaluate_file(path, name, params=dict(n_boot="100", threshold="0.5"), kind="synthetic", settings=settings)
    assert again.status == "up to date" and len(read_source(root / "data" / name)) == 160
    jobs = make_plan(["fine_tuning", "evaluation"], dict(data=name), {}, settings)
    assert [j.status for j in jobs] == ["skipped", "waiting"] and "without patients" in jobs[0].reason

def test_a_name_must_be_plain(tmp_path):
    from clinllm.run.evaluate import evaluate_file
    with pytest.raises(ParameterError, match="plain name"): evaluate_file(tmp_path / "x.csv", "../elsewhere")
