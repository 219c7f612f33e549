"""`kvarn doctor`: versions, the machine, vLLM's hooks, and a self-test of the cache's arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Group, RenderableType
from rich.table import Column, Table
from torch import Tensor

from kvarn.cli.connection import serving_errors
from kvarn.cli.output import AsJson, err, out, quiet_vllm
from kvarn.cpu import decode, prefill, store
from kvarn.engine_limits import EngineLimits, limits_table
from kvarn.environment import machine, versions
from kvarn.presets import PRESETS, Preset
from kvarn.reference import attention
from kvarn.tile import TileLayout

HEAD_DIM = 64
KV_HEADS = 2
QUERY_HEADS = 6
SINK_SLOT, TAIL_SLOT = 0, 1
TOLERANCE = 1e-4  # float32 sums in another order, over values near 1


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="Serve YAML; also shows what limits its engines' concurrency.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this installation: versions, machine, vLLM hooks, cache arithmetic; exit 1 if a check fails."""
    quiet_vllm()
    limits = None if config is None else _limits_of(config)
    with err.status("checking versions and hooks, testing the cache (10 to 30 seconds)"):
        report = examine(limits)
    if as_json:
        out.print_json(json.dumps({**asdict(report), "ok": report.ok}))
    else:
        out.print(render(report))
    if not report.ok:
        raise typer.Exit(1)


def _limits_of(config: Path) -> EngineLimits | None:
    """Concurrency limits of the engines of a Serve YAML; end the command if the YAML or its model is invalid."""
    with serving_errors():
        from serve_app.launch import check_model, limits_of, read_app

        app = read_app(config)
        check_model(app)
        return limits_of(app)


@dataclass(frozen=True)
class Check:
    """The result of one check: `detail` says what was found and, if it is not `ok`, what to change."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings of `kvarn doctor`; a version is None if the package is missing, `limits` without a YAML."""

    versions: dict[str, str | None]
    machine: dict[str, str]
    hooks: list[Check]
    self_test: list[Check]
    limits: EngineLimits | None = None

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in (*self.hooks, *self.self_test))


def examine(limits: EngineLimits | None = None) -> Diagnosis:
    """Run all checks; takes some seconds, mostly to import vLLM.

    Args:
        limits: of the engines that are to run here, if known.
    """
    tests = [self_test(preset) for preset in PRESETS.values()]
    return Diagnosis(versions(), machine(), check_hooks(), tests, limits)


def check_hooks() -> list[Check]:
    """Check the version of the installed vLLM, and what each hook of the plugin finds in it."""
    try:
        from kvarn.vllm.hooks import untested
        from kvarn.vllm.plugin import hook_report
        from kvarn.vllm.versions import TESTED_VLLM_VERSIONS

        refusal, statuses = untested(), hook_report(thorough=True)
    except ImportError as error:
        advice = "install it with `pip install kvarn[cpu]` or `kvarn[gpu]`"
        return [Check("vllm", ok=False, detail=f"vLLM cannot be imported ({error}): {advice}")]
    tested = Check("tested version", refusal is None, str(refusal or ", ".join(TESTED_VLLM_VERSIONS)))
    return [tested, *(Check(status.name, status.ok, status.detail or status.target) for status in statuses)]


