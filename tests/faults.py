"""Faults on demand: make the n-th operation of the system fail, or be the last one; slow clocks."""

import os
import types

OPERATIONS = ("open", "read", "write", "fsync", "replace", "unlink", "stat", "fstat", "chmod")


class Faults:
    """Stand in for the module `os` of a store, and do something at its n-th operation.

    `at` counts from 1; 0 only records. `calls` has a tuple per operation: its name and what
    file it was on. A write that is hit writes half before.
    """

    def __init__(self, at=0, strike=None, lasting=False):
        self.at, self.strike, self.lasting = at, strike, lasting
        self.calls, self._names = [], {}

    @property
    def struck(self):
        return 0 < self.at <= len(self.calls)

    def __getattr__(self, name):
        operation = getattr(os, name)
        if name not in OPERATIONS:
            return operation
        return lambda *arguments: self._call(name, operation, arguments)

    def _call(self, name, operation, arguments):
        file = arguments[0]
        self.calls.append((name, os.path.basename(self._names.get(file, str(file)))))
        if self.struck and (self.lasting or len(self.calls) == self.at):
            if name == "write":
                os.write(file, bytes(arguments[1])[: len(arguments[1]) // 2])
            self.strike()
        result = operation(*arguments)
        if name == "open":
            self._names[result] = file
        return result


class Clock:
    """Stand in for the module `os` of a store whose files are stamped by another clock.

    It ticks every `tick` seconds and is `behind` by some.
    """

    def __init__(self, tick=1, behind=0):
        self.tick, self.behind = int(tick * 10**9), int(behind * 10**9)

    def __getattr__(self, name):
        operation = getattr(os, name)
        if name not in ("stat", "fstat"):
            return operation
        return lambda file: self._stamped(operation(file))

    def _stamped(self, found):
        fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        for name in ("st_mtime_ns", "st_ctime_ns"):
            fields[name] = (fields[name] - self.behind) // self.tick * self.tick
        return types.SimpleNamespace(**fields)


def error(number):
    """Return a strike that raises an error of the system."""

    def strike():
        raise OSError(number, os.strerror(number))

    return strike


def end():
    """Strike the process dead, without a word to anybody."""
    os._exit(9)


def in_child(work):
    """Run `work` in a forked process; return its exit status, 0 if it came to its end."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
