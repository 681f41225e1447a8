"Features against a slow and obvious loop in pandas, in every window; the same numbers from imported codes as from the older style."
from datetime import datetime, timedelta
import numpy as np, pandas as pd, polars as pl, pytest
from clinllm.core.tables import Cohort, Timeline
from clinllm.ehr.cohort import READMISSION_30D, build_cohort
from clinllm.ehr.features import COLUMNS, MORE, features
from clinllm.ehr.vocabulary import KINDS

WINDOWS = ("stay", "24h", "7d", "before")
NAME = {"LAB//creatinine//mg/dL": "creatinine", "LAB//glucose//mg/dL": "glucose", "LAB//haemoglobin//g/dL": "hemoglobin", "LAB//potassium//mmol/L": "potassium", "LAB//sodium//mmol/L": "sodium", "LAB//urea//mg/dL": "bun",
        "LAB//wbc//10*3/uL": "wbc", "VITAL//heart_rate//bpm": "heart_rate", "VITAL//oxygen_saturation//%": "oxygen_saturation", "VITAL//respiratory_rate//breaths/min": "respiratory_rate",
        "VITAL//systolic_bp//mmHg": "systolic_pressure", "VITAL//temperature//Cel": "temperature"}
LIMITS = dict(creatinine=(.5, 1.3), glucose=(70, 140), hemoglobin=(12, 18), potassium=(3.5, 5), sodium=(136, 145), bun=(8, 20), wbc=(4, 11), heart_rate=(51, 90), oxygen_saturation=(96, np.inf), respiratory_rate=(12, 20),
              systolic_pressure=(111, 219), temperature=(36.1, 38))

@pytest.fixture(scope="module")
def patients():
    "50 invented patients, asked at discharge and inside the stay: after 24 hours and at a random moment; some results come late"
    from clinllm.ehr.hospital import make_hospital
    timeline = make_hospital(n_patients=50, seed=11).timeline; rng = np.random.default_rng(0)
    late = rng.random(len(timeline)) < .2
    events = timeline.events.with_columns(known_time=pl.when(pl.Series(late) & pl.col("numeric_value").is_not_null()).then(pl.col("time") + pl.duration(hours=9)))
    at_discharge = build_cohort(timeline).frame
    day_one = at_discharge.assign(prediction_time=at_discharge["admission_time"] + pd.Timedelta(hours=24))
    some_time = at_discharge.assign(prediction_time=at_discharge["admission_time"] + ((at_discharge["prediction_time"] - at_discharge["admission_time"]) * rng.random(len(at_discharge))).dt.floor("s"))
    frame = pd.concat([at_discharge, day_one, some_time]).drop_duplicates(["subject_id", "prediction_time"])
    return Timeline(events, source="synthetic", kind="synthetic"), Cohort(frame, READMISSION_30D)

def in_window(e, window, row):
    "Whether one event lies in a window, from the definition"
    if pd.isna(e.time): return False
    in_stay = e.time >= row.admission_time or e.hadm_id == row.hadm_id
    if window in ("stay", "before"): return in_stay == (window == "stay")
    return row.prediction_time - e.time <= pd.Timedelta(window)

def one_measurement(results, row):
    "The eight statistics of one measurement in one window; results: (time, value) in order"
    if not results: return dict.fromkeys(("last", "min", "max", "slope", "mean", "days_since"), np.nan) | dict(count=0, missing=1)
    days, values = [(t - results[0][0]).total_seconds() / 86400 for t, _ in results], [v for _, v in results]
    return dict(last=values[-1], min=min(values), max=max(values), slope=np.polyfit(days, values, 1)[0] if len(set(days)) > 1 else np.nan, mean=np.mean(values), count=len(values),
                days_since=(row.prediction_time - results[-1][0]).total_seconds() / 86400, missing=0)

