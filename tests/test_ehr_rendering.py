"Rendering: the synthetic hospital reads as it always did; nothing from after the prediction in any text; the same text for any order and style of codes."
import hashlib, re
from dataclasses import replace
from datetime import datetime, timedelta
import numpy as np, pandas as pd, polars as pl, pytest
from clinllm.core.tables import Cohort, Timeline
from clinllm.ehr.cohort import READMISSION_30D, build_cohort
from clinllm.ehr.features import MORE, features
from clinllm.ehr.rendering import SHOWN, TREND_DAYS, count_roughly, known_events, measurements, model_input, render, text_sources, trends
from clinllm.ehr.vocabulary import CONCEPTS
from test_ehr_features import as_imported

@pytest.fixture(scope="module")
def hospital():
    from clinllm.ehr.hospital import make_hospital
    return make_hospital(n_patients=200, seed=3).timeline

def test_the_synthetic_hospital_reads_as_before(hospital):
    "Hashes of what the version of October 2026 wrote, so that recorded results stay comparable. Change them only together with the results."
    history = hospital.until(build_cohort(hospital)); table = features(history).round(6)
    texts = "\n\n".join(render(history, 40) + render(history, 1000) + model_input(history, 320))
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "c1106985ba1ff61c"
    assert hashlib.sha256(pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes()).hexdigest()[:16] == "b5e2888dadde6246"

# --- the future -------------------------------------------------------------------------------------------------------------

LATER = timedelta(microseconds=1)

def plant(timeline, cohort):
    "Events of every kind around each prediction k, marked seenKKKKx (known) or lateKKKKx (not yet), and results whose value holds k"
    rows = []
    for k, r in enumerate(cohort.frame.itertuples()):
        t, h = r.prediction_time.to_pydatetime(), timedelta(hours=1)
        for mark, time, known in (("seen", t - h, None), ("seen", t - h, t), ("late", t + LATER, None), ("late", t - h, t + LATER), ("late", t - h, t + 30 * h), ("late", t + 700 * h, None)):
            name = f"{mark}{k:05}x"
            for code, kind, text, value in ((f"LAB//{name}//mg/dL", None, None, 5.), (f"VITAL//{name}//bpm", None, None, 5.), (f"LOINC//{name}", "lab", None, 5.), (f"MEDICATION//{name}", None, None, None), (f"RXNORM//{name}", "medication", None, None),
                    (f"DIAGNOSIS//ICD10CM//{name}", None, None, None), (f"SNOMED//{name}", "diagnosis", None, None), (f"SNOMED//{name}", "allergy", None, None), (f"ICD10PCS//{name}", "procedure", None, None), (f"NOTE//{name}", "note", f"{name} " * 25, None)):
                rows.append((r.subject_id, time, code, value, text, r.hadm_id, known, kind))
            if mark == "late": rows += [(r.subject_id, time, "LAB//creatinine//mg/dL", 1000. * (100 + k), None, r.hadm_id, known, None), (r.subject_id, time, "NOTE//discharge_summary", None, f"{name} went home.", r.hadm_id, known, "note")]
    schema = ["subject_id", "time", "code", "numeric_value", "text_value", "hadm_id", "known_time", "kind"]
    planted = pl.DataFrame(rows, schema=schema, orient="row", infer_schema_length=None).cast({c: timeline.events.schema[c] for c in schema})
    return replace(timeline, events=pl.concat([timeline.events, planted], how="diagonal"))

