"CLIF: stays by hand, the demo against a plain reader, ids that are no numbers, CSV as well as Parquet."
from datetime import datetime, timezone
import polars as pl, pytest
from clinllm.core.errors import DataError
from clinllm.ehr import mimic_demo
from clinllm.ehr.clif import BREATHING, CLIF, DIALYSIS, TABLES
from clinllm.ehr.cohort import build_cohort, join_stays, read_stays
from clinllm.ehr.importing import run_import, subject_key
from clinllm.ehr.mimic_demo import read_mimic_demo
from clinllm.ehr.sources import read_meds

def at(*t): return datetime(2020, 5, *t)
SMALL = dict(
    patient=dict(patient_id=["p1", "p2", "p3"], sex_category=["Female", "Male", "Unknown"], race_category=["American Indian or Alaska Native", "Unknown", "White"], ethnicity_category=["Non-Hispanic", "Hispanic", "Unknown"],
                 language_category=["English", "Unknown or NA", "Other and unspecified languages"], birth_date=[None, datetime(1950, 7, 4), None], death_dttm=[None, None, at(20, 3)]),
    hospitalization=dict(patient_id=["p1", "p1", "p2", "p3"], hospitalization_id=["a", "b", "c", "d"], admission_dttm=[at(1, 10), at(4, 15), at(1), at(3)], discharge_dttm=[at(4, 12), at(9, 12), None, at(20, 3)], age_at_admission=[60, 60, 99, 50],
                         admission_type_name=[None, None, "EU OBSERVATION", None], admission_type_category=["ed", "osh", "ed", "something"], discharge_category=["Acute Care Hospital", "Home", "Still Admitted", "Expired"]),
    adt=dict(hospitalization_id=["a"] * 5, hospital_id=["north"] * 5, in_dttm=[at(2, 11), at(1, 8), at(1, 11), at(3, 1), at(3, 9)], out_dttm=[at(3, 1), at(1, 11), at(2, 11), at(3, 9), at(4, 12)],
             location_name=["SICU", "ED", "MICU", "Ward 3", "CCU"], location_category=["icu", "ed", "icu", "ward", "icu"]),
    hospital_diagnosis=dict(hospitalization_id=["a", "c", "d"], diagnosis_code=["I509", "4280", "E8782"], diagnosis_code_format=["ICD10CM", "ICD9CM", "ICD9CM"]),
    patient_procedures=dict(hospitalization_id=["a"] * 4, procedure_code=["3961", "02HV33Z", "99219", "G0378"], procedure_code_format=["ICD9", "ICD10PCS", "CPT", "HCPCS"], procedure_billed_dttm=[at(2)] * 4),
    labs=dict(hospitalization_id=["a", "a", "a", "nobody"], lab_collect_dttm=[at(1, 12), None, at(2, 12), at(1)], lab_result_dttm=[at(1, 13), at(1, 14), None, at(1)], lab_category=["creatinine", "so2_arterial", "potassium", "sodium"], lab_name=["Creatinine"] * 4,
              lab_value=["1.2", ">100", "UNABLE TO REPORT", "140"], lab_value_numeric=[1.2, 100, None, 140], reference_unit=["mg/dL", "%", "mmol/L", "mmol/L"], lab_loinc_code=["2160-0", None, None, None]),
    vitals=dict(hospitalization_id=["a"] * 2, recorded_dttm=[at(1, 12)] * 2, vital_category=["temp_c", "weight_kg"], vital_value=[37.5, 80]),
    medication_admin_continuous=dict(hospitalization_id=["a"] * 3, admin_dttm=[at(1, 12), at(1, 13), at(1, 14)], med_category=["magnesium"] * 3, med_dose=[2., 3., 0.], med_dose_unit=["g"] * 3, mar_action_category=["start", "dose_change", "stop"]),
    medication_admin_intermittent=dict(hospitalization_id=["a"] * 2, admin_dttm=[at(1, 12), at(1, 13)], med_category=["sodium chloride"] * 2, med_dose=[500., 0.], med_dose_unit=["mL"] * 2, mar_action_category=["given", "not_given"]),
    respiratory_support=dict(hospitalization_id=["a", "a"], recorded_dttm=[at(1, 12), at(1, 13)], device_category=["IMV", None], mode_category=[None, None], fio2_set=[.5, None], peep_obs=[5., None]),
    patient_assessments=dict(hospitalization_id=["a", "a"], recorded_dttm=[at(1, 12)] * 2, assessment_category=["gcs_total", "cam_total"], numerical_value=[14., None], categorical_value=[None, "Positive"], text_value=[None, None]),
    position=dict(hospitalization_id=["a"], recorded_dttm=[at(1, 12)], position_category=["prone"]), code_status=dict(patient_id=["p1"], start_dttm=[at(1, 12)], code_status_category=["DNR"]),
    crrt_therapy=dict(hospitalization_id=["a"], recorded_dttm=[at(1, 12)], crrt_mode_category=["cvvhdf"], blood_flow_rate=[12000.]),
    microbiology_culture=dict(patient_id=["p1", "p1"], hospitalization_id=["a", "a"], order_dttm=[at(1, 11)] * 2, collect_dttm=[at(1, 12), None], result_dttm=[at(3, 12), None], fluid_category=["blood"] * 2, organism_category=["escherichia_coli", "no_growth"]),
    therapy_details=dict(hospitalization_id=["a"]))

