"MIMIC-IV: a small export by hand, the demo against plain counts and against its CLIF copy, and files that are wrong."
import csv, gzip
from datetime import datetime
import pandas as pd, polars as pl, pytest
from clinllm.core.errors import DataError
from clinllm.ehr.clif import CLIF
from clinllm.ehr.cohort import read_stays
from clinllm.ehr.importing import run_import
from clinllm.ehr.mimic_iv import ADMISSION, LEFT_OUT, MIMIC_IV, TABLES, icd_code
from clinllm.ehr.sources import read_meds

ADMISSIONS = "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,discharge_location,insurance,language,race,edregtime,hospital_expire_flag"
SMALL = {
    "hosp/patients": "subject_id,gender,anchor_age,anchor_year,dod\n1,F,60,2150,2151-03-09\n2,M,91,2140,2140-02-03",
    "hosp/admissions": ADMISSIONS + "\n1,11,2150-03-01 10:00:00,2150-03-05 12:00:00,,EW EMER.,HOME HEALTH CARE,Medicare,ENGLISH,UNKNOWN,2150-03-01 07:00:00,0"
        "\n1,12,2150-03-05 17:00:00,2150-03-08 09:00:00,,URGENT,,Medicaid,?,ASIAN - CHINESE,,0\n2,21,2140-02-01 08:00:00,2140-02-03 06:30:00,2140-02-03 06:30:00,EU OBSERVATION,DIED,Private,Spanish,HISPANIC/LATINO - CUBAN,,1",
    "hosp/diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version\n1,11,1,4280,9\n1,11,2,E8782,9\n1,12,1,I509,10\n1,99,1,I10,10",
    "hosp/procedures_icd": "subject_id,hadm_id,seq_num,chartdate,icd_code,icd_version\n1,11,1,2150-03-02,3961,9\n1,12,1,2150-03-06,02HV33Z,10",
    "hosp/d_icd_diagnoses": "icd_code,icd_version,long_title\n4280,9,\"Congestive heart failure, unspecified\"\nI509,10,\"Heart failure, unspecified\"",
    "hosp/drgcodes": "subject_id,hadm_id,drg_type,drg_code,description,drg_severity,drg_mortality\n1,11,HCFA,21,SEPTICEMIA,,",
    "hosp/hcpcsevents": "subject_id,hadm_id,chartdate,hcpcs_cd,seq_num,short_description\n1,11,2150-03-02,99219,1,Hospital observation\n1,,2150-05-02,G0378,1,Observation per hr",
    "hosp/transfers": "subject_id,hadm_id,transfer_id,eventtype,careunit,intime,outtime\n1,,1,ED,Emergency Department,2150-01-01 01:00:00,2150-01-01 05:00:00\n1,11,2,admit,Medicine,2150-03-01 10:05:00,2150-03-05 12:00:00\n1,11,3,discharge,,2150-03-05 12:00:00,",
    "hosp/emar": "subject_id,hadm_id,emar_id,emar_seq,charttime,medication,event_txt,scheduletime,storetime\n1,11,a,1,2150-03-02 08:00:00,Furosemide,Administered,,2150-03-02 08:05:00\n1,11,b,2,2150-03-02 20:00:00,Furosemide,Not Given,,2150-03-02 20:05:00\n1,11,c,3,2150-03-03 08:00:00,Heparin,Delayed Administered,,2150-03-03 08:05:00",
    "hosp/prescriptions": "subject_id,hadm_id,starttime,stoptime,drug,ndc,dose_val_rx,dose_unit_rx\n1,11,2150-03-01 12:00:00,2150-03-04 12:00:00,Furosemide,409610210,20,mg\n1,11,2150-03-01 12:00:00,,Bag,0,1-2,BAG",
    "hosp/omr": "subject_id,chartdate,seq_num,result_name,result_value\n1,2150-02-01,1,Blood Pressure,120/80\n1,2150-02-01,1,Blood Pressure Standing (1 min),110/70\n1,2150-02-01,1,Weight (Lbs),150\n1,2150-02-01,1,eGFR,>60\n1,2150-02-01,2,Blood Pressure,refused",
    "hosp/microbiologyevents": "microevent_id,subject_id,hadm_id,micro_specimen_id,chartdate,charttime,spec_type_desc,storedate,storetime,test_itemid,test_name,org_itemid,org_name,isolate_num,ab_itemid,ab_name,interpretation,comments\n"
        "1,1,11,5,2150-03-02 00:00:00,2150-03-02 05:00:00,URINE,2150-03-04 00:00:00,2150-03-04 09:00:00,90039,URINE CULTURE,80002,ESCHERICHIA COLI,1,90012,GENTAMICIN,S,\n"
        "2,1,11,5,2150-03-02 00:00:00,2150-03-02 05:00:00,URINE,2150-03-04 00:00:00,2150-03-04 09:00:00,90039,URINE CULTURE,80002,ESCHERICHIA COLI,1,90018,CEFTRIAXONE,R,\n"
        "3,1,11,6,2150-03-02 00:00:00,,BLOOD CULTURE,2150-03-07 00:00:00,,90201,Blood Culture,,,,,,,NO GROWTH.\n4,1,11,7,2150-03-02 00:00:00,2150-03-02 05:00:00,SPUTUM,,,90055,RESPIRATORY CULTURE,,,,,,,PENDING",
    "hosp/d_labitems": "itemid,label,fluid,category\n50912,Creatinine,Blood,Chemistry\n51082,Creatinine,Urine,Chemistry\n51222,Hemoglobin,Blood,Hematology",
    "hosp/labevents": "labevent_id,subject_id,hadm_id,specimen_id,itemid,order_provider_id,charttime,storetime,value,valuenum,valueuom,ref_range_lower,ref_range_upper,flag,priority,comments\n"
        "1,1,11,1,50912,,2150-03-02 06:00:00,2150-03-02 07:10:00,1.4,1.4,mg/dL,0.4,1.1,abnormal,ROUTINE,\n2,1,,2,51082,,2150-01-02 06:00:00,2150-01-02 09:00:00,200,200,mg/dL,,,,,\n3,1,11,1,50912,,2150-03-03 06:00:00,2150-03-03 07:00:00,<0.2,0.2,mg/dL,,,,,\n"
        "4,1,11,1,50912,,2150-03-04 06:00:00,,___,,mg/dL,,,,,\"HEMOLYZED, no result\"\n5,9,,1,50912,,2150-03-04 06:00:00,,1,1,mg/dL,,,,,\n6,1,11,1,51222,,,2150-03-04 06:00:00,9,9,g/dL,,,,,",
    "icu/icustays": "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los\n1,11,5,MICU,SICU,2150-03-02 00:00:00,2150-03-03 00:00:00,1",
    "icu/d_items": "itemid,label,abbreviation,linksto,category\n223761,Temperature Fahrenheit,,chartevents,Routine Vital Signs\n220179,Non Invasive Blood Pressure systolic,,chartevents,Routine Vital Signs\n224650,Ectopy Type 1,,chartevents,Routine Vital Signs\n221906,Norepinephrine,,inputevents,Medications\n226559,Foley,,outputevents,Output\n225792,Invasive Ventilation,,procedureevents,Ventilation",
    "icu/chartevents": "subject_id,hadm_id,stay_id,charttime,storetime,itemid,value,valuenum,valueuom,warning\n1,11,5,2150-03-02 01:00:00,2150-03-02 01:20:00,223761,98.6,98.6,°F,0\n1,11,5,2150-03-02 01:00:00,2150-03-02 01:20:00,220179,101,101,mmHg,0\n1,11,5,2150-03-02 01:00:00,2150-03-02 01:20:00,224650,None,,,0",
    "icu/inputevents": "subject_id,hadm_id,stay_id,starttime,endtime,storetime,itemid,amount,amountuom,rate,rateuom\n1,11,5,2150-03-02 02:00:00,2150-03-02 09:00:00,2150-03-02 02:10:00,221906,7.5,mg,0.1,mcg/kg/min\n1,11,5,2150-03-02 03:00:00,2150-03-02 03:01:00,2150-03-02 03:10:00,221906,2,mg,,",
    "icu/outputevents": "subject_id,hadm_id,stay_id,charttime,storetime,itemid,value,valueuom\n1,11,5,2150-03-02 04:00:00,2150-03-02 04:30:00,226559,120,mL",
    "icu/procedureevents": "subject_id,hadm_id,stay_id,starttime,endtime,storetime,itemid,value,valueuom\n1,11,5,2150-03-02 05:00:00,2150-03-03 00:00:00,2150-03-02 05:30:00,225792,1140,min",
    "note/discharge": "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\nn1,1,11,DS,1,2150-03-05 00:00:00,2150-03-06 10:00:00,\"Discharge summary.\nShe said \"\"well\"\".\nPlan: rest.\"",
    "note/radiology": "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\nn2,1,11,RR,1,2150-03-02 12:00:00,,No effusion."}