@pytest.mark.parametrize("task", ["readmission_30d", "in_hospital_mortality_24h", "in_hospital_mortality_48h", "length_of_stay_7d", "aki_48h", "icd10_coding"])
def test_no_text_holds_what_was_not_known(hospital, task):
    cohort = build_cohort(hospital, task).sample(50, seed=1); frame = cohort.frame
    history = plant(hospital, cohort).until(cohort)
    for texts in (render(history, 10**6), render(history, 10**6, with_trends=True), render(history, 10**6, style="table"), model_input(history, 10**6), model_input(history, 400)):
        for i, (text, row) in enumerate(zip(texts, frame.itertuples())):
            found = {int(k) for k in re.findall(r"late(\d{5})x", text)} | {int(k) - 100 for k in re.findall(r"\b(\d{3})000\b", text)}
            assert all(frame["subject_id"][k] == row.subject_id and frame["prediction_time"][k] < row.prediction_time for k in found)       # only what was planted after an earlier prediction of the same patient
    for i, text in enumerate(render(history, 10**6)): assert text.count(f"seen{i:05}x") >= 5      # and what was known is told: lab, vital sign, drug, diagnosis, procedure
    inside = ~frame["prediction_time"].isin(hospital.events.filter(pl.col("code").str.starts_with("HOSPITAL_DISCHARGE"))["time"].to_list())
    assert all(("discharged after" in text or "died after" in text) != now for text, now in zip(render(history), inside))
    firsts = Cohort(frame.loc[frame.groupby("subject_id")["prediction_time"].idxmin()], cohort.task); late = plant(hospital, firsts)
    late = replace(late, events=late.events.filter(~pl.col("code").str.contains("seen")))
    pd.testing.assert_frame_equal(features(late.until(firsts), **MORE), features(hospital.until(firsts), **MORE))

# --- one text for one record -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("style", ["prose", "table"])
def test_order_of_the_file_changes_no_letter(hospital, style):
    "Also where results, notes and facts carry the same time"
    cohort = build_cohort(hospital, "in_hospital_mortality_24h")
    twice = hospital.events.filter(pl.col("numeric_value").is_not_null() | pl.col("code").str.starts_with("NOTE")).with_columns(pl.col("numeric_value") * 1.1, pl.col("text_value") + " again")
    events = pl.concat([hospital.events, twice]); told = set()
    for seed in range(3):
        history = replace(hospital, events=events.sample(fraction=1, shuffle=True, seed=seed)).until(cohort)
        told.add("\n".join(render(history, 300, style=style, with_trends=True) + model_input(history, 300, style=style)))
    assert len(told) == 1

@pytest.mark.parametrize("style", ["prose", "table"])
def test_imported_codes_read_the_same(hospital, style):
    few = replace(hospital, events=hospital.events.filter(pl.col("subject_id").is_in(hospital.subjects[:60].to_list())), splits=None)
    for task in ("readmission_30d", "in_hospital_mortality_24h"):
        cohort = build_cohort(few, task)
        assert render(few.until(cohort), 400, style=style) == render(as_imported(few).until(cohort), 400, style=style)

# --- trends ---------------------------------------------------------------------------------------------------------------------

def test_trends_agree_with_numpy(hospital):
    history = hospital.until(build_cohort(hospital).sample(60, seed=0)); m = measurements(known_events(history).filter("in_stay"))
    found = {(r["row"], r["name"]): r["trend"] for r in trends(m).to_dicts()}; seen = set()
    for (row, name), g in m.to_pandas().groupby(["row", "name"]):
        g = g[g["prediction_time"] - g["time"] <= pd.Timedelta(days=TREND_DAYS)]; days = (g["time"] - g["time"].min()).dt.total_seconds() / 86400
        expected = None
        if days.nunique() > 1:
            low, high = CONCEPTS[name].low, CONCEPTS[name].high
            change = np.polyfit(days, g["value"], 1)[0] * days.max() / ((high - low) if low and high else low or high)
            if abs(abs(change) - .25) < 1e-6: continue      # on the border, where rounding decides
            expected = "rising" if change > .25 else "falling" if change < -.25 else "steady"
        assert found.get((row, name)) == expected; seen.add(expected)
    assert seen == {"rising", "falling", "steady", None}

# --- by hand ---------------------------------------------------------------------------------------------------------------------

def day(d): return datetime(2024, 1, 1) + timedelta(days=d)

