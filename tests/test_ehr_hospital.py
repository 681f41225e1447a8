"The synthetic hospital against its own published truth: oracles are the equation, pairs counted by hand and plain loops over events."
import numpy as np, pandas as pd, polars as pl, pytest
from clinllm.core.errors import DataError
from clinllm.ehr.hospital import FACT_TERMS, INTERCEPT, TABLE_TERMS, bayes_auroc, draw_patients, make_hospital, simulate
from clinllm.ehr.notes import FACTS, PHI_CLASSES, WORDINGS, take_marks


@pytest.fixture(scope="module")
def hospital(): return make_hospital(400, seed=3)


@pytest.fixture(scope="module")
def many():
    "Stays of 12,000 patients, without events and notes"
    people, course = np.random.default_rng(1).spawn(2)
    return simulate(draw_patients(12_000, people), course)


def test_logistic_regression_recovers_the_published_equation(many):
    t = many[many["observed"]]; from clinllm.ehr.hospital import covariates
    x = covariates(t); X = np.column_stack([np.ones(len(t)), *[(x[c] - m) / d for c, (m, d, _) in TABLE_TERMS.items()], *[t[f] for f in FACT_TERMS]]).astype(float)
    y, b = t["readmitted"].to_numpy(float), np.zeros(X.shape[1])
    for _ in range(15):
        p = 1 / (1 + np.exp(-X @ b)); H = (X * (p * (1 - p))[:, None]).T @ X; b += np.linalg.solve(H, X.T @ (y - p))
    gap = b - np.array([INTERCEPT, *(v[2] for v in TABLE_TERMS.values()), *FACT_TERMS.values()])
    # sum of squared standardised errors is chi-square with 20 degrees of freedom; 45.3 is its 99.9% quantile
    assert gap @ H @ gap < 45.3
    assert np.abs(gap / np.sqrt(np.diag(np.linalg.inv(H)))).max() < 4


def test_drawn_outcomes_are_calibrated_to_p_true(many):
    t = many[many["observed"]]; tenth = pd.qcut(t["p_true"], 10)
    z = t.groupby(tenth, observed=True).apply(lambda g: (g["readmitted"].sum() - g["p_true"].sum()) / np.sqrt((g["p_true"] * (1 - g["p_true"])).sum()))
    assert z.abs().max() < 4 and 0.19 < t["readmitted"].mean() < 0.23


def test_the_label_in_the_events_is_the_drawn_one(hospital):
    e, month = hospital.timeline.events, np.timedelta64(30, "D")
    unplanned = e.filter(pl.col("code").is_in(["HOSPITAL_ADMISSION//EMERGENCY", "HOSPITAL_ADMISSION//URGENT"]))
    ends = dict(e.filter(pl.col("code") == "END_OF_FOLLOWUP").select("subject_id", "time").iter_rows()); starts = {}
    for s, t in unplanned.select("subject_id", "time").iter_rows(): starts.setdefault(s, []).append(np.datetime64(t))
    for r in hospital.truth.itertuples():
        t = r.prediction_time.to_datetime64(); back = any(t < u <= t + month for u in starts.get(r.subject_id, []))
        assert r.observed == (back or np.datetime64(ends[r.subject_id]) >= t + month)
        if r.observed: assert back == r.readmitted


def test_the_cohort_builder_agrees(hospital):
    cohort = pytest.importorskip("clinllm.ehr.cohort").build_cohort(hospital.timeline)
    both = cohort.frame.merge(hospital.truth, on="hadm_id", suffixes=("", "_true"))
    assert len(both) == len(cohort) and (both["label"] == both["readmitted"]).all() and (both["split"] == both["split_true"]).all()
    asked = hospital.truth["observed"] & ~hospital.truth["disposition"].isin(["HOSPICE", "AMA"])
    assert len(cohort) == asked.sum()


