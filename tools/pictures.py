"""The pictures of docs/pictures again: what a terminal showed as SVG (needs pyte), and a report as PNG (needs chromium
and Pillow).

FORCE_COLOR=1 COLUMNS=100 fledge bench ... --output-dir bench 2> bench.log
python tools/pictures.py terminal bench.log docs/pictures/bench.svg --command "fledge bench ..."
python tools/pictures.py report bench/report.html docs/pictures/report.png

A recording (`script -c "fledge chat ..." chat.log`) is drawn as the terminal stood at its end, or with --until TEXT
when TEXT was last on the screen. docs/pictures/quickstart.svg is of a recording of 110 columns: the two panels as they
were drawn last, and the closing table.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pyte
from PIL import Image
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

PAGE, COLOURS = (1180, 1000), 256
ROWS = 2000  # of the terminal that a recording is played to: nothing scrolls away
RICH_NAMES = {"brown": "yellow", "default": None}  # pyte's names of colours in rich's
THEME = TerminalTheme(
    (13, 17, 23), (230, 237, 243),
    [(72, 79, 88), (255, 123, 114), (86, 211, 100), (227, 179, 65), (121, 192, 255), (210, 168, 255), (86, 212, 221),
     (230, 237, 243)],
)  # fmt: skip
# rich's own frame names a font of the network, which a picture in a README may not load
SVG = """<svg xmlns="http://www.w3.org/2000/svg" class="rich-terminal" viewBox="0 0 {width} {height}">
<style>
.{unique_id}-matrix {{
  font: {char_height}px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}}
{styles}
</style>
<defs>{lines}</defs>
<rect width="{width}" height="{height}" rx="10" fill="#0d1117"/>
<g transform="translate(9, 14)">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def terminal(log: Path, picture: Path, command: str, columns: int, until: str | None) -> None:
    """Draw what a command wrote to a terminal."""
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=columns, file=nowhere, force_terminal=True)
        console.print(f"$ {command}", markup=False, highlight=False, style="bold")
        console.print(played(log.read_bytes().decode(), columns, until))
    picture.write_text(console.export_svg(title="", theme=THEME, code_format=SVG, unique_id="t"), encoding="utf-8")


def played(recording: str, columns: int, until: str | None) -> Text:
    """The screen behind a recording, or as it stood when `until` was last written: up to what redraws a bar."""
    recording = re.sub(r"^Script started on .*?\n|\nScript done on .*$", "", recording)
    if until:
        before, found, after = recording.rpartition(until)
        if not found:
            sys.exit(f"--until {until}: not in the recording.")
        recording = before + found + after.split("\r\x1b[2K")[0]
    screen = pyte.Screen(columns, ROWS)
    screen.set_mode(pyte.modes.LNM)  # a plain log has no carriage returns
    pyte.Stream(screen).feed(recording)
    lines = [drawn(screen, row) for row in range(ROWS)]
    while lines and not lines[-1].plain:
        lines.pop()
    return Text("\n").join(lines)


def drawn(screen: pyte.Screen, row: int) -> Text:
    """A row of a screen with its colours."""
    line = Text()
    chars = [screen.buffer[row][column] for column in range(screen.columns)]
    for (fg, bg, bold), run in itertools.groupby(chars, key=lambda char: (char.fg, char.bg, char.bold)):
        style = Style(color=rich_colour(fg), bgcolor=rich_colour(bg), bold=bold)
        line.append("".join(char.data for char in run), style)
    line.rstrip()
    return line


def rich_colour(name: str) -> str | None:
    """A colour of pyte in rich's words."""
    if re.fullmatch(r"[0-9a-f]{6}", name):
        return f"#{name}"
    return RICH_NAMES.get(name, name.replace("bright", "bright_"))


def report(page: Path, picture: Path) -> None:
    """Draw the upper part of a report as a browser shows it, in 256 colours: a small file."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "page.png"
        subprocess.run(
            ["chromium", "--headless=new", "--no-sandbox", "--hide-scrollbars", f"--screenshot={whole}",
             f"--window-size={PAGE[0]},{PAGE[1]}", page.resolve().as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        Image.open(whole).convert("RGB").quantize(COLOURS).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("terminal", "report"))
    parser.add_argument("source", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--command", default="", help="the line that a terminal's picture begins with")
    parser.add_argument("--columns", type=int, default=100, help="of the terminal")
    parser.add_argument("--until", metavar="TEXT", help="draw a recording as it stood when TEXT was last shown")
    given = parser.parse_args()
    if given.kind == "terminal":
        terminal(given.source, given.picture, given.command, given.columns, given.until)
    else:
        report(given.source, given.picture)


if __name__ == "__main__":
    main()
