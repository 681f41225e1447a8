"""eICU: every row accounted for, counted another way; one stay by hand; order and distance within a stay; nothing known too early."""
import os
from datetime import datetime, timedelta
from pathlib import Path
import polars as pl, pytest
from clinllm.core.settings import project_root
from clinllm.ehr.eicu import EICU, GAP_DAYS, MICRO_DAYS, place_stays
from clinllm.ehr.importing import run_import
from clinllm.ehr.sources import read_meds

DATA = Path(os.environ.get("CLINLLM_DATA") or project_root().parent / "shared" / "data") / "eicu-demo"
demo_only = pytest.mark.skipif(not DATA.is_dir(), reason="the eICU demo is not at hand (CLINLLM_DATA)")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    target = tmp_path_factory.mktemp("eicu") / "meds"
    return run_import(EICU, DATA, target, progress=False), read_meds(target)


def raw(name): return pl.read_csv(DATA / f"{name}.csv.gz", infer_schema=False)


# What each table must give, counted on the raw file without clinllm
def cells(name, columns, missing=None):
    df = raw(name).select(columns.split()); return sum(int((df[c].is_not_null() & (df[c] != (missing or ""))).sum()) for c in df.columns)


EXPECTED = {
    "admissiondx": lambda: len(raw("admissiondx")), "allergy": lambda: len(raw("allergy")), "treatment": lambda: len(raw("treatment")), "pasthistory": lambda: len(raw("pasthistory")), "infusiondrug": lambda: len(raw("infusiondrug")),
    "careplangeneral": lambda: len(raw("careplangeneral")), "microlab": lambda: len(raw("microlab")), "customlab": lambda: len(raw("customlab")), "hospital": lambda: 0, "apachepatientresult": lambda: 0, "apachepredvar": lambda: 0,
    "vitalaperiodic": lambda: cells("vitalaperiodic", "noninvasivesystolic noninvasivediastolic noninvasivemean paop cardiacoutput cardiacinput svr svri pvr pvri"),
    "apacheapsvar": lambda: cells("apacheapsvar", "intubated vent dialysis eyes motor verbal meds urine wbc temperature respiratoryrate sodium heartrate meanbp ph hematocrit creatinine albumin pao2 pco2 bun glucose bilirubin fio2", "-1"),
    "medication": lambda: sum(c != "Yes" and (h or n) is not None for c, h, n in raw("medication").select("drugordercancelled", "drughiclseqno", "drugname").iter_rows()),
    "diagnosis": lambda: sum(len(c.split(",")) if c else 1 for c in raw("diagnosis")["icd9code"]),
    "note": lambda: sum(not any(s in p for s in ("/View and Save/", "/View Options/", "/Skip Screen Options", "/Include Rx/")) for p in raw("note")["notepath"])}


@demo_only
@pytest.mark.parametrize("table", EXPECTED)
def test_each_table_gives_what_was_counted_by_hand(demo, table):
    t = demo[0].table.set_index("table").loc[table]
    assert (t["records"], t["events"]) == (len(raw(table)), EXPECTED[table]())


@demo_only
def test_each_row_is_an_event_or_a_reject(demo):
    report, timeline = demo; t = report.table
    assert t["records"].sum() == sum(len(raw(p.name.removesuffix(".csv.gz"))) for p in DATA.glob("*.csv.gz")) and t["dropped"].sum() == 0
    assert len(timeline) == t["events"].sum() - t["duplicate"].sum()
    assert ((t["events"] > 0) | (t["not imported"] == t["records"])).all()
    silent = report.rules[report.rules["rule"].str.contains("nothing to import")]
    assert set(silent["table"]) <= {"medication"} and silent["records"].sum() == raw("medication").filter(pl.col("drugname").is_null() & pl.col("drughiclseqno").is_null() & (pl.col("drugordercancelled") != "Yes")).height


