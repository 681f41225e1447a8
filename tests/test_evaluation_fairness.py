"Fairness against a peer library, direct computation, the truth of simulations, and at its edges."
import time
import numpy as np, pandas as pd, pytest
from fairlearn.metrics import MetricFrame, false_positive_rate, selection_rate, true_positive_rate
from scipy.special import expit
from sklearn.metrics import brier_score_loss, precision_score, roc_auc_score
from clinllm.core.errors import ParameterError, TableError
from clinllm.core.tables import Predictions
from clinllm.evaluation import fairness as module
from clinllm.evaluation.calibration import calibration_intercept, calibration_slope
from clinllm.evaluation.fairness import MEASURES, fairness, fairness_forest, fairness_table, message_fairness_forest, pairs, withheld
from clinllm.evaluation.statistics import WORST, resamples, simulate

def table(y, p, g, **more):
    n = len(y)
    return Predictions(pd.DataFrame(dict(subject_id=np.arange(n), prediction_time=pd.Timestamp("2024-01-01"), variant="m", label=y, y_prob=p, g=g) | more))

def drawn(n=600, groups=3, seed=0, shift=0.):
    "Groups of equal risk; `shift` is taken from the logit that is stated for group 0"
    rng = np.random.default_rng(seed); g = rng.integers(0, groups, n); x = rng.normal(-1, 1.2, n)
    return table((rng.random(n) < expit(x)).astype(int), expit(x - shift * (g == 0)), np.array(list("abcdefgh"))[g])

def at(evidence): return evidence.frame.set_index(["metric", "group"]).sort_index()

def test_values_gaps_and_ratios_equal_fairlearn():
    p = drawn(900); f = p.frame.assign(y_prob=p.frame["y_prob"].round(2)); hit = (f["y_prob"] >= .3).astype(int); found = at(fairness(Predictions(f), "g", threshold=.3, n_boot=20))
    peers = {"true_positive_rate": true_positive_rate, "false_positive_rate": false_positive_rate, "selection_rate": selection_rate, "positive_predictive_value": precision_score}
    by = {m: MetricFrame(metrics=fn, y_true=f["label"], y_pred=hit, sensitive_features=f["g"]) for m, fn in peers.items()}
    by["auroc"], by["brier_loss"] = (MetricFrame(metrics=fn, y_true=f["label"], y_pred=f["y_prob"], sensitive_features=f["g"]) for fn in (roc_auc_score, brier_score_loss))
    for m, peer in by.items():
        for g in "abc": assert found.loc[(m, f"g: {g}"), "value"] == pytest.approx(peer.by_group[g])
        assert found.loc[(f"{m}_gap", "g"), "value"] == pytest.approx(peer.difference()) and found.loc[(f"{m}_ratio", "g"), "value"] == pytest.approx(peer.ratio())

@pytest.mark.parametrize("weights", [False, True])
def test_group_resamples_equal_direct_computation(weights):
    "The sorted sums against scikit-learn, resample by resample, with ties, repeated patients and weights"
    rng = np.random.default_rng(1); p = simulate(120, rows=2); f = p.of("noisy"); f["y_prob"] = f["y_prob"].round(1); f["weight"] = rng.integers(1, 5, len(f)) if weights else 1
    rows = module._Sorted(f, "language", .3); got = module._resampled(rows, MEASURES, 25, 7); w = np.concatenate(list(resamples(f["subject_id"], 25, 7))) * f["weight"].to_numpy()
    for i, g in enumerate(rows.names):
        k = (f["language"] == g).to_numpy(); part = f[k]; y, hit = part["label"].to_numpy(), (part["y_prob"] >= .3).to_numpy()
        for b, line in enumerate(w[:, k]):
            if len(set(y[line > 0])) < 2: assert np.isnan(got["auroc"][1][b, i]); continue
            assert got["auroc"][1][b, i] == pytest.approx(roc_auc_score(y, part["y_prob"], sample_weight=line))
            assert got["brier_loss"][1][b, i] == pytest.approx(np.average((y - part["y_prob"]) ** 2, weights=line))
            assert got["false_positive_rate"][1][b, i] == pytest.approx(np.average(hit[y == 0], weights=line[y == 0]))
        np.testing.assert_allclose(got["calibration_slope"][1][:, i], calibration_slope(part, w[:, k]), rtol=1e-8, atol=1e-8)

