"Bad input, kills and memory, on exports written here; the oracle is what was written"
import gzip, json, os, signal, subprocess, sys, time
from pathlib import Path
import meds, polars as pl, pyarrow.parquet as pq, pytest
from clinllm.core.errors import DataError
from clinllm.core.settings import load_settings
from clinllm.ehr.importing import ImportReport, run_import
from clinllm.ehr.mimic_iv import MIMIC_IV
from clinllm.ehr.sources import import_data, load_timeline, read_meds

PATIENTS, STAYS, LABS = "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod\n", \
    "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admit_provider_id,admission_location,discharge_location,insurance,language,marital_status,race,edregtime,edouttime,hospital_expire_flag\n", \
    "labevent_id,subject_id,hadm_id,specimen_id,itemid,order_provider_id,charttime,storetime,value,valuenum,valueuom,ref_range_lower,ref_range_upper,flag,priority,comments\n"
ITEMS = "itemid,label,fluid,category\n50912,Creatinine,Blood,Chemistry\n50983,Sodium,Blood,Chemistry\n"

def lab(i, patient, at="2180-01-02 08:00:00", value="1.1", unit="mg/dL", item=50912): return f"{i},{patient},{patient}0,,{item},,{at},{at},{value},{value if value[:1].isdigit() else ''},{unit},,,,,\n"

