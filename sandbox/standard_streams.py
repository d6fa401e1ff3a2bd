"""Programs that read their standard input and answer on their standard output, judged by what they answer."""

from __future__ import annotations

from sandbox.python import USUAL, Limits, TestRun, run_tests

JUDGE = '''
import atexit, math, os, sys, threading

def answer_of(program, given):
    """What the program writes to its standard output, where that is what the process gets and gives as a whole."""
    for number, name, text in ((0, "given", given), (1, "answer", "")):
        with open(name, "w") as file:
            file.write(text)
        place = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY)
        os.dup2(place, number)
        os.close(place)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__):
        if not stream.closed:
            stream.flush()
    with open("answer") as file:
        return file.read()

def is_same(word, expected):
    """Whether two words are the same, or numbers of which the expected one has decimals and the other is as good."""
    if word == expected:
        return True
    try:
        return "." in expected and math.isclose(float(word), float(expected), rel_tol=1e-6, abs_tol=1e-6)
    except ValueError:
        return False

def judge(program, given, expected):
    to_us = os.dup(1)
    words, expected_words = answer_of(program, given).split(), expected.split()
    os.dup2(to_us, 1)
    assert len(words) == len(expected_words), f"{len(words)} words, expected {len(expected_words)}"
    for number, (word, expected_word) in enumerate(zip(words, expected_words)):
        assert is_same(word, expected_word), f"word {number} is {word[:80]!r}, expected {expected_word[:80]!r}"
'''


def run_on_input(
    program: str, given: str, expected: str, *, limits: Limits = USUAL, unprotected: bool = False
) -> TestRun:
    """Run a Python program as a script on an input; it has passed where it answers the expected words.

    White space between words does not count, and numbers with decimals may be off by one part in a million. A program
    that ends itself by os._exit has not passed. All that `run_tests` says of its tests holds here too, ValueError
    included.
    """
    return run_tests(
        "", f"{JUDGE}\njudge({program!r}, {given!r}, {expected!r})", limits=limits, unprotected=unprotected
    )
