"""Write a generated table into a Markdown file."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results"
BENCHMARKS = RESULTS / "README.md"
"""The file with all benchmark tables."""

END = "<!-- end of table -->"


def write_table(script: str, table: str, path: Path = BENCHMARKS) -> None:
    """Replace the table of one script in a Markdown file.

    The table lies between the comments ``<!-- table: made by scripts/{script} -->`` and ``END``.

    Parameters
    ----------
    script
        File name of the script, as in the comment.
    table
        Markdown; ends with a newline.
    path
        The Markdown file.

    Raises
    ------
    ValueError
        If the file does not have both comments.
    """
    start = f"<!-- table: made by scripts/{script} -->\n"
    before, start_found, rest = path.read_text().partition(start)
    _, end_found, after = rest.partition(END)
    if not (start_found and end_found):
        raise ValueError(f"{path} has no place for the table of {script}.")
    path.write_text(f"{before}{start}{table}{END}{after}")
