"The site: pages from notebooks, nothing loaded from another host, no link that leads nowhere, the old site kept."
import json
import subprocess
import sys

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from clinllm.core.settings import load_settings, project_root
from clinllm.core.tables import Estimate, claim
from clinllm.governance.ledger import write_run
from clinllm.run.site import SiteError, add_runs, build_site, draw_formulas, foreign, formula, front_matter, mend_links, page, serve_site, symbols

EVIDENCE = claim("clinical accuracy", "auroc", "lora", Estimate(.74, .69, .79, 400), cell="Discrimination")
EXECUTED = new_notebook(cells=[new_markdown_cell("# Fine-tuning\n\n> Does it help?\n\n- needs: notes"), new_code_cell("epochs: int = 1  # passes", metadata={"tags": ["parameters"]}),
                               new_markdown_cell("## Discrimination"), new_code_cell("#| hide\nsecret = 1")])


@pytest.fixture
def project(tmp_path):
    nbs = tmp_path / "nbs"; (nbs / "core").mkdir(parents=True); (tmp_path / "settings.ini").write_text("[site]\ntitle = Small\n")
    lesson = new_notebook(cells=[new_markdown_cell("# Rates\n\n> How often.\n\nWhy $a < b$ matters."), new_code_cell("#| default_exp core.rates"), new_code_cell("#| export\ndef make_rate(n: int,  # events\n    ) -> float:\n    'A rate'\n    return n / 2")])
    nbformat.write(lesson, nbs / "core" / "rates.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Home\n\n> A test.\n\nSee `make_rate`.")]), nbs / "index.ipynb")
    (nbs / "_quarto.yml").write_text("project: {type: website}\nwebsite:\n  sidebar:\n    contents: [index.ipynb, credits.md]\nformat: {html: {theme: {light: cosmo, dark: darkly}}}\n")
    (nbs / "credits.md").write_text("---\ntitle: Credits\n---\n\nODbL\n")
    return load_settings(tmp_path / "settings.ini")


def landed(project, run_id, evidence=EVIDENCE, **fields):
    folder = write_run(project.reports, "fine_tuning", run_id, evidence, **fields); nbformat.write(EXECUTED, folder / "notebook.ipynb"); return folder


def test_a_site_without_runs_is_whole_and_loads_nothing_from_elsewhere(project):
    site = build_site(project, quiet=True)
    assert foreign(site) == [] and mend_links(site) == ([], 0) and "make run" in (site / "runs/index.html").read_text()
    rates = (site / "core/rates.html").read_text()
    assert 'class="formula"' in rates and "katex" not in rates and 'id="make_rate"' in rates and "events" in rates
    assert 'href="core/rates.html#make_rate"' in (site / "index.html").read_text()
    css = "".join(f.read_text() for f in site.rglob("*.css")); assert "googleapis" not in css and "--bs-body-font-family" in css
    assert "Small" in (site / "index.html").read_text() and (site / "search.json").exists()


def test_a_broken_page_stops_the_build_and_leaves_the_old_site(project):
    site = build_site(project, quiet=True); before = (site / "index.html").read_text()
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Home"), new_code_cell("1 / 0")]), project.root / "nbs" / "index.ipynb")
    with pytest.raises(SiteError, match="index.ipynb failed.*ZeroDivisionError"): build_site(project, quiet=True)
    assert (site / "index.html").read_text() == before and not list(project.reports.glob(".site-*"))


