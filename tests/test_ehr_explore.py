"Pictures of records: what is drawn is what is recorded, nothing personal is on them, small cells are withheld, and they work with and without ipywidgets."
import ast, base64, builtins, re, subprocess, sys
from dataclasses import replace
from datetime import datetime, timedelta
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt, numpy as np, pandas as pd, polars as pl, pytest
from clinllm.core.errors import DataError
from clinllm.core.tables import Cohort, Timeline
from clinllm.ehr import explore as module
from clinllm.ehr.cohort import READMISSION_30D, build_cohort, read_stays
from clinllm.ehr.explore import Explorer, cells, clustered_rate, cohort_figure, explore, plot_subject, stay_records, timeline_figure

PNG = b"\x89PNG\r\n\x1a\n"

@pytest.fixture(autouse=True)
def close(): yield; plt.close("all")

@pytest.fixture(scope="module")
def hospital():
    from clinllm.ehr.hospital import make_hospital
    return make_hospital(n_patients=120, seed=11)

@pytest.fixture(scope="module")
def demo(shared_data):
    from clinllm.ehr.mimic_demo import read_mimic_demo
    return read_mimic_demo(shared_data / "mimic4-demo-clif")

def texts(ax): return [t.get_text() for t in ax.figure.findobj(lambda a: hasattr(a, "get_text")) if t.get_text()]

def by_hand():
    day = lambda d: datetime(2024, 1, 1) + timedelta(days=d)
    rows = [(1, day(-50), "HOSPITAL_ADMISSION//URGENT", None, None, 8, None), (1, day(-45), "HOSPITAL_DISCHARGE//HOME", None, None, 8, None),
            (1, day(0), "HOSPITAL_ADMISSION//EMERGENCY", None, None, 9, None), (1, day(4), "HOSPITAL_DISCHARGE//HOME", None, None, 9, None),
            (1, day(1), "ICU_ADMISSION//MICU", None, None, 9, None), (1, day(2), "ICU_DISCHARGE//MICU", None, None, 9, None),
            *[(1, day(t), "LAB//creatinine//mg/dL", v, None, 9, None) for t, v in ((.5, 1.0), (1.5, 3.0), (3, .2))],
            (1, day(.2), "MEDICATION//furosemide", None, None, 9, None), (1, day(3), "MEDICATION//furosemide", None, None, 9, None),
            (1, day(4), "DIAGNOSIS//ICD10CM//I50.9", None, None, 9, day(5)), (1, day(4), "NOTE//discharge_summary", None, "Mrs Example lives alone.", 9, None)]
    return Timeline(pl.DataFrame(rows, schema=dict(subject_id=pl.Int64, time=pl.Datetime("us"), code=pl.String, numeric_value=pl.Float32, text_value=pl.String, hadm_id=pl.Int64, known_time=pl.Datetime("us")), orient="row"), source="by hand", kind="synthetic")

def test_one_stay_by_hand():
    ax = by_hand().plot(1)
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels == ["hospital", "intensive care", "notes", "discharge summary", "diagnoses", "I50.9 heart failure", "laboratory", "creatinine", "drugs", "furosemide"]
    up, down = ([l for l in ax.lines if l.get_marker() == m and len(l.get_xdata())] for m in "^v")
    assert [list(l.get_xdata()) for l in up] == [[1.5]] and [list(l.get_xdata()) for l in down] == [[3.0]]        # 3.0 is above 0.5 to 1.3 mg/dL, 0.2 below
    assert ax.get_title(loc="left") == "Patient 1, 4.0-day emergency stay: 1 of 1 measurements leave their normal range, creatinine furthest"
    bars = [(round(p.get_x(), 3), round(p.get_width(), 3)) for p in ax.patches if abs(p.get_height() - .6) < 1e-9]
    assert bars == [(0, 4), (1, 1)]                                                                               # in hospital for four days, one of them in intensive care
    assert "0.2 mg/dL ▼" in texts(ax)

def test_what_is_not_known_yet_is_pale_and_not_counted():
    t = by_hand(); ax = t.plot(1, until=datetime(2024, 1, 2))
    assert "day 1.0: all 1 measurements stay" in ax.get_title(loc="left") and "1 mg/dL" in texts(ax) and not any("▲" in x and "mg" in x for x in texts(ax))
    pale = [l for l in ax.lines if l.get_alpha() is not None and l.get_alpha() < .5 and len(l.get_xdata()) and l.get_marker() in "^vDs"]
    assert sorted(round(x, 1) for l in pale for x in l.get_xdata()) == [1.5, 3.0, 4.0, 4.0, 5.0]                  # two results, the diagnosis, its billing, the letter
    at_discharge = t.plot(1, until=datetime(2024, 1, 5))
    assert [l.get_alpha() for l in at_discharge.lines if l.get_marker() == "D" and list(l.get_xdata()) == [4.0]] == [.3]     # billed a day later: known_time rules

