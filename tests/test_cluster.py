"""Ray: the same rewards as without it, whatever dies; plain words where it cannot be had; nothing left."""

from __future__ import annotations

import http.server
import ipaddress
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import torch

from rmm_lab.engine import ray_connection, ray_workers
from rmm_lab.engine.ray_workers import RayEngine, home, pack, unpack
from rmm_lab.engine.scorer import Job, Scorer
from rmm_lab.errors import InputError
from rmm_lab.reward import Step
from rmm_lab.search.config import configure
from rmm_lab.search.pipeline import train

WAIT_S = 250  # the longest wait for what must happen, on however busy a machine; a test has 300


@pytest.fixture(autouse=True, scope="module")
def _patience() -> Iterator[None]:
    """A busy machine may need minutes for two workers that start at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_workers, "START_S", float(WAIT_S))
        yield


def wait_until(happened, what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < end, f"{what} not within {WAIT_S} s"
        time.sleep(0.05)


def wait_for_the_end(address: str, pids) -> None:
    """Wait until a cluster's own server and worker processes are gone."""
    host, _, port = address.rpartition(":")

    def is_gone() -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            serves = probe.connect_ex((host, int(port))) == 0
        return not serves and not any(map(psutil.pid_exists, pids))

    wait_until(is_gone, f"the end of Ray at {address} with processes {pids}")


def same(found, expected):
    assert len(found) == len(expected)
    for (ours, _), (theirs, _) in zip(found, expected, strict=True):
        assert [t.tolist() for t in ours] == [t.tolist() for t in theirs]


# ------------------------------------------------------------------------- without any cluster


def memory_of(tensors) -> dict[int, int]:
    """Address -> bytes of the memory that tensors hold."""
    storages = (t.untyped_storage() for t in tensors if t.numel())
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_a_pool_is_sent_once_and_without_what_can_be_made_again(problem):
    pytest.importorskip("ray")
    pool, tasks = problem.pool, problem.tasks
    for source in pool.sources:
        for k in range(3):
            pool.layer(source, k)  # merged layers and modules, which stay here
    pool.stem("base")
    for task in tasks:
        task.split("test")
    text, arrays = pack(pool, tasks, "reward")
    weights = [t for c in (pool.base, *pool.experts) for t in c.weights.values()]
    pictures = [
        t for task in tasks for t in (task.split("reward").images, task.split("reward").labels)
    ]
    assert sum(a.nbytes for a in arrays) == sum(memory_of([*weights, *pictures]).values())
    assert len(text) < 40_000  # names and shapes alone
    for array in arrays:
        array.flags.writeable = False  # as in Ray's memory
    there, others = unpack((text, arrays))
    for source in ("e2", "ties"):
        for k in range(3):
            for name, tensor in pool.weights(source, k).items():
                assert torch.equal(there.weights(source, k)[name], tensor)
    # Read in place: all workers of a machine share the arrays.
    places = {a.ctypes.data for a in arrays}
    assert memory_of(there.experts[0].weights.values()).keys() <= places
    assert memory_of(there.weights("e1", 1).values()).keys() <= places
    rows = np.array([3, 1])
    for task, other in zip(tasks, others, strict=True):
        assert torch.equal(other.batch("reward", rows), task.batch("reward", rows))


def test_jobs_of_one_beginning_have_one_home():
    starts = [(Step(source, k),) for source in "abcd" for k in (-1, 0)]
    homes = {}
    for part in range(6):
        for start in starts:
            paths = tuple((*start, Step(end, 2)) for end in "xyz")
            found = {home(Job(s, part, paths[i:]), 4) for s in (None, 0, 5) for i in range(3)}
            assert len(found) == 1
            homes[part, start] = found.pop()
    count = [list(homes.values()).count(w) for w in range(4)]
    assert min(count) >= 48 / 4 / 2  # of 48; none is left idle
    assert home(Job(0, 0, ((),)), 4) in range(4)
    # Not Python's hash, which each process salts.
    text = b"(3, (Step(source='e1', layer=0, scales=()),))"
    assert home(Job(0, 3, ((Step("e1", 0), Step("e2", 1)),)), 97) == zlib.crc32(text) % 97


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
def test_a_wrong_address_is_told_soon(problem, monkeypatch, no_connection, web_port, how, what):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens
        port = unused.getsockname()[1] if what == "nobody" else web_port
        monkeypatch.setattr(ray_connection, "CONNECT_S", 0.3)
        place = f"127.0.0.1:{port}"
        if how == "RAY_ADDRESS":
            monkeypatch.setenv("RAY_ADDRESS", place)
        start = time.monotonic()
        with pytest.raises(InputError, match=f"expected a Ray cluster at .*{place}', found none"):
            problem.scorer(workers="ray" if how == "RAY_ADDRESS" else f"ray://{place}")
        assert time.monotonic() - start < 60  # Ray alone takes minutes


@pytest.mark.parametrize("address", ["ray://", "ray://here", "ray://here:x"])
def test_an_address_without_port_is_told(problem, no_connection, address):
    with pytest.raises(InputError, match="no HOST:PORT"):
        problem.scorer(workers=address)


