"Swaps on sentences written by hand, on the synthetic hospital whose patients' sex is known, and on open notes; evidence against planted flips."
import re
import numpy as np, pandas as pd, polars as pl, pytest
from scipy.stats import binomtest
from clinllm.core.errors import DataError, ParameterError, TableError
from clinllm.core.tables import Predictions
from clinllm.ehr.hospital import make_hospital
from clinllm.evaluation.counterfactual import ATTRIBUTES, LANGUAGES, VALUES, content_kept, counterfactual, counterfactual_plot, message_counterfactual, patient_sex, swap

TO_MALE = {"She gave her consent.": "He gave his consent.", "HER BP IS LOW.": "HIS BP IS LOW.", "We told her that her results are normal.": "We told him that his results are normal.",
           "PT found her safe.": "PT found him safe.", "She hurt herself; the bag is hers.": "He hurt himself; the bag is his.", "Mrs. Hill is a 54-year-old lady.": "Mr. Hill is a 54-year-old gentleman.",
           "54F, sister has MS.": "54M, sister has MS.", "68 y/o F w/ temp 99F.": "68 y/o M w/ temp 99F.", "Her daughter lives with her and helps.": "His daughter lives with him and helps.",
           "Her mother missed her own visits.": "His mother missed her own visits.", "She misses her brother; he lives far away.": "He misses his brother; he lives far away.",
           "Lives with her husband. She prescribed her own fate.": "Lives with his husband. He prescribed his own fate.", "Miss Gray was seen.": "Mr. Gray was seen."}

@pytest.mark.parametrize("before", TO_MALE)
def test_sentences_by_hand(before):
    text = "A woman. " + before; got = swap([text], "sex", "Male"); assert got.texts == ["A man. " + TO_MALE[before]] and content_kept([text], got.texts, "sex")[0]

def test_father_and_son_stay():
    got = swap(["Mr. Bell came. His father lost his pills. His son lives with him."], "sex", "Female")
    assert got.texts == ["Ms. Bell came. Her father lost his pills. Her son lives with her."] and got.unsure[0] == 1

def test_other_attributes_by_hand():
    one = lambda t, a, v, **k: swap([t], a, v, **k).texts[0]
    assert one("An Asian man, WBC normal, white count 9, black stool.", "race", "White") == "A White man, WBC normal, white count 9, black stool."
    assert one("She is African American. Her Hispanic husband is well.", "race", "Asian") == "She is Asian. Her Hispanic husband is well."
    assert one("Race: BLACK", "race", "Hispanic") == "Race: HISPANIC"
    assert one("A 58-year-old man. His father died, a 70-year-old man. 58 mg given; aged 30 then.", "age", 81) == "An 81-year-old man. His father died, a 70-year-old man. 58 mg given; aged 30 then."
    assert one("75M, HR 75, temp 99F", "age", 40) == "40M, HR 75, temp 99F"
    assert one("Has private insurance, was uninsured before.", "insurance", "Medicaid") == "Has Medicaid, was insured by Medicaid before."
    assert one("Medicare wellness visit.", "insurance", "Private") == "Medicare wellness visit."
    assert one("A Spanish-speaking man. Mother speaks Russian.", "language", "English") == "An English-speaking man. Mother speaks Russian."
    assert one("Fever.", "race", "Black", state=True) == "Race: Black.\nFever." and content_kept(["Fever."], ["Race: Black.\nFever."], "race")[0]

@pytest.mark.parametrize("attribute, text, word", [("sex", "28F, G2P1, here.", "g2p1"), ("sex", "He has BPH.", "bph"), ("race", "Black man with sickle cell disease.", "sickle"), ("age", "A 20 yo in college.", "college"), ("language", "Speaks Spanish, interpreter present.", "interpreter")])
def test_material_cases_are_left_alone_and_counted(attribute, text, word):
    got = swap([text], attribute, {"sex": "Male", "race": "White", "age": 50, "language": "English"}[attribute])
    assert got.texts == [text] and got.why == [f"material: {word}"] and got.counts() == {"changed": 0, "material": 1}

