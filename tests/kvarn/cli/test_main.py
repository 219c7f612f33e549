"""The command line: bad input is one sentence and exit code 1; JSON output is clean."""

import json
import os
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import grpc
import pytest
import trustme
import yaml
from typer.testing import CliRunner, Result

from kvarn import cli
from kvarn.cli import doctor
from kvarn.cli.connection import Credentials
from kvarn.cli.doctor import Check, Diagnosis
from serve_app.bench.bench_processes import free_port
from serve_app.client import RETRY_S, Client, UnauthenticatedError
from serve_app.rpc.channels import Tls

APP_YAML = Path(__file__).parents[3] / "cluster" / "app.yaml"
SOUND = Diagnosis(
    versions={"python": "3.11", "ray": None},
    machine={"cpu": "some"},
    hooks=[Check("page size", ok=True, detail="vllm.attention")],
    self_test=[Check("kvarn_k4v2_g128", ok=True, detail="close")],
)
BROKEN = Diagnosis(
    SOUND.versions, SOUND.machine, [Check("page size", ok=False, detail="gone")], SOUND.self_test
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr


@pytest.fixture
def write_app(tmp_path: Path):
    """Writes cluster/app.yaml with some of its args changed; returns the path."""

    def write(engine: dict | None = None, gateway: dict | None = None, **application: object) -> Path:
        content = yaml.safe_load(APP_YAML.read_text())
        entry = content["applications"][0]
        entry.update(application)
        entry["args"]["engine"].update(engine or {})
        entry["args"]["gateway"].update(gateway or {})
        path = tmp_path / "app.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def free_ports() -> dict[str, object]:
    """Settings of gateways that collide with no other process."""
    return {"port": free_port(), "http": {"port": free_port()}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workloads", "0x100+8"], ["requests of workload 0x100+8 is 0", "at least 1"]),
        (["--workloads", "4x100"], ["workload '4x100' is not understood", "4x1000+64"]),
        (["--shape", "9b"], ["shape '9b' is not known", "1b, 4b, 8b, 70b"]),
        (["--gpu-memory-utilization", 2], ["gpu_memory_utilization is 2"]),
        (["--plot", "chart.pdf"], [".png or .svg"]),
        (["--repeats", 0], ["repeats is 0"]),
        (["--kv-cache-memory-gib", 0], ["above 0"]),
        (["--kv-cache-memory-gib", "nan"], ["above 0"]),
        (["--kv-cache-dtypes", " , "], ["name at least one"]),
        (["--kv-cache-dtypes", "auto,kvarn_k9v9"], ["kvarn_k9v9", "kvarn_k4v2_g128"]),
        (["--model", "no/such/dir"], ["no/such/dir", "directory"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_bench_refuses(arguments, words):
    assert_refused(run("bench", "engine", *arguments), *words)


def test_bench_refuses_an_output_it_could_not_write():
    assert_refused(run("bench", "engine", "--json", "/no/such/dir/out.json"), "/no/such/dir")


def test_doctor_prints_tables(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda *of_yaml: SOUND)
    result = run("doctor")
    assert result.exit_code == 0
    assert "page size" in result.stdout
    assert "not installed" in result.stdout


def test_doctor_prints_json(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda *of_yaml: SOUND)
    report = json.loads(run("doctor", "--json").stdout)
    assert report["ok"]
    assert report["hooks"] == [{"name": "page size", "ok": True, "detail": "vllm.attention"}]


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["table", "json"])
def test_doctor_fails_with_a_failed_check(monkeypatch, arguments):
    monkeypatch.setattr(doctor, "examine", lambda *of_yaml: BROKEN)
    assert run("doctor", *arguments).exit_code == 1


def test_serve_refuses_a_missing_file():
    assert_refused(run("serve", "no.yaml"), "no.yaml", "No such file")


@pytest.mark.parametrize("text", ["a: [", "just text", "applications: []", "applications: {}", ""])
def test_serve_refuses_a_file_that_is_not_a_serve_yaml(tmp_path, text):
    path = tmp_path / "app.yaml"
    path.write_text(text)
    assert_refused(run("serve", path), "app.yaml")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("# caf\u00e9".encode("latin-1"), "is not UTF-8 text: save it in that encoding"),
        ("# caf\u00e9".encode("utf-16"), "is not UTF-8 text: save it in that encoding"),
        (b"\x7fELF\x02\x01\x01\x00\xff", "is not UTF-8 text: save it in that encoding"),
        (b"\x00\x01", "is not valid YAML: "),
        (b"since: 2026-13-01", "is not valid YAML: month must be in 1..12"),
    ],
    ids=["latin-1", "utf-16", "binary", "control characters", "no date"],
)
def test_a_file_that_is_not_text_is_one_sentence_and_an_event(tmp_path, content, problem):
    path = tmp_path / "app.yaml"
    path.write_bytes(content)
    assert_refused(run("doctor", path), f"{path} {problem}")
    refused = run("serve", "--json", path)
    assert_refused(refused, f"{path} {problem}")
    event = json.loads(refused.stdout)
    assert event["event"] == "error"
    assert event["message"].startswith(f"{path} {problem}")


def test_serve_refuses_another_application(write_app):
    assert_refused(run("serve", write_app(import_path="other:app")), "other:app", "serve_app.app:build")


def test_serve_refuses_an_unknown_setting(write_app):
    assert_refused(
        run("serve", write_app(engine={"max_seqs": 3})), "args.engine.max_seqs", "there is no such setting"
    )


def test_serve_refuses_an_unknown_preset(write_app):
    path = write_app(engine={"kv_cache_dtype": "kvarn_k9v9_g128"})
    assert_refused(run("serve", path), "args.engine.kv_cache_dtype", "kvarn_k4v2_g128")


def test_serve_refuses_more_cpus_than_there_are(write_app):
    assert_refused(run("serve", write_app(engine={"num_replicas": 10_000})), "10000 CPUs", "num_replicas")


@pytest.mark.parametrize("command", ["serve", "doctor"])
@pytest.mark.parametrize("cache", ["auto", "kvarn_k4v2_g128"])
def test_requests_longer_than_the_model_holds_are_refused(write_app, command, cache):
    engine = {"num_replicas": 1, "max_model_len": 8193, "kv_cache_dtype": cache}
    path = write_app(engine=engine, gateway=free_ports())
    assert_refused(run(command, path), "engine.max_model_len is 8193: this model holds 1 to 8192 tokens")


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_a_model_whose_config_is_broken_is_refused(write_app, command, tmp_path):
    (tmp_path / "config.json").write_text("{")
    path = write_app(engine={"num_replicas": 1}, gateway=free_ports())
    path.write_text(path.read_text().replace("smollm2-135m-instruct", str(tmp_path)))
    assert_refused(run(command, path), f"{tmp_path}/config.json is not JSON")


def test_a_start_takes_some_time():
    result = run("serve", APP_YAML, "--timeout-s", -1)
    assert result.exit_code == 2
    assert "--timeout-s" in result.stderr


@pytest.mark.parametrize("command", ["serve", "doctor"])
@pytest.mark.parametrize("setting", ["port", "http.port"])
def test_a_port_that_no_client_could_know_is_refused(write_app, command, setting):
    ports = {**free_ports(), **({"port": 0} if setting == "port" else {"http": {"port": 0}})}
    path = write_app(engine={"num_replicas": 1}, gateway=ports)
    assert_refused(run(command, path), f"{path}: args.gateway.{setting} is 0: give the port that clients")


def test_serve_refuses_a_taken_port(write_app):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = write_app(engine={"num_replicas": 1}, gateway={"port": port})
        assert_refused(run("serve", path), f"127.0.0.1:{port} is in use", "gateway.port")


def test_serve_refuses_a_missing_model(write_app):
    content = write_app(engine={"num_replicas": 1}, gateway=free_ports())
    content.write_text(content.read_text().replace("smollm2-135m-instruct", "no/such/model"))
    assert_refused(run("serve", content), "no/such/model")


def test_chat_says_when_nobody_answers():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert_refused(run("chat", "--address", address, "hello"), address)


@pytest.mark.parametrize("command", [["status"], ["chat", "Hi"]])
def test_an_unknown_host_is_reported_at_once(command: list[str]) -> None:
    started_s = time.monotonic()
    result = run(*command, "--address", "nohost.invalid:1")
    assert_refused(result, "The host name in nohost.invalid:1 cannot be resolved")
    assert time.monotonic() - started_s < RETRY_S


@pytest.mark.parametrize("option", ["--ca", "--cert"])
def test_a_file_without_a_certificate_is_named(option: str, tmp_path: Path) -> None:
    wrong = tmp_path / "plan.json"
    wrong.write_text("{}")
    files = ["--ca", wrong] if option == "--ca" else ["--cert", wrong, "--key", wrong]
    assert_refused(run("chat", "Hi", *files), f"{option} {wrong}", "PEM")


def test_certificates_are_taken(tmp_path: Path) -> None:
    ca = trustme.CA()
    own = ca.issue_cert("me@example.com")
    paths = [tmp_path / name for name in ("ca.pem", "own.pem", "own.key")]
    for path, pem in zip(paths, (ca.cert_pem, own.cert_chain_pems[0], own.private_key_pem), strict=True):
        path.write_bytes(pem.bytes())
    assert Credentials(*paths).tls() == Tls(*paths)


@pytest.mark.parametrize("key", ["\u043a\u043b\u044e\u0447", "kvarn-1-2\n"])
def test_a_key_that_no_header_can_hold_is_reported(key: str) -> None:
    assert_refused(run("chat", "Hi", "--api-key", key), "--api-key must be printable ASCII")


@pytest.mark.parametrize("command", [["status"], ["chat", "Hi"]])
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("", "expected host:port, got an empty address"),
        ("nonsense", "expected host:port, got nonsense"),
        ("http://127.0.0.1:18000", "expected host:port, without http://, got"),
        ("127.0.0.1:99999", "expected a port from 1 to 65535, got"),
        ("127.0.0.1:0", "expected a port from 1 to 65535, got"),
        ("127.0.0.1:1/v1", "expected host:port, got 127.0.0.1:1/v1"),
        ("127.0.0.1:" + "9" * 5000, "expected host:port, got"),
        (":50051", "expected host:port, got :50051"),
        ("[::1:50051", "expected host:port, got"),
    ],
)
def test_an_invalid_address_is_reported(command: list[str], address: str, reason: str) -> None:
    result = run(*command, "--address", address)
    assert result.exit_code == 2
    assert reason in result.stderr


def test_an_answer_has_at_least_one_token() -> None:
    result = run("chat", "Hi", "--max-tokens", "-3")
    assert result.exit_code == 2
    assert "equal to 1" in result.stderr


def test_serve_says_nothing_through_tls(write_app):
    files = {"certificate": "c.pem", "private_key": "k.pem"}
    path = write_app(gateway={**free_ports(), "security": {"tls": files}}, engine={"num_replicas": 1})
    assert_refused(run("serve", path, "--say", "Hi"), "--say cannot be answered: the gateways have TLS")


def test_the_error_for_a_rejected_key_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(client: Client) -> None:
        raise UnauthenticatedError(grpc.StatusCode.UNAUTHENTICATED, "An API key is needed.")

    monkeypatch.setattr(Client, "cache_state", refuse)
    assert_refused(run("status"), "An API key is needed.", "KVARN_API_KEY")


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"kvarn {version('kvarn')}\n")


def test_vllm_warns_of_nothing_in_a_commands_output() -> None:
    """Of a Triton without a backend for CPUs, for one, as soon as it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_LOGGING_LEVEL"}
    program = "from kvarn.cli.output import quiet_vllm; quiet_vllm(); import vllm.triton_utils"
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
