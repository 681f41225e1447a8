"Risk-coverage, conformal sets and abstaining against a naive loop, MAPIE, hand computation and known truth."
import numpy as np, pandas as pd, pytest
from scipy.special import expit
from scipy.stats import beta
from sklearn.base import BaseEstimator, ClassifierMixin
from clinllm.core.errors import ParameterError, TableError
from clinllm.core.tables import Predictions
from clinllm.evaluation.selective import abstain, abstain_below, confidence, conformal, conformal_sets, error_at_coverage, risk_coverage, risk_coverage_area, selective
from clinllm.evaluation.statistics import WORST, simulate

def table(p, y, start=0, **columns):
    return Predictions(pd.DataFrame(dict(subject_id=np.arange(len(p)) + start, prediction_time="2024-01-01", variant="x", y_prob=p, label=y, **columns)))

def drawn(seed, n=600, known=200):
    "Validation and test patients of one population, with scores that are blurred"
    rng = np.random.default_rng(seed); x = rng.normal(-1, 1.3, n); p, y = expit(1.5 * x + rng.normal(size=n)), (rng.random(n) < expit(x)).astype(int)
    return table(p[:known], y[:known]), table(p[known:], y[known:], start=known)

class PassOn(ClassifierMixin, BaseEstimator):
    classes_ = np.array([0, 1])
    def fit(self, X, y): return self
    def predict_proba(self, X): return np.column_stack([1 - X[:, 0], X[:, 0]])
    def predict(self, X): return (X[:, 0] >= .5).astype(int)
    def __sklearn_is_fitted__(self): return True

@pytest.mark.parametrize("threshold", [.2, .5])
def test_area_is_the_mean_risk_of_geifmans_loop(threshold):
    f = simulate(300).of("noisy"); order = np.argsort(-confidence(f["y_prob"], threshold)); wrong = ((f["y_prob"] >= threshold) != f["label"]).to_numpy()[order]
    risks, errors = [], 0
    for k, e in enumerate(wrong, 1): errors += e; risks.append(errors / k)
    one = np.ones((1, 300)); assert risk_coverage_area(threshold)(f, one)[0] == pytest.approx(np.mean(risks))
    for share in (.1, .8, 1): assert error_at_coverage(share, threshold)(f, one)[0] == pytest.approx(risks[int(share * 300) - 1])

def test_ties_are_averaged_and_copies_equal_weights():
    rng = np.random.default_rng(0); p, y = rng.integers(1, 6, 60) / 10, rng.integers(0, 2, 60); f = table(p, y).frame; wrong = (p >= .5) != y
    areas = []
    for _ in range(3000): o = rng.permutation(60); o = o[np.argsort(-confidence(p).round(9)[o], kind="stable")]; areas.append((wrong[o].cumsum() / np.arange(1, 61)).mean())
    assert risk_coverage_area()(f, np.ones((1, 60)))[0] == pytest.approx(np.mean(areas), abs=.003)
    copies = rng.integers(0, 3, 60); many = f.loc[f.index.repeat(copies)].reset_index(drop=True); one = np.ones((1, len(many)))
    for s in (risk_coverage_area(), error_at_coverage(.5)): assert s(f, copies[None].astype(float))[0] == pytest.approx(s(many, one)[0])

def test_no_knowledge_of_doubt_gains_nothing():
    rng = np.random.default_rng(0); p = rng.random(4000); f = table(p, ((p >= .5) ^ (rng.random(4000) < .3)).astype(int)).frame; one = np.ones((1, 4000))
    assert risk_coverage_area()(f, one)[0] == pytest.approx(.3, abs=.03) and error_at_coverage(.3)(f, one)[0] == pytest.approx(.3, abs=.03)