def test_an_image_from_another_host_is_refused(project):
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Home\n\n![x](https://example.org/x.png)")]), project.root / "nbs" / "index.ipynb")
    with pytest.raises(SiteError, match="another host.*example.org"): build_site(project, quiet=True)


def test_runs_newest_has_a_page_older_is_listed_failed_is_shown(project, tmp_path):
    landed(project, "old", finished="2026-01-01T00:00:00+00:00"); landed(project, "new", finished="2026-01-02T00:00:00+00:00", params={"epochs": 3, "data": "synthetic"})
    landed(project, "bad", None, error="out of memory", finished="2026-01-03T00:00:00+00:00"); landed(project, "worse", None, error="older", finished="2025-01-03T00:00:00+00:00")
    stage = tmp_path / "stage"; stage.mkdir()
    assert [p["text"] for p in add_runs(project, stage)] == ["All runs", "Fine-tuning on synthetic, epochs=3", "Fine-tuning on synthetic (failed)"]
    made = (stage / "runs/fine_tuning/new.ipynb").read_text()
    assert "secret" not in made and "needs: notes" not in made and "Synthetic patients" in made and (stage / "runs/fine_tuning/new/manifest.json").exists()
    listed = (stage / "runs/index.md").read_text()
    assert all(r in listed for r in ("old", "new", "bad", "worse")) and 'href="fine_tuning/new.html"' in listed and 'href="fine_tuning/old.html"' not in listed


def test_a_run_whose_notebook_is_damaged_does_not_stop_the_site(project, tmp_path):
    (landed(project, "torn") / "notebook.ipynb").write_text("{"); stage = tmp_path / "stage"; stage.mkdir()
    assert [p["text"] for p in add_runs(project, stage)] == ["All runs"] and "cannot be read" in (stage / "runs/index.md").read_text()


def test_text_of_a_run_cannot_become_script(project):
    landed(project, "x", None, error="<script>alert(1)</script>")
    site = build_site(project, quiet=True)
    assert not any("<script>alert" in f.read_text() for f in site.rglob("*.html"))


def test_title_cell_keeps_its_paragraph_and_loses_its_keys():
    title, subtitle, keys, rest = front_matter("# A title\n\n> Sub.\n\nWhy.\n\n- a list item\n- needs: notes")
    assert (title, subtitle, keys) == ("A title", "Sub.", {"needs": "notes"}) and "Why." in rest and "- a list item" in rest and "needs" not in rest


def test_a_papermill_banner_does_not_hide_the_title():
    banner = new_markdown_cell("<span>An exception</span>", metadata={"tags": ["papermill-error-cell-tag"]})
    made = page(new_notebook(cells=[banner, *EXECUTED.cells]))
    assert "title: Fine-tuning" in made["cells"][0]["source"]


def test_formula_that_cannot_be_drawn_stays_readable():
    assert formula(r"\frac{a}{b}").startswith("<svg") and formula(r"\nonsense{x}") == r"<code>\nonsense{x}</code>"
    assert draw_formulas("no maths, costs $5 and $6") == "no maths, costs $5 and $6"


def test_serving_without_a_site_says_what_to_do(project):
    with pytest.raises(SiteError, match="clinllm site"): serve_site(project, 0)


def test_notebook_names_and_config_of_this_project():
    root = project_root(); config = yaml.safe_load((root / "nbs/_quarto.yml").read_text())
    for entry in config["website"]["sidebar"]["contents"]:
        for f in entry["contents"] if isinstance(entry, dict) else [entry]: assert (root / "nbs" / f).exists(), f
    assert "ODbL" in config["website"]["page-footer"]["right"] and "ODbL" in (root / "nbs/credits.md").read_text()
    known = symbols(root / "nbs"); assert known["read_ledger"] == "/governance/ledger.ipynb#read_ledger" and known["clinllm.core.tables"] == "/core/tables.ipynb"


def test_workflows_call_the_make_targets():
    for name, target in (("test", "make test"), ("site", "make run")):
        flow = yaml.safe_load((project_root() / ".github" / "workflows" / f"{name}.yml").read_text())
        steps = [s.get("run", "") for job in flow["jobs"].values() for s in job["steps"]]
        assert [s for s in steps if s][0].startswith(target) and len([s for s in steps if s]) == 1


@pytest.mark.slow
def test_the_whole_site_of_this_project_without_any_run(tmp_path):
    code = f"from clinllm.core.settings import load_settings; from clinllm.run.site import build_site, foreign, mend_links; s = build_site(load_settings(), True); assert foreign(s) == []; print(len(list(s.rglob('*.html'))))"
    import os
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ, CLINLLM_REPORTS=str(tmp_path / "reports")), capture_output=True, text=True, cwd=project_root())
    assert done.returncode == 0, done.stderr[-2000:]
    home = (tmp_path / "reports/site/index.html").read_text(); assert "make run" in home and "no evidence" in home
    assert json.loads((tmp_path / "reports/site/search.json").read_text())
