"""The synthetic hospital as a hospital's own files: an export in the shape of MIMIC-IV 2.2, of any size.

python tests/bench/mimic_export.py FOLDER PATIENTS [--plain]     csv.gz, or csv with --plain

Patients are made 2,000 at a time with another seed each and appended to the files, so memory does not grow with their number. Same number, same files.
"""
import argparse, gzip, io, json, shutil
from pathlib import Path
import polars as pl
from clinllm.ehr.hospital import make_hospital

CHUNK = 2_000       # patients made at a time
LABS = {"haemoglobin": (51222, "Hemoglobin"), "sodium": (50983, "Sodium"), "creatinine": (50912, "Creatinine"), "wbc": (51301, "White Blood Cells"), "urea": (51006, "Urea Nitrogen"), "glucose": (50931, "Glucose"), "potassium": (50971, "Potassium")}
DESTINATIONS = dict(HOME="HOME", SNF="SKILLED NURSING FACILITY", REHAB="REHAB", HOSPICE="HOSPICE", AMA="AGAINST ADVICE", EXPIRED="DIED", OTHER="OTHER FACILITY")
TYPES = dict(EMERGENCY="EW EMER.", URGENT="URGENT", ELECTIVE="ELECTIVE")
RACES = {"White": "WHITE", "Black": "BLACK/AFRICAN AMERICAN", "Hispanic": "HISPANIC OR LATINO", "Asian": "ASIAN", "Native American": "AMERICAN INDIAN/ALASKA NATIVE", "Other": "OTHER"}
TIME, NONE = "%Y-%m-%d %H:%M:%S", pl.lit(None, pl.String)
FILES = ("hosp/patients", "hosp/admissions", "hosp/diagnoses_icd", "hosp/labevents", "hosp/prescriptions", "hosp/d_labitems", "icu/icustays")


def _second(column): return pl.col(column).dt.strftime(TIME)

def _numbered(events, start, name): return events.with_row_index(name, offset=start)

def _stays(events):
    "A row per hospital stay"
    part = lambda start, name: events.filter(pl.col("code").str.starts_with(start + "//")).select("subject_id", "hadm_id", "time", pl.col("code").str.split("//").list.last().alias(name))
    s = part("HOSPITAL_ADMISSION", "kind").rename(dict(time="admit"))
    for start, name in (("HOSPITAL_DISCHARGE", "destination"), ("INSURANCE", "insurance")): s = s.join(part(start, name).drop("subject_id").rename(dict(time="at_" + name)), on="hadm_id", how="left")
    fact = lambda start, name: events.filter(pl.col("code").str.starts_with(start + "//")).select("subject_id", pl.col("code").str.split("//").list.last().alias(name))
    for start, name in (("RACE", "race"), ("LANGUAGE", "language"), ("GENDER", "sex")): s = s.join(fact(start, name), on="subject_id", how="left")
    return s.join(events.filter(pl.col("code") == "MEDS_BIRTH").select("subject_id", birth="time"), on="subject_id").join(events.filter(pl.col("code") == "MEDS_DEATH").select("subject_id", dead="time"), on="subject_id", how="left")