def test_the_last_stay_is_drawn_unless_another_is_named():
    t = by_hand()
    assert stay_records(t, 1)[0]["hadm_id"] == 9 and stay_records(t, 1, 8)[0]["hadm_id"] == 8
    assert t.plot(1, stay=8).get_title(loc="left").startswith("Patient 1, 5.0-day urgent stay: 0 records")
    for wrong, words in ((lambda: t.plot(2), "no such subject"), (lambda: t.plot(1, stay=7), "no such stay"), (lambda: t.plot(1, rows=dict(drug=2)), "unknown group of rows")):
        with pytest.raises(DataError, match=words): wrong()

def test_nothing_personal_is_on_the_picture(hospital):
    "No line of a note, no planted identifier, and of real patients no subject_id"
    spans = hospital.spans.groupby("hadm_id")["text"].apply(list); seen = 0
    for subject in hospital.timeline.subjects[:12]:
        if not len(read_stays(hospital.timeline.events.filter(pl.col("subject_id") == subject)).filter(pl.col("discharged").is_not_null())): continue
        s, _ = stay_records(hospital.timeline, subject); said = " ".join(texts(replace(hospital.timeline, kind="real").plot(subject)))
        assert str(subject) not in said and str(s["hadm_id"]) not in said
        found = [t for t in spans.get(s["hadm_id"], []) if len(t) > 4 and re.search(rf"\b{re.escape(t)}\b", said)]; seen += 1
        assert not found; plt.close("all")
    assert seen > 8
    with_name = by_hand(); bent = replace(with_name, events=with_name.events.with_columns(text_value=pl.lit("SECRET NAME")))
    assert not any("SECRET" in t for t in texts(bent.plot(1)))

def test_every_record_of_the_stay_is_on_the_picture_or_counted(hospital, demo):
    for timeline in (hospital.timeline, demo):
        for subject in timeline.subjects[5:8]:
            _, records = stay_records(timeline, subject); r = module._rows(records, module.ROOM)
            assert len(r) == len(records.filter(~pl.col("kind_").is_in(["patient", "visit"])))
            for (group,), g in r.filter(~pl.col("fits")).partition_by("group", as_dict=True).items():
                assert g["row"].unique().to_list() == [f"{g['label'].n_unique()} more"] and r.filter(pl.col("fits") & (pl.col("group") == group))["row"].n_unique() <= module.ROOM[group]

def test_a_long_real_stay_is_drawn_at_1000_pixels_in_seconds(demo):
    import time
    stays = read_stays(demo.events).with_columns(los=pl.col("discharged") - pl.col("admitted")).sort("los", descending=True)
    s = stays.row(0, named=True); start = time.time(); ax = demo.plot(s["subject_id"], stay=s["hadm_id"]); ax.figure.canvas.draw(); seconds = time.time() - start
    width = ax.figure.get_size_inches()[0] * ax.figure.dpi; box = ax.get_position()
    assert seconds < 8 and width <= 1000 and box.width > .5
    inside = [t for t in ax.texts if t.get_window_extent().x1 > ax.figure.bbox.x1 + 1]
    assert not inside                                                                                             # no value runs off the page

# --- cohorts ----------------------------------------------------------------------------------------------------------------

def cohort_of(rows): return Cohort(pd.DataFrame(rows, columns=["subject_id", "prediction_time", "label", "split", "sex"]).assign(prediction_time=pd.Timestamp("2024-01-01")), READMISSION_30D)

def test_small_cells_are_withheld():
    many = [(i, 0, int(i % 2), "train", "Female") for i in range(40)] + [(100 + i, 0, int(i < 2), "train", "Male") for i in range(30)] + [(200 + i, 0, int(i < 5), "train", "Other") for i in range(10)]
    c = cells(cohort_of(many).frame, "sex")
    assert c["group"].tolist() == ["Female", "Male", "Other"] and c["patients"].fillna(-1).tolist() == [40, 30, -1]
    assert c["rate"].notna().tolist() == [True, False, False]                                 # 2 of 30 are few, and 10 patients are few
    said = " ".join(texts(cohort_figure(cohort_of(many), "sex")))
    assert "fewer than 11: withheld" in said and "10 patients" not in said and "rate withheld" in said
    assert cells(cohort_of(many).frame, "sex", 0)["rate"].tolist() == pytest.approx([.5, 2 / 30, .5])

def test_the_interval_of_a_rate_counts_patients():
    "Against the bootstrap of the evaluation room, over patients"
    from clinllm.evaluation.statistics import bootstrap
    rng = np.random.default_rng(3); who = np.repeat(np.arange(120), 3); y = (rng.random(360) < np.repeat(rng.beta(1, 2, 120), 3)).astype(int)
    p, low, high = clustered_rate(y, who); e = bootstrap(pd.DataFrame(dict(subject_id=who, label=y, y_prob=.5)), lambda f, w: w @ f["label"].to_numpy() / w.sum(1), n_boot=2000)
    assert p == pytest.approx(e.value) and abs(low - e.low) < .012 and abs(high - e.high) < .012
    assert clustered_rate([0] * 10, range(10)) == (0, 0, pytest.approx(1 - .025 ** .1)) and clustered_rate([1] * 10, range(10))[1] == pytest.approx(.025 ** .1)

