"Clinicians' ratings become evidence: the experiment against means worked out by hand, and what stops it before a kernel starts."
import shutil
import nbformat, papermill, pandas as pd, pytest
from clinllm.core.errors import ClinllmError, DataError, ParameterError
from clinllm.core.settings import load_settings
from clinllm.core.tables import Evidence
from clinllm.evaluation.review import CANNOT, Review, blind
from clinllm.governance.ledger import read_ledger
from clinllm.run.experiment import start_run
from clinllm.run.parameters import review_files
from clinllm.run.runner import make_plan, run_experiments
from clinllm.run.store import read_manifest

N, SECRET = 12, "Text of an answer"

def rating(rater, patient, variant, dimension):
    "harm: both say 1 + patient mod 5. accuracy: ana 2 or 4, ben one more, but 1 for the new answer of patient 0, and no word on the old one of patient 1"
    if dimension == "harm": return 1 + patient % 5
    if rater == "ben" and (patient, variant) == (0, "new"): return 1
    if rater == "ben" and (patient, variant) == (1, "old"): return CANNOT
    return (2 if variant == "old" else 4) + (rater == "ben")

def make_review(folder, data="synthetic"):
    key = blind(pd.DataFrame([dict(subject_id=i, variant=v, text=f"{SECRET} {i} {v[::-1]}") for i in range(N) for v in ("old", "new")]), folder, dimensions=["accuracy", "harm"], data=data)
    for rater in ("ana", "ben"):
        review = Review(folder, rater)
        for r in pd.read_csv(key).itertuples():
            for d in review.dimensions: review.rate(r.item, d, rating(rater, r.subject_id, r.variant, d))
    return folder

@pytest.fixture
def reports(tmp_path, monkeypatch):
    "Results go to a folder of the test; the project's own reports are left alone"
    monkeypatch.setenv("CLINLLM_REPORTS", str(tmp_path / "reports")); return tmp_path / "reports"

@pytest.fixture
def study(tmp_path): return make_review(tmp_path / "trial")

def plan(**params): return make_plan(["clinicians_review"], params=params, settings=load_settings())[0]

def check_by_hand(evidence):
    assert set(evidence["dimension"]) == {"clinicians' review", "sustainability"} and set(evidence["cell"]) == {"Who rated", "Ratings", "Do the raters agree?", "What the run cost"}
    value = evidence.set_index(["metric", "variant", "group"])["value"]
    assert value["raters", "all", "all"] == 2
    assert value["mean_rating", "old", "accuracy"] == pytest.approx((11 * 2.5 + 2) / 12) and value["mean_rating", "new", "accuracy"] == pytest.approx((11 * 4.5 + 2.5) / 12)
    assert value["mean_rating", "old", "harm"] == value["mean_rating", "new", "harm"] == pytest.approx((15 + 15 + 1 + 2) / 12)
    assert value["mean_rating_difference", "new - old", "accuracy"] == pytest.approx(22.5 / 12) and value["mean_rating_difference", "new - old", "harm"] == 0
    assert value["low_rating_rate", "old", "accuracy"] == 1 and value["low_rating_rate", "new", "accuracy"] == pytest.approx(1 / 12) and value["low_rating_rate", "new", "harm"] == pytest.approx(6 / 12)   # patients 0, 1, 5, 6, 10, 11
    assert value["percent_agreement", "all", "accuracy"] == 0 and all(value[m, "all", "harm"] == pytest.approx(1) for m in ("percent_agreement", "gwet_ac2", "krippendorff_alpha"))
    rows = evidence.set_index(["metric", "variant", "group"]); assert rows.loc[("gwet_ac2", "all", "accuracy"), "n"] == 23 and "1 ratings were 'cannot judge'" in rows.loc[("mean_rating", "old", "accuracy"), "limitation"]
    gap = rows.loc[("mean_rating_difference", "new - old", "accuracy")]; assert 0 < gap["low"] < gap["value"] <= gap["high"] <= 2.5

def test_ratings_become_evidence_of_the_source_that_was_reviewed(study, reports):
    job, = run_experiments(["clinicians_review"], dict(ratings=str(study), reference="old", n_boot="200"), settings=load_settings())
    assert job.status == "ok", job.reason
    check_by_hand(Evidence.read(job.folder / "evidence.parquet").frame)
    manifest, ledger = read_manifest(job.folder), read_ledger(reports)
    assert (manifest["data"]["source"], manifest["data"]["kind"], manifest["data"]["fingerprint"]) == ("synthetic", "synthetic", job.data) and {p.name for p in (job.folder / "figures").iterdir()} == {"ratings.png", "agreement.png"}
    assert set(ledger["experiment"]) == {"clinicians_review"} and set(ledger["data"]) == set(ledger["kind"]) == {"synthetic"} and ledger["limitation"].str.contains("synthetic patients").all()
    page = (job.folder / "notebook.ipynb").read_text(); assert SECRET in page and "rater 2" in page and "ana" not in page.replace("analy", "")
    again, = run_experiments(["clinicians_review"], dict(ratings=str(study), reference="old", n_boot="200"), settings=load_settings()); assert again.status == "up to date"

