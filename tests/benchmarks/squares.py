"""A small object for another process."""

import os

from experiments.common.errors import InputError


class Squares:
    """Squares of numbers, moved by an offset."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def squared(self, number: int) -> int:
        if not isinstance(number, int):
            raise ValueError(f"{number!r} is not a number")
        return number**2 + self._offset

    def squared_aloud(self, number: int) -> int:
        print("not a reply")
        os.system("echo nor this")
        return self.squared(number)

    def read(self) -> None:
        raise InputError("there is no file of squares")

    def process(self) -> int:
        return os.getpid()

    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    def filled(self, megabytes: int) -> int:
        return len(bytearray(b"x") * (megabytes * 10**6)) // 10**6

    def leave(self, code: int) -> None:
        os._exit(code)