def ask(rows, at, hadm=10, codes=None, **columns):
    "History of one patient, 60 years old, asked on day `at`; rows are (time, code, more columns as a dict)"
    events = pl.DataFrame([dict(subject_id=1, time=t, code=c, **more) for t, c, *rest in [(datetime(1964, 1, 1), "MEDS_BIRTH"), (None, "GENDER//Male"), *rows] for more in [rest[0] if rest else {}]], infer_schema_length=None)
    frame = pd.DataFrame(dict(subject_id=[1], prediction_time=[day(at)], label=[0], split=["test"], hadm_id=pd.array([hadm], dtype="Int64"), **columns))
    return Timeline(events, kind="synthetic", codes=codes).until(Cohort(frame, READMISSION_30D))

CAME, HOME = (day(0), "HOSPITAL_ADMISSION//EMERGENCY", dict(hadm_id=10)), (day(4), "HOSPITAL_DISCHARGE//HOME", dict(hadm_id=10))

@pytest.mark.parametrize("rows, at, hadm, said", [
    ([CAME, HOME], 4, 10, "60-year-old male, emergency admission, discharged after 4.0 days to home. Earlier stays: 0."),
    ([CAME, HOME], 1, 10, "60-year-old male, 24 hours after an emergency admission. Earlier stays: 0."),
    ([CAME, HOME], 3, 10, "60-year-old male, 3.0 days after an emergency admission. Earlier stays: 0."),
    ([CAME, HOME], 1 / 24, 10, "60-year-old male, 1 hour after an emergency admission. Earlier stays: 0."),
    ([CAME, HOME], 5, 10, "60-year-old male, emergency admission, discharged after 4.0 days to home, 24 hours ago. Earlier stays: 0."),        # the summary was stored a day later
    ([(t, c) for t, c, _ in (CAME, HOME)], 1, -1, "60-year-old male, 24 hours after an emergency admission. Earlier stays: 0."),            # a source without numbers of stays
    ([(t, c) for t, c, _ in (CAME, HOME)], 4, -1, "60-year-old male, emergency admission, discharged after 4.0 days to home. Earlier stays: 0."),
    ([CAME, (day(.9), "HOSPITAL_DISCHARGE//OTHER", dict(hadm_id=10)), (day(1), "HOSPITAL_ADMISSION//URGENT", dict(hadm_id=11)), (day(6), "HOSPITAL_DISCHARGE//SNF", dict(hadm_id=11))], 2, 11, "60-year-old male, 24 hours after an urgent admission. Earlier stays: 1, 1 unplanned; last discharge 0 days before this admission."),
    ([(day(0), "HOSPITAL_ADMISSION//UNKNOWN", dict(hadm_id=10)), (day(2), "HOSPITAL_DISCHARGE//EXPIRED", dict(hadm_id=10))], 2, 10, "60-year-old male, hospital admission, died after 2.0 days. Earlier stays: 0."),
    ([CAME, (day(.5), "ICU_ADMISSION//Med-Surg ICU", dict(hadm_id=10)), HOME], 1, 10, "60-year-old male, 24 hours after an emergency admission, 12 hours after admission to intensive care. Earlier stays: 0."),
    ([CAME, (day(.5), "ICU_ADMISSION//Med-Surg ICU", dict(hadm_id=10)), (day(.9), "ICU_DISCHARGE//Med-Surg ICU", dict(hadm_id=10)), HOME], 1, 10, "60-year-old male, 24 hours after an emergency admission. Earlier stays: 0."),
    ([], 0, 10, "60-year-old male, no admission on record. Earlier stays: 0.")])
def test_first_lines(rows, at, hadm, said): assert render(ask(rows, at, hadm)) == [said]

def test_a_transfer_inside_an_episode_is_not_a_discharge():
    "The cohort says when the episode began; the first hospital's discharge is of another stay"
    rows = [CAME, (day(1), "HOSPITAL_DISCHARGE//OTHER", dict(hadm_id=10)), (day(1), "HOSPITAL_ADMISSION//URGENT", dict(hadm_id=11)), (day(6), "HOSPITAL_DISCHARGE//SNF", dict(hadm_id=11))]
    said = lambda at: render(ask(rows, at, 11, admission_time=[day(0)]))[0]
    assert said(2).startswith("60-year-old male, 2.0 days after an emergency admission.") and said(6).startswith("60-year-old male, emergency admission, discharged after 6.0 days to a nursing facility.")

