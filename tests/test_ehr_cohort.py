"""Cohorts against what is true of the synthetic hospital, worked out in plain pandas, and against the outcome columns of real files."""
import os, re
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
import numpy as np, pandas as pd, polars as pl, pytest
from clinllm.core.errors import ClinllmError, DataError, TableError
from clinllm.core.settings import load_settings
from clinllm.core.tables import Cohort, Timeline
from clinllm.ehr.cohort import SPLIT_BY, build_cohort, cohort_for, label_table, table_one
from clinllm.ehr.hospital import make_hospital
from clinllm.ehr.task import TASKS
from test_ehr_task import loop_aki

DATA = Path(os.environ.get("CLINLLM_DATA") or Path(__file__).parents[2] / "shared" / "data")
DAY = pd.Timedelta(days=1)

@pytest.fixture(scope="module")
def hospital(): return make_hospital(500, seed=8)

def labels(cohort): return dict(zip(cohort.frame["hadm_id"], cohort.frame["label"]))

# --- known truth -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("hours", [24, 48])
def test_death_in_hospital_is_what_the_hospital_drew(hospital, hours):
    s = hospital.stays; asked = s[s["discharge"] - s["admit"] > pd.Timedelta(hours=hours)]
    cohort = build_cohort(hospital.timeline, f"in_hospital_mortality_{hours}h")
    assert labels(cohort) == dict(zip(asked["hadm_id"], (asked["disposition"] == "EXPIRED").astype(int))) and 0 < cohort.prevalence < .2
    assert (cohort.frame["prediction_time"] - cohort.frame["admission_time"] == pd.Timedelta(hours=hours)).all()

def test_length_of_stay_is_what_the_hospital_drew(hospital):
    s = hospital.stays; los = s["discharge"] - s["admit"]
    asked = s[(los > DAY) & ~((s["disposition"] == "EXPIRED") & (los <= 7 * DAY))]
    assert labels(build_cohort(hospital.timeline, "length_of_stay_7d")) == dict(zip(asked["hadm_id"], (los[asked.index] > 7 * DAY).astype(int)))

def test_coding_is_what_the_hospital_drew(hospital):
    cohort = build_cohort(hospital.timeline, "icd10_coding"); s = hospital.stays
    assert labels(cohort) == dict(zip(s["hadm_id"], s["heart_failure"].astype(int)))
    table = label_table(cohort)
    assert (table["I50"].to_numpy() == cohort.frame["label"].to_numpy()).all() and table["E11"].sum() == labels_of(hospital, "E11")
    assert build_cohort(hospital.timeline, "icd10_coding:E11").frame["label"].sum() == table["E11"].sum()

def labels_of(hospital, prefix):
    e = hospital.timeline.events.filter(pl.col("code").str.starts_with(f"DIAGNOSIS//ICD10CM//{prefix}")); return e["hadm_id"].n_unique()

def test_kidney_injury_agrees_with_a_loop_over_stays(hospital):
    e = hospital.timeline.events; values = {}
    for s, t, v in e.filter(pl.col("code") == "LAB//creatinine//mg/dL").select("subject_id", "time", "numeric_value").rows(): values.setdefault(s, []).append((t, v))
    expected = {}
    for s, hadm, admit, out, end in hospital.stays.assign(followed=hospital.stays.groupby("subject_id")["end"].transform("last"))[["subject_id", "hadm_id", "admit", "discharge", "followed"]].itertuples(index=False):
        now, mine = admit + DAY, values.get(s, []); injured = loop_aki(mine)
        before = [t for t, _ in mine if now - 7 * DAY <= t <= now]; after = [t for t, _ in mine if now < t <= now + 2 * DAY]
        if out <= now or not before or not after or any(t in injured for t in before): continue
        hit = any(t in injured for t in after)
        if hit or out > now + 2 * DAY: expected[hadm] = int(hit)
    assert labels(build_cohort(hospital.timeline, "aki_48h")) == expected and 0 < sum(expected.values()) < len(expected)

# --- real files ----------------------------------------------------------------------------------------------------------------

def imported(format, folder, tmp_path_factory):
    if not (DATA / folder).is_dir(): pytest.skip(f"{folder} is not at hand; set CLINLLM_DATA")
    from clinllm.ehr.importing import run_import
    from clinllm.ehr.sources import get_format, read_meds
    target = tmp_path_factory.mktemp("imported") / folder; run_import(get_format(format), DATA / folder, target, progress=False); return read_meds(target)

def test_mimic_deaths_are_those_of_the_admissions_table(tmp_path_factory):
    timeline = imported("mimic-iv", "mimic4-demo-tinyehr", tmp_path_factory); cohort = build_cohort(timeline, "in_hospital_mortality_24h")
    a = pd.read_csv(DATA / "mimic4-demo-tinyehr" / "admissions.csv").set_index("hadm_id")
    said = cohort.frame.set_index("hadm_id")["label"]; assert len(said) > 200
    assert (said == a["hospital_expire_flag"].reindex(said.index)).mean() > .99            # an episode of two stays may end in the second

