"Accuracy against scikit-learn, hand-made tables and published figures."
import json
import numpy as np, pandas as pd, pytest
from sklearn.metrics import f1_score as sklearn_f1, jaccard_score
from sklearn.preprocessing import MultiLabelBinarizer
from clinllm.core.errors import ParameterError, TableError
from clinllm.core.tables import Predictions
from clinllm.evaluation.accuracy import at_threshold, classification, compare, compare_all, discrimination, f1_score, multilabel, plain, verdicts
from clinllm.evaluation.statistics import WORST, difference, auroc, bootstrap, pair, simulate

def said(texts, truth, variant="model", status="ok", **more):
    n = len(truth); return Predictions(pd.DataFrame(dict(subject_id=range(n), prediction_time=pd.Timestamp("2024-01-01"), variant=variant, text=texts, reference=truth, status=status, **more)))

def values(evidence): return evidence.frame.set_index(["metric", "group"])["value"]

def test_pubmedqa_majority_and_human_are_as_published(shared_data):
    "Jin et al. 2019: always 'yes' 55.20 and 23.71; one annotator who had to reason without the conclusion 78.00 and 72.19"
    truth = json.loads((shared_data / "pubmedqa" / "test_ground_truth.json").read_text()); every = json.loads((shared_data / "pubmedqa" / "ori_pqal.json").read_text())
    human = [every[k]["reasoning_required_pred"] for k in truth]
    for texts, published in ((["yes"] * 500, (55.20, 23.71)), (human, (78.00, 72.19))):
        f = values(classification(said(texts, list(truth.values())), n_boot=20)); assert (round(100 * f["accuracy", "all"], 2), round(100 * f["macro_f1", "all"], 2)) == published

@pytest.mark.parametrize("seed", [0, 1])
def test_classification_equals_scikit_learn_with_weights(seed):
    rng = np.random.default_rng(seed); labels = ["yes", "no", "maybe"]; truth, answer = rng.choice(labels, 90, p=[.6, .3, .1]), rng.choice([*labels, "dunno"], 90); w = rng.integers(1, 4, 90).astype(float)
    f = values(classification(said(answer, truth, weight=w), n_boot=20))
    assert f["accuracy", "all"] == pytest.approx(np.average(truth == answer, weights=w))
    assert f["macro_f1", "all"] == pytest.approx(sklearn_f1(truth, answer, labels=labels, average="macro", sample_weight=w))
    assert f["micro_f1", "all"] == pytest.approx(sklearn_f1(truth, answer, average="micro", sample_weight=w))
    for label, score in zip(labels, sklearn_f1(truth, answer, labels=labels, average=None, sample_weight=w)):
        if (truth == label).sum() >= 10: assert f["f1_score", f"label: {label}"] == pytest.approx(score)

def test_rare_labels_and_free_text_get_no_row_of_their_own():
    truth = ["yes"] * 30 + [f"a sentence on patient {i}" for i in range(9)]; found = classification(said(truth, truth), n_boot=20).frame
    assert set(found["group"]) == {"all", "label: yes"} and not found.astype(str).apply(lambda c: c.str.contains("patient \\d")).any().any()

@pytest.mark.parametrize("seed", [0, 1])
def test_multilabel_equals_scikit_learn(seed):
    rng = np.random.default_rng(seed); codes = [f"I{k}.9" for k in range(6)]; draw = lambda pool: [set(rng.choice(pool, rng.integers(1, 4), replace=False)) for _ in range(50)]
    truth, answer = draw(codes[:5]), draw(codes); join = lambda sets: [" ; ".join(sorted(s)) for s in sets]; known = sorted(set().union(*truth)); b = MultiLabelBinarizer(classes=codes); t, a = b.fit_transform(truth), b.transform(answer)
    f = values(multilabel(said(join(answer), join(truth)), n_boot=20))
    assert f["micro_f1", "all"] == pytest.approx(sklearn_f1(t, a, average="micro"))                              # a code never in the reference is a false alarm
    assert f["macro_f1", "all"] == pytest.approx(sklearn_f1(t[:, :len(known)], a[:, :len(known)], average="macro"))
    assert f["jaccard", "all"] == pytest.approx(jaccard_score(t, a, average="samples")) and f["exact_match", "all"] == pytest.approx((t == a).all(1).mean())

def test_multilabel_edges():
    nothing = values(multilabel(said(["", "A"], ["", "A"]), n_boot=20)); assert nothing["exact_match", "all"] == nothing["jaccard", "all"] == nothing["micro_f1", "all"] == 1
    empty = multilabel(said(["", ""], ["", ""]), n_boot=20).frame.set_index("metric"); assert np.isnan(empty.loc["micro_f1", "value"]) and "undefined" in empty.loc["micro_f1", "limitation"]
    assert values(multilabel(said(["A;A;a", "B"], ["A", "B"]), n_boot=20))["exact_match", "all"] == 1
    assert values(multilabel(said(["A|B"], ["B|A"]), separator="|", n_boot=20))["exact_match", "all"] == 1