def test_spans_are_exact_and_of_every_class(hospital):
    text = dict(hospital.timeline.events.filter(pl.col("code") == "NOTE//discharge_summary").select("hadm_id", "text_value").iter_rows())
    assert all(text[s.hadm_id][s.start:s.end] == s.text for s in hospital.spans.itertuples())
    assert set(hospital.spans["phi_class"]) == set(PHI_CLASSES) and hospital.spans.groupby("hadm_id").size().between(1, 6).all()
    assert take_marks("a ⟦names|B C⟧ d") == ("a B C d", [(2, 5, "names", "B C")])


def test_reserved_wordings_stay_in_their_split(hospital):
    split = dict(hospital.timeline.splits.iter_rows()); notes = hospital.timeline.events.filter(pl.col("code") == "NOTE//discharge_summary")
    prose = {s: "\n".join(t for i, t in notes.select("subject_id", "text_value").iter_rows() if split[i] == s) for s in ("train", "validation", "test")}
    for w in WORDINGS.values():
        for value in ("yes", "no"):
            for home in ("validation", "test"):
                for sentence in (t for t in w[value][home] if "{" not in t):
                    assert not any(sentence in prose[s] for s in prose if s != home)
    assert "Nobody shares" in prose["test"]


def test_stays_do_not_overlap_and_nothing_follows_the_end(hospital):
    s = hospital.stays; before = s.groupby("subject_id")["discharge"].shift()
    assert ((s["admit"] - before).dropna() > pd.Timedelta(hours=6)).all()          # a shorter gap would count as a transfer
    e = hospital.timeline.events; end = e.filter(pl.col("code") == "END_OF_FOLLOWUP").select("subject_id", end="time")
    assert (e.drop_nulls("time").join(end, on="subject_id").select(pl.col("time") <= pl.col("end"))).to_series().all()
    assert e["time"].max().year == 2024 and s["age"].min() >= 18


def test_table_covariates_can_be_read_from_the_events(hospital):
    e = hospital.timeline.events
    last = e.filter(pl.col("code").str.starts_with("LAB//sodium")).group_by("hadm_id").agg(pl.col("numeric_value").sort_by("time").last())
    drugs = e.filter(pl.col("code").str.starts_with("MEDICATION//")).group_by("hadm_id").agg(pl.col("code").n_unique())
    truth = hospital.truth.set_index("hadm_id")
    assert all(truth["sodium"].get(h, v) == pytest.approx(v) for h, v in last.iter_rows())
    assert all(truth["n_drugs"].get(h, v) == v for h, v in drugs.iter_rows()) and len(drugs) == len(hospital.stays)


def test_expected_auroc_by_hand_and_by_simulation():
    assert bayes_auroc([.8, .2]) == pytest.approx(.8)
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(0); p = rng.uniform(.05, .6, 400); score = p + rng.normal(0, .2, 400)
    drawn = np.mean([roc_auc_score(rng.random(400) < p, score) for _ in range(400)])
    assert bayes_auroc(p, score) == pytest.approx(drawn, abs=.004)


def test_thin_documentation_is_where_the_table_says(many):
    rate = many.groupby(many["language"] == "English")[[f + "_written" for f in FACTS]].mean().mean(axis=1)
    assert rate[False] / rate[True] == pytest.approx(.6, abs=.03)
    facts = many.groupby(many["language"] == "English")[list(FACTS)].mean().astype(float)
    assert (facts.loc[True] - facts.loc[False]).abs().max() < .03      # the facts themselves are as frequent


def test_same_arguments_same_hospital():
    a, b, c = make_hospital(50, 1), make_hospital(50, 1), make_hospital(50, 2)
    assert a.timeline.fingerprint == b.timeline.fingerprint != c.timeline.fingerprint
    assert a.timeline.events.equals(b.timeline.events) and not a.timeline.events.equals(c.timeline.events)
    with pytest.raises(DataError, match="at least 10"): make_hospital(3)
