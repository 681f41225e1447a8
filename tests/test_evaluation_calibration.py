"Calibration against statsmodels, scikit-learn, published parts of the Brier loss, hand computation and known truth."
import numpy as np, pandas as pd, pytest, statsmodels.api as sm
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.isotonic import isotonic_regression
from sklearn.metrics import brier_score_loss
from clinllm.core.errors import ParameterError, TableError
from clinllm.core.tables import Predictions
from clinllm.evaluation.calibration import (E50, E90, METHODS, _irls, _smooth, _splines, brier_parts, brier_statistics, calibration, integrated_calibration_index,
    isotonic, observed_expected, platt, recalibrate, reliability, scaled_brier, smooth_curve, temperature)
from clinllm.evaluation.statistics import bootstrap, brier_loss, resamples, simulate

def table(p, y, start=0, **columns):
    return Predictions(pd.DataFrame(dict(subject_id=np.arange(len(p)) + start, prediction_time="2024-01-01", variant="x", y_prob=p, label=y, **columns)))

def test_reliability_equals_scikit_learns_quantile_bins():
    p = simulate(500); f = p.of("noisy"); observed, predicted = calibration_curve(f["label"], f["y_prob"], n_bins=7, strategy="quantile")
    got = reliability(p, "noisy", 7)
    np.testing.assert_allclose(got["predicted"], predicted, atol=.003); np.testing.assert_allclose(got["observed"], observed, atol=.02)      # one row may lie on either side of an edge

def test_brier_parts_of_rounded_forecasts_are_murphys():
    "Murphy's own case: forecasts of a few values, bins of equal forecasts, no part within bins"
    rng = np.random.default_rng(0); p = rng.integers(0, 11, 400) / 10; y = (rng.random(400) < p ** 1.5).astype(int); f = table(p, y).frame; one = np.ones((1, 400))
    got = {m: v[0] for m, v in brier_parts(f, one, bins=400).items()}; by = f.groupby("y_prob")["label"].agg(["mean", "size"]); share = by["size"] / 400
    assert got["reliability"] == pytest.approx((share * (by.index - by["mean"]) ** 2).sum()) and got["resolution"] == pytest.approx((share * (by["mean"] - y.mean()) ** 2).sum())
    assert got["uncertainty"] == pytest.approx(y.mean() * (1 - y.mean())) and got["within_bins"] == pytest.approx(0, abs=1e-12)
    assert got["reliability"] - got["resolution"] + got["uncertainty"] == pytest.approx(brier_score_loss(y, p))

@pytest.mark.parametrize("bins", [1, 3, 10])
def test_brier_parts_sum_to_the_loss_with_any_bins_and_weights(bins):
    f = simulate(200, rows=2).of("noisy"); w = next(resamples(f["subject_id"], 30)) * np.random.default_rng(1).uniform(.2, 3, len(f))
    got = brier_parts(f, w, bins)
    np.testing.assert_allclose(got["reliability"] - got["resolution"] + got["uncertainty"] + got["within_bins"], brier_loss(f, w), atol=1e-12)
    assert (got["reliability"] >= 0).all() and (got["resolution"] >= 0).all() and np.allclose(scaled_brier(f, w), 1 - brier_loss(f, w) / got["uncertainty"])

def test_evidence_has_the_parts_squared_and_old_rows_unchanged():
    p = Predictions(simulate(200).of("noisy")); found = calibration(p, n_boot=100).frame.set_index("metric"); f, one = p.frame, np.ones((1, 200))
    for m in ("reliability", "resolution", "uncertainty", "within_bins"): assert found.loc[f"brier_{m}", "value"] == pytest.approx(brier_parts(f, one)[m][0])
    root = bootstrap(f, brier_statistics(10)["brier_reliability"], 100); assert found.loc["brier_reliability", "high"] == pytest.approx(root.high ** 2) and found.loc["brier_reliability", "low"] == pytest.approx(root.low ** 2)
    alone = bootstrap(f, E90, 100); assert found.loc["e90", ["value", "low", "high"]].tolist() == pytest.approx(list(alone[:3]))      # what is shared is not mixed up
    assert found.loc["observed_expected", "value"] == pytest.approx(f["label"].sum() / f["y_prob"].sum())

def test_spline_fit_equals_statsmodels_on_each_resample():
    f = simulate(150, rows=2).of("noisy"); x = logit(f["y_prob"].to_numpy()); y = f["label"].to_numpy(); X = _splines(x, np.quantile(x, (.05, .35, .65, .95))); w = next(resamples(f["subject_id"], 5))
    assert X.shape == (300, 4)
    for beta, v in zip(_irls(X, w * y, w), w):
        peer = sm.GLM(y, X, family=sm.families.Binomial(), freq_weights=v).fit(tol=1e-12); np.testing.assert_allclose(X @ beta, X @ peer.params, atol=1e-5)

def test_splines_are_straight_beyond_the_outer_knots_and_smooth_inside():
    x = np.linspace(-5, 5, 2001); X = _splines(x, [-2, -1, 1, 2]); bend = np.diff(X, 2, axis=0) / .005 ** 2; out = (abs(x[1:-1]) > 2.01)
    assert abs(bend[out]).max() < 1e-6 and abs(np.diff(bend, axis=0)).max() < .05          # the second derivative has no jump

