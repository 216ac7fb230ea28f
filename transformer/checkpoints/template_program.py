"""Compiled programs of chat templates, with calls of the meter for operations that Jinja's environment does not see."""

from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from .limits import MAX_OUTPUT_CHARACTERS, MAX_SOURCE_TOKENS
from .template_meter import Meter, TooMuchError
from .template_sandbox import Sandbox


class Program:
    """A compiled template. Raises TooMuchError, and the errors of Jinja and Python for an invalid source."""

    def __init__(self, source: str) -> None:
        sandbox = Sandbox(Meter())
        tokens = sum(1 for _, kind, _ in sandbox.lex(source) if kind != "whitespace")
        if tokens > MAX_SOURCE_TOKENS:
            raise TooMuchError(f"it has {tokens:,} tokens, more than {MAX_SOURCE_TOKENS:,}")
        tree = _Counting().visit(sandbox.parse(source))
        tree.set_environment(sandbox)
        self._code = sandbox.compile(tree)

    def run(self, names: Mapping[str, Any]) -> str:
        """The text that the template writes for these names. Raises TooMuchError, and the errors of the template."""
        meter = Meter()
        meter.size(list(names.values()))
        sandbox = Sandbox(meter)
        template = jinja2.Template.from_code(sandbox, self._code, sandbox.make_globals(None))
        pieces, characters = [], 0
        for piece in template.generate(names):
            characters += len(piece)
            if characters > MAX_OUTPUT_CHARACTERS:
                raise TooMuchError(f"it writes more than {MAX_OUTPUT_CHARACTERS:,} characters")
            pieces.append(piece)
        return "".join(pieces)


class _Counting(NodeTransformer):
    """Adds calls of the meter to loops, comparisons, output, and literals of lists and mappings."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self.generic_visit(node, *args, **kwargs)
        match node:
            case nodes.For():
                node.iter = _counted("count_loop", node.iter)
            case nodes.Compare():
                node.expr = _counted("count_compare", node.expr)
            case nodes.Test():
                node.node = _counted("count_compare", node.node)
            case nodes.Concat():
                node.nodes = [_counted("count_output", each) for each in node.nodes]
            case nodes.Output():
                node.nodes = [counted for each in node.nodes for counted in _output(each)]
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") | nodes.Getitem(arg=nodes.Slice()):
                return _counted("count_result", node)
        return node


def _output(node: nodes.Expr) -> list[nodes.Expr]:
    if isinstance(node, nodes.TemplateData):
        # Counted by a separate node, because a call in its place would be escaped as a value.
        return [_counted("count_literal", nodes.Const(len(node.data), lineno=node.lineno)), node]
    return [_counted("count_output", node)]


def _counted(name: str, value: nodes.Node) -> nodes.Expr:
    return nodes.Call(nodes.EnvironmentAttribute(f"meter_{name}"), [value], [], None, None, lineno=value.lineno)
