"""What commands print to."""

from typing import IO, Any

from rich.console import Console


class Terminal(Console):
    """Text is printed as it is: a line stays a line, however narrow the terminal and whatever looks like markup."""

    def __init__(
        self,
        *,
        stderr: bool = False,
        file: IO[str] | None = None,
        width: int | None = None,
        quiet: bool = False,
        force_terminal: bool | None = None,
    ) -> None:
        """Standard output, standard error or a file; the width, of tables, is by default the terminal's."""
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
        """Whether to fall silent where a pipe is closed, instead of ending the process: for work that ends in order."""
        self.has_lost_its_reader = False

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's; only tables are fitted into the terminal."""
        options.setdefault("soft_wrap", all(isinstance(each, str) for each in objects))
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Whoever read the output has enough. Raises SystemExit, unless the work outlives that."""
        self.has_lost_its_reader = True
        try:
            super().on_broken_pipe()  # leaves the console quiet
        except SystemExit:
            if not self.outlives_its_reader:
                raise
