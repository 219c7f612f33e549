"""Start of Ray and of the application in a Serve YAML on this machine, for `kvarn serve`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NoReturn, get_args

import psutil
import torch
import yaml
from pydantic import ValidationError

from kvarn.adapters import read_adapter
from kvarn.counts import counted
from kvarn.dtypes import check_cache_dtype
from kvarn.engine_limits import EngineLimits, engine_limits
from kvarn.errors import KVarNError, did_you_mean, first_problem
from kvarn.layer_kinds import STATES, layer_kinds, smallest_block
from kvarn.model import (
    KvShape,
    check_generates,
    check_tensor_parallel,
    check_tokenizer,
    check_weights,
    context_limit,
    read_config,
    resolve_model,
    text_config,
)
from kvarn.plan.model_shape import ModelShape
from kvarn.presets import PRESETS
from kvarn.vllm.cache_settings import KVarNConfig, SidePoolError, num_host_sinks
from kvarn.vllm.slots import NO_DRAFTS
from kvarn.vllm.store.block_files import check_directory
from serve_app.config import GIB, AppConfig, EngineConfig, GatewayConfig, HttpConfig
from serve_app.local_ray import STOP_TIMEOUT_S, adopt_orphans, end_descendants
from serve_app.local_ray import start as start_ray
from serve_app.request.parser_choice import NONE, parsers_of
from serve_app.security.api_keys import KeyFileError, read_keys
from serve_app.security.tls import ServerTls, TlsError

BUILDER = "serve_app.app:build"
POLL_S = 0.5
_EXCEPTION = re.compile(r"^(?:ray\.exceptions\.)?[A-Za-z_][\w.]*(?:Error|Exception)(?:\(\w+\))?: (.+)$")
_FINDING = re.compile(r".+ \[type=\w+, input_value=")


class LaunchError(KVarNError):
    """The application cannot be started; the message says what to change."""


@dataclass(frozen=True)
class Deployment:
    """Start progress of one deployment: replicas running and wanted."""

    name: str
    running: int
    wanted: int


@dataclass(frozen=True)
class App:
    """The application of a Serve YAML.

    Attributes:
        name: the application's name.
        config: its settings.
        schema: the whole YAML, in Serve's schema.
        path: the file; None if the application was not read from one.
    """

    name: str
    config: AppConfig
    schema: dict[str, Any]
    path: Path | None = None

    @property
    def address(self) -> str:
        """The gateways' gRPC address, "host:port"."""
        return f"{self.config.gateway.host}:{self.config.gateway.port}"

    @property
    def http_url(self) -> str:
        """The gateways' HTTP URL, which serves the console; OpenAI's API is below it in /v1."""
        gateway = self.config.gateway
        scheme = "https" if gateway.security.tls else "http"
        return f"{scheme}://{gateway.http.host}:{gateway.http.port}/"

    def place(self, setting: str) -> str:
        """The file and the path in it of a setting, such as "engine.max_model_len", for errors."""
        return f"args.{setting}" if self.path is None else f"{self.path}: args.{setting}"

    def lets_in(self, api_key: str) -> bool:
        """Whether a client on this machine needs at most `api_key` to call the gateways."""
        security = self.config.gateway.security
        return security.tls is None and (security.api_keys is None or bool(api_key))


