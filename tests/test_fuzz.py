"""A fuzz test: whatever a folder or a command line holds, a command ends in 0 or 2, and in one sentence.

A thousand cases by default, the same ones on every run; ``RMM_LAB_FUZZ=20000`` asks for more, for a
nightly run. Each case alters one thing of a problem that is read well: config.json, a header of safetensors,
pictures, rows, a run folder, or the options. What a case found has a test with a name in test_plain_data.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import write_images, write_model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lm_models import hf_model as language_model
from lm_models import write_tokenizer as write_language_tokenizer
from PIL import Image
from t5_models import hf_model, tuned, write_t5, write_texts
from transformers import ViTConfig, ViTForImageClassification

from rmm_lab.__main__ import main
from rmm_lab.families.checkpoint import read_checkpoint
from rmm_lab.search.run_folder import from_csv

CASES = int(os.environ.get("RMM_LAB_FUZZ", "1000"))
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2} | {
    "num_attention_heads": 2
}
MOST_S = 60  # a case that takes longer hangs
pytestmark = [pytest.mark.slow, pytest.mark.timeout(max(300, CASES))]


def cases(share: float) -> Callable:
    """So many of all cases, the same ones each time; a failure is shrunk."""
    return settings(
        max_examples=max(1, round(share * CASES)),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


# ------------------------------------------------------------------------------------- the commands


class Hangs(BaseException):
    """A case has taken ``MOST_S``; no Exception, so that nothing on the way takes it for its own."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hangs

    start, before = time.monotonic(), signal.signal(signal.SIGALRM, ring)
    left, _ = signal.setitimer(signal.ITIMER_REAL, MOST_S)  # of the whole test's timeout
    try:
        yield
    finally:
        left = max(0.01, left - (time.monotonic() - start)) if left else 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


def on_disk(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p): p.read_bytes() if p.is_file() and not p.is_symlink() else None
        for p in folder.rglob("*")
    }


