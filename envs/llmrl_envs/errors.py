"""The error for everything that a person typed or a file contained."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, told in terms of the input: what is wrong, what was expected, what was got, where.

    The command line prints it without a traceback and exits with code 2; a library user sees a `ValueError`.

    Args:
        what: One sentence that names the problem.
        expected: What would have been right.
        got: What was found instead.
        where: File, line, or configuration key.

    >>> print(UserError("unknown objective", expected="'classification'", got="'clasification'", where="task"))
    unknown objective
      where:    task
      expected: 'classification'
      got:      'clasification'
    """

    def __init__(
        self,
        what: str,
        *,
        expected: str | None = None,
        got: object | None = None,
        where: str | None = None,
    ) -> None:
        self.what = what
        self.expected = expected
        self.got = got
        self.where = where
        lines = [what]
        for label, value in (("where", where), ("expected", expected), ("got", got)):
            if value is not None:
                lines.append(f"  {label + ':':<9} {value}")
        super().__init__("\n".join(lines))