def read_app(path: Path) -> App:
    """Read and validate a Serve YAML.

    Raises:
        LaunchError: the file cannot be read, does not hold exactly one application of ours, or a setting is
            not valid here.
    """
    try:
        schema = yaml.load(path.read_text("utf-8"), _UniqueKeys)
    except OSError as error:
        raise LaunchError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LaunchError(f"{path} is not UTF-8 text: save it in that encoding") from None
    except yaml.YAMLError as error:
        raise LaunchError(f"{path} is not valid YAML{_yaml_problem(error)}") from None
    except ValueError as error:  # a date or number that Python does not have
        raise LaunchError(f"{path} is not valid YAML: {error}") from None
    applications = schema.get("applications") if isinstance(schema, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise LaunchError(f"{path} must hold exactly one application: a list `applications` with one entry")
    application = applications[0]
    if application.get("import_path") != BUILDER:
        raise LaunchError(f"{path}: import_path is {application.get('import_path')!r}, expected {BUILDER!r}")
    try:
        config = AppConfig.model_validate(application.get("args") or {})
    except ValidationError as error:
        raise LaunchError(f"{path}: {_first_problem(error)}") from None
    app = App(application.get("name", "default"), config, schema, path)
    _check_ports(app)
    return app


def _check_ports(app: App) -> None:
    """Check that clients can know the gateways' ports.

    Raises:
        LaunchError: a port is 0, for which each gateway would take one that nothing reports.
    """
    for setting, listener in _listeners(app.config).items():
        if listener.port == 0:
            raise LaunchError(f"{app.place(setting)} is 0: give the port that clients connect to, 1 to 65535")


def _listeners(config: AppConfig) -> dict[str, GatewayConfig | HttpConfig]:
    """The settings of the gateways' servers, by those of their ports."""
    return {"gateway.port": config.gateway, "gateway.http.port": config.gateway.http}


class _UniqueKeys(yaml.SafeLoader):
    """Loads YAML without duplicate keys, of which PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a dict.

        Raises:
            yaml.MarkedYAMLError: a key stands twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"{key.value} stands twice: keep one"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """The place of an error in YAML and what is wrong there."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f": {' '.join(str(error).split())}"
    return f": line {error.problem_mark.line + 1}: {error.problem}"


def check_app(app: App) -> Path:
    """Check all that `read_app` does not, and that needs no more than the files; return the model's directory.

    Raises:
        LaunchError, ModelError: see `check_schema`, `check_security` and `check_model`.
    """
    check_schema(app)
    check_security(app)
    return check_model(app)


def check_schema(app: App) -> None:
    """Check what is around `args`, which is Serve's, where it would ignore unknown keys and refuse values late.

    Raises:
        LaunchError: Serve has no such key, or does not take its value.
    """
    deployments = ("Engine", "Gateway", *(["Prefill"] if app.config.disaggregation is not None else []))
    _check_in_another_process(str(app.path), _check_schema, app.schema, deployments)


def _check_schema(content: dict[str, Any], deployments: tuple[str, ...]) -> None:
    """See `serve_schema.check_schema`; its module imports Ray, which this one must not before it knows Ray's mode."""
    from serve_app import serve_schema

    serve_schema.check_schema(content, deployments)


def check_machine(app: App) -> None:
    """Check that this machine has the ports and resources that the application needs.

    Raises:
        LaunchError: a gateway's port is in use, the engines need more CPUs, memory or GPUs than there are, or the
            shared store's directory cannot be written.
    """
    check_room(app.config)
    store = app.config.engine.shared_store
    if store is not None:
        try:
            check_directory(Path(store.directory))
        except ValueError as error:
            raise LaunchError(f"{app.place('engine.shared_store.directory')}: {error}") from None
    for setting, listener in _listeners(app.config).items():
        if not _is_free(listener.host, listener.port):
            raise LaunchError(
                f"{listener.host}:{listener.port} is in use: "
                f"stop the process that listens there, or set another {setting}"
            )


def check_model(app: App) -> Path:
    """Check the application's model against the engines' settings; return the model's directory.

    Raises:
        ModelError: there is no such model or LoRA adapter, or it lacks a file or has one that cannot be read; it
            generates no text; or its attention heads do not divide among engine.tensor_parallel_size ranks.
        LaunchError: engine.max_model_len exceeds the model's context limit, or vLLM does not have
            engine.kv_cache_dtype on the engines' device.
    """
    directory = resolve_model(app.config.model)
    check_generates(directory)
    limit, asked = context_limit(read_config(directory)), app.config.engine.max_model_len
    if app.config.engine.load_format != "dummy":
        check_weights(directory)
    check_tokenizer(directory)
    for name, path in app.config.engine.lora.items():
        read_adapter(name, path)
    if limit is not None and asked is not None and asked > limit:
        raise LaunchError(
            f"{app.place('engine.max_model_len')} is {asked}: this model holds 1 to {limit} tokens"
        )
    _check_ranks(app, directory)
    _check_cache_dtype(app)
    _check_with_vllm(app)
    return directory


def _check_ranks(app: App, model_dir: Path) -> None:
    """Check that the model's attention heads divide among the ranks of an engine, where its config states them."""
    ranks = app.config.engine.tensor_parallel_size
    if ranks == 1:
        return
    config = text_config(model_dir)
    heads = config.get("num_attention_heads")
    kv_heads = 1 if "kv_lora_rank" in config else config.get("num_key_value_heads") or heads
    if isinstance(heads, int) and isinstance(kv_heads, int):
        check_tensor_parallel(app.place("engine.tensor_parallel_size"), ranks, heads, kv_heads)


def _check_cache_dtype(app: App) -> None:
    """Check that vLLM has the cache dtype, on the engines' device, unless it is a preset."""
    engine = app.config.engine
    if engine.kv_cache_dtype not in PRESETS:
        place = app.place("engine.kv_cache_dtype")
        _check_in_another_process(place, check_cache_dtype, engine.kv_cache_dtype, (), engine.device)


def _check_with_vllm(app: App) -> None:
    """Have vLLM check the engines' drafter and KV connector where the engines' device is present."""
    engine = app.config.engine
    drafter = engine.speculative
    if drafter is not None and drafter.model is not None and engine.load_format != "dummy":
        check_weights(resolve_model(drafter.model))
    checked = ("speculative", "kv_transfer_config", "shared_store")
    given = [name for name in checked if getattr(engine, name) is not None]
    if given and (engine.device == "cpu" or torch.cuda.device_count()):
        place = app.place(f"engine.{' and '.join(given)}")
        _check_in_another_process(place, _check_engine_config, app.config.model, engine)


def _check_engine_config(model: str, engine: EngineConfig) -> None:
    """See `check_engine_config`; its module imports Ray, which this one must not before it knows Ray's mode."""
    from serve_app.engine.engine_deployment import check_engine_config

    check_engine_config(model, engine)


def check_security(app: App) -> None:
    """Check the files of the gateways' access control, which each gateway reads when it starts.

    Raises:
        LaunchError: a file cannot be read, or does not hold API keys, or certificates that fit the private key.
    """
    security = app.config.gateway.security
    try:
        if security.api_keys is not None:
            read_keys(security.api_keys)
    except KeyFileError as error:
        raise LaunchError(f"{app.place('gateway.security.api_keys')}: {error}") from None
    try:
        if security.tls is not None:
            ServerTls(security.tls)
    except TlsError as error:
        raise LaunchError(f"{app.place('gateway.security.tls')}: {error}") from None


def check_parsers(app: App, model_dir: Path) -> None:
    """Check the parsers that are set for the model's output.

    Raises:
        LaunchError: vLLM has no such parser, or it does not fit the model.
    """
    gateway = app.config.gateway
    if not {gateway.tool_parser, gateway.reasoning_parser} <= {None, NONE}:
        _check_in_another_process(
            app.place("gateway"), parsers_of, model_dir, gateway.tool_parser, gateway.reasoning_parser
        )


def _check_in_another_process(place: str, check: Callable[..., object], *arguments: object) -> None:
    """Run a check that imports vLLM, which this process would hold in memory for as long as it serves."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_quiet) as pool:
        try:
            with _deferred_signals():  # a process that starts would report a pipe without data
                checked = pool.submit(check, *arguments)
            checked.result()
        except ValueError as error:
            raise LaunchError(f"{place}: {error}") from None
        except KeyboardInterrupt:
            for process in active_children():  # leaving the block waits for them
                process.kill()
            raise


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Deliver signals that stop the command once the block has ended."""
    pending: list[int] = []

    def keep(number: int, frame: object) -> None:
        pending.append(number)

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in handled}
    kept = [number for number in handled if before[number] not in (signal.SIG_IGN, None)]
    for number in kept:
        signal.signal(number, keep)
    try:
        yield
    finally:
        for number in kept:
            signal.signal(number, before[number])
        for arrived in pending:
            signal.raise_signal(arrived)