def test_curve_and_evidence_agree_and_failures_are_counted():
    frame = simulate(200).of("noisy"); frame.loc[:19, ["status", "y_prob"]] = ["refused", np.nan]; p = Predictions(frame)
    curve = risk_coverage(p, "noisy", n_boot=50); found = selective(p, n_boot=50).frame.set_index(["metric", "group"])
    assert found.loc[("error_at_80_coverage", "threshold 0.50"), "value"] == pytest.approx(curve.loc[np.isclose(curve["coverage"], .8), "risk"].item())
    assert "20 of 200 rows were not ok" in found.loc[("risk_coverage_area", "threshold 0.50"), "limitation"]
    worst = found.loc[("error_at_100_coverage", f"threshold 0.50; {WORST}"), "value"]; assert worst == pytest.approx((20 + 180 * curve["risk"].iloc[-1]) / 200)
    assert curve["n"].tolist() == [int(np.ceil(c * 180 - 1e-9)) for c in curve["coverage"]] and curve["confidence"].is_monotonic_decreasing

@pytest.mark.parametrize("alpha", [.05, .1, .2, .5])
def test_sets_equal_mapie(alpha):
    from mapie.classification import SplitConformalClassifier
    for seed in range(4):
        validation, test = drawn(seed); columns = lambda t: (t.frame[["y_prob"]].to_numpy(), t.frame["label"].to_numpy())
        peer = SplitConformalClassifier(PassOn(), confidence_level=1 - alpha, conformity_score="lac", prefit=True).conformalize(*columns(validation))
        np.testing.assert_array_equal(conformal_sets(validation, test, "x", alpha)[["no", "yes"]], peer.predict_set(columns(test)[0])[1][:, :, 0])

def test_coverage_is_beta_distributed_as_promised():
    "Given a validation set of n, coverage is Beta(k, n + 1 - k), k = ceil((n + 1)(1 - alpha)) (Vovk 2012)"
    got = np.array([conformal_sets(*drawn(s, n=3100, known=100), "x", .1)["holds"].mean() for s in range(80)]); promised = beta(91, 10)
    assert got.mean() == pytest.approx(promised.mean(), abs=.008) and got.std() == pytest.approx(promised.std(), abs=.008)

def test_sets_by_label_keep_the_promise_for_those_with_the_outcome():
    ill = lambda by_label: np.mean([(s := conformal_sets(*drawn(seed, n=1000, known=300), "x", .1, by_label))["holds"][s["label"] == 1].mean() for seed in range(40)])
    assert ill(False) < .85 and .885 < ill(True) < .93

def test_conformal_evidence():
    validation, test = drawn(0); found = conformal(validation, test, n_boot=50).frame.set_index(["metric", "group"]); sets = conformal_sets(validation, test, "x")
    assert found.loc[("conformal_coverage", "alpha 0.10"), "value"] == pytest.approx(sets["holds"].mean()) and found.loc[("set_size", "alpha 0.10"), "value"] == pytest.approx(sets["size"].mean())
    by = [found.loc[("conformal_coverage", f"alpha 0.10, label {y}")] for y in (0, 1)]; assert sum(r["value"] * r["n"] for r in by) == pytest.approx(sets["holds"].sum())
    low, high = beta.ppf([.025, .975], 181, 20); assert f"95% of them cover {low:.1%} to {high:.1%}" in found.loc[("conformal_coverage", "alpha 0.10"), "limitation"]
    assert found.loc[("single_answers", "alpha 0.10"), "value"] + found.loc[("empty_sets", "alpha 0.10"), "value"] == pytest.approx((sets["size"] != 2).mean())
    few = conformal(table([.2, .6], [0, 1]), test, n_boot=20).frame.set_index(["metric", "group"]); assert few.loc[("conformal_coverage", "alpha 0.10"), "value"] == 1 and few.loc[("set_size", "alpha 0.10"), "value"] == 2