def plain_features(timeline, row):
    "Expected values of one row, by loops over its patient's events"
    events = [e for e in timeline.itertuples() if e.subject_id == row.subject_id and not e.time > row.prediction_time and not e.known_time > row.prediction_time]
    out = {}
    for window in WINDOWS:
        end = "" if window == "stay" else "_" + window
        inside = [e for e in events if in_window(e, window, row)]; abnormal = 0
        for name, (low, high) in LIMITS.items():
            found = one_measurement(sorted((e.time, float(f"{e.numeric_value:.4g}")) for e in inside if NAME.get(e.code) == name), row)
            out |= {f"{name}_{s}{end}": v for s, v in found.items()}; abnormal += found["count"] > 0 and not low <= found["last"] <= high
        out[f"n_abnormal{end}"] = abnormal if any(e.code in NAME for e in inside) else np.nan
        for kind, start in dict(diagnosis="DIAGNOSIS", medication="MEDICATION", lab="LAB", vital="VITAL", note="NOTE", procedure="PROCEDURE").items():
            out[f"n_{kind}_events{end}"] = sum(e.code.startswith(start) for e in inside)
        if end: out[f"condition_heart_failure{end}"] = len({e.code for e in inside if e.code.startswith(("DIAGNOSIS//ICD10CM//I50", "DIAGNOSIS//ICD10CM//I11", "DIAGNOSIS//ICD10CM//I13"))})
    coded = {e.code for e in events if e.code.startswith("DIAGNOSIS")}
    return out | dict(n_diagnoses=len(coded), condition_diabetes=sum(c.split("//")[2][:3] in ("E08", "E10", "E11", "E13") for c in coded), prior_admissions=sum(e.code.startswith("HOSPITAL_ADMISSION") and e.time < row.admission_time for e in events),
                      n_drugs=len({e.code for e in events if e.code.startswith("MEDICATION") and in_window(e, "stay", row)}), length_of_stay_days=(row.prediction_time - row.admission_time) / pd.Timedelta(days=1))

def test_features_agree_with_a_plain_loop(patients):
    timeline, cohort = patients
    table = features(timeline.until(cohort), **MORE)
    by_patient = dict(iter(timeline.events.to_pandas().groupby("subject_id")))
    expected = pd.DataFrame([plain_features(by_patient[row.subject_id], row) for row in cohort.frame.itertuples()])
    pd.testing.assert_frame_equal(table[expected.columns], expected, check_dtype=False, rtol=1e-6, atol=1e-6)
    assert len(expected) > 100 and expected.shape[1] > 400 and expected.filter(regex="slope$|slope_7d").notna().any().all()

def test_late_results_are_not_known(patients):
    "The same patients with every result known at once have more results at some predictions, and never fewer"
    timeline, cohort = patients
    count = lambda t: features(t.until(cohort), statistics=("count",)).filter(regex="_count$").sum(axis=1)
    now = count(Timeline(timeline.events.with_columns(known_time=pl.lit(None)), kind="synthetic"))
    assert (count(timeline) <= now).all() and (count(timeline) < now).any()

# --- imported data ---------------------------------------------------------------------------------------------------------

CODE = {"LAB//creatinine//mg/dL": ("LOINC//2160-0", "mg/dL"), "LAB//glucose//mg/dL": ("LOINC//2345-7", "mg/dL"), "LAB//haemoglobin//g/dL": ("LOINC//718-7", "g/dL"), "LAB//potassium//mmol/L": ("LOINC//2823-3", "mmol/L"),
        "LAB//sodium//mmol/L": ("MIMIC//50983", "mmol/L"), "LAB//urea//mg/dL": ("EICU//BUN", "mg/dL"), "LAB//wbc//10*3/uL": ("LOINC//6690-2", "10*3/uL"), "VITAL//heart_rate//bpm": ("LOINC//8867-4", "/min"),
        "VITAL//oxygen_saturation//%": ("LOINC//2708-6", "%"), "VITAL//respiratory_rate//breaths/min": ("LOINC//9279-1", "/min"), "VITAL//systolic_bp//mmHg": ("LOINC//8480-6", "mm[Hg]"), "VITAL//temperature//Cel": ("CLIF//temp_c", "Cel")}

