import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import ENDS_SCRIPT, HOSTILE, edit, make_gan, make_lstm
from PIL import Image

from cs324dist.report.page import write_report
from cs324dist.report.reading import read_run


class Page(HTMLParser):
    """Elements and texts of a page, and whether every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "input", "br", "path"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory) -> Page:
    out = tmp_path_factory.mktemp("page") / "report.html"
    (damaged,) = write_report(tuple(sorted(runs.iterdir())), out)
    assert "/config.json: steps is " in damaged
    return Page(out.read_text())


def test_it_is_well_formed_and_refers_to_nothing_outside(page: Page) -> None:
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "base"}
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_text_is_shown_as_text(page: Page) -> None:
    assert HOSTILE in page.texts
    assert any(ENDS_SCRIPT in text for text in page.texts)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [s for s in scripts if s.get("type") != "application/json"] == [{}]
    assert not any("onerror" in attributes for _, attributes in page.tags)


def test_every_picture_has_an_alternative_text(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) >= 8
    assert all(attributes.get("alt") for attributes in pictures)


def test_what_has_not_finished_says_so_at_the_top(page: Page) -> None:
    text = " ".join(page.texts)
    top = text[: text.index("The network reads")]
    assert "8 runs: 6\N{NO-BREAK SPACE}finished" in top
    assert "failed: RuntimeError:" in top
    assert "has not started" in top


def test_the_lstm_table(page: Page) -> None:
    text = re.sub(r"\s+", " ", " ".join(page.texts)).replace("\N{EN DASH}", "-")
    assert "lstm-length5 LSTM 5 180 200 100 % 1 000 38 s" in text
    assert "rnn-length5 RNN 5 180 200 100 % 1 000 38 s" in text
    assert "lstm-length20 LSTM 20 - - 72.5 % 1 000 64 s" in text


def test_a_gan_without_a_checkpoint_says_why_there_is_no_walk(page: Page) -> None:
    text = " ".join(page.texts)
    assert text.count("No walk through the latent space:") == 1
    assert "no checkpoint yet" in text


def test_a_task_of_ones_own_has_curves_a_table_and_pictures(tmp_path: Path) -> None:
    path = make_lstm(tmp_path / "run", keep_best="eval/accuracy")
    edit(path / "config.json", task="mine <b>")
    for step in (100, 200, 300):
        Image.new("RGB", (40, 30), (step - 100, 0, 0)).save(path / "samples" / f"{step:09d}.png")
    write_report((path,), tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    text = re.sub(r"\s+", " ", " ".join(page.texts))
    assert "mine <b>" in text
    assert "throughput/" not in text  # it is not what one compares by curves
    table = text[text.index("Metric Lowest Highest Final") :]
    assert "train/loss 0.115 step 300 2.08 step 10 0.115 step 300 train/accuracy 15 % step 10" in table
    assert "eval/accuracy 60 % step 100 100 % best, step 200 100 % step 300" in table
    pictures = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert pictures == [f"Samples at step {step}" for step in (300, 100, 200, 300)]
    assert "Beginning step 100 Middle step 200 End step 300" in text


def test_the_options_that_differ_between_runs_are_a_table(tmp_path: Path) -> None:
    paths = tuple(make_lstm(tmp_path / f"run-{seed}", seed=seed) for seed in (41, 42))
    write_report(paths, tmp_path / "report.html")
    text = " ".join(Page((tmp_path / "report.html").read_text()).texts)
    assert "Options that differ" in text
    assert re.search(r"Run\s+--seed\s+run-41\s+41\s+run-42\s+42", text)


@pytest.mark.parametrize("content", ["{", '{"format": 4, "task": 3, "config": []}', "{}"])
def test_a_run_whose_configuration_is_damaged(tmp_path: Path, content: str) -> None:
    path = make_gan(tmp_path / "run")
    (path / "config.json").write_text(content)
    others = (make_lstm(tmp_path / "whole"), tmp_path)
    missing, damaged = write_report((path, *others), tmp_path / "report.html")
    assert missing == f"{tmp_path} is not a run folder: left out"
    assert damaged.startswith(f"{path}/config.json")
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == []
    text = " ".join(" ".join(page.texts).split())
    assert "2 runs: 1 finished, 1 damaged" in text
    assert "at most ?" not in text


@pytest.mark.slow
def test_ten_runs_fit_into_five_megabytes(tmp_path: Path) -> None:
    frames = make_gan(tmp_path / "0", frames=60)
    for number in range(1, 10):
        shutil.copytree(frames, tmp_path / str(number))
    write_report(tuple(tmp_path.iterdir()), tmp_path / "report.html")
    size = (tmp_path / "report.html").stat().st_size
    assert size < 5_000_000  # of noise, which compresses worst
    assert len(read_run(frames, "").samples) == 60


def test_the_page_before_stands_if_the_new_one_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    path, out = make_lstm(tmp_path / "run"), tmp_path / "report.html"
    out.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_report((path,), out)
    assert out.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "run"]


def test_the_command_writes_the_page_and_leaves_out_what_is_not_a_run(launch, runs, tmp_path):
    out = tmp_path / "report.html"
    done = launch("launch/report.py", runs / "lstm-length5", tmp_path, "--out", out)
    assert done.stdout == f"{out}\n"
    assert done.stderr == f"warning: {tmp_path} is not a run folder: left out\n"
    assert out.read_text().startswith("<!doctype html>")