@demo_only
def test_stays_deaths_and_people(demo):
    events, p = demo[1].events, raw("patient"); stays = p.unique("patienthealthsystemstayid")
    count = lambda code: events.filter(pl.col("code").str.starts_with(code)).height
    died = stays.filter(pl.col("hospitaldischargestatus") == "Expired")
    assert count("MEDS_DEATH") == count("HOSPITAL_DISCHARGE//EXPIRED") == len(died) and count("HOSPITAL_ADMISSION//") == len(stays)
    assert set(events.filter(pl.col("code") == "MEDS_DEATH")["hadm_id"]) == set(died["patienthealthsystemstayid"].cast(pl.Int64))
    first = lambda column: len({u for u, v in p.select("uniquepid", column).iter_rows() if v})
    assert count("GENDER//") <= first("gender") and count("GENDER//") >= first("gender") - 2 and demo[1].subjects.len() == p["uniquepid"].n_unique()
    born = events.filter(pl.col("code") == "MEDS_BIRTH").select("subject_id", birth="time")
    ages = events.filter(pl.col("code").str.starts_with("HOSPITAL_ADMISSION")).join(born, on="subject_id").select("hadm_id", "time", "subject_id", age=pl.col("time").dt.year() - pl.col("birth").dt.year())
    told = stays.select(hadm_id=pl.col("patienthealthsystemstayid").cast(pl.Int64), told=pl.when(pl.col("age") == "> 89").then(90).otherwise(pl.col("age").cast(pl.Int64, strict=False)))
    apart = ages.join(told, on="hadm_id").sort("time").select("subject_id", apart=(pl.col("age") - pl.col("told")).abs()).drop_nulls()
    assert (apart.unique("subject_id", keep="first", maintain_order=True)["apart"] == 0).all()      # right at the first stay
    assert apart["apart"].max() <= 1                                                                # a birthday may lie between two stays


@demo_only
def test_stays_of_a_patient_are_apart_and_death_is_last(demo):
    e = demo[1].events; stays = e.filter(pl.col("code").str.contains("^HOSPITAL_(ADM|DIS)")).group_by("subject_id", "hadm_id").agg(pl.col("time").min().alias("came"), pl.col("time").max().alias("left"), died=pl.col("code").str.ends_with("EXPIRED").any())
    s = stays.sort("subject_id", "came").with_columns(gap=pl.col("came") - pl.col("left").shift(1).over("subject_id"), rank=pl.col("came").rank("ordinal", descending=True).over("subject_id"))
    assert s["gap"].min() > timedelta(days=GAP_DAYS - 1) and s["gap"].drop_nulls().min() > timedelta(days=30)
    years = dict(raw("patient").select(pl.col("patienthealthsystemstayid").cast(pl.Int64), pl.col("hospitaldischargeyear").cast(pl.Int64)).iter_rows())
    order = s.with_columns(year=pl.col("hadm_id").replace_strict(years)).with_columns(back=pl.col("year") < pl.col("year").shift(1).over("subject_id"))
    assert not order["back"].any()
    assert (s.filter("died")["rank"] == 1).mean() > .95             # the others died, says eICU, before a stay at a greater age or in a later year


@demo_only
def test_distances_within_a_hospital_stay_are_the_recorded_ones(demo):
    e = demo[1].events; p = raw("patient").select("patientunitstayid", hadm_id=pl.col("patienthealthsystemstayid").cast(pl.Int64), before=pl.col("hospitaladmitoffset").cast(pl.Int64))
    came = e.filter(pl.col("code").str.starts_with("HOSPITAL_ADMISSION")).select("hadm_id", came="time")
    t = raw("treatment").join(p, on="patientunitstayid").select("hadm_id", code="EICU//treatment//" + pl.col("treatmentstring").str.strip_chars(), minutes=pl.col("treatmentoffset").cast(pl.Int64) - pl.col("before")).unique()
    ours = e.filter(pl.col("code").str.starts_with("EICU//treatment")).join(came, on="hadm_id").select("hadm_id", "code", minutes=(pl.col("time") - pl.col("came")).dt.total_minutes()).unique()
    assert t.sort(t.columns).equals(ours.sort(ours.columns))