def _quiet() -> None:
    """Keep vLLM's log out of the command's outputs, and leave interrupts to the command."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(os.devnull, "w") as nowhere:
        for output in (1, 2):
            os.dup2(nowhere.fileno(), output)


def check_room(config: AppConfig) -> None:
    """Check that this machine has the CPUs and memory, or the GPUs, that the engines need at least.

    Raises:
        LaunchError: it has fewer.
    """
    if config.engine.device == "cpu":
        _check_cpus(config)
    else:
        _check_gpus(config)


def _check_cpus(config: AppConfig) -> None:
    engine = config.engine
    needed, present = config.least_engines * engine.cpus_per_replica, os.cpu_count() or 1
    if needed > present:
        raise LaunchError(
            f"the engines need {needed:g} CPUs and this machine has {present}: "
            f"lower {_numbers_of_engines(config)} or engine.cpus_per_replica"
        )
    cache_bytes, memory_bytes = engine.kv_cache_memory_bytes or 0, psutil.virtual_memory().total
    if config.least_engines * cache_bytes > memory_bytes:
        raise LaunchError(
            f"the engines' caches need {config.least_engines * cache_bytes / GIB:.1f} GiB and this machine "
            f"has {memory_bytes / GIB:.1f}: lower {_numbers_of_engines(config)} or engine.kv_cache_memory_gib"
        )


def _check_gpus(config: AppConfig) -> None:
    engine = config.engine
    needed, present = config.least_engines * engine.tensor_parallel_size, torch.cuda.device_count()
    if needed > present:
        raise LaunchError(
            f"the engines need {counted(needed, 'GPU')} and this machine has {present}: "
            f"lower {_numbers_of_engines(config)} or engine.tensor_parallel_size, or set engine.device: cpu"
        )


def _numbers_of_engines(config: AppConfig) -> str:
    """The settings that say how many engines there are at least."""
    replicas = (
        "engine.num_replicas" if config.engine.autoscaling is None else "engine.autoscaling.min_replicas"
    )
    return replicas if config.disaggregation is None else f"{replicas}, disaggregation.prefill_replicas"


def check_limits(app: App) -> None:
    """Check that each engine's side pool and cache hold a request; see `limits_of`.

    vLLM sizes the states of models that keep some, and this process must not import it before it knows Ray's mode.
    """
    kinds = layer_kinds(text_config(resolve_model(app.config.model)))
    if set(STATES).isdisjoint(kinds):
        limits_of(app)
    else:
        _check_in_another_process(app.place("engine"), limits_of, app)


def limits_of(app: App) -> EngineLimits | None:
    """Return the limits on each engine's concurrent requests; None if its cache is not quantized.

    Raises:
        ModelError, PlanError: there is no such model, or its attention is not supported.
        LaunchError: the side pool or the cache is too small for one request.
    """
    limits = _engine_limits(app)
    if limits is not None and limits.longest_requests == 0:
        raise LaunchError(
            f"{app.place('engine.kv_cache_memory_gib')} is {app.config.engine.kv_cache_memory_gib:g}: no request of "
            f"max_model_len, {limits.max_model_len:,} tokens, fits; raise it, or lower engine.max_model_len"
        )
    return limits


def _engine_limits(app: App) -> EngineLimits | None:
    engine = app.config.engine
    if engine.kv_cache_dtype not in PRESETS:
        return None
    ranks = engine.tensor_parallel_size
    shape = ModelShape.read(app.config.model, engine.max_model_len, ranks, engine.dtype, engine.device)
    settings = KVarNConfig(**engine.kvarn_settings)  # type: ignore[arg-type]
    try:
        return engine_limits(
            KvShape(shape.layers, shape.kv_heads, shape.head_dim),
            engine.kv_cache_dtype,
            engine.max_num_seqs,
            engine.max_model_len or shape.context_limit,
            engine.kv_cache_memory_bytes,
            ranks,
            settings,
            NO_DRAFTS if engine.speculative is None else engine.speculative.speculation,
            _drafter_shape(app.config, shape),
            shape.others(ranks),
            smallest_block=smallest_block(engine.device),
            host_sinks=num_host_sinks(settings, engine.max_num_seqs),
            tier_bytes=engine.tier_bytes,
        )
    except SidePoolError as error:
        raise LaunchError(f"{app.place('engine.side_pool_gib')} {error.problem}") from None
    except ValueError as error:
        raise LaunchError(f"{app.place('engine')}: {error}") from None


def _drafter_shape(config: AppConfig, target: ModelShape) -> KvShape | None:
    """Shape of the drafter's quantized layers; those of a model's own MTP heads have the model's shape."""
    drafter = config.engine.speculative
    if drafter is None or not drafter.has_layers or drafter.kv_cache_dtype is not None:
        return None
    if drafter.model is None:
        layers = read_config(resolve_model(config.model)).get("num_nextn_predict_layers") or 1
        return KvShape(layers, target.kv_heads, target.head_dim)
    shape = ModelShape.read(drafter.model, config.engine.max_model_len or target.context_limit)
    return KvShape(shape.layers, shape.kv_heads, shape.head_dim)


