"Calibration, fairness, robustness and outcomes against hand computations and peer libraries."
import numpy as np, pandas as pd, pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from clinllm.core.tables import Predictions
from clinllm.evaluation.accuracy import at_threshold, compare, discrimination
from clinllm.evaluation.calibration import _newton, calibration, calibration_intercept, calibration_slope, expected_calibration_error, platt, recalibrate, reliability
from clinllm.evaluation.fairness import by_group, fairness
from clinllm.evaluation.outcomes import net_benefit
from clinllm.evaluation.robustness import robustness
from clinllm.evaluation.statistics import bootstrap, brier_loss, resamples, simulate

def test_newton_equals_scikit_learn_on_each_resample():
    frame = simulate(200).of("noisy"); x, w = logit(frame["y_prob"].to_numpy()), next(resamples(frame["subject_id"], 8))
    a, b = _newton(frame["label"].to_numpy(), x, w)
    for i in range(8):
        peer = LogisticRegression(C=np.inf, tol=1e-10).fit(x[:, None], frame["label"], sample_weight=w[i])
        assert (a[i], b[i]) == pytest.approx((peer.intercept_[0], peer.coef_[0, 0]), abs=1e-3)

@pytest.mark.parametrize("shift, scale", [(0, 1), (1, 1), (0, 2), (-.5, .5)])
def test_known_miscalibration_is_found(shift, scale):
    frame = simulate(20_000).of("true risk"); frame["y_prob"] = expit(scale * logit(frame["y_prob"]) + shift); one = np.ones((1, len(frame)))
    assert calibration_slope(frame, one)[0] == pytest.approx(1 / scale, rel=.06)
    if scale == 1: assert calibration_intercept(frame, one)[0] == pytest.approx(-shift, abs=.06)

def test_certain_and_wrong_probabilities_do_not_break_it():
    p = Predictions(simulate(100).of("noisy").assign(y_prob=lambda d: (d["y_prob"] > .5).astype(float)))
    frame = calibration(p, n_boot=50).frame
    assert frame["value"].notna().all() and np.isfinite(frame["value"]).all()
    assert brier_loss(p.frame, np.ones((1, 100)))[0] == pytest.approx(brier_score_loss(p.frame["label"], p.frame["y_prob"]))

def test_calibration_error_interval_reaches_zero_when_calibrated():
    low = [bootstrap(simulate(300, seed=s).of("true risk"), expected_calibration_error(10), 100, s).low for s in range(30)]
    assert np.mean(np.array(low) == 0) >= .9

def test_one_class_or_nobody_is_missing_with_a_reason():
    p = simulate(60).of("noisy"); gone = Predictions(p.assign(y_prob=np.nan, status="error")); sided = Predictions(p.assign(label=0))
    for evidence in (calibration(gone, n_boot=20), discrimination(gone, n_boot=20), calibration(sided, n_boot=20), discrimination(sided, n_boot=20), at_threshold(gone, .2),
                     fairness(sided, "sex", n_boot=20), net_benefit(gone, n_boot=20), net_benefit(sided, n_boot=20), robustness(gone, {"typos 5%": gone}, n_boot=20)):
        assert (evidence.frame.loc[evidence.frame["value"].isna(), "limitation"] != "").all()
    assert reliability(gone, "noisy").empty and len(fairness(gone, "sex", n_boot=20)) >= 0

def test_recalibration_learns_from_validation_only_and_keeps_ranks():
    both = simulate(1000).frame; early = both["subject_id"] < 500; validation, test = Predictions(both[early]), Predictions(both[~early])
    mended = recalibrate(validation, test)
    flipped = recalibrate(validation, Predictions(test.frame.assign(label=1 - test.frame["label"])))
    np.testing.assert_array_equal(mended.frame["y_prob"], flipped.frame["y_prob"])
    assert (mended.of("noisy")["y_prob"].rank() == test.of("noisy")["y_prob"].rank()).all()

