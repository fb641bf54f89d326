"""The page in a browser, as its reader meets it: Debian's Chromium, driven by Playwright.

No test waits for time to pass: the page's clock is the test's.
"""

import io
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageStat

from cs324dist.report.charts import formatted
from cs324dist.report.page import ASSETS, write_report
from cs324dist.report.pictures import WALK_FRAMES

sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]
PATIENCE = 100_000  # milliseconds
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
PHONE = {"width": 390, "height": 844}
VALUES = st.floats(-1e15, 1e15).filter(lambda v: v == 0 or abs(v) > 1e-9)
CURVES = st.lists(st.lists(VALUES, min_size=1, max_size=5), min_size=1, max_size=5)
Open = Callable[..., "sync_api.Page"]


@pytest.fixture(scope="module")
def report(runs: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    write_report(tuple(sorted(runs.iterdir())), out)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, report) -> Iterator[Open]:
    """Open the page from disk; at the end it must have said nothing and asked for nothing."""
    contexts, said, asked = [], [], []

    def opened(stopped_clock: bool = False, **options) -> "sync_api.Page":
        contexts.append(browser.new_context(**{"viewport": WIDE, "color_scheme": "light", **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        if stopped_clock:
            page.clock.install(time=0)
        page.goto(report.as_uri())
        if stopped_clock:
            page.clock.pause_at(3_600_000)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {report.as_uri()}


@pytest.fixture
def page(open_page) -> "sync_api.Page":
    return open_page()


@pytest.fixture
def stopped_page(open_page) -> "sync_api.Page":
    return open_page(stopped_clock=True)


@pytest.fixture(scope="module")
def call(browser) -> Iterator[Callable[..., list]]:
    """What a function of page/axes.js gives for each of some arguments."""
    page = browser.new_page()
    page.add_script_tag(content=ASSETS.joinpath("axes.js").read_text())
    yield lambda function, arguments: page.evaluate(f"all => all.map({function})", arguments)
    page.close()


def player(page: "sync_api.Page", kind: str) -> "sync_api.Locator":
    return page.locator(f".player.{kind}").first


def curve_names(page: "sync_api.Page", section: str) -> list[str]:
    return [name.strip() for name in page.locator(f"{section} .curves label").all_text_contents()]


class TestFilm:
    def test_the_slider_changes_the_picture_and_what_is_said_of_it(self, page):
        film = player(page, "growth")
        picture, slider = film.locator(".stage img"), film.locator("[type=range]")
        last = picture.get_attribute("src")
        assert picture.get_attribute("alt") == "Samples at step 400"
        assert film.locator(".counts b").first.text_content() == "10.4"
        slider.focus()
        page.keyboard.press("Home")
        first = picture.get_attribute("src")
        assert first != last
        assert picture.get_attribute("alt") == "Samples at step 100"
        assert film.locator("output").text_content() == "step 100"
        assert slider.evaluate("slider => slider.ariaValueText") == "step 100"
        assert film.locator(".counts b").first.text_content() == "10.1"
        page.keyboard.press("ArrowRight")
        assert film.locator("output").text_content() == "step 200"
        assert picture.get_attribute("src") not in (first, last)

    def test_it_plays_from_the_beginning_to_the_end_and_stops(self, stopped_page):
        film = player(stopped_page, "growth")
        button, label = film.locator(".play"), film.locator("output")
        button.focus()
        stopped_page.keyboard.press("Space")
        assert (label.text_content(), button.evaluate("b => b.ariaLabel")) == (
            "step 100",
            "Pause Film of the samples, gan-fast-0",
        )
        stopped_page.clock.run_for(250)
        assert label.text_content() == "step 200"
        stopped_page.clock.run_for(10_000)
        assert label.text_content() == "step 400"
        assert button.evaluate("b => b.ariaLabel").startswith("Play")

    def test_it_pauses(self, stopped_page):
        film = player(stopped_page, "growth")
        for _ in range(2):
            film.locator(".play").click()
        stopped_page.clock.run_for(10_000)
        assert film.locator("output").text_content() == "step 100"

    def test_a_run_with_one_picture_has_a_film_too(self, stopped_page):
        film = stopped_page.locator(".player.growth").nth(1)
        film.locator(".play").click()
        stopped_page.clock.run_for(10_000)
        assert film.locator("output").text_content() == "step 100"


class TestWalk:
    def test_it_goes_there_and_back(self, stopped_page):
        walk = player(stopped_page, "walk")
        linear, spherical = walk.locator(".stage img").all()
        middle = WALK_FRAMES // 2
        before = linear.get_attribute("src"), spherical.get_attribute("src")
        assert before[0] != before[1]
        walk.locator(".play").click()
        stopped_page.clock.run_for(60)
        assert walk.locator("output").text_content() == f"{middle + 2} of {WALK_FRAMES}"
        assert (linear.get_attribute("src"), spherical.get_attribute("src")) != before
        stopped_page.clock.run_for(60 * (2 * (WALK_FRAMES - 1) - 1))
        assert walk.locator("output").text_content() == f"{middle + 1} of {WALK_FRAMES}"
        assert (linear.get_attribute("src"), spherical.get_attribute("src")) == before

    def test_it_is_slow_where_less_motion_is_wished(self, open_page):
        walk = player(open_page(stopped_clock=True, reduced_motion="reduce"), "walk")
        walk.locator(".play").click()
        walk.page.clock.run_for(1100)
        assert walk.locator("output").text_content() == f"{WALK_FRAMES // 2 + 2} of {WALK_FRAMES}"


class TestCurves:
    def test_a_run_is_switched_off(self, page):
        section = page.locator("#palindromes")
        box = section.locator("[type=checkbox]").nth(1)
        run = box.get_attribute("data-run")
        curves = section.locator(f".plot .curve[data-run='{run}']")
        assert [curve.is_visible() for curve in curves.all()] == [True, True]
        box.focus()
        page.keyboard.press("Space")
        assert [curve.is_visible() for curve in curves.all()] == [False, False]
        page.keyboard.press("Space")
        assert [curve.is_visible() for curve in curves.all()] == [True, True]

    def test_the_axis_follows_the_runs_that_are_shown(self, page):
        section = page.locator("#digits")
        labels = section.locator(".y-axis").first.locator("span")
        before = labels.all_text_contents()
        section.locator("[type=checkbox]").nth(1).uncheck()
        assert (before[-1], labels.all_text_contents()[-1]) == ("10\u202f000", "50")
        section.locator("[type=checkbox]").first.uncheck()
        assert labels.all_text_contents() == ["0", "0.5", "1"]

    def test_the_keyboard_reads_values_and_zooms(self, page):
        section = page.locator("#palindromes")
        plot, ticks = section.locator(".plot").first, section.locator(".x-axis").first.locator("span")
        plain = ticks.all_text_contents()
        assert plain == ["0", "100", "200", "300", "400", "500"]
        plot.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowLeft")
        readout = plot.locator(".readout div").all_text_contents()
        assert readout[0] == "step 10"
        assert next(row for row in readout if "lstm-length5" in row).endswith("15\u00a0%")
        assert "step 10;" in (section.locator(":scope .curves > output").text_content() or "")
        page.keyboard.press("Shift+ArrowRight")
        assert plot.locator(".readout div").first.text_content() == "step 110"
        page.keyboard.press("+")
        assert ticks.all_text_contents() == ["100", "150", "200", "250", "300"]
        page.keyboard.press("Escape")
        assert ticks.all_text_contents() == plain
        assert plot.locator(".readout").count() == 0
        page.keyboard.press("End")
        assert plot.locator(".readout div").first.text_content() == "step 500"

    def test_a_continued_run_says_where_and_by_how_many_processes(self, page):
        section = page.locator("#palindromes")
        name = next(name for name in curve_names(page, "#palindromes") if name.startswith("rnn"))
        box = section.get_by_role("checkbox", name=name)
        run = box.get_attribute("data-run")
        lines = section.locator(f".restart[data-run='{run}']")
        assert [line.text_content().strip() for line in lines.all()] == ["1", "3", "1"] * 2
        assert section.locator(".restart").count() == 6  # the other runs were never continued
        places = [line.evaluate("line => parseFloat(line.style.left)") for line in lines.all()]
        assert places == [0, 20, 40] * 2
        plot = section.locator(".plot").first
        plot.focus()
        said = []
        for steps in (1, 9, 1, 9, 1):  # to the steps 10, 100, 110, 200 and 210
            for _ in range(steps):
                page.keyboard.press("ArrowRight")
            rows = plot.locator(".readout div").all_text_contents()
            said.append(next(row for row in rows if name in row).removeprefix(name).split(")")[0])
        assert said == [f" ({n}" for n in ["1 process"] * 2 + ["3 processes"] * 2 + ["1 process"]]
        page.keyboard.press("Escape")
        section.get_by_role("button", name="Zoom in").click()  # steps 125 to 375
        assert [line.is_visible() for line in lines.all()] == [False, False, True] * 2
        assert lines.nth(2).evaluate("line => parseFloat(line.style.left)") == 30
        box.uncheck()
        assert not any(line.is_visible() for line in lines.all())

    def test_all_charts_of_a_section_share_cursor_and_zoom(self, page):
        section = page.locator("#palindromes")
        section.locator(".plot").first.hover(position={"x": 100, "y": 100})
        steps = [readout.locator("div").first.text_content() for readout in section.locator(".readout").all()]
        assert len(steps) == 2
        assert len(set(steps)) == 1
        section.get_by_role("button", name="Zoom in").click()
        axes = [axis.locator("span").all_text_contents() for axis in section.locator(".x-axis").all()]
        assert axes[0] == axes[1] != ["0", "100", "200", "300", "400", "500"]

    def test_dragging_chooses_steps(self, page):
        section = page.locator("#palindromes")
        plot, ticks = section.locator(".plot").first, section.locator(".x-axis").first.locator("span")
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        for share, act in ((0.2, page.mouse.down), (0.4, page.mouse.up)):
            page.mouse.move(box["x"] + share * box["width"], box["y"] + 50)
            act()
        assert (
            {"120", "140", "160", "180"}
            <= set(ticks.all_text_contents())
            <= {"100", "120", "140", "160", "180", "200"}
        )
        plot.dblclick()
        assert ticks.all_text_contents()[-1] == "500"


class TestAxes:
    @settings(deadline=None)
    @given(CURVES, st.sampled_from(["", "%", "log"]))
    def test_an_axis_has_room_and_a_few_round_ticks(self, call, curves, unit):
        ((low, high),) = axis = call(f"curves => limits(curves, '{unit}')", [curves])
        assert low < min(map(min, curves))
        assert low < high
        if high - low > 1e-6 * abs(high):
            (marks,) = call("axis => ticks(axis)", axis)
            assert 2 <= len(marks) <= 11
            assert all(-1e-6 <= (mark - low) / (high - low) <= 1 + 1e-6 for mark in marks)

    def test_a_curve_that_diverges_does_not_hide_the_others(self, call):
        many = [[[2.3, 0.1], [2.5, 0.2], [1e11]], [[1e11]]]
        (_, high), (_, alone) = call("curves => limits(curves, '')", many)
        assert high == pytest.approx(10, rel=0.1)
        assert alone > 1e11

    def test_round_numbers(self, call):
        assert call("axis => ticks(axis)", [[0, 1500], [-0.1, 2.4]]) == [
            [0, 500, 1000, 1500],
            [0, 0.5, 1, 1.5, 2],
        ]
        assert call("axis => logTicks(axis)", [[math.log10(0.3), math.log10(60)], [-2, 3]]) == [
            [0.5, 1, 2, 5, 10, 20, 50],
            [0.01, 0.1, 1, 10, 100, 1000],
        ]

    @pytest.mark.parametrize(
        ("unit", "values"),
        [
            ("", [0.0, 187_500.0, 0.012345, -2.5, 1e11, -1234.5, 999.4, 0.00123]),
            ("%", [0.0, 1.0, 0.9999, 0.99999, 0.5256, 0.0004, -0.25, 98.7]),
        ],
    )
    def test_script_and_file_write_numbers_alike(self, call, unit, values):
        assert call(f"v => formatted(v, '{unit}')", values) == [formatted(value, unit) for value in values]


def test_the_keyboard_reaches_everything(page):
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    wanted = page.evaluate(
        """() => {
            const some = 'a[href], button, input, summary, [tabindex="0"]';
            return [...document.querySelectorAll(some)].filter(e => e.checkVisibility()).length;
        }"""
    )
    page.evaluate("window.reached = new Set(); document.activeElement.blur()")
    for _ in range(wanted):
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        page.evaluate("reached.add(document.activeElement)")
    assert page.evaluate("reached.size") == wanted


def test_without_script_there_are_pictures_tables_and_switches(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator(".controls").first.is_hidden()
    assert page.locator(".zoom").first.is_hidden()
    for picture in page.locator("img").all():
        assert picture.is_visible()
    ends = page.locator("#digits .chart").first.locator(".y-axis span, .x-axis span, .reference:not(path)")
    assert ends.all_text_contents() == ["3.46", "10\u202f000", "real digits 3.46", "0", "400"]
    curve = page.locator("#palindromes .curve[data-run='1'][d*='L']").first
    assert curve.is_visible()
    page.locator("#palindromes [type=checkbox]").nth(1).uncheck()
    assert curve.is_hidden()
    page.locator(".chart summary").first.click()
    assert page.locator(".chart table").first.is_visible()


def test_text_is_text(page):
    assert "<img src=x onerror=alert(1)>&amp;" in curve_names(page, "#palindromes")
    page.locator(".plot").first.hover(position={"x": 50, "y": 50})
    assert page.evaluate("window.hacked") is None
    assert page.locator("img:not([src^='data:'])").count() == 0


def test_on_a_phone_a_table_that_is_cut_off_has_a_shadow_until_its_end_is_reached(open_page):
    table = open_page(viewport=PHONE).locator("#palindromes .wide[aria-label=Results]")
    table.scroll_into_view_if_needed()

    def right_edge() -> float:
        """How bright it is; 0 is black."""
        with Image.open(io.BytesIO(table.screenshot())) as picture:
            grey = picture.convert("L").crop((picture.width - 4, 0, picture.width, picture.height))
            return ImageStat.Stat(grey).mean[0]

    cut = table.evaluate("table => table.scrollWidth - table.clientWidth")
    assert cut > 100
    assert right_edge() < 225
    table.evaluate("table => table.scrollTo(table.scrollWidth, 0)")
    assert right_edge() > 235


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_axe_finds_no_violation_and_nothing_sticks_out(open_page, scheme, viewport):
    page = open_page(color_scheme=scheme, viewport=viewport)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.locator(".plot").first.focus()
    page.keyboard.press("ArrowRight")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
