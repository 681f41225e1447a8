"Intervals against formulas, published examples, a peer library and the truth of simulations."
import numpy as np, pandas as pd, pytest
from scipy.special import expit
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score
from clinllm.core.errors import ParameterError, TableError
from clinllm.core.tables import Estimate, Predictions
from clinllm.evaluation.statistics import (VERDICTS, WORST, Distance, answered, auprc, auroc, bca_levels, benjamini_hochberg, bootstrap, bootstrap_many, brier_loss, cautions,
    delong, delong_difference, difference, holm, leave_out, measure, minimum_detectable_difference, pair, paired_difference, permutation_test, resamples, simulate, verdict, wilson, worst_case)

def by_hand(y, p):
    "Standard error of the AUROC, DeLong et al. 1988, equation by equation"
    pos, neg = p[y == 1], p[y == 0]; wins = (pos[:, None] > neg) + .5 * (pos[:, None] == neg)
    return np.sqrt(wins.mean(1).var(ddof=1) / len(pos) + wins.mean(0).var(ddof=1) / len(neg))

@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weighted_scores_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed); n = 150
    frame = pd.DataFrame(dict(label=rng.integers(0, 2, n), y_prob=rng.choice([rng.random(), .1, .2, .5, .9], n))); w = rng.integers(0, 5, (30, n)).astype(float)
    np.testing.assert_allclose(auroc(frame, w), [roc_auc_score(frame["label"], frame["y_prob"], sample_weight=v) for v in w])
    np.testing.assert_allclose(auprc(frame, w), [average_precision_score(frame["label"], frame["y_prob"], sample_weight=v) for v in w])

@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bootstrap_standard_error_agrees_with_delong(seed):
    frame = simulate(400, seed=seed).of("noisy")
    se = np.concatenate([auroc(frame, w) for w in resamples(frame["subject_id"], 1500, seed)]).std()
    assert se == pytest.approx(by_hand(frame["label"].to_numpy(), frame["y_prob"].to_numpy()), rel=.1)

def test_paired_standard_error_is_smaller_than_unpaired():
    p = simulate(400); both = paired_difference(p, "true risk", "noisy"); a, b = (bootstrap(p.of(v), auroc) for v in ("true risk", "noisy"))
    width = lambda e: e.high - e.low
    assert width(both) < np.hypot(width(a), width(b))

def test_coverage_when_patients_repeat():
    "Scores one standard deviation apart: AUROC is Phi(1/sqrt 2). With three equal rows a patient, drawing patients holds it as promised, drawing rows does not"
    truth, held = norm.cdf(1 / np.sqrt(2)), np.zeros(2)
    for s in range(150):
        rng = np.random.default_rng(s); y = (np.arange(100) % 3 == 0).astype(int)
        frame = pd.DataFrame(dict(subject_id=range(100), label=y, y_prob=expit(rng.normal(y)))); frame = pd.concat([frame] * 3, ignore_index=True).assign(row=range(300))
        for i, cluster in enumerate(("subject_id", "row")):
            e = bootstrap(frame, auroc, 200, s, cluster); held[i] += e.low < truth < e.high
    assert .90 <= held[0] / 150 <= .99 and held[1] / 150 < .85, held / 150

def test_same_resamples_for_any_order_of_rows_and_any_block():
    frame = simulate(80, rows=2).of("noisy"); shuffled = frame.sample(frac=1, random_state=0)
    assert bootstrap(frame, auroc, 100)[:3] == pytest.approx(bootstrap(shuffled, auroc, 100)[:3])

def test_tiny_and_one_sided_data_are_missing_and_say_so():
    frame = simulate(50).of("noisy")
    for part in (frame[:0], frame[:1], frame[frame["label"] == 1]):
        e = bootstrap(part, auroc, 50); assert np.isnan(e.value) and cautions(part, e)
    two = bootstrap(pd.DataFrame(dict(subject_id=[1, 2], label=[0, 1], y_prob=[.2, .8])), auroc, 100)
    assert two.value == 1 and np.isnan(two.low)
    nobody = Predictions(frame.assign(status="refused", y_prob=np.nan))
    found = measure(nobody, "clinical accuracy", {"auroc": auroc}, n_boot=20).frame
    assert found["limitation"][0] == "50 of 50 rows were not ok and are left out; undefined: no rows were answered" and found["n"][0] == 0