@demo_only
def test_nothing_is_known_too_early(demo):
    e = demo[1].events; of = lambda start: e.filter(pl.col("code").str.starts_with(start))
    culture, aps = of("EICU//culture"), of("EICU//apacheapsvar").join(of("ICU_ADMISSION").group_by("subject_id").agg(icu="time"), on="subject_id")
    assert (culture["known_time"] - culture["time"] == timedelta(days=MICRO_DAYS)).all()
    assert aps.select(pl.struct("time", "icu").map_elements(lambda r: any(r["time"] - i == timedelta(days=1) for i in r["icu"]), return_dtype=pl.Boolean))["time"].all()
    assert of("NOTE//").filter(pl.col("known_time") > pl.col("time")).height > 1000
    words = e["code"].unique().str.to_lowercase()
    assert not words.str.contains("actual|predicted|apachepat|apachepred|activeupon").any()
    assert set(words.filter(words.str.contains("expired|death|died"))) <= {"hospital_discharge//expired", "meds_death", "eicu//unit_discharge_location//death", *words.filter(words.str.contains("care_plan|care_goal|admission_dx|treatment|diagnosis|past_history|exam|chart"))}


PATIENT = dict(patientunitstayid="5", patienthealthsystemstayid="50", uniquepid="006-1", gender="Male", age="70", ethnicity="Asian", hospitalid="9", hospitaladmittime24="12:00:00", hospitaladmitoffset="0", hospitaladmitsource="Floor",
    hospitaldischargeyear="2015", hospitaldischargeoffset="7200", hospitaldischargelocation="Death", hospitaldischargestatus="Expired", unittype="MICU", unitadmitsource="Floor", unitvisitnumber="1", unitstaytype="admit", admissionheight="170",
    admissionweight="80", dischargeweight="", unitdischargeoffset="7200", unitdischargelocation="Death", unitdischargestatus="Expired")
NOON = datetime(2015, 1, 1, 12)


def export(folder, **tables):
    folder.mkdir(exist_ok=True)
    for name, rows in dict(patient=[PATIENT], **tables).items(): pl.DataFrame([{k: v or None for k, v in r.items()} for r in rows]).cast(pl.String).write_csv(folder / f"{name}.csv")
    return folder


TABLES_BY_HAND = dict(
    nurseAssessment=[dict(nurseassessid="1", patientunitstayid="5", nurseassessoffset="60", nurseassessentryoffset="70", cellattributepath="p", celllabel="Neurologic", cellattribute="LOC", cellattributevalue="alert")],
    nurseCare=[dict(nursecareid="1", patientunitstayid="5", nursecareoffset="61", nursecareentryoffset="61", celllabel="Nutrition", cellattributepath="p", cellattribute="Diet", cellattributevalue="NPO")],
    intakeOutput=[dict(intakeoutputid="1", patientunitstayid="5", intakeoutputoffset="62", intaketotal="0", outputtotal="250", dialysistotal="0", nettotal="-250", intakeoutputentryoffset="80",
                       cellpath="flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|Urine", celllabel="Urine", cellvaluenumeric="250.0000", cellvaluetext="250")],
    physicalExam=[dict(physicalexamid="1", patientunitstayid="5", physicalexamoffset="63", physicalexampath="notes/Progress Notes/Physical Exam/Physical Exam/Constitutional/Vital Sign and Physiological Data/HR/HR Current", physicalexamvalue="HR Current", physicalexamtext="101"),
                  dict(physicalexamid="2", patientunitstayid="5", physicalexamoffset="63", physicalexampath="notes/Progress Notes/Physical Exam/Physical Exam/Neurologic/GCS/Score/scored", physicalexamvalue="scored", physicalexamtext="scored")],
    respiratoryCharting=[dict(respchartid="1", patientunitstayid="5", respchartoffset="64", respchartentryoffset="90", respcharttypecat="respFlowSettings", respchartvaluelabel="FiO2", respchartvalue="40")],
    vitalPeriodic=[dict(vitalperiodicid="1", patientunitstayid="5", observationoffset="-5", temperature="38.5", sao2="", heartrate="110", respiration="", cvp="", etco2="", systemicsystolic="120", systemicdiastolic="", systemicmean="", pasystolic="", padiastolic="", pamean="", st1="", st2="", st3="", icp="")])
