"The leakage guard: statistics against peers, planted leaks found, clean data left alone, the test split untouched, nothing personal shown."
from dataclasses import replace
from datetime import datetime, timedelta
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt, numpy as np, pandas as pd, polars as pl, pytest, time
from clinllm.core.errors import DataError
from clinllm.core.tables import Cohort
from clinllm.ehr.cohort import build_cohort
from clinllm.ehr.hospital import make_hospital
from clinllm.ehr.leakage import PLANTS, clustered_auroc, code_tests, families, folds, holm, leakage_report, outcome_times, plant_leak

FAMILY = dict(code="procedure", billing="diagnosis ICD10CM", lab="lab", note="note discharge_summary", rare="other OBSERVATION")

@pytest.fixture(scope="module")
def hospital(): return make_hospital(n_patients=900, seed=5).timeline

@pytest.fixture(scope="module")
def cohort(hospital): return build_cohort(hospital)

@pytest.fixture(scope="module")
def demo(shared_data):
    from clinllm.ehr.mimic_demo import read_mimic_demo
    return read_mimic_demo(shared_data / "mimic4-demo-clif")

def add(timeline, *rows):
    "The timeline with more events: (subject, time, code) and further columns by name"
    new = pl.DataFrame([dict(subject_id=s, time=t, code=c, **more) for s, t, c, more in rows], schema={k: timeline.events.schema[k] for k in ("subject_id", "time", "code", "hadm_id", "known_time")})
    return replace(timeline, events=pl.concat([timeline.events, new], how="diagonal"))

# --- statistics ---------------------------------------------------------------------------------------------------------------

def test_auroc_and_its_interval_agree_with_peers():
    "scikit-learn for the value; the bootstrap over patients of the evaluation room for the interval"
    from sklearn.metrics import roc_auc_score
    from clinllm.evaluation.statistics import auroc, bootstrap
    rng = np.random.default_rng(0); who = np.repeat(np.arange(150), 2); y = (rng.random(300) < .3).astype(int)
    score = np.round(y + (rng.normal(size=150)[who] + rng.normal(size=300)) / np.sqrt(2), 1)             # with ties
    e = clustered_auroc(y, score, who); b = bootstrap(pd.DataFrame(dict(subject_id=who, label=y, y_prob=score)), auroc, n_boot=2000)
    assert e.value == pytest.approx(roc_auc_score(y, score)) and e.n == 300
    assert abs(e.low - b.low) < .012 and abs(e.high - b.high) < .012
    assert np.isnan(clustered_auroc(np.ones(5), np.arange(5), np.arange(5)).value) and clustered_auroc([0, 0, 1, 1], np.arange(4), np.arange(4)).value == 1

def test_exact_tests_agree_with_scipy():
    from scipy.stats import fisher_exact, nchypergeom_fisher
    rng = np.random.default_rng(1); n, k = 60, 20; carriers = rng.integers(1, 30, 40); positives = np.array([rng.integers(max(0, c - (n - k)), min(c, k) + 1) for c in carriers])
    p, much = code_tests(carriers, positives, n, k)
    for c, a, x, m in zip(carriers, positives, p, much):
        table = [[a, c - a], [k - a, n - k - c + a]]
        assert x == pytest.approx(fisher_exact(table, alternative="greater")[1])
        if m < 1: assert m == pytest.approx(sum(nchypergeom_fisher.pmf(i, n, k, c, 10) for i in range(a, min(c, k) + 1)))
    assert (much >= p - 1e-12).all()                                                                       # a harder question never has a smaller p
    from statsmodels.stats.multitest import multipletests
    q = rng.random(50) ** 3; assert np.allclose(holm(q), multipletests(q, method="holm")[1])

def test_no_patient_is_in_two_folds():
    who, y = np.repeat(np.arange(50), 3), np.tile([0, 0, 1], 50)
    for fit, see in folds(y, who): assert not set(who[fit]) & set(who[see])
    assert sorted(np.concatenate([see for _, see in folds(y, who)])) == list(range(150))

# --- clean and planted ----------------------------------------------------------------------------------------------------------

def test_clean_hospitals_are_not_flagged():
    for seed in range(4):
        t = make_hospital(n_patients=300, seed=100 + seed).timeline; r = leakage_report(t, build_cohort(t), seed=seed)
        assert r.ok, r.flagged[["check", "family", "code"]]

@pytest.mark.parametrize("kind", list(PLANTS))
def test_a_planted_leak_is_found_where_it_was_planted(hospital, cohort, kind):
    planted = plant_leak(hospital, cohort, kind, 1.0 if kind != "rare" else .3, seed=3); r = leakage_report(planted, cohort)
    assert not r.ok and set(r.flagged["family"]) == {FAMILY[kind]} and f"planted {kind}" in planted.source
    if kind == "note": assert "readmitted" in set(r.flagged["code"])
    assert f"{FAMILY[kind]}" in repr(r) and not len(leakage_report(hospital, cohort).flagged)

