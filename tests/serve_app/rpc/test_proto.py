"""The wire contract: generated code matches the protos, and the protos follow buf's standard rules."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

ROOT = Path(__file__).parents[3]
PROTOS = sorted((ROOT / "protos").rglob("*.proto"))
FIELD, SERVICE, METHOD, MESSAGE, NESTED, ENUM, ENUM_VALUE, ENUM_IN = 2, 6, 2, 4, 3, 5, 2, 4
LOWER_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
PASCAL = re.compile(r"([A-Z][a-z0-9]*)+")


def protoc(*options: str) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", *options, *map(str, PROTOS)]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    out = tmp_path_factory.mktemp("descriptors") / "set.binpb"
    protoc(f"--descriptor_set_out={out}", "--include_source_info")
    return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def messages(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], DescriptorProto]]:
    """Each message declared in the file, with its source path; without map entries."""
    pending = [((MESSAGE, i), m) for i, m in enumerate(file.message_type)]
    while pending:
        path, message = pending.pop()
        if not message.options.map_entry:
            yield path, message
            pending += [((*path, NESTED, i), m) for i, m in enumerate(message.nested_type)]


def enums(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], object]]:
    yield from (((ENUM, i), e) for i, e in enumerate(file.enum_type))
    for path, message in messages(file):
        yield from (((*path, ENUM_IN, i), e) for i, e in enumerate(message.enum_type))


def test_generated_code_is_current(tmp_path: Path) -> None:
    protoc(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}")
    generated = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*_pb2*.py*")}
    committed = {path.relative_to(ROOT): path.read_bytes() for path in ROOT.glob("kvarn/v1/*_pb2*.py*")}
    assert generated.keys() == committed.keys()
    assert [str(name) for name in generated if generated[name] != committed[name]] == [], "run `make proto`"


def test_the_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "api" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    written = {name: (ROOT / "docs" / "api" / name).read_text() for name in generate.pages()}
    assert [name for name, text in generate.pages().items() if text != written[name]] == [], (
        "run `make proto`"
    )


def test_packages_are_versioned_and_match_directories(files: list[FileDescriptorProto]) -> None:
    for file in files:
        assert re.search(r"\.v\d+$", file.package), file.name
        assert Path(file.name).parent == Path(*file.package.split(".")), file.name
        assert LOWER_SNAKE.fullmatch(Path(file.name).stem), file.name
        assert file.syntax == "proto3", file.name


def test_names(files: list[FileDescriptorProto]) -> None:
    for file in files:
        for _, message in messages(file):
            assert PASCAL.fullmatch(message.name), message.name
            assert all(LOWER_SNAKE.fullmatch(field.name) for field in message.field), message.name
            assert all(LOWER_SNAKE.fullmatch(oneof.name.lstrip("_")) for oneof in message.oneof_decl)
        for service in file.service:
            assert PASCAL.fullmatch(service.name), service.name
            assert all(PASCAL.fullmatch(method.name) for method in service.method), service.name


def test_enum_values_start_with_the_enum_name_and_unspecified_is_first(
    files: list[FileDescriptorProto],
) -> None:
    for file in files:
        for _, enum in enums(file):
            prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
            assert all(value.name.startswith(prefix) for value in enum.value), enum.name
            assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}UNSPECIFIED", 0)


def test_each_method_has_its_own_request_and_response(files: list[FileDescriptorProto]) -> None:
    used: list[str] = []
    for file in files:
        for service in file.service:
            for method in service.method:
                for suffix, name in (("Request", method.input_type), ("Response", method.output_type)):
                    short = name.rpartition(".")[2]
                    assert short in (method.name + suffix, service.name + method.name + suffix)
                    used.append(name)
    assert len(used) == len(set(used))


def test_everything_is_commented(files: list[FileDescriptorProto]) -> None:
    for file in files:
        commented = {
            tuple(location.path)
            for location in file.source_code_info.location
            if location.leading_comments.strip()
        }
        wanted: dict[tuple[int, ...], str] = {}
        for path, message in messages(file):
            wanted[path] = message.name
            wanted |= {(*path, FIELD, i): f"{message.name}.{f.name}" for i, f in enumerate(message.field)}
        for path, enum in enums(file):
            wanted[path] = enum.name
            wanted |= {(*path, ENUM_VALUE, i): value.name for i, value in enumerate(enum.value)}
        for i, service in enumerate(file.service):
            wanted[SERVICE, i] = service.name
            wanted |= {(SERVICE, i, METHOD, j): method.name for j, method in enumerate(service.method)}
        assert [name for path, name in wanted.items() if path not in commented] == [], file.name
