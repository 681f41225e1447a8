import os
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")

@pytest.fixture(scope="session")
def root(): return ROOT

@pytest.fixture(scope="session")
def shared_data():
    "Folder with copies of open data; tests that need it skip with a reason where it is absent"
    folder = Path(os.environ.get("CLINLLM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir(): pytest.skip("open test data not found: set CLINLLM_DATA to its folder")
    return folder