@pytest.mark.parametrize(("address", "device"), [("rayon", "cpu"), ("ray", "meta")])
def test_other_addresses_and_devices_are_refused(problem, no_connection, address, device):
    with pytest.raises(InputError, match=r"expected (ray or ray://HOST:PORT|device cpu or cuda)"):
        RayEngine(problem.pool, problem.tasks, address, {"device": device})


class Ray:
    """A connection that is not ours, as ``leave`` sees it."""

    ended: list[str]

    def __init__(self, exceptions) -> None:
        self.ended, self.exceptions = [], exceptions

    def is_initialized(self) -> bool:
        return True

    def kill(self, actor: str) -> None:
        self.ended.append(actor)

    def shutdown(self) -> None:
        self.ended.append("ray")


def test_a_connection_that_is_not_ours_stays_open():
    ray = Ray(pytest.importorskip("ray").exceptions)
    ray_connection.leave(ray, object(), ["worker"])  # no engine made the connection
    assert ray.ended == ["worker"]


class Slow:
    """Ray on a machine so busy that its first starts take longer than it waits."""

    def __init__(self, failures, error) -> None:
        self.failures, self.error, self.calls = failures, error, []

    def is_initialized(self) -> bool:
        return False

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def init(self, address, **_) -> None:
        self.calls.append(address)
        if self.calls.count(address) <= self.failures:
            raise Exception(self.error)


BUSY = "The current node timed out during startup. The GCS has become overloaded."