BY_HAND = {     # code: (minutes, known minutes or None, number, unit, text)
    "EICU//nurse//Neurologic//LOC": (60, 70, None, None, "alert"), "EICU//nurse//Nutrition//Diet": (61, 61, None, None, "NPO"), "EICU//intake_output//I&O|Output (ml)|Urine": (62, 80, 250, "mL", None),
    "EICU//exam//Constitutional/Vital Sign and Physiological Data/HR/HR Current": (63, None, 101, None, None), "EICU//exam//Neurologic/GCS/Score/scored": (63, None, None, None, "scored"),
    "EICU//respiratory//FiO2": (64, 90, 40, None, None), "EICU//vitalperiodic//temperature": (-5, None, 38.5, "Cel", None), "EICU//vitalperiodic//heartrate": (-5, None, 110, "/min", None), "EICU//vitalperiodic//systemicsystolic": (-5, None, 120, "mm[Hg]", None)}


def test_tables_that_the_demo_lacks(tmp_path):
    report = run_import(EICU, export(tmp_path / "export", **TABLES_BY_HAND), tmp_path / "meds", progress=False); timeline = read_meds(tmp_path / "meds")
    rest = timeline.events.filter(pl.col("kind").is_in(["vital", "observation"]) & ~pl.col("code").str.contains("patient//"))
    at = lambda m: None if m is None else NOON + timedelta(minutes=m)
    got = {r["code"]: (r["time"], r["known_time"], r["numeric_value"], r["unit"], r["text_value"]) for r in rest.iter_rows(named=True)}
    assert got == {code: (at(t), at(k), n, u, x) for code, (t, k, n, u, x) in BY_HAND.items()}
    assert report.table["dropped"].sum() == 0 and (rest["hadm_id"] == 50).all()
    assert dict(timeline.codes.filter(pl.col("concept").is_not_null()).select("code", "concept").iter_rows()) == {"EICU//vitalperiodic//temperature": "temperature", "EICU//vitalperiodic//heartrate": "heart rate", "EICU//vitalperiodic//systemicsystolic": "systolic pressure"}


def test_parquet_and_letter_case_give_the_same(tmp_path):
    a = export(tmp_path / "a", **TABLES_BY_HAND); b = tmp_path / "b"; b.mkdir()
    for p in a.glob("*.csv"): df = pl.read_csv(p); df.rename({c: c.upper() for c in df.columns}).write_parquet(b / f"{p.stem.upper()}.parquet")
    for folder in (a, b): run_import(EICU, folder, tmp_path / f"meds-{folder.name}", progress=False)
    one, two = (read_meds(tmp_path / f"meds-{k}").events for k in "ab")
    assert len(one) == len(two) == len(BY_HAND) + 16 and one.sort(one.columns).equals(two.sort(two.columns))


def test_a_row_without_offset_or_stay_is_a_counted_reject(tmp_path):
    rows = [dict(treatmentid=str(i), patientunitstayid=u, treatmentoffset=o, treatmentstring="a|b", activeupondischarge="True") for i, (u, o) in enumerate([("5", "10"), ("5", ""), ("5", "soon"), ("6", "10"), ("", "10")])]
    report = run_import(EICU, export(tmp_path / "export", treatment=rows), tmp_path / "meds", tolerance=1, progress=False)
    bad = report.rejects.filter(pl.col("action") == "dropped").sort("line")
    assert bad["line"].to_list() == [3, 4, 5, 6] and bad["rule"].to_list() == ["no time", "no time", "no patient", "no patient"]


def test_stay_times_do_not_depend_on_the_order_of_rows():
    rows = [dict(PATIENT, patientunitstayid=str(i), patienthealthsystemstayid=str(100 + i // 2), unitvisitnumber=str(i % 2 + 1), hospitaladmitoffset=str(-1000 * (i % 2)), hospitaldischargeoffset=str(7200 - 1000 * (i % 2)), hospitaldischargeyear=str(2014 + i % 4 // 2),
                 hospitaldischargestatus="Alive", uniquepid=f"p{i % 3 // 2}") for i in range(8)]
    one, two = place_stays(pl.DataFrame(rows)), place_stays(pl.DataFrame(rows[::-1]))
    assert one.sort("patientunitstayid").equals(two.sort("patientunitstayid"))