def check(argv: list[str], folder: Path) -> int:
    """Run a command in a folder, and its exit code, which is 0 or 2.

    With 2 there is one sentence on stderr (or a box of the parser's), and the disk is as before.
    """
    before = on_disk(folder)
    out, err = io.StringIO(), io.StringIO()
    with (
        in_time(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        # Told on stderr as outside of pytest, which collects them.
        warnings.showwarning = lambda message, kind, *_: print(kind.__name__, message, file=err)
        try:
            code, parsed = main(argv), True
        except SystemExit as stop:
            code, parsed = stop.code, False
    assert code in (0, 2), (code, argv, err.getvalue())
    assert "Traceback" not in err.getvalue()
    if code == 0:
        assert parsed or out.getvalue(), "help was asked for"
        return 0
    lines = [line for line in err.getvalue().splitlines() if line.strip() and "step/s" not in line]
    if parsed:
        assert len(lines) == 1, err.getvalue()
        assert lines[0].startswith("error: ")
    else:
        assert out.getvalue() or lines
    assert on_disk(folder) == before
    return 2


class World:
    """Problems that are read well, and commands that read them; what they make goes to a folder apart."""

    def __init__(self, root: Path) -> None:
        near = read_checkpoint(write_model(root / "vit" / "base", 0)).weights
        for i in (1, 2):
            write_model(root / "vit" / f"e{i}", i, near=near)
        for i in (1, 2):
            write_images(root / f"i{i}", i, per_class=2)
        t5 = hf_model("t5", 1)
        for i, name in enumerate(("base", "e1", "e2")):
            write_t5(root / "t5" / name, tuned(t5, i) if i else t5)
        for i in (1, 2):
            write_texts(root / f"t{i}", i, fixed=i == 2, n=3)
        config = ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=1)
        ViTForImageClassification(config).save_pretrained(root / "hf" / "base")
        processor = {"image_mean": [0.5], "image_std": [0.5], "size": {"height": 8, "width": 8}}
        processor |= {"resample": 2, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}}
        (root / "hf" / "base" / "preprocessor_config.json").write_text(json.dumps(processor))
        language_model("llama").save_pretrained(root / "lm" / "base")
        write_language_tokenizer(root / "lm" / "base")
        self.root, self.case = root, root / "case"

    def fresh(self, *parts: str) -> Path:
        """An empty folder of this case with copies of some of the world's."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        os.chdir(self.case)  # where anything written by mistake shows
        for part in parts:
            shutil.copytree(self.root / part, self.case / part, symlinks=True)
        return self.case

    def finetune(self, kind: str, base: Path | None = None, data: Path | None = None) -> list[str]:
        option, own = ("--images", "i1") if kind in ("vit", "hf") else ("--texts", "t1")
        base, data = base or self.root / kind / "base", data or self.root / own
        words = [
            "finetune",
            "--base",
            str(base),
            option,
            str(data),
            "--out",
            str(self.case / "out"),
        ]
        return [*words, "--steps", "1", "--batch-size", "2"]

    def merge(self, kind: str, *experts: Path, data: Path | None = None) -> list[str]:
        option, own = ("--images", "i") if kind == "vit" else ("--texts", "t")
        experts = experts or (self.root / kind / "e1",)
        words = ["--base", str(self.root / kind / "base"), option]
        words += [str(data or self.root / f"{own}1"), str(self.root / f"{own}2")]
        words += ["--experts", *map(str, experts), str(self.root / kind / "e2")]
        words += ["--preset", "agent", "--compare", "paper", "--episodes", "1", "--quiet"]
        return [*words, "--operators", "ties", "--run-dir", str(self.case / "run")]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    """In a folder of its own; tables and pictures of results, which take most of the time, are left out."""
    root = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("rmm_lab.figures.render.png", lambda figure: b"")
        patch.setattr("rmm_lab.search.report.evaluate_on_test", lambda *_: [])
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield World(root)


# -------------------------------------------------------------------------------------- strategies

# What is odd in any place: numbers at the ends, texts that mean something elsewhere.
NUMBERS = st.one_of(
    st.sampled_from(
        [0, 1, -1, 2, 3, 4, 8, 16, 511, 513, 2**31, 2**63, 10**30, 10**400, 0.0, 0.5, -0.5, 1e-9]
    ),
    st.sampled_from([1e30, float("nan"), float("inf"), float("-inf")]),
    st.integers(-(2**70), 2**70),
    st.floats(),
)
TEXTS = st.one_of(
    st.sampled_from(
        [
            *(
                "",
                ".",
                "..",
                "/",
                "~",
                "hf-hub:a/b",
                "local-dir:/",
                "/etc/passwd",
                "a/b",
                "\0",
                "\n",
            ),
            *(
                "\u200b",
                "\ud800",
                "\u2028",
                "é",
                "e\u0301",
                "$a_{$",
                "vit_base_patch16_224",
                "resnet18",
            ),
            *(
                "vit",
                "t5",
                "gpt2",
                "gelu",
                "relu",
                "token",
                "avg",
                "flash_attention_2",
                "eager",
                "true",
            ),
            *("<pad>", "x" * 300, "None", "[1]", "{", "%s", "\x1b[31m", "😀", "class0", "class1"),
        ]
    ),
    st.text(max_size=8),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(
    SCALARS,
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    ),
    st.integers(1, 3000).map(lambda n: Deep(n)),
)


class Deep:
    """n lists in each other, which ``json.dumps`` cannot write."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __repr__(self) -> str:
        return f"Deep({self.n})"


def to_json(value: object) -> str:
    """JSON with what Python's would not write: ``Deep``."""
    text = json.dumps(value, default=lambda deep: f"deep {deep.n} deep")
    for part in text.split('"deep ')[1:]:
        n = part.split(" ")[0]
        text = text.replace(f'"deep {n} deep"', "[" * int(n) + "]" * int(n), 1)
    return text


BYTES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"", b"\xff", b"\xef\xbb\xbf", b"\0", b"\r", b"{}", b"[]", b"null", b"NaN", b'"']
    ),
)


@st.composite
def bent_bytes(draw, content: bytes) -> bytes:
    """A file's content cut, with a piece replaced, or put in."""
    start = draw(st.integers(0, len(content)))
    stop = draw(st.one_of(st.just(start), st.just(len(content)), st.integers(start, len(content))))
    return content[:start] + draw(BYTES) + content[stop:]


def places(value: object, above: tuple = ()) -> list[tuple]:
    """All places of a JSON value."""
    out = [above] if above else []
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            out += places(inner, (*above, key))
    return out


def put(value: object, place: tuple, new: object) -> None:
    for key in place[:-1]:
        value = value[key]
    value[place[-1]] = new


