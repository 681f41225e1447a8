"FHIR exports that we did not write, and resources that nobody should write: each becomes events or a counted reject"
import base64, copy, gzip, json, random, subprocess, sys
from collections import Counter
from datetime import date, datetime
from pathlib import Path
import polars as pl, pytest
from clinllm.ehr.fhir import FHIR, _key, events, prepare, read
from clinllm.ehr.files import Damage, Table
from clinllm.ehr.importing import run_import

carebundle = pytest.importorskip("carebundle", reason="pip install carebundle (FHIR generator used as an oracle)")
READ = {"Patient", "Encounter", "Condition", "Observation", "MedicationRequest", "MedicationAdministration", "MedicationStatement", "Procedure", "AllergyIntolerance", "Immunization", "DocumentReference", "DiagnosticReport", "Composition", "Coverage"}
NOT_DONE = {"entered-in-error", "cancelled", "not-done", "draft"}

def imported(source, target, tolerance=.0, **kw):
    report = run_import(FHIR, source, target, tolerance=tolerance, progress=False, **kw)
    return report, pl.read_parquet(target / "data" / "*.parquet")

def parsed(resources, folder):
    "Frames of hand-made resources: (events by line, remarks by line)"
    path = folder / "x.ndjson"; path.write_text("\n".join(json.dumps(r) for r in resources))
    table = Table("x", path, "ndjson"); ctx = prepare([table]); made, told = {}, {}
    for frame in (f for block in read(table, Damage()) for f in events("x", block, ctx)):
        for row in frame.to_dicts(): (made if "code" in row else told).setdefault(row["line"], []).append(row if "code" in row else (row["rule"], row["action"]))
    return made, told, ctx

# a second reading of the standard, with the json module alone: how many events a resource should make
def expected(r):
    kind = r["resourceType"]
    if kind not in READ or r.get("status") in NOT_DONE: return 0
    if kind == "Observation": return sum(any(k.startswith("value") for k in v) for v in (r, *r.get("component", [])))
    if kind == "Patient": return ("gender" in r) + ("birthDate" in r) + ("deceasedDateTime" in r) + ("communication" in r) + any("us-core-race" in x["url"] for x in r.get("extension", []))
    if kind == "DiagnosticReport": return int("presentedForm" in r or "conclusion" in r)
    if kind == "Encounter": return 1 if r["class"]["code"] != "IMP" else 2 + ("end" in r["period"]) + 2 * any(h["class"].get("display") == "ICU" for h in r.get("classHistory", []))
    return 1

def values_in(resources):
    "(code, number) of every quantity and integer"
    for r in resources:
        if r["resourceType"] == "Observation" and r.get("status") not in NOT_DONE:
            for v in (r, *r.get("component", [])):
                n = v.get("valueQuantity", {}).get("value", v.get("valueInteger"))
                if n is not None: yield next(f"LOINC//{c['code']}" for c in v["code"]["coding"] if c["system"] == "http://loinc.org"), round(float(n), 3)

@pytest.fixture(scope="module")
def cohort(): return [json.loads(carebundle.to_json(b)) for b in carebundle.generate_cohort(count=12, seed=7, reference_date=date(2024, 1, 1))]

