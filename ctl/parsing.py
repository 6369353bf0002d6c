"""argparse with sentences of ours for what it finds wrong: one line that names flag and value, and says what to do."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import NoReturn

from cellvisor.core.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Reads the arguments of one verb. Raises UsageError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError for one of argparse's messages."""
        raise UsageError(self._said(message), hint=f"see {self.prog} --help")

    def check_flags(self, argv: list[str]) -> None:
        """Name a flag that does not exist before anything else is found missing. Raises UsageError."""
        for word in argv[:argv.index("--")] if "--" in argv else argv:
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                close = difflib.get_close_matches(flag, self._option_string_actions, 1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise UsageError(f"unknown flag {flag[:80]}", hint=f"{hint}see {self.prog} --help")

    def _said(self, message: str) -> str:
        if found := re.fullmatch(r"argument (?:-\w/)?(\S+): expected one argument", message):
            action = self._option_string_actions.get(found[1])
            return f"{found[1]} has no value: write {found[1]} {action.metavar if action and action.metavar else '...'}"
        if found := re.fullmatch(r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)", message):
            if "|" in found[1]:  # the metavar has them
                return f"{found[2][:80]} is none of {found[1].replace('|', ', ')}"
            return f"{found[1]} {found[2][:80]} is none of {found[3].replace(chr(39), '')}"
        if found := re.fullmatch(r"the following arguments are required: (.+)", message):
            return f"{found[1]} {'are' if ', ' in found[1] else 'is'} missing"
        if found := re.fullmatch(r"one of the arguments (.+) is required", message):
            return f"one of {found[1].replace(' ', ', ')} is missing"
        if found := re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL):
            return f"unknown flag {found[1]}" if found[1].startswith("-") else f"unexpected argument {found[1][:80]!r}"
        if found := re.fullmatch(r"argument (\S+): ignored explicit argument .+", message):
            return f"{found[1]} takes no value"
        return message.removeprefix("argument ")
