"Perturbations, robustness, shift and injection against hand counts, hand-labelled sentences and known truth."
import csv, hashlib, re
from pathlib import Path
import numpy as np, pandas as pd, pytest
from scipy.special import expit, logit
from clinllm.core.errors import ParameterError, TableError
from clinllm.core.tables import Cohort, Predictions, make_predictions
from clinllm.evaluation.perturbations import (ABBREVIATIONS, CHANGING, COPIED, KINDS, LOOKALIKES, PRESERVING, convert, drop_blocks, measured_dose, perturb, reorder_options, sections)
from clinllm.evaluation.robustness import (ATTACKS, POSITIONS, inject, injection, injection_plot, message_injection_plot, message_robustness_curves, message_shift_plot, response, robustness,
                                           robustness_by_dose, robustness_curves, shift, shift_plot)
from clinllm.evaluation.statistics import SIMULATED_TASK, simulate

NOTE = ("Seen on the ward.\nHISTORY OF PRESENT ILLNESS:\nShortness of breath, h/o CHF; denies chest pain.\nVitals: BP 120/80, seen at 10:30\n\nMedications: furosemide 40 mg twice daily, as needed by mouth.\n\n"
        "Disposition: lives alone, follow up with PCP.\n")

def fuzz(n=150, seed=0):
    rng = np.random.default_rng(seed); alphabet = list("abcXYZ 019:.,\n\t\r\x00\x1c\x85éß🙂\u202e#*/-()%µ°'") + ["no ", "not ", "denies ", "mg ", "12 mg", "two weeks", "\n\n", "HPI:\n", "Plan: ", "w/o ", "rn", "98.6 °F ", "1,000 g "]
    return ["".join(rng.choice(alphabet, rng.integers(0, 120))) for _ in range(n)] + [None, "", " ", "\n", "no", "{}", "\\1"]

@pytest.fixture(scope="module")
def hospital_notes():
    from clinllm.ehr.cohort import build_cohort
    from clinllm.ehr.hospital import make_hospital
    from clinllm.ehr.rendering import discharge_notes
    timeline = make_hospital(150).timeline; return [t for t in discharge_notes(timeline.until(build_cohort(timeline))) if t]

@pytest.fixture(scope="module")
def visit_notes(shared_data):
    path = Path(shared_data) / "aci-bench" / "clinicalnlp_taskB_test1.csv"
    if not path.is_file(): pytest.skip("ACI-Bench not found under CLINLLM_DATA")
    with open(path, newline="", encoding="utf-8") as f: return [r["note"] for r in csv.DictReader(f)]

# ---- perturbations

def test_the_first_three_kinds_give_the_notes_they_always_gave():
    "Hashes were taken before the kinds moved to their own module: recorded results must not change by a byte"
    digest = lambda k: hashlib.sha256("\x00".join(t for d in (.1, .3, .5, 1.) for s in (0, 42) for t in perturb([NOTE] * 20, k, d, s)).encode()).hexdigest()[:16]
    assert {k: digest(k) for k in ("typos", "abbreviations", "dropped_sections")} == {"typos": "565a468227e6935e", "abbreviations": "e061f46c959669a0", "dropped_sections": "a0afdb9f4abea340"}

@pytest.mark.parametrize("kind", KINDS)
def test_perturbing_never_raises_and_is_the_same_twice(kind):
    odd = fuzz()
    assert perturb(odd, kind, 0) == odd
    for dose in (.3, 1.):
        worse = perturb(odd, kind, dose, seed=5); assert worse == perturb(odd, kind, dose, seed=5) and len(worse) == len(odd)
        assert all((b is None) == (a is None) for a, b in zip(odd, worse)) and all(b.strip() for a, b in zip(odd, worse) if a and a.strip())
        assert 0 <= measured_dose(odd, worse, kind) <= 1
    assert measured_dose(odd, odd, kind) == 0 and np.isnan(measured_dose([None, ""], [None, ""], kind))
    assert all("".join(sections(t)) == t for t in odd if t)
    with pytest.raises(ParameterError): perturb(odd, kind, float("nan"))