def test_pairs_need_the_same_labels_and_a_known_metric():
    p = simulate(50); a, b = answered(p, "noisy")[0], answered(p, "constant")[0]
    with pytest.raises(TableError, match="same labels"): pair(a, b.assign(label=1 - b["label"]))
    with pytest.raises(TableError, match="Did you mean 'brier_loss'"): paired_difference(p, "noisy", "constant", metric="brier")

@pytest.mark.parametrize("p", [.02, .2, .5])
def test_wilson_keeps_its_promise(p):
    rng = np.random.default_rng(0); held = sum(e.low <= p <= e.high for e in (wilson(rng.random(60) < p) for _ in range(400)))
    assert held / 400 >= .92
    repeated = wilson(np.repeat([1, 0, 1], 5), np.repeat([1, 2, 3], 5)); assert repeated[1:3] == pytest.approx(wilson([1, 0, 1])[1:3])

def test_thousand_resamples_of_five_variants_are_quick():
    import time
    p = simulate(600); start = time.perf_counter()
    for v in [*p.variants, "noisy"]: bootstrap(p.of(v), auroc, 1000)
    assert time.perf_counter() - start < 20      # about 0.3 s on an idle machine; the bound is for a busy one

def test_delong_equals_the_definition_with_ties_and_in_a_pair():
    "Every positive against every negative, as DeLong et al. wrote it, on probabilities with many ties"
    rng = np.random.default_rng(3); n = 90; y = (rng.random(n) < .4).astype(int); a, b = (np.round(expit(rng.normal(y * d)), 1) for d in (1, .5))
    frame = pd.DataFrame(dict(label=y, y_prob=a, y_prob_b=b, subject_id=range(n))); e, (d, p) = delong(frame), delong_difference(frame)
    assert e.value == pytest.approx(roc_auc_score(y, a)) and (e.high - e.low) / 2 / norm.ppf(.975) == pytest.approx(by_hand(y, a))
    win = lambda s: (s[y == 1][:, None] > s[y == 0]) + .5 * (s[y == 1][:, None] == s[y == 0]); w = win(a) - win(b)
    se = np.sqrt(w.mean(1).var(ddof=1) / y.sum() + w.mean(0).var(ddof=1) / (n - y.sum()))
    assert (d.value, d.low) == pytest.approx((w.mean(), w.mean() - norm.ppf(.975) * se)) and p == pytest.approx(2 * norm.sf(abs(w.mean()) / se))

def test_delong_at_the_edges():
    frame = pd.DataFrame(dict(subject_id=range(4), label=[0, 0, 0, 1], y_prob=[.1, .2, .3, .4], y_prob_b=[.1, .2, .3, .4]))
    assert delong(frame).value == 1 and np.isnan(delong(frame).low) and np.isnan(delong(frame[:3]).value) and np.isnan(delong(frame[:1]).value)
    assert np.isnan(delong_difference(frame)[1]) or delong_difference(frame)[1] == 1
    with pytest.raises(TableError, match="weight"): delong(frame.assign(weight=[1, 2, 3, 4]))

def test_bca_equals_scipy_on_the_same_resamples():
    from scipy.stats import bootstrap as peer
    x = np.random.default_rng(5).lognormal(size=30); frame = pd.DataFrame(dict(subject_id=range(30), x=x)); mean = lambda f, w: w @ f["x"].to_numpy() / w.sum(1)
    drawn = np.concatenate([mean(frame, w) for w in resamples(range(30), 999)]); jack = np.concatenate([mean(frame, w) for w in leave_out(range(30))])
    theirs = peer((x,), np.mean, n_resamples=0, method="BCa", bootstrap_result=type("R", (), {"bootstrap_distribution": drawn})()).confidence_interval
    np.testing.assert_allclose(np.quantile(drawn, bca_levels(x.mean(), drawn, jack)), theirs, rtol=1e-6)
    np.testing.assert_allclose(np.sort(jack), np.sort([(x.sum() - v) / 29 for v in x]))
    assert bca_levels(0., np.zeros(50), np.zeros(9)) == pytest.approx((.025, .975))       # nothing is skewed where nothing varies