def test_a_planted_leak_passes_the_gate(hospital, cohort):
    "What is planted is in the cut history; that is why a gate alone does not suffice"
    new = plant_leak(hospital, cohort, "rare", 1.0).until(cohort).events.filter(pl.col("code").str.contains("case_registry"))
    positive = set(cohort.frame.loc[cohort.frame["label"] == 1, ["subject_id", "prediction_time"]].itertuples(index=False, name=None))
    assert set(new.filter(pl.col("time") == pl.col("prediction_time") - pl.duration(hours=2)).select("subject_id", "prediction_time").to_pandas().itertuples(index=False, name=None)) == positive
    assert plant_leak(hospital, cohort, "lab", seed=1).events.equals(plant_leak(hospital, cohort, "lab", seed=1).events)
    assert len(plant_leak(hospital, cohort, "note").events) == len(hospital.events)

def test_reports_are_repeatable_and_blind_to_other_splits(hospital, cohort):
    a, b = leakage_report(hospital, cohort), leakage_report(hospital, cohort)
    pd.testing.assert_frame_equal(a.families, b.families); pd.testing.assert_frame_equal(a.findings, b.findings)
    hidden = cohort.frame.loc[cohort.frame["split"] != "train", "subject_id"].unique().tolist(); mine = pl.col("subject_id").is_in(hidden)
    nonsense = replace(hospital, events=hospital.events.with_columns(numeric_value=pl.when(mine).then(-9).otherwise("numeric_value"), text_value=pl.when(mine).then(pl.lit("readmitted")).otherwise("text_value")))
    flipped = Cohort(cohort.frame.assign(label=np.where(cohort.frame["split"] == "train", cohort.frame["label"], 1 - cohort.frame["label"])), cohort.task)
    c = leakage_report(nonsense, flipped)
    pd.testing.assert_frame_equal(a.families, c.families); pd.testing.assert_frame_equal(a.findings, c.findings)

# --- clocks ---------------------------------------------------------------------------------------------------------------------

def returns(timeline, cohort, n=6):
    "Training rows of different patients with a later stay: subject, prediction time, hadm_id, and the later stay's hadm_id"
    f = cohort.of("train").frame; out = []
    for r in f[f["label"] == 1].drop_duplicates("subject_id").head(n).itertuples():
        later = timeline.events.filter((pl.col("subject_id") == r.subject_id) & pl.col("code").str.starts_with("HOSPITAL_ADMISSION") & (pl.col("time") > r.prediction_time))
        out.append((int(r.subject_id), r.prediction_time.to_pydatetime(), int(r.hadm_id), int(later["hadm_id"][0])))
    return out

def test_each_contradiction_is_named(hospital, cohort):
    rows, hour = returns(hospital, cohort), timedelta(hours=1)
    found = lambda t, c=cohort: set(leakage_report(t, c).findings.query("level == 'impossible'")[["check", "family"]].itertuples(index=False, name=None))
    assert found(add(hospital, *[(s, at - hour, "DIAGNOSIS//ICD10CM//I50.9", dict(hadm_id=later)) for s, at, _, later in rows])) == {("belongs to a later stay", "diagnosis ICD10CM")}
    assert found(add(hospital, *[(s, datetime(1890, 1, 1), "LAB//sodium//mmol/L", {}) for s, *_ in rows])) == {("before birth", "lab")}
    dead = add(hospital, *[(s, at - timedelta(days=2), "MEDS_DEATH", {}) for s, at, *_ in rows], *[(s, at - hour, "LAB//sodium//mmol/L", dict(hadm_id=stay)) for s, at, stay, _ in rows])
    assert ("after death", "lab") in found(dead)
    early = Cohort(cohort.frame.assign(outcome_time=cohort.frame["prediction_time"] - pd.Timedelta(hours=1)), cohort.task)
    assert ("outcome before the prediction", "") in found(hospital, early)

def test_a_stray_record_is_a_question(hospital, cohort):
    s, at, _, later = returns(hospital, cohort, 1)[0]
    r = leakage_report(add(hospital, (s, at - timedelta(hours=1), "MEDICATION//heparin", dict(hadm_id=later))), cohort)
    assert r.ok and r.findings.query("check == 'belongs to a later stay'")[["level", "n"]].values.tolist() == [["question", 1]]