def test_plain_papermill_shows_no_text_of_unknown_patients(root, tmp_path, reports):
    folder = make_review(tmp_path / "ward", data=""); made = tmp_path / "made.ipynb"
    papermill.execute_notebook(str(root / "nbs/experiments/clinicians_review.ipynb"), str(made), dict(ratings=str(folder), reference="old", n_boot=100), kernel_name="python3", cwd=str(root), progress_bar=False)
    evidence = Evidence.read(reports / "clinicians_review/draft/evidence.parquet").frame; check_by_hand(evidence)
    assert SECRET not in made.read_text() and not evidence["limitation"].str.contains("synthetic").any() and '"review ward"' in (reports / "clinicians_review/draft/manifest.json").read_text()

def test_whose_patients(tmp_path, reports, study, monkeypatch):
    monkeypatch.setattr("clinllm.run.experiment.install_guard", lambda allow: None)      # this process has other tests to run
    unknown = make_review(tmp_path / "ward", data="")
    for values, said in [(dict(ratings=str(study)), ("synthetic", "synthetic")), (dict(ratings=str(unknown)), ("review ward", "real")), (dict(ratings=str(unknown), synthetic=True), ("review ward", "synthetic"))]:
        data = start_run("clinicians_review", dict(values)).record["data"]; assert (data["source"], data["kind"]) == said
    demo = make_review(tmp_path / "demo", data="mimic-iv-demo"); assert start_run("clinicians_review", dict(ratings=str(demo), synthetic=True)).private      # a source that is known counts more than the word
    with pytest.raises(ParameterError, match="none are named"): start_run("clinicians_review", {})

def test_without_ratings_it_is_left_out_and_says_what_to_do(reports):
    job = plan(); assert job.status == "skipped" and job.name == "clinicians_review · review" and not job.run_id
    assert job.reason == "needs ratings; make them with evaluation.review, then: clinllm run clinicians_review -p ratings=FOLDER"
    assert [j.experiment.name for j in make_plan(settings=load_settings()) if "ratings" in j.reason] == ["clinicians_review"]

def test_another_rating_is_another_run(study, tmp_path):
    seen = [plan(ratings=str(study)).data]; review = Review(study, "ana")
    (study / "notes of a rater.txt").write_text("not a rating"); assert plan(ratings=str(study)).data == seen[0]
    review.rate(review.order[0], "harm", 5); seen.append(plan(ratings=str(study)).data)
    (study / "adjudicated.jsonl").write_text(""); seen.append(plan(ratings=str(study)).data)
    key = tmp_path / "trial-key.csv"; moved = pd.read_csv(key); moved["variant"] = moved["variant"].iloc[::-1].to_numpy(); moved.to_csv(key, index=False); seen.append(plan(ratings=str(study)).data)
    assert len(set(seen)) == 4 and plan(ratings=str(study)).source == "review trial"

@pytest.mark.parametrize("harm, said", [
    (lambda f, k: shutil.rmtree(f), "not the folder of a review"), (lambda f, k: (f / "study.json").unlink(), "not the folder of a review"), (lambda f, k: k.unlink(), "trial-key.csv"),
    (lambda f, k: (f / "study.json").write_text('{"items":'), "damaged"), (lambda f, k: (f / "study.json").write_text('[]'), "damaged"), (lambda f, k: (f / "items.jsonl").write_text(""), "items.jsonl is damaged"),
    (lambda f, k: [p.unlink() for p in f.glob("ratings-*")], "no ratings yet"), (lambda f, k: k.write_text(""), "damaged"), (lambda f, k: k.write_text("item,subject_id,variant,status\nBCDFG,1,old,ok\n"), "not in this key"),
    (lambda f, k: (f / "ratings-ana.jsonl").write_text('{"item": "ZZZZZ", "dimension": "harm", "rating": 3}\n'), "another review"), (lambda f, k: (f / "adjudicated.jsonl").write_text('{"item": 1}\n'), "damaged")])
def test_a_missing_or_damaged_review_is_refused_by_the_plan(study, harm, said):
    harm(study, study.parent / "trial-key.csv")
    with pytest.raises(ClinllmError, match=said) as e: plan(ratings=str(study))
    assert isinstance(e.value, (DataError, ParameterError)) and "parameter '" in str(e.value) and SECRET not in str(e.value)

def test_a_key_kept_elsewhere(study, tmp_path):
    (tmp_path / "safe").mkdir(); (tmp_path / "trial-key.csv").rename(tmp_path / "safe/key.csv")
    job = plan(ratings=f"{study}/", key=str(tmp_path / "safe/key.csv")); assert job.status == "waiting"
    assert [p.name for p in review_files(job.values, tmp_path)] == ["study.json", "items.jsonl", "ratings-ana.jsonl", "ratings-ben.jsonl", "key.csv"]

def test_the_committed_notebook_is_unrun(root):
    nb = nbformat.read(root / "nbs/experiments/clinicians_review.ipynb", 4); assert "- needs: ratings" in nb.cells[0].source and not any(c.get("outputs") for c in nb.cells)