def test_many_patients_are_left_out_in_groups_and_each_once():
    w = np.vstack(list(leave_out(np.repeat(np.arange(1000), 2), groups=50, cells=4000)))
    assert w.shape == (50, 2000) and ((w == 0).sum(0) == 1).all() and (w[:, ::2] == w[:, 1::2]).all()

def test_bca_holds_the_truth_more_often_where_percentiles_do_not():
    held, y = dict(percentile=0, bca=0), (np.arange(40) % 3 == 0).astype(int)
    for s in range(150):
        frame = pd.DataFrame(dict(subject_id=range(40), label=y, y_prob=expit(np.random.default_rng(s).normal(norm.ppf(.9) * np.sqrt(2) * y))))
        for m in held: e = bootstrap(frame, auroc, 300, s, method=m); held[m] += e.low <= .9 <= e.high
    assert held["bca"] > held["percentile"] and held["bca"] / 150 >= .92, held

def test_a_distance_keeps_its_interval_under_bca():
    frame = simulate(100).of("noisy"); gap = Distance(lambda f, w: np.c_[brier_loss(f, w), brier_loss(f, w) * .9], lambda parts: np.ptp(parts, axis=1))
    assert bootstrap(frame, gap, 100, method="bca") == bootstrap(frame, gap, 100)
    with pytest.raises(ParameterError, match="Did you mean 'bca'"): bootstrap(frame, auroc, method="bcaa")

def test_weights_are_copies_of_rows():
    frame = simulate(120).of("noisy"); k = np.random.default_rng(0).integers(1, 4, 120); copies = frame.loc[frame.index.repeat(k)].reset_index(drop=True); weighted = frame.assign(weight=k.astype(float))
    both = dict(auroc=auroc, auprc=auprc, brier_loss=brier_loss); a, b = bootstrap_many(weighted, both, 100), bootstrap_many(copies, both, 100)
    for m in both: assert a[m][:3] == pytest.approx(b[m][:3])                       # patients are drawn whole, so even the intervals agree
    e, f = wilson(frame["label"], weights=k), wilson(copies["label"], copies["subject_id"]); assert e[:3] == pytest.approx(f[:3])
    tenth, plain = bootstrap(frame.assign(weight=.1), auroc, 50), bootstrap(frame, auroc, 50); assert tenth[:3] == pytest.approx(plain[:3])

def test_statistics_sorted_once_equal_those_sorted_each_time():
    "The same figures whether a statistic is called with a frame or prepared, with fractional weights and ties"
    rng = np.random.default_rng(1); frame = pd.DataFrame(dict(label=rng.integers(0, 2, 60), y_prob=rng.integers(0, 6, 60) / 6, y_prob_b=rng.random(60))); w = rng.random((7, 60)) * (rng.random((7, 60)) < .7)
    for f, peer in ((auroc, roc_auc_score), (auprc, average_precision_score)):
        np.testing.assert_allclose(f.on(frame)(w), [peer(frame["label"], frame["y_prob"], sample_weight=v) for v in w])
        np.testing.assert_allclose(difference(f)(frame, w), f(frame, w) - f(frame.assign(y_prob=frame["y_prob_b"]), w))
    assert np.isnan(auprc(frame.assign(label=0), w)).all() and np.isnan(auroc(frame.assign(label=1), w)).all()

def test_permutation_test_is_exact_in_the_limit_and_swaps_patients_whole():
    "All 2^5 swaps of five patients written down; a patient's two rows go together"
    from itertools import product
    frame = pd.DataFrame(dict(subject_id=[0, 0, 1, 2, 3, 4], label=[0, 1, 0, 1, 1, 0], y_prob=[.2, .7, .4, .9, .6, .5], y_prob_b=[.3, .2, .8, .6, .4, .45]))
    def gain(swap):
        s = np.array(swap, bool)[frame["subject_id"]]; a, b = frame["y_prob"], frame["y_prob_b"]
        return roc_auc_score(frame["label"], np.where(s, b, a)) - roc_auc_score(frame["label"], np.where(s, a, b))
    every = np.array([gain(s) for s in product([0, 1], repeat=5)]); exact = (abs(every) >= abs(every[0]) - 1e-12).mean()
    assert permutation_test(frame, auroc, 5000) == pytest.approx(exact, abs=.03)

