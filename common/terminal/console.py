"""The console that commands print to."""

from typing import IO, Any

from rich.console import Console

from common.remote.places import shown


class Terminal(Console):
    """Prints text unchanged: lines are not wrapped to the terminal, and markup is not interpreted."""

    def __init__(
        self,
        *,
        stderr: bool = False,
        file: IO[str] | None = None,
        width: int | None = None,
        quiet: bool = False,
        force_terminal: bool | None = None,
    ) -> None:
        """Print to standard output, standard error or a file; the width of tables is by default the terminal's."""
        super().__init__(
            stderr=stderr,
            file=file,
            width=width,
            quiet=quiet,
            force_terminal=force_terminal,
            highlight=False,
            markup=False,
        )
        self.outlives_its_reader = False
        """Whether to stop printing when a pipe is closed, instead of ending the process: for jobs that must finish."""
        self.has_lost_its_reader = False

    def print(self, *objects: Any, **options: Any) -> None:
        """Like rich's `print`, but only tables are fitted to the terminal, and URLs stand for their copies."""
        options.setdefault("soft_wrap", all(isinstance(each, str) for each in objects))
        super().print(*(shown(each) if isinstance(each, str) else each for each in objects), **options)

    def on_broken_pipe(self) -> None:
        """The reader has closed the pipe. Raises SystemExit, unless the job must finish."""
        self.has_lost_its_reader = True
        try:
            super().on_broken_pipe()  # leaves the console quiet
        except SystemExit:
            if not self.outlives_its_reader:
                raise