def write(folder, tables, zipped=()):
    for name, text in tables.items():
        path = folder / f"{name}.csv"; path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".gz").write_bytes(gzip.compress((text + "\n").encode())) if name in zipped else path.write_text(text + "\n")
    return folder

def events_of(report): return read_meds(report.target).events
def at(*t): return datetime(2150, *t)

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write(folder / "in", SMALL, zipped=("hosp/labevents", "note/discharge"))
    return run_import(MIMIC_IV, folder / "in", folder / "out", tolerance=.2, progress=False)

@pytest.fixture(scope="module")
def events(small): return events_of(small)

def rows(events, *codes): return [(r["time"], r["known_time"], r["code"], r["numeric_value"], r["unit"], r["text_value"], r["hadm_id"]) for r in events.filter(pl.col("code").is_in(codes)).sort("time", "code").iter_rows(named=True)]

# --- by hand ----------------------------------------------------------------------------------------------------------------

def test_people(events):
    "Births on 1 January; a death without an hour at the end of its day, with an hour at the hour; race and language from the first stay that says them"
    told = {(s, c): t for s, t, c in events.filter(pl.col("kind") == "patient").select("subject_id", "time", "code").iter_rows()}
    assert told[1, "MEDS_BIRTH"] == datetime(2090, 1, 1) and told[2, "MEDS_BIRTH"] == datetime(2049, 1, 1)
    assert told[1, "MEDS_DEATH"] == datetime(2151, 3, 9, 23, 59, 59) and told[2, "MEDS_DEATH"] == datetime(2140, 2, 3, 6, 30)
    assert {c for s, c in told if s == 1 and told[s, c] is None} == {"GENDER//Female", "RACE//Asian", "LANGUAGE//English"}
    assert {c for s, c in told if s == 2 and told[s, c] is None} == {"GENDER//Male", "RACE//Hispanic", "LANGUAGE//Spanish"}
    assert told[1, "INSURANCE//Medicare"] == at(3, 1, 10) and told[1, "INSURANCE//Medicaid"] == at(3, 5, 17)