def test_names_from_the_source_are_told_and_bare_numbers_are_not():
    codes = pl.DataFrame([("SNOMED//1", "Essential hypertension (disorder)"), ("SNOMED//2", "Penicillin V\n(substance)"), ("SNOMED//3", "Appendectomy; open (procedure)"), ("RXNORM//9", "furosemide 40 MG Oral Tablet "), ("LOINC//x-1", "Odd | test\nof blood"), ("SNOMED//4", "Gout (disorder)")],
                         schema=["code", "description"], orient="row").with_columns(concept=pl.lit(None, dtype=pl.String), kind=pl.lit(None, dtype=pl.String))
    stay = dict(hadm_id=10)
    rows = [CAME, (day(-99), "SNOMED//1", dict(kind="diagnosis")), (day(-98), "SNOMED//4", dict(kind="diagnosis")), (day(-50), "SNOMED//2", dict(kind="allergy")), (day(1), "SNOMED//3", stay | dict(kind="procedure")), (day(-90), "SNOMED//3", dict(kind="procedure")), (day(1), "RXNORM//9", stay | dict(kind="medication")),
            (day(1), "HICL//8255", stay | dict(kind="medication")), (day(1), "LOINC//x-1", stay | dict(kind="lab", unit="{score}", numeric_value=7.)), (day(1), "LOINC//2160-0", stay | dict(kind="lab", unit="umol/L", numeric_value=180.)), (day(1), "ICD10CM//I50.9", stay | dict(known_time=day(9)))]
    head = "60-year-old male, 2.0 days after an emergency admission. Earlier stays: 0.\n"
    told = "Known conditions: hypertension; Gout.\nDrugs: furosemide 40 MG Oral Tablet.\nProcedures: Appendectomy open.\nAllergies: Penicillin V.\n"
    assert render(ask(rows, 2, codes=codes)) == [head + told + "Other results: Odd | test of blood 7; creatinine 180 umol/L."]
    assert render(ask(rows, 2, codes=codes), style="table") == [head + told + "\nresult | last | trend | worst | ago\n---|---|---|---|---\nOdd / test of blood | 7 |  |  | 24 h\ncreatinine, umol/L | 180 |  |  | 24 h"]

def test_every_row_of_a_table_has_five_cells(hospital):
    for text in render(hospital.until(build_cohort(hospital, "in_hospital_mortality_48h")), 500, style="table"):
        head, _, table = text.partition("\n\n")
        assert {line.count("|") for line in table.splitlines()} <= {4} and not any(word in text for word in ("null", "None", "NaN"))

def test_notes_share_the_budget_with_the_timeline():
    note = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty."
    rows = [CAME, *[(day(d), f"NOTE//{c}", dict(hadm_id=10, text_value=f"{c}: {note}")) for d, c in ((.1, "old"), (.5, "new"))], (day(.2), "LAB//sodium//mmol/L", dict(hadm_id=10, numeric_value=130.)), (day(-20), "NOTE//before", dict(text_value=f"before: {note}"))]
    history = ask(rows, 1); whole = model_input(history, 1000)[0]
    assert whole.index("sodium") < whole.index("new: One") < whole.index("old: One") and "before: One" not in whole and text_sources(history) == ["timeline and notes"]
    for budget in range(1, 140, 6):
        text = model_input(history, budget)[0]
        assert count_roughly(text) <= budget and ("sodium" not in text or "old: One" in text and text.endswith("twenty."))      # the timeline's pieces come in when the notes are whole

def test_units_are_shown_as_people_write_them(): assert SHOWN["heart rate"] == "bpm" and SHOWN["PT"] == "sec" and set(SHOWN) == set(CONCEPTS)
