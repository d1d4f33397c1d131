"""Progress bars of calls."""

import io

from tqdm.auto import tqdm

from jaxinfer.results.progress import COMPILING, RUNNING, Progress


def test_the_bar_says_while_programs_are_compiled():
    compiles, shown = True, io.StringIO()
    with tqdm(total=1, desc=RUNNING, file=shown, mininterval=0) as bar:
        progress = Progress(bar, [], lambda: compiles)
        progress.show()
        assert f"{COMPILING}: " in shown.getvalue()
        drawn = len(shown.getvalue())
        progress.show()
        assert len(shown.getvalue()) == drawn, "drawn again only if it changes"
        compiles = False
        progress.show()
        assert shown.getvalue().count(RUNNING) == 2
