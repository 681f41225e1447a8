"Mitigation against published weights, fairlearn, direct computation, a planted gap, and at its edges."
import numpy as np, pandas as pd, pytest
from fairlearn.metrics import MetricFrame, true_positive_rate
from scipy.special import expit
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from clinllm.core.errors import ParameterError, TableError
from clinllm.evaluation.mitigation import METHODS, RISKLESS, compare_mitigations, message_mitigation, mitigation_plot, reweighing

def planted(n=3000, seed=0):
    "The first feature reads 1.2 too low in group B"
    rng = np.random.default_rng(seed); g = rng.choice(["A", "B"], n, p=[.65, .35]); x = rng.normal(size=(n, 2)); y = (rng.random(n) < expit(-1.4 + x @ [1.3, .8])).astype(int); x[:, 0] -= 1.2 * (g == "B")
    return pd.DataFrame(x), pd.DataFrame(dict(subject_id=range(n), prediction_time=pd.Timestamp("2024-01-01"), label=y, split=rng.choice(["train", "validation", "test"], n, p=[.4, .25, .35]), g=g))

@pytest.fixture(scope="module")
def done(): x, f = planted(); return x, f, *compare_mitigations(x, f, "g", n_boot=100)

def test_reweighing_makes_group_and_outcome_independent():
    rng = np.random.default_rng(0); y, g = rng.integers(0, 2, 300), rng.integers(0, 4, 300); w = reweighing(y, g); assert w.sum() == pytest.approx(300)
    assert [np.average(y[g == k], weights=w[g == k]) for k in range(4)] == pytest.approx([y.mean()] * 4)

def test_none_is_the_plain_model_and_its_gap_is_fairlearns(done):
    x, f, predictions, evidence = done; train, test = f["split"] == "train", f["split"] == "test"
    plain = make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[train], f["label"][train]).predict_proba(x[test])[:, 1]; got = predictions.of("none")
    np.testing.assert_allclose(got["y_prob"], plain); at = evidence.frame.set_index(["metric", "variant"])
    gap = MetricFrame(metrics=true_positive_rate, y_true=f["label"][test], y_pred=plain >= .2, sensitive_features=f["g"][test]).difference()
    assert at.loc[("true_positive_rate_gap", "none"), "value"] == pytest.approx(gap) and at.loc[("auroc", "none"), "value"] == pytest.approx(roc_auc_score(f["label"][test], plain))
    tp, fp, n = ((plain >= .2) & (f["label"][test] == 1)).sum(), ((plain >= .2) & (f["label"][test] == 0)).sum(), test.sum()
    assert at.loc[("net_benefit", "none"), "value"] == pytest.approx(tp / n - fp / n / 4)

def test_planted_gap_is_narrowed_and_differences_add_up(done):
    *_, predictions, evidence = done; at = evidence.frame.set_index(["metric", "variant"]); assert at.loc[("true_positive_rate_gap", "none"), "low"] > 0
    for m in ("threshold optimizer", "group recalibration"): assert at.loc[("true_positive_rate_gap_difference", f"{m} - none"), "high"] < 0
    for k in ("auroc", "net_benefit", "sensitivity", "true_positive_rate_gap"):
        for m in METHODS: assert m == "none" or at.loc[(f"{k}_difference", f"{m} - none"), "value"] == pytest.approx(at.loc[(k, m), "value"] - at.loc[(k, "none"), "value"])
    assert predictions.frame["alert"].between(0, 1).all() and set(predictions.of("reweighing")["alert"]) == {0, 1}
    assert all("no risk" in at.loc[("auroc", m), "limitation"] for m in RISKLESS) and "Threshold optimizer" in message_mitigation(evidence) or "Group recalibration" in message_mitigation(evidence)
    assert mitigation_plot(evidence).get_legend() is not None

def test_test_labels_do_not_reach_the_predictions():
    x, f = planted(800, 1); turned = f.assign(label=np.where(f["split"] == "test", 1 - f["label"], f["label"])); wanted = ["reweighing", "threshold optimizer", "group recalibration"]
    one, two = (compare_mitigations(x, k, "g", methods=wanted, n_boot=20)[0].frame for k in (f, turned)); np.testing.assert_array_equal(one["y_prob"], two["y_prob"]); np.testing.assert_array_equal(one["alert"], two["alert"])

def test_edges():
    x, f = planted(600, 2); x.iloc[::7, 0] = np.nan; f.loc[f.index % 11 == 0, "g"] = None; f.loc[f.index[:3], "g"] = "rare"
    predictions, evidence = compare_mitigations(x, f, "g", methods=["threshold optimizer", "group recalibration"], n_boot=20); test = f[f["split"] == "test"]
    assert "groups fitted together" in evidence.frame["limitation"].iloc[0] and list(predictions.of("none")["g"].fillna("-")) == list(test["g"].fillna("-")) and predictions.frame["y_prob"].notna().all()
    alone = compare_mitigations(x, f.assign(g="a"), "g", methods=["reweighing"], n_boot=20)[1].frame.set_index(["metric", "variant"])
    assert "fewer than two groups" in alone.loc[("true_positive_rate_gap", "none"), "limitation"] and alone.loc[("auroc", "none"), "value"] > .5
    sided = compare_mitigations(x, f.assign(label=np.where(f["split"] == "test", 0, f["label"])), "g", methods=[], n_boot=20)[1].frame.set_index("metric")
    assert np.isnan(sided.loc["auroc", "value"]) and "one outcome class" in sided.loc["auroc", "limitation"] and message_mitigation is not None

@pytest.mark.parametrize("change, error", [(dict(group="h"), TableError), (dict(threshold=1.), ParameterError), (dict(measure="auroc"), ParameterError), (dict(methods=["magic"]), ParameterError)])
def test_what_does_not_fit_is_refused(change, error):
    x, f = planted(100)
    with pytest.raises(error): compare_mitigations(x, f, **(dict(group="g") | change))

def test_tables_that_do_not_fit_are_refused():
    x, f = planted(100)
    with pytest.raises(TableError, match="same rows"): compare_mitigations(x[:50], f, "g")
    with pytest.raises(TableError, match="validation rows"): compare_mitigations(x, f.assign(split=f["split"].replace("validation", "train")), "g")
    with pytest.raises(TableError, match="label on every row"): compare_mitigations(x, f.assign(label=f["label"].where(f.index > 3)), "g")
    with pytest.raises(TableError, match="no mitigation"): mitigation_plot(compare_mitigations(x, f, "g", methods=[], n_boot=20)[1])
