"""The page as a person uses it, in a real browser: hundreds of runs, wide and narrow."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.browse.conftest import Look

ROWS = "#runs tbody tr[data-key]"
KEYS = "".join(f"&sel={number:08}" for number in range(12))  # three norms, two batch sizes, two seeds, but for 7


def listed(page: Page) -> list[str]:
    return page.locator(ROWS).evaluate_all("rows => rows.map(row => row.dataset.key)")


FOUND = {
    "": 300,
    "norm=groupnorm": 100,
    "norm=GroupNorm batch_size=8": 50,
    "norm=batchnorm,groupnorm data.batch_size!=8": 100,
    "seed<10": 60,
    "seed>=10 seed<=11": 12,
    "seed=7": 6,
    "state=failed": 6,
    "disk": 6,
    '"disk is full" norm=groupnorm': 2,
    "optimizer.lr=1e-1": 300,
    "lr>0.1": 0,
    "model=resnet": 300,
    "started>2026-11-25": 12,
    "norm=": 300,
    "nothing like it": 0,
}


def test_the_filter_finds_words_and_values(many: Path, look: Look) -> None:
    page = look(many)
    for words, number in FOUND.items():
        page.fill("#filter", words)
        expect(page.locator("#count")).to_have_text("300 runs" if number == 300 else f"{number} of 300 runs")
        assert len(listed(page)) == number, words
        expect(page.locator("#complaint")).to_be_hidden()


def test_a_key_that_is_not_understood_is_said(many: Path, look: Look) -> None:
    page = look(many)
    for words, complaint in (
        ("accuracy>0.9", "accuracy: which one? test/accuracy, val/accuracy"),
        ("colour=red", "colour: no run has such a key"),
    ):
        page.fill("#filter", words)
        expect(page.locator("#complaint")).to_have_text(complaint)


def test_every_column_sorts_both_ways_and_what_lacks_it_is_last(many: Path, look: Look) -> None:
    page = look(many)
    records = [json.loads((folder / "run.json").read_text()) for folder in many.iterdir() if folder.is_dir()]
    accuracies = {record["id"]: record["metrics"].get("test/accuracy") for record in records}
    there = sorted((key for key in accuracies if accuracies[key] is not None), key=lambda key: accuracies[key])
    heading = page.get_by_role("columnheader", name="test accuracy").get_by_role("button")
    heading.click()
    assert listed(page)[: len(there)] == there[::-1]
    heading.click()
    assert listed(page)[: len(there)] == there
    assert page.url.endswith("#sort=test%2Faccuracy")
    for button in page.locator("#runs th button").all():
        button.click()
        first = listed(page)
        button.click()
        assert listed(page) != first, button.text_content()


def test_chosen_runs_are_compared(many: Path, look: Look) -> None:
    page = look(many)
    page.fill("#filter", "seed=0")
    boxes = page.locator(f"{ROWS} input")
    boxes.nth(0).click()
    boxes.nth(3).click(modifiers=["Shift"])
    expect(page.locator("#compare")).to_have_text("compare 4")
    page.click("#compare")
    expect(page.locator("#panel .curve")).to_have_count(4)
    differing = page.locator("#panel .configs tbody th").all_text_contents()
    assert differing == ["data.batch_size", "norm._target_"]
    page.check("#all")
    assert "optimizer.lr" in page.locator("#panel .configs tbody th").all_text_contents()
    page.select_option("#metric", "train/loss")
    expect(page.locator("#panel svg")).to_have_attribute("aria-label", "train/loss over step, 4 lines")
    page.check("#log")
    page.select_option("#x", "epoch")
    expect(page.locator("#panel svg")).to_have_attribute("aria-label", "train/loss over epoch, 4 lines")
    page.click("#clear")
    expect(page.locator("#panel")).to_be_hidden()


def test_seeds_together_are_one_line_with_its_spread(many: Path, look: Look) -> None:
    page = look(many, "panel=compare&metric=train%2Floss" + KEYS)
    expect(page.locator("#panel .curve")).to_have_count(12)
    page.select_option("#group", "seeds")
    expect(page.locator("#panel .curve")).to_have_count(6)
    expect(page.locator("#panel .band")).to_have_count(6)
    expect(page.locator("#panel .legend")).to_contain_text("norm=groupnorm batch_size=8 n = 2")
    page.select_option("#group", "norm")
    expect(page.locator("#panel .curve")).to_have_count(3)
    expect(page.locator("#panel .legend")).to_contain_text("norm=layernorm n = 4")


def test_mean_and_spread_are_those_of_the_values(many: Path, look: Look) -> None:
    page = look(many, "panel=compare&group=norm&metric=train%2Floss" + KEYS)
    curves = [[[0, 1.0], [2, 3.0]], [[0, 2.0], [1, 3.0], [2, 4.0]]]
    found = page.evaluate("curves => together(curves)", curves)  # the first has no point at 1: a line between
    assert [point[:2] for point in found] == [[0, 1.5], [1, 2.5], [2, 3.5]]
    assert [point[2:] for point in found] == [[pytest.approx(0.5**0.5), 2]] * 3


def test_pointing_at_a_curve_tells_its_values(many: Path, look: Look) -> None:
    page = look(many, "panel=compare&group=norm&metric=train%2Floss" + KEYS)
    page.locator("#panel svg").hover()
    expect(page.locator("#panel .tip div")).to_have_count(3)
    expect(page.locator("#panel .tip")).to_contain_text("norm=groupnorm")
    expect(page.locator("#panel .tip")).to_contain_text("±")
    page.locator("#panel svg").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#panel .tip b")).to_contain_text("step ")


def test_the_address_holds_the_view(many: Path, look: Look) -> None:
    page = look(many)
    page.fill("#filter", "norm=groupnorm")
    page.locator(f"{ROWS} input").first.click()
    page.click("#compare")
    page.select_option("#metric", "val/loss")
    page.check("#log")
    address, rows = page.url, listed(page)
    page.reload()
    assert (page.url, listed(page)) == (address, rows)
    expect(page.locator("#filter")).to_have_value("norm=groupnorm")
    expect(page.locator("#metric")).to_have_value("val/loss")
    expect(page.locator("#log")).to_be_checked()
    expect(page.locator("#panel .curve")).to_have_count(1)
    page.locator(f"{ROWS} .name").nth(1).click()
    expect(page.locator("#panel h2")).to_contain_text("2026-11-")
    page.go_back()
    expect(page.locator("#panel h2")).to_have_text("1 run compared")


def test_the_address_holds_a_run_whose_folder_has_a_space(runs: Path, look: Look) -> None:
    [folder] = runs.glob("*_hot")
    shutil.copytree(folder, runs / "my copy")
    page = look(runs)
    page.locator(f"{ROWS}[data-key='my copy'] input").check()
    page.locator(f"{ROWS}[data-key='{folder.name}'] input").check()
    page.reload()
    expect(page.locator("#compare")).to_have_text("compare 2")


def test_a_run_that_the_address_names_may_be_gone(many: Path, look: Look) -> None:
    page = look(many, "panel=run:gone&sel=gone&sel=00000001&group=gone&metric=gone&sort=gone&q=%E0%A4%A")
    expect(page.locator("#panel")).to_be_hidden()
    page.click("#compare")
    expect(page.locator("#panel .curve")).to_have_count(1)


def test_keys_do_what_the_pointer_does(many: Path, look: Look) -> None:
    page = look(many)
    page.keyboard.press("/")
    page.keyboard.type("seed=3")
    page.keyboard.press("Escape")
    for key in ("j", "x", "j", "j", "X", "k", "x", "c"):
        page.keyboard.press(key)
    expect(page.locator("#panel h2")).to_have_text("2 runs compared")
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(page.locator("#panel h2")).to_contain_text("2026-11-")


def test_a_run_is_told_with_its_commands_its_record_and_its_files(made: Path, look: Look) -> None:
    page = look(made)
    page.get_by_role("row", name="diverged").locator(".name").click()
    panel = page.locator("#panel")
    expect(panel.locator(".error")).to_contain_text("What often helps: a lower rate")
    expect(panel.locator("code").first).to_contain_text("python scripts/reproduce.py ")
    panel.locator(".command button").first.click()
    expect(panel.locator(".command button").first).to_have_text(re.compile("copied|selected"))
    for link in panel.locator(".files a").all():
        assert (made / str(link.get_attribute("href"))).exists()
    panel.get_by_text("run.json").last.click()
    expect(panel.locator("details pre")).to_contain_text('"fingerprint"')


def test_an_ablation_tells_its_verdict_and_leads_to_its_report_and_runs(made: Path, look: Look) -> None:
    page = look(made)
    page.click("#ablations button")
    expect(page.locator("#panel .verdicts")).to_contain_text("groupnorm against batchnorm")
    assert (made / str(page.locator("#panel a.main").get_attribute("href"))).exists()
    page.get_by_role("button", name="compare its runs").click()
    expect(page.locator(ROWS)).to_have_count(4)
    expect(page.locator("#panel .curve")).to_have_count(2)
    expect(page.locator("#panel .band")).to_have_count(2)


def test_a_damaged_run_is_shown_as_such(runs: Path, look: Look) -> None:
    [folder] = runs.glob("*_hot")
    (folder / "run.json").write_text("{")
    page = look(runs)
    page.get_by_role("button", name="1 damaged").click()
    expect(page.locator(ROWS)).to_have_count(1)
    expect(page.locator(f"{ROWS} .trouble")).to_contain_text("run.json cannot be read")
    page.locator(f"{ROWS} .name").click()
    expect(page.locator("#panel .error")).to_contain_text("run.json cannot be read")


ATTACK = "</script><img src=x onerror=\"document.body.textContent='broken'\"><script>document.title='broken'</script>"


def test_what_a_run_says_is_shown_as_text(runs: Path, look: Look) -> None:
    [folder] = runs.glob("*_hot")
    record = json.loads((folder / "run.json").read_text())
    for key in ("error", "command", "id", "host", "git_commit", ATTACK):
        record[key] = ATTACK
    record["overrides"] = [f"optimizer.lr={ATTACK}", f"{ATTACK}=1", "__proto__=1", "constructor=2"]
    record["metrics"] = {ATTACK: 1.0, "__proto__": 2.0, "test/accuracy": 0.5}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.csv").write_text(f'step,epoch,"{ATTACK.replace(chr(34), chr(34) * 2)}"\n0,0,1.0\n1,0,2.0\n')
    with (folder / "config.yaml").open("a") as file:
        file.write(f"'{ATTACK.replace(chr(39), chr(39) * 2)}': {json.dumps(ATTACK)}\n")
    evil = folder.rename(runs / "<img src=x onerror=alert(1)>{{data}}")
    shutil.copytree(runs / "sweep_norm", runs / "<b>bold<b>")
    (runs / "<b>bold<b>" / "report" / "report.md").write_text(f"# x\n\n## Verdict\n\n- {ATTACK}\n")
    content = json.loads((runs / "<b>bold<b>" / "ablation.json").read_text())
    content["ablation"]["question"] = content["command"] = ATTACK
    (runs / "<b>bold<b>" / "ablation.json").write_text(json.dumps(content))
    page = look(runs)
    expect(page.locator(f"{ROWS} .trouble")).to_have_text(ATTACK)
    page.locator(f"{ROWS} .name", has_text="<img").click()
    expect(page.locator("#panel h2")).to_have_text(evil.name)
    expect(page.locator("#panel .error")).to_have_text(ATTACK)
    for summary in page.locator("#panel summary").all():
        summary.click()
    page.locator("#panel .head button", has_text="choose").click()
    page.click("#compare")
    page.check("#all")
    expect(page.locator("#panel .curve")).to_have_count(1)
    page.get_by_role("button", name="<b>bold<b>").first.click()
    expect(page.locator("#panel .verdicts")).to_have_text(ATTACK)
    assert page.locator("img, b:not(.tip b)").count() == 0
    assert page.locator("script").count() == 2
    assert page.title().endswith("ablab")


@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.thorough), 390])
def test_no_view_is_wider_than_the_screen(many: Path, made: Path, look: Look, width: int) -> None:
    [hot] = [json.loads((folder / "run.json").read_text())["id"] for folder in made.glob("*_hot")]
    for folder, views in (
        (many, ("", "panel=compare&all=1" + KEYS, "panel=compare&group=seeds" + KEYS, "panel=run:00000007")),
        (made, ("", f"panel=run:{hot}", "panel=ablation:sweep_norm")),
    ):
        page = look(folder, width=width)
        for view in views:
            page.evaluate("view => { location.hash = view }", view)
            if view:
                expect(page.locator("#panel")).to_be_visible()
            if "compare" in view:
                expect(page.locator("#panel svg")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") == width, view


def test_on_a_phone_a_run_is_a_card_and_its_panel_the_page(many: Path, look: Look) -> None:
    page = look(many, width=390, height=844, has_touch=True)
    expect(page.locator("#runs thead")).to_be_hidden()
    page.select_option("#sort", "-test/accuracy")
    best = page.locator(ROWS).first
    assert "test/accuracy" in best.evaluate("row => [...row.cells].map(cell => cell.dataset.label).join(' ')")
    best.locator(".name").tap()
    expect(page.locator("#list")).to_be_hidden()
    page.locator(".close").tap()
    expect(page.locator("#list")).to_be_visible()
