"Clinicians' review: blinding, ratings that survive, spreadsheets, the form by its callbacks, evidence against known truth."
import json, multiprocessing, os, signal, subprocess, sys
import numpy as np, pandas as pd, pytest
from clinllm.core.errors import ClinllmError, DataError, ParameterError, TableError
from clinllm.core.tables import Predictions
from clinllm.evaluation.review import CANNOT, CORE, QUEST, Review, all_ratings, blind, disagreements, message_review, read_ratings, review_evidence, review_plot, settled, unblind
from clinllm.evaluation.statistics import WORST

DIMENSIONS = ("accuracy", "clarity", "harm")

def answers(n=6, variants=("old model", "new model")):
    rows = [dict(subject_id=i, prediction_time=pd.Timestamp("2024-01-01"), variant=v, text=f"=Answer {i}{'x' * j} é", source=f"note {i}", reference=f"truth {i}", status="ok") for i in range(n) for j, v in enumerate(variants)]
    return pd.DataFrame(rows)

@pytest.fixture
def study(tmp_path): blind(Predictions(answers()), tmp_path / "review", dimensions=DIMENSIONS); return tmp_path / "review"

@pytest.fixture
def key(study): return study.parent / "review-key.csv"

def fill(study, name, rating=lambda row, d: 3):
    review = Review(study, name)
    for row in pd.read_csv(f"{study}-key.csv").dropna(subset="item").itertuples():
        for d in review.dimensions:
            if (r := rating(row, d)) is not None: review.rate(row.item, d, r)
    return review

# blinding
def test_nothing_that_a_rater_sees_names_the_variant_or_the_patient(study, key):
    review = Review(study, "ana"); review.form(); sheet = review.export_csv(study / "ana.csv"); review.rate(review.order[0], "harm", 2)
    widgets = review.widgets; shown = [w.value for w in (widgets.text, widgets.status)] + [str(r.children[0].value) for r in widgets.rows.values()]
    seen = "".join(f.read_text() for f in study.iterdir()) + sheet.read_text() + "".join(shown) + repr(review) + " ".join(f.name for f in study.iterdir())
    for secret in ("old model", "new model", "subject_id", "prediction_time", "truth", "variant"): assert secret not in seen
    known = pd.read_csv(key); assert known["variant"].value_counts().to_dict() == {"old model": 6, "new model": 6} and not key.is_relative_to(study)
    shared = pd.DataFrame([json.loads(line) for line in (study / "items.jsonl").read_text().splitlines()]); pd.testing.assert_frame_equal(shared, shared.sort_values("item"))

def test_codes_do_not_follow_from_table_and_seed(tmp_path):
    codes = [pd.read_csv(blind(answers(), tmp_path / str(i), seed=1))["item"].tolist() for i in range(2)]
    assert not set(codes[0]) & set(codes[1]) and all(len(c) == 5 and not set(c) & set("AEIOU0123456789") for c in codes[0])

def test_orders_are_random_per_rater_and_stable(study):
    orders = [Review(study, name).order for name in ("ana", "ben", "cleo")]
    assert orders[0] == Review(study, "Ana").order and len({tuple(o) for o in orders}) == 3 and all(sorted(o) == sorted(orders[0]) for o in orders)

def test_reference_is_shown_only_when_asked(tmp_path):
    blind(answers(), tmp_path / "r", show_reference=True); assert "truth 1" in (tmp_path / "r" / "items.jsonl").read_text()

def test_sampled_cases_keep_all_their_variants_and_failures(tmp_path):
    table = answers(20); table.loc[table["subject_id"] < 10, "status"] = "refused"; known = pd.read_csv(blind(table, tmp_path / "r", n_cases=4))
    assert len(known) == 8 and known["subject_id"].nunique() == 4 and (known["subject_id"] >= 10).all()

