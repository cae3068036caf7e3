"""The checks of notebook 10: right variants pass, wrong ones get the hint that is meant for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from answers import answers

from rmm_lab.course.exercises import nb10
from rmm_lab.evidence import tables
from rmm_lab.evidence.rows import task_scores
from rmm_lab.figures import results as pictures
from rmm_lab.reward import Step
from rmm_lab.search.problem import load_problem

WRONG, RIGHT = answers(r"""
## 10.layer_groups
def f(names):
# The stem is missing
    depth = 1 + max(int(n.split('.')[2]) for n in names if n.startswith('encoder.block.'))
    return {n: int(n.split('.')[2]) + depth * n.startswith('d') for n in names
            if '.block.' in n and 'relative' not in n}
# expected {
    return [0 for n in names]
# raised
    return {n: int(n[0]) for n in names}
# returns None
    groups = {}
# correct
    import re
    out, last = {}, max(int(m[1]) for n in names if (m := re.search(r"encoder\.block\.(\d+)", n)))
    for n in names:
        if n in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            continue
        m = re.match(r"(encoder|decoder)\.block\.(\d+)\.", n)
        if not m or "relative" in n:
            out[n] = -1
        else:
            out[n] = int(m[2]) + (last + 1) * (m[1] == "decoder")
    return out

## 10.score_choice
def f(log_probs, mask):
# mean over the tokens
    return torch.stack([torch.stack([x[m].mean() for x, m in zip(xs, ms)])
                        for xs, ms in zip(log_probs, mask)])
# You count padding
    return torch.sum(log_probs, 2)
# means over all T places
    return sum(log_probs.unbind(2)) / log_probs.shape[2]
# These are probabilities
    return torch.where(mask, log_probs.exp(), torch.ones(())).prod(2)
# their product
    return torch.where(mask, log_probs.exp(), torch.zeros(())).sum(2)
# sign is reversed
    return torch.where(mask, -log_probs, torch.zeros(())).sum(2)
# number of the chosen answer
    return torch.where(mask, log_probs, 0.0).sum(2).max(1).indices
# lowest log-probability
    return torch.where(mask, log_probs, 0.0).sum(2).min(1).indices
# expected shape
    return (log_probs * mask).sum(1)
# in place
    log_probs *= mask
    return log_probs.sum(2)
# correct
    out = torch.zeros(log_probs.shape[:2], dtype=torch.float64)
    for i in range(len(log_probs)):
        for j in range(log_probs.shape[1]):
            out[i, j] = log_probs[i, j][mask[i, j]].double().sum()
    return out
# correct
    return torch.where(mask, log_probs, 0.0).sum(2)

## 10.balanced_accuracy
def f(found, labels):
# plain accuracy
    return sum(a == b for a, b in zip(found, labels)) / len(labels)
# NaN
    return torch.stack([(found[labels == k] == k).float().mean() for k in range(9)]).mean()
# expected
    return found == labels
# correct
    shares = []
    for k in sorted(set(labels.tolist())):
        mine = [a == k for a, b in zip(found.tolist(), labels.tolist()) if b == k]
        shares.append(sum(mine) / len(mine))
    return sum(shares) / len(shares)

## 10.balanced_accuracy
def f(found, labels):
    a, b = found.tolist(), labels.tolist()
# group the rows by prediction
    shares = [sum(x == y for x, y in zip(a, b) if x == k) / a.count(k) for k in set(a)]
    return sum(shares) / len(shares)
# labels lacks
    n = max(a + b) + 1
    return sum(sum(x == y for x, y in zip(a, b) if y == k) / max(1, b.count(k)) for k in range(n)) / n
# do not average
    return sum(sum(x == y for x, y in zip(a, b) if y == k) / b.count(k) for k in set(b))
# worst answer alone
    return min(sum(x == y for x, y in zip(a, b) if y == k) / b.count(k) for k in set(b))

## 10.why
def f():
# correct
    return "c"
""")

# A frame for the wrong answers to the first exercise: each changes one rule.
GROUPS = """
def f(names):
    out = {}
    depth = 1 + max(int(n.split(".")[2]) for n in names if n.startswith("encoder.block."))
    for n in names:
        p = n.split(".")
        if p[-2] == "embed_tokens" or p[0] == "lm_head":
            %(copy)s
        if %(bias)s:
            out[n] = -1
        elif p[1] == "block":
            out[n] = %(block)s
        else:
            out[n] = %(rest)s
    return out