def test_questions_are_asked_and_answered_by_known_time(hospital, cohort):
    asked = leakage_report(hospital, cohort).findings
    assert asked[["level", "check", "family"]].values.tolist() == [["question", "billed, without a known time", "diagnosis ICD10CM"]]
    f = cohort.of("train").frame; minute = [(int(r.subject_id), r.prediction_time.to_pydatetime(), "MEDICATION//aspirin", dict(hadm_id=int(r.hadm_id))) for r in f.itertuples()] * 8
    r = leakage_report(add(hospital, *minute), cohort)
    assert r.ok and "stamped at the minute of the prediction" in set(r.findings["check"])
    came = outcome_times(hospital, cohort.of("train")); rows = [(int(s), t.to_pydatetime() + timedelta(days=1), "SURVEY//return", {}) for s, t in zip(f["subject_id"], came) if t == t]
    later = leakage_report(add(hospital, *rows[:0]), cohort); assert "recorded after the outcome only" not in set(later.findings["check"])
    last = f[f["label"] == 1].groupby("subject_id")["prediction_time"].max(); once = [r for r in rows if r[1] > last[r[0]]]
    only = [r for r in once if not ((f["subject_id"] == r[0]) & (f["prediction_time"] > r[1])).any()]
    assert len(only) >= 5 and "recorded after the outcome only" in set(leakage_report(add(hospital, *only), cohort).findings["check"])

def test_outcome_times_are_the_next_unplanned_admission(hospital, cohort):
    "Against a plain loop"
    starts = {s: g["time"].sort().to_list() for (s,), g in hospital.events.filter(pl.col("code").str.contains("^HOSPITAL_ADMISSION//(EMERGENCY|URGENT)")).partition_by("subject_id", as_dict=True).items()}
    for r, t in zip(cohort.frame.head(150).itertuples(), outcome_times(hospital, cohort)):
        expected = next((x for x in starts.get(r.subject_id, []) if x > r.prediction_time), None) if r.label else None
        assert (t == expected) if expected else pd.isna(t)
    other = Cohort(cohort.frame, replace(cohort.task, name="length_of_stay_7d"))
    assert outcome_times(hospital, other) is None and any("outcome_time" in r for r in leakage_report(hospital, other).remarks)

# --- the report -------------------------------------------------------------------------------------------------------------------

def test_the_report_shows_itself_and_withholds_small_cells(hospital, cohort):
    planted = plant_leak(hospital, cohort, "note", .12, seed=2); r = leakage_report(replace(planted, kind="real"), cohort)
    assert "<table" in r._repr_html_() and r.frame is r.findings and r.figure().get_title(); plt.close("all")
    full = leakage_report(planted, cohort); small = full.findings["n"].lt(11) & full.findings["level"].eq("implausible")
    assert small.any() and set(full.findings.loc[small, "code"]) - set(r.findings["code"]) and "a word (withheld)" in set(r.findings["code"])
    assert r.findings["n"].dropna().ge(11).all() and not r.findings["code"].str.contains(r"\d").any()

def test_words_are_letters_only_and_rare_names_are_not_shown(hospital, cohort):
    "A name that stands in the letters of few returning patients is flagged without being printed"
    f = cohort.of("train").frame; who = f[f["label"] == 1].drop_duplicates("subject_id").head(9)["hadm_id"].tolist()
    named = replace(hospital, kind="real", events=hospital.events.with_columns(text_value=pl.when(pl.col("hadm_id").is_in(who)).then(pl.col("text_value") + " Mr Quaxelbrot 4711").otherwise("text_value")))
    r = leakage_report(named, cohort); said = r._repr_html_() + repr(r) + " ".join(r.remarks)
    assert not r.ok and "quaxelbrot" not in said.lower() and "4711" not in said

def test_mistakes_are_said(hospital, cohort):
    for wrong, words in ((dict(threshold=2), "threshold"), (dict(alpha=0), "alpha"), (dict(max_odds_ratio=.5), "max_odds_ratio")):
        with pytest.raises(DataError, match=words): leakage_report(hospital, cohort, **wrong)
    with pytest.raises(DataError, match="train"): leakage_report(hospital, cohort.of("test"))
    with pytest.raises(DataError, match="share of the positive rows"): plant_leak(hospital, cohort, "lab", 0)
    with pytest.raises(DataError, match="no.*notes|needs notes"): plant_leak(replace(hospital, events=hospital.events.filter(~pl.col("code").str.starts_with("NOTE"))), cohort, "note")
    few = Cohort(cohort.of("train").frame.head(30), cohort.task); assert any("not probed" in r for r in leakage_report(hospital, few).remarks)
    assert "were looked at" in leakage_report(hospital, cohort, most=200).remarks[0]

def test_real_patients_are_not_flagged_and_would_be(demo):
    for seed in range(3): assert leakage_report(demo, build_cohort(demo, seed=seed)).ok
    cohort = build_cohort(demo)
    for kind in ("lab", "code"): assert not leakage_report(plant_leak(demo, cohort, kind, 1.0), cohort).ok

def test_it_is_fast():
    t = make_hospital(n_patients=2000, seed=1).timeline; c = build_cohort(t); start = time.process_time(); leakage_report(t, c); assert time.process_time() - start < 10
