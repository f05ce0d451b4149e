"""How a study tells what it is doing, without knowing who listens."""


class Observer:
    """Hears of stages and steps; this one stays silent. A front end overrides what it shows."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins; the one before it has ended."""

    def step(self, note: str = "") -> None:
        """One step of the present stage is done; `note` says what came of it."""

    def note(self, text: str) -> None:
        """What came of work within a step that is done already."""

    def best(self, text: str) -> None:
        """The best result so far changed."""

    def message(self, text: str) -> None:
        """Something worth a line of its own."""
