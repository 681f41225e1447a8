"The fact check against sentences labelled by hand, planted errors on real notes, and hand-made texts."
from collections import Counter
import numpy as np, pandas as pd, pytest
from clinllm.core.errors import TableError
from clinllm.core.tables import Predictions
from clinllm.evaluation.facts import COLUMNS, compare_facts, fact_check, find_facts, plant, show_facts
from clinllm.evaluation.text import FAILURES

def said(f):
    "A fact in the words of the labels"
    v = f.value if isinstance(f.value, str) else f"{f.value:g}"
    return dict(number=f"number {v} {f.unit}".strip(), dose=f"dose {v} {f.unit} {f.about}", drug=f"drug {v}", side=f"side {f.side} {v}", negation=f"no {v}")[f.kind]

@pytest.mark.parametrize("source, precision, recall", [("A", .91, .86), ("S", .95, .93)])
def test_sentences_labelled_by_hand(root, source, precision, recall):
    "The floors are what the rules reached when they first saw these sentences"
    hits = wrong = missed = 0
    for line in (root / "tests" / "oracles" / "fact_sentences.tsv").read_text(encoding="utf-8").splitlines():
        where, _, rest = line.partition("\t"); text, _, labels = rest.partition("\t")
        if where != source: continue
        gold, found = Counter(x.strip() for x in labels.split(";") if x.strip()), Counter(map(said, find_facts(text.replace(" / ", "\n"))))
        hits += (gold & found).total(); wrong += (found - gold).total(); missed += (gold - found).total()
    assert hits / (hits + wrong) >= precision and hits / (hits + missed) >= recall, (hits, wrong, missed)

@pytest.fixture(scope="module")
def notes(shared_data):
    path = shared_data / "aci-bench" / "clinicalnlp_taskC_test2.csv"
    if not path.is_file(): pytest.skip("ACI-Bench is not there")
    return pd.read_csv(path)

def test_a_real_note_agrees_with_itself(notes):
    assert all((compare_facts(n, n)["status"] == "supported").all() for n in notes["note"])

@pytest.mark.parametrize("kind, floor", [("number", .95), ("side", .7), ("negation", .85), ("drug", .97)])
def test_planted_errors_on_real_notes(notes, kind, floor):
    "On 120 test notes: number 80 of 81, side 43 of 52, negation 63 of 66, drug 77 of 77. A side is missed where the note names the other side of that site elsewhere"
    planted = found = beside = 0
    for seed, note in enumerate(notes["note"]):
        changed, place = plant(note, kind, seed)
        if place is None: continue
        caught = compare_facts(note, changed).query("status == 'hallucinated'"); near = [a < place[1] + 60 and place[0] < b for a, b in zip(caught["start"], caught["end"])]
        planted += 1; found += any(near); beside += len(near) - sum(near)
    assert planted >= 10 and found / planted >= floor and beside <= 2, (planted, found, beside)

@pytest.mark.parametrize("source, output", [
    ("b p was one twenty over eighty", "BP 120/80 mmHg"), ("a1c is seven point two", "A1c 7.2%"), ("take five hundred milligrams of metformin", "metformin 500 mg"), ("gave 1 g ceftriaxone", "Rocephin 1000 mg"),
    ("two weeks ago", "14 days ago"), ("both knees hurt", "bilateral knee pain"), ("my knee hurts .\n[doctor] which one ?\n[patient] the right one .", "right knee pain"), ("twice a day", "BID"), ("every six hours", "q6h"),
    ("[doctor] any chills ?\n[patient] no .", "Denies chills."), ("lungs are clear", "No wheezes or rales."), ("she is fifty nine", "59-year-old"), ("seen in december of 2019", "seen 12/2019"), ("temperature is ninety eight . four", "98.4 °F"),
    ("three to four hundreds", "300 to 400")])
def test_the_same_in_other_words(source, output): assert "hallucinated" not in list(compare_facts(source, output)["status"])

@pytest.mark.parametrize("source, output, kind", [
    ("BP 120/80", "BP 130/80", "number"), ("metformin 500 mg", "metformin 5000 mg", "dose"), ("metformin 500 mg, lisinopril 20 mg", "metformin 20 mg, lisinopril 500 mg", "dose"), ("5 mg warfarin", "5 g warfarin", "dose"),
    ("for 3 days", "for 3 weeks", "number"), ("left hip pain", "right hip pain", "side"), ("has a cough", "denies cough", "negation"), ("no fever", "febrile with fever", "negation"), ("on metformin", "on warfarin", "drug"),
    ("fifty milligrams", "500 mg", "number"), ("twice daily", "three times a day", "number"), ("type 2 diabetes", "type 1 diabetes", "number")])
def test_a_change_that_hurts_is_found(source, output, kind):
    assert kind in list(compare_facts(source, output).query("status == 'hallucinated'")["kind"])

