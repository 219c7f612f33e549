"""Options of a command, made from the fields of its settings: each option is written once, at its field."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from itertools import chain
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from kvarn.cli.output import one_sentence_errors, quiet_vllm

Command = Callable[..., None]


def options_of(*settings: type[Any]) -> Callable[[Command], Command]:
    """Call a command with an instance of each of the `settings`, its first parameters, made from options.

    Args:
        settings: dataclasses. A field `Annotated[T, typer.Option(...)]` is an option or argument of the command; one
            whose option has a `parser` is given as text. A field that is such a dataclass adds its own options. Any
            other field keeps its default.
    """

    def decorate(command: Command) -> Command:
        others = [*signature(command, eval_str=True).parameters.values()][len(settings) :]

        @wraps(command)
        def run(**given: Any) -> None:
            quiet_vllm()
            with one_sentence_errors():
                made = [_make(kind, given) for kind in settings]
                command(*made, **given)

        keyword_only = (other.replace(kind=Parameter.KEYWORD_ONLY) for other in others)
        own = chain.from_iterable(map(_parameters, settings))
        run.__signature__ = Signature([*own, *keyword_only])  # type: ignore[attr-defined]
        return run

    return decorate


def _parameters(settings: type[Any]) -> Iterator[Parameter]:
    hints = get_type_hints(settings, include_extras=True)
    for field in fields(settings):
        hint, default = hints[field.name], field.default
        if is_dataclass(hint):
            yield from _parameters(hint)  # type: ignore[arg-type]
        elif get_origin(hint) is Annotated:
            kind, option = get_args(hint)
            if option.parser is not None:
                kind, option = str, copy.copy(option)
                option.parser = None
                if isinstance(default, tuple):  # help wraps at spaces, and cuts a word that is too long
                    default = ", ".join(map(str, default))
            yield Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if default is MISSING else default,
                annotation=Annotated[kind, option],
            )


def _make(settings: type[Any], given: dict[str, Any]) -> Any:
    """An instance of `settings`; takes what its fields are given out of `given`."""
    values = {}
    for name, hint in get_type_hints(settings, include_extras=True).items():
        if is_dataclass(hint):
            values[name] = _make(hint, given)  # type: ignore[arg-type]
        elif get_origin(hint) is Annotated:
            _, option = get_args(hint)
            value = given.pop(name)
            values[name] = option.parser(value) if option.parser else value
    return settings(**values)
