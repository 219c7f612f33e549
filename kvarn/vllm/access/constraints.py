"""Constraints on the output: the backend that enforces them, and checks of them outside vLLM's event loop."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

Backend = Literal["guidance", "xgrammar"]
MAX_CHECKS = 2  # at once, each on one CPU core
MAX_REASON_CHARACTERS = 300
_PREFIXES = (
    "Grammar error: ",
    "Invalid grammar specification",
    "Failed to transform",
    "The provided JSON schema contains features",
)
_PLACE = re.compile(
    r"^(Grammar error|Invalid grammar specification|Failed to transform.*?): |\[[\d:]+\] /\S+: "
)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_OUTSIDE = re.compile(r"Resource '(?:json-schema:///)?(.*?)' is not present in a registry")
_LIMITS = re.compile(r"panic|too (big|large|many)|fuel|limit|recursion", re.IGNORECASE)


def choose_backend(tokenizer: Any) -> Backend:
    """Return the backend of engines of a model.

    An engine has one backend for life, and vLLM's "auto" leaves its choice to the first request. llguidance does not
    read slow tokenizers, and no constraint of it allows special tokens, as which some vocabularies mark their bytes.
    """
    if hasattr(tokenizer, "llg_tokenizer"):  # Mistral's
        return "guidance"
    added = tokenizer.added_tokens_decoder.values()
    has_special_bytes = any(token.special and _BYTE.fullmatch(token.content) for token in added)
    return "guidance" if tokenizer.is_fast and not has_special_bytes else "xgrammar"


def schema_problem(schema: str) -> str | None:
    """Return why a JSON schema, given as text, cannot be enforced, without a full stop; None if it seems that it can.

    The answer is llguidance's, and takes it up to a second for a large schema.
    """
    from llguidance import LLMatcher

    error = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))
    return _reason(error) if error else None


class ConstraintError(ValueError):
    """A constraint cannot be enforced; the message says why, without a full stop."""


class ConstraintChecks:
    """Checks the sampling parameters of constrained requests in threads.

    vLLM's own check runs on the event loop, takes up to a second for a large constraint, and passes some that
    fail later, when the grammar is compiled or the first token is sampled.

    Args:
        engine: the engine that will take the requests.
    """

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(MAX_CHECKS, thread_name_prefix="constraint")

    async def check(self, params: SamplingParams) -> None:
        """Verify `params` as vLLM does, if they hold a constraint; vLLM does not repeat that then.

        Raises:
            ConstraintError: no output can satisfy the constraint, or the backend cannot enforce it.
            VLLMClientError: vLLM rejects another parameter.
        """
        if params.structured_outputs is not None:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._check, params)

    def close(self) -> None:
        """Start no more checks."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check(self, params: SamplingParams) -> None:
        from vllm.exceptions import VLLMClientError

        config = self._engine.vllm_config
        try:
            params.verify(
                config.model_config,
                config.speculative_config,
                config.structured_outputs_config,
                self._tokenizer,
            )
        except VLLMClientError as error:
            if str(error).startswith(_PREFIXES):
                raise ConstraintError(_reason(str(error))) from None
            raise
        self._try(params)
        vars(params)["verify"] = _verified

    def _try(self, params: SamplingParams) -> None:
        """Compile the grammar and compute the tokens that it allows first, as the engine core will."""
        if self._engine.vllm_config.structured_outputs_config.backend != "guidance":
            return
        from llguidance import LLMatcher
        from vllm.v1.structured_output.backend_guidance import serialize_guidance_grammar
        from vllm.v1.structured_output.request import get_structured_output_key

        assert params.structured_outputs is not None
        grammar = serialize_guidance_grammar(*get_structured_output_key(params.structured_outputs))
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        allowed = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            raise ConstraintError(_reason(matcher.get_error()))
        if not any(allowed):
            raise ConstraintError("no output satisfies it")

    @property
    def _tokenizer(self) -> Any:
        return self._engine.get_tokenizer()

    @cached_property
    def _vocabulary(self) -> Any:
        """The backend's view of the vocabulary, which takes a moment to build."""
        from llguidance.hf import from_tokenizer

        tokenizer = self._tokenizer
        if hasattr(tokenizer, "llg_tokenizer"):
            return tokenizer.llg_tokenizer
        vocab_size = self._engine.vllm_config.model_config.get_vocab_size()
        return from_tokenizer(tokenizer, max(vocab_size, len(tokenizer)))


def _verified(*_: object) -> None:
    """Stand in for `verify` of parameters that have been verified."""


def _reason(error: str) -> str:
    """Return the cause in a message of the backend, which may quote the constraint and a stack."""
    error = _PLACE.sub("", error)
    if "NoExtension" in error:
        return "no output satisfies it"
    if outside := _OUTSIDE.search(error):
        place = outside[1][:MAX_REASON_CHARACTERS]
        return f"{place!r} is outside the schema: references must be within it"
    if cause := re.search(r"^error: (.+)$", error, re.MULTILINE):
        return cause[1][:MAX_REASON_CHARACTERS]
    if _LIMITS.search(error):
        return "it is too large or too complex"
    return error.strip().partition("\n")[0].rstrip(".")[:MAX_REASON_CHARACTERS]
