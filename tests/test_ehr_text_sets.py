"Text sets: fetched whole or not at all, from allowed hosts only, and read as their papers describe them"
import hashlib, http.server, threading
import pytest
from clinllm.core.errors import DataError, NetworkError
from clinllm.ehr import text_sets as T

PIECES = {"data/a.txt": b"alpha", "data/b.txt": b"beta", "base/predictions/c.txt": b"gamma"}

@pytest.fixture
def words(monkeypatch):
    monkeypatch.delenv("CLINLLM_DATA", raising=False)
    monkeypatch.setitem(T.TEXT_SETS, "words", T.TextSet("three words", "someone/words", "0" * 40, "none", "nobody", {p: hashlib.sha256(c).hexdigest() for p, c in PIECES.items()}))

@pytest.fixture
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        content, asked, moved = dict(PIECES), [], ""
        def do_GET(self):
            path = self.path.split("/", 4)[4]; self.asked.append(path)
            if self.moved: self.send_response(302); self.send_header("Location", self.moved); self.end_headers(); return
            body = self.content.get(path); self.send_response(200 if body is not None else 404); self.send_header("Content-Length", str(len(body or b"") + (5 if path in self.cut else 0)))
            self.end_headers(); self.wfile.write(body or b"")
        cut = ()
        def log_message(self, *_): pass
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler); threading.Thread(target=s.serve_forever, daemon=True).start()
    Handler.url = f"http://127.0.0.1:{s.server_address[1]}"; yield Handler; s.shutdown(); s.server_close()

def test_a_host_that_is_not_allowed_is_refused(words, tmp_path):
    with pytest.raises(NetworkError, match="allow = raw.githubusercontent.com"): T.fetch_text_set("words", tmp_path)
    with pytest.raises(NetworkError, match="example.org"): T.fetch_text_set("words", tmp_path, allow=["raw.githubusercontent.com"], base_url="https://example.org")
    assert not list(tmp_path.rglob("*.txt"))

def test_fetched_whole_and_found(words, server, tmp_path):
    folder = T.fetch_text_set("words", tmp_path, base_url=server.url)
    assert {p.name: p.read_bytes() for p in folder.rglob("*.txt")} == {"a.txt": b"alpha", "b.txt": b"beta", "c.txt": b"gamma"} and (folder / "predictions" / "c.txt").is_file()
    assert T.find_text_set("words", tmp_path) == folder and not list((tmp_path / "text-sets").glob(".partial*"))

@pytest.mark.parametrize("fault", ["damaged", "missing", "cut off"])
def test_a_fault_leaves_nothing_in_place_and_the_next_try_goes_on(words, server, tmp_path, fault, monkeypatch):
    monkeypatch.setattr(T.time, "sleep", lambda s: None)
    if fault == "damaged": server.content["data/b.txt"] = b"bet"
    elif fault == "missing": del server.content["data/b.txt"]
    else: server.cut = ("data/b.txt",)
    with pytest.raises(DataError, match={"damaged": "sha256", "missing": "status 404", "cut off": "cannot be reached"}[fault]): T.fetch_text_set("words", tmp_path, base_url=server.url)
    with pytest.raises(DataError, match="clinllm data get words"): T.find_text_set("words", tmp_path)
    server.content["data/b.txt"], server.cut = b"beta", (); server.asked.clear()
    T.fetch_text_set("words", tmp_path, base_url=server.url); assert server.asked == ["data/b.txt", "base/predictions/c.txt"]

def test_a_redirect_is_not_followed(words, server, tmp_path):
    server.moved = "http://example.org/elsewhere"
    with pytest.raises(DataError, match="status 302"): T.fetch_text_set("words", tmp_path, base_url=server.url)

@pytest.mark.parametrize("layout", ["ours", "repository"])
def test_copied_from_a_folder(words, tmp_path, layout):
    for path, content in PIECES.items():
        f = tmp_path / "from" / (T.stored_as(path) if layout == "ours" else path); f.parent.mkdir(parents=True, exist_ok=True); f.write_bytes(content)
    folder = T.fetch_text_set("words", tmp_path / "cache", from_folder=tmp_path / "from"); assert not T.faults("words", folder)
    (folder / "b.txt").write_bytes(b"altered"); assert T.faults("words", folder) == {"b.txt": "changed"}
    with pytest.raises(DataError, match="b.txt changed"): T.find_text_set("words", tmp_path / "cache")
    assert T.fetch_text_set("words", tmp_path / "cache", from_folder=tmp_path / "from") == folder and not T.faults("words", folder)

def test_a_copy_that_lacks_a_file_is_refused(words, tmp_path):
    (tmp_path / "from").mkdir()
    with pytest.raises(DataError, match="holds neither a.txt"): T.fetch_text_set("words", tmp_path / "cache", from_folder=tmp_path / "from")
    with pytest.raises(DataError, match="no folder"): T.fetch_text_set("words", tmp_path / "cache", from_folder=tmp_path / "none")

def test_unknown_names_are_told(tmp_path):
    with pytest.raises(DataError, match="pubmedqa"): T.find_text_set("pubmed_qa", tmp_path)

def test_every_file_is_pinned():
    for s in T.TEXT_SETS.values():
        assert len(s.commit) == 40 and len({T.stored_as(p) for p in s.files}) == len(s.files) and all(len(h) == 64 and set(h) <= set("0123456789abcdef") for h in s.files.values())

def test_the_sets_are_read_as_described(shared_data, tmp_path):
    aci = T.find_text_set("aci-bench", tmp_path, places=[shared_data]); visits = T.read_aci_bench(aci, "all")
    assert visits.groupby("split").size().to_dict() == dict(train=67, valid=20, test1=40, test2=40, test3=40) and visits[["dialogue", "note"]].notna().all().all()       # Yim et al. 2023, table 2
    outputs = T.read_aci_outputs(aci); assert set(outputs["encounter_id"]) == set(T.read_aci_bench(aci)["encounter_id"]) and outputs["model"].nunique() == 15
    mts = T.find_text_set("mts-dialog", tmp_path, places=[shared_data])
    assert T.read_mts_dialog(mts, "all").groupby("split").size().to_dict() == dict(train=1201, valid=100, test1=200, test2=200)                                          # the repository's README
    q = T.read_pubmedqa(T.find_text_set("pubmedqa", tmp_path, places=[shared_data]), "all")
    assert len(q) == 1000 and set(q["answer"]) == {"yes", "no", "maybe"} and (q["split"] == "test").sum() == 500
    with pytest.raises(DataError, match="test3"): T.read_aci_bench(aci, "test")
