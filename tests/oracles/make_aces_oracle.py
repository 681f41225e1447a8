"""Make the expected labels of the task evaluator with es-aces itself.

    python -m venv /tmp/aces && /tmp/aces/bin/pip install es-aces==0.7.3
    python tests/oracles/make_aces_oracle.py --aces /tmp/aces/bin/python               # writes tests/oracles/aces_*.csv
    python tests/oracles/make_aces_oracle.py --aces /tmp/aces/bin/python --compare     # larger: synthetic hospital, MIMIC-IV demo where it is at hand; writes nothing

es-aces 0.7.3 needs polars below 2 and clinllm needs 2.1: hence the second environment. The events are invented and seeded. They have what
task languages stumble over: events at the same time, at the very edge of a window, repeated triggers, values missing and at a limit, open stays.
"""
import argparse, json, os, subprocess, sys, tempfile
from datetime import datetime, timedelta
from pathlib import Path
import numpy as np, polars as pl

HERE = Path(__file__).parent
LANGUAGE = """
description: every construct of the language once
predicates:
  admission: {code: {regex: "^EPISODE_START//"}}
  discharge: {code: {regex: "^EPISODE_END//"}}
  death: {code: MEDS_DEATH}
  gone: {expr: "or(discharge, death)"}
  high: {code: LAB//creatinine//mg/dL, value_min: 1.5, value_min_inclusive: true}
  low: {code: LAB//creatinine//mg/dL, value_max: 0.9, value_max_inclusive: false}
  drug: {code: {any: [MEDICATION//furosemide, MEDICATION//heparin]}}
  both: {expr: "and(high, drug)"}
trigger: drug
windows:
  input: {start: null, end: trigger + 6h, start_inclusive: true, end_inclusive: true, index_timestamp: end, has: {_ANY_EVENT: "(3, None)"}}
  since: {start: end <- admission, end: trigger, start_inclusive: true, end_inclusive: false, has: {both: "(None, 1)"}}
  gap: {start: trigger, end: start + 6h, start_inclusive: false, end_inclusive: true, has: {gone: "(None, 0)"}}
  outcome: {start: gap.end, end: start -> gone, start_inclusive: false, end_inclusive: true, label: high}
"""
EDGES = """
description: edges of windows, the other way round
predicates:
  lab: {code: {regex: "^LAB//"}}
  high: {code: LAB//creatinine//mg/dL, value_min: 1.5}
  drug: {code: {regex: "^MEDICATION//"}}
trigger: lab
windows:
  input: {start: null, end: trigger, start_inclusive: true, end_inclusive: true, index_timestamp: end}
  before: {start: end - 24h, end: trigger, start_inclusive: true, end_inclusive: false, has: {drug: "(1, 3)"}}
  outcome: {start: trigger, end: start + 24h, start_inclusive: false, end_inclusive: false, label: high, has: {lab: "(1, None)"}}
"""
INSIDE = """
import sys, json, polars as pl
from pathlib import Path
from aces.config import TaskExtractorConfig
from aces.predicates import get_predicates_df
from aces.query import query
from omegaconf import DictConfig
shard, out = sys.argv[1:3]
for config in sys.argv[3:]:
    cfg = TaskExtractorConfig.load(config)
    found = query(cfg, get_predicates_df(cfg, DictConfig(dict(path=shard, standard="meds", ts_format=None))))
    found = found.select("subject_id", prediction_time="index_timestamp", count="label") if len(found) else pl.DataFrame(schema=dict(subject_id=pl.Int64, prediction_time=pl.Datetime("us"), count=pl.Int64))
    found.sort("subject_id", "prediction_time").write_parquet(Path(out, Path(config).stem + ".parquet"))
"""

def invent(n: int = 60, seed: int = 7) -> pl.DataFrame:
    "Events of invented patients on a grid of 6 hours, so that times collide"
    rng, rows, start = np.random.default_rng(seed), [], datetime(2024, 1, 1)
    at = lambda k: start + timedelta(hours=6 * int(k))
    for s in range(1, n + 1):
        k, hadm = int(rng.integers(0, 8)), 100 * s
        rows.append((s, datetime(int(rng.integers(1940, 2008)), 3, 1), "MEDS_BIRTH", None, None))
        for _ in range(int(rng.integers(1, 5))):
            hadm += 1; los = int(rng.integers(1, 50)); kind = rng.choice(["EMERGENCY", "URGENT", "ELECTIVE", "OBSERVATION"], p=[.5, .2, .2, .1]); to = rng.choice(["HOME", "SNF", "HOSPICE", "AMA", "EXPIRED", ""], p=[.55, .15, .05, .05, .1, .1])
            rows.append((s, at(k), f"HOSPITAL_ADMISSION//{kind}", None, hadm))
            for _ in range(int(rng.poisson(los / 3 + 1))):
                when = at(k + rng.integers(0, los + 1))
                rows.append((s, when, "LAB//creatinine//mg/dL", None if rng.random() < .1 else round(float(rng.choice([.8, .9, 1.0, 1.2, 1.3, 1.5, 1.6, 2.4])), 2), hadm))
                if rng.random() < .4: rows.append((s, when if rng.random() < .5 else at(k + rng.integers(0, los + 1)), str(rng.choice(["MEDICATION//furosemide", "MEDICATION//heparin", "MEDICATION//aspirin"])), None, hadm))
            if rng.random() < .95: rows.append((s, at(k + los), f"HOSPITAL_DISCHARGE//{to}", None, hadm))
            if to == "EXPIRED": rows.append((s, at(k + los), "MEDS_DEATH", None, None)); break
            k += los + int(rng.choice([1, 2, 20, 110, 120, 121, 300]))
        else:
            if rng.random() < .2: rows.append((s, at(k + rng.integers(1, 60)), "MEDS_DEATH", None, None))
    return pl.DataFrame(rows, schema=dict(subject_id=pl.Int64, time=pl.Datetime("us"), code=pl.String, numeric_value=pl.Float32, hadm_id=pl.Int64), orient="row").sort("subject_id", "time", maintain_order=True)

