"""papermill's engine, writing a notebook at most every ten seconds and at its end, not twice a cell."""

from __future__ import annotations

from typing import Any

from papermill.engines import NBClientEngine, papermill_engines

NAME = "vfmlab"
EVERY = 10  # seconds; a notebook with figures of some MB takes longer to write than its cells to run


class Engine(NBClientEngine):
    """Runs a notebook's cells in a kernel."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, *arguments: Any, **options: Any) -> Any:
        """As papermill's own; whatever ends it, the cells that ran are written at the end."""
        write = nb_man.save

        def save(**_: Any) -> None:
            if (nb_man.now() - nb_man.last_save_time).total_seconds() >= EVERY:
                write()

        nb_man.save = save
        try:
            return super().execute_managed_notebook(nb_man, *arguments, **options)
        finally:
            nb_man.save = write


papermill_engines.register(NAME, Engine)
