"""The task language: the same labels as es-aces, the same kidney injuries as a plain loop, and no silent misspelling."""
import importlib.util, json
from datetime import datetime, timedelta
from importlib.resources import files
from pathlib import Path
import numpy as np, polars as pl, pytest, yaml
from clinllm.core.errors import DataError
from clinllm.core.tables import Timeline
from clinllm.ehr.task import METADATA_KEYS, TASKS, aki_events, evaluate, find_task, parse_task, read_duration

ORACLES = Path(__file__).parent / "oracles"
spec = importlib.util.spec_from_file_location("make_aces_oracle", ORACLES / "make_aces_oracle.py"); oracle = importlib.util.module_from_spec(spec); spec.loader.exec_module(oracle)
TIMES = dict(subject_id=pl.Int64, time=pl.Datetime("us"), prediction_time=pl.Datetime("us"), numeric_value=pl.Float32, hadm_id=pl.Int64, count=pl.Int64)

def read(name):
    frame = pl.read_csv(ORACLES / name, infer_schema=False)
    return frame.with_columns(pl.col(c).str.to_datetime(time_unit="us") if t == pl.Datetime("us") else pl.col(c).cast(t) for c, t in TIMES.items() if c in frame.columns)

# --- es-aces ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", json.loads((ORACLES / "aces_expected.json").read_text())["tasks"])
def test_labels_are_those_of_es_aces(name):
    timeline, (text, task) = Timeline(read("aces_events.csv"), "invented", "synthetic"), oracle.tasks()[name]
    expected = read("aces_expected.csv").filter(pl.col("task") == name).drop("task")
    ours = oracle.ours(oracle.with_facts(timeline, task), task)
    assert ours.equals(expected) and (name == "icd10_coding" or (len(ours) > 30 and 0 < ours.filter(pl.col("count") > 0).height < len(ours)))

def test_the_oracle_is_that_of_today():
    about = json.loads((ORACLES / "aces_expected.json").read_text())
    assert about["package"] == "es-aces" and about["version"] == "0.7.3" and about["tasks"] == sorted(oracle.tasks())
    assert read("aces_events.csv").equals(oracle.invent().select("subject_id", "time", "code", "numeric_value", "hadm_id"))

def test_ready_tasks_are_plain_aces_files():
    "Nothing of ours outside `metadata`, which ACES does not read; and each is short"
    for f in (files("clinllm.ehr") / "tasks").iterdir():
        text = f.read_text(encoding="utf-8"); rules = yaml.safe_load(text)
        assert set(rules) == {"description", "metadata", "predicates", "trigger", "windows"} and set(rules["metadata"]) <= set(METADATA_KEYS) and text.count("\n") <= 26
        for p in rules["predicates"].values(): assert set(p) <= {"code", "expr", "value_min", "value_max", "value_min_inclusive", "value_max_inclusive"}
        for w in rules["windows"].values(): assert set(w) <= {"start", "end", "start_inclusive", "end_inclusive", "has", "label", "index_timestamp"}

def test_order_and_repetition_of_events_do_not_matter_to_a_label():
    timeline = Timeline(read("aces_events.csv"), "invented", "synthetic")
    for name, (_, task) in oracle.tasks().items():
        events = oracle.with_facts(timeline, task); straight = oracle.ours(events, task)
        assert oracle.ours(events.sample(fraction=1, shuffle=True, seed=1), task).equals(straight)
        if name not in ("language", "edges"): assert oracle.ours(pl.concat([events, events]), task).with_columns(pl.col("count") > 0).equals(straight.with_columns(pl.col("count") > 0))

# --- two clocks --------------------------------------------------------------------------------------------------------------

def test_what_is_known_late_changes_inclusion_and_not_the_outcome():
    timeline = Timeline(read("aces_events.csv"), "invented", "synthetic"); task = TASKS["aki_48h"]
    events = oracle.with_facts(timeline, task); late = events.with_columns(known_time=pl.when(pl.col("code") == "CONCEPT//creatinine").then(pl.col("time") + timedelta(hours=7)))
    once, twice = oracle.ours(events, task), oracle.ours(late, task)
    assert len(twice) < len(once) and twice.join(once, on=twice.columns, how="semi").equals(twice)      # fewer have a known baseline; who is left has the same label

