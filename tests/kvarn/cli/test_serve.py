"""`kvarn serve` without a cluster: its text output, its log, and the settings that it rejects."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Self

import pytest
import yaml
from pydantic import BaseModel, ValidationError, model_validator
from typer.testing import CliRunner

from kvarn import cli
from kvarn.cli.chat import Answer
from kvarn.cli.output import err, out
from kvarn.cli.serve import Started, TextReporter, _start_progress
from kvarn.v1 import cache_pb2, cluster_pb2
from serve_app.config import AppConfig
from serve_app.launch import (
    App,
    Dashboard,
    Deployment,
    LaunchError,
    RunningApp,
    _deferred_signals,
    _sentence,
    check_machine,
    read_app,
)
from tests.support.live import APP_YAML, write_app


def test_text_output(model_dir):
    capacity = cache_pb2.CacheCapacity(
        cache_dtype="kvarn_k4v2_g128", tile_tokens=128, bytes_per_tile=622_080, total_blocks=1725
    )
    replica = cluster_pb2.ReplicaCache(replica_id="one", cache=cache_pb2.CacheSnapshot(capacity=capacity))
    with out.capture() as shown:
        TextReporter().asked("What is the capital of France?")
        TextReporter().answered(Answer("Paris.", "one", 40, 0, 3, 0.5, 20.0))
        state = cluster_pb2.GetCacheStateResponse(replicas=[replica])
        dashboard = Dashboard("http://127.0.0.1:8265", needs_token=True)
        TextReporter().ready(read_app(APP_YAML), Started(state, model_dir, dashboard))
    text = shown.get()
    for expected in (
        "you> What",
        "500 ms",
        "220,800",
        "4.74x",
        "http://127.0.0.1:8000/v1",
        "Ctrl-C stops it",
        "`ray get-auth-token`",
    ):
        assert expected in text


def test_a_log_shows_start_progress():
    with err.capture() as shown, _start_progress() as update:
        update([Deployment("Engine", 0, 2)])
        update([Deployment("Engine", 0, 2)])
        update([Deployment("Engine", 1, 2)])
    logged = shown.get()
    assert logged.count("starting Engine replicas: 0 of 2") == 1
    assert logged.count("starting Engine replicas: 1 of 2") == 1


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"cpus_per_replica": 4096}, "the engines need 4096 CPUs and this machine has"),
        (
            {"device": "cuda", "num_replicas": 100, "tensor_parallel_size": 8},
            "the engines need 800 GPUs and this machine has",
        ),
        (
            {"kv_cache_memory_gib": 1 << 20},
            "the engines' caches need 1048576.0 GiB and this machine has",
        ),
        ({"dtype": "float8"}, "args.engine.dtype: Input should be 'auto', "),
        (
            {"kv_cache_dtype": "fp8x"},
            "args.engine.kv_cache_dtype: unknown cache dtype 'fp8x' (did you mean 'fp8'?): choose from auto, ",
        ),
        ({"colour": 1}, "args.engine.colour: there is no such setting: correct the name, or remove it"),
        (
            {"max_num_seq": 1},
            "args.engine.max_num_seq: there is no such setting (did you mean 'max_num_seqs'?): correct",
        ),
        (
            {"autoscaling": {"max_replicas": 1, "min_replica": 1}},
            "args.engine.autoscaling.min_replica: there is no such setting (did you mean 'min_replicas'?): ",
        ),
        (
            {"shared_store": {"capacity_gib": 1, "directory": f"{__file__}/blocks"}},
            "test_serve.py is not a directory: give another path for the shared store",
        ),
        ({"shared_store": {"capacity_gib": 1}}, "args.engine.shared_store.directory is required: add it"),
        (
            {"kv_cache_dtype": "kvarn_k4v9_g64"},
            "args.engine.kv_cache_dtype: unknown KVarN preset 'kvarn_k4v9_g64' (did you mean 'kvarn_k4v",
        ),
        (
            {"kv_cache_memory_gib": 0.001},
            "args.engine.kv_cache_memory_gib is 0.001: no request of max_model_len, 8,192 tokens, fits",
        ),
        ({"max_num_batched_tokens": 8}, "max_num_batched_tokens is 8: give at least max_num_seqs, 16"),
    ],
)
def test_what_this_machine_cannot_run_is_rejected_before_anything_starts(tmp_path, capfd, engine, words):
    result = CliRunner().invoke(cli.app, ["serve", str(write_app(tmp_path / "app.yaml", **engine))])
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert capfd.readouterr() == ("", "")  # of other processes


@pytest.mark.parametrize("command", ["serve", "doctor"])
@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"max_model_len": 8193}, "args.engine.max_model_len is 8193"),
        ({"kv_cache_memory_gib": 0.001}, "args.engine.kv_cache_memory_gib is 0.001"),
        (
            {"tensor_parallel_size": 5},
            "args.engine.tensor_parallel_size is 5: give a divisor of the model's 9 attention heads",
        ),
        (
            {"tensor_parallel_size": 2, "kv_cache_dtype": "auto"},
            "args.engine.tensor_parallel_size is 2: give a divisor of the model's 9 attention heads",
        ),
        (
            {"kv_cache_dtype": "nvfp4"},
            "args.engine.kv_cache_dtype: vLLM has no cache dtype 'nvfp4' on a CPU: choose from auto, fp8, ",
        ),
        (
            {
                "kv_transfer_config": {"kv_connector": "OffloadingConnector"},
                "kv_cache_dtype": "kvarn_k4v2_g128",
            },
            "args.engine.kv_transfer_config: ",
        ),
    ],
)
def test_errors_about_settings_begin_with_the_file(tmp_path, command, engine, words):
    path = write_app(tmp_path / "app.yaml", **engine)
    result = CliRunner().invoke(cli.app, [command, str(path)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {path}: {words}")


class Limits(BaseModel):
    requests: int = 1

    @model_validator(mode="after")
    def _odd(self) -> Self:
        if self.requests % 2 == 0:
            raise ValueError("give an odd number of requests")
        return self


class Settings(BaseModel):
    name: str
    limits: Limits = Limits()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"name": 3}, "name: Input should be a valid string"),
        ({"name": "a", "limits": {"requests": "x"}}, "limits.requests: Input should be a valid integer"),
        ({"name": "a", "limits": {"requests": 2}}, "limits: give an odd number of requests"),
        ({"limits": 3}, "name: Field required"),
    ],
)
def test_a_report_by_pydantic_is_one_sentence_with_the_field_and_the_reason(given, sentence):
    with pytest.raises(ValidationError) as found:
        Settings.model_validate(given)
    report = repr(found.value)
    assert _sentence(f"Request failed with status code 400: {report}.").startswith(sentence)
    traceback = f"Traceback (most recent call last):\n  File\npydantic_core.ValidationError: {report}"
    assert _sentence(traceback).startswith(sentence)
    assert _sentence(f"{traceback}\n\nRuntimeError: the engine stopped") == "the engine stopped"


def test_a_report_about_all_of_a_model_is_its_reason():
    with pytest.raises(ValidationError) as found:
        Limits(requests=2)
    assert _sentence(f"ValidationError: {found.value}") == "give an odd number of requests"


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("", "no reason was given"),
        ("it\nstopped", "stopped"),
        ("Traceback\nray.exceptions.RayTaskError(ValueError): ray::f()\nValueError: too small", "too small"),
    ],
)
def test_other_errors_are_their_last_exception_or_line(message, sentence):
    assert _sentence(message) == sentence


def test_the_printed_deploy_command_runs_in_a_shell_without_the_environment(monkeypatch):
    dashboard = Dashboard("http://127.0.0.1:8265", needs_token=False)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert dashboard.deploy_command == "serve deploy -a http://127.0.0.1:8265 FILE"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    command, *arguments = dashboard.deploy_command.split()
    assert os.access(command, os.X_OK)
    assert arguments == ["deploy", "-a", "http://127.0.0.1:8265", "FILE"]


def test_reading_an_application_imports_no_ray():
    program = (
        "import pathlib, sys; from serve_app.launch import read_app; read_app(pathlib.Path(sys.argv[1]))"
    )
    checked = f"{program}; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", checked, str(APP_YAML)], check=True)


@pytest.mark.parametrize(
    ("was", "becomes", "words"),
    [
        (
            "    args:",
            "    arg:",
            "applications.0.arg: Serve has no such key (did you mean 'args'?), expected one of args, ",
        ),
        (
            "applications:",
            "http_option: {}\napplications:",
            "http_option: Serve has no such key (did you mean 'http_options'?), expected one of ",
        ),
        (
            "      model:",
            "      model: a\n      model:",
            "is not valid YAML: line 13: model stands twice: keep one",
        ),
        ("    args:", "\targs:", "is not valid YAML: line "),
        ("applications:", "applications: [", "is not valid YAML: line "),
        (
            "proxy_location: Disabled",
            "proxy_location: None",
            "app.yaml: proxy_location: Input should be 'Disabled', 'HeadOnly' or 'EveryNode'",
        ),
        ("route_prefix: null", "route_prefix: x", "applications.0.route_prefix is 'x': give null, or a path"),
        ("name: kvarn", "name: 3", "applications.0.name: Input should be a valid string"),
        ("name: kvarn", "name: ''", "applications: Application names must be nonempty"),
    ],
)
def test_what_is_around_our_settings_is_checked(tmp_path, was, becomes, words):
    path = tmp_path / "app.yaml"
    path.write_text(APP_YAML.read_text().replace(was, becomes, 1))
    for command in ("serve", "doctor"):
        result = CliRunner().invoke(cli.app, [command, str(path)])
        assert result.exit_code == 1
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "engine",
    [
        {"cpus_per_replica": 4096, "kv_cache_memory_gib": 1},
        {"kv_cache_memory_gib": 1 << 20},
        {"device": "cuda", "tensor_parallel_size": 4096},
    ],
)
def test_the_advice_for_a_small_machine_names_every_number_of_engines(engine):
    store = {"directory": "/dev/shm/kvarn", "capacity_gib": 1}
    config = AppConfig(
        engine={**engine, "shared_store": store, "autoscaling": {"max_replicas": 2}}, disaggregation={}
    )
    names = r"lower engine\.autoscaling\.min_replicas, disaggregation\.prefill_replicas or engine\."
    with pytest.raises(LaunchError, match=names):
        check_machine(App("app", config, {}))


def test_serve_and_doctor_refuse_a_model_that_generates_no_text(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    path = _write(tmp_path, model=str(tmp_path))
    for command in ("serve", "doctor"):
        result = CliRunner().invoke(cli.app, [command, str(path)])
        assert result.exit_code == 1
        assert "describes BertModel, which generates no text" in result.stderr


def test_serve_and_doctor_refuse_a_model_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").touch()
    path = _write(tmp_path, model=str(tmp_path))
    for command in ("serve", "doctor"):
        result = CliRunner().invoke(cli.app, [command, str(path)])
        assert result.exit_code == 1
        assert "has no weights" in result.stderr


def adapter(directory, config):
    directory.mkdir()
    (directory / "adapter_model.safetensors").touch()
    if config is not None:
        (directory / "adapter_config.json").write_text(config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "LoRA adapter 'tuned' has no adapter_config.json"),
        ("{", "adapter_config.json is not JSON"),
        ("[]", "adapter_config.json holds list, expected a JSON object"),
        ("{}", "LoRA adapter 'tuned' has rank None: vLLM serves whole ranks of 1 to 512"),
        ('{"r": 513}', "has rank 513"),
        ('{"r": 8, "rank_pattern": {"q_proj": 1024}}', "has rank 1024"),
    ],
)
def test_serve_and_doctor_refuse_a_bad_adapter(tmp_path, model_dir, config, words):
    adapter(tmp_path / "tuned", config)
    path = write_app(tmp_path / "app.yaml", lora={"tuned": str(tmp_path / "tuned")})
    for command in ("serve", "doctor"):
        result = CliRunner().invoke(cli.app, [command, str(path)])
        assert result.exit_code == 1
        assert words in " ".join(result.stderr.split())


def test_an_adapter_needs_a_directory_weights_and_a_name_of_its_own(tmp_path):
    adapter(tmp_path / "tuned", '{"r": 8}')
    (tmp_path / "tuned" / "adapter_model.safetensors").unlink()
    for name, directory, words in (
        ("tuned", "nowhere", "LoRA adapter 'tuned' has no directory"),
        ("tuned", "tuned", "LoRA adapter 'tuned' has no weights"),
        ("smollm2-135m-instruct", "tuned", "which is the model's own name"),
        ("", "tuned", "at least 1 character"),
    ):
        path = write_app(tmp_path / "app.yaml", lora={name: str(tmp_path / directory)})
        result = CliRunner().invoke(cli.app, ["serve", str(path)])
        assert result.exit_code == 1
        assert words in " ".join(result.stderr.split())


@pytest.mark.parametrize("command", ["serve", "doctor"])
@pytest.mark.parametrize(
    ("security", "words"),
    [
        ({"api_keys": "/nope"}, "args.gateway.security.api_keys: /nope cannot be read: No such file"),
        ({"api_keys": __file__}, f"args.gateway.security.api_keys: {__file__}"),
        (
            {"tls": {"certificate": "/nope", "private_key": __file__}},
            f"args.gateway.security.tls: the TLS files /nope, {__file__} cannot be used: ",
        ),
    ],
)
def test_files_of_access_control_that_cannot_be_used_are_refused(tmp_path, command, security, words):
    path = _write(tmp_path, gateway={"security": security})
    result = CliRunner().invoke(cli.app, [command, str(path)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {path}: {words}")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("setting", ["tool_parser", "reasoning_parser"])
def test_serve_refuses_an_unknown_parser(tmp_path, model_dir, setting):
    path = _write(tmp_path, model=str(model_dir), gateway={setting: "hermess"})
    result = CliRunner().invoke(cli.app, ["serve", str(path)])
    assert result.exit_code == 1
    assert f"args.gateway: {setting} is 'hermess'" in result.stderr
    assert ", expected one of " in result.stderr
    assert ("'hermess' (did you mean 'hermes'?)" in result.stderr) == (setting == "tool_parser")


def _write(directory: Path, gateway: dict[str, object] | None = None, **arguments: object) -> Path:
    """Write an application on free ports with other arguments."""
    path = write_app(directory / "app.yaml")
    content = yaml.safe_load(path.read_text())
    args = content["applications"][0]["args"]
    args.update(arguments)
    args["gateway"].update(gateway or {})
    path.write_text(yaml.safe_dump(content))
    return path


def test_waiting_ends_at_a_signal_that_reaches_another_thread():
    class StoppedError(Exception):
        pass

    def stop(number: int, frame: FrameType | None):
        raise StoppedError

    def send():  # a new thread inherits the mask of the main one
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        time.sleep(0.2)  # the main thread waits by then
        os.kill(os.getpid(), signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, stop)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    thread = threading.Thread(target=send)
    with subprocess.Popen(["sleep", "20"], text=True) as ray:
        try:
            thread.start()
            with pytest.raises(StoppedError):
                RunningApp(Dashboard("http://127.0.0.1:8265", needs_token=False), ray).wait()
            assert ray.poll() is None, "only the end of Ray ended the wait"
        finally:
            ray.kill()
            thread.join()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
            signal.signal(signal.SIGUSR1, previous)


def test_a_signal_waits_until_a_process_has_started() -> None:
    """A process whose parent is interrupted while it starts finds a pipe without data, and reports that."""
    events: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: events.append("handled"))
    try:
        with _deferred_signals():
            signal.raise_signal(signal.SIGTERM)
            events.append("started")
        assert events == ["started", "handled"]
    finally:
        signal.signal(signal.SIGTERM, before)
