"""Programs of chat templates, compiled once; calls of the meter stand where Jinja does not ask its environment."""

from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from .limits import LARGEST_TEMPLATE_OUTPUT, MOST_TEMPLATE_TOKENS
from .template_meter import Meter, TooMuchError
from .template_sandbox import Sandbox


class Program:
    """A template. Raises whatever Jinja and Python raise for a source that is no template, or TooMuchError."""

    def __init__(self, source: str) -> None:
        sandbox = Sandbox(Meter())
        tokens = sum(1 for _, kind, _ in sandbox.lex(source) if kind != "whitespace")
        if tokens > MOST_TEMPLATE_TOKENS:
            raise TooMuchError(f"it has {tokens:,} words and signs, more than {MOST_TEMPLATE_TOKENS:,}")
        tree = _Counting().visit(sandbox.parse(source))
        tree.set_environment(sandbox)
        self._code = sandbox.compile(tree)

    def run(self, names: Mapping[str, Any]) -> str:
        """The text that it writes, given what it may name. Raises TooMuchError, and whatever the program raises."""
        meter = Meter()
        meter.size(list(names.values()))
        sandbox = Sandbox(meter)
        template = jinja2.Template.from_code(sandbox, self._code, sandbox.make_globals(None))
        pieces, characters = [], 0
        for piece in template.generate(names):
            characters += len(piece)
            if characters > LARGEST_TEMPLATE_OUTPUT:
                raise TooMuchError(f"it writes more than {LARGEST_TEMPLATE_OUTPUT:,} characters")
            pieces.append(piece)
        return "".join(pieces)


class _Counting(NodeTransformer):
    """Loops, comparisons, what becomes text, and lists and mappings: all that no filter, call or operator makes."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self.generic_visit(node, *args, **kwargs)
        match node:
            case nodes.For():
                node.iter = _counted("passes", node.iter)
            case nodes.Compare():
                node.expr = _counted("compared", node.expr)
            case nodes.Test():
                node.node = _counted("compared", node.node)
            case nodes.Concat():
                node.nodes = [_counted("written", each) for each in node.nodes]
            case nodes.Output():
                node.nodes = [counted for each in node.nodes for counted in _output(each)]
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") | nodes.Getitem(arg=nodes.Slice()):
                return _counted("made", node)
        return node


def _output(node: nodes.Expr) -> list[nodes.Expr]:
    if isinstance(node, nodes.TemplateData):
        # Counted beside it: text of the template itself is never escaped, what is put in may be.
        return [_counted("passed", nodes.Const(len(node.data), lineno=node.lineno)), node]
    return [_counted("written", node)]


def _counted(name: str, value: nodes.Node) -> nodes.Expr:
    return nodes.Call(nodes.EnvironmentAttribute(f"meter_{name}"), [value], [], None, None, lineno=value.lineno)
