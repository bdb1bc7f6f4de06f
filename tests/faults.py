"""Faults on demand: make the n-th operation of the system fail, or be the last one."""

import os

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