def test_index_is_zero_when_calibrated_and_known_when_not():
    big = simulate(20_000); one = np.ones((1, 20_000))
    assert [d(big.of("true risk"), one)[0] < .015 for d in (integrated_calibration_index, E50, E90)] == [True] * 3
    f = big.of("overconfident"); gap = abs(expit(logit(f["y_prob"]) / 2) - f["y_prob"])       # the truth: half the logit
    assert [d(f, one)[0] for d in (integrated_calibration_index, E50, E90)] == pytest.approx([gap.mean(), gap.median(), gap.quantile(.9)], abs=.01)
    low = [bootstrap(simulate(250, seed=s).of("true risk"), integrated_calibration_index, 40, s).low for s in range(16)]; assert np.mean(np.array(low) == 0) >= .88

def test_weights_act_like_copies():
    f = simulate(120).of("noisy"); copies = np.random.default_rng(0).integers(1, 4, 120); many = f.loc[f.index.repeat(copies)].reset_index(drop=True); w = copies[None].astype(float); one = np.ones((1, len(many)))
    for s in (observed_expected, scaled_brier): assert s(f, w)[0] == pytest.approx(s(many, one)[0])
    knots = np.quantile(logit(f["y_prob"]), (.05, .35, .65, .95)); p, fitted, _ = _smooth(f, w)
    peer = sm.GLM(many["label"], _splines(logit(many["y_prob"].to_numpy()), knots), family=sm.families.Binomial()).fit(tol=1e-12).fittedvalues
    np.testing.assert_allclose(np.interp(many["y_prob"], p, fitted[0]), peer, atol=1e-5)
    weighted, plain = Predictions(f.assign(weight=copies.astype(float))), Predictions(f)
    assert reliability(weighted, "noisy", 3)["observed"].tolist() != reliability(plain, "noisy", 3)["observed"].tolist()
    assert smooth_curve(Predictions(f.assign(weight=2.)), "noisy", 40).equals(smooth_curve(Predictions(f.assign(weight=1.)), "noisy", 40))

def test_band_covers_the_truth():
    held = []
    for s in range(24):
        c = smooth_curve(simulate(300, seed=s), "overconfident", n_boot=80, seed=s); middle = c[c["predicted"].between(.1, .8)]; truth = expit(logit(middle["predicted"]) / 2)
        held.append(((middle["low"] <= truth) & (truth <= middle["high"])).mean())
    assert .90 <= np.mean(held) <= .985

def test_few_distinct_predictions_still_have_a_curve():
    rng = np.random.default_rng(0)
    for values in ([.3], [0., 1.], [.1, .5, .9], [.1, .1, .1, .2]):
        p = rng.choice(values, 200); f = table(p, (rng.random(200) < .3).astype(int)); c = smooth_curve(f, "x", 40)
        assert len(c) and c.notna().all().all() and integrated_calibration_index(f.frame, np.ones((1, 200)))[0] < 1
    separated = table([.1, .2, .3, .7, .8, .9], [0, 0, 0, 1, 1, 1]); assert smooth_curve(separated, "x", 40).empty and np.isnan(integrated_calibration_index(separated.frame, np.ones((1, 6)))[0])
    sided = calibration(table([.1, .2, .4], [0, 0, 0]), n_boot=20).frame.set_index("metric"); assert sided.loc[["observed_expected", "scaled_brier", "e50"], "value"].isna().all()

def test_temperature_and_isotonic_equal_their_peers():
    f = simulate(400).of("overconfident"); w = np.random.default_rng(0).integers(1, 4, 400); new = np.array([0, .01, .3, .7, .999, 1])
    slope = sm.GLM(f["label"], logit(f["y_prob"].to_numpy())[:, None], family=sm.families.Binomial(), freq_weights=w).fit().params.iloc[0]
    np.testing.assert_allclose(temperature(f["y_prob"], f["label"], w)(f["y_prob"]), expit(slope * logit(f["y_prob"])), atol=1e-5)
    order = np.argsort(f["y_prob"]); np.testing.assert_allclose(isotonic(f["y_prob"], f["label"], w)(f["y_prob"])[order], isotonic_regression(f["label"].to_numpy(float)[order], sample_weight=w[order]))
    for m, learn in METHODS.items():
        got = learn(f["y_prob"], f["label"])(new); assert np.isfinite(got).all() and (np.diff(got) >= 0).all() and ((0 <= got) & (got <= 1)).all(), m
        np.testing.assert_allclose(learn(f["y_prob"], f["label"], np.full(400, 7.))(new), got, atol=1e-6)

def test_recalibration_learns_from_validation_only_by_each_method():
    every = simulate(600).frame; early = every["subject_id"] < 300; validation, test = Predictions(every[early]), Predictions(every[~early])
    for m in METHODS:
        mended = recalibrate(validation, test, " (new)", m); flipped = recalibrate(validation, Predictions(test.frame.assign(label=1 - test.frame["label"])), " (new)", m)
        np.testing.assert_array_equal(mended.frame["y_prob"], flipped.frame["y_prob"]); assert mended.variants == [v + " (new)" for v in test.variants]
    np.testing.assert_array_equal(recalibrate(validation, test).frame["y_prob"], recalibrate(validation, test, method="platt").frame["y_prob"])
    with pytest.raises(ParameterError, match="Did you mean 'temperature'"): recalibrate(validation, test, method="temprature")
    with pytest.raises(TableError, match="other patients"): recalibrate(validation, validation, method="isotonic")