def test_stays(events):
    stays = read_stays(events)
    assert stays["type"].to_list() == ["EMERGENCY", "URGENT", "OBSERVATION"] and stays["destination"].to_list() == ["HOME", "UNKNOWN", "EXPIRED"] and stays["hadm_id"].to_list() == [11, 12, 21]
    assert rows(events, "VISIT//EMERGENCY") == [(at(1, 1, 1), None, "VISIT//EMERGENCY", None, None, None, None), (at(3, 1, 7), None, "VISIT//EMERGENCY", None, None, None, 11)]
    assert [r[0] for r in rows(events, "ICU_ADMISSION//MICU", "ICU_DISCHARGE//SICU")] == [at(3, 2), at(3, 3)]

def test_billed_codes_wait_for_the_end_of_the_episode(events):
    "Stay 12 begins five hours after stay 11: one episode, ended on 8 March at nine"
    billed = at(3, 9, 9)
    assert {(r[0], r[1], r[2]) for r in rows(events, "ICD9CM//428.0", "ICD9CM//E878.2", "ICD10CM//I50.9", "MSDRG//021")} == {
        (at(3, 5, 12), billed, "ICD9CM//428.0"), (at(3, 5, 12), billed, "ICD9CM//E878.2"), (at(3, 8, 9), billed, "ICD10CM//I50.9"), (at(3, 5, 12), billed, "MSDRG//021")}
    assert {(r[0], r[1], r[2]) for r in rows(events, "ICD9PCS//39.61", "ICD10PCS//02HV33Z", "CPT4//99219", "HCPCS//G0378")} == {
        (at(3, 2), billed, "ICD9PCS//39.61"), (at(3, 6), billed, "ICD10PCS//02HV33Z"), (at(3, 2), billed, "CPT4//99219"), (at(5, 2), at(5, 4), "HCPCS//G0378")}

def test_labs(events):
    assert rows(events, "MIMIC//50912", "MIMIC//51082") == [(at(1, 2, 6), at(1, 2, 9), "MIMIC//51082", 200, "mg/dL", None, None), (at(3, 2, 6), at(3, 2, 7, 10), "MIMIC//50912", pytest.approx(1.4), "mg/dL", None, 11),
        (at(3, 3, 6), at(3, 3, 7), "MIMIC//50912", None, "mg/dL", "<0.2", 11), (at(3, 4, 6), None, "MIMIC//50912", None, "mg/dL", "HEMOLYZED, no result", 11)]