def test_platt_equals_his_targets_fitted_by_scikit_learn():
    frame = simulate(300).of("noisy"); x, y = logit(frame["y_prob"].to_numpy())[:, None], frame["label"].to_numpy(); pos, neg = y.sum(), (1 - y).sum()
    t = np.where(y == 1, (pos + 1) / (pos + 2), 1 / (neg + 2))          # a target t is t of a positive and 1 - t of a negative
    peer = LogisticRegression(C=np.inf, tol=1e-10).fit(np.vstack([x, x]), np.repeat([1, 0], len(y)), sample_weight=np.r_[t, 1 - t])
    np.testing.assert_allclose(platt(frame["y_prob"], y)(frame["y_prob"]), peer.predict_proba(x)[:, 1], atol=1e-3)

def test_accuracy_counts_failures_and_compares_common_rows():
    frame = simulate(100).frame; frame.loc[:4, ["status", "y_prob"]] = ["unparsed", np.nan]; p = Predictions(frame)
    found = discrimination(p, n_boot=50).frame.query("group == 'all'").set_index(["metric", "variant"])
    assert found.loc[("auroc", "true risk"), "n"] == 95 and "5 of 100 rows were not ok" in found.loc[("auroc", "true risk"), "limitation"]
    assert compare(p, "true risk", "noisy", n_boot=50).frame["n"][0] == 95

def test_fairness_equals_fairlearn_and_hides_small_cells():
    p = simulate(600); frame = p.of("noisy"); frame["language"] = frame["language"].where(frame.index >= 7, "rare"); frame.loc[frame.index[10:40], "sex"] = None
    found = fairness(Predictions(frame), ["sex", "language"], threshold=.3, n_boot=60).frame.set_index(["metric", "group"])
    peer = by_group(frame, "sex", .3).by_group
    assert "unknown" in peer.index
    for m in ("true_positive_rate", "selection_rate"):
        for g in ("Female", "Male"): assert found.loc[(m, f"sex: {g}"), "value"] == pytest.approx(peer.loc[g, m])
    rare = found.loc[("selection_rate", "language: rare")]
    assert np.isnan(rare["value"]) and rare["n"] == 0 and "n <11" in rare["limitation"] and rare["limitation"].startswith("withheld")
    hidden = found.loc["selection_rate"]; assert hidden["limitation"].str.contains("n not shown").sum() == 1
    assert "biased upward" in found.loc[("auroc_gap", "language"), "limitation"]

def test_net_benefit_by_hand_and_paired_gain():
    "Vickers & Elkin 2006: NB = TP/n - FP/n * pt/(1 - pt); 1,000 patients, prevalence 20%, counts as in a 2 x 2 table"
    rows = dict(subject_id=range(1000), prediction_time=pd.Timestamp("2024-01-01"), variant="test", status="ok",
                label=np.repeat([1, 1, 0, 0], [160, 40, 240, 560]), y_prob=np.repeat([.9, .1, .9, .1], [160, 40, 240, 560]))
    found = net_benefit(Predictions(pd.DataFrame(rows)), [.25], n_boot=200).frame.set_index(["metric", "variant"])
    assert found.loc[("net_benefit", "test"), "value"] == pytest.approx(.16 - .24 / 3)                  # 0.08
    assert found.loc[("net_benefit", "treat all"), "value"] == pytest.approx(.2 - .8 / 3)               # below 0, so no one is the better default
    assert found.loc[("net_benefit_gain", "test"), "value"] == pytest.approx(.08)
    assert found.loc[("alerts_per_100", "test"), "value"] == pytest.approx(40) and found.loc[("number_needed_to_evaluate", "test"), "value"] == pytest.approx(2.5)
    e = found.loc[("net_benefit", "test")]; values = np.repeat([1, 0, -1 / 3, 0], [160, 40, 240, 560])  # a mean: the normal interval is the oracle
    assert e["high"] - e["low"] == pytest.approx(2 * 1.96 * values.std() / np.sqrt(1000), rel=.15)
