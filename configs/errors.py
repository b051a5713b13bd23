"""Errors that print a message without a traceback: bad input (exit code 2) and failed training (exit code 1)."""


class InputError(ValueError):
    """Bad input: a recipe, an option, an environment or a data set that cannot be used as it is.

    The message says what is wrong (with the values), the consequence, and the remedy; one line for each problem.
    """

    everywhere = True  # whether every rank raises it, so that only one of them needs to print it

    @classmethod
    def from_problems(cls, headline: str, problems: list[str], most: int | None = None) -> "InputError":
        """Return one error that counts all `problems` and lists them, or the first `most`, one per line."""
        if len(problems) == 1:
            return cls(f"{headline}: {problems[0]}")
        named = problems[:most]
        left = len(problems) - len(named)
        lines = [*named, f"and {left:,} more"] if left else named
        return cls("\n".join([f"{headline}: {len(problems):,} problems", *(f"  - {line}" for line in lines)]))


class TrainingFailed(RuntimeError):
    """Training cannot continue, for a reason that no check of the input could have found, such as a NaN loss."""

    everywhere = True  # as for InputError


class NonFiniteError(TrainingFailed):
    """A loss or a gradient became NaN or infinite."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the host; needs no torch."""
    of_gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or of_gpu or "can't allocate memory" in str(error)
