"""What nbmake does not see: an error inside a widget, and a notebook slower than its header says."""

import time

import nbmake.pytest_items
from nbmake.nb_result import NotebookError, NotebookResult
from nbmake.nb_run import NotebookRun

from rmm_lab.course import notebooks as course


class CheckedRun(NotebookRun):
    """A notebook's run, held to its stated seconds and scanned for errors inside widgets."""

    def execute(self) -> NotebookResult:
        start = time.perf_counter()
        result = super().execute()
        found = course.faults(result.nb, time.perf_counter() - start)
        if result.error is None and found:
            text = f"{self.filename.name}: {'; '.join(found)}"
            result.error = NotebookError(summary=text, trace=text, failing_cell_index=0)
        return result


nbmake.pytest_items.NotebookRun = CheckedRun