def write_export(folder: Path, n: int = 20, labs_per_patient: int = 5, labs: str = None):
    folder.mkdir()
    (folder / "patients.csv").write_text(PATIENTS + "".join(f"{i},F,{40 + i % 50},2180,2011 - 2013,\n" for i in range(1, n + 1)))
    (folder / "admissions.csv").write_text(STAYS + "".join(f"{i},{i}0,2180-01-01 10:00:00,2180-01-05 10:00:00,,EW EMER.,,,HOME,Medicare,ENGLISH,,WHITE,,,0\n" for i in range(1, n + 1)))
    (folder / "d_labitems.csv").write_text(ITEMS)
    (folder / "labevents.csv").write_text(LABS + (labs if labs is not None else "".join(lab(k, 1 + k % n, f"2180-01-0{2 + k % 3} {k // n % 24:02}:{k // n // 24 % 60:02}:{k // n // 1440 % 60:02}", item=(50912, 50983)[k // n % 2], unit=("mg/dL", "mEq/L")[k // n % 2]) for k in range(n * labs_per_patient))))
    return folder

def rules(report, table="labevents"): return {(r["rule"], r["action"]): r["records"] for r in report.rules.to_dict("records") if r["table"] == table}

def test_every_fault_is_counted_with_its_line(tmp_path):
    rows = [lab(1, 1), lab(1, 1), lab(2, 2, value=">100"), lab(3, 3, at="0001-01-01 00:00:00"), lab(4, 987654), lab(5, ""), lab(6, 4, at="someday"), lab(7, 5, at=""), "8,1,too,few\n", lab(9, 6, unit="g/L"), lab(10, 7, unit="mg/dL\xe9")]
    src = write_export(tmp_path / "in", labs=""); (src / "labevents.csv").write_bytes((LABS + "".join(rows)).encode("cp1252"))
    report = run_import(MIMIC_IV, src, tmp_path / "out", tolerance=.5, progress=False)
    got = report.rejects.join(report.files.select(file="number", table="table"), on="file").filter(pl.col("table") == "labevents")
    assert sorted(zip(got["line"], got["action"])) == sorted([(3, "duplicate"), (4, "kept"), (5, "dropped"), (6, "dropped"), (7, "dropped"), (8, "dropped"), (9, "dropped"), (9, "kept"), (10, "dropped"), (12, "kept")])      # line 9 also lacks the time of its result
    text = (report.rules.to_csv() + json.dumps(report.about) + repr(report)).lower()
    assert not any(v in text for v in ("someday", "987654", "too,few", "\xe9"))                # no value of the export is told
    events = read_meds(tmp_path / "out").events.filter(pl.col("kind") == "lab")
    assert len(events) == 4 and events.filter(pl.col("text_value") == ">100")["numeric_value"].to_list() == [None]
    assert report.units.filter("conflict").height >= 2          # creatinine in g/L and in an unknown unit cannot be compared with mg/dL

def test_truncated_gzip_keeps_what_came(tmp_path):
    src = write_export(tmp_path / "in", labs_per_patient=400); whole = (src / "labevents.csv").read_bytes(); (src / "labevents.csv").unlink()
    zipped = gzip.compress(whole); (src / "labevents.csv.gz").write_bytes(zipped[:len(zipped) * 2 // 3])
    report = run_import(MIMIC_IV, src, tmp_path / "out", progress=False)
    assert ("gzip file is cut off: the rest is lost", "dropped") in rules(report) and any("cut off" in n for n in report.about["notes"])
    kept = read_meds(tmp_path / "out").events.filter(pl.col("kind") == "lab").height
    assert 4000 < kept < 8000 and kept == report.files.filter(pl.col("table") == "labevents")["events"][0]

def test_tolerance_stops_and_leaves_nothing(tmp_path):
    src = write_export(tmp_path / "in", labs="".join(lab(i, 1 if i % 2 else 987654, f"2180-01-02 08:{i % 60:02}:{i // 60:02}") for i in range(200)))
    with pytest.raises(DataError, match="more than the tolerance of 5.0%") as e: run_import(MIMIC_IV, src, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and "987654" not in str(e.value)
    assert run_import(MIMIC_IV, src, tmp_path / "out", tolerance=.8, progress=False).rejects.filter(pl.col("action") == "dropped").height == 100

def test_meds_tools_can_read_it(tmp_path):
    run_import(MIMIC_IV, write_export(tmp_path / "in"), tmp_path / "out", progress=False); out = tmp_path / "out"
    for p in (out / "data").glob("*.parquet"): meds.DataSchema.validate(pq.read_table(p))
    meds.CodeMetadataSchema.validate(pq.read_table(out / meds.code_metadata_filepath)); meds.SubjectSplitSchema.validate(pq.read_table(out / meds.subject_splits_filepath))
    meds.DatasetMetadataSchema.validate(json.loads((out / meds.dataset_metadata_filepath).read_text()))
    t = pl.concat([pl.read_parquet(p) for p in sorted((out / "data").glob("*.parquet"))])
    assert t.group_by("subject_id", maintain_order=True).agg(pl.col("time").is_sorted(nulls_last=False))["time"].all()
    assert set(t["subject_id"]) == set(pl.read_parquet(out / meds.subject_splits_filepath)["subject_id"])

RUN = "import sys; from clinllm.ehr.importing import run_import; from clinllm.ehr.mimic_iv import MIMIC_IV; import clinllm.ehr.importing as m; m.FLUSH = 20_000; m.SHARD_BYTES = 2 << 20; run_import(MIMIC_IV, sys.argv[1], sys.argv[2], progress=False); import pathlib; p = pathlib.Path('/proc/self/status'); print(p.read_text().split('VmHWM:')[1].split()[0] if p.exists() else 0)"

def test_a_kill_leaves_nothing_whole_and_the_same_command_goes_on(tmp_path):
    src = write_export(tmp_path / "in", n=400, labs_per_patient=500)
    def start(name): return subprocess.Popen([sys.executable, "-c", RUN, str(src), str(tmp_path / name)], stdout=subprocess.PIPE, text=True)
    assert start("whole").wait() == 0
    for until in ("done/*.json", "out/data/*.parquet"):         # in the first pass, and in the second
        process = start("killed"); deadline = time.time() + 120
        while not list((tmp_path / ".killed-import").glob(until)) and time.time() < deadline and process.poll() is None: time.sleep(.005)
        process.send_signal(signal.SIGKILL); process.wait()
        assert not (tmp_path / "killed").exists() and process.returncode == -signal.SIGKILL
        with pytest.raises(DataError, match="unknown data source"): load_timeline(str(tmp_path / "killed"), load_settings())
    marks = {p: p.stat().st_mtime_ns for p in (tmp_path / ".killed-import").glob("out/data/*.parquet")}
    assert marks and start("killed").wait() == 0 and not (tmp_path / ".killed-import").exists()
    for p in sorted((tmp_path / "whole" / "data").glob("*")): assert (tmp_path / "killed" / "data" / p.name).read_bytes() == p.read_bytes()
    for p in marks: assert (tmp_path / "killed" / "data" / p.name).stat().st_mtime_ns == marks[p]      # a finished shard was not made again
    a, b = ImportReport.read(tmp_path / "whole"), ImportReport.read(tmp_path / "killed")
    assert a.rejects.equals(b.rejects) and a.about["events"] == b.about["events"]

@pytest.mark.slow
def test_memory_does_not_grow_with_the_export(tmp_path):
    if not Path("/proc/self/status").exists(): pytest.skip("the peak of memory is read from /proc, which this system lacks")
    peak = {}
    for n in (2000, 6000):
        src = write_export(tmp_path / f"in{n}", n=n, labs_per_patient=250)
        peak[n] = int(subprocess.run([sys.executable, "-c", RUN, str(src), str(tmp_path / f"out{n}")], capture_output=True, text=True, check=True).stdout) / 1024
        size = (src / "labevents.csv").stat().st_size >> 20
    assert size > 100 and peak[6000] < peak[2000] + 60, f"peak memory in MB: {peak}"

def test_by_name_and_refusals(tmp_path):
    settings = load_settings(); src = write_export(tmp_path / "in")
    with pytest.raises(DataError, match="unknown format 'mimic4'. Did you mean 'mimic-iv'"): import_data("mimic4", src, "x", settings)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError): import_data("mimic-iv", tmp_path / "empty", str(tmp_path / "x" / "y"), settings)
    with pytest.raises(DataError, match="tolerance is a share"): import_data("mimic-iv", src, str(tmp_path / "x" / "y"), settings, tolerance=5)
    import_data("mimic-iv", src, str(tmp_path / "ours" / "demo"), settings, progress=False)
    assert len(load_timeline(str(tmp_path / "ours" / "demo"), settings).subjects) == 20