def test_hospital_notes_are_swapped_and_keep_their_content():
    events = make_hospital(250, seed=3).timeline.events; sex = {r[0]: r[1][8:] for r in events.filter(pl.col("code").str.starts_with("GENDER")).select("subject_id", "code").iter_rows()}
    rows = events.filter(pl.col("code") == "NOTE//discharge_summary").select("subject_id", "text_value").rows(); texts, true = [t for _, t in rows], [sex[s] for s, _ in rows]
    seen = [patient_sex(t) for t in texts]; assert all(a in (b, "") for a, b in zip(seen, true)) and np.mean([a == b for a, b in zip(seen, true)]) > .98
    other = ["Male" if s == "Female" else "Female" for s in true]; got = swap(texts, "sex", other)
    assert got.changed.mean() > .9 and content_kept(texts, got.texts, "sex").all() and all(patient_sex(t) == o for t, o, c in zip(got.texts, other, got.changed) if c and o == "Male")
    wrong = [re.sub(r"\d(?=\D*$)", lambda m: str((int(m[0]) + 1) % 10), t, count=1) for t in got.texts]      # one digit changed in each
    assert not any(k for k, a, b in zip(content_kept(texts, wrong, "sex"), got.texts, wrong) if a != b)
    for a, v in (("race", "Black"), ("insurance", "Medicaid"), ("language", "Spanish")):
        said = swap(texts, a, v, state=True); assert said.changed.mean() > .9 and content_kept(texts, said.texts, a).all()
    assert content_kept(texts, swap(texts, "age", 83).texts, "age").all()

def test_open_notes_come_back(shared_data):
    "Notes on men: 'his' and 'him' both become 'her'; swapped back, nearly all are what the authors wrote"
    notes = pd.concat([pd.read_csv(shared_data / "aci-bench" / f"{s}.csv") for s in ("train", "valid")])["note"].drop_duplicates().tolist()
    men = [t for t in notes if patient_sex(t) == "Male"]; there = swap(men, "sex", "Female"); back = swap(there.texts, "sex", "Male"); words = lambda t: re.findall(r"\b(?:his|him)\b", t, re.I)
    pairs = [(a, b) for t, n, c in zip(men, back.texts, there.changed) if c and len(words(t)) == len(words(n)) for a, b in zip(words(t), words(n))]
    assert len(pairs) > 150 and np.mean([a == b for a, b in pairs]) > .98 and content_kept(men, there.texts, "sex").all() and content_kept(there.texts, back.texts, "sex").all()

def test_never_raises_and_same_twice():
    rng = np.random.default_rng(0); bits = ["she", "HER", "Mr. ", "75M", "\n", ".", " ", "é🙂", "white man", "Medicaid", "an ", "speaks Spanish", "\x00", "his father ", "8", "Miss A"]
    odd = ["".join(rng.choice(bits, rng.integers(0, 30))) for _ in range(150)] + [None, "", np.nan]
    for a in ATTRIBUTES:
        v = {"sex": "Male", "race": "Asian", "age": 30, "insurance": "Private", "language": LANGUAGES[0]}[a]; got = swap(odd, a, v)
        assert got.texts[:-1] == swap(odd, a, v).texts[:-1] and len(got.texts) == len(odd) and content_kept(odd[:-1], got.texts[:-1], a).all()
        assert all(bool(s) == c and (not w) == c for s, c, w in zip(got.spans, got.changed, got.why))
        for t, s in zip(odd, got.spans): assert all(t[k.start:k.end] == k.before for k in s)

def table(p, status="ok", **more):
    n = len(p); return Predictions(pd.DataFrame(dict(subject_id=range(n), prediction_time=pd.Timestamp("2024-01-01"), label=np.arange(n) % 2, variant="m", y_prob=p, status=status) | more))

