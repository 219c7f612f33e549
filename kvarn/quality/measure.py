"""Measurement protocols on a running engine; they capture logits in the engine's own process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from kvarn.quality import tasks
from kvarn.quality.conversations import CONVERSATIONS, Conversation, conversations
from kvarn.quality.divergence import Floats, compare, contrast, estimate, summarize
from kvarn.quality.recalls import RecallScore, summarize_recalls
from kvarn.quality.settings import FIRST_SCORED, REFERENCE, TILE, QualityError, WorkerSettings
from kvarn.vllm.access.engine_core import scheduler_of

LOGITS_ROWS = 128  # hidden states per logits computation
FORCED = "kvarn_forced_sequence"  # key in SamplingParams.extra_args

Progress = Callable[[str, int, int], None]
Record = Callable[[int, Tensor, Tensor], None]


class EngineMeasurement:
    """Runs protocols on one engine; stores the reference's logits and answers for the other dtypes."""

    def __init__(self, llm: LLM, settings: WorkerSettings, progress: Progress) -> None:
        self._llm, self._settings, self._progress = llm, settings, progress
        self._work = Path(settings.work)
        self._sequences: list[list[int]] = json.loads((self._work / "sequences.json").read_text())
        (self._model,) = llm.apply_model(lambda model: model)
        self._finite = _FiniteLayers(self._model)

    def run(self, protocol: str) -> dict[str, Any]:
        """Run one protocol and return its row.

        Raises:
            QualityError: logits are not finite.
        """
        self._llm.reset_prefix_cache()
        fields: dict[str, Any] = getattr(self, f"_{protocol}")()
        return {
            "dtype": self._settings.kv_cache_dtype,
            "protocol": protocol,
            **fields,
            "bytes_per_token": bytes_per_token(self._llm, self._settings.kv_cache_dtype),
        }

    def _prefill(self) -> dict[str, Any]:
        scores = self._scores("prefill")
        for index, sequence in enumerate(self._sequences):
            self._progress("prefill", index, len(self._sequences))
            with self._hidden_states(lambda *chunk, index=index: scores.record_chunk(index, *chunk)):
                # The last token has no successor to score, and the sampled token takes its position.
                self._generate(
                    [sequence[:-1]], [SamplingParams(temperature=0, max_tokens=1, detokenize=False)]
                )
        self._progress("prefill", len(self._sequences), len(self._sequences))
        return self._summary("prefill", scores)

    def _pseudo_decode(self) -> dict[str, Any]:
        scores = self._scores("pseudo_decode")
        steps = len(self._sequences[0]) - TILE
        batch = self._settings.max_num_seqs
        total = steps * -(-len(self._sequences) // batch)
        for first in range(0, len(self._sequences), batch):
            indices = range(first, min(first + batch, len(self._sequences)))
            done = steps * first // batch

            def record(sequence: int, step: int, logits: Tensor, done: int = done) -> None:
                scores.record(sequence, TILE - 1 + step, logits[None])
                self._progress("pseudo-decode", done + step + 1, total)

            ForcedTokens.sequences, ForcedTokens.record = self._sequences, record
            self._generate(
                [self._sequences[index][:TILE] for index in indices],
                [
                    SamplingParams(
                        temperature=0,
                        max_tokens=steps,
                        ignore_eos=True,
                        detokenize=False,
                        extra_args={FORCED: index},
                    )
                    for index in indices
                ],
            )
        return self._summary("pseudo_decode", scores)

    def _retrieval(self) -> dict[str, Any]:
        asked = tasks.questions(self._llm.get_tokenizer(), self._settings.max_model_len, self._settings.seed)
        right: list[bool] = []
        for length in dict.fromkeys(question.length for question in asked):
            group = [question for question in asked if question.length == length]
            self._progress("retrieval", len(right), len(asked))
            params = [SamplingParams(temperature=0, max_tokens=len(q.answer), ignore_eos=True) for q in group]
            # The first question leaves the context in the prefix cache for the others.
            given = self._generate([group[0].prompt], params[:1])
            given += self._generate([question.prompt for question in group[1:]], params[1:])
            right += [out == question.answer for out, question in zip(given, group, strict=True)]
        self._progress("retrieval", len(asked), len(asked))
        theirs = self._kept("retrieval.json", right)
        accuracy = estimate(np.array([right], float), self._settings.seed, blocks=1)
        lost = estimate(np.array([theirs], float) - np.array([right], float), self._settings.seed, blocks=1)
        cells = sorted({(question.length, question.depth) for question in asked})
        return {
            "accuracy": accuracy.value,
            "accuracy_ci": [accuracy.low, accuracy.high],
            "lost": lost.value,
            "lost_ci": [lost.low, lost.high],
            "smallest_effect": accuracy.smallest_effect,
            "questions": len(asked),
            "by_length_and_depth": [
                {
                    "length": length,
                    "depth": depth,
                    "accuracy": float(
                        np.mean(
                            [
                                r
                                for r, q in zip(right, asked, strict=True)
                                if (q.length, q.depth) == (length, depth)
                            ]
                        )
                    ),
                }
                for length, depth in cells
            ],
        }

    def _greedy(self) -> dict[str, Any]:
        prompts = [sequence[: tasks.GREEDY_PROMPT_TOKENS] for sequence in self._sequences]
        tokens = min(tasks.GREEDY_TOKENS, self._settings.max_model_len - len(prompts[0]))
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self._progress("greedy", 0, 1)
        ours = self._generate(prompts, [params] * len(prompts))
        self._progress("greedy", 1, 1)
        theirs = self._kept("greedy.json", ours)
        equal = [_common_prefix(a, b) for a, b in zip(ours, theirs, strict=True)]
        length = estimate(np.array([equal], float), self._settings.seed, blocks=1)
        return {
            "equal_tokens_mean": length.value,
            "equal_tokens_ci": [length.low, length.high],
            "equal_tokens": equal,
            "of_tokens": tokens,
            "never_diverged": float(np.mean([count == tokens for count in equal])),
        }

    def _agentic(self) -> dict[str, Any]:
        text = [token for sequence in self._sequences for token in sequence]
        longest = self._settings.max_model_len
        talks = conversations(self._llm.get_tokenizer(), text, longest, self._settings.seed)
        if not talks:
            raise QualityError(
                f"the model supports {longest} tokens: --agentic needs more than {min(CONVERSATIONS)}"
            )
        scored: list[RecallScore] = []
        for number, talk in enumerate(talks):
            self._progress("conversations", number, len(talks))
            scored += self._recall_scores(talk)
        self._progress("conversations", len(talks), len(talks))
        theirs = [RecallScore(*score) for score in self._kept("agentic.json", scored)]
        recalls = [(talk.length, recall) for talk in talks for recall in talk.recalls]
        return summarize_recalls(recalls, scored, theirs, self._settings.seed)

    def _recall_scores(self, talk: Conversation) -> list[RecallScore]:
        """Feed a conversation as one prompt; score what it recalls by the logits before each token."""
        ids = torch.tensor(talk.ids)
        scored = torch.tensor([place for recall in talk.recalls for place in recall.places])
        found: dict[int, RecallScore] = {}

        def record(positions: Tensor, compute_logits: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
            rows = torch.isin(positions + 1, scored.to(positions.device))
            if not rows.any():
                return
            logits, places = compute_logits(hidden[rows]).float().cpu(), (positions[rows] + 1).cpu()
            if not logits.isfinite().all():
                raise QualityError(f"logits of a conversation are not finite: {self._finite.first_bad()}")
            nats = -logits.log_softmax(-1).gather(1, ids[places][:, None])[:, 0]
            right = logits.argmax(-1) == ids[places]
            for place, *score in zip(places.tolist(), right.tolist(), nats.tolist(), strict=True):
                found[place] = RecallScore(*score)

        with self._hidden_states(record):
            self._generate([talk.ids], [SamplingParams(temperature=0, max_tokens=1, detokenize=False)])
        return [RecallScore.of([found[place] for place in recall.places]) for recall in talk.recalls]

    def _generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
        outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _kept(self, name: str, ours: Any) -> Any:
        """Load the reference's answers, storing `ours` first if this engine is the reference."""
        path = self._work / name
        if self._settings.kv_cache_dtype == REFERENCE:
            path.write_text(json.dumps(ours))
        return json.loads(path.read_text())

    def _scores(self, protocol: str) -> _Scores:
        logits = ReferenceLogits(
            self._work / f"{protocol}.logits",
            positions=len(self._sequences[0]) - 1 - FIRST_SCORED,
            vocab_size=self._llm.llm_engine.model_config.get_vocab_size(),
            dtype=self._llm.llm_engine.model_config.dtype,
        )
        is_reference = self._settings.kv_cache_dtype == REFERENCE
        return _Scores(self._sequences, logits, is_reference, self._finite)

    def _summary(self, protocol: str, scores: _Scores) -> dict[str, Any]:
        """The metrics of a row with differences to earlier dtypes; stores the measurements for later ones."""
        measured, seed = scores.complete(), self._settings.seed
        np.save(self._measures(protocol, self._settings.kv_cache_dtype), measured.astype(np.float32))
        against = {
            other: contrast(measured, np.load(path).astype(np.float64), seed)
            for other in self._settings.earlier[protocol]
            if (path := self._measures(protocol, other)).exists()
        }
        return {**summarize(measured, FIRST_SCORED, seed), "against": against}

    def _measures(self, protocol: str, dtype: str) -> Path:
        return self._work / f"{protocol}.{dtype}.npy"

    @contextmanager
    def _hidden_states(
        self, record: Callable[[Tensor, Callable[[Tensor], Tensor], Tensor], None]
    ) -> Iterator[None]:
        """Call `record(positions, compute_logits, hidden states)` after each forward pass of the model."""
        forward = self._model.forward

        def recording(input_ids: Tensor, positions: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            hidden: Tensor = forward(input_ids, positions, *args, **kwargs)
            record(positions, self._model.compute_logits, hidden)
            return hidden

        self._model.forward = recording
        try:
            yield
        finally:
            self._model.forward = forward


class ForcedTokens(LogitsProcessor):
    """Teacher forcing: a request with `FORCED` in its extra_args emits its text sequence, and `record` gets its logits.

    Logits are recorded before the text's token is forced, so cache errors accumulate as in generation.
    """

    sequences: ClassVar[list[list[int]]] = []
    record: ClassVar[Callable[[int, int, Tensor], None]]

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        # Row of the batch -> sequence, tokens emitted so far.
        self._forced: dict[int, tuple[int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        def state(params: SamplingParams, _: Any, said: list[int]) -> tuple[int, list[int]] | None:
            sequence = (params.extra_args or {}).get(FORCED)
            return None if sequence is None else (sequence, said)

        process_dict_updates(self._forced, batch_update, state)

    def apply(self, logits: Tensor) -> Tensor:
        for row, (sequence, said) in self._forced.items():
            ForcedTokens.record(sequence, len(said), logits[row])
            token = self.sequences[sequence][TILE + len(said)]
            logits[row] = -torch.inf
            logits[row, token] = 0.0
        return logits


class ReferenceLogits:
    """Logits of the unquantized cache on disk, lossless in the model's dtype."""

    def __init__(self, path: Path, positions: int, vocab_size: int, dtype: torch.dtype) -> None:
        self._path, self._positions, self._vocab_size, self._dtype = path, positions, vocab_size, dtype
        self._row_bytes = vocab_size * dtype.itemsize

    def write(self, sequence: int, position: int, logits: Tensor) -> None:
        """Store logits [N, V] of consecutive scored positions; raise OSError if the disk is full."""
        self._path.touch()
        with self._path.open("r+b") as file:
            file.seek((sequence * self._positions + position) * self._row_bytes)
            file.write(logits.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().data)

    def read(self, sequence: int, position: int, count: int) -> Tensor:
        """Load [count, V] logits of consecutive scored positions."""
        with self._path.open("rb") as file:
            file.seek((sequence * self._positions + position) * self._row_bytes)
            buffer = bytearray(file.read(count * self._row_bytes))
        return torch.frombuffer(buffer, dtype=self._dtype).view(count, self._vocab_size)


class _Scores:
    """Results of `compare` for every scored position of every sequence."""

    def __init__(
        self,
        sequences: list[list[int]],
        reference: ReferenceLogits,
        is_reference: bool,
        finite: _FiniteLayers,
    ) -> None:
        self._tokens = torch.tensor(sequences)
        self._reference, self._is_reference, self._finite = reference, is_reference, finite
        self._measured: Floats = np.full((len(sequences), len(sequences[0]) - 1 - FIRST_SCORED, 4), np.nan)

    def record_chunk(self, sequence: int, positions: Tensor, compute_logits: Any, hidden: Tensor) -> None:
        """Score consecutive positions of one sequence from their hidden states."""
        scored = (positions >= FIRST_SCORED) & (positions < self._tokens.shape[1] - 1)
        rows, first = hidden[scored], positions[scored]
        for start in range(0, len(rows), LOGITS_ROWS):
            part = slice(start, start + LOGITS_ROWS)
            self.record(sequence, int(first[part][0]), compute_logits(rows[part]))

    def record(self, sequence: int, position: int, logits: Tensor) -> None:
        """Score logits [N, V] of the positions from `position` on, ignoring positions outside the scored range."""
        index = position - FIRST_SCORED
        if not 0 <= index < self._measured.shape[1]:
            return
        if not logits.isfinite().all():
            raise QualityError(f"logits at position {position} are not finite: {self._finite.first_bad()}")
        logits = logits.cpu()
        if self._is_reference:
            self._reference.write(sequence, index, logits)
            reference = logits
        else:
            reference = self._reference.read(sequence, index, len(logits))
        following = self._tokens[sequence, position + 1 : position + 1 + len(logits)]
        self._measured[sequence, index : index + len(logits)] = compare(reference, logits, following).numpy()

    def complete(self) -> Floats:
        """Return [sequences, positions, 4]; raise QualityError unless every position was scored."""
        if np.isnan(self._measured).any():
            raise QualityError("the engine left positions out: this is a bug in the measurement")
        return self._measured


class _FiniteLayers:
    """Records, without synchronizing with the device, which decoder layers returned non-finite values."""

    def __init__(self, model: nn.Module) -> None:
        self._names: list[str] = []
        self._bad: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if re.search(r"layers\.\d+$", name):
                self._names.append(name)
                module.register_forward_hook(lambda *call, name=name: self._note(name, call[-1]))

    def _note(self, name: str, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        bad = torch.stack([~part.isfinite().all() for part in parts if part is not None]).any()
        self._bad[name] = bad if name not in self._bad else self._bad[name] | bad

    def first_bad(self) -> str:
        """Describe the first layer with non-finite output."""
        for name in self._names:
            if name in self._bad and bool(self._bad[name]):
                return f"{name} is the first layer with non-finite output"
        return "all layers' outputs are finite, so the final norm or the head is the cause"


def bytes_per_token(llm: Any, kv_cache_dtype: str) -> float:
    """Cache bytes per token in all layers, as vLLM allocates them, or as a simulated format would."""
    from kvarn.quality.formats import SIMULATED

    groups = scheduler_of(llm.llm_engine).kv_cache_config.kv_cache_groups
    if kv_cache_dtype not in SIMULATED:
        return float(
            sum(
                len(g.layer_names) * g.kv_cache_spec.page_size_bytes / g.kv_cache_spec.block_size
                for g in groups
            )
        )
    head_bytes = SIMULATED[kv_cache_dtype].head_bytes
    return float(
        sum(
            len(g.layer_names) * g.kv_cache_spec.num_kv_heads * head_bytes(g.kv_cache_spec.head_size)
            for g in groups
        )
    )


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
