"""Ray: the same rewards as without it, whatever dies; plain words where it cannot be had; nothing left."""

from __future__ import annotations

import http.server
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import psutil
import pytest
import torch

from rmm_lab.engine import ray_workers as cluster
from rmm_lab.engine.ray_workers import RayEngine, home, pack, unpack
from rmm_lab.engine.scorer import Job, Scorer
from rmm_lab.errors import InputError
from rmm_lab.ppo import Args, train

# One group: two clusters at a time would be too much for a laptop.
pytestmark = pytest.mark.xdist_group("ray")


def random_paths(scorer, n, seed=0):
    rng = random.Random(seed)
    depth, sources = scorer.n_layers, len(scorer.sources)
    return [tuple((rng.randrange(sources), k) for k in range(depth)) for _ in range(n)]


def ray_processes():
    """Ray's own processes and its workers, of anyone on this machine."""
    found = set()
    for process in psutil.process_iter(["pid", "name", "cmdline"]):
        words = " ".join([process.info["name"] or "", *(process.info["cmdline"] or [])[:2]])
        if any(name in words for name in ("raylet", "gcs_server", "ray::")):
            found.add(process.info["pid"])
    return found


def gone(before):
    """Wait until no process of Ray is left that was not there before."""
    end = time.monotonic() + 60
    while ray_processes() - before and time.monotonic() < end:
        time.sleep(0.1)
    assert not ray_processes() - before


def same(found, expected):
    assert len(found) == len(expected)
    for (ours, _), (theirs, _) in zip(found, expected, strict=True):
        assert [t.tolist() for t in ours] == [t.tolist() for t in theirs]


# ------------------------------------------------------------------------- without any cluster


def blocks(tensors):
    """Bytes of the memory that tensors hold, each block once."""
    return sum(
        {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tensors
            if t.numel()
        }.values()
    )


def test_a_pool_is_sent_once_and_without_what_can_be_made_again(problem):
    pool, tasks = problem.pool, problem.tasks
    for source in pool.sources:
        for k in range(3):
            pool.layer(source, k)  # merged layers and modules, which stay here
    pool.stem("base")
    for task in tasks:
        task.split("test")
    text, arrays = pack(pool, tasks, "reward")
    weights = [t for c in (pool.base, *pool.experts) for t in c.weights.values()]
    parts = [t for p in pool._parts for t in p.head.values()]
    pictures = [
        t for task in tasks for t in (task.split("reward").images, task.split("reward").labels)
    ]
    assert sum(a.nbytes for a in arrays) == blocks([*weights, *parts, *pictures])
    assert len(text) < 40_000  # names and shapes alone
    for array in arrays:
        array.flags.writeable = False  # as in Ray's memory
    there, others = unpack((text, arrays))
    assert not there._modules
    for k in range(3):
        for name, tensor in pool.layer_weights("ties", k).items():
            assert torch.equal(there.layer_weights("ties", k)[name], tensor)
    expert, group = there.experts[0].weights, there._parts[0].layers[1]
    held = {t.untyped_storage().data_ptr() for t in expert.values()}
    assert {t.untyped_storage().data_ptr() for t in group.values()} <= held
    rows = np.array([3, 1])
    for task, other in zip(tasks, others, strict=True):
        assert set(other._splits) == {"reward"}
        assert not other._files
        assert set(task._splits) == {"reward", "test"}
        assert torch.equal(other.batch("reward", rows), task.batch("reward", rows))


def test_jobs_of_one_beginning_have_one_home():
    starts = [((a, k),) for a in range(4) for k in (-1, 0)]
    homes = {}
    for part in range(6):
        for start in starts:
            paths = tuple((*start, (end, 2)) for end in range(3))
            found = {home(Job(s, part, paths[i:]), 4) for s in (None, 0, 5) for i in range(3)}
            assert len(found) == 1
            homes[part, start] = found.pop()
    count = [list(homes.values()).count(w) for w in range(4)]
    assert min(count) >= 48 / 4 / 2  # of 48; none is left idle
    assert home(Job(0, 0, ((),)), 4) in range(4)
    # Not Python's hash, which each process salts.
    assert home(Job(0, 3, (((1, 0), (2, 1)),)), 97) == zlib.crc32(b"(3, ((1, 0),))") % 97