def test_evidence_by_hand():
    "10 notes: 3 go above the threshold, 1 below, 6 stay; mean shift (3 * .2 - .2) / 10; sizes .8 / 10"
    before = np.array([.1] * 3 + [.3] * 7); after = before + np.r_[[.2] * 3, -.2, [0] * 6]; f = counterfactual(table(before), {"sex": table(after, changed=True)}, n_boot=200).frame.set_index("metric")
    assert f.loc["flip_rate", "value"] == pytest.approx(.4) and "3 to an alert, 1 away" in f.loc["flip_rate", "limitation"]
    assert f.loc["flip_rate", ["low", "high"]].tolist() == pytest.approx([.1682, .6873], abs=2e-4)               # Wilson's interval of 4 in 10
    assert f.loc["swap_shift", "value"] == pytest.approx(.04) and f.loc["swap_distance", "value"] == pytest.approx(.08) and f.loc["swap_shift", "low"] < 0 < f.loc["swap_shift", "high"]
    assert f.loc["flip_p", "value"] == pytest.approx(binomtest(3, 4).pvalue) and f.loc["withheld_rate", "value"] == 0

def test_unchanged_rows_failures_and_holm():
    before = np.full(40, .1); after = before + .3; status = np.where(np.arange(40) < 10, "refused", "ok"); changed = np.arange(40) < 20
    lost = table(np.where(status == "ok", after, np.nan), status=status, changed=changed); f = counterfactual(table(before), {"a": lost, "b": table(before, changed=True)}, n_boot=50).frame.set_index(["metric", "group"])
    assert f.loc[("withheld_rate", "a"), "value"] == .5 and f.loc[("flip_rate", "a"), "n"] == 10 and f.loc[("flip_rate", "a"), "value"] == 1
    said = f.loc[("flip_rate", "a"), "limitation"]; assert "20 of 40 rows whose text did not change" in said and "10 of 20 rows answered before were not answered after" in said
    assert f.loc[("flip_p", "a"), "value"] == pytest.approx(2 * binomtest(10, 10).pvalue) and f.loc[("flip_p", "b"), "value"] == 1
    source = counterfactual(table(before, source="x"), {"a": table(after, source=np.where(changed, "y", "x"))}, n_boot=50).frame; assert source["n"][0] == 20

def test_edges():
    gone = table(np.full(5, np.nan), status="refused"); f = counterfactual(table(np.full(5, .3)), {"a": gone}, n_boot=20).frame
    assert f.loc[f["metric"] != "withheld_rate", "value"].isna().all() and f.loc[f["metric"] == "withheld_rate", "value"].item() == 1 and (f.loc[f["value"].isna(), "limitation"] != "").all()
    none = counterfactual(table(np.full(5, .3)), {"a": table(np.full(5, .3), changed=False)}, n_boot=20); assert none.frame["value"].isna().all() and message_counterfactual(none).startswith("No swapped note")
    assert counterfactual_plot(none).get_title(loc="left") and counterfactual(table([.3]), {"a": table([.1])}, n_boot=20).frame["n"].tolist() == [1] * 5
    with pytest.raises(TableError, match="variant"): counterfactual(table([.3]), {"a": table([.3], variant="n")})
    with pytest.raises(ParameterError): counterfactual(table([.3]), {}, threshold=0)
    with pytest.raises(DataError): swap(["a", "b"], "sex", ["Male"])

@pytest.mark.parametrize("attribute", ["race", "insurance", "language"])
def test_a_stated_line_can_be_swapped_again(attribute):
    values = VALUES[attribute]
    for said, to in zip(values, [*values[1:], values[0]]):
        stated = swap(["Patient seen.\nThe wound is dry."], attribute, said, state=True)
        again = swap(stated.texts, attribute, to)
        assert stated.changed.all() and again.changed.all() and "already so" in swap(again.texts, attribute, to).why[0], (said, to)