@pytest.mark.parametrize("variable", ["outcome", "age", "length of stay, days", "insurance"])
def test_every_variable_has_a_figure(hospital, variable):
    ax = cohort_figure(build_cohort(hospital.timeline), "sex", variable)
    assert ax.get_title(loc="left") and "Female" in " ".join(texts(ax))

def test_a_timeline_withholds_codes_of_few_patients(demo):
    ax = timeline_figure(demo, "diagnosis")
    e = demo.events.filter(pl.col("kind") == "diagnosis") if demo.events["kind"].drop_nulls().len() else demo.events.filter(pl.col("code").str.starts_with("DIAGNOSIS"))
    few = e.group_by("code").agg(n=pl.col("subject_id").n_unique()).filter(pl.col("n") < 11)
    assert len(few) > 100 and re.search(r"\d+ rows below 11 patients withheld", ax.get_xlabel())
    with pytest.raises(DataError, match="Did you mean 'lab'"): timeline_figure(demo, "labs")

# --- controls -----------------------------------------------------------------------------------------------------------------

def displayed(explorer, monkeypatch):
    "What a notebook would be sent, in order, and the handle of the figure"
    import IPython.display as ipd
    sent, updates = [], []
    class Handle:
        def update(self, data, raw): updates.append(data)
    def display(data, raw=False, display_id=None): sent.append(data); return Handle()
    monkeypatch.setattr(ipd, "display", display); explorer._ipython_display_(); return sent, updates

def is_picture(data): return base64.b64decode(data["image/png"])[:8] == PNG and len(data["image/png"]) > 4000

def test_with_ipywidgets_the_figure_is_a_png_and_follows_the_menus(hospital, monkeypatch):
    ipywidgets = pytest.importorskip("ipywidgets")
    e = explore(build_cohort(hospital.timeline)); made = []
    monkeypatch.setattr(ipywidgets, "HBox", lambda children: made.extend(children) or ipywidgets.VBox(children))
    sent, updates = displayed(e, monkeypatch)
    assert "application/vnd.jupyter.widget-view+json" in sent[0] and is_picture(sent[1]) and sent[1]["text/plain"].startswith("Outcome")
    menu = next(m for m in made if m.description == "variable"); menu.value = "age"
    assert len(updates) == 1 and is_picture(updates[0]) and updates[0]["text/plain"].startswith("Median age") and updates[0]["image/png"] != sent[1]["image/png"]

def test_without_ipywidgets_it_is_the_static_figure(hospital, monkeypatch):
    real = builtins.__import__
    def no_widgets(name, *a, **k):
        if name.startswith("ipywidgets"): raise ImportError(name)
        return real(name, *a, **k)
    monkeypatch.setattr(builtins, "__import__", no_widgets)
    e = explore(hospital.timeline); sent, _ = displayed(e, monkeypatch)
    assert e.controls(print) is None and len(sent) == 1 and is_picture(sent[0])
    assert type(e.figure(kind="lab")).__name__ == "Figure"

def test_patients_of_a_real_timeline_have_no_numbers_in_the_menu(demo, hospital):
    real, invented = explore(demo), explore(hospital.timeline)
    assert real.choices["patient"][:2] == ["all", "patient 1"] and not set(map(str, demo.subjects)) & set(real.choices["patient"])
    assert invented.choices["patient"][1] in map(str, hospital.timeline.subjects)
    assert "stay" in real.figure(patient="patient 2").axes[0].get_title(loc="left")
    with pytest.raises(DataError, match="unknown patient"): real.figure(patient="patient 0")
    with pytest.raises(DataError, match="Cohort or a Timeline"): explore([1])

def test_a_saved_page_has_the_picture(hospital, tmp_path):
    "A notebook that was run and saved has a PNG beside the widget, so a page without a kernel shows it"
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    code = "from clinllm.ehr.hospital import make_hospital\nfrom clinllm.ehr.explore import explore\nexplore(make_hospital(n_patients=40, seed=1).timeline)"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]); nbclient.NotebookClient(nb, timeout=120, kernel_name="python3").execute()
    found = [o["data"] for o in nb.cells[0].outputs if "data" in o]
    assert any("image/png" in d for d in found) and not any("HBox(" in str(d.get("text/plain", "")) for d in found)

def test_importing_is_cheap_and_plot_is_there():
    code = "import sys; from clinllm.ehr.explore import explore; from clinllm.core.tables import Timeline; print('matplotlib' in sys.modules, 'ipywidgets' in sys.modules, hasattr(Timeline, 'plot'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False", "False", "True"]

def test_a_single_value_without_a_range_is_drawn():
    t = by_hand(); one = replace(t, events=pl.concat([t.events, t.events.filter(pl.col("numeric_value") == 3).with_columns(code=pl.lit("LAB//rare thing//U"))]))
    assert any(x.startswith("3 U") for x in texts(one.plot(1)))
