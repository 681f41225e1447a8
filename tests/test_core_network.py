"""The guard refuses before anything is sent, for every way out that Python audits, and lets go when told to."""
import os, socket, subprocess, sys, textwrap
import _socket, httpx, pytest
from clinllm.core.errors import NetworkError
from clinllm.core import network
from clinllm.core.network import check_host, guard, install_guard


def test_refused_before_any_lookup(monkeypatch):
    "No DNS question is asked for a host that is not allowed"
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", network._learning(lambda host, *a, **k: asked.append(host) or []))
    with guard():
        with pytest.raises(NetworkError, match="example.org"): socket.create_connection(("example.org", 80), timeout=1)
        with pytest.raises(NetworkError, match="example.org"): httpx.get("https://example.org/?name=secret", trust_env=False)
    assert asked == []


def test_the_c_module_is_watched_too():
    with guard():
        with pytest.raises(NetworkError, match="example.org"): _socket.getaddrinfo("example.org", 80)
        with pytest.raises(NetworkError, match="example.org"): _socket.gethostbyname("example.org")
        s = _socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with pytest.raises(NetworkError, match="192.0.2.9"): s.connect_ex(("192.0.2.9", 80))
        s.close()


@pytest.mark.parametrize("call", [lambda s: s.connect(("example.org", 80)), lambda s: s.connect_ex(("example.org", 80)), lambda s: s.sendto(b"x", ("example.org", 53)), lambda s: s.sendto(b"x", 0, ("example.org", 53))])
def test_a_socket_given_a_name_does_not_resolve_it(call):
    "A socket resolves names in C before it is audited; a lookup would fail here as a gaierror, and elsewhere tell somebody the name"
    with guard(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s, pytest.raises(NetworkError, match="example.org"): call(s)


def test_addresses_of_allowed_names_are_learned(monkeypatch):
    "A connection is made to an address; it is allowed where an allowed name was resolved to it, and only there"
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.5", 443))]
    monkeypatch.setattr(socket, "getaddrinfo", network._learning(lambda host, *a, **k: found))
    with guard(["llm.ward.example"]):
        with pytest.raises(NetworkError): network._check("192.0.2.5")
        socket.getaddrinfo("llm.ward.example", 443)
        network._check("192.0.2.5")
        with pytest.raises(NetworkError): network._check("192.0.2.6")
    with guard(["llm.ward.example"]), pytest.raises(NetworkError): network._check("192.0.2.5")     # forgotten afterwards


def test_off_outside_and_after_an_error():
    before = network._Guard.allow
    with pytest.raises(RuntimeError), guard(): raise RuntimeError
    assert network._Guard.allow == before
    with guard(["a.example"]):
        with guard(["b.example"]): assert network._Guard.allow == ["b.example"]
        assert network._Guard.allow == ["a.example"]


def test_message_says_how_to_allow():
    with pytest.raises(NetworkError, match=r"settings\.ini.*allow = a\.example, b\.example"): check_host("b.example", ["a.example"])


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no unix sockets here")
def test_unix_sockets_pass(tmp_path):
    server = socket.socket(socket.AF_UNIX); server.bind(str(tmp_path / "s")); server.listen()
    with guard(), socket.socket(socket.AF_UNIX) as s: s.connect(str(tmp_path / "s"))
    server.close()


def test_installed_for_good(tmp_path):
    "In a process of its own: hosts come from settings.ini, variables are set, loopback works"
    (tmp_path / "settings.ini").write_text("[network]\nallow = llm.ward.example\n")
    code = """
        import os, socket, urllib.request
        from clinllm.core.network import install_guard
        from clinllm.core.errors import NetworkError
        assert install_guard() == ["llm.ward.example"]
        assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == os.environ["DO_NOT_TRACK"] == "1"
        server = socket.create_server(("127.0.0.1", 0)); socket.create_connection(server.getsockname(), timeout=5).close()
        try: urllib.request.urlopen("http://example.org")
        except NetworkError as e: print(e)
    """
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | dict(CLINLLM_ROOT=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "'example.org'" in done.stdout and "allow = llm.ward.example, example.org" in done.stdout


def test_allowing_the_hub_leaves_it_online(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    network.set_offline(["huggingface.co"])
    assert "HF_HUB_OFFLINE" not in os.environ and os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