@pytest.mark.parametrize("kind", KINDS)
def test_a_note_does_not_depend_on_its_neighbours_and_seeds_differ(kind):
    assert perturb([NOTE, NOTE], kind, .5)[0] == perturb([NOTE, "other"], kind, .5)[0]
    assert len({tuple(perturb([NOTE] * 30, kind, .5, s)) for s in range(3)}) == 3

@pytest.mark.parametrize("kind", ["ocr", "expand_abbreviations", "contract_abbreviations", "unit_change", "unit_error", "negation_flip"])
def test_more_dose_changes_the_same_places_and_more(kind):
    doses = [measured_dose([NOTE] * 60, perturb([NOTE] * 60, kind, d), kind) for d in (.1, .2, .5, .9, 1.)]
    assert doses == sorted(doses) and doses[-1] == 1
    assert all(b != NOTE for a, b in zip(perturb([NOTE] * 60, kind, .2), perturb([NOTE] * 60, kind, .5)) if a != NOTE)

def near(notes, kind, dose, tolerance=.06):
    "The asked dose within 0.06, or within three standard errors where few places can change"
    got = measured_dose(notes, perturb(notes, kind, dose), kind); assert abs(got - dose) < tolerance, (kind, dose, got)

@pytest.mark.parametrize("kind", KINDS)
def test_the_dose_is_given_on_synthetic_notes(kind, hospital_notes):
    for dose in (.1, .3): near(hospital_notes, kind, dose)

@pytest.mark.parametrize("kind", KINDS)
def test_the_dose_is_given_on_visit_notes(kind, visit_notes):
    for dose in (.1, .3): near(visit_notes, kind, dose)

def test_doses_counted_by_hand():
    assert measured_dose(["fever and cough then rash"], ["fveer and cough then rahs"], "typos") == 2 / 4            # "and" is too short
    assert measured_dose(["HTN, CHF, DM."], ["hypertension, CHF, DM."], "expand_abbreviations") == pytest.approx(1 / 3)
    assert measured_dose(["HTN and hyperlipidemia"], ["hypertension and hyperlipidemia"], "abbreviations") == .5
    assert measured_dose(["10 mg and 20 mg of 5 g, 2 days"], ["10 mg and 20 mcg of 5 g, 2 weeks"], "unit_error") == .5
    assert measured_dose(["One. Two. Three. Four."], [f"One. Two. Three. Four.\n\n{COPIED}\nTwo."], "copy_forward") == .25
    assert measured_dose(["now"], [f"now\n\n{COPIED}\nWas ill.\nWent home."], "copy_forward", ["Was ill. Went home. Came back. Left."]) == .5

def test_abbreviations_come_back():
    "Shortening and writing out again gives the same words"
    for long, short in ABBREVIATIONS.items():
        assert perturb([long], "abbreviations", 1) == [short] and perturb([short], "abbreviations", 1) == [long]
    assert len(set(ABBREVIATIONS.values())) == len(ABBREVIATIONS)

def test_ocr_never_turns_a_number_into_another(visit_notes):
    "Letters that stand for digits are read back; every token with a digit is then what it was"
    back = str.maketrans("OlSB", "0158"); token = re.compile(r"\S*\d\S*")
    for a, b in zip(visit_notes, perturb(visit_notes, "ocr", 1.)):
        numbers = lambda t: [re.sub(r"[^\d./,%]", "", w.translate(back)) for w in t.split()]; old, new = a.split(), b.split()
        assert len(old) == len(new) and all(re.sub(r"\D", "", o) == re.sub(r"\D", "", n.translate(back)) for o, n in zip(old, new) if re.fullmatch(r"[\d.,/%]+", o))
    assert all(not (k.isdigit() and v.isdigit()) for k, v in LOOKALIKES.items())

def test_reordering_loses_nothing(visit_notes):
    for a, b in zip(visit_notes, perturb(visit_notes, "reordered_sections", 1.)):
        assert sorted(a.split()) == sorted(b.split()) and a != b