def test_without_ray_the_message_says_what_to_install(problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(
        InputError, match=r"expected Ray, found none .*pip install 'rmm_lab\[cluster\]'"
    ):
        problem.scorer(workers="ray")


@pytest.fixture
def no_connection(monkeypatch):
    """Ray is installed and not connected, and no address is set from outside."""
    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return ray


@pytest.fixture
def web_port():
    """A port where something else than Ray answers."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("how", ["ray://", "RAY_ADDRESS"])
@pytest.mark.parametrize("what", ["nobody", "another server"])
def test_a_wrong_address_is_told_in_seconds(
    problem, monkeypatch, no_connection, web_port, how, what
):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens
        port = unused.getsockname()[1] if what == "nobody" else web_port
        monkeypatch.setattr(cluster, "CONNECT_S", 2.0)
        place = f"127.0.0.1:{port}"
        if how == "RAY_ADDRESS":
            monkeypatch.setenv("RAY_ADDRESS", place)
        start = time.monotonic()
        with pytest.raises(InputError, match=f"expected a Ray cluster at .*{place}', found none"):
            problem.scorer(workers="ray" if how == "RAY_ADDRESS" else f"ray://{place}")
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("address", ["ray://", "ray://here", "ray://here:x"])
def test_an_address_without_port_is_told(problem, no_connection, address):
    with pytest.raises(InputError, match="no HOST:PORT"):
        problem.scorer(workers=address)


@pytest.mark.parametrize(("address", "device"), [("rayon", "cpu"), ("ray", "meta")])
def test_other_addresses_and_devices_are_refused(problem, no_connection, address, device):
    with pytest.raises(InputError, match=r"expected (ray or ray://HOST:PORT|device cpu or cuda)"):
        RayEngine(problem.pool, problem.tasks, address, {"device": device})


# ------------------------------------- a cluster each; before the one that stays open below


@pytest.mark.slow
def test_a_search_on_ray_is_the_search_without(tiny, no_connection):
    from rmm_lab.search.problem import load_problem

    ray = no_connection
    before = ray_processes()
    found = {}
    for workers in ("1", "2", "ray"):
        problem = load_problem(**tiny, operators=("task_arithmetic:scale=0.5", "ties"))
        args = Args(episodes=60, data_fraction=0.25, seed=3, workers=workers, quiet=True)
        result = train(args, problem=problem, table=False)
        rows = result.episodes
        found[workers] = rows, result.path.to_json(), result.reward
    assert len(found["1"][0]) == 60
    assert found["2"] == found["1"]
    assert found["ray"] == found["1"]
    assert not ray.is_initialized()
    gone(before)


CODE = """
import sys
from rmm_lab.engine.ray_workers import RayEngine
from rmm_lab.search.problem import load_problem
from rmm_lab.engine.scorer import Job, Scorer
if __name__ == "__main__":
    base, *rest = sys.argv[1:]
    problem = load_problem(rest[:2], base=base, images=rest[2:], operators=["ties"], stem="base")
    options = {"fraction": 0.25, "stem": "base"}
    alone = Scorer(problem.pool, problem.tasks, **options)
    jobs = [Job(0, j, (((0, 0), (1, 1), (2, 2)),)) for j in range(len(alone.parts(0)))]
    engine = RayEngine(problem.pool, problem.tasks, "ray", options, limit=1)
    print(len(list(engine(jobs))) == len(jobs))
"""


@pytest.mark.slow
def test_ray_does_not_outlive_a_command(tiny, tmp_path):
    """Not even where nobody closes the engine; and it is quiet."""
    pytest.importorskip("ray")
    before = ray_processes()
    done = subprocess.run(
        [sys.executable, "-c", CODE, tiny["base"], *tiny["experts"], *tiny["images"]],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)
    gone(before)


def test_a_connection_that_is_not_ours_stays_open():
    class Ray:
        ended: list[str] = []
        exceptions = pytest.importorskip("ray").exceptions
        is_initialized = staticmethod(lambda: True)
        kill = staticmethod(ended.append)
        shutdown = staticmethod(lambda: Ray.ended.append("ray"))

    cluster._leave(Ray, object(), ["worker"])  # no engine made the connection
    assert Ray.ended == ["worker"]


# ------------------------------------------------------------------------------ two workers


@pytest.fixture(scope="module")
def shared(tiny):
    """A problem, an engine with two workers on a cluster of two cores, and its options.

    Another engine starts Ray and has one of the cores, until it is closed.
    """
    from rmm_lab.search.problem import load_problem

    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    before = ray_processes()
    problem = load_problem(**tiny, operators=("task_arithmetic:scale=0.5", "ties"), stem="agent")
    options = {"fraction": 0.25, "stem": "agent", "cache_mb": 1, "batch_size": 3}
    init = ray.init
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(ray, "init", lambda **k: init(**k | {"num_cpus": 2}))
        first = RayEngine(problem.pool, problem.tasks, "ray", options, limit=1)
    with RayEngine(problem.pool, problem.tasks, "ray", options) as engine:
        assert set(engine.pids) < {0, 1}  # one worker waits for a core, the other works
        job = Job(0, 0, (((0, -1), (0, 0)),))
        same(list(engine([job])), list(first([job])))
        first.close()
        assert ray.is_initialized()  # the second one needs it
        with pytest.raises(InputError, match="expected its cluster, found it closed"):
            list(first([job]))
        yield problem, engine, options
    assert not ray.is_initialized()
    gone(before)


def jobs_of(scorer, n_paths=4, subsets=4):
    """One job per part and path, of four subsets."""
    paths = random_paths(scorer, n_paths)
    return [
        Job(s, j, (((0, -1), *p),))
        for s in range(subsets)
        for j in range(len(scorer.parts(s)))
        for p in paths
    ]


@pytest.mark.slow
def test_results_come_in_the_order_of_the_jobs(shared):
    problem, engine, options = shared
    alone = Scorer(problem.pool, problem.tasks, **options)
    jobs = jobs_of(alone)
    random.Random(1).shuffle(jobs)
    same(list(engine(jobs)), [alone.work(job) for job in jobs])
    assert list(engine([])) == []


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_worker_costs_nothing_but_time(shared, killed):
    problem, engine, options = shared
    alone = Scorer(problem.pool, problem.tasks, **options)
    jobs = jobs_of(alone, n_paths=6)
    while engine._away:  # both are there
        list(engine(jobs[:1]))
    before = dict(engine.pids)
    assert set(before) == {0, 1}
    results = iter(engine(jobs))
    found = [next(results)]
    for pid in list(before.values())[:killed]:
        os.kill(pid, signal.SIGKILL)
    found += results
    same(found, [alone.work(job) for job in jobs])
    if killed == 2:  # those who did it were started again
        assert set(engine.pids.values()) != set(before.values())


@pytest.mark.slow
def test_an_error_in_the_work_is_raised_as_it_is(shared):
    problem, engine, options = shared
    alone = Scorer(problem.pool, problem.tasks, **options)
    good = jobs_of(alone)[:3]
    bad = Job(0, 0, (((0, -1), (99, 0)),))  # no such source
    with pytest.raises(IndexError, match="tuple index out of range"):
        alone.work(bad)
    with pytest.raises(IndexError, match="tuple index out of range") as caught:
        list(engine([*good, bad]))
    assert type(caught.value) is IndexError
    same(list(engine(good)), [alone.work(job) for job in good])


class Deadly(tuple):
    """A path that ends the process that reads it."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.slow
def test_a_job_that_kills_each_worker_ends_in_words(shared, monkeypatch):
    problem, engine, options = shared
    alone = Scorer(problem.pool, problem.tasks, **options)
    monkeypatch.setattr(cluster, "TRIES", 2)
    with pytest.raises(InputError, match="lives through a job, found that 2 died of it"):
        list(engine([Job(0, 0, (Deadly(),))]))
    good = jobs_of(alone)[:3]
    same(list(engine(good)), [alone.work(job) for job in good])


@pytest.mark.slow
def test_no_gpu_in_the_cluster_is_told(shared):
    problem, _, options = shared
    with pytest.raises(
        InputError, match="expected a GPU for each worker on device cuda, found none"
    ):
        RayEngine(problem.pool, problem.tasks, "ray", options | {"device": "cuda:1"})


@pytest.mark.slow
def test_workers_forget_layers_that_no_source_names(shared):
    """A path of its own scales: the same scores as here, and its layers are gone afterwards."""
    problem, engine, options = shared
    alone = Scorer(problem.pool, problem.tasks, **options)
    own = "task_arithmetic:scale=0.2/0.7"
    path = ((own, -1), (0, 0), (own, 1), ("base", 2))
    jobs = [Job(s, j, (path,)) for s in range(4) for j in range(len(alone.parts(s)))]
    same(list(engine(jobs)), [alone.work(job) for job in jobs])

    def kept(worker):
        pool = worker._scorer.pool
        return {source for source, _ in (*pool._weights, *pool._modules)} | set(pool._stems)

    for names in engine._ray.get([a.__ray_call__.remote(kept) for a in engine._actors]):
        assert names <= {"base", *problem.pool.sources}


@pytest.mark.slow
def test_workers_read_the_experts_in_place(shared):
    """The pool is in the machine's memory once: each worker's weights lie in Ray's shared memory."""

    def where(worker):
        from pathlib import Path

        weights = worker._scorer.pool.experts[0].weights
        address = max(weights.values(), key=lambda t: t.numel()).data_ptr()
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, end = (int(n, 16) for n in line.split()[0].split("-"))
            if start <= address < end:
                return line
        return ""

    if not sys.platform.startswith("linux"):
        pytest.skip("needs /proc")
    _, engine, _ = shared
    lines = engine._ray.get([a.__ray_call__.remote(where) for a in engine._actors])
    assert all("plasma" in line and line.split()[1].endswith("s") for line in lines), lines
    assert len({line.split()[4] for line in lines}) == 1  # the same file
