"""This process's connection to Ray: joined or started by the first engine, ended by the last one."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from rmm_lab.errors import InputError

STARTS = 5  # times to start Ray, which gives up on itself after 30 s: a busy machine may need more
LOOPBACK = "127.0.0.1"
CONNECT_S = 5.0  # until a server must have answered
_SMALLEST_STORE = 80 * 2**20  # bytes; Ray takes no less than 75 MiB

_users: set[object] = set()  # who uses the connection that one of them made


def reason(error: Exception) -> str:
    """Ray's own explanation, without its trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys([lines[0][:160], lines[-1][:160]])) if lines else repr(error)


def import_ray(address: str) -> Any:
    """The module ``ray``; InputError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"--workers {address}: expected Ray, found none ({error}); pip install 'rmm_lab[cluster]'"
        ) from error
    return ray


def connect(ray: Any, address: str, user: object, n_bytes: int, limit: int | None) -> None:
    """Connect to the cluster at an address, or start one on this machine with ``limit`` cores.

    One that is started here listens on the loopback interface alone, has no dashboard, and takes commands of
    whoever has the token: by Ray's own default since 2.60, before by RAY_AUTH_MODE=token in the environment.
    A connection that the process has already is used as it is. n_bytes: of what will be sent to workers.
    Raises InputError where nobody answers.
    """
    place = os.environ.get("RAY_ADDRESS", "") if address == "ray" else address
    if address != "ray" and not address.startswith("ray://"):
        raise InputError(f"--workers: expected ray or ray://HOST:PORT, found {address!r}")
    if ray.is_initialized():
        if _users:  # else somebody else made the connection, and will end it
            _users.add(user)
        return
    _users.clear()  # whoever had a connection has ended it
    options: dict[str, Any] = {"address": place}
    if place in ("", "local"):
        options = {"address": "local", "include_dashboard": False, "num_cpus": limit}
        options["_node_ip_address"] = LOOPBACK
        # By default Ray sets a third of the memory aside; answers are small.
        options["object_store_memory"] = max(_SMALLEST_STORE, n_bytes + 2**26)
        # And its workers give way to all else: beside a few busy processes they would hardly start.
        options["_system_config"] = {"worker_niceness": 0}
    elif place != "auto":
        _check_answers(address, place)
    try:
        with warnings.catch_warnings():  # the error below says the same
            warnings.filterwarnings("ignore", "Ray Client connection timed out")
            _init(ray, options)
    except Exception as error:  # Ray raises a bare one where a machine is too busy to start it
        if options["address"] == "local":
            raise InputError(
                f"--workers {address}: expected to start Ray, but that fails ({reason(error)}); try again "
                "when the machine is less busy, or use a number of threads"
            ) from error
        raise InputError(
            f"--workers {address}: expected a Ray cluster at {place}, but that fails ({reason(error)}); use "
            "the cluster's versions of Ray and Python, and RAY_AUTH_MODE=token where it asks for a token"
        ) from error
    _users.add(user)


@contextlib.contextmanager
def _to_ourselves() -> Iterator[None]:
    """While Ray is started: what keeps its servers on the loopback interface, and a token of this process.

    Ray turns 127.0.0.1 into the machine's address, but where clusters of several machines are switched off,
    as on macOS and Windows.
    """
    switch = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    own = {switch: "0"}
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        own["RAY_AUTH_TOKEN"] = _token()
    before = {name: os.environ.get(name) for name in (*own, "RAY_AUTH_MODE")}
    constants = sys.modules.get("ray._private.ray_constants")
    several = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    os.environ |= own
    if several is not None:
        vars(constants)["ENABLE_RAY_CLUSTER"] = False
    try:
        yield
    finally:
        if several is not None:
            vars(constants)["ENABLE_RAY_CLUSTER"] = several
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


@functools.cache
def _token() -> str:
    """One for the whole process, since Ray keeps the first that it is told."""
    return secrets.token_hex(32)


def _init(ray: Any, options: dict[str, Any]) -> None:
    is_ours = options["address"] == "local"
    for left in reversed(range(STARTS if is_ours else 1)):
        try:
            with _to_ourselves() if is_ours else contextlib.nullcontext():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except Exception as error:  # a bare one, too
            if not left or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def _check_answers(address: str, place: str) -> None:
    """InputError unless a gRPC server answers: Ray itself would wait for minutes, and end the process."""
    import grpc

    where = place.removeprefix("ray://")
    host, _, port = where.rpartition(":")
    try:
        if not host or not port.isdigit():
            raise ValueError("no HOST:PORT")
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return  # only Ray knows the certificates
        with grpc.insecure_channel(where) as channel:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_S)
    except (ValueError, grpc.FutureTimeoutError) as error:
        raise InputError(
            f"--workers {address}: expected a Ray cluster at {place!r}, found none that answers "
            f"({str(error) or f'within {CONNECT_S:.0f} s'}); see ray status there, and use its client "
            "server, ray://HOST:10001, or RAY_ADDRESS=HOST:6379"
        ) from error


def leave(ray: Any, user: object, actors: list[Any]) -> None:
    """End a user's actors; the last user ends the connection, and the cluster if it was started here."""
    if ray.is_initialized():
        for actor in actors:
            with contextlib.suppress(ray.exceptions.RayError, OSError):  # gone already
                ray.kill(actor)
        if _users == {user}:
            ray.shutdown()
    _users.discard(user)