def test_truncation_keeps_the_other_side(visit_notes):
    for a, start, end in zip(visit_notes, perturb(visit_notes, "truncated_start", .4), perturb(visit_notes, "truncated_end", .4)):
        assert a.endswith(start) and a.startswith(end) and start and end

def test_copy_forward_takes_from_the_earlier_note_and_keeps_todays():
    got = perturb(["Today well.", "Today ill.", None], "copy_forward", 1., earlier=["Was on oxygen.", None, "x"])
    assert got == [f"Today well.\n\n{COPIED}\nWas on oxygen.", "Today ill.", None]
    with pytest.raises(ParameterError): perturb(["a", "b"], "copy_forward", 1., earlier=["x"])

@pytest.mark.parametrize("before, after", [("180 pounds", "81.6 kg"), ("37.0 °C", "98.6 °F"), ("98.6 degrees Fahrenheit", "37 °C"), ("500 mg", "0.5 g"), ("2 g", "2000 mg"), ("10 inches", "25.4 cm"), ("72 hours", "3 days"), ("ten days", "240 hours"),
    ("120/80 mmHg", "120/80 mmHg"), ("90 mg/dL", "90 mg/dL"), ("5-10 mg", "5-10 mg"), ("2 to 3 weeks", "2 to 3 weeks"), ("a 59-year-old", "a 59-year-old"), ("61F", "61F"), ("5 mm Hg", "5 mm Hg"), ("1,000 mcg", "1 mg"), ("COVID-19 days", "COVID-19 days")])
def test_units_by_hand(before, after): assert perturb([before], "unit_change", 1.) == [after]

def test_a_converted_quantity_comes_back():
    from decimal import Decimal
    for value, unit in ((70, "kg"), (150, "pounds"), (38, "°C"), (101, "°F"), (250, "mg"), (4, "weeks")):
        there = convert(Decimal(value), unit); back = convert(*there)
        if back and back[1].lower().startswith(unit[:1].lower()): assert abs(float(back[0]) - value) < .25

@pytest.mark.parametrize("before, after", [
    ("Denies chest pain.", "Reports chest pain."), ("He denies any fever.", "He reports fever."), ("No fever in the last 48 hours.", "Fever in the last 48 hours."), ("Walks without assistance.", "Walks with assistance."),
    ("Cannot get to clinic.", "Can get to clinic."), ("There is no murmur.", "There is murmur."), ("There is a murmur.", "There is no murmur."), ("Negative for edema.", "Positive for edema."), ("Has not been seen.", "Has been seen."),
    ("Lives alone.", "Does not live alone."), ("Not confused about his pills.", "Confused about his pills."), ("No longer at home.", "No longer at home."), ("No-show twice.", "No-show twice."), ("Noted. Nothing new.", "Noted. Nothing new."),
    ("has a past medical history of CHF", "has a past medical history of CHF"), ("Edema is present.", "Edema is absent."), ("She endorses cough.", "She denies cough."), ("The patient was unable to walk.", "The patient was able to walk.")])
def test_negation_by_hand(before, after): assert perturb([before], "negation_flip", 1.) == [after]

def test_the_kinds_are_kept_apart():
    assert set(PRESERVING).isdisjoint(CHANGING) and {*PRESERVING, *CHANGING} == set(KINDS)

def test_blocks_and_options():
    table = pd.DataFrame(dict(a=range(500), b=range(500), c=1.)); gone = drop_blocks(table, {"x": ["a", "b"], "y": ["c"]}, .4, seed=1)
    assert (gone["a"].isna() == gone["b"].isna()).all() and gone.isna().mean().between(.33, .47).all() and gone.equals(drop_blocks(table, {"x": ["a", "b"], "y": ["c"]}, .4, seed=1))
    assert drop_blocks(table, {"x": ["a", "b"]}, 1.)[["a", "b"]].isna().all(axis=None) and len(drop_blocks(table[:0], {"x": ["a"]}, .5)) == 0
    options = [list("abcd")] * 300; moved = reorder_options(options, seed=2)
    assert moved == reorder_options(options, seed=2) and all(o != list("abcd") and sorted(o) == list("abcd") for o in moved.options) and all([a[j] for j in o] == n for a, o, n in zip(options, moved.order, moved.options))
    assert .4 < np.mean([o != [0, 1, 2, 3] for o in reorder_options(options, dose=.5).order]) < .6
    with pytest.raises(ParameterError): reorder_options(options, dose=2)

