"""Exercises of notebook 12: wrong answers, written as students write them, meet the hint that is meant."""

from __future__ import annotations

import numpy as np

from rmm_lab.course.exercises import nb12

WRITE = """
def f(next_logits, prompt, end, most):
    ids, new = list(prompt), []
    while len(new) < most:
        token = int(np.%s(next_logits(%s)))
        %s
        new.append(token)
        ids.append(token)
        %s
    return %s
"""
STOP = "if token == end: break"
PASS = "def f(logits, ids, start):\n return %s(int(logits[t - 1].argmax()) == ids[t] for t in range(%s))"
WRONG = [
    ("12.generate", WRITE % ("argmax", "ids", STOP, "", "ids"), "prompt is in your answer"),
    ("12.generate", WRITE % ("argmax", "ids", "", STOP, "new"), "end token is in your answer"),
    ("12.generate", WRITE % ("argmax", "ids", "", "", "new"), "goes on after the end"),
    ("12.generate", WRITE % ("argmax", "[ids[-1]]", STOP, "", "new"), "last one alone"),
    ("12.generate", WRITE % ("argmax", "prompt", STOP, "", "new"), "from the prompt alone"),
    ("12.generate", WRITE % ("argmin", "ids", STOP, "", "new"), "least probable"),
    ("12.generate", WRITE % ("argmax", "ids", STOP, "", "None"), "returns None"),
    ("12.one_pass", PASS % ("all", "1, len(ids)"), "the prompt is predicted"),
    ("12.one_pass", PASS % ("all", "start, len(ids) - 1"), "last token is not checked"),
    ("12.one_pass", PASS % ("all", "start + 1, len(ids)"), "first token of the answer"),
    ("12.one_pass", PASS % ("any", "start, len(ids)"), "One right token"),
    ("12.one_pass", (PASS % ("all", "start, len(ids)")).replace("t - 1", "t"), "start - 1"),
    ("12.one_pass", "def f(l, i, s):\n return np.mean(l.argmax(1)[s - 1:-1] == i[s:])", "share of tokens"),
    ("12.compound", "def f():\n return 'a'", "same few answers"),
    ("12.recipe", "def f():\n return 'I do what feels right, and then more of it. ' * 5", "there are ten"),
]  # fmt: skip
RIGHT = [
    ("12.generate", WRITE % ("argmax", "np.array(ids)", STOP, "", "np.array(new).tolist()")),
    ("12.one_pass", PASS % ("all", "start, len(ids)")),
    ("12.one_pass", "def f(l, ids, s):\n return (l.argmax(1)[s - 1:-1] == ids[s:]).all()"),
]


def test_the_references_by_hand():
    def counts_up(ids):
        return np.eye(9)[ids[-1] + 1]

    assert nb12.generate(counts_up, [3], 6, 9) == [4, 5]
    assert nb12.generate(counts_up, [3], 6, 1) == [4]
    logits = np.eye(9)[[7, 4, 5, 6]]  # after 2 comes 7, after 3 comes 4, ...
    assert nb12.is_right(logits, np.array([2, 3, 4, 5]), 2)
    assert not nb12.is_right(logits, np.array([2, 3, 4, 5]), 1)
    assert not nb12.is_right(logits, np.array([2, 3, 4, 6]), 2)
