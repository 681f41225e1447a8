"ROUGE, chrF, BLEU and similarity against rouge_score, published figures and hand computation."
import os, random
import numpy as np, pandas as pd, pytest
from clinllm.core.errors import TableError
from clinllm.core.tables import Predictions
from clinllm.evaluation.text import FAILURES, ROUGE, bleu, chrf, compare_texts, rouge, similarity, text_quality

SYSTEMS = {"longest speaker turn": "longest_speaker_turn", "longest doctor turn": "longest_doctor_turn", "12 speaker turns": "12_speaker_turns", "12 doctor turns": "12_doctor_turns",
    "transcript": "transcript", "trainUMLS": "UMLS_similarity", "trainsent": "spacy_similarity", "BART": "BART_large|full", "BART + FT_SAMSum": "bart-large-xsum-samsum|full",
    "BART + FT_SAMSum (Division)": "bart-large-xsum-samsum|division_combined", "BioBART": "BioBART|full", "BioBART (Division)": "BioBART|division_combined", "LED": "LED|full",
    "LED (Division)": "LED|division_combined", "LED + FT_pubMed": "LED_pubmed|full"}       # row of table 6: released file

def released(folder, system):
    "References and outputs of one system of ACI-Bench"
    name, _, kind = SYSTEMS[system].partition("|")
    out = pd.read_csv(folder / "predictions" / f"{name}_clinicalnlp_taskB_test1{'_' + kind if kind else ''}.csv")
    right = pd.read_csv(folder / "clinicalnlp_taskB_test1.csv").set_index("encounter_id")["note"]
    return right[out["encounter_id"]].tolist(), out["note"].tolist()

@pytest.fixture(scope="module")
def aci(shared_data):
    if not (shared_data / "aci-bench" / "predictions").is_dir(): pytest.skip("ACI-Bench's released predictions are not there")
    return shared_data / "aci-bench"

def peer(references, outputs):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(list(ROUGE), use_stemmer=False)
    return pd.DataFrame([{k: v.fmeasure for k, v in scorer.score(a, b).items()} for a, b in zip(references, outputs)])[list(ROUGE)]

@pytest.mark.parametrize("system", SYSTEMS)
def test_published_figures_of_aci_bench(aci, system):
    "Table 6 of Yim et al. 2023 to two decimals"
    published = pd.read_csv(aci / "expected_table6.csv").set_index("model").loc[system]
    found = 100 * rouge(*released(aci, system)).mean()
    assert [f"{found[m]:.2f}" for m in published.index] == [f"{v:.2f}" for v in published]

@pytest.mark.parametrize("system", SYSTEMS)
def test_equals_rouge_score_on_real_notes(aci, system):
    "The shortest pairs of each system; all 600 with CLINLLM_FULL=1 (more than a minute)"
    a, b = released(aci, system); k = None if os.environ.get("CLINLLM_FULL") else 3
    take = sorted(range(len(a)), key=lambda i: len(a[i]) * len(b[i]))[:k]; a, b = ([t[i] for i in take] for t in (a, b))
    np.testing.assert_allclose(rouge(a, b), peer(a, b), rtol=0, atol=1e-9)

def test_equals_rouge_score_where_ties_decide():
    "Few different words make many longest subsequences; lines may be empty"
    rng = random.Random(1); line = lambda: " ".join(rng.choice("abcde"[:rng.randint(1, 5)]) for _ in range(rng.randint(0, 12)))
    a, b = (["\n".join(line() for _ in range(rng.randint(0, 6))) for _ in range(1500)] for _ in range(2))
    np.testing.assert_allclose(rouge(a, b), peer(a, b), rtol=0, atol=1e-9)

def test_equals_rouge_score_on_odd_texts():
    odd = ["", " ", "\n\n", "•\n– °", "Größe 37,5 °C", "İstanbul fever", "FEVER\r\nfever", "a\tb\x0bc", "x" * 50, "no\nno\nno no", "١٢٣ 123", "1 2 1 2 1"]
    a, b = zip(*[(x, y) for x in odd for y in odd])
    np.testing.assert_allclose(rouge(a, b), peer(a, b), rtol=0, atol=1e-9)