def write(folder, how="parquet", **tables):
    folder.mkdir(exist_ok=True)
    for name, rows in (tables or SMALL).items(): getattr(pl.DataFrame(rows), f"write_{how}")(folder / f"clif_{name}.{how}")
    return folder

def key(*ids): return pl.DataFrame(dict(i=list(ids))).select(subject_key(pl.col("i"))).to_series().to_list()
def rows(events, *codes): return [(r["time"], r["known_time"], r["numeric_value"], r["unit"], r["text_value"]) for r in events.filter(pl.col("code").is_in(codes)).sort("time", "code").iter_rows(named=True)]
def run(source, target, **more): return run_import(CLIF, source, target, tolerance=.3, progress=False, **more)

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clif"); return run(write(folder / "in"), folder / "out")

@pytest.fixture(scope="module")
def events(small): return read_meds(small.target).events

# --- by hand -----------------------------------------------------------------------------------------------------------------

def test_people(events):
    p1, p2, p3 = key("p1", "p2", "p3"); told = {(s, c): t for s, t, c in events.filter(pl.col("kind") == "patient").select("subject_id", "time", "code").iter_rows()}
    assert told == {(p1, "GENDER//Female"): None, (p1, "RACE//Native American"): None, (p1, "LANGUAGE//English"): None, (p1, "MEDS_BIRTH"): datetime(1960, 1, 1), (p2, "GENDER//Male"): None, (p2, "RACE//Hispanic"): None,
                    (p2, "MEDS_BIRTH"): datetime(1950, 7, 4), (p3, "RACE//White"): None, (p3, "LANGUAGE//Other"): None, (p3, "MEDS_BIRTH"): datetime(1970, 1, 1), (p3, "MEDS_DEATH"): at(20, 3)}

def test_stays(events):
    stays = {h: (t, to, d) for h, t, to, d in read_stays(events).select("hadm_id", "type", "destination", "discharged").iter_rows()}
    a, b, c, d = key("a", "b", "c", "d")
    assert stays == {a: ("EMERGENCY", "OTHER", at(4, 12)), b: ("URGENT", "HOME", at(9, 12)), c: ("OBSERVATION", None, None), d: ("UNKNOWN", "EXPIRED", at(20, 3))}
    assert rows(events, "SITE//north")[0][0] == at(1, 10) and rows(events, "VISIT//EMERGENCY")[0][0] == at(1, 8)

def test_two_units_in_a_row_are_one_stay_in_intensive_care(events):
    "MICU then SICU, then the ward, then CCU: two stays"
    moves = events.filter(pl.col("code").str.starts_with("ICU_")).sort("time").select("time", "code").rows()
    assert moves == [(at(1, 11), "ICU_ADMISSION//MICU"), (at(3, 1), "ICU_DISCHARGE//SICU"), (at(3, 9), "ICU_ADMISSION//CCU"), (at(4, 12), "ICU_DISCHARGE//CCU")]
    assert events.filter(pl.col("code").str.starts_with("CLIF//location//")).height == 5

def test_billed_codes_wait_for_the_end_of_the_episode(events):
    "b begins three hours after a; c has not ended, so its codes are not final"
    billed = at(10, 12)
    assert rows(events, "ICD10CM//I50.9") == [(at(4, 12), billed, None, None, None)] and rows(events, "ICD9CM//E878.2") == [(at(20, 3), at(21, 3), None, None, None)] and rows(events, "ICD9CM//428.0") == []
    assert rows(events, "ICD9PCS//39.61", "ICD10PCS//02HV33Z", "CPT4//99219", "HCPCS//G0378") == [(at(2), billed, None, None, None)] * 4

