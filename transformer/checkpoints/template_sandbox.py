"""The sandbox that chat templates run in: Jinja's, with what transformers gives them, and every operation counted.

Operators, calls and filters are counted here, where the environment is asked for them; the rest is where the program is
compiled.
"""

import json
import types
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from .template_meter import Meter, TooMuchError, gathered

LONGEST_DATE_FORMAT = 1000
MOST_CALLS_WITHIN = 100
"""Macros, loops and callers within one another."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The filters, functions and white space that templates of checkpoints are written for, for one run."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, meter: Meter) -> None:
        # Not optimized: what is worked out beforehand would not be counted.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.meter = meter
        # What a compiled program calls by these names, past all that looks at other calls.
        self.meter_passes, self.meter_written, self.meter_made = meter.passes, meter.written, meter.made
        self.meter_compared, self.meter_passed = meter.compared, meter.passed
        own = (self.meter_passes, self.meter_written, self.meter_made, self.meter_compared, self.meter_passed)
        self._own = frozenset(map(id, own))
        self._within = 0
        self.filters["tojson"] = _to_json
        self.filters = {name: self._guarded(name, function) for name, function in self.filters.items()}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        # Random words have no place in a conversation.
        del self.globals["lipsum"]

    def getitem(self, obj: Any, argument: Any) -> Any:
        # Filters that sort or group ask for this once for each of what they are given.
        self.meter.step()
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.meter.operator(operator, left, right)
        return self.meter.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as Jinja's own)
        if id(__obj) in __self._own:
            return __obj(*args)
        meter, receiver = __self.meter, getattr(__obj, "__self__", None)
        for given in (args, kwargs):
            if given:
                meter.size(given)
        if isinstance(__obj, types.BuiltinMethodType):
            args = tuple(map(gathered, args))
            meter.function(__obj.__name__, receiver, args, kwargs)
        elif isinstance(__obj, LoopContext):
            meter.passes(args[0] if args else ())
        if __self._within >= MOST_CALLS_WITHIN:
            raise TooMuchError(f"it calls itself more than {MOST_CALLS_WITHIN} times within one another")
        __self._within += 1
        try:
            return meter.made(super().call(__context, __obj, *args, **kwargs))
        finally:
            __self._within -= 1

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        form, is_map, formatter = value.__self__, value.__name__ == "format_map", _Formatter(self)

        def formatted(*args: Any, **kwargs: Any) -> str:
            if is_map:
                [kwargs] = args
                args = ()
            self.meter.fields(form, [*args, kwargs])
            text: str = type(form)(formatter.vformat(form, args, kwargs))
            return text

        return formatted

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, looked at before and after."""
        # Filters say what they are to be given first: the context, what is known while compiling, or the environment.
        given = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

        # What is given the context is never worked out while a template is compiled.
        @jinja2.pass_context
        def guarded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            value, args = gathered(value), tuple(map(gathered, args))
            self.meter.function(name, value, args, kwargs)
            first: dict[str, list[Any]] = {
                "context": [context],
                "eval_context": [context.eval_ctx],
                "environment": [self],
            }
            return self.meter.made(function(*first.get(given, []), value, *args, **kwargs))

        return guarded


class _Formatter(SandboxedFormatter):
    def __init__(self, environment: Sandbox) -> None:
        super().__init__(environment)
        self._meter = environment.meter

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._meter.field(format_spec)
        return super().format_field(value, format_spec)


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)`, and nothing else of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """What `namespace(...)` makes: names with an underscore at the front are refused, as transformers refuses them."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        given = dict(*rest, **kwargs)
        Namespace.__init__(self)
        for name, value in given.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no names with an underscore in front: {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; its text is what stands within."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Macro) -> str:
        text: str = caller()
        return text


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own would escape what HTML gives a meaning to.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    if len(form) > LONGEST_DATE_FORMAT:
        raise TooMuchError(f"a format of a date has more than {LONGEST_DATE_FORMAT:,} characters")
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
