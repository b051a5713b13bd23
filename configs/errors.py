"""Failures that are told in a message, without a traceback: bad input (exit code 2) and failed training (1)."""


class InputError(ValueError):
    """Bad input: a recipe, an option, an environment or a data set that cannot be used as it is.

    The message says what is wrong (with the values), what follows from it, and how to mend it. Several problems found
    together are joined by newlines.

    Attributes:
        everywhere: whether every rank raises it, so that one of them is enough to tell the person.
    """

    everywhere = True

    @classmethod
    def from_problems(cls, headline: str, problems: list[str], most: int | None = None) -> "InputError":
        """One error that counts all `problems` and names them, or the first `most`, each on a line of its own."""
        if len(problems) == 1:
            return cls(f"{headline}: {problems[0]}")
        named = problems[:most]
        left = len(problems) - len(named)
        lines = [*named, f"and {left:,} more"] if left else named
        return cls("\n".join([f"{headline}: {len(problems):,} problems", *(f"  - {line}" for line in lines)]))


class TrainingFailed(RuntimeError):
    """Training cannot go on, and not for a mistake in the input that could have been found before: a NaN loss, say."""


class NonFiniteError(TrainingFailed):
    """A loss or a gradient became NaN or infinite."""