def test_eicu_deaths_in_the_unit_are_those_of_the_patient_table(tmp_path_factory):
    timeline = imported("eicu", "eicu-demo", tmp_path_factory); cohort = build_cohort(timeline, "icu_mortality_24h")
    p = pd.read_csv(DATA / "eicu-demo" / "patient.csv.gz"); died = (p["unitdischargestatus"] == "Expired").groupby(p["patienthealthsystemstayid"]).max()
    both = cohort.frame.groupby("hadm_id")["label"].max(); both = pd.concat([both, died.reindex(both.index).rename("died")], axis=1).dropna()
    assert len(both) > 1000 and (both["label"] == both["died"].astype(int)).mean() > .99, (len(both), (both["label"] == both["died"].astype(int)).mean())

# --- censoring ------------------------------------------------------------------------------------------------------------------

def ending(timeline, when):
    "The same record, watched until `when` (a column of subject_id and time)"
    kept = timeline.events.filter(pl.col("code") != "END_OF_FOLLOWUP")
    return replace(timeline, events=pl.concat([kept, when.with_columns(code=pl.lit("END_OF_FOLLOWUP")).cast({"time": pl.Datetime("us")})], how="diagonal"))

@pytest.mark.parametrize("name", ["readmission_30d", "aki_48h", "length_of_stay_7d"])
def test_nobody_who_is_not_watched_is_a_negative(hospital, name):
    "With the record cut off an hour after each patient's first prediction, only outcomes that were seen remain"
    cohort = build_cohort(hospital.timeline, name); first = pl.from_pandas(cohort.frame.groupby("subject_id", as_index=False)["prediction_time"].min()).select("subject_id", time=pl.col("prediction_time") + timedelta(hours=1))
    rest = ending(hospital.timeline, pl.concat([first, pl.DataFrame(dict(subject_id=hospital.timeline.subjects, time=datetime(2000, 1, 1)), schema_overrides=dict(time=pl.Datetime("us")))]).unique("subject_id", keep="first"))
    known = 0 if name == "length_of_stay_7d" else 1            # there the event that is seen, the discharge, makes the negative
    try: labels_left = set(build_cohort(rest, name).frame["label"])
    except TableError: labels_left = set()
    assert labels_left <= {known}

def test_an_open_stay_is_in_no_task_about_its_end(hospital):
    one = hospital.timeline.events.filter(pl.col("code").str.starts_with("HOSPITAL_DISCHARGE"))["hadm_id"].max()
    open_ = replace(hospital.timeline, events=hospital.timeline.events.filter(~(pl.col("code").str.starts_with("HOSPITAL_DISCHARGE") & (pl.col("hadm_id") == one))))
    for name in ("in_hospital_mortality_24h", "in_hospital_mortality_48h", "length_of_stay_7d", "readmission_30d", "icd10_coding"): assert one not in labels(build_cohort(open_, name))

# --- inside the stay ---------------------------------------------------------------------------------------------------------------

def test_nothing_after_the_prediction_is_known(hospital):
    for name in ("in_hospital_mortality_24h", "aki_48h", "length_of_stay_7d"):
        cohort = build_cohort(hospital.timeline, name); f = cohort.frame; known = hospital.timeline.until(cohort).events
        assert not (known["time"] > known["prediction_time"]).any() and not known.filter(pl.col("code").str.starts_with("HOSPITAL_DISCHARGE"))["hadm_id"].is_in(f["hadm_id"].tolist()).all()
        assert (f["admission_time"] < f["prediction_time"]).all() and f["hadm_id"].is_unique

def test_the_future_decides_labels_and_nothing_else(hospital):
    "With every event after the prediction gone, inclusion by the past is the same: no row appears that was not asked before"
    cohort = build_cohort(hospital.timeline, "readmission_30d"); last = cohort.frame["prediction_time"].max()
    cut = replace(hospital.timeline, events=hospital.timeline.events.filter(pl.col("time").is_null() | (pl.col("time") <= last) | (pl.col("code") == "END_OF_FOLLOWUP")))
    assert set(map(tuple, build_cohort(cut).frame[["subject_id", "prediction_time"]].to_numpy())) >= set(map(tuple, cohort.frame[["subject_id", "prediction_time"]].to_numpy()))

# --- splits ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["readmission_30d", "in_hospital_mortality_24h", "aki_48h"])
def test_three_ways_to_split(hospital, name):
    cohorts = {how: build_cohort(hospital.timeline, name, split_by=how) for how in SPLIT_BY}
    for c in cohorts.values(): assert c.frame.groupby("subject_id")["split"].nunique().max() == 1 and set(c.frame["split"]) == {"train", "validation", "test"}
    t = cohorts["temporal"].frame.groupby("split")["prediction_time"].agg(["min", "max"])
    assert t.loc["train", "max"] < t.loc["validation", "min"] and t.loc["validation", "max"] < t.loc["test", "min"]
    sites = cohorts["site"].frame.groupby("site")["split"].nunique(); assert len(sites) == 3 and (sites == 1).all()
    assert cohorts["temporal"].flow[-1][1] == len(cohorts["temporal"]) < cohorts["temporal"].flow[-2][1]
    assert build_cohort(hospital.timeline, name, split_by="site").frame.equals(cohorts["site"].frame)

