"""Put what scripts measured where README shows it."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
END = "<!-- end of table -->"


def write_table(script: str, table: str) -> None:
    """Replace the table that stands between README's comment "made by ``script``" and the next.

    Parameters
    ----------
    script
        Name of the script, as in the comment.
    table
        Markdown, newline included.
    """
    start = f"<!-- table: made by scripts/{script} -->\n"
    before, found, rest = README.read_text().partition(start)
    if not found:
        raise ValueError(f"README.md has no place for the table of {script}.")
    README.write_text(f"{before}{start}{table}{END}{rest.partition(END)[2]}")