@dataclass(frozen=True)
class Dashboard:
    """Ray's dashboard, which also accepts Serve's commands.

    Attributes:
        url: its URL.
        needs_token: whether it requires the token that `ray get-auth-token` prints.
    """

    url: str
    needs_token: bool

    @property
    def deploy_command(self) -> str:
        """Shell command that updates the application."""
        mode = "RAY_AUTH_MODE=token " if self.needs_token else ""
        serve = "serve" if shutil.which("serve") else Path(sysconfig.get_path("scripts"), "serve")
        return f"{mode}{serve} deploy -a {self.url} FILE"


@dataclass(frozen=True)
class RunningApp:
    """An application that runs on this machine's Ray.

    Attributes:
        dashboard: Ray's dashboard.
        ray: the process that owns Ray.
    """

    dashboard: Dashboard
    ray: subprocess.Popen[str]

    def wait(self) -> NoReturn:
        """Wait for an interrupt.

        Raises:
            LaunchError: Ray has stopped by itself.
        """
        while self.ray.poll() is None:
            time.sleep(POLL_S)  # a signal that reaches another thread wakes no call that blocks this one
        raise LaunchError("Ray has stopped: its logs in /tmp/ray/session_latest/logs show why")


@contextmanager
def running(
    app: App, on_progress: Callable[[list[Deployment]], None], timeout_s: float
) -> Iterator[RunningApp]:
    """Run the application on a new Ray cluster that listens on loopback only; leaving the block stops both.

    Args:
        app: the application.
        on_progress: called with the state of the deployments while they start.
        timeout_s: maximum seconds for the start.

    Raises:
        LaunchError: Ray, an engine or a gateway fails to start, or the start takes too long.
    """
    ray = None
    adopt_orphans()
    try:
        ray = start_ray()
        dashboard = _dashboard(ray)
        _deploy(app, dashboard.url, on_progress, timeout_s)
        yield RunningApp(dashboard, ray)
    finally:
        try:
            if ray is not None:
                _stop(ray)
        finally:  # also if an interrupt comes while a failed start is cleaned up
            end_descendants(0)


