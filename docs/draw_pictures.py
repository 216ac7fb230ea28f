"""Pictures of docs/plots.md: runs the code of the page, and saves each picture under the name that the page shows.

    python docs/draw_pictures.py [FOLDER]

FOLDER is by default docs/images.
"""

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot  # after the choice of a backend without a display

PAGE = Path(__file__).with_name("plots.md")
CODE_OR_PICTURE = re.compile(r"^```python\n(?P<code>.*?)^```|^!\[[^\]]*\]\(images/(?P<picture>[\w.]+)\)", re.M | re.S)


def draw(folder: Path) -> list[str]:
    """Draws every picture of the page into a folder that exists; gives their names in order."""
    namespace: dict[str, object] = {}
    names = []
    for found in CODE_OR_PICTURE.finditer(PAGE.read_text(encoding="utf-8")):
        if found["code"] is not None:
            pyplot.close("all")
            exec(found["code"], namespace)
        else:
            # Without the version of matplotlib, which would change the file at every update.
            pyplot.savefig(folder / found["picture"], dpi=80, metadata={"Software": None})
            names.append(found["picture"])
    pyplot.close("all")
    return names


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE.with_name("images"))