# --- acute kidney injury -------------------------------------------------------------------------------------------------------

def loop_aki(rows):
    "KDIGO 2012 2.1.1 for one patient, in decimal thousandths"
    rows = [(t, round(v * 1000)) for t, v in rows]; found = set()
    for t, v in rows:
        two = [u for s, u in rows if t - timedelta(hours=48) <= s < t]; week = [u for s, u in rows if t - timedelta(days=7) <= s < t]
        if (two and v - min(two) >= 300) or (week and round(v / min(week), 3) >= 1.5): found.add(t)
    return found

def test_kidney_injury_agrees_with_a_loop():
    rng = np.random.default_rng(5); rows = []
    for s in range(200):
        for k in rng.integers(0, 60, int(rng.integers(1, 25))): rows.append((s, datetime(2024, 1, 1) + timedelta(hours=6 * int(k)), round(float(rng.choice([.8, .9, 1., 1.2, 1.3, 1.35, 1.5, 1.8])), 2)))
    frame = pl.DataFrame(rows, schema=dict(subject_id=pl.Int64, time=pl.Datetime("us"), numeric_value=pl.Float32), orient="row")
    found = aki_events(frame); expected = {(s, t) for s in range(200) for t in loop_aki([(t, v) for p, t, v in rows if p == s])}
    assert set(found.rows()) == expected and len(expected) > 300 and len(found) == len(expected)

def test_kidney_injury_of_nobody():
    nothing = pl.DataFrame(schema=dict(subject_id=pl.Int64, time=pl.Datetime("us"), numeric_value=pl.Float32))
    assert len(aki_events(nothing)) == 0
    odd = pl.DataFrame(dict(subject_id=[1, 1, 1], time=[datetime(2024, 1, d) for d in (1, 2, 3)], numeric_value=[0.0, None, -1.0]))
    assert len(aki_events(odd)) == 0                        # a creatinine of 0 is no baseline

# --- mistakes ---------------------------------------------------------------------------------------------------------------

GOOD = oracle.EDGES
@pytest.mark.parametrize("old, new, said", [
    ("trigger: lab", "trigger: labs", "Did you mean 'lab'"), ("predicates:", "predicate:", "Did you mean 'predicates'"), ("end: start + 24h", "end: start + 24 parsecs", "no duration"),
    ("drug: {code", "drug: {codes", "Did you mean 'code'"), ('"(1, 3)"', '"(3)"', r"\(min, max\)"), ("label: high, ", "", "exactly one window needs 'label'"), ("index_timestamp: end", "index_timestamp: now", "must be start or end"),
    ("start: end - 24h, end: trigger", "start: end - 24h, end: start + 24h", "refer to each other"), ("end: start + 24h", "end: start -> never", "unknown predicate"), ("end: start + 24h", "end: start ~ 24h", "no boundary"),
    ("high: {code: LAB//creatinine//mg/dL, value_min: 1.5}", "high: {expr: \"or(high, lab)\"}", "cannot be resolved")])
def test_a_mistake_in_a_file_is_named(old, new, said):
    assert old in GOOD
    with pytest.raises(DataError, match=said): task = parse_task(GOOD.replace(old, new, 1), "mine"); evaluate(read("aces_events.csv").with_columns(known_time=pl.lit(None, dtype=pl.Datetime("us"))), task.rules)

def test_finding_a_task(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD)
    assert find_task("mine.yaml", tmp_path).name == "mine" and find_task("icd10_coding:E11.9").rules["predicates"]["target"] == {"code": {"regex": "^CODED//E11.9"}}
    for wrong in ("icd10_coding:", "icd10_coding:I50|.*", "mortality", "gone.yaml"):
        with pytest.raises(DataError): find_task(wrong, tmp_path)
    (tmp_path / "odd.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="odd"): find_task("odd.yaml", tmp_path)

def test_nobody_and_nothing():
    empty = pl.DataFrame(schema=dict(subject_id=pl.Int64, time=pl.Datetime("us"), code=pl.String, numeric_value=pl.Float32, known_time=pl.Datetime("us")))
    for _, (_, task) in oracle.tasks().items():
        rows, steps = evaluate(empty, task.rules); assert len(rows) == 0 and all(n == 0 for _, n in steps)
    assert read_duration("0 h") == timedelta(0)