def _stop(ray: subprocess.Popen[str]) -> None:
    """Ask the process that owns Ray to stop it, and wait until it has."""
    assert ray.stdin is not None
    ray.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        ray.wait(STOP_TIMEOUT_S)


def _dashboard(ray: subprocess.Popen[str]) -> Dashboard:
    """Wait for Ray's start; return its dashboard."""
    assert ray.stdout is not None
    started = json.loads(ray.stdout.readline() or '{"error": "its process has ended"}')
    if "error" in started:
        raise LaunchError(f"Ray failed to start: {_sentence(started['error'])}")
    if started["needs_token"]:
        os.environ["RAY_AUTH_MODE"] = "token"  # Ray's client reads it
    return Dashboard(**started)


def _deploy(
    app: App, dashboard: str, on_progress: Callable[[list[Deployment]], None], timeout_s: float
) -> None:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    client = ServeSubmissionClient(dashboard)
    try:
        client.deploy_applications(app.schema)
    except RuntimeError as error:
        raise LaunchError(f"Serve rejected the application: {_sentence(str(error))}") from None
    deadline = time.monotonic() + timeout_s
    while True:
        details = client.get_serve_details()["applications"].get(app.name, {})
        on_progress(_deployments(details))
        if failure := _failure(details):
            raise LaunchError(failure)
        if details.get("status") == "RUNNING":
            return
        if time.monotonic() > deadline:
            raise LaunchError(f"the application was not ready within {timeout_s:g} s: allow more time")
        time.sleep(POLL_S)