def self_test(preset: Preset) -> Check:
    """Quantize a random sequence of three and a third tiles, attend to it, and compare with the reference.

    Decode is checked at the last position, prefill at the first and the last position of each tile.
    """
    layout = TileLayout(preset, HEAD_DIM)
    sequence = _Sequence(layout, length=3 * layout.group + layout.group // 3)
    error = torch.tensor([sequence.decode_error(), sequence.prefill_error()]).max().item()  # NaN if either is
    return Check(
        preset.name,
        ok=error <= TOLERANCE,
        detail=f"within {error:.1e} of the reference ({TOLERANCE:.0e} allowed)",
    )


def render(report: Diagnosis) -> RenderableType:
    """Tables of the report."""
    return Group(
        _facts_table(
            "versions", ((name, found or "not installed") for name, found in report.versions.items())
        ),
        _facts_table("machine", report.machine.items()),
        _checks_table("vLLM hooks", report.hooks),
        _checks_table("self-test", report.self_test),
        *([limits_table(report.limits)] if report.limits else []),
    )


class _Sequence:
    """A random sequence in its own cache: full tiles as records, the first and last tile also in slots."""

    def __init__(self, layout: TileLayout, length: int) -> None:
        self.layout, self.length = layout, length
        random = torch.Generator().manual_seed(0)
        self.query = torch.randn(length, QUERY_HEADS, layout.head_dim, generator=random)
        key, value = torch.randn(2, length, KV_HEADS, layout.head_dim, generator=random)
        self.key, self.value = store.rotate(key), store.rotate(value)
        self.scale = layout.head_dim**-0.5
        self.cache, self.pool = self._store()

    def _store(self) -> tuple[Tensor, Tensor]:
        group, head_dim = self.layout.group, self.layout.head_dim
        full_tiles, tail_rows = divmod(self.length, group)
        cache = torch.zeros(full_tiles, KV_HEADS, self.layout.nbytes, dtype=torch.uint8)
        key_tiles, value_tiles = (
            x[: full_tiles * group].view(full_tiles, group, KV_HEADS, head_dim).transpose(1, 2).contiguous()
            for x in (self.key, self.value)
        )
        store.quantize_tiles(cache, key_tiles, value_tiles, torch.arange(full_tiles), self.layout)
        pool = torch.zeros(2, 2, KV_HEADS, group, head_dim, dtype=torch.float16)
        for slot, start, rows in ((SINK_SLOT, 0, group), (TAIL_SLOT, full_tiles * group, tail_rows)):
            tokens = slice(start, start + rows)
            store.append(pool, self.key[tokens], self.value[tokens], slot * group + torch.arange(rows))
        return cache, pool

    @property
    def block_table(self) -> Tensor:
        """[W] int32; the last tile has no record and is never read through the table."""
        return torch.arange(self.length // self.layout.group + 1, dtype=torch.int32)

    def decode_error(self) -> float:
        """Largest difference of `decode.decode` from the reference at the last position."""
        plan = decode.plan_decode(
            self.block_table.numpy()[None],
            np.array([self.length]),
            np.array([TAIL_SLOT]),
            np.array([SINK_SLOT]),
            self.layout.group,
        )
        result = decode.decode(self.query[-1:], self.cache, self.pool, plan, self.scale, self.layout)
        return self._error(result, torch.tensor([self.length - 1]))

    def prefill_error(self) -> float:
        """Largest difference of `prefill.prefill` from the reference where tiles begin and end."""
        result = prefill.prefill(
            self.query,
            self.key,
            self.value,
            self.cache,
            self.pool,
            self.block_table,
            start=0,
            tail_slot=-1,
            sink_slot=SINK_SLOT,
            scale=self.scale,
            layout=self.layout,
        )
        first = torch.arange(0, self.length, self.layout.group)
        positions = torch.cat([first, first[1:] - 1, torch.tensor([self.length - 1])])
        return self._error(result[positions], positions)

    def _error(self, result: Tensor, positions: Tensor) -> float:
        expected = attention.attend(
            self.query[positions],
            self.key,
            self.value,
            positions,
            sink_kept=True,
            scale=self.scale,
            layout=self.layout,
        )
        return (result.float() - expected).abs().max().item()


def _facts_table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    made = Table(title=title, title_justify="left", show_header=False)
    for name, found in facts:
        made.add_row(name, found)
    return made


def _checks_table(title: str, checks: list[Check]) -> Table:
    made = Table(
        "name", "result", Column(overflow="fold"), title=title, title_justify="left", show_header=False
    )
    for check in checks:
        made.add_row(check.name, "[green]ok[/]" if check.ok else "[red]FAILED[/]", check.detail)
    return made