def test_permutation_test_keeps_its_level_when_scales_differ():
    found = 0
    for s in range(120):
        rng = np.random.default_rng(s); y = (np.arange(90) % 3 == 0).astype(int); shared = rng.normal(size=90); a, b = (y + .6 * shared + .8 * rng.normal(size=90) for _ in range(2))
        found += permutation_test(pd.DataFrame(dict(subject_id=range(90), label=y, y_prob=expit(a), y_prob_b=expit(4 * b - 3))), auroc, 99, s, by_rank=True) <= .05
    assert found / 120 <= .11

def test_adjusted_p_values_equal_statsmodels():
    from statsmodels.stats.multitest import multipletests
    p = np.random.default_rng(0).random(20) ** 3; p[3] = p[4]
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1]); np.testing.assert_allclose(benjamini_hochberg(p), multipletests(p, method="fdr_bh")[1])
    holes = np.r_[p, np.nan]; assert np.isnan(holm(holes)[-1]) and holm(holes)[:-1] == pytest.approx(holm(p)) and len(holm([])) == 0 and np.isnan(benjamini_hochberg([np.nan])).all()

@pytest.mark.parametrize("low, high, up, said", [(.001, .01, True, "better"), (.001, .01, False, "worse"), (-.02, .02, True, "tie"), (-.02, .03, True, "too small to say"),
                                                 (0, 0, True, "tie"), (0, .5, True, "too small to say"), (np.nan, np.nan, True, "too small to say")])
def test_verdict(low, high, up, said): assert said in VERDICTS and verdict(Estimate(0, low, high), higher_is_better=up) == said

def test_minimum_detectable_difference_is_found_as_often_as_promised():
    "A mean difference of exactly that size is significant in 80% of normal studies"
    se = .1; e = Estimate(0, -norm.ppf(.975) * se, norm.ppf(.975) * se); d = minimum_detectable_difference(e)
    assert (abs(np.random.default_rng(0).normal(d, se, 20_000)) > norm.ppf(.975) * se).mean() == pytest.approx(.8, abs=.01)
    assert minimum_detectable_difference(e, power=.9) > d and np.isnan(minimum_detectable_difference(Estimate(.1)))
    with pytest.raises(ParameterError, match="power"): minimum_detectable_difference(e, power=80)

def test_failures_are_shown_left_out_and_as_wrong():
    frame = simulate(60).of("true risk"); frame.loc[:5, ["status", "y_prob"]] = ["refused", np.nan]; p = Predictions(frame); worst = worst_case(p, "true risk")
    f = measure(p, "clinical accuracy", {"auroc": auroc}, n_boot=30).frame.set_index("group")
    assert f.loc[WORST, "value"] == pytest.approx(roc_auc_score(worst["label"], worst["y_prob"])) and f.loc[WORST, "value"] < f.loc["all", "value"]
    assert (f.loc["all", "n"], f.loc[WORST, "n"]) == (54, 60) and "6 of 60 rows were not ok and are counted as wrong" in f.loc[WORST, "limitation"]
    nobody = Predictions(frame.assign(status="refused", y_prob=np.nan)); f = measure(nobody, "clinical accuracy", {"auroc": auroc}, n_boot=30).frame.set_index("group")
    assert np.isnan(f.loc["all", "value"]) and f.loc[WORST, "value"] == 0
    writes = Predictions(frame.assign(text="yes", y_prob=np.nan)); assert worst_case(writes, "true risk").empty        # it writes text, so no probability can be wrong

def test_rows_without_a_label_are_left_out_and_counted():
    frame = simulate(30).of("noisy").assign(reference="yes"); frame["label"] = frame["label"].astype(float); frame.loc[:3, "label"] = np.nan
    rows, said = answered(Predictions(frame), "noisy"); assert len(rows) == 26 and said == "4 of 30 rows had no label and are left out" and rows["label"].dtype == "int64"

def test_measure_takes_rows_of_ones_own():
    p = simulate(60); own = p.of("noisy").drop(columns="label").assign(score=np.arange(60) / 59); mean = lambda f, w: w @ f["score"].to_numpy() / w.sum(1)
    f = measure(p, "clinical accuracy", {"score": mean}, 50, frames={"noisy": (own, "said")}).frame
    assert f["value"].tolist() == [pytest.approx(.5)] and f["variant"].tolist() == ["noisy"] and f["limitation"][0] == "said"