def test_labs_by_sample_and_result(events):
    assert rows(events, "LOINC//2160-0") == [(at(1, 12), at(1, 13), pytest.approx(1.2), "mg/dL", None)]
    assert rows(events, "CLIF//so2_arterial") == [(at(1, 14), at(1, 14), None, "%", ">100")]            # no time of the sample; beyond the limit
    assert rows(events, "CLIF//potassium") == [(at(2, 12), None, None, "mmol/L", "UNABLE TO REPORT")] and rows(events, "CLIF//sodium") == []
    assert rows(events, "CLIF//escherichia_coli") == [(at(1, 12), at(3, 12), None, None, "blood")]

def test_a_drug_is_not_a_test(small, events):
    assert rows(events, "CLIF//medication//magnesium") == [(at(1, 12), None, 2, "g", None), (at(1, 13), None, 3, "g", None)] and rows(events, "CLIF//medication//sodium_chloride") == [(at(1, 12), None, 500, "mL", None)]
    concepts = {c["code"]: c["concept"] for c in read_meds(small.target).codes.iter_rows(named=True)}
    assert concepts["CLIF//medication//magnesium"] is None and concepts["CLIF//potassium"] == "potassium" and concepts["CLIF//temp_c"] == "temperature" and concepts["CLIF//so2_arterial"] is None

def test_the_rest(events):
    assert rows(events, "CLIF//temp_c", "CLIF//weight_kg") == [(at(1, 12), None, 37.5, "Cel", None), (at(1, 12), None, 80, "kg", None)]
    assert rows(events, "CLIF//fio2_set", "CLIF//peep_obs") == [(at(1, 12), None, .5, "1", None), (at(1, 12), None, 5, "cm[H2O]", None)] and len(rows(events, "CLIF//device//imv", "CLIF//crrt_mode//cvvhdf", "CLIF//position//prone", "CLIF//code_status//dnr")) == 4
    assert rows(events, "CLIF//gcs_total")[0][2] == 14 and rows(events, "CLIF//cam_total")[0][4] == "Positive" and rows(events, "CLIF//blood_flow_rate")[0][2:4] == (12000, "mL/h")

def test_every_fault_is_counted(small):
    told = {(r.table.removeprefix("clif_"), r.rule): (r.action, r.records) for r in small.rules.itertuples()}
    assert told == {("hospital_diagnosis", "no time"): ("dropped", 1), ("labs", "no patient"): ("dropped", 1), ("microbiology_culture", "culture without a time of result"): ("dropped", 1), ("labs", "no time of result: taken as known when drawn"): ("kept", 1),
        ("labs", "value beyond a limit of the test: number missing, kept as text"): ("kept", 1), ("respiratory_support", "nothing to import in this row"): ("not imported", 1), ("therapy_details", "table of CLIF that has no events here"): ("not imported", 1),
        ("medication_admin_continuous", "the row does not say that the drug was given"): ("not imported", 1), ("medication_admin_intermittent", "the row does not say that the drug was given"): ("not imported", 1)}

# --- files ---------------------------------------------------------------------------------------------------------------------

def test_csv_gives_the_same_events(events, tmp_path):
    other = read_meds(run(write(tmp_path / "in", "csv"), tmp_path / "out").target).events; order = ["subject_id", "time", "code", "numeric_value", "text_value"]
    assert other.sort(order).equals(events.sort(order))

def test_zoned_times_keep_the_clock_of_the_file(tmp_path):
    table = {k: dict(v) for k, v in SMALL.items() if k in ("patient", "hospitalization")}
    for k in ("admission_dttm", "discharge_dttm"): table["hospitalization"][k] = [t and t.replace(tzinfo=timezone.utc) for t in table["hospitalization"][k]]
    stays = read_stays(read_meds(run(write(tmp_path / "in", **table), tmp_path / "out").target).events)
    assert set(stays["admitted"]) == {at(1, 10), at(4, 15), at(1), at(3)}

def test_a_folder_of_something_else(tmp_path):
    write(tmp_path / "in", labs=SMALL["labs"])
    with pytest.raises(DataError, match="clif_patient.parquet and clif_hospitalization.parquet"): run(tmp_path / "in", tmp_path / "out")

# --- real patients ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def demo(shared_data, tmp_path_factory): return run_import(CLIF, shared_data / "mimic4-demo-clif", tmp_path_factory.mktemp("demo") / "out", tolerance=0, progress=False)