def test_series_for_large_groups_equals_the_exact_fit(monkeypatch):
    f = simulate(4000, seed=3).of("overconfident"); rows = module._Sorted(f, "sex", .2); found = []; wanted = ["calibration_intercept", "calibration_slope"]
    for exact in (10**9, 0):
        monkeypatch.setattr(module, "EXACT_ROWS", exact); found.append(module._resampled(rows, wanted, 60, 1))
    for m in wanted:
        np.testing.assert_array_equal(found[0][m][0], found[1][m][0])
        assert abs(found[0][m][1] - found[1][m][1]).max() < .01 * found[0][m][1].std()

def test_gap_interval_reaches_zero_when_groups_are_alike_and_finds_a_large_gap():
    held, sure, seen = 0, 0, 0
    for s in range(30):
        rng = np.random.default_rng(s); g, y = np.arange(400) % 4, (rng.random(400) < .3).astype(int)
        for blind in (False, True):
            x = rng.normal(y * (1.5 if not blind else np.where(g == 0, 0, 2.5)))
            found = at(fairness(table(y, expit(x), g.astype(str)), "g", n_boot=200, seed=s, measures="auroc")); e = found.loc[("auroc_gap", "g")]
            held += not blind and e["low"] == 0; seen += blind and e["low"] > 0; sure += not blind and found.loc[("auroc_gap_p", "g"), "value"] < .05
            assert e["low"] <= e["value"] <= e["high"] and (not blind or "worst of 4 groups: 0" in found.loc[("auroc_worst", "g"), "limitation"])
    assert held >= 27 and seen >= 27 and sure <= 4

def test_group_interval_covers_the_truth_and_a_planted_shift_is_found_in_calibration_only():
    covered = 0
    for s in range(80):
        f = at(fairness(drawn(600, 3, s, shift=.8), "g", n_boot=100, seed=s, measures=["auroc", "calibration_intercept"])); e = f.loc[("calibration_intercept", "g: a")]
        covered += e["low"] <= .8 <= e["high"]
    assert 69 <= covered <= 80
    one = at(fairness(drawn(3000, 3, 1, shift=.8), "g", n_boot=200))
    assert one.loc[("calibration_intercept_gap", "g"), "low"] > .3 and one.loc[("calibration_intercept_gap_p", "g"), "value"] < .05 and one.loc[("auroc_gap", "g"), "low"] == 0
    assert "worst of 3 groups: a" in one.loc[("calibration_intercept_worst", "g"), "limitation"] and ("selection_rate_worst", "g") not in one.index

def test_pairs_are_differences_with_holm():
    p = drawn(1500, 4, 2, shift=1.5); groups, two = at(fairness(p, "g", n_boot=200)), at(pairs(p, "g", "true_positive_rate", n_boot=200))
    assert len(two.loc["true_positive_rate_difference"]) == 6
    for a, b in (("a", "b"), ("b", "d")):
        e = two.loc[("true_positive_rate_difference", f"g: {a} - {b}")]
        assert e["value"] == pytest.approx(groups.loc[("true_positive_rate", f"g: {a}"), "value"] - groups.loc[("true_positive_rate", f"g: {b}"), "value"]) and e["low"] <= e["value"] <= e["high"]
    found = two.loc["true_positive_rate_difference_p", "value"]; raw = two.loc["true_positive_rate_difference_p", "limitation"].str.extract(r"; ?([\d.e-]+) before")[0].astype(float)
    assert (found >= raw - 5e-4).all() and found[[f"g: a - {b}" for b in "bcd"]].max() < .05 < found["g: b - c"]
    assert found.min() == pytest.approx(raw.min() * 6, rel=.02)

def test_crossed_columns_and_a_missing_group():
    f = simulate(400).of("noisy"); f.loc[f.index[:60], "sex"] = None; found = at(fairness(Predictions(f), [("sex", "language")], n_boot=20, measures="selection_rate"))
    inside = f["sex"].isna() & (f["language"] == "English")
    assert found.loc[("selection_rate", "sex x language: unknown, English"), "value"] == pytest.approx((f.loc[inside, "y_prob"] >= .2).mean())

