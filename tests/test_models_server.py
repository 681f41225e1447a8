"""A server may be busy, slow, wrong or hostile: retried, missing, or refused; never silent, and never with a prompt in a log."""
import http.server, json, logging, math, threading, time
import numpy as np, pytest
from clinllm.core.errors import ModelError, NetworkError
from clinllm.core.network import guard
from clinllm.models.language_model import LanguageModel, choice_probability
from clinllm.models.server import ServerModel

SECRET = "Mr Abcdef lives alone"


@pytest.fixture
def practice():
    "A server whose `reply(path, body)` gives (status, headers, bytes, seconds to wait)"
    class Handler(http.server.BaseHTTPRequestHandler):
        reply, asked = None, []
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"]))); Handler.asked.append((self.path, body, dict(self.headers)))
            status, headers, data, wait = Handler.reply(len(Handler.asked), body); time.sleep(wait)
            try:
                self.send_response(status)
                for k, v in {**headers, "Content-Length": str(len(data))}.items(): self.send_header(k, v)
                self.end_headers(); self.wfile.write(data)
            except OSError: pass
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler); threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.asked = []; Handler.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield Handler
    server.shutdown(); server.server_close()


def js(x): return json.dumps(x).encode()
def text(t): return js({"choices": [{"text": t, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}})
def model(practice, **kw): return ServerModel(practice.url, "m", **{**dict(timeout=2, retries=2, pause=0.01), **kw})


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_passing_trouble_is_tried_again(practice, status):
    practice.reply = lambda k, b: (status, {}, b"", 0) if k < 3 else (200, {}, text("yes"), 0)
    assert model(practice).generate(["?"])[0].text == "yes" and len(practice.asked) == 3


def test_trouble_that_stays_is_an_error_and_missing(practice):
    practice.reply = lambda k, b: (500, {}, b"", 0)
    assert model(practice).generate(["?"])[0].status == "error" and len(practice.asked) == 3
    assert np.isnan(model(practice).score(["?"], ["yes", "no"])).all()


def test_time_out(practice):
    practice.reply = lambda k, b: (200, {}, text("late"), 0.6) if k == 1 else (200, {}, text("yes"), 0)
    assert model(practice, timeout=0.2).generate(["?"])[0].text == "yes"


def test_the_servers_own_pause_is_kept(practice):
    practice.reply = lambda k, b: (429, {"Retry-After": "0.4"}, b"", 0) if k == 1 else (200, {}, text("yes"), 0)
    start = time.perf_counter(); model(practice).generate(["?"]); assert time.perf_counter() - start >= 0.4
    practice.asked.clear(); practice.reply = lambda k, b: (429, {"Retry-After": "soon"}, b"", 0) if k == 1 else (200, {}, text("yes"), 0)
    assert model(practice).generate(["?"])[0].text == "yes"


@pytest.mark.parametrize("data", [b"<html>", b"[]", b'{"choices": 3}', b'{"choices": [{}]}', b'{"choices": [{"message": null}]}', b"", b'{"choices": [{"text": 5}]}'])
def test_nonsense_is_an_error_not_a_crash(practice, data):
    practice.reply = lambda k, b: (200, {}, data, 0); it = model(practice, retries=0)
    assert it.generate(["?"])[0].status == "error"
    assert np.isnan(it.score(["?"], ["yes", "no"])).all() and np.isnan(it.score([it.chat("s", "u")], ["yes", "no"])).all()
    assert np.isnan(model(practice, retries=0, scoring="echo").score(["?"], ["yes", "no"])).all()
    with pytest.raises(ModelError, match="no embeddings"): it.embed(["?"])


@pytest.mark.parametrize("status", [302, 307, 401, 403, 404])
def test_wrong_address_key_or_redirect_stops(practice, status):
    practice.reply = lambda k, b: (status, {"Location": "http://elsewhere.example/"}, b"", 0)
    with pytest.raises(ModelError, match=f"status {status}"): model(practice).generate(["?"])
    assert len(practice.asked) == 1


def test_rows_stay_in_order(practice):
    practice.reply = lambda k, b: (200, {}, text((b.get("prompt") or b["messages"][-1]["content"])[-1]), 0.02 * (k % 3))
    it = model(practice, parallel=6); prompts = [it.chat("s", f"row {i}") if i % 2 else f"row {i}" for i in range(10)]
    assert [g.text for g in it.generate(prompts)] == list("0123456789")


def test_half_of_the_choices(practice):
    "A choice outside the twenty most probable is missing, and with it the row's probability; the next row is not touched"
    tops = [{" yes": math.log(.5), " maybe": math.log(.2)}, {" yes": math.log(.6), " no": math.log(.2)}]
    practice.reply = lambda k, b: (200, {}, js({"choices": [{"logprobs": {"top_logprobs": [tops[int(b["prompt"])]]}}]}), 0)
    got = model(practice).score(["0", "1"], [" yes", " no"])
    assert np.isnan(got[0, 1]) and not np.isnan(got[0, 0])
    np.testing.assert_allclose(choice_probability(got), [np.nan, .75])


def test_token_across_the_border_is_missing(practice):
    practice.reply = lambda k, b: (200, {}, js({"choices": [{"logprobs": {"text_offset": [0, 5], "token_logprobs": [None, -1.0]}}]}), 0)
    assert np.isnan(model(practice, scoring="echo").score(["Answer:"], [" yes", " no"])).all()


def test_no_prompt_in_logs_or_errors(practice, caplog):
    caplog.set_level(logging.DEBUG)
    practice.reply = lambda k, b: (404, {}, js({"error": f"no such model for {SECRET}"}), 0)
    with pytest.raises(ModelError) as e: model(practice).generate([SECRET])
    practice.reply = lambda k, b: (400, {}, js({"error": SECRET}), 0); got = model(practice).generate([SECRET])
    assert got[0].status == "error" and SECRET not in caplog.text and SECRET not in str(e.value)


def test_hosts(practice):
    with pytest.raises(NetworkError, match="llm.example"): ServerModel("https://llm.example/v1", "m", allow=["other.example"])
    it = ServerModel("https://llm.example/v1", "m", allow=["llm.example"], retries=5, pause=1)
    with guard(), pytest.raises(NetworkError, match="llm.example"): it.generate(["?"])       # at once: a refused host is not tried again
    practice.reply = lambda k, b: (200, {}, text("yes"), 0)
    with guard(): assert model(practice).generate(["?"])[0].text == "yes"


def test_key_and_proxy(practice, monkeypatch):
    "A key is sent as a header; a proxy of the environment is not used for this machine"
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"): monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("CLINLLM_API_KEY", "k1"); practice.reply = lambda k, b: (200, {}, text("yes"), 0)
    assert model(practice).generate(["?"])[0].text == "yes" and practice.asked[0][2]["Authorization"] == "Bearer k1"


def test_contract(practice):
    it = model(practice)
    assert isinstance(it, LanguageModel) and it.generate([]) == [] and it.score([], ["a", "b"]).shape == (0, 2) and it.count_tokens("abcd") == 2 and "m" in repr(it)