def test_abstaining_keeps_its_limit_and_says_who_is_left():
    broken = used = 0
    for s in range(80):
        validation, test = drawn(s, n=3300, known=300); cut = abstain_below(validation, "x", .22); f = test.frame; kept = confidence(f["y_prob"]) >= cut
        used += kept.any(); broken += kept.any() and ((f["y_prob"] >= .5) != f["label"])[kept].mean() > .22
    assert used > 40 and broken / 80 <= .1           # promised 5%; the bound leaves room for 80 studies
    validation, test = drawn(3); found = abstain(validation, test, .2).frame.set_index(["metric", "group"]); share = [found.loc[("selective_coverage", g)] for g in ("risk 0.20", "risk 0.20, label 0", "risk 0.20, label 1")]
    assert share[0]["value"] * 400 == pytest.approx(share[1]["value"] * share[1]["n"] + share[2]["value"] * share[2]["n"]) and found.loc[("selective_error", "risk 0.20"), "n"] == round(share[0]["value"] * 400)
    half = Predictions(test.frame.assign(status=np.where(np.arange(400) < 200, "ok", "refused"), y_prob=lambda d: d["y_prob"].where(np.arange(400) < 200)))
    assert abstain(validation, half, .2).frame.set_index(["metric", "group"]).loc[("selective_coverage", "risk 0.20"), "value"] <= .5       # a refusal is no answer

def test_the_walk_by_hand():
    "40 right answers, then every other one is wrong. At risk 10%, 29 rows without an error are the fewest that are sure: 29, 34 and 39 pass, 44 with 2 wrong does not"
    p = np.linspace(.99, .6, 100); y = np.r_[np.ones(40), np.tile([0, 1], 30)].astype(int); v = table(p, y)
    assert 1 - .05 ** (1 / 29) < .1 < 1 - .05 ** (1 / 28) and beta.ppf(.95, 3, 42) > .1
    assert (p >= abstain_below(v, "x", .1)).sum() == 39 and np.isinf(abstain_below(v, "x", .05)) and abstain_below(v, "x", .6) == pytest.approx(.6)
    assert np.isinf(abstain_below(table(p[:28], y[:28]), "x", .1)) and np.isfinite(abstain_below(table(p[:29], y[:29]), "x", .1))

def test_edges_have_a_reason_or_a_clear_error():
    validation, test = drawn(1); silent = Predictions(test.frame.assign(y_prob=np.nan, status="refused")); sided = Predictions(test.frame.assign(label=0))
    for evidence in (selective(silent, n_boot=20), conformal(validation, silent, n_boot=20), abstain(validation, silent, .2), selective(sided, n_boot=20), conformal(validation, sided, n_boot=20), abstain(validation, sided, .2)):
        missing = evidence.frame[evidence.frame["value"].isna()]; assert (missing["limitation"] != "").all()
    assert conformal(validation, sided, n_boot=20).frame.query("group == 'alpha 0.10, label 1'")["value"].isna().all() and risk_coverage(silent, "x").empty
    assert selective(table([.7], [1]), n_boot=20).frame["value"].tolist() == [0, 0, 0] and np.isfinite(selective(table([0., 1., .5], [0, 1, 1]), n_boot=20).frame["value"]).all()
    weighted = Predictions(test.frame.assign(weight=np.where(test.frame["label"] == 1, 5., 1.))); found = conformal(validation, weighted, n_boot=20).frame
    sets = conformal_sets(validation, weighted, "x"); assert found["value"][0] == pytest.approx(np.average(sets["holds"], weights=sets["weight"]))
    for bad, rule in ((lambda: conformal_sets(validation, test, "x", alpha=0), "alpha"), (lambda: abstain_below(validation, "x", 20), "risk"), (lambda: abstain_below(validation, "x", .2, delta=1), "delta"),
                      (lambda: error_at_coverage(0), "coverage"), (lambda: confidence([.5], 1), "threshold")):
        with pytest.raises(ParameterError, match=rule): bad()
    for learn in (conformal_sets, lambda a, b, v: abstain(a, b, .1)):
        with pytest.raises(TableError, match="other patients"): learn(test, test, "x")
