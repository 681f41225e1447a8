"Every experiment runs from a clean kernel under plain papermill, on few patients, and ends in tables that keep their contract."
import json, os
from pathlib import Path
import papermill, pytest
from clinllm.core.tables import Evidence, Predictions
from clinllm.core.settings import load_settings

SMALL = dict(n_patients=260, n_boot=100)
VALUES = {
    "fine_tuning": dict(SMALL, n_train=32, n_validation=16, n_test=40, batch_size=8, budget=200),
    "prompt_engineering": dict(SMALL, n_validation=16, n_test=24, n_examples=2, budget=160),
    "multimodal_ehr": dict(SMALL, n_test=60),
    "evaluation": dict(SMALL, n_robust=16, budget=200),
}

@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    "Results go to a folder of the test; the project's own reports are left alone"
    folder = tmp_path_factory.mktemp("reports"); os.environ["CLINLLM_REPORTS"] = str(folder)
    yield folder
    del os.environ["CLINLLM_REPORTS"]

def execute(root, name, tmp_path, **values):
    papermill.execute_notebook(str(root / "nbs/experiments" / f"{name}.ipynb"), str(tmp_path / f"{name}.ipynb"), values, kernel_name="python3", cwd=str(root), progress_bar=False)

def check(folder, variants, dimension):
    predictions, evidence = Predictions.read(folder / "predictions.parquet"), Evidence.read(folder / "evidence.parquet")
    assert set(variants) <= set(predictions.variants)
    assert dimension in set(evidence.frame["dimension"]) and "sustainability" in set(evidence.frame["dimension"])
    assert evidence.frame["limitation"].str.contains("synthetic").all()

@pytest.mark.parametrize("name, variants, dimension", [
    ("fine_tuning", ["prevalence", "tfidf", "minilm", "zero_shot", "lora"], "fine-tuning"),
    ("prompt_engineering", ["prompt: zero_shot", "prompt: few_shot", "prompt: guideline"], "prompt engineering"),
    ("multimodal_ehr", ["structured", "notes", "late_fusion"], "multimodal EHR")])
def test_plain_papermill(root, reports, tmp_path, name, variants, dimension):
    execute(root, name, tmp_path, **VALUES[name])
    check(reports / name / "draft", variants, dimension)

def test_real_patients_give_wide_intervals(root, reports, tmp_path, shared_data):
    from clinllm.ehr.sources import load_timeline
    execute(root, "multimodal_ehr", tmp_path, data="mimic-iv-demo", n_boot=300)
    evidence = Evidence.read(reports / "multimodal_ehr" / "draft" / "evidence.parquet").frame
    auroc = evidence.query("metric == 'auroc' and variant == 'structured'").iloc[0]
    assert auroc["n"] < 150 and auroc["high"] - auroc["low"] > 0.15

def test_data_report_counts_what_the_hospital_planted(root, reports, tmp_path):
    from clinllm.ehr.hospital import make_hospital
    execute(root, "data_report", tmp_path, **SMALL)
    evidence = Evidence.read(reports / "data_report" / "draft" / "evidence.parquet").frame.set_index(["metric", "group"])["value"]
    timeline = make_hospital(260, seed=42).timeline
    assert evidence["patients", "all"] == 260 and evidence["events", "all"] == len(timeline)
    assert evidence["note_words", "language: English"] > evidence["note_words", "language: Spanish"] + 5       # by design, see ehr/notes

@pytest.mark.parametrize("format, folder, patients, outcome", [("mimic-iv", "mimic4-demo-tinyehr", 100, "readmission"), ("eicu", "eicu-demo", 1841, "mortality")])
def test_an_import_runs_by_name(root, reports, tmp_path, shared_data, format, folder, patients, outcome):
    from clinllm.ehr.sources import import_data
    target = tmp_path / "data" / folder
    report = import_data(format, shared_data / folder, str(target), load_settings(), progress=False)
    assert report.about["patients"] == patients and report.table["records"].sum() == report.about["records"]
    execute(root, "multimodal_ehr", tmp_path, data=str(target), n_boot=100)
    predictions = Predictions.read(reports / "multimodal_ehr" / "draft" / "predictions.parquet")
    assert set(predictions.variants) == {"structured", "notes", "late_fusion"} and len(predictions.on("test").of("structured")) > (400 if outcome == "mortality" else 40)
