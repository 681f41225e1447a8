"Agreement between raters against published tables, peer libraries and hand computation."
from functools import partial
import krippendorff, numpy as np, pandas as pd, pytest
from sklearn.metrics import cohen_kappa_score
from clinllm.core.errors import TableError
from clinllm.evaluation.agreement import ICC_FORMS, agreement, by_item, cohen_kappa, gwet_ac1, gwet_ac2, icc, krippendorff_alpha, percent_agreement

def random_table(seed, items=25, raters=4, top=5, holes=.2):
    rng = np.random.default_rng(seed); x = np.clip(rng.integers(1, top + 1, (items, 1)) + rng.integers(-1, 2, (items, raters)), 1, top).astype(float)
    x[rng.random(x.shape) < holes] = np.nan
    return pd.DataFrame(x, columns=[f"rater: {i}" for i in range(raters)])

def ones(frame): return np.ones((1, len(frame)))

def repeat(frame, v): return frame.iloc[np.repeat(np.arange(len(frame)), v.astype(int))]

# R package irrCAC 1.0, README: distrib.6raters, six raters by category
PSYCHIATRISTS = [[0, 0, 0, 6, 0], [0, 3, 0, 0, 3], [0, 1, 4, 0, 1], [0, 0, 0, 0, 6], [0, 3, 0, 3, 0], [2, 0, 4, 0, 0], [0, 0, 4, 0, 2], [2, 0, 3, 1, 0],
                 [2, 0, 0, 4, 0], [0, 0, 0, 0, 6], [1, 0, 0, 5, 0], [1, 1, 0, 4, 0], [0, 3, 3, 0, 0], [1, 0, 0, 5, 0], [0, 2, 0, 3, 1]]

def test_six_psychiatrists_as_published():
    frame = pd.DataFrame([np.repeat(range(5), row) for row in PSYCHIATRISTS], columns=[f"rater: {i}" for i in range(6)])
    assert percent_agreement(frame, ones(frame))[0] == pytest.approx(.5511111, abs=5e-8)
    assert gwet_ac1(frame, ones(frame))[0] == pytest.approx(.4448007, abs=5e-8)
    assert krippendorff_alpha(frame, ones(frame), "nominal")[0] == pytest.approx(.4204384, abs=5e-8)

@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_equals_the_peer_also_on_drawn_items(level):
    for seed in range(5):
        frame = random_table(seed); w = np.random.default_rng(seed).integers(0, 3, (4, len(frame))).astype(float)
        peer = [krippendorff.alpha(reliability_data=repeat(frame, v).T.to_numpy(), level_of_measurement=level) for v in w]
        np.testing.assert_allclose(krippendorff_alpha(frame, w, level), peer, atol=1e-10)
        np.testing.assert_allclose(krippendorff_alpha(frame, w, level, scale=range(1, 7)), peer, atol=1e-10)       # a grade that nobody used

def test_alpha_of_measurements_equals_the_peer_and_needs_little_memory():
    x = np.random.default_rng(0).normal(size=(40, 1)) + np.random.default_rng(1).normal(size=(40, 3)); frame = pd.DataFrame(x, columns=["rater: a", "rater: b", "rater: c"])
    for level in ("interval", "ordinal"):       # 120 different values: 2,000 tables of coincidences would be 230 MB at once
        assert krippendorff_alpha(frame, np.ones((2000, 40)), level)[-1] == pytest.approx(krippendorff.alpha(reliability_data=x.T, level_of_measurement=level))

@pytest.mark.parametrize("weights, theirs", [("none", None), ("linear", "linear"), ("quadratic", "quadratic")])
def test_kappa_equals_scikit_learn_with_weights_of_items(weights, theirs):
    frame = random_table(3, raters=2, holes=0); w = np.random.default_rng(1).integers(0, 4, (6, len(frame))).astype(float)
    a, b = frame["rater: 0"], frame["rater: 1"]
    np.testing.assert_allclose(cohen_kappa(frame, w, weights, range(1, 6)), [cohen_kappa_score(a, b, labels=range(1, 6), weights=theirs, sample_weight=v) for v in w])

def test_kappa_of_three_raters_is_the_mean_over_pairs_on_items_both_rated():
    frame = random_table(4, raters=3); pairs = [("0", "1"), ("0", "2"), ("1", "2")]
    both = [frame[[f"rater: {i}", f"rater: {j}"]].dropna() for i, j in pairs]
    assert cohen_kappa(frame, ones(frame))[0] == pytest.approx(np.mean([cohen_kappa_score(d.iloc[:, 0], d.iloc[:, 1]) for d in both]))

def test_ac2_by_hand():
    frame = pd.DataFrame({"rater: a": [1, 2, 3], "rater: b": [1, 3, 1]})         # quadratic likeness on 1..3: 1, 3/4 a step apart, 0 two steps apart
    observed, share = (1 + .75 + 0) / 3, np.array([3, 1, 2]) / 6
    expected = (3 + 4 * .75) / (3 * 2) * (share * (1 - share)).sum()
    assert gwet_ac2(frame, ones(frame))[0] == pytest.approx((observed - expected) / (1 - expected))

