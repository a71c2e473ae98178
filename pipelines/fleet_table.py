"""The fleet in the terminal: a live table, or a line at each start and end where there is no terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from pipelines.adapters.ray_fleet import Ended, News

COLUMNS = ("line", "state", "node", "epoch", "images/s", "loss", "ETA")


@dataclass
class Row:
    """What is known of a line."""

    state: str = "waiting"
    news: "News | None" = None

    def cells(self) -> list[str]:
        """All but the line's name."""
        if self.news is None:
            return [self.state, *[""] * (len(COLUMNS) - 2)]
        news = self.news
        eta = news.seconds / news.done * (news.epochs - news.done) if news.done and self.state == "training" else None
        return [
            self.state,
            news.node,
            f"{news.done}/{news.epochs}",
            "" if news.images_per_s is None else f"{news.images_per_s:.0f}",
            "" if news.loss is None else f"{news.loss:.4f}",
            "" if eta is None else f"{eta:.0f} s",
        ]


class FleetTable:
    """A row a line, in their order."""

    def __init__(self, lines: Sequence[str], console: Console | None = None) -> None:
        self.rows = {line: Row() for line in lines}
        self.console = console or Console()
        self._live = Live(console=self.console, get_renderable=self.table, refresh_per_second=2, transient=False)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def tell(self, news: Sequence["News"]) -> None:
        """What the lines' processes said since the last time. News of a line that was begun again replaces what was."""
        for one in news:
            row = self.rows[one.line]
            if row.state not in ("trained", "failed"):
                row.state, row.news = "training", one
            if one.done == 0:
                self._say(f"train {one.line}: started on node {one.node}")

    def end(self, ended: "Ended") -> None:
        """A line that is trained or failed."""
        row = self.rows[ended.line]
        row.state = "failed" if ended.error else "trained"
        left = sum(other.state in ("waiting", "training") for other in self.rows.values())
        what = ended.error.strip().splitlines()[-1] if ended.error else f"bundle {ended.digest[:12]}"
        self._say(f"train {ended.line}: {row.state} in {ended.seconds:.1f} s, {what}; {left} lines left")

    def table(self) -> Table:
        """As it stands."""
        states = [row.state for row in self.rows.values()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        shown = Table(title=f"fleet: {counts}")
        for column in COLUMNS:
            shown.add_column(column)
        for line, row in self.rows.items():
            shown.add_row(line, *row.cells())
        return shown

    def _say(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