def as_imported(timeline):
    "The same events as an importer writes them: codes by system, units and kinds in columns, names and concepts beside"
    codes, rows = timeline.events["code"].unique().to_list(), []
    for c in codes:
        first, *rest = c.split("//")
        if c in CODE: rows.append((c, *CODE[c], first.lower(), None, NAME[c].replace("_", " ").replace("bun", "BUN") if CODE[c][0].split("//")[0] in ("MIMIC", "EICU", "CLIF") else None))
        elif first == "DIAGNOSIS": rows.append((c, "//".join(rest), None, "diagnosis", None, None))
        elif first == "MEDICATION": rows.append((c, f"RXNORM//{abs(hash(c))}", None, "medication", rest[0], None))
        elif first == "NOTE": rows.append((c, c, None, "note", None, None))
        else: rows.append((c, c, None, "visit" if first.startswith("HOSPITAL") else "patient", None, None))
    table = pl.DataFrame(rows, schema=["code", "new", "unit", "kind", "description", "concept"], orient="row")
    events = timeline.events.drop("unit", "kind").join(table, on="code", maintain_order="left").with_columns(code="new").drop("new", "description", "concept")
    return Timeline(events, kind="synthetic", codes=table.select("kind", "description", "concept", "unit", code="new").unique("code"))

def test_imported_codes_give_the_same_numbers(patients):
    timeline, cohort = patients
    pd.testing.assert_frame_equal(features(timeline.until(cohort), **MORE), features(as_imported(timeline).until(cohort), **MORE))

# --- shape ------------------------------------------------------------------------------------------------------------------

def test_order_of_the_file_changes_nothing(patients):
    "Also where two results of one test carry the same time: the higher one counts as the last"
    timeline, cohort = patients
    double = timeline.events.filter(pl.col("numeric_value").is_not_null()).with_columns(pl.col("numeric_value") * 1.1)
    both = pl.concat([timeline.events, double]); tables = [features(Timeline(both.sample(fraction=1, shuffle=True, seed=s), kind="synthetic").until(cohort), **MORE) for s in (0, 1)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)

def test_rows_do_not_depend_on_their_neighbours(patients):
    timeline, cohort = patients
    few = Cohort(cohort.frame.sample(20, random_state=0), cohort.task)
    place = cohort.frame.reset_index().merge(few.frame[["subject_id", "prediction_time"]].assign(order=range(len(few))), on=["subject_id", "prediction_time"]).sort_values("order")["index"]
    pd.testing.assert_frame_equal(features(timeline.until(few), **MORE), features(timeline.until(cohort), **MORE).iloc[place].reset_index(drop=True))

def test_columns_are_the_same_for_every_source(patients):
    timeline, cohort = patients
    nothing = Timeline(pl.DataFrame(dict(subject_id=[1], time=[datetime(1950, 1, 1)], code=["MEDS_BIRTH"])), kind="synthetic")
    alone = Cohort(pd.DataFrame(dict(subject_id=[1, 2], prediction_time=[datetime(2024, 1, 1)] * 2, label=[0, 1], split=["train", "test"])), READMISSION_30D)
    empty = features(nothing.until(alone), **MORE)
    assert list(empty.columns) == list(features(timeline.until(cohort), **MORE).columns) and (empty.dtypes == "float64").all()
    assert empty["age"].tolist()[0] == 74 and (empty.filter(regex="_missing") == 1).all(axis=None) and (empty.filter(regex="_count|^n_.*_events") == 0).all(axis=None) and empty.filter(regex="_last|n_abnormal").isna().all(axis=None)
    assert list(features(nothing.until(alone)).columns) == COLUMNS and len(features(nothing.until(alone), kinds=KINDS).columns) == len(COLUMNS) + len(KINDS)
