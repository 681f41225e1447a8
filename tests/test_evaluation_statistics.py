"Intervals against formulas, published examples, a peer library and the truth of simulations."
import numpy as np, pandas as pd, pytest
from scipy.special import expit
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score
from clinllm.core.errors import TableError
from clinllm.core.tables import Predictions
from clinllm.evaluation.statistics import answered, auprc, auroc, bootstrap, cautions, measure, pair, paired_difference, resamples, simulate, wilson

def delong(y, p):
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
    assert se == pytest.approx(delong(frame["label"].to_numpy(), frame["y_prob"].to_numpy()), rel=.1)

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