def test_refused_answers_are_left_out_and_shown_as_wrong():
    p = said(["yes", "no", None, None], ["yes", "yes", "no", "no"], status=["ok", "ok", "refused", "error"]); f = values(classification(p, n_boot=20)); g = classification(p, n_boot=20).frame
    assert f["accuracy", "all"] == 1/2 and f["accuracy", WORST] == 1/4 and "2 of 4 rows were not ok and are left out" in g["limitation"][0]
    nobody = said([None] * 3, ["a", "b", "a"], status="refused"); f = values(classification(nobody, n_boot=20)); assert np.isnan(f["accuracy", "all"]) and f["accuracy", WORST] == f["macro_f1", WORST] == 0
    with pytest.raises(TableError, match="reference"): classification(simulate(20))

@pytest.mark.parametrize("text, answer", [(" Yes. ", "yes"), ("**MAYBE**", "maybe"), ('"No"\n', "no"), ("I50.9", "i50.9"), (None, ""), (np.nan, ""), ("(B)", "b"), ("two  words", "two words")])
def test_plain(text, answer): assert plain(text) == answer

def test_f1_equals_scikit_learn_and_is_missing_where_undefined():
    p = simulate(150); f = at_threshold(p, [.2, .4], n_boot=30).frame.set_index(["metric", "variant", "group"])["value"]
    for t in (.2, .4): frame = p.of("noisy"); assert f["f1_score", "noisy", f"threshold {t:.2f}"] == pytest.approx(sklearn_f1(frame["label"], frame["y_prob"] >= t))
    w = np.random.default_rng(0).random((3, 150)); np.testing.assert_allclose(f1_score(.3)(frame, w), [sklearn_f1(frame["label"], frame["y_prob"] >= .3, sample_weight=v) for v in w])
    healthy = at_threshold(Predictions(frame.assign(label=0)), .99, n_boot=30).frame.set_index("metric").loc["f1_score"]; assert np.isnan(healthy["value"]) and "undefined" in healthy["limitation"]
    with pytest.raises(ParameterError, match="between 0 and 1"): at_threshold(p, [.2, 1.2])

def test_thresholds_count_weights_and_failures():
    frame = pd.DataFrame(dict(subject_id=range(4), prediction_time=pd.Timestamp("2024-01-01"), variant="v", label=[1, 1, 0, 0], y_prob=[.9, .1, .2, np.nan], status=["ok", "ok", "ok", "refused"], weight=[3., 1, 1, 1]))
    f = values(at_threshold(Predictions(frame), .5, n_boot=20)); assert f["sensitivity", "threshold 0.50"] == 3/4 and f["specificity", "threshold 0.50"] == 1
    assert f["specificity", f"threshold 0.50; {WORST}"] == 1/2 and f["positive_predictive_value", f"threshold 0.50; {WORST}"] == 3/4

def test_prevalence_stands_beside_auprc():
    frame = simulate(200).of("noisy"); f = values(discrimination(Predictions(frame), n_boot=30)); assert f["prevalence", "all"] == pytest.approx(frame["label"].mean())
    w = np.where(frame["label"] == 1, 3., 1.); g = discrimination(Predictions(frame.assign(weight=w, y_prob=.5)), n_boot=30).frame.set_index("metric")["value"]
    assert g["auprc"] == pytest.approx(g["prevalence"]) and g["prevalence"] == pytest.approx(np.average(frame["label"], weights=w))

def test_compare_keeps_its_first_row_and_adds_three():
    p = simulate(200); f = compare(p, "true risk", "noisy", n_boot=100).frame; both = pair(p.of("true risk"), p.of("noisy")); e = bootstrap(both, difference(auroc), 100)
    assert f["metric"].tolist() == ["auroc_difference", "auroc_difference_p", "auroc_difference_minimum_detectable"] and tuple(f.loc[0, ["value", "low", "high"]]) == e[:3]
    assert f["value"][2] == pytest.approx((1.959964 + .841621) * (e.high - e.low) / (2 * 1.959964), rel=1e-5) and 1/101 <= f["value"][1] < .05
    same = verdicts(compare(p, "noisy", "noisy", n_boot=50)); assert same["verdict"][0] == "tie" and same["p"][0] == 1

def test_failures_take_the_difference_away():
    "A method that refuses every patient it would have ranked wrongly looks better until its refusals count"
    frame = simulate(200).frame; hard = (frame["variant"] == "noisy") & ((frame["y_prob"] > .5) != (frame["label"] == 1)); frame.loc[hard, ["status", "y_prob"]] = ["refused", np.nan]
    f = compare(Predictions(frame), "noisy", "true risk", n_boot=100).frame; v = verdicts(f).set_index("group")["verdict"]
    assert v["all"] == "better" and v[WORST] == "worse" and f"{hard.sum()} of noisy" in f["limitation"].iloc[-1]

def test_many_comparisons_are_adjusted_and_one_class_is_missing():
    p = simulate(150); f = compare_all(p, "true risk", n_boot=100).frame; ps, adjusted = (f.loc[f["metric"] == m, "value"].to_numpy() for m in ("auroc_difference_p", "auroc_difference_p_holm"))
    assert len(ps) == 3 and adjusted.min() == pytest.approx(min(1, 3 * ps.min())) and (adjusted >= ps).all()
    sick = compare_all(Predictions(p.frame.assign(label=1)), "true risk", n_boot=30).frame; assert sick["value"].isna().all() and (sick["limitation"] != "").all()
    assert (verdicts(sick)["verdict"] == "too small to say").all()
    with pytest.raises(TableError, match="there is none"): compare_all(Predictions(p.of("noisy")), "noisy")