GONE = object()
MORE = (
    *("checkpoint_path", "cache_dir", "pretrained", "device", "dtype", "pretrained_cfg_overlay"),
    *(
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "quantization_config",
        "return_dict",
    ),
    *(
        "output_attentions",
        "rmm_lab",
        "label_names",
        "num_classes",
        "head_dim",
        "img_size",
        "features_only",
    ),
    *(
        "torch_dtype",
        "layer_types",
        "decoder_start_token_id",
        "dense_act_fn",
        "is_decoder",
        "tie_word_embeddings",
    ),
    *(
        "input_size",
        "mean",
        "std",
        "crop_pct",
        "interpolation",
        "global_pool",
        "pos_embed",
        "block_fn",
    ),
)


@st.composite
def bent_json(draw, text: str, more: tuple[str, ...] = MORE) -> str:
    """A JSON file with one to three of its values replaced, removed or added; now and then broken bytes."""
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        all_places = places(value) or [("a",)]
        inside = [p for p in all_places if isinstance(_at(value, p), dict)]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        place = draw(st.sampled_from(all_places))
        if action == "add":
            above = draw(st.sampled_from([(), *inside]))
            place = (*above, draw(st.sampled_from(more) | TEXTS))
            put(value, place, draw(VALUES))
        elif action == "remove" and isinstance(_at(value, place[:-1]), dict):
            del _at(value, place[:-1])[place[-1]]
        else:
            put(value, place, draw(VALUES))
    return to_json(value)


def _at(value: object, place: tuple) -> object:
    for key in place:
        value = value[key]
    return value