def with_facts(timeline, task) -> pl.DataFrame:
    "The events that a task sees, derived ones too"
    from clinllm.ehr.cohort import derive_events, join_stays, read_stays
    columns = ["subject_id", "time", "code", "numeric_value", "known_time"]
    return pl.concat([timeline.events.select(columns), derive_events(timeline, join_stays(read_stays(timeline.events)), task.rules)[0].select(columns)]).sort("subject_id", "time", maintain_order=True)

def ask_aces(python: str, events: pl.DataFrame, config: str, name: str) -> pl.DataFrame:
    "Labels of one task from es-aces"
    with tempfile.TemporaryDirectory() as d:
        shard = events.select("subject_id", "time", "code", "numeric_value"); shard.write_parquet(f"{d}/0.parquet"); Path(d, f"{name}.yaml").write_text(config); Path(d, "inside.py").write_text(INSIDE)
        done = subprocess.run([python, f"{d}/inside.py", f"{d}/0.parquet", d, f"{d}/{name}.yaml"], capture_output=True, text=True)
        if done.returncode: sys.exit(done.stderr[-2000:])
        return pl.read_parquet(f"{d}/{name}.parquet").cast(dict(subject_id=pl.Int64, prediction_time=pl.Datetime("us"), count=pl.Int64))

def tasks() -> dict:
    "Name → (text of the file, Task)"
    from importlib.resources import files
    from clinllm.ehr.task import TASKS, parse_task
    ready = {n: ((files("clinllm.ehr") / "tasks" / f"{n}.yaml").read_text(encoding="utf-8"), t) for n, t in TASKS.items() if n not in ("icu_mortality_24h",)}
    return ready | {n: (text, parse_task(text, n)) for n, text in (("language", LANGUAGE), ("edges", EDGES))}

def ours(events, task):
    from clinllm.ehr.task import evaluate
    return evaluate(events, task.rules)[0].select("subject_id", "prediction_time", "count").sort("subject_id", "prediction_time")

def main():
    ask = argparse.ArgumentParser(); ask.add_argument("--aces", required=True, help="python of the environment with es-aces 0.7.3"); ask.add_argument("--compare", action="store_true")
    a = ask.parse_args()
    from clinllm.core.tables import Timeline
    sources = {"invented": Timeline(invent(), "invented", "synthetic")}
    if a.compare:
        from clinllm.ehr.hospital import make_hospital
        from clinllm.ehr.mimic_demo import read_mimic_demo
        sources = {"invented, 500 patients": Timeline(invent(500, 11), "invented", "synthetic"), "synthetic hospital, 200 patients": make_hospital(200).timeline}
        demo = Path(os.environ.get("CLINLLM_DATA") or HERE.parents[2] / "shared" / "data") / "mimic4-demo-clif"
        if demo.is_dir(): sources["MIMIC-IV demo"] = read_mimic_demo(demo)
    kept = []
    for source, timeline in sources.items():
        for name, (text, task) in tasks().items():
            events = with_facts(timeline, task).with_columns(known_time=pl.lit(None, dtype=pl.Datetime("us")))     # ACES knows one clock only
            theirs, mine = ask_aces(a.aces, events, text, name), ours(events, task)
            print(f"{source}: {name}: es-aces {len(theirs)} rows, {theirs.filter(pl.col('count') > 0).height} with the event; equal: {theirs.equals(mine)}")
            kept.append(theirs.with_columns(task=pl.lit(name)))
    if not a.compare:
        sources["invented"].events.select("subject_id", "time", "code", "numeric_value", "hadm_id").write_csv(HERE / "aces_events.csv")
        pl.concat(kept).select("task", "subject_id", "prediction_time", "count").write_csv(HERE / "aces_expected.csv")
        (HERE / "aces_expected.json").write_text(json.dumps(dict(package="es-aces", version="0.7.3", made_by="tests/oracles/make_aces_oracle.py", tasks=sorted(tasks())), indent=1) + "\n")

if __name__ == "__main__": main()
