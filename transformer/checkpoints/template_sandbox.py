"""Sandbox of chat templates: Jinja's sandbox with the functions of transformers, and a meter of all operations.

Operators, calls and filters are counted here, because Jinja asks the environment for them. Other operations are counted
by calls in the compiled program (template_program.py).
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

from .template_meter import Meter, TooMuchError, as_list

MAX_DATE_FORMAT_CHARACTERS = 1000
"""Characters of the format of `strftime_now`."""

MAX_NESTED_CALLS = 100
"""Depth of nested macros, loops and callers."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Environment of one run, with the filters, functions and white space rules that chat templates expect."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, meter: Meter) -> None:
        # Not optimized, because constants that Jinja folds at compile time would not be counted.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.meter = meter
        # The compiled program calls these methods by name; `call` does not count them.
        self.meter_count_loop, self.meter_count_output, self.meter_count_result = (
            meter.count_loop,
            meter.count_output,
            meter.count_result,
        )
        self.meter_count_compare, self.meter_count_literal = meter.count_compare, meter.count_literal
        own = (
            self.meter_count_loop,
            self.meter_count_output,
            self.meter_count_result,
            self.meter_count_compare,
            self.meter_count_literal,
        )
        self._own = frozenset(map(id, own))
        self._depth = 0
        self.filters["tojson"] = _to_json
        self.filters = {name: self._guarded(name, function) for name, function in self.filters.items()}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        # Random text is not needed in a conversation.
        del self.globals["lipsum"]

    def getitem(self, obj: Any, argument: Any) -> Any:
        # Filters that sort or group call this once per element.
        self.meter.step()
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.meter.operator(operator, left, right)
        return self.meter.count_result(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as Jinja's own)
        if id(__obj) in __self._own:
            return __obj(*args)
        meter, receiver = __self.meter, getattr(__obj, "__self__", None)
        for given in (args, kwargs):
            if given:
                meter.size(given)
        if isinstance(__obj, types.BuiltinMethodType):
            args = tuple(map(as_list, args))
            meter.function(__obj.__name__, receiver, args, kwargs)
        elif isinstance(__obj, LoopContext):
            meter.count_loop(args[0] if args else ())
        if __self._depth >= MAX_NESTED_CALLS:
            raise TooMuchError(f"it nests more than {MAX_NESTED_CALLS} calls")
        __self._depth += 1
        try:
            return meter.count_result(super().call(__context, __obj, *args, **kwargs))
        finally:
            __self._depth -= 1

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
        """The filter with a check before it runs and a count of its result."""
        # The first argument that a filter asks for: the context, the evaluation context or the environment.
        given = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

        # A filter that takes the context is never evaluated at compile time.
        @jinja2.pass_context
        def guarded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            value, args = as_list(value), tuple(map(as_list, args))
            self.meter.function(name, value, args, kwargs)
            first: dict[str, list[Any]] = {
                "context": [context],
                "eval_context": [context.eval_ctx],
                "environment": [self],
            }
            return self.meter.count_result(function(*first.get(given, []), value, *args, **kwargs))

        return guarded


class _Formatter(SandboxedFormatter):
    def __init__(self, environment: Sandbox) -> None:
        super().__init__(environment)
        self._meter = environment.meter

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._meter.field(format_spec)
        return super().format_field(value, format_spec)


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)`, without the other attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """Result of `namespace(...)`; names that begin with an underscore are refused, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        given = dict(*rest, **kwargs)
        Namespace.__init__(self)
        for name, value in given.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a name in a namespace cannot begin with an underscore: {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's part for training; it gives the text inside."""

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
    # Jinja's own filter escapes characters for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    if len(form) > MAX_DATE_FORMAT_CHARACTERS:
        raise TooMuchError(f"a date format has more than {MAX_DATE_FORMAT_CHARACTERS:,} characters")
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