def tables(events, first):
    "The files' rows from the events of a chunk; `first` is the number of events of all chunks before, for the row numbers"
    s, kind = _stays(events), pl.col("code").str.split("//")
    expired = pl.col("destination") == "EXPIRED"; admitted = s.group_by("subject_id").agg(pl.all().sort_by("admit").first())
    people = admitted.sort("subject_id").select("subject_id", gender=pl.col("sex").str.slice(0, 1), anchor_age=pl.col("admit").dt.year() - pl.col("birth").dt.year(), anchor_year=pl.col("admit").dt.year(),
                                                anchor_year_group=pl.lit("2020 - 2022"), dod=pl.col("dead").dt.strftime("%Y-%m-%d"))
    stays = s.sort("subject_id", "admit").select("subject_id", "hadm_id", admittime=_second("admit"), dischtime=_second("at_destination"), deathtime=pl.when(expired).then(_second("at_destination")), admission_type=pl.col("kind").replace(TYPES),
        admit_provider_id=NONE, admission_location=pl.when(pl.col("kind") == "EMERGENCY").then(pl.lit("EMERGENCY ROOM")).otherwise(pl.lit("PHYSICIAN REFERRAL")), discharge_location=pl.col("destination").replace(DESTINATIONS), insurance="insurance",
        language=pl.col("language").str.to_uppercase(), marital_status=NONE, race=pl.col("race").replace(RACES), edregtime=NONE, edouttime=NONE, hospital_expire_flag=expired.cast(pl.Int8))
    codes = events.filter(pl.col("code").str.starts_with("DIAGNOSIS//")).select("subject_id", "hadm_id", seq_num=pl.int_range(1, pl.len() + 1).over("hadm_id"), icd_code=kind.list.last().str.replace_all(".", "", literal=True), icd_version=pl.lit(10))
    labs = _numbered(events.filter(pl.col("code").str.starts_with("LAB//")), first, "labevent_id").select("labevent_id", "subject_id", "hadm_id", specimen_id=pl.col("labevent_id") + 10_000_000, itemid=kind.list.get(1).replace_strict({k: v for k, (v, _) in LABS.items()}),
        order_provider_id=NONE, charttime=_second("time"), storetime=pl.col("time").dt.offset_by("50m").dt.strftime(TIME), value=pl.col("numeric_value").round(2).cast(pl.String), valuenum=pl.col("numeric_value").round(2), valueuom=kind.list.get(2),
        ref_range_lower=NONE, ref_range_upper=NONE, flag=NONE, priority=pl.lit("ROUTINE"), comments=NONE)
    drugs = _numbered(events.filter(pl.col("code").str.starts_with("MEDICATION//")), first, "pharmacy_id").select("subject_id", "hadm_id", "pharmacy_id", poe_id=NONE, poe_seq=NONE, order_provider_id=NONE, starttime=_second("time"),
        stoptime=pl.col("time").dt.offset_by("2d").dt.strftime(TIME), drug_type=pl.lit("MAIN"), drug=kind.list.last().str.to_titlecase(), formulary_drug_cd=NONE, gsn=NONE, ndc=pl.lit("0"), prod_strength=pl.lit("1 unit"), form_rx=NONE, dose_val_rx=pl.lit("1"),
        dose_unit_rx=pl.lit("TAB"), form_val_disp=pl.lit("1"), form_unit_disp=pl.lit("TAB"), doses_per_24_hrs=pl.lit("2"), route=pl.lit("PO"))
    icu = s.filter(pl.col("hadm_id") % 4 == 0).sort("subject_id", "admit").select("subject_id", "hadm_id", stay_id=pl.col("hadm_id") + 10_000_000, first_careunit=pl.lit("Medical Intensive Care Unit (MICU)"), last_careunit=pl.lit("Medical Intensive Care Unit (MICU)"),
        intime=_second("admit"), outtime=pl.min_horizontal(pl.col("admit").dt.offset_by("2d"), "at_destination").dt.strftime(TIME), los=pl.lit(2))
    return dict(zip(FILES, (people, stays, codes, labs, drugs, None, icu)))


def write_export(folder, patients, plain=False):
    "Write the export; what is in it: rows per file"
    folder = Path(folder); end = ".csv" if plain else ".csv.gz"; shutil.rmtree(folder, ignore_errors=True)
    for sub in ("hosp", "icu"): (folder / sub).mkdir(parents=True)
    out = {name: open(folder / (name + end), "wb") if plain else gzip.open(folder / (name + end), "wb", compresslevel=4) for name in FILES}
    rows, made, stays, events = dict.fromkeys(FILES, 0), 0, 0, 0
    items = pl.DataFrame([(i, label, "Blood", "Chemistry") for i, label in LABS.values()], schema=["itemid", "label", "fluid", "category"], orient="row")
    out["hosp/d_labitems"].write(items.write_csv().encode()); rows["hosp/d_labitems"] = len(items)
    for seed in range(-(-patients // CHUNK)):
        n = min(CHUNK, patients - made); e = make_hospital(max(n, 10), seed=seed).timeline.events
        ids = e["subject_id"].unique().sort(); hadm = e["hadm_id"].drop_nulls().unique().sort()
        e = e.with_columns(pl.col("subject_id").replace_strict(ids, pl.int_range(10_000_000 + made, 10_000_000 + made + len(ids), eager=True)), pl.col("hadm_id").replace_strict(hadm, pl.int_range(20_000_000 + stays, 20_000_000 + stays + len(hadm), eager=True), default=None))
        for name, frame in tables(e, events).items():
            if frame is not None: out[name].write(frame.write_csv(include_header=not rows[name]).encode()); rows[name] += len(frame)
        made, stays, events = made + len(ids), stays + len(hadm), events + len(e)
    for f in out.values(): f.close()
    about = dict(patients=made, rows=rows, bytes=sum((folder / (n + end)).stat().st_size for n in FILES)); (folder / "export.json").write_text(json.dumps(about, indent=1)); return about


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); p.add_argument("folder"); p.add_argument("patients", type=int); p.add_argument("--plain", action="store_true")
    a = p.parse_args(); print(write_export(a.folder, a.patients, a.plain))