def test_each_table_against_polars(demo, shared_data):
    "Records as another reader counts them; events counted from the columns; values the same"
    raw = {n: pl.read_parquet(shared_data / "mimic4-demo-clif" / f"{n}.parquet") for n in TABLES if n != "clif_microbiology_culture"}
    e, t = read_meds(demo.target).events, demo.table.set_index("table")
    for name, r in raw.items(): assert t.loc[name, "records"] == len(r) and t.loc[name, "dropped"] == 0
    filled = lambda name, columns: sum(len(raw[name]) - raw[name][c].null_count() for c in columns)
    same = {"clif_hospitalization": 620, "clif_hospital_diagnosis": 5210, "clif_patient_procedures": 863, "clif_labs": 51433, "clif_vitals": 94261, "clif_patient_assessments": 32697, "clif_position": 5094, "clif_code_status": 153,
            "clif_medication_admin_intermittent": 6340, "clif_medication_admin_continuous": len(raw["clif_medication_admin_continuous"].filter(pl.col("mar_action_category") != "stop")),
            "clif_respiratory_support": filled("clif_respiratory_support", ["device_category", "mode_category", *BREATHING]), "clif_crrt_therapy": filled("clif_crrt_therapy", ["crrt_mode_category", *DIALYSIS])}
    for name, n in same.items(): assert t.loc[name, "events"] == n, name
    theirs = raw["clif_labs"].filter(~pl.col("lab_value").str.contains("^[<>]").fill_null(False)).select(hadm_id=pl.col("hospitalization_id").cast(pl.Int64), time=pl.col("lab_collect_dttm").dt.replace_time_zone(None), known_time=pl.col("lab_result_dttm").dt.replace_time_zone(None),
        code="CLIF//" + pl.col("lab_category"), numeric_value=pl.col("lab_value_numeric").cast(pl.Float32)).drop_nulls().unique()
    ours = e.filter((pl.col("kind") == "lab") & pl.col("numeric_value").is_not_null()).select("hadm_id", "time", "known_time", "code", "numeric_value").unique()
    assert ours.join(theirs, on=ours.columns, how="anti").height == 0           # a result that was reported twice is one event
    assert ours.drop("known_time").sort(pl.all()).equals(theirs.drop("known_time").unique().select(ours.drop("known_time").columns).sort(pl.all()))

def test_no_code_of_an_episode_is_known_at_its_end(demo):
    e = read_meds(demo.target).events
    ends = join_stays(read_stays(e)).with_columns(end=pl.col("discharged").max().over("subject_id", "episode")).select("hadm_id", "end")
    billed = e.filter(pl.col("code").str.contains("^(ICD|CPT|HCPCS)")).join(ends, on="hadm_id")
    assert len(billed) == 5210 + 862 and (billed["known_time"] - billed["end"]).dt.total_hours().unique().to_list() == [24]
    late = e.filter(pl.col("kind") == "lab"); assert (late["known_time"] < late["time"]).sum() == 2        # two results in the demo are stamped before their sample

def test_the_demo_is_imported_once(shared_data, tmp_path, monkeypatch):
    calls = []; run_it = mimic_demo.run_import
    monkeypatch.setattr(mimic_demo, "run_import", lambda *a, **k: (calls.append(1), run_it(*a, **k))[1])
    one, two = (read_mimic_demo(shared_data / "mimic4-demo-clif", tmp_path) for _ in range(2))
    assert len(calls) == 1 and one.fingerprint == two.fingerprint and one.events.equals(two.events) and len(list(tmp_path.iterdir())) == 1
    assert one.splits is None and "Open Database License" in one.attribution and any("310 hospital stays" in n for n in one.notes)
    cohort = build_cohort(one); assert (len(cohort), cohort.frame["label"].sum()) == (222, 46)             # as before there was an importer

def test_a_changed_table_is_imported_again(shared_data, tmp_path):
    for p in (shared_data / "mimic4-demo-clif").glob("*.parquet"): (tmp_path / p.name).write_bytes(p.read_bytes())
    before = read_mimic_demo(tmp_path, tmp_path / "cache"); path = tmp_path / "clif_vitals.parquet"
    pl.read_parquet(path).head(1000).write_parquet(path)
    after = read_mimic_demo(tmp_path, tmp_path / "cache")
    assert before.fingerprint != after.fingerprint and len(before) - len(after) == 94261 - 1000