def test_what_blind_refuses(tmp_path, study):
    with pytest.raises(DataError, match="exists already"): blind(answers(), study)
    with pytest.raises(ParameterError, match="raters' folder"): blind(answers(), tmp_path / "a", key=tmp_path / "a" / "sub" / "key.csv")
    with pytest.raises(ParameterError, match="accuracy"): blind(answers(), tmp_path / "a", dimensions="acuracy")
    with pytest.raises(TableError, match="none of 12"): blind(answers().assign(status="error"), tmp_path / "a")
    with pytest.raises(TableError, match="repeat"): blind(pd.concat([answers(), answers()]), tmp_path / "a")
    with pytest.raises(TableError, match="'text' is missing"): blind(answers().drop(columns="text"), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(DataError, match="no review"): Review(tmp_path, "ana")
    for name in ("", "../x", "a b", "ana/ben", "adjudicated", "ä" * 3, "x" * 41):
        with pytest.raises(ParameterError, match="rater"): Review(study, name)

def test_an_empty_text_is_a_failure_and_the_frame_needs_no_time(tmp_path):
    table = answers().drop(columns=["prediction_time", "status"]); table.loc[0, "text"] = "  "; known = pd.read_csv(blind(table, tmp_path / "r"))
    assert known["status"].value_counts().to_dict() == {"ok": 11, "no text": 1} and set(CORE) <= set(QUEST) and len(QUEST) == 17

# ratings that survive
CLICKS = """
import sys, time
from clinllm.evaluation.review import Review
review = Review(sys.argv[1], "ana"); review.form()
for d in review.dimensions: review.widgets.buttons[d].value = 4; print(d, flush=True); time.sleep(60 if d == "clarity" else 0)
"""

def test_ratings_survive_a_kernel_killed_between_two_clicks(study):
    process = subprocess.Popen([sys.executable, "-c", CLICKS, str(study)], stdout=subprocess.PIPE, text=True); said = [process.stdout.readline().strip() for _ in range(2)]; os.kill(process.pid, signal.SIGKILL); process.wait()
    review = Review(study, "ana"); item = review.order[0]
    assert said == ["accuracy", "clarity"] and review.given == {(item, "accuracy"): 4, (item, "clarity"): 4} and review.unrated(item) == ["harm"] and review.torn == 0
    review.form(); assert review.widgets.at == 0 and review.widgets.keys.value == "44" and review.widgets.buttons["harm"].value is None

def write(study, name):
    review = Review(study, name)
    for k in range(5):
        for item in review.order: review.rate(item, "harm", 1 + k % 5)

@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_raters_who_write_at_the_same_time_lose_nothing(study):
    running = [multiprocessing.get_context("fork").Process(target=write, args=(study, name)) for name in ("ana", "ana", "ben")]
    for p in running: p.start()
    for p in running: p.join(60); assert p.exitcode == 0
    for name, writers in (("ana", 2), ("ben", 1)):
        lines = (study / f"ratings-{name}.jsonl").read_text().splitlines()
        assert len(lines) == writers * 5 * 12 and all(json.loads(line)["rater"] == name for line in lines)
    assert len(all_ratings(study)) == 24 and (all_ratings(study)["rating"] == 5).all()

@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_half_written_last_line_costs_one_rating(study, cut):
    review = Review(study, "ana")
    for d in DIMENSIONS: review.rate(review.order[0], d, 2)
    whole = review.path.read_bytes(); review.path.write_bytes(whole[:-cut]); again = Review(study, "ana")
    if cut == 1: assert len(again.given) == 3 and again.torn == 0              # only the line's end was lost
    else: assert again.unrated(review.order[0]) == ["harm"] and again.torn == 1
    again.rate(review.order[0], "harm", 5); last = Review(study, "ana")
    assert last.given[review.order[0], "harm"] == 5 and len(last.given) == 3 and all_ratings(study).attrs["torn"] == again.torn

def test_a_foreign_or_edited_file_is_refused(study, tmp_path):
    review = fill(study, "ana"); good = review.path.read_text()
    for old, new, said in ((review.order[0], "ZZZZZ", "another review"), ('"harm"', '"harms"', "Did you mean 'harm'"), ('"rating": 3', '"rating": 9', "must be one of 1, 2, 3, 4, 5")):
        review.path.write_text(good.replace(old, new))
        with pytest.raises(ClinllmError, match=said): Review(study, "ana")
    (study / "items.jsonl").write_text("\n".join((study / "items.jsonl").read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match="damaged"): Review(study, "ben")

@pytest.mark.parametrize("bad", [0, 6, 2.5, "good", None, True, float("nan"), "A long text about a patient"])
def test_only_grades_of_the_scale_are_kept(study, bad):
    review = Review(study, "ana")
    with pytest.raises(TableError) as e: review.rate(review.order[0], "harm", bad)
    assert "patient" not in str(e.value) and not review.path.exists()

# the form, by its callbacks
def test_clicks_keys_and_comments_are_saved_at_once_and_shown_again(study):
    review = Review(study, "ana"); review.form(); form = review.widgets; first = review.order[0]; disk = lambda: Review(study, "ana")
    form.buttons["clarity"].value = 2; assert disk().given == {(first, "clarity"): 2} and form.keys.value == ".2"
    form.keys.value = "42"; assert disk().given == {(first, "clarity"): 2, (first, "accuracy"): 4} and form.buttons["accuracy"].value == 4
    form.keys.value = "420"; assert disk().given[first, "harm"] == CANNOT and form.progress.value == 1
    form.comment.value = "No dose."; assert disk().comments == {first: "No dose."}
    form.keys.value = "4207"; assert "7 was not kept" in form.status.value and len(disk().given) == 3
    form.keys._handle_custom_msg({"event": "submit"}, []); assert form.at == 1 and form.keys.value == "" and form.comment.value == "" and "saved" not in form.status.value
    form.back.click(); assert form.keys.value == "420" and form.comment.value == "No dose." and len(review.path.read_text().splitlines()) == 4
    for _ in range(30): form.next.click()
    assert form.at == 11
    review = disk(); review.form(); assert review.widgets.at == 1          # goes on where the rater left

def test_a_rating_that_cannot_be_saved_is_said_loudly(study, monkeypatch):
    review = Review(study, "ana"); review.form(); form = review.widgets
    monkeypatch.setattr("clinllm.evaluation.review.os.fsync", lambda f: (_ for _ in ()).throw(OSError("No space left on device")))
    form.buttons["harm"].value = 5; assert "NOT saved" in form.status.value and (review.order[0], "harm") not in review.given
    form.comment.value = "x"; assert "NOT saved" in form.status.value

def test_what_a_model_wrote_stays_text(tmp_path):
    blind(answers(1, ["a"]).assign(text="<img src=x onerror=alert(1)>", source="</div><script>"), tmp_path / "r", dimensions={"<b>own</b>": "Is it <i>good</i>?"})
    review = Review(tmp_path / "r", "ana"); review.form(); shown = review.widgets.text.value + review.widgets.rows["<b>own</b>"].children[0].value
    assert "<img" not in shown and "<script" not in shown and "<b>own" not in shown and "&lt;img" in shown
    review.rate(review.order[0], "<b>own</b>", 5)

# spreadsheets
def test_csv_there_and_back_in_the_shapes_that_spreadsheets_make(study):
    review = Review(study, "ben"); raw = review.export_csv(study.parent / "ben.csv"); sheet = pd.read_csv(raw)
    assert sheet["text"].str.startswith("'=Answer").all() and sheet[list(DIMENSIONS)].isna().all().all() and list(sheet["item"]) == review.order
    sheet = sheet.astype({d: object for d in (*DIMENSIONS, 'comment')}); sheet.loc[0, "accuracy"], sheet.loc[1, "harm"], sheet.loc[2, "clarity"], sheet.loc[2, "comment"] = "4,0", "5.0", "Cannot judge", "ärgerlich"
    shapes = dict(excel=dict(sep=";", encoding="cp1252"), utf=dict(encoding="utf-8-sig"), tabs=dict(sep="\t", lineterminator="\r\n"))
    for name, shape in shapes.items():
        path = study.parent / f"{name}.csv"; sheet.sample(frac=1, random_state=1)[list(sheet.columns[::-1])].to_csv(path, index=False, **shape)
        other = Review(study, name); assert other.import_csv(path) == 3
        assert Review(study, name).given == {(review.order[0], "accuracy"): 4, (review.order[1], "harm"): 5, (review.order[2], "clarity"): CANNOT} and Review(study, name).comments == {review.order[2]: "ärgerlich"}
    again = Review(study, "excel"); again.export_csv(path); assert again.import_csv(path) == 0          # the round trip changes nothing
    lines = len(again.path.read_text().splitlines()); assert lines == 4

@pytest.mark.parametrize("edit, said", [
    (lambda d: d.assign(harm=["bad"] + [""] * 11), "row 2, column harm: a rating must be one of"),
    (lambda d: d.assign(clarity=[""] * 3 + ["7"] + [""] * 8), "row 5, column clarity"),
    (lambda d: d.assign(accuracy="Mr Smith has a long story"), "text of 25 characters"),
    (lambda d: d.drop(columns="harm"), "one column 'harm', it has 0"),
    (lambda d: d.assign(item=["XXXXX"] + list(d["item"][1:])), "row 2, column item"),
    (lambda d: pd.concat([d, d.head(1)]), "row 14: item .* comes twice"),
])
def test_a_sheet_that_cannot_be_understood_keeps_nothing_and_names_the_cell(study, edit, said):
    review = Review(study, "ben"); path = review.export_csv(study.parent / "ben.csv"); sheet = pd.read_csv(path, dtype=str, keep_default_na=False); sheet.loc[3, "harm"] = "4"
    edit(sheet).to_csv(path, index=False)
    with pytest.raises(TableError, match=said) as e: review.import_csv(path)
    assert "Smith" not in str(e.value) and not review.path.exists()

def test_an_empty_file_and_an_untouched_sheet(study):
    (study.parent / "none.csv").write_text(""); review = Review(study, "ben")
    with pytest.raises(DataError, match="empty"): review.import_csv(study.parent / "none.csv")
    assert len(read_ratings(review.export_csv(study.parent / "ben.csv"), review)) == 0 and review.import_csv(study.parent / "ben.csv") == 0

# disagreement and evidence
def test_disagreements_and_adjudication(study):
    with pytest.raises(DataError, match="no ratings"): all_ratings(study)
    fill(study, "ana", lambda row, d: 5); fill(study, "ben", lambda row, d: 1 if row.subject_id == 0 and d == "harm" else CANNOT if row.subject_id == 1 else 4)
    talk = disagreements(all_ratings(study)); assert len(talk) == 2 and set(talk["dimension"]) == {"harm"} and (talk["spread"] == 4).all() and set(talk["ratings"]) == {"1, 5"}
    chair = Review(study, "chair"); chair.adjudicate(); form = chair.widgets
    assert form.rows["harm"].layout.display is None or form.rows["harm"].layout.display == ""; assert form.rows["clarity"].layout.display == "none"
    assert "rated 1, 5" in form.text.value and not any(name in form.text.value for name in ("ana", "ben"))
    form.keys.value = "2"; assert settled(study).to_dict("records") == [dict(item=form.order[0], dimension="harm", rating=2.)]
    again = Review(study, "chair"); again.adjudicate(); assert again.widgets.at == 1 and len(all_ratings(study)) == 72 and again.given == {}
    fill(study, "ben", lambda row, d: 5); empty = Review(study, "chair"); empty.adjudicate(); assert "nothing to rate" in empty.widgets.text.value; empty.widgets.next.click()

def test_evidence_by_hand(tmp_path):
    table = answers(); table.loc[1, ["status", "text"]] = ["refused", None]; study = tmp_path / "r"; key = blind(table, study, dimensions=DIMENSIONS)
    fill(study, "ana", lambda row, d: {"old model": 2, "new model": 4}[row.variant] if d != "clarity" else None)
    fill(study, "ben", lambda row, d: {"old model": 3, "new model": 4}[row.variant] if d == "accuracy" else CANNOT if d == "harm" else None)
    found = review_evidence(all_ratings(study), key, reference="old model", n_boot=50).frame; at = found.set_index(["metric", "variant", "group"])
    assert at.loc[("mean_rating", "old model", "accuracy"), "value"] == 2.5 and at.loc[("mean_rating", "new model", "accuracy"), ["value", "n"]].tolist() == [4, 5]
    assert at.loc[("mean_rating", "new model", f"accuracy, {WORST}"), "value"] == pytest.approx((5 * 4 + 1) / 6)
    assert at.loc[("low_rating_rate", "old model", "accuracy"), "value"] == 1 and at.loc[("low_rating_rate", "new model", "accuracy"), "value"] == 0
    assert at.loc[("mean_rating_difference", "new model - old model", "accuracy"), ["value", "n"]].tolist() == [1.5, 5]
    assert at.loc[("percent_agreement", "all", "accuracy"), "value"] == pytest.approx(5 / 11) and "1 of 6 answers were not ok" in at.loc[("mean_rating", "new model", "accuracy"), "limitation"]
    assert np.isnan(at.loc[("krippendorff_alpha", "all", "harm"), "value"]) and "6 ratings were 'cannot judge'" in at.loc[("mean_rating", "old model", "harm"), "limitation"] and "one rater only" in at.loc[("mean_rating", "old model", "harm"), "limitation"]
    assert set(found["dimension"]) == {"clinicians' review"} and "clarity" not in set(found["group"])
    final = pd.DataFrame(dict(item=all_ratings(study)["item"].unique(), dimension="accuracy", rating=5.)); assert review_evidence(all_ratings(study), key, final, n_boot=20).frame.set_index(["metric", "variant", "group"]).loc[("mean_rating", "old model", "accuracy"), "value"] == 5
    with pytest.raises(TableError, match="variant"): review_evidence(all_ratings(study), key, reference="oldmodel")
    other = blind(answers(), tmp_path / "other")
    with pytest.raises(DataError, match="another review"): unblind(all_ratings(study), other)

def test_a_planted_difference_is_found_and_none_is_not(tmp_path):
    held = {0: [], .6: []}
    for shift in held:
        for s in range(5):
            rng = np.random.default_rng(s); level = rng.normal(size=40); study = tmp_path / f"{shift}{s}"; key = blind(answers(40), study, dimensions="harm")
            known = pd.read_csv(key); rows = [dict(item=r.item, rater=n, dimension="harm", status="ok", comment="", rating=float(np.clip(round(3 + level[r.subject_id] * .7 + shift * (r.variant == "new model") + .5 * rng.normal()), 1, 5))) for r in known.itertuples() for n in "ab"]
            row = review_evidence(pd.DataFrame(rows), key, reference="old model", n_boot=100).frame.query("metric == 'mean_rating_difference'").iloc[0]; held[shift].append(row["low"] > 0 or row["high"] < 0)
    assert sum(held[.6]) == 5 and sum(held[0]) <= 1

def test_figure_says_its_numbers(study, key):
    fill(study, "ana", lambda row, d: 4 if row.variant == "new model" else 2 + row.subject_id % 2); found = review_evidence(all_ratings(study), key, reference="old model", n_boot=50)
    said = message_review(found); assert "new model was rated higher than old model on 3 and lower on 0 of 3" in said and "+1.50" in said and "n=6" in said
    ax = review_plot(found); assert ax.get_title(loc="left").replace("\n", " ") == said and len(ax.get_legend().texts) == 2
    plain = message_review(review_evidence(all_ratings(study), key, n_boot=50)); assert "lowest mean rating is that of old model" in plain and "2.50" in plain
    with pytest.raises(TableError, match="mean_rating"): review_plot(found.frame.query("metric == 'percent_agreement'"))