def test_icc_on_drawn_items_equals_the_analysis_of_variance_of_the_copies():
    frame = random_table(7, holes=0); w = np.random.default_rng(2).integers(0, 3, (3, len(frame))).astype(float)
    for form in ICC_FORMS:
        np.testing.assert_allclose(icc(frame, w, form), [icc(d := repeat(frame, v), ones(d), form)[0] for v in w])
    x = frame.to_numpy(); n, k = x.shape; ms_row = k * x.mean(1).var(ddof=1); ms_col = n * x.mean(0).var(ddof=1)
    ms_err = ((x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()) ** 2).sum() / ((n - 1) * (k - 1))
    assert icc(frame, ones(frame), "2,1")[0] == pytest.approx((ms_row - ms_err) / (ms_row + (k - 1) * ms_err + k * (ms_col - ms_err) / n))

def test_icc_drops_items_with_a_hole_and_says_so():
    frame = random_table(8, holes=.1); full = frame.dropna()
    assert icc(frame, ones(frame))[0] == pytest.approx(icc(full, ones(full))[0])
    tidy = frame.rename(columns=lambda c: c[7:]).rename_axis("item").reset_index().melt("item", var_name="rater", value_name="rating")
    row = agreement(tidy, n_boot=30).frame.set_index("metric").loc["icc_2_1"]
    assert row["n"] == len(full) and f"of {len(frame)} items that not every rater rated" in row["limitation"]

def test_perfect_and_absent_agreement():
    same = pd.DataFrame({"rater: a": [1, 2, 3, 4, 5], "rater: b": [1, 2, 3, 4, 5]})
    for f in (percent_agreement, cohen_kappa, gwet_ac1, gwet_ac2, krippendorff_alpha, icc): assert f(same, ones(same))[0] == pytest.approx(1)
    rng = np.random.default_rng(0); noise = pd.DataFrame(rng.integers(1, 6, (4000, 3)), columns=["rater: a", "rater: b", "rater: c"])
    for f in (cohen_kappa, gwet_ac1, gwet_ac2, krippendorff_alpha, icc): assert abs(f(noise, ones(noise))[0]) < .05
    assert percent_agreement(noise, ones(noise))[0] == pytest.approx(.2, abs=.02)

@pytest.mark.parametrize("rows", [[], [("a", "x", 3)], [("a", "x", 3), ("b", "x", 2)], [("a", "x", 3), ("a", "y", 3)], [("a", "x", np.nan), ("a", "y", np.nan)]])
def test_too_little_to_say_is_missing_with_a_reason(rows):
    found = agreement(pd.DataFrame(rows, columns=["item", "rater", "rating"]), scale=[1, 2, 3, 4, 5], n_boot=20).frame
    assert (found.loc[found["value"].isna(), "limitation"].str.contains("undefined")).all() and found["low"].isna().all()

def test_items_of_one_patient_are_drawn_together():
    x = random_table(1, items=60, holes=0); tidy = x.rename(columns=lambda c: c[7:]).rename_axis("item").reset_index().melt("item", var_name="rater", value_name="rating")
    copies = pd.concat([tidy.assign(item=tidy["item"] + 100 * i, subject_id=tidy["item"]) for i in range(6)])
    width = lambda t: agreement(t, n_boot=300).frame.set_index("metric").loc["krippendorff_alpha"].pipe(lambda r: r["high"] - r["low"])
    assert width(copies) == pytest.approx(width(tidy), rel=.3) and width(copies.drop(columns="subject_id")) < .6 * width(copies)

def test_words_need_an_order_unless_nominal():
    tidy = pd.DataFrame(dict(item=[1, 1, 2, 2], rater=["a", "b"] * 2, rating=["low", "low", "high", "middle"]))
    with pytest.raises(TableError, match="order"): agreement(tidy, n_boot=20)
    named = agreement(tidy, scale=["low", "middle", "high"], n_boot=20).frame.set_index("metric"); numbered = agreement(tidy.assign(rating=[0., 0, 2, 1]), scale=[0, 1, 2], n_boot=20).frame.set_index("metric")
    np.testing.assert_allclose(named["value"], numbered["value"])
    assert agreement(tidy, "nominal", n_boot=20).frame.set_index("metric").loc["percent_agreement", "value"] == .5
    with pytest.raises(TableError, match="rating 'middle'"): agreement(tidy, scale=["low", "high"], n_boot=20)
    with pytest.raises(TableError, match="level"): agreement(tidy, "ratio")
    with pytest.raises(TableError, match="mixed"): agreement(tidy.assign(rating=["low", 1, 2, 3]), "nominal", n_boot=20)