@contextlib.contextmanager
def bent(file: Path, content: bytes) -> Iterator[None]:
    """A file with another content; a link or a hard one is cut first."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    yield


# -------------------------------------------------------------------------------------- the cases


@cases(0.35)
@given(data=st.data())
def test_config(world, data):
    kind = data.draw(st.sampled_from(["vit", "vit", "vit", "t5", "t5", "hf", "hf", "lm"]))
    other = data.draw(st.integers(0, 4))
    beside = {"vit": (), "hf": ("preprocessor_config.json",)}
    names = ["config.json", *beside.get(kind, ("tokenizer_config.json",))]
    name = data.draw(st.sampled_from(names))
    case = world.fresh(f"{kind}/base")
    file = case / kind / "base" / name
    content = file.read_bytes()
    raw = data.draw(st.integers(0, 9)) == 0
    strategy = bent_bytes(content) if raw else bent_json(content.decode())
    new = data.draw(strategy)
    file.write_bytes(new if isinstance(new, bytes) else new.encode("utf-8", "surrogatepass"))
    if not other and kind == "vit":
        check(world.merge(kind, file.parent), case)
    else:
        check(world.finetune(kind, base=file.parent), case)


@cases(0.2)
@given(data=st.data())
def test_weights(world, data):
    kind = data.draw(st.sampled_from(["vit", "vit", "t5", "t5", "hf", "lm"]))
    name = data.draw(st.sampled_from(["model.safetensors"] * 4 + ["tokenizer.json"]))
    name = "model.safetensors" if kind in ("vit", "hf") else name
    case = world.fresh(f"{kind}/base")
    file = case / kind / "base" / name
    content = file.read_bytes()
    how = data.draw(st.sampled_from(["header", "header", "names", "bytes"]))
    if how == "bytes" or name != "model.safetensors":
        content = data.draw(bent_bytes(content))
    else:
        n = int.from_bytes(content[:8], "little")
        header, rest = json.loads(content[8 : 8 + n]), content[8 + n :]
        if how == "names":
            tensors = [key for key in header if key != "__metadata__"]
            old = data.draw(st.sampled_from(tensors))
            new = data.draw(
                st.sampled_from([*tensors, "head.extra", "module.x", "blocks.9.x"]) | TEXTS
            )
            header[new] = header.pop(old)
            text = to_json(header)
        else:
            dtypes = ("I64", "BOOL", "F64", "F16", "BF16", "F8_E4M3", "U8", "C64")
            text = data.draw(bent_json(json.dumps(header), ("dtype", "shape", "data_offsets")))
            if data.draw(st.booleans()):
                text = text.replace('"F32"', f'"{data.draw(st.sampled_from(dtypes))}"', 1)
        head = text.encode("utf-8", "surrogatepass")
        content = len(head).to_bytes(8, "little") + head + rest
    file.write_bytes(content)
    check(world.finetune(kind, base=file.parent), case)


NAMES = st.one_of(
    st.sampled_from(
        [
            *(
                "train",
                "test",
                "reward",
                "val",
                "tets",
                "trian",
                "Test",
                "class0",
                "class1",
                "class0 ",
            ),
            *("class0\u200b", "x", ".hidden", "__MACOSX", "é", "e\u0301", "a.png", "10", "$a$"),
        ]
    ),
    st.text(min_size=1, max_size=5).filter(
        lambda t: not set(t) & set("/\0") and t not in (".", "..")
    ),
)


@st.composite
def pictures(draw) -> bytes:
    """A small picture of any kind, now and then with bent bytes."""
    mode = draw(st.sampled_from(["L", "RGB", "RGBA", "P", "1", "I;16", "LA", "CMYK", "F"]))
    size = (draw(st.sampled_from([1, 2, 8, 9, 300])), draw(st.sampled_from([1, 8, 17])))
    form = draw(st.sampled_from(["png", "gif", "bmp", "tiff", "jpeg", "webp", "ppm", "eps"]))
    stream = io.BytesIO()
    try:
        Image.new(mode, size).save(stream, form)
    except (OSError, ValueError, KeyError):
        Image.new("L", size).save(stream, "png")
    content = stream.getvalue()
    return draw(bent_bytes(content)) if draw(st.booleans()) else content


@cases(0.15)
@given(data=st.data())
def test_pictures(world, data):
    case = world.fresh("i1")
    root = case / "i1"
    for _ in range(data.draw(st.integers(1, 3))):
        there = sorted(p for p in root.rglob("*"))
        action = data.draw(
            st.sampled_from(["picture", "picture", "rename", "remove", "odd", "folder"])
        )
        if not there:
            break
        place = data.draw(st.sampled_from(there))
        files = [p for p in there if p.is_file() and not p.is_symlink()]
        with contextlib.suppress(OSError):  # a name that the disk does not take
            if action == "picture" and files:
                data.draw(st.sampled_from(files)).write_bytes(data.draw(pictures()))
            elif action == "rename":
                place.rename(place.with_name(data.draw(NAMES)))
            elif action == "remove":
                shutil.rmtree(
                    place
                ) if place.is_dir() and not place.is_symlink() else place.unlink()
            elif action == "folder":
                (place.parent / data.draw(NAMES)).mkdir()
            elif files:
                file = data.draw(st.sampled_from(files))
                file.unlink()
                odd(
                    file,
                    data.draw(st.sampled_from(["pipe", "folder", "zero", "loop", "link", "empty"])),
                )
    check(world.finetune("vit", data=root), case)


def odd(file: Path, what: str) -> None:
    """Something else than a regular file, or an odd one."""
    if what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    elif what == "empty":
        file.touch()
    else:
        file.symlink_to({"zero": "/dev/zero", "loop": file.name, "link": "../nowhere"}[what])


ROWS = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {},
        optional={
            "input": SCALARS,
            "choices": st.one_of(st.lists(TEXTS, max_size=3), VALUES),
            "label": SCALARS,
            "text": SCALARS,
            "target": SCALARS,
            "options": st.lists(TEXTS, max_size=3),
            "output": SCALARS,
        },
    ),
)


@cases(0.15)
@given(data=st.data())
def test_rows(world, data):
    case = world.fresh("t1")
    root = case / "t1"
    file = root / data.draw(st.sampled_from(["train.jsonl", "reward.jsonl", "test.jsonl"]))
    lines = file.read_text("utf-8").splitlines()
    how = data.draw(st.sampled_from(["row", "row", "row", "bent", "bytes", "name", "odd", "csv"]))
    if how == "row":
        lines.insert(data.draw(st.integers(0, len(lines))), to_json(data.draw(ROWS)))
    elif how == "bent":
        lines[0] = data.draw(bent_json(lines[0], ("input", "choices", "label", "target", "text")))
    if how == "bytes":
        file.write_bytes(data.draw(bent_bytes(file.read_bytes())))
    elif how == "name":
        end = data.draw(
            st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".parquet", ""])
        )
        with contextlib.suppress(OSError):
            file.rename(root / (data.draw(NAMES) + end))
    elif how == "odd":
        file.unlink()
        odd(file, data.draw(st.sampled_from(["pipe", "folder", "zero", "loop", "link", "empty"])))
    elif how == "csv":
        file.unlink()
        cells = data.draw(st.lists(st.lists(TEXTS, min_size=1, max_size=3), max_size=3))
        text = "input,choices,label\n" + "\n".join(",".join(row) for row in cells)
        file.with_suffix(".csv").write_text(text, "utf-8", errors="surrogatepass", newline="")
    else:
        end = data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
        text = end.join(lines)
        file.write_text(text, "utf-8", errors="surrogatepass", newline="")
    check(world.finetune("t5", data=root), case)


STATE = ("config.json", "episodes.csv", "updates.csv", "checkpoint.safetensors")


@pytest.fixture(scope="module")
def stopped(world) -> Path:
    """A run folder as an interruption leaves it."""
    world.fresh()
    assert check(world.merge("vit"), world.case) == 0
    shutil.copytree(world.case / "run", world.root / "whole")
    (world.root / "stopped").mkdir()
    for name in STATE:
        shutil.copy(world.root / "whole" / name, world.root / "stopped")
    return world.root / "stopped"


@cases(0.05)
@given(data=st.data())
def test_run_folder(world, stopped, data):
    """What is altered is refused, or ends as the unbroken run."""
    case = world.fresh("stopped")
    file = case / "stopped" / data.draw(st.sampled_from([*STATE, ".lock"]))
    content = file.read_bytes() if file.exists() else b"process 1"
    kinds = ["pipe", "folder", "zero", "loop", "link", "empty"]
    how = data.draw(st.sampled_from(["bytes", "bytes", "bytes", "json", "gone", *kinds]))
    if how in kinds or how == "gone":
        file.unlink(missing_ok=True)
    if how in kinds:
        odd(file, how)
    elif how == "json" and file.name == "config.json":
        file.write_bytes(data.draw(bent_json(content.decode())).encode("utf-8", "surrogatepass"))
    elif how != "gone":
        file.write_bytes(data.draw(bent_bytes(content)))
    if check(["--resume", str(file.parent), "--quiet", "--compare", "paper"], case) == 0:
        for name in ("path.json", "merged/model.safetensors"):
            assert (file.parent / name).read_bytes() == (world.root / "whole" / name).read_bytes()
        rows = [
            from_csv((f / "episodes.csv").read_text()) for f in (file.parent, world.root / "whole")
        ]
        assert rows[0] == rows[1]


OPTIONS = (
    *(
        "--episodes",
        "--data-fraction",
        "--seed",
        "--reward",
        "--dar-lambda",
        "--observation",
        "--actions",
    ),
    *(
        "--shaping",
        "--penalty",
        "--max-steps",
        "--max-depth",
        "--episodes-per-subset",
        "--cma-share",
    ),
    *("--finalists", "--compare", "--run-dir", "--resume", "--threads", "--cache-mb", "--device"),
    *(
        "--precision",
        "--export",
        "--experts",
        "--base",
        "--images",
        "--texts",
        "--groups",
        "--metric",
    ),
    *(
        "--multi-task",
        "--operators",
        "--scope",
        "--stem",
        "--unit",
        "--calibration",
        "--label-fraction",
    ),
    *("--learning-rate", "--gamma", "--ent-coef", "--preset", "--update-epochs", "--clip-coef"),
)
_WORDS = (
    *(
        "",
        "-",
        "--",
        "0",
        "-1",
        "1",
        "2",
        "0.5",
        "1e999",
        "nan",
        "ties",
        "ties:density=0",
        "base",
        "agent",
    ),
    *(
        "ties:density=1e-9",
        "dare:drop_rate=1",
        "task_arithmetic:scale=nan",
        "weighted_average:share=2",
    ),
    *(
        "e1",
        "sublayer",
        "both",
        "global",
        "cpu",
        "meta",
        "cuda:99",
        "all",
        "mergekit",
        "(",
        "class(.)",
    ),
    *("hf-hub:", "hf-hub:a", "shipped:", "shipped:digits:third", "x:y", "/dev/null", "/", ".", "é"),
)


@cases(0.1)
@given(data=st.data())
def test_options(world, data):
    case = world.fresh()
    argv = world.merge("vit", *(world.root / "vit" / "e1" for _ in range(1)))
    for _ in range(data.draw(st.integers(1, 2))):
        value = data.draw(st.sampled_from(_WORDS) | st.text(max_size=5))
        argv += [data.draw(st.sampled_from(OPTIONS)), value]
    check(argv, case)