def test_two_sites_give_a_test_site_and_validation_patients(hospital):
    events = hospital.timeline.events.with_columns(code=pl.col("code").replace({"SITE//Hill": "SITE//Lake"}))
    f = build_cohort(replace(hospital.timeline, events=events, splits=None), split_by="site", seed=1).frame; by = f.groupby("site")["split"].agg(set)
    assert sorted(map(sorted, by)) == [["test"], ["train", "validation"]]

def test_splits_that_cannot_be(hospital):
    with pytest.raises(DataError, match="Did you mean 'temporal'"): build_cohort(hospital.timeline, split_by="temporary")
    for how in SPLIT_BY[1:]:
        with pytest.raises(TableError, match="less than 1"): build_cohort(hospital.timeline, validation=.6, test=.5, split_by=how)
    later = replace(hospital.timeline, events=hospital.timeline.events.with_columns(pl.col("time") + timedelta(days=36525)))
    with pytest.raises(DataError, match="dates were shifted"): build_cohort(later, split_by="temporal")
    with pytest.raises(DataError, match="shifted by patient"): build_cohort(replace(hospital.timeline, shifted=True), split_by="temporal")
    c = build_cohort(hospital.timeline)
    with pytest.raises(TableError, match="two splits"): Cohort(c.frame.assign(split=np.where(np.arange(len(c)) % 2, "train", "test")), c.task)

# --- tables ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["readmission_30d", "in_hospital_mortality_48h"])
def test_table_one_shows_no_small_cell(hospital, name):
    cohort = build_cohort(hospital.timeline, name); table = table_one(cohort); splits = [c for c in table.columns if c in ("train", "validation", "test")]; hidden = 0
    for g in [*cohort.groups]:
        for s in splits:
            shown = table.loc[g, s]; numbers = shown[shown.str.match(r"^\d+ \(")].str.extract(r"^(\d+)")[0].astype(int); gone = (~shown.str.match(r"^\d+ \(")).sum(); hidden += gone
            assert not numbers.between(1, 10).any() and gone != 1           # one cell alone could be computed from the total
    assert hidden > 0 and table.loc[("age", ""), "train"] == f"{cohort.of('train').frame['age'].mean():.1f} ({cohort.of('train').frame['age'].std():.1f})"

def test_the_flow_adds_up(hospital):
    for name in TASKS:
        if name == "icu_mortality_24h": continue
        cohort = build_cohort(hospital.timeline, name); n = [k for _, k in cohort.flow]
        assert n == sorted(n, reverse=True) and n[-1] == len(cohort) and str(cohort).count("\n") == len(n)

# --- settings ----------------------------------------------------------------------------------------------------------------------

def test_task_comes_from_the_caller_the_source_or_the_settings(hospital, tmp_path):
    settings = load_settings(); named = replace(hospital.timeline, task="length_of_stay_7d")
    assert cohort_for(hospital.timeline, settings).task.name == "readmission_30d" and cohort_for(named, settings).task.name == "length_of_stay_7d" and cohort_for(named, settings, "aki_48h").task.name == "aki_48h"
    sections = {s: dict(d) for s, d in settings.sections.items()}; sections["task"].update(horizon_days=10, split_by="temporal")
    ten = cohort_for(hospital.timeline, replace(settings, sections=sections)); assert ten.task.horizon_days == 10 and ten.flow[-1][0].startswith("in the period")
    assert cohort_for(hospital.timeline, replace(settings, sections=sections), "aki_48h").task.horizon_days == 2
    from importlib.resources import files
    (tmp_path / "our_task.yaml").write_text((files("clinllm.ehr") / "tasks" / "length_of_stay_7d.yaml").read_text().replace("start + 7d", "start + 3d"))
    own = cohort_for(hospital.timeline, replace(settings, root=tmp_path), "our_task.yaml")
    assert own.task.name == "our_task" and own.task.horizon_days == 3 and own.prevalence > cohort_for(named, settings).prevalence
    with pytest.raises(DataError, match="Did you mean 'aki_48h'"): cohort_for(hospital.timeline, settings, "aki48h")

def test_a_note_that_is_stored_late_is_read_when_it_is_there(hospital):
    late = hospital.timeline.events.with_columns(known_time=pl.when(pl.col("code") == "NOTE//discharge_summary").then(pl.col("time") + timedelta(hours=30)))
    cohort = build_cohort(replace(hospital.timeline, events=late), "icd10_coding"); out = hospital.stays.set_index("hadm_id")["discharge"]
    assert ((cohort.frame["prediction_time"] - cohort.frame["hadm_id"].map(out)) == pd.Timedelta(hours=30)).all()
    notes = replace(hospital.timeline, events=late).until(cohort).events.filter(pl.col("code") == "NOTE//discharge_summary")
    assert set(cohort.frame["hadm_id"]) <= set(notes["hadm_id"])
