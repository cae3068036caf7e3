"""What nbmake does not see: an error inside a widget, what is too slow, or too wide for a laptop's screen."""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbmake.nb_run
import nbmake.pytest_items
from nbclient import NotebookClient
from nbmake.nb_result import NotebookError, NotebookResult
from nbmake.nb_run import NotebookRun
from traitlets.config import Config

from rmm_lab.course import notebooks as course

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import screen

BROWSER = screen.browser()


class Client(NotebookClient):
    """Its kernel talks through files, not ports: those are chosen long before the kernel takes them, and of
    two workers that start kernels at the same time one may find its own taken, and wait for ever."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="kernel")  # until nobody needs it
        files = Config(KernelManager={"transport": "ipc", "ip": f"{self.folder.name}/socket"})
        super().__init__(*args, config=files, **options)


class CheckedRun(NotebookRun):
    """A notebook's run, held to its stated seconds, scanned for errors inside widgets, and measured."""

    def execute(self) -> NotebookResult:
        start = time.perf_counter()
        result = super().execute()
        found = course.faults(result.nb, time.perf_counter() - start)
        if BROWSER is not None:
            found += screen.overflow(result.nb, BROWSER)
        if result.error is None and found:
            text = f"{self.filename.name}: {'; '.join(found)}"
            result.error = NotebookError(summary=text, trace=text, failing_cell_index=0)
        return result


nbmake.pytest_items.NotebookRun = CheckedRun
nbmake.nb_run.NotebookClient = Client
