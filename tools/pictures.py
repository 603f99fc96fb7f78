"""The pictures of docs/pictures again: what a terminal showed as SVG, and a report as PNG (needs chromium and Pillow).

FORCE_COLOR=1 COLUMNS=100 fledge bench ... --output-dir bench 2> bench.log
python tools/pictures.py terminal bench.log docs/pictures/bench.svg --command "fledge bench ..."
python tools/pictures.py report bench/report.html docs/pictures/report.png

docs/pictures/quickstart.svg is of a recording (`script -c "make quickstart"`, --columns 110): the two panels as they
were drawn last, and the closing table.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

PAGE, COLOURS = (1180, 1000), 256
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


def terminal(log: Path, picture: Path, command: str, columns: int) -> None:
    """Draw what a command wrote to a terminal."""
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=columns, file=nowhere, force_terminal=True)
        console.print(f"$ {command}", markup=False, highlight=False, style="bold")
        console.print(Text.from_ansi(log.read_text(encoding="utf-8").rstrip()))
    picture.write_text(console.export_svg(title="", theme=THEME, code_format=SVG, unique_id="t"), encoding="utf-8")


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
    given = parser.parse_args()
    if given.kind == "terminal":
        terminal(given.source, given.picture, given.command, given.columns)
    else:
        report(given.source, given.picture)


if __name__ == "__main__":
    main()