def test_ray_is_started_again_where_it_was_too_slow(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray = Slow(2, BUSY)
    ray_connection.connect(ray, "ray", self := object(), 0, 1)
    assert ray.calls == ["local", "shutdown", "local", "shutdown", "local"]
    ray_connection.leave(ray, self, [])
    for other in (Slow(99, BUSY), Slow(1, "no such option")):
        with pytest.raises(InputError, match="expected to start Ray, but that fails"):
            ray_connection.connect(other, "ray", object(), 0, 1)
        most = ray_connection.STARTS if other.error == BUSY else 1
        assert other.calls.count("local") == most
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster of somebody else's
    joined = Slow(1, BUSY)
    with pytest.raises(InputError, match="a Ray cluster at auto"):
        ray_connection.connect(joined, "ray", object(), 0, 1)
    assert joined.calls == ["auto"]


# ------------------------------------------------------------------- a command of its own


CODE = """
import sys
from rmm_lab.engine import ray_workers
from rmm_lab.engine.ray_workers import RayEngine
from rmm_lab.search.problem import load_problem
from rmm_lab.engine.scorer import Job, Scorer
from rmm_lab.reward import parse_path
if __name__ == "__main__":
    base, *rest = sys.argv[1:]
    problem = load_problem(rest[:2], base=base, images=rest[2:], operators=["ties"], stem="base")
    options = {"fraction": 0.25, "stem": "base"}
    alone = Scorer(problem.pool, problem.tasks, **options)
    path = parse_path("e1@0 e2@1 ties@2")
    jobs = [Job(0, j, (path,)) for j in range(len(alone.parts(0)))]
    ray_workers.START_S = 240
    engine = RayEngine(problem.pool, problem.tasks, "ray", options, limit=1)
    print(len(list(engine(jobs))) == len(jobs))
    import ray
    print(ray.get_runtime_context().gcs_address, *engine.pids.values())
"""


@pytest.mark.slow
def test_ray_does_not_outlive_a_command(tiny, tmp_path):
    """Not even where nobody closes the engine; and it is quiet."""
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-c", CODE, tiny["base"], *tiny["experts"], *tiny["images"]],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        timeout=WAIT_S,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    scored, where = done.stdout.splitlines()
    assert scored == "True"
    address, *pids = where.split()
    wait_for_the_end(address, list(map(int, pids)))


# ------------------------------------------------------------------------ one cluster for all


@pytest.fixture(scope="module")
def shared(tiny):
    """A problem, an engine with two workers on a cluster of three cores, and its options.

    Another engine starts Ray and has one of the cores, until it is closed.
    """
    from rmm_lab.search.problem import load_problem

    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    problem = load_problem(**tiny, operators=("task_arithmetic:scale=0.5", "ties"), stem="agent")
    options = {"fraction": 0.25, "stem": "agent", "cache_mb": 1, "batch_size": 3}
    init = ray.init
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(ray, "init", lambda **k: init(**k | {"num_cpus": 3}))
        first = RayEngine(problem.pool, problem.tasks, "ray", options, limit=1)
    address = ray.get_runtime_context().gcs_address
    with RayEngine(problem.pool, problem.tasks, "ray", options, limit=2) as engine:
        job = Job(0, 0, ((Step("e1", -1), Step("e1", 0)),))
        same(list(engine([job])), list(first([job])))
        first.close()
        assert ray.is_initialized()  # the second one needs it
        with pytest.raises(InputError, match="expected its cluster, found it closed"):
            list(first([job]))
        yield problem, engine, options
        pids = [*first.pids.values(), *engine.pids.values()]
    assert not ray.is_initialized()
    wait_for_the_end(address, pids)


def jobs_of(scorer, n_paths=4, subsets=4):
    """One job per part and path, of four subsets; each path has a scaled layer, too."""
    rng = random.Random(0)
    paths = [
        (
            Step("e1", -1),
            *(Step(rng.choice(scorer.sources), k) for k in range(scorer.n_layers)),
            Step("task_arithmetic", 1, (0.2, round(rng.random(), 3))),
        )
        for _ in range(n_paths)
    ]
    parts = {s: range(len(scorer.parts(s))) for s in range(subsets)}
    return [Job(s, j, (path,)) for s in range(subsets) for j in parts[s] for path in paths]


@pytest.mark.slow
def test_results_come_in_the_order_of_the_jobs(shared):
    problem, engine, options = shared
    alone = Scorer(problem.pool, problem.tasks, **options)
    jobs = jobs_of(alone)
    random.Random(1).shuffle(jobs)
    same(list(engine(jobs)), [alone.work(job) for job in jobs])
    assert list(engine([])) == []


@pytest.mark.slow
def test_workers_of_a_cluster_of_ours_give_way_to_nobody(shared):
    """Ray's own would, and hardly start on a busy machine."""
    _, engine, _ = shared
    assert engine.pids
    for pid in engine.pids.values():
        assert psutil.Process(pid).nice() == psutil.Process().nice()


def listening() -> list[tuple[str, str, int]]:
    """Process, address and port of all sockets that this process and those below it listen on."""
    own = psutil.Process()
    return [
        (process.name(), ipaddress.ip_address(c.laddr.ip), c.laddr.port)
        for process in (own, *own.children(recursive=True))
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN or (c.laddr and c.type == socket.SOCK_DGRAM)
    ]


def is_loopback(address) -> bool:
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@pytest.mark.slow
def test_a_cluster_of_ours_listens_on_loopback_alone(shared):
    found = listening()
    assert any(name == "gcs_server" for name, _, _ in found)  # the cluster is seen
    assert [own for own in found if not is_loopback(own[1])] == []
    with socket.create_server(("0.0.0.0", 0)):  # what the test would see
        assert not all(is_loopback(address) for _, address, _ in listening())


@pytest.mark.slow
@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer guessed"),)])
def test_a_cluster_of_ours_asks_for_its_token(shared, metadata):
    """And what it takes to start it does not stay in the environment."""
    import grpc
    import ray

    names = {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    assert not names & set(os.environ)
    with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        with pytest.raises(grpc.RpcError) as refusal:
            ask(b"", metadata=metadata, timeout=60)
    assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.slow
def test_a_search_on_ray_is_the_search_without(shared, tiny):
    """On the core that is left; threads give the same, too."""
    from rmm_lab.search.problem import load_problem

    found = {}
    for workers in ("1", "2", "ray"):
        problem = load_problem(**tiny, operators=("task_arithmetic:scale=0.5", "ties"))
        config = configure(
            "weights", episodes=40, data_fraction=0.25, seed=3, workers=workers, quiet=True
        )
        result = train(config, problem, table=False)
        found[workers] = result.episodes, result.path.to_json(), result.reward
    assert len(found["1"][0]) == 40
    assert found["2"] == found["1"]
    assert found["ray"] == found["1"]


@pytest.mark.slow
def test_killed_workers_cost_nothing_but_time(shared):
    """One, whose jobs the other one does; then that one, too, while the first is restarted."""
    problem, engine, options = shared
    alone = Scorer(problem.pool, problem.tasks, **options)
    jobs = sorted(jobs_of(alone, n_paths=6), key=lambda job: home(job, 2))
    expected = [alone.work(job) for job in jobs]

    def both_are_there() -> bool:
        list(engine(jobs[:1]))
        return len(engine.pids) == 2 and all(map(psutil.pid_exists, engine.pids.values()))

    wait_until(both_are_there, "two workers")
    before = dict(engine.pids)
    for w in (1, 0):  # the first result comes from worker 0, whose jobs are first
        results = iter(engine(jobs))
        found = [next(results)]
        os.kill(before[w], signal.SIGKILL)
        found += results
        same(found, expected)
    # Both are dead, so those who did the rest were started again.
    assert set(engine.pids.values()) != set(before.values())


@pytest.mark.slow
def test_an_error_in_the_work_is_raised_as_it_is(shared):
    problem, engine, options = shared
    alone = Scorer(problem.pool, problem.tasks, **options)
    good = jobs_of(alone)[:3]
    bad = Job(0, 0, ((Step("e1", -1), Step("nobody", 0)),))  # no such source
    for work in (lambda: alone.work(bad), lambda: list(engine([*good, bad]))):
        with pytest.raises(InputError, match="source 'nobody': expected base") as caught:
            work()
        assert type(caught.value) is InputError
    same(list(engine(good)), [alone.work(job) for job in good])


class Deadly(tuple):
    """A path that ends the process that reads it."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.slow
def test_a_job_that_kills_each_worker_ends_in_words(shared, monkeypatch):
    problem, engine, options = shared
    alone = Scorer(problem.pool, problem.tasks, **options)
    monkeypatch.setattr(ray_workers, "TRIES", 2)
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