def test_failures_are_shown_by_group_and_as_wrong():
    f = drawn(600, 2).frame; lost = (f["g"] == "a") & (f.index % 3 == 0); f.loc[lost, ["y_prob", "status"]] = [np.nan, "refused"]; found = at(fairness(Predictions(f), "g", n_boot=60))
    assert found.loc[("answered_rate", "g: a"), "value"] == pytest.approx(1 - lost.sum() / (f["g"] == "a").sum()) and found.loc[("answered_rate", "g: b"), "value"] == 1
    assert found.loc[("auroc_gap", f"g; {WORST}"), "value"] > .1 > found.loc[("auroc_gap", "g"), "value"] and "counted as wrong" in found.loc[("auroc_gap", f"g; {WORST}"), "limitation"]
    f[["y_prob", "status"]] = [np.nan, "refused"]; gone = fairness(Predictions(f), "g", n_boot=20).frame
    assert gone.loc[gone["metric"] == "auroc_gap", "limitation"].str.contains("no rows were answered").any() and gone["value"].isna().sum() >= len(MEASURES)

def test_edges_are_missing_and_say_so():
    rng = np.random.default_rng(0); sided = fairness(table(np.zeros(60, int), rng.random(60), ["a", "b"] * 30), "g", n_boot=20)
    assert at(sided).loc[("auroc", "g: a"), "limitation"] == "withheld: fewer than 10 events" and at(sided).loc[("selection_rate", "g: a"), "value"] > 0
    lone = fairness(table([1], [.5], ["a"]), "g", n_boot=20).frame; assert lone["value"].isna().all() and (lone["n"] == 0).any() and (lone["limitation"] != "").all()
    tied = at(fairness(table(np.tile([0, 1], 100), np.full(200, .4), np.repeat(["a", "b"], 100)), "g", n_boot=20))
    assert tied.loc[("auroc", "g: a"), "value"] == .5 and tied.loc[("auroc_gap", "g"), "value"] == 0 and np.isnan(tied.loc[("calibration_slope", "g: a"), "value"])
    quiet = at(fairness(table(np.tile([0, 1], 100), np.full(200, .1), np.repeat(["a", "b"], 100)), "g", n_boot=20))
    assert quiet.loc[("true_positive_rate_ratio", "g"), "limitation"].count("all values are 0") == 1 and quiet.loc[("positive_predictive_value", "g: a"), "limitation"] == "withheld: fewer than 10 alerts"
    single = at(fairness(drawn(200, 1), "g", n_boot=20)); assert "fewer than two groups" in single.loc[("auroc_gap", "g"), "limitation"]
    assert "one group only" in pairs(drawn(200, 1), "g", n_boot=20).frame["limitation"][0]

def test_settings_of_small_cells():
    p = drawn(120, 3); strict, loose = (at(fairness(p, "g", n_boot=20, measures="auroc", min_cell=c, min_events=e)) for c, e in ((60, 10), (5, 1)))
    assert strict.loc["auroc", "value"].isna().all() and loose.loc["auroc", "value"].notna().all()
    assert withheld(p.frame.head(5), "selection_rate", min_cell=5) == "" and "patients" in withheld(p.frame.head(4), "selection_rate", min_cell=5)

def test_wrong_names_are_refused():
    p = drawn(100)
    with pytest.raises(ParameterError, match="Did you mean 'auroc'"): fairness(p, "g", measures=["auroq"])
    with pytest.raises(TableError, match="group column"): fairness(p, ["g", ("g", "sxe")])
    with pytest.raises(ParameterError, match="threshold"): pairs(p, "g", threshold=1)
    with pytest.raises(TableError, match="variant"): fairness_table(fairness(p, "g", n_boot=20), "auroc", "n")

def test_figure_says_what_the_numbers_say():
    found = fairness(drawn(900, 3, 1, shift=1.5), "g", n_boot=200, threshold=.3); text = message_fairness_forest(found, "true_positive_rate")
    t = fairness_table(found, "true_positive_rate"); assert list(t["group"]) == ["a", "b", "c"] and f"a {t['value'][0]:.2f}" in text and text.endswith("more than chance")
    ax = fairness_forest(found, "true_positive_rate"); assert " ".join(ax.get_title(loc="left").split()) == text and len(ax.collections) >= 3
    assert message_fairness_forest(fairness(drawn(30), "g", n_boot=20), "auroc").startswith("No two groups")

def test_speed_at_20_000_patients():
    p = drawn(20_000, 6); start = time.process_time(); fairness(p, "g", n_boot=200, measures=MEASURES[:3]); assert time.process_time() - start < 3
