"""The page of a report in a real browser: tables, curves, buttons, colors, and no network."""

import re

import pytest
from browser import PROGRAM, Browser
from written_runs import write_run

from dgl_jax.tools.report import report_runs

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium here: `apt-get install chromium` installs it"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Returns the page of a report on three learning rates, a failed run, and an odd name."""
    root = tmp_path_factory.mktemp("a folder")
    for seed, accuracies in enumerate(([0.5, 0.6], [0.52, 0.64])):
        write_run(root / "one" / f"seed_{seed}", accuracies, 0.625, 12, seed=seed)
    write_run(root / "two", [0.1, 0.7], 0.65, 12, optimizer__learning_rate=0.1)
    write_run(root / "<img src=x onerror=alert(1)> & co", optimizer__learning_rate=0.2)
    html, _ = report_runs(root)
    return html


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Returns a browser for all tests of this file."""
    chromium = Browser(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture
def opened(browser, page):
    """Returns the browser with the page newly loaded, and checks afterwards that it was quiet."""
    browser.problems.clear()
    browser.requests.clear()
    browser.look(1200, "light")
    browser.open(page)
    yield browser
    assert browser.problems == []
    assert browser.requests == [page.resolve().as_uri()]


def table(browser, number: int) -> list[list[str]]:
    """Returns the texts of the cells of a table, the head first."""
    rows = browser.call(
        f"[...document.querySelectorAll('table')[{number}].rows]"
        ".map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    )
    return rows


def test_tables_hold_the_numbers(opened):
    head, *rows = table(opened, 0)
    columns = ["optimizer.learning_rate", "seeds", "last module, %", "ensemble, %", "state"]
    places = [head.index(name) for name in columns]
    # The deviation of 0.60 and 0.64 is 0.04 / sqrt(2).
    assert [[row[n] for n in places] for row in rows] == [
        ["0.05", "2", "62.00 ± 2.83", "62.50 ± 0.00", "finished"],
        ["0.1", "1", "70.00", "65.00", "finished"],
        ["0.2", "0 of 1", "–", "–", "unfinished"],
    ]
    assert table(opened, 1)[1:] == [
        ["learning_rate=0.05", "51.00 ± 1.41", "62.00 ± 2.83", "62.50 ± 0.00"],
        ["learning_rate=0.1", "10.00", "70.00", "65.00"],
    ]
    bold = "[...document.querySelectorAll('table')[0].querySelectorAll('td')].filter(cell => "
    bold += "getComputedStyle(cell).fontWeight >= 600).map(cell => cell.innerText)"
    assert opened.call(bold) == ["0.1", "70.00", "65.00"]


def test_odd_names_are_text(opened):
    assert opened.call("document.querySelectorAll('img').length") == 0
    assert "<img src=x onerror=alert(1)> & co" in opened.call("document.body.innerText")


def test_curves_lie_in_their_box(opened):
    panels = opened.call("""[...document.querySelectorAll('svg.panel')].map(svg => ({
        lines: [...svg.querySelectorAll('polyline')].map(line => [...line.points].map(
            point => [point.x, point.y])),
        visible: svg.checkVisibility({contentVisibilityAuto: true}),
    }))""")
    shown = [panel for panel in panels if panel["visible"]]
    assert len(shown) == 4  # the curves of single rows are folded
    assert [len(panel["lines"]) for panel in shown] == [3, 3, 3, 3]
    points = [point for panel in panels for line in panel["lines"] for point in line]
    assert len(points) > 100
    assert all(44 <= x <= 352 and 26 <= y <= 188 for x, y in points)
    # Accuracy rises and loss falls; the vertical axis of SVG points down.
    rising, falling = shown[0]["lines"][0], shown[3]["lines"][0]
    assert [y for _, y in rising] == sorted((y for _, y in rising), reverse=True)
    assert [y for _, y in falling] == sorted(y for _, y in falling)
    assert len({y for _, y in rising}) == 4


def commands(browser, row: str) -> list[str]:
    return browser.call(f"[...document.querySelectorAll('#{row} code')].map(c => c.textContent)")


def test_copy_button_fills_the_clipboard(opened):
    opened.send("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    opened.click("document.querySelectorAll('tbody button.copy')[0]")
    expected = commands(opened, "row-0-0")
    assert [f"seed_{n}" in text for n, text in enumerate(expected)] == [True, True]
    assert opened.call("navigator.clipboard.readText()") == "\n".join(expected)
    assert opened.call("document.querySelector('tbody button.copy').textContent") == "copied"


def test_copy_button_works_without_a_clipboard(opened):
    opened.send("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    opened.call("""(() => {
        window.read = navigator.clipboard.readText.bind(navigator.clipboard);
        Object.defineProperty(navigator, 'clipboard', {value: undefined});
    })()""")
    opened.click("document.querySelectorAll('tbody button.copy')[1]")
    assert opened.call("window.read()") == "\n".join(commands(opened, "row-0-1"))
    assert opened.call("document.querySelectorAll('textarea').length") == 0


def test_twin_failed_copy_is_not_called_copied(opened):
    opened.call("""(() => {
        Object.defineProperty(navigator, 'clipboard', {value: undefined});
        document.execCommand = () => false;
    })()""")
    opened.click("document.querySelectorAll('tbody button.copy')[1]")
    text = "document.querySelectorAll('tbody button.copy')[1].textContent"
    assert opened.call(text) == "not copied"


def test_head_sorts_by_number_and_keeps_missing_ones_last(opened):
    column = table(opened, 0)[0].index("last module, %")
    for expected in (["62.00 ± 2.83", "70.00", "–"], ["70.00", "62.00 ± 2.83", "–"]):
        opened.click(f"document.querySelectorAll('table')[0].rows[0].cells[{column}].firstChild")
        assert [row[column] for row in table(opened, 0)[1:]] == expected


def test_legend_hides_and_shows_the_curves_of_a_row(opened):
    visible = """[...document.querySelector('.panels').querySelectorAll('polyline')]
        .filter(line => getComputedStyle(line).display !== 'none').length"""
    assert opened.call(visible) == 12
    opened.click("document.querySelectorAll('.legend input')[1]")
    assert opened.call(visible) == 8
    opened.click("document.querySelectorAll('.legend input')[1]")
    assert opened.call(visible) == 12
    opened.click("document.querySelector('.legend .all')")
    assert opened.call(visible) == 0
    opened.click("document.querySelector('.legend .all')")
    assert opened.call(visible) == 12


def luminance(color: str) -> float:
    """Returns the relative luminance of a color such as rgb(1, 2, 3), as WCAG defines it."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_black_and_white_is_21():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_color_schemes_are_readable(opened, scheme):
    opened.look(1200, scheme)
    page = opened.call("getComputedStyle(document.body).backgroundColor")
    assert (luminance(page) < 0.05) == (scheme == "dark")
    colors = opened.call("""(() => {
        const named = 'p, td, th, summary, label, .state, button.copy';
        const style = element => getComputedStyle(element);
        const texts = [...document.querySelectorAll(named)].map(element => style(element).color);
        const svg = [...document.querySelectorAll('.panel text')].map(text => style(text).fill);
        const probe = document.querySelector('polyline').cloneNode();
        document.querySelector('.panel').append(probe);
        const lines = [];
        for (let n = 0; n < 8; n++) {
            probe.setAttribute('class', `c${n}`);
            lines.push(style(probe).stroke);
        }
        probe.remove();
        return {text: [...new Set([...texts, ...svg])], lines};
    })()""")
    assert len(set(colors["lines"])) == 8
    assert [c for c in colors["text"] if contrast(c, page) < 4.5] == []
    assert [c for c in colors["lines"] if contrast(c, page) < 3] == []