def test_cultures(events):
    e = rows(events, "MIMIC//80002", "MIMIC//80002//90012", "MIMIC//80002//90018", "MIMIC//90201", "MIMIC//90055")
    assert e == [(at(3, 2), at(3, 7, 23, 59, 59), "MIMIC//90201", None, None, "NO GROWTH.", 11), (at(3, 2, 5), at(3, 4, 9), "MIMIC//80002", None, None, "URINE", 11),
                 (at(3, 2, 5), at(3, 4, 9), "MIMIC//80002//90012", None, None, "S", 11), (at(3, 2, 5), at(3, 4, 9), "MIMIC//80002//90018", None, None, "R", 11)]

def test_drugs(events):
    "Orders by NDC of eleven digits; the dose '1-2' in words; only doses that were given; the rate of an infusion, not its future total"
    assert rows(events, "NDC//00409610210", "MIMIC//bag") == [(at(3, 1, 12), None, "MIMIC//bag", None, "BAG", "1-2", 11), (at(3, 1, 12), None, "NDC//00409610210", 20, "mg", None, 11)]
    assert [(r[0], r[1], r[2]) for r in rows(events, "MIMIC//furosemide", "MIMIC//heparin")] == [(at(3, 2, 8), at(3, 2, 8, 5), "MIMIC//furosemide"), (at(3, 3, 8), at(3, 3, 8, 5), "MIMIC//heparin")]
    assert [(r[0], r[1], round(r[3], 3), r[4]) for r in rows(events, "MIMIC//221906")] == [(at(3, 2, 2), at(3, 2, 2, 10), .1, "mcg/kg/min"), (at(3, 2, 3), at(3, 2, 3, 10), 2, "mg")]

def test_bedside(events):
    "98.6 °F are 37 °C; a word is kept as text; of a procedure there is no duration"
    assert rows(events, "MIMIC//223761") == [(at(3, 2, 1), at(3, 2, 1, 20), "MIMIC//223761", pytest.approx(37), "Cel", None, 11)]
    assert rows(events, "MIMIC//220179")[0][3:5] == (101, "mm[Hg]") and rows(events, "MIMIC//224650")[0][5] == "None" and rows(events, "MIMIC//226559")[0][3:5] == (120, "mL")
    assert rows(events, "MIMIC//225792") == [(at(3, 2, 5), at(3, 2, 5, 30), "MIMIC//225792", None, None, None, 11)]
    pressures = {(r[2], r[3]) for r in rows(events, "LOINC//8480-6", "LOINC//8462-4", "LOINC//8460-8", "LOINC//8454-1")}
    assert pressures == {("LOINC//8480-6", 120), ("LOINC//8462-4", 80), ("LOINC//8460-8", 110), ("LOINC//8454-1", 70)}
    assert rows(events, "LOINC//29463-7") == [(at(2, 1), at(2, 1, 23, 59, 59), "LOINC//29463-7", 150, "[lb_av]", None, None)] and rows(events, "LOINC//33914-3")[0][5] == ">60" and rows(events, "MIMIC//blood pressure")[0][5] == "refused"

def test_notes(events):
    assert rows(events, "NOTE//discharge_summary") == [(at(3, 5), at(3, 6, 10), "NOTE//discharge_summary", None, None, 'Discharge summary.\nShe said "well".\nPlan: rest.', 11)]
    assert rows(events, "NOTE//radiology") == [(at(3, 2, 12), at(3, 2, 23, 59, 59), "NOTE//radiology", None, None, "No effusion.", 11)]

def test_names_and_concepts(small):
    codes = {c["code"]: c for c in read_meds(small.target).codes.iter_rows(named=True)}
    assert codes["ICD9CM//428.0"]["description"] == "Congestive heart failure, unspecified" and codes["MSDRG//021"]["description"] == "SEPTICEMIA" and codes["NDC//00409610210"]["description"] == "Furosemide"
    assert [codes[f"MIMIC//{i}"]["concept"] for i in (50912, 51082, 223761, 220179, 224650)] == ["creatinine", None, "temperature", "systolic pressure", None]
    assert codes["MIMIC//51082"]["description"] == "Creatinine (urine)" and codes["LOINC//8480-6"]["concept"] == "systolic pressure"