"""
RULES = {
    "copy": "continue",
    "bias": '"relative_attention_bias" in n',
    "block": 'int(p[2]) + depth * (p[0] == "decoder")',
    "rest": "-1",
}
LAST = 'max(out.values()) if "final" in n else -1'
WRONG += [
    ("10.layer_groups", GROUPS % (RULES | {"bias": "False"}), "stored in block 0"),
    ("10.layer_groups", GROUPS % (RULES | {"copy": "pass"}), "counted four times"),
    (
        "10.layer_groups",
        GROUPS % (RULES | {"block": 'int(p[2]) + (4 if p[0] == "decoder" else 0)'}),
        "blocks that occur in names",
    ),
    ("10.layer_groups", GROUPS % (RULES | {"block": "int(p[2])"}), "counted from 0 again"),
    (
        "10.layer_groups",
        GROUPS % (RULES | {"block": 'int(p[2][0]) + depth * (p[0] == "decoder")'}),
        "Block 10 and block 1",
    ),
    ("10.layer_groups", GROUPS % (RULES | {"rest": LAST}), "final norms come after"),
]
RIGHT.append(("10.layer_groups", GROUPS % RULES))


def test_references_by_hand():
    names = [
        *("shared.weight", "lm_head.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        f"encoder.block.0.{nb10.BIAS}",
        *("encoder.block.1.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"),
        "decoder.block.0.layer.1.EncDecAttention.q.weight",
    ]
    found = nb10.layer_groups(names)
    assert [found.get(name) for name in names] == [-1, None, 0, -1, 1, -1, 2]
    scores = nb10.score_choice(
        torch.tensor([[[-1.0, -2.0, -4.0], [-3.0, -5.0, -7.0]]]),
        torch.tensor([[[True, True, False], [True, False, False]]]),
    )
    assert scores.tolist() == [[-3.0, -3.0]]
    always_no = nb10.balanced_accuracy(torch.zeros(4).long(), torch.tensor([0, 0, 0, 1]))
    assert always_no == 0.5


def test_balanced_accuracy_is_scikit_learns():
    from sklearn.metrics import balanced_accuracy_score

    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        found, labels = torch.randint(0, 3, (2, 40), generator=generator)
        assert nb10.balanced_accuracy(found, labels) == pytest.approx(
            balanced_accuracy_score(labels, found)
        )


def test_the_agent_alone_never_found_colours():
    """What the notebook says of the recorded searches, and what option d's text says."""
    searches = tables.read("agent").query("group == 'qa' and setting == 'agent preset'")
    assert len(searches) >= 2
    tasks = task_scores(searches)
    assert tasks["colours"].max() < 20  # chance is 12.5
    assert tasks[["answers", "antonyms"]].max(axis=1).min() > 80
    assert searches["reward_split"].max() < 62  # colours everywhere has 66 on that split


@pytest.mark.slow
def test_random_paths_teach_answers_and_hardly_colours():
    """The quiz's reason, on other random paths than the notebook's."""
    torch.set_num_threads(1)
    problem = load_problem(("qa",), seed=0)
    scorer = problem.scorer(fraction=0.05, seed=0)
    rng = np.random.default_rng(11)
    rows = rng.integers(len(scorer.sources), size=(24, 9))

    def score(rows):
        names = [[scorer.sources[a] for a in row] for row in rows]
        paths = [tuple(Step(s, k) for k, s in enumerate(row, start=-1)) for row in names]
        return np.array([scorer.score(path, 0) for path in paths])

    found = score(rows)  # (24, 3): colours, answers, antonyms
    best = found[found.mean(1).argsort()[-6:]].mean(0)
    rise = best - found.mean(0)
    assert rise.argmax() == 1
    assert found[:, 0].mean() < 0.25
    colours = scorer.sources.index("colours")
    two = rows.copy()
    two[:, rng.permutation(9)[:2]] = colours
    whole = score([[colours] * 9]).mean()
    turned = score(two)
    assert turned.mean() - found.mean() < 0.3 * (whole - found.mean())
    gain = turned.mean(0) - found.mean(0)
    assert gain[0] > 0 > gain[1:].sum()  # what colours gains, the others lose


def test_pictures_show_what_they_are_given():
    figure = pictures.t5_picture(2, 3)
    words = " ".join(text.get_text().replace("\n", " ") for text in figure.axes[0].texts)
    assert "enc 1 layer 1" in words
    assert "dec 2 layer 4" in words
    drawn = np.array([[0.0, 0.5], [0.5, 1.0]])
    figure = pictures.hills_picture(drawn, {0: drawn, 9: drawn[1:]}, ("a", "b"), "a")
    left, right = figure.axes
    assert list(left.get_lines()[0].get_xdata()) == [25.0, 75.0]
    means = {line.get_label(): list(line.get_ydata()) for line in right.get_lines()}
    assert means["reward"] == [50.0, 75.0]
    assert means["a"] == [25.0, 50.0]
    assert means["b"] == [75.0, 100.0]
    figure = pictures.tokens_picture(
        [["a", "b"], ["c"]], np.array([[0.0, -2.0], [-1.0, 0]]), 1, "t"
    )
    assert [t.get_text() for t in figure.axes[0].texts] == ["a\n0.00", "b\n-2.00", "c\n-1.00"]