def _deployments(details: dict[str, Any]) -> list[Deployment]:
    return [
        Deployment(
            name=name,
            running=sum(replica["state"] == "RUNNING" for replica in deployment["replicas"]),
            wanted=deployment["target_num_replicas"],
        )
        for name, deployment in details.get("deployments", {}).items()
    ]


def _failure(details: dict[str, Any]) -> str | None:
    """Return the first failure, since Serve retries forever; None if there is none."""
    for name, deployment in details.get("deployments", {}).items():
        if "failed to start" in deployment["message"]:
            return f"{name} failed to start: {_sentence(deployment['message'])}"
    if details.get("status") == "DEPLOY_FAILED":
        return f"the application failed to start: {_sentence(details['message'])}"
    return None


def _sentence(message: str) -> str:
    """Return the message of the last exception in a traceback, or else the last line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    raised = [index for index, line in enumerate(lines) if _EXCEPTION.match(line)]
    if (finding := _pydantic_finding(lines[raised[-1] if raised else 0 :])) is not None:
        return finding
    if not raised:
        return (lines or ["no reason was given"])[-1]
    return _EXCEPTION.sub(r"\1", lines[raised[-1]])


def _pydantic_finding(lines: list[str]) -> str | None:
    """Return the first finding of a report by pydantic, with the field if it is about one; None without a report.

    A report has one line for all findings, then for each the field, unless it is about all, and the reason.
    """
    for before, place, reason in zip(lines, lines[1:], [*lines[2:], ""], strict=False):
        if "validation error" in before:
            found = place if _FINDING.match(place) else f"{place}: {reason}"
            return found.partition(" [type=")[0].replace("Value error, ", "", 1)
    return None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    if problem["type"] != "extra_forbidden":
        return first_problem(error, "args")
    *place, name = problem["loc"]
    nearest = did_you_mean(str(name), _settings_at(place))
    where = ".".join(str(part) for part in ("args", *place, name))
    return f"{where}: there is no such setting{nearest}: correct the name, or remove it"


def _settings_at(place: Iterable[str | int]) -> Iterable[str]:
    """The names of the settings at a place in `args`."""
    fields = AppConfig.model_fields
    for part in place:
        if part in fields:
            kinds = (fields[str(part)].annotation, *get_args(fields[str(part)].annotation))
            fields = next((kind.model_fields for kind in kinds if hasattr(kind, "model_fields")), {})
    return fields


def _is_free(host: str, port: int) -> bool:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True