def test_every_fault_is_counted(small):
    told = {(r.table, r.rule): (r.action, r.records) for r in small.rules.itertuples()}
    assert told == {("diagnoses_icd", "no time"): ("dropped", 1), ("labevents", "patient is not in the export"): ("dropped", 1), ("labevents", "no time"): ("dropped", 1), ("microbiologyevents", "culture without a time of result"): ("dropped", 1),
        ("labevents", "value beyond a limit of the test: number missing, kept as text"): ("kept", 1), ("omr", "value beyond a limit of the test: number missing, kept as text"): ("kept", 1), ("labevents", "no time of result: taken as known when drawn"): ("kept", 2),
        ("transfers", "the discharge is in admissions"): ("not imported", 1), ("emar", "the row does not say that the drug was given"): ("not imported", 1)}

def test_nothing_is_known_before_it_happened(events):
    assert events.filter(pl.col("known_time") < pl.col("time")).height == 0

# --- folders and files --------------------------------------------------------------------------------------------------------

def test_flat_folder_and_parquet_give_the_same_events(events, tmp_path):
    (tmp_path / "flat").mkdir()
    for name, text in SMALL.items():
        pl.read_csv(text.encode()).write_parquet(tmp_path / "flat" / f"{name.split('/')[1]}.parquet")
    again = events_of(run_import(MIMIC_IV, tmp_path / "flat", tmp_path / "out", tolerance=.2, progress=False))
    assert again.drop("text_value").equals(events.drop("text_value")) and set(again["text_value"].drop_nulls()) == set(events["text_value"].drop_nulls())

def test_tables_left_out_are_named_and_not_opened(tmp_path):
    write(tmp_path / "in", {n: SMALL[n] for n in ("hosp/patients", "hosp/admissions")})
    for name in ("poe", "emar_detail"): (tmp_path / "in" / f"{name}.csv.gz").write_bytes(b"no gzip at all")
    report = run_import(MIMIC_IV, tmp_path / "in", tmp_path / "out", progress=False)
    assert {(r.table, r.rule, r.action) for r in report.rules.itertuples()} == {(n, f"table left out: {LEFT_OUT[n]}", "not imported") for n in ("poe", "emar_detail")}