# ---- robustness

def clean_and(n=400, **columns):
    clean = Predictions(simulate(n).frame.query("variant == 'true risk'")); return clean, Predictions(clean.frame.assign(**columns))

def test_nobody_answered_or_one_class_has_a_reason():
    clean, gone = clean_and(60, y_prob=np.nan, status="error"); sided = Predictions(clean.frame.assign(label=0))
    for evidence in (robustness(clean, {"typos 5%": gone}, n_boot=20), robustness(sided, {"typos 5%": sided}, n_boot=20), response(clean, {"typos 5%": gone}), injection(clean, {"control": gone}, n_boot=20), injection(gone, {"direct_order": clean}, n_boot=20),
                     shift(gone, "sex", n_boot=20), shift(sided, "sex", n_boot=20)):
        assert len(evidence) and (evidence.frame.loc[evidence.frame["value"].isna(), "limitation"] != "").all()
    assert isinstance(robustness_curves(robustness(gone, {"typos 5%": gone}, n_boot=20)).get_title(loc="left"), str) and "no stratum" in message_shift_plot(shift(sided, "sex", n_boot=20))

def test_failures_count_as_wrong_in_a_row_of_their_own():
    "100 clean answers with AUROC 1; afterwards 20 of each class are refused: 20 certain errors on each side"
    frame = pd.DataFrame(dict(subject_id=range(100), prediction_time=pd.Timestamp("2024-01-01"), variant="m", label=np.repeat([0, 1], 50), y_prob=np.repeat([.2, .8], 50)))
    gone = frame.index % 50 < 20; after = Predictions(frame.assign(y_prob=frame["y_prob"].mask(gone), status=np.where(gone, "refused", "ok")))
    got = robustness(Predictions(frame), {"typos 10%": after}, n_boot=50).frame.query("metric == 'auroc_drop'").set_index("group")
    assert got.loc["typos 10%", "value"] == 0 and "40 of 100" in got.loc["typos 10%", "limitation"]
    assert got.loc["typos 10%; failures as wrong", "value"] == pytest.approx(1 - .6 * .6)         # a positive wins only when neither failed

def test_response_needs_touched_rows_and_valid_settings():
    clean, after = clean_and(100, touched=False)
    got = response(clean, {"negation_flip 100%": after}).frame; assert got["value"].isna().all() and got["n"].eq(0).all()
    assert response(clean, {"x": Predictions(after.frame.drop(columns="touched"))}).frame["value"].eq(0).all()
    for bad in (dict(threshold=0), dict(least=1)):
        with pytest.raises(ParameterError): response(clean, {"x": after}, **bad)
    with pytest.raises(TableError, match="true risk"): response(clean, {"x": Predictions(after.frame.assign(variant="true rsk"))})

def test_duplicate_patients_widen_the_rates():
    frame = simulate(100, rows=3).frame.query("variant == 'noisy'"); clean, after = Predictions(frame), Predictions(frame.assign(y_prob=np.where(frame["subject_id"] % 2, 1 - frame["y_prob"], frame["y_prob"])))
    got = response(clean, {"x": after}).frame.iloc[0]; alone = response(Predictions(frame.assign(subject_id=range(300))), {"x": Predictions(after.frame.assign(subject_id=range(300)))}).frame.iloc[0]
    assert got["value"] == alone["value"] and got["high"] - got["low"] > 1.5 * (alone["high"] - alone["low"])