def test_chrf_and_bleu_are_those_of_sacrebleu_and_known_examples():
    sacrebleu = pytest.importorskip("sacrebleu")
    assert chrf(["the cat"], ["the dog"])[0] == pytest.approx(sacrebleu.CHRF().sentence_score("the dog", ["the cat"]).score / 100)
    # 7 words against 7: 6 of 7, 4 of 6, 2 of 5, 1 of 4 n-grams shared, no brevity penalty
    assert bleu(["a b c d e f g"], ["a b c d x f g"])[0] == pytest.approx((6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** .25)
    assert len(chrf([], [])) == len(bleu([], [])) == len(rouge([], [])) == len(similarity([], [], None)) == 0

def test_similarity_is_a_cosine():
    vectors = {"a": [3, 4], "b": [4, 3], "c": [-3, -4], "zero": [0, 0]}; embed = lambda texts: np.array([vectors[t] for t in texts])
    np.testing.assert_allclose(similarity(["a", "a", "a", "a"], ["a", "b", "c", "zero"], embed), [1, .96, -1, np.nan])

def table(texts, references, status=None, **more):
    n = len(texts)
    return Predictions(pd.DataFrame(dict(subject_id=range(n), prediction_time=pd.Timestamp("2024-01-01"), variant="v", text=texts, reference=references, status=status or ["ok"] * n) | more))

def value(evidence, metric, group="all"):
    return evidence.frame.query("metric == @metric and group == @group").iloc[0]

def test_failures_missing_references_and_weights():
    p = table(["no fever", None, "no fever", None], ["no fever", "cough", None, None], ["ok", "error", "ok", "refused"], label=1)
    e = text_quality(p, n_boot=50)
    assert value(e, "rouge1")["value"] == 1 and value(e, "rouge1")["n"] == 1 and value(e, "rouge1", FAILURES)["value"] == .5
    assert "1 of 4 rows were not ok" in value(e, "rouge1")["limitation"] and "2 of 4 rows had no reference" in value(e, "rouge1")["limitation"]
    heavy = text_quality(table(["no fever", "cough"], ["no fever", "fever"], weight=[3., 1.]), n_boot=50)
    assert value(heavy, "rouge1")["value"] == pytest.approx(.75)

def test_nobody_answered_and_a_single_row():
    gone = text_quality(table([None, None], ["a", "b"], ["refused", "error"]), n_boot=50)
    assert np.isnan(value(gone, "bleu")["value"]) and "no rows" in value(gone, "bleu")["limitation"] and value(gone, "bleu", FAILURES)["value"] == 0
    single = value(text_quality(table(["a b"], ["a c"]), n_boot=50), "rouge1")
    assert single["value"] == .5 and np.isnan(single["low"]) and "no interval" in single["limitation"]

def test_interval_draws_patients():
    rng = np.random.default_rng(0); refs = [" ".join(rng.choice(list("abcdef"), 8)) for _ in range(60)]; outs = [" ".join(rng.choice(list("abcdef"), 8)) for _ in range(60)]
    once = table(outs, refs); thrice = Predictions(pd.concat([once.frame.assign(prediction_time=pd.Timestamp(f"2024-01-0{d}")) for d in (1, 2, 3)]))
    a, b = (value(text_quality(p, n_boot=200), "rouge2") for p in (once, thrice))
    assert a["high"] - a["low"] == pytest.approx(b["high"] - b["low"]) and a["low"] < a["value"] < a["high"]

def test_comparison_is_paired_and_checked():
    refs = [f"a b c{i}" for i in range(30)]; base = table(refs, refs).frame
    p = Predictions(pd.concat([base, base.assign(variant="w", text=[f"a x c{i}" for i in range(30)])]))
    e = compare_texts(p, "v", "w", "rouge1", n_boot=50).frame.iloc[0]
    assert list(e[["value", "low", "high"]]) == pytest.approx([1 / 3] * 3) and e["n"] == 30 and e["variant"] == "v - w"
    other = Predictions(pd.concat([base, base.assign(variant="w", reference="z")]))
    with pytest.raises(TableError, match="same references"): compare_texts(other, "v", "w")
    with pytest.raises(TableError, match="metric"): compare_texts(p, "v", "w", "embedding_similarity")