@pytest.fixture(scope="module")
def bundles(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for i, b in enumerate(cohort): (folder / f"{i}.json").write_text(json.dumps(b))
    return folder

def test_bundles_have_no_silent_loss(bundles, cohort, tmp_path):
    report, got = imported(bundles, tmp_path / "out")
    resources = [e["resource"] for b in cohort for e in b["entry"]]
    assert report.about["records"] == len(resources) and report.about["patients"] == 12
    assert len(got) + report.rejects.filter(pl.col("action") == "duplicate").height == sum(map(expected, resources))
    none = Counter(r["resourceType"] for r in resources if not expected(r))
    assert none == {"Practitioner": 12, "DiagnosticReport": report.rejects.filter(pl.col("rule").str.contains("report without text")).height} and report.rejects.filter(pl.col("action") == "not imported").height == none.total()
    converted = report.units.filter("converted")["code"].to_list()
    ours = got.filter(pl.col("kind").is_in(["lab", "vital"]) & ~pl.col("code").is_in(converted)).select("code", "numeric_value")
    assert {(c, round(n, 2)) for c, n in values_in(resources) if c not in converted} == {(c, round(n, 2)) for c, n in ours.iter_rows()}
    assert set(got.filter(pl.col("kind") == "diagnosis")["code"]) == {"ICD10CM//" + r["code"]["coding"][0]["code"] for r in resources if r["resourceType"] == "Condition"}

def test_bundles_and_bulk_export_agree(bundles, cohort, tmp_path):
    "The same patients in both shapes, one of them zipped: ids differ, what is said does not"
    folder = tmp_path / "bulk"; folder.mkdir()
    for name, text in carebundle.to_ndjson(carebundle.generate_cohort(count=12, seed=7, reference_date=date(2024, 1, 1))).items():
        (folder / f"{name}.ndjson.gz").write_bytes(gzip.compress(text.encode())) if name == "Observation" else (folder / f"{name}.ndjson").write_text(text)
    facts = ["time", "code", "numeric_value", "text_value", "unit", "kind", "known_time"]
    one, two = (imported(f, tmp_path / n)[1].select(facts).sort(facts, nulls_last=True) for f, n in ((bundles, "a"), (folder, "b")))
    assert len(one) > 400 and one.equals(two)

def test_injected_defects_are_counted(cohort, tmp_path):
    "Faults planted by the generator (fields gone, entries twice, words for numbers, local codes): each resource is accounted for"
    how = carebundle.Imperfection(missing_field=.2, duplicate_entry=.2, out_of_order_timestamp=.2, unparseable_value=.2, unknown_code_system=.2)
    folder, n, planted = tmp_path / "in", 0, Counter(); folder.mkdir()
    for i, b in enumerate(cohort):
        dirty, defects = carebundle.inject_defects(b, how, seed=i); n += len(dirty["entry"]); planted.update(d.kind for d in defects)
        (folder / f"{i}.json").write_text(json.dumps(dirty))
    report, got = imported(folder, tmp_path / "out")
    resources = [e["resource"] for p in folder.glob("*.json") for e in json.loads(p.read_text())["entry"]]
    assert planted.total() > 100 and report.about["records"] == n == len(resources)
    lost = report.rejects.filter(pl.col("action") == "duplicate").height
    assert len(got) + lost == sum(map(expected, resources)) and lost >= planted["duplicate_entry"] / 2
    words = [r["valueString"] for r in resources if "valueString" in r]
    assert planted["unparseable_value"] > 0 and set(words) == set(got.filter(pl.col("kind").is_in(["lab", "vital", "observation"]))["text_value"].drop_nulls())
    local = [r["code"]["coding"][0]["code"] for r in resources if r["resourceType"] == "Condition" and "114350" in r["code"]["coding"][0]["system"]]
    assert set(local) <= {c.split("//")[1] for c in got.filter(pl.col("code").str.starts_with("OID_1_2_840_114350"))["code"]}

@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    "A month of a small hospital by clinosim: 26 types of resources, stays, notes, drugs (about 8 seconds)"
    pytest.importorskip("clinosim", reason="pip install clinosim (hospital simulator used as an oracle)")
    folder = tmp_path_factory.mktemp("clinosim"); tool = Path(sys.executable).parent / "clinosim"
    run = subprocess.run([tool, "simulate", "-o", folder, "-p", "40", "-s", "3", "--start", "2024-01-01", "--end", "2024-01-31", "--format", "fhir-r4"], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr[-500:]
    return folder / "fhir_r4"

def test_every_resource_of_the_simulated_hospital_is_accounted_for(hospital, tmp_path):
    raw = {p.stem: [json.loads(l) for l in p.read_text().splitlines()] for p in hospital.glob("*.ndjson")}
    report, got = imported(hospital, tmp_path / "out")
    table = report.table.set_index("table")
    for kind, resources in raw.items():
        assert kind == resources[0]["resourceType"] and table.loc[kind.lower(), "records"] == len(resources), kind
        events_, none = sum(map(expected, resources)), sum(not expected(r) for r in resources)
        assert table.loc[kind.lower(), "events"] == events_ and table.loc[kind.lower(), "not imported"] == none and table.loc[kind.lower(), "dropped"] == 0, kind
    assert len(got) == sum(expected(r) for rs in raw.values() for r in rs) - table["duplicate"].sum()
    notes = got.filter(pl.col("kind") == "note")
    texts = {base64.b64decode(r["content"][0]["attachment"]["data"]).decode().strip() for r in raw["DocumentReference"]}
    assert texts <= set(notes["text_value"]) and not notes.filter(pl.col("text_value").str.contains("<div"))["code"].len()

def test_events_of_the_simulated_hospital_carry_the_right_stay(hospital, tmp_path):
    raw = [json.loads(l) for p in hospital.glob("*.ndjson") for l in p.read_text().splitlines()]
    stays = {r["id"] for r in raw if r["resourceType"] == "Encounter" and r["class"]["code"] == "IMP"}
    def visit(r): return (r.get("encounter") or r.get("context") or {}).get("reference", "") if not isinstance(r.get("context", {}).get("encounter"), list) else r["context"]["encounter"][0]["reference"]
    theirs = Counter(visit(r).removeprefix("Encounter/") for r in raw if r["resourceType"] in READ - {"Observation"} for _ in range(expected(r)) if visit(r).removeprefix("Encounter/") in stays)
    theirs.update(r["id"] for r in raw if r["resourceType"] == "Encounter" and r["id"] in stays for _ in range(expected(r)))
    theirs.update(visit(r).removeprefix("Encounter/") for r in raw if r["resourceType"] == "Observation" and visit(r).removeprefix("Encounter/") in stays for _ in range(expected(r)))
    report, got = imported(hospital, tmp_path / "out")
    lost = report.rejects.filter(pl.col("action") == "duplicate").height
    ours = dict(got.filter(pl.col("hadm_id").is_not_null()).group_by("hadm_id").len().iter_rows())
    assert set(ours) == {_key(s) for s in stays} and 0 <= theirs.total() - sum(ours.values()) <= lost

# hand-written
WHO = {"reference": "Patient/p"}
def observation(**kw): return dict(resourceType="Observation", status="final", code={"coding": [{"system": "http://loinc.org", "code": "2160-0"}]}, subject=WHO, effectiveDateTime="2024-01-01T08:00:00Z") | kw
PATIENT = dict(resourceType="Patient", id="p", gender="female")

@pytest.mark.parametrize("value, number, text, unit", [
    (dict(valueQuantity={"value": 1.5, "unit": "mg/dl", "code": "mg/dL", "system": "http://unitsofmeasure.org"}), 1.5, None, "mg/dL"), (dict(valueQuantity={"value": 100, "comparator": ">", "unit": "mg/dL"}), None, ">100", "mg/dL"),
    (dict(valueCodeableConcept={"coding": [{"system": "http://snomed.info/sct", "code": "260385009", "display": "Negative"}]}), None, "Negative", None), (dict(valueCodeableConcept={"text": "seen"}), None, "seen", None),
    (dict(valueString="cloudy"), None, "cloudy", None), (dict(valueBoolean=True), 1.0, "true", None), (dict(valueInteger=7), 7.0, None, None), (dict(valueRange={"low": {"value": 3}, "high": {"value": 5}}), None, "3-5", None),
    (dict(valueRatio={"numerator": {"value": 1}, "denominator": {"value": 128}}), None, "1:128", None), (dict(valueTime="10:30:00"), None, "10:30:00", None), (dict(valueDateTime="2024-01-02"), None, "2024-01-02", None),
    (dict(valuePeriod={"start": "2024-01-01", "end": "2024-01-02"}), None, "2024-01-01/2024-01-02", None)])
def test_each_type_of_value(value, number, text, unit, tmp_path):
    made, told, _ = parsed([PATIENT, observation(**value)], tmp_path)
    (row,) = made[2]
    assert (row["numeric_value"], row["text_value"], row["unit"], row["code"]) == (number, text, unit, "LOINC//2160-0")

@pytest.mark.parametrize("resource, rule", [
    (observation(valueSampledData={"origin": {"value": 0}, "period": 10, "dimensions": 1, "data": "1 2 3"}), "not imported: waveform (SampledData)"), (observation(dataAbsentReason={"text": "unknown"}), "not imported: no value (absent on purpose)"),
    (observation(hasMember=[{"reference": "Observation/2"}]), "not imported: no value (panel)"), (observation(subject={"reference": "Group/p"}, valueInteger=1), "not imported: about a Group"),
    (observation(code={"text": ""}, valueInteger=1), "no code"), (observation(effectiveDateTime="last Tuesday", valueInteger=1), "time cannot be read"), (observation(status="entered-in-error", valueInteger=1), "not imported: entered-in-error"),
    (observation(valueQuantity="1.5 mg/dL"), "field of the wrong data type in Observation"), (observation(valueQuantity={"value": "1.5"}), "field of the wrong data type in Observation"), (observation(component=[{"code": "x", "valueInteger": 1}]), "field of the wrong data type in Observation"),
    (dict(resourceType="Condition", subject=WHO, verificationStatus={"coding": [{"code": "refuted"}]}, code={"text": "x"}), "not imported: refuted"), (dict(resourceType="MedicationRequest", subject=WHO, medicationReference={"reference": "Medication/none"}), "medication is not in the export"),
    (dict(resourceType="MedicationRequest", status="active", intent="proposal", subject=WHO, medicationCodeableConcept={"text": "x"}), "not imported: proposal"), (dict(resourceType="Immunization", status="not-done", patient=WHO, vaccineCode={"text": "x"}), "not imported: not-done"),
    (dict(resourceType="DocumentReference", status="superseded", subject=WHO, content=[]), "not imported: superseded"), (dict(resourceType="DocumentReference", status="current", subject=WHO, content=[{"attachment": {"url": "Binary/none"}}]), "not imported: attachment is not in the export"),
    (dict(resourceType="DocumentReference", status="current", subject=WHO, content=[{"attachment": {"contentType": "application/pdf", "data": "JVBERg=="}}]), "not imported: attachment is application/pdf"), (dict(resourceType="ServiceRequest"), "not imported: ServiceRequest"),
    (dict(resourceType="Zebra"), "unknown resource type"), (dict(name="no type"), "not a FHIR resource: no resourceType"), (["Patient"], "not a FHIR resource: no resourceType"), (dict(resourceType=7), "not a FHIR resource: no resourceType")])
def test_each_reason_has_its_rule_and_line(resource, rule, tmp_path):
    made, told, _ = parsed([PATIENT, resource], tmp_path)
    assert rule in [r for r, _ in told[2]] and 2 not in made

def test_medications_are_found_wherever_they_stand(tmp_path):
    drug = {"coding": [{"system": "http://www.nlm.nih.gov/research/umls/rxnorm", "code": "4603", "display": "furosemide"}]}
    order = lambda ref, **kw: dict(resourceType="MedicationAdministration", status="completed", subject=WHO, effectivePeriod={"start": "2024-01-01"}, medicationReference={"reference": ref}, dosage={"dose": {"value": 20, "unit": "mg"}}) | kw
    made, told, _ = parsed([PATIENT, dict(resourceType="Medication", id="a", code=drug), order("Medication/a"), order("#b", contained=[dict(resourceType="Medication", id="b", code=drug)]), order("https://h.org/r4/Medication/a/_history/3"),
                            dict(resourceType="Medication", id="c", ingredient=[{"itemCodeableConcept": drug}]), order("Medication/c")], tmp_path)
    assert [(r["code"], r["numeric_value"], r["unit"], r["text_value"], r["kind"]) for n in (3, 4, 5, 7) for r in made[n]] == [("RXNORM//4603", 20, "mg", "given", "medication")] * 4 and set(told) == {2, 6}

def test_a_merged_record_is_the_other_patient(tmp_path):
    made, told, ctx = parsed([PATIENT, dict(resourceType="Patient", id="old", gender="female", link=[{"type": "replaced-by", "other": WHO}]), observation(subject={"reference": "Patient/old"}, valueInteger=1)], tmp_path)
    assert made[3][0]["subject_id"] == _key("p") and ctx["subjects"].to_list() == [_key("p")] and told[2] == [("not imported: record was merged into another patient's", "not imported")]

def test_a_damaged_patient_keeps_the_events_of_others_about_her(tmp_path):
    made, told, ctx = parsed([dict(PATIENT, communication="Spanish"), observation(valueInteger=1)], tmp_path)
    assert told[1] == [("field of the wrong data type in Patient", "dropped")] and made[2][0]["subject_id"] == _key("p") and ctx["subjects"].to_list() == [_key("p")]

def test_a_stay_in_another_encoding_is_still_a_stay(tmp_path):
    stay = dict(resourceType="Encounter", id="e", status="finished", subject=WHO, type=[{"text": "Séjour"}], period={"start": "2024-01-01T00:00:00Z"}, **{"class": {"code": "IMP"}})
    lines = [json.dumps(r, ensure_ascii=False).encode("cp1252") for r in (PATIENT, stay, observation(encounter={"reference": "Encounter/e"}, valueString="fièvre"))]
    (tmp_path / "a.ndjson").write_bytes(b"\n".join(lines)); (tmp_path / "p.ndjson").write_text(json.dumps(dict(PATIENT, birthDate="1950-01-01")))
    report, got = imported(tmp_path, tmp_path / "out")
    assert set(got.filter(pl.col("hadm_id") == _key("e"))["code"]) == {"HOSPITAL_ADMISSION//UNKNOWN", "LOINC//2160-0"} and "fièvre" in got["text_value"].to_list()
    assert report.rejects.filter(pl.col("rule").str.contains("Windows-1252"))["action"].to_list() == ["kept"] * 2

def test_two_people_under_one_id_are_noticed(tmp_path):
    made, told, _ = parsed([dict(PATIENT, birthDate="1950-01-01"), dict(PATIENT, birthDate="1980-01-01")], tmp_path)
    assert [told[n][0][0] for n in (1, 2)] == ["another Patient has this id, and another birth date or sex"] * 2

def test_a_diagnosis_without_a_date_of_record_is_known_at_discharge(tmp_path):
    stay = dict(resourceType="Encounter", id="e", status="finished", subject=WHO, period={"start": "2024-01-01T00:00:00Z", "end": "2024-01-09T10:00:00Z"}, **{"class": {"code": "IMP"}})
    condition = dict(resourceType="Condition", subject=WHO, encounter={"reference": "Encounter/e"}, code={"coding": [{"system": "http://hl7.org/fhir/sid/icd-10-cm", "code": "I50.9"}]}, onsetDateTime="2024-01-01")
    made, _, _ = parsed([PATIENT, stay, condition, dict(condition, recordedDate="2024-01-03"), {k: v for k, v in condition.items() if k != "onsetDateTime"}], tmp_path)
    assert [(made[n][0]["time"].day, made[n][0]["known_time"].day, made[n][0]["hadm_id"]) for n in (3, 4, 5)] == [(1, 9, _key("e")), (1, 3, _key("e")), (9, 9, _key("e"))]

def test_typed_text_stays_out_of_codes(tmp_path):
    made, _, _ = parsed([PATIENT, observation(code={"text": "Gait"}, valueString="slow"), observation(code={"text": "call Mrs Zebulon 555-1234 about MRN 99887766"}, valueString="yes")], tmp_path)
    assert made[2][0]["code"] == "FHIR_TEXT//gait" and made[3][0]["code"] == "FHIR_TEXT//free_text" and made[3][0]["name"] is None and "Zebulon" in made[3][0]["text_value"]

@pytest.mark.parametrize("content, rule", [
    ('{"resourceType":"Bundle","type":"collection","entry":[{"resource":{"resourceType":"Pa', "JSON is damaged or cut off: nothing of the file was read"), ('{"resourceType":"Bundle","type":5,"entry":[]}', "Bundle of a wrong shape: nothing of it was read"),
    ('{"resourceType":"Bundle","type":"collection","entry":{"a":1}}', "Bundle of a wrong shape: nothing of it was read"), ('{"resourceType":"Bundle","type":"history","entry":[{}]}', "not imported: Bundle of older versions (history)"),
    ('{"resourceType":"Bundle","type":"parcel","entry":[]}', "Bundle of an unknown type: its entries were read"), ('{"a":1}', "not a FHIR resource: no resourceType"), ('{"resourceType":"Bundle","type":"batch-response","entry":[{"response":{}}]}', "entry without a resource"),
    ('{"resourceType":"Bundle","type":"collection","entry":[7]}', "not a FHIR resource: no resourceType")])
def test_faults_of_a_bundle(content, rule, tmp_path):
    folder = tmp_path / "in"; folder.mkdir(); (folder / "a.json").write_text(content); (folder / "p.ndjson").write_text(json.dumps(dict(PATIENT, birthDate="1950-01-01")))
    report, got = imported(folder, tmp_path / "out", tolerance=1)
    assert rule in set(report.rejects["rule"]) and len(got) == 2

SECRET = "ZEBULON"
def mutated(resource, rng):
    "The same resource with one place of it spoiled"
    r = copy.deepcopy(resource); node, path = r, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        k = rng.choice(keys); child = node[k]
        if isinstance(child, (dict, list)) and child and rng.random() < .75: node = child; continue
        if k == "resourceType" and rng.random() < .9: return r
        spoiled = rng.choice([None, 5, -1e300, True, SECRET, [], {}, [SECRET], {"a": SECRET}, "2024-13-45T99:00:00Z", "\ud83e\udd93", "", "0001-01-01", [[[]]]])
        node[k] = spoiled; return r

def test_spoiled_resources_never_crash_and_are_never_silent(cohort, tmp_path):
    rng = random.Random(5); resources = [e["resource"] for b in cohort for e in b["entry"]]
    lines = [json.dumps(mutated(rng.choice(resources), rng)).encode() for _ in range(4000)] + [json.dumps(r).encode()[:rng.randrange(2, 400)] for r in rng.choices(resources, k=300)]
    lines += [l.replace(b"a", bytes([rng.randrange(128, 256)]), 3) for l in lines[:200]]
    path = tmp_path / "x.ndjson"; path.write_bytes(b"\n".join(lines)); table = Table("x", path, "ndjson"); ctx = prepare([table]); seen, rules = set(), set()
    for block in read(table, Damage()):
        for frame in events("x", block, ctx): seen |= set(frame["line"]); rules |= set(frame["rule"].drop_nulls())
    silent = [json.loads(lines[n - 1]) for n in range(1, len(lines) + 1) if n not in seen]
    assert all(r["resourceType"] == "Patient" for r in silent)        # a patient of whom nothing is said
    assert not any(SECRET.lower() in r.lower() for r in rules) and len(rules) < 25