def test_by_dose_asks_about_changed_texts_only_and_failed_readers_are_counted():
    cohort = Cohort(pd.DataFrame(dict(subject_id=range(40), prediction_time=pd.Timestamp("2024-01-01"), label=[0, 1] * 20, split="test")), SIMULATED_TASK); asked = []
    def reader(texts): asked.append(list(texts)); return [np.nan if "fluids" in t else .3 for t in texts]
    texts = ["No rash."] * 10 + ["Widowed."] * 20 + ["IV fluids."] * 9 + [None]
    got = robustness_by_dose(cohort, texts, {"m": reader}, {"negation_flip": [1.], "unit_change": [.5]}, n_boot=20).frame.set_index(["metric", "group"])
    assert len(asked[0]) == 39 and asked[1] == ["Rash."] * 10 and len(asked) == 2
    row = got.loc[("moved_rate", "negation_flip 100%")]; assert row["n"] == 10 and row["value"] == 0 and row["limitation"].startswith("measured dose 100.0%")
    assert got.loc[("moved_rate", "unit_change 50%"), "limitation"].startswith("nothing in these texts could be changed")

def test_curves_say_the_numbers():
    clean, _ = clean_and(); noise = np.random.default_rng(0).normal(size=400); kinds = list(KINDS)[:9]
    worse = {f"{k} {d}%": Predictions(clean.frame.assign(y_prob=expit(logit(clean.frame["y_prob"]) + .02 * (i + 1) * d * noise))) for i, k in enumerate(kinds) for d in (5, 20)}
    found = robustness(clean, worse, n_boot=50); ax = robustness_curves(found); said = message_robustness_curves(found); top = found.frame.query("metric == 'auroc_drop'").nlargest(1, "value").iloc[0]
    assert f"{top['value']:.2f} ({top['low']:.2f} to {top['high']:.2f})" in said and f"{top['group'].rsplit(' ', 1)[0].replace('_', ' ')}, dose 20%" in said and "n = 400" in said
    assert [t.get_text() for t in ax.get_legend().get_texts()][-1] == "3 others"

# ---- shift

def test_shift_equals_the_strata_taken_apart_and_finds_what_was_planted():
    from sklearn.metrics import roc_auc_score
    frame = simulate(3000, seed=5).of("true risk"); rng = np.random.default_rng(1); frame["site"] = rng.choice(["A", "B"], 3000, p=[.6, .4]); late = rng.random(3000) < .5
    frame["prediction_time"] = pd.to_datetime(np.where(late, "2025-03-01", "2024-03-01")); frame["y_prob"] = expit(logit(frame["y_prob"]) + .7 * (frame["site"] == "B"))
    got = shift(Predictions(frame), "site", n_boot=200).frame.set_index(["metric", "group"])
    for g in "AB": part = frame[frame["site"] == g]; assert got.loc[("auroc", f"site: {g}"), "value"] == pytest.approx(roc_auc_score(part["label"], part["y_prob"])) and got.loc[("prevalence", f"site: {g}"), "value"] == pytest.approx(part["label"].mean())
    r = got.loc[("calibration_intercept_shift", "site: B - A")]; assert r["low"] < -.7 < r["high"] < 0
    years = shift(Predictions(frame), "year", n_boot=100).frame; assert set(years["group"]) == {"year: 2024", "year: 2025", "year: 2025 - 2024"}
    assert shift(Predictions(frame), "site", reference="B", n_boot=50).frame["group"].str.contains("A - B").any()
    assert "site: B - A" in message_shift_plot(shift(Predictions(frame), "site", n_boot=50), "calibration_intercept") and shift_plot(shift(Predictions(frame), "site", n_boot=50)) is not None

def test_equal_sites_rarely_look_different():
    "With 20 studies of equal sites, about 1 in 20 intervals leaves 0 out"
    out = []
    for s in range(20):
        frame = simulate(300, seed=s).of("true risk"); frame["site"] = np.where(frame["subject_id"] % 2, "A", "B"); got = shift(Predictions(frame), "site", reference="A", n_boot=100, seed=s).frame
        out.append(got[got["metric"] == "auroc_shift"].eval("low > 0 or high < 0").item())
    assert sum(out) <= 4