def test_missing_tables_and_a_cut_off_file(tmp_path):
    write(tmp_path / "in", {n: SMALL[n] for n in ("hosp/patients", "hosp/labevents")})
    with pytest.raises(DataError, match=r"admissions\.csv"): run_import(MIMIC_IV, tmp_path / "in", tmp_path / "out", progress=False)
    write(tmp_path / "in", {n: SMALL[n] for n in ("hosp/admissions", "hosp/d_labitems")}); (tmp_path / "in" / "hosp" / "labevents.csv").unlink()
    head, first = SMALL["hosp/labevents"].split("\n")[:2]
    data = gzip.compress("\n".join([head, *[first] * 20_000]).encode())
    (tmp_path / "in" / "hosp" / "labevents.csv.gz").write_bytes(data[:len(data) // 2])
    report = run_import(MIMIC_IV, tmp_path / "in", tmp_path / "out", progress=False)
    assert ("labevents", "gzip file is cut off: the rest is lost") in {(r.table, r.rule) for r in report.rules.itertuples()} and any("cut off" in n for n in read_meds(report.target).notes)

def test_an_old_version_without_some_columns(tmp_path):
    old = {"patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod\n1,F,60,2150,,", "admissions": "subject_id,hadm_id,admittime,dischtime\n1,1,2150-01-01 00:00:00,2150-01-02 00:00:00",
           "d_labitems": "itemid,label,fluid,category,loinc_code\n50912,Creatinine,Blood,Chemistry,2160-0", "labevents": "subject_id,hadm_id,itemid,charttime,value,valuenum,valueuom\n1,1,50912,2150-01-01 10:00:00,1,1,mg/dL"}
    e = events_of(run_import(MIMIC_IV, write(tmp_path / "in", old), tmp_path / "out", progress=False))
    assert set(e["code"]) == {"GENDER//Female", "MEDS_BIRTH", "HOSPITAL_ADMISSION//UNKNOWN", "HOSPITAL_DISCHARGE//UNKNOWN", "LOINC//2160-0"}

# --- real patients ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def demo(shared_data, tmp_path_factory): return run_import(MIMIC_IV, shared_data / "mimic4-demo-tinyehr", tmp_path_factory.mktemp("demo") / "out", progress=False)

def test_each_table_against_a_plain_reader(demo, shared_data):
    "Records by the csv module; events by hand from the columns; nothing that is not in a rule"
    def read(name):
        path = shared_data / "mimic4-demo-tinyehr" / name
        with (gzip.open(path, "rt", newline="") if name.endswith("gz") else open(path, newline="")) as f: return list(csv.DictReader(f))
    raw = {f: read(f) for f in demo.files["file"]}; table = demo.table.set_index("table")
    assert set(raw) | {"d_labitems.csv", "SOURCE.txt"} == {p.name for p in (shared_data / "mimic4-demo-tinyehr").iterdir()}
    for file, name, n in demo.files.select("file", "table", "records").iter_rows(): assert n == len(raw[file]), name
    e = events_of(demo); n = lambda expr: len(e.filter(expr)); starts = lambda p: pl.col("code").str.starts_with(p)
    for name in ("diagnoses_icd", "procedures_icd", "drgcodes", "services"): assert table.loc[name, "events"] == len(raw[f"{name}.csv"])
    assert n(pl.col("kind") == "diagnosis") == len({(r["hadm_id"], r["icd_version"], r["icd_code"].replace(".", "")) for r in raw["diagnoses_icd.csv"]})
    orders = {(r["subject_id"], r["hadm_id"], r["starttime"], r["drug"].strip().lower() if r["ndc"] in ("", "0") else r["ndc"], r["dose_val_rx"].strip(), r["dose_unit_rx"]) for r in raw["prescriptions.csv.gz"]}
    assert abs(n(pl.col("kind") == "medication") - len(orders)) <= 5 and table.loc["prescriptions", "events"] == 18087       # 5: doses such as 1 and 1.0
    pressures = sum("/" in r["result_value"] for r in raw["omr.csv"])
    assert table.loc["omr", "events"] == len(raw["omr.csv"]) + pressures and pressures == 872
    assert table.loc["icustays", "events"] == 2 * len(raw["icustays.csv"]) and demo.rejects.filter(pl.col("action") == "dropped").height == 16
    assert (pd.DataFrame(raw["admissions.csv"])["admission_type"].map(ADMISSION).value_counts() == e.filter(starts("HOSPITAL_ADMISSION")).to_pandas()["code"].str.split("//").str[1].value_counts()).all()

def test_two_copies_and_two_readers_agree(demo, shared_data, tmp_path):
    "The same patients in MIMIC's own tables and in CLIF's, made by other people: types, destinations, sex, race, age, ICD codes, intensive care"
    one, two = events_of(demo), events_of(run_import(CLIF, shared_data / "mimic4-demo-clif", tmp_path / "out", progress=False))
    stays = one.filter(pl.col("code").str.starts_with("HOSPITAL_ADMISSION"))["hadm_id"]; two = two.filter(pl.col("hadm_id").is_in(stays.implode()) | pl.col("hadm_id").is_null())
    def pairs(e, prefix, key="hadm_id"): return sorted(e.filter(pl.col("code").str.contains(prefix)).select(key, "code").rows())
    for prefix in ("^HOSPITAL_(ADM|DIS)", "^ICD9CM", "^ICD10CM", "^ICD10PCS"): assert pairs(one, prefix) == pairs(two, prefix) != []
    assert set(pairs(one, "^ICD9PCS")) == set(pairs(two, "^ICD9PCS"))
    for prefix in ("^GENDER", "^RACE"): assert pairs(one, prefix, "subject_id") == pairs(two, prefix, "subject_id")
    def ages(e):
        born = e.filter(pl.col("code") == "MEDS_BIRTH").select("subject_id", born=pl.col("time").dt.year())
        return dict(e.filter(pl.col("code").str.starts_with("HOSPITAL_ADM")).join(born, on="subject_id").select("hadm_id", pl.col("time").dt.year() - pl.col("born")).iter_rows())
    a, b = ages(one), ages(two)
    assert len(a) == 275 and sum(a[h] != b[h] for h in a) <= 1          # one admission in the night of a new year: CLIF's clock is five hours ahead
    a, b = ({h: n for h, n in e.filter(pl.col("code").str.starts_with("ICU_ADMISSION")).group_by("hadm_id").len().iter_rows()} for e in (one, two))
    assert sum(a.values()) == sum(b.values()) == 140 and sum(a.get(h) != b.get(h) for h in a | b) == 2   # MIMIC counts neurological step-down units in, CLIF does not