@pytest.mark.parametrize("width", [360, 1200])
def test_wide_tables_scroll_inside_their_box(opened, width):
    opened.look(width, "light")
    assert opened.call("document.documentElement.scrollWidth") <= width
    box = "document.querySelector('.scroll')"
    if width == 360:
        assert opened.call(f"{box}.scrollWidth") > opened.call(f"{box}.clientWidth")


def test_folded_rows_open(opened):
    visible = "document.querySelector('#row-0-0 .panels').checkVisibility()"
    assert opened.call(visible) is False
    opened.click("document.querySelector('#row-0-0 summary')")
    assert opened.call(visible) is True


def test_twin_page_that_loads_something_is_noticed(browser, page, tmp_path):
    text = page.read_text()
    policy = re.search(r"<meta http-equiv=.*?>", text)[0]
    other = tmp_path / "other.html"
    browser.problems.clear()
    browser.requests.clear()
    image = '<img src="http://127.0.0.1:9/x.png"><script>missing()</script>'
    other.write_text(text.replace("</body>", f"{image}</body>"))
    browser.open(other)
    assert any("missing is not defined" in problem for problem in browser.problems)
    assert any("Content Security Policy" in problem for problem in browser.problems)
    other.write_text(text.replace(policy, "").replace("</body>", f"{image}</body>"))
    browser.open(other)
    assert "http://127.0.0.1:9/x.png" in browser.requests