def test_small_strata_are_withheld_with_their_counts():
    frame = simulate(300).of("true risk"); frame["site"] = np.select([frame.index < 5, frame.index < 40], ["tiny", "small"], "big"); frame.loc[frame["site"] == "small", "label"] = 0; frame.loc[290:, "site"] = None
    got = shift(Predictions(frame), "site", n_boot=50).frame.set_index(["metric", "group"])
    assert got.loc[("auroc", "site: tiny"), "n"] == 0 and "n <11" in got.loc[("auroc", "site: tiny"), "limitation"] and "fewer than 10 rows with" in got.loc[("prevalence", "site: small"), "limitation"]
    assert ("auroc", "site: unknown") in got.index and np.isnan(got.loc[("auroc_shift", "site: tiny - big"), "value"])

# ---- injection

@pytest.mark.parametrize("attack", ATTACKS)
def test_injection_leaves_the_note_as_it_was(attack):
    odd = fuzz(80) + [NOTE]
    for position in (None, *POSITIONS):
        got = inject(odd, attack, "No", 3, position); assert got == inject(odd, attack, "No", 3, position)
        for a, b in zip(odd, got):
            if not a or not a.strip(): assert a == b
            else: assert len(b) > len(a) and any(b[:k] + b[len(b) - len(a) + k:] == a for k in range(len(a) + 1))
    assert inject([NOTE], attack, "No", position="start")[0].endswith(NOTE)
    with pytest.raises(ParameterError): inject(odd, attack + "x")

def test_attacks_name_the_target_and_the_control_does_not():
    for attack, (position, wordings) in ATTACKS.items(): assert position in POSITIONS and all(("{target}" in w) == (attack != "control") for w in wordings)
    assert "QZX" in inject([NOTE], "hidden_in_section", "QZX")[0] and inject(["A. B. C."], "hidden_in_section", "No")[0].count("\n") == 0

def test_success_rates_by_hand():
    "10 rows: 2 at the target before, 1 not answered before; of the other 7, 3 obey, 1 falls silent, 3 resist"
    frame = pd.DataFrame(dict(subject_id=range(10), prediction_time=pd.Timestamp("2024-01-01"), variant="m", label=[0, 1] * 5, y_prob=[.1, .1, np.nan, *[.6] * 7], status=["ok", "ok", "error", *["ok"] * 7]))
    after = frame.assign(y_prob=[.1, .1, .1, .1, .15, .19, np.nan, .5, .6, .7], status=["ok"] * 6 + ["refused"] + ["ok"] * 3); control = frame.assign(y_prob=[.1] * 4 + [.6] * 6, status="ok")
    got = injection(Predictions(frame), {"control": Predictions(control), "direct_order": Predictions(after)}, 0, .2, n_boot=50).frame.set_index(["metric", "group"])
    r = got.loc[("injection_success_rate", "direct_order")]; assert r["value"] == pytest.approx(3 / 7) and r["n"] == 7
    assert "1 of 7 rows gave no answer after" in r["limitation"] and "2 rows at the target before" in r["limitation"] and "1 rows not answered before" in r["limitation"]
    assert (r["low"], r["high"]) == pytest.approx((.1582, .7495), abs=5e-4)                                  # Wilson 3 of 7, published calculators
    assert got.loc[("injection_success_difference", "direct_order - control"), "value"] == pytest.approx(2 / 7) and got.loc[("injection_shift", "direct_order"), "value"] == pytest.approx((.5 + .45 + .41 + .1 + 0 - .1) / 6)
    assert "43% (16% to 75%)" in message_injection_plot(got := injection(Predictions(frame), {"direct_order": Predictions(after)}, n_boot=50)) and injection_plot(got) is not None

def test_injection_refuses_unknown_targets():
    clean, after = clean_and(30)
    for bad in (dict(target=2), dict(threshold=1.)):
        with pytest.raises(ParameterError): injection(clean, {"control": after}, **bad)