def test_omissions_are_spans_of_the_source():
    source = "Denies chest pain. Takes warfarin 5 mg. Left eye injured."; found = compare_facts(source, "Doing well.")
    assert set(found["status"]) == {"omitted"} and list(found["text"]) == [source[a:b] for a, b in zip(found["start"], found["end"])]
    assert list(found["kind"]) == ["negation", "drug", "dose", "side"] and list(found.columns) == COLUMNS

def test_odd_texts_do_not_break_it():
    for text in ("", "\n\n", "İİ 5 mg", "١٢ mg", "." * 500, "one " * 300, "-1-2-3-", "over over 5 over", "no " * 200, "right right right knee", "\0 5 mg", "1e309 mg", "9" * 400, "4/5/6/7", "[doctor]", "half"):
        facts = find_facts(text); assert all(0 <= f.start < f.end <= len(text) for f in facts)
    with pytest.raises(TableError, match="needs a text"): find_facts(None)
    with pytest.raises(TableError, match="output is of type float"): compare_facts("a", float("nan"))
    with pytest.raises(TableError, match="planted error"): plant("a", "sides")

def test_marks_are_escaped_and_keep_every_character():
    import html, re
    source, output = "<img src=x onerror=alert(1)> lisinopril 5 mg & no fever", 'lisinopril "50 mg" <b>fever</b>'
    page = show_facts(source, output); assert "<img" not in page.html and "<b>" not in page.html and page.html == page._repr_html_()
    plain = html.unescape(re.sub(r"<[^>]*>", "", page.html)); assert source in plain and output in plain

def table(texts, sources, status=None, **more):
    n = len(texts)
    return Predictions(pd.DataFrame(dict(subject_id=range(n), prediction_time=pd.Timestamp("2024-01-01"), variant="v", label=0, text=texts, source=sources, status=status or ["ok"] * n) | more))

def get(e, metric, group="all"): return e.frame.query("metric == @metric and group == @group").iloc[0]

def test_rates_by_hand():
    "Row 1: 2 facts, 1 wrong, 1 left out. Row 2: 1 fact, right. Row 3 failed. Row 4 has no source"
    p = table(["warfarin 5 mg", "left hip", None, "aspirin"], ["warfarin 2 mg", "left hip", "no fever", None], ["ok", "ok", "error", "ok"])
    e, spans = fact_check(p, n_boot=50)
    assert get(e, "any_hallucinated_fact")["value"] == .5 == get(e, "hallucinated_facts")["value"] and get(e, "any_hallucinated_fact")["n"] == 2
    assert get(e, "hallucinated_per_100")["value"] == pytest.approx(100 / 3) and get(e, "hallucinated_per_100", "dose")["value"] == 100 and get(e, "hallucinated_per_100", "drug")["value"] == 0
    assert get(e, "any_hallucinated_fact", FAILURES)["value"] == pytest.approx(2 / 3) and "1 of 4 rows had no source" in get(e, "any_hallucinated_fact")["limitation"]
    assert np.isnan(get(e, "hallucinated_per_100", "number")["value"]) and "undefined" in get(e, "hallucinated_per_100", "number")["limitation"]
    assert len(spans) == 4 and set(spans["status"]) == {"hallucinated", "supported", "omitted"} and list(spans["subject_id"].unique()) == [0, 1]

def test_repetition_counts_once_and_weights_count():
    p = table(["warfarin 5 mg, warfarin 5 mg", "aspirin"], ["aspirin", "aspirin"], weight=[3., 1.]); e, _ = fact_check(p, n_boot=50)
    assert get(e, "hallucinated_facts")["value"] == pytest.approx(1.5) and get(e, "any_hallucinated_fact")["value"] == pytest.approx(.75)

def test_nobody_answered_or_no_source():
    e, spans = fact_check(table([None], ["a"], ["refused"]), n_boot=50)
    assert spans.empty and np.isnan(get(e, "hallucinated_facts")["value"]) and get(e, "any_omitted_fact", FAILURES)["value"] == 1
    with pytest.raises(TableError, match="column 'source'"): fact_check(Predictions(table(["a"], ["a"]).frame.drop(columns="source")))
    with pytest.raises(TableError, match="against"): fact_check(table(["a"], ["a"]), against="sources")

def test_people_invent_less_than_a_weak_system(shared_data):
    "Notes by people against notes of LED, on the same dialogues of ACI-Bench"
    folder = shared_data / "aci-bench"; system = folder / "predictions" / "LED_clinicalnlp_taskB_test1_full.csv"
    if not system.is_file(): pytest.skip("ACI-Bench is not there")
    right = pd.read_csv(folder / "clinicalnlp_taskB_test1.csv").set_index("encounter_id"); out = pd.read_csv(system).set_index("encounter_id")["note"][right.index]
    p = Predictions(pd.concat([table(list(t), list(right["dialogue"])).frame.assign(variant=v) for v, t in (("people", right["note"]), ("LED", out))]))
    e, _ = fact_check(p, n_boot=200); per = e.frame.query("group == 'all' and metric == 'hallucinated_per_100'").set_index("variant")
    assert per.loc["people", "high"] < 25 < 50 < per.loc["LED", "low"]
