"""Templates that would use too much time or memory, each refused by the limit that it exceeds."""

from __future__ import annotations

import pytest

from transformer.checkpoints import ChatTemplate
from transformer.checkpoints.template_meter import Meter, TooMuchError
from transformer.errors import ArgumentError

METER = "transformer.checkpoints.template_meter."

STEPS = "more than [0-9,]+ steps"
CHARACTERS = "writes more than [0-9,]+ characters"
ONE = "one operation makes [0-9,]+ characters"
HOLDS = "list or mapping holds more than"
WIDE = "field is wider than"
GROWS = (
    "{%% set ns = namespace(s=%s) %%}{%% for i in range(60) %%}{%% set ns.s = %s %%}{%% endfor %%}{{ ns.s | length }}"
)


def doubled(start: str, step: str) -> str:
    return GROWS % (start, step)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        # one operation
        ("{{ 'a' * 10 ** 10 }}", ONE),
        ("{{ 10 ** 10 * 'a' }}", ONE),
        ("{% if false %}{{ 'a' * 10 ** 10 }}{% endif %}{{ ('a' * 10 ** 10) | length }}", ONE),
        ("{{ ([1] * 10 ** 9) | length }}", STEPS),
        ("{{ (10 ** 9 * (1, 2)) | length }}", STEPS),
        ("{{ 10 ** (10 ** 8) }}", "integer of more than"),
        ("{{ 2 ** 60000 * 2 ** 60000 }}", "integer of more than"),
        ("{{ (2).__pow__(10 ** 9) }}", "unsafe"),
        ("{{ ('f' * 10 ** 7) | int(base=16) % 7 }}", "integer of more than"),
        ("{{ (1).from_bytes('a'.encode() * 10 ** 6, 'big') }}", "integer of more than"),
        ("{{ 1.5 | round(10 ** 9, 'floor') }}", "decimals"),
        ("{{ ('é' * 10 ** 6).encode('punycode') }}", "encode knows"),
        ("{{ ('a' * 10 ** 6).encode().decode(encoding='punycode') }}", "decode knows"),
        ("{{ (1).to_bytes(10 ** 10, 'big') | length }}", ONE),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ '%1000000000d' % 1 }}", WIDE),
        ("{{ '%.1000000000f' % 1 }}", WIDE),
        ("{{ '%*d' % (10 ** 9, 1) }}", WIDE),
        ("{{ '%((a))1000000000d' % {'(a)': 1} }}", WIDE),
        ("{{ '%1000000000d' | format(1) }}", WIDE),
        ("{{ ('%(a)s' * 10 ** 5) % {'a': 'x' * 10 ** 6} }}", "formats a text of more than"),
        ("{{ ('%(a)s' * 1000) % {'a': 'x' * 10 ** 6} }}", ONE),
        ("{{ '{:1000000000}'.format(1) }}", WIDE),
        ("{{ '{:{w}}'.format(1, w=10 ** 9) }}", WIDE),
        ("{{ '{a:1000000000}'.format_map({'a': 1}) }}", WIDE),
        ("{{ '{:1000000000}'['format'](1) }}", WIDE),
        ("{{ ('{:1000000000}' | attr('format'))(1) }}", WIDE),
        ("{{ ('{:1000000000}' | safe).format(1) }}", WIDE),
        ("{{ ('{0}' * 10 ** 6).format('a' * 10 ** 6) }}", ONE),
        ("{{ 'a'.zfill(10 ** 9) }}", ONE),
        ("{{ 'a'.center(10 ** 9) }}", ONE),
        ("{{ 'a'.ljust(10 ** 9) }}", ONE),
        ("{{ 'a'.encode().rjust(10 ** 9) }}", ONE),
        ("{{ 'a' | center(10 ** 9) }}", ONE),
        ("{{ ['a'] | map('center', 10 ** 9) | list }}", ONE),
        ("{% filter center(10 ** 9) %}a{% endfilter %}", ONE),
        ("{{ ('\t' * 1000).expandtabs(10 ** 8) }}", ONE),
        ("{{ 'a\nb' | indent(10 ** 9) }}", ONE),
        ("{{ ('a\n' * 10 ** 6) | indent('x' * 1000) }}", ONE),
        ("{{ messages | tojson(indent=10 ** 9) }}", ONE),
        ("{{ messages | tojson(indent=' ' * 10 ** 7) }}", ONE),
        ("{{ (range(1000) | list) | tojson(separators=(',' * 10 ** 6, ':')) }}", ONE),
        ("{{ ('a' * 10 ** 6).replace('a', 'b' * 1000) }}", ONE),
        ("{{ ('a' * 10 ** 6) | replace('', 'b' * 1000) }}", ONE),
        ("{{ ('a' * 10 ** 6).translate({97: 'b' * 10 ** 6}) }}", ONE),
        ("{{ (['a'] * 10 ** 5) | join('b' * 10 ** 6) }}", ONE),
        ("{{ ('b' * 10 ** 6).join(['a'] * 10 ** 5) }}", ONE),
        ("{{ ('b' * 10 ** 6).join(range(1000) | map('string')) }}", ONE),
        ("{{ ('a' * 10 ** 7).strip('b' * 10 ** 6 + 'a') }}", ONE),
        ("{{ ('a' * 10 ** 7).rfind('b' + 'a' * 10 ** 6) }}", ONE),
        ("{{ ([[1] * 1000] * 1000) | sum(start=[]) }}", ONE),
        ("{{ [1] | batch(10 ** 9, 'x') | list }}", STEPS),
        ("{{ [1] | slice(10 ** 9) | list }}", STEPS),
        ("{{ ('a ' * 10 ** 6) | wordwrap(1) }}", "wordwrap is given more"),
        ("{{ 'a b' | wordwrap(1, wrapstring='x' * 10 ** 6) }}", "wordwrap is given more"),
        ("{{ ('http://a.b ' * 10 ** 5) | urlize }}", "urlize is given more"),
        ("{{ ('<!--x-->' * 10 ** 5) | striptags }}", "striptags is given more"),
        ("{{ (range(10 ** 4) | list) | pprint }}", "pprint is given more"),
        ("{{ {'a': '<' * 10 ** 6} | xmlattr }}", "xmlattr is given more"),
        ("{{ strftime_now('%Y' * 1000) }}", "date format"),
        ("{{ lipsum(n=10 ** 7) }}", "'lipsum' is undefined"),
        # one after the other
        (doubled("'aaaa'", "ns.s ~ ns.s"), CHARACTERS),
        (doubled("'aaaa'", "ns.s + ns.s"), CHARACTERS),
        (doubled("'aaaa'", "ns.s * 2"), CHARACTERS),
        (doubled("'aaaa'", "'%s%s' % (ns.s, ns.s)"), HOLDS),
        (doubled("'aaaa'", "'{0}{0}'.format(ns.s)"), HOLDS),
        (doubled("'aaaa'", "[ns.s, ns.s] | join"), HOLDS),
        (doubled("'ab' * 10 ** 6", "ns.s.replace('a', 'a' * 100)"), ONE),
        (doubled("[1]", "[ns.s, ns.s]"), HOLDS),
        (doubled("(1,)", "(ns.s, ns.s)"), HOLDS),
        (doubled("{}", "{'a': ns.s, 'b': ns.s}"), HOLDS),
        (doubled("{}", "dict(a=ns.s, b=ns.s)"), HOLDS),
        (doubled("[1]", "[ns.s] * 2"), HOLDS),
        (doubled("[1]", "[ns.s] | batch(2, ns.s) | list"), HOLDS),
        (doubled("[1]", "([ns.s] + [ns.s])[:]"), HOLDS),
        ("{% macro f(n) %}{{ f(n - 1, varargs, varargs) if n else varargs }}{% endmacro %}{{ f(60, 1) }}", HOLDS),
        ("{% macro f(n) %}{{ f(n - 1, varargs, varargs) if n else {varargs: 1} }}{% endmacro %}{{ f(60) }}", HOLDS),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nests more than"),
        ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "nests more than"),
        ("{% block a %}{{ self.a() }}{% endblock %}", "nests more than"),
        ("{% macro f() %}{{ caller() }}{% endmacro %}{% macro g() %}{% call f() %}{{ g() }}{% endcall %}{% endmacro %}"
         "{{ g() }}", "nests more than"),
    ],
)  # fmt: skip
def test_operations_are_looked_at_before(template: str, complaint: str) -> None:
    with pytest.raises(ArgumentError, match=rf"t\.jinja accepts; the template raised: .*{complaint}"):
        ChatTemplate(template, {}, "t.jinja").render([{"role": "user", "content": "Hello"}])


LOOP = "{%% for i in range(9999) %%}%s{%% endfor %%}"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (LOOP % (LOOP % ""), STEPS),
        ("{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}", STEPS),
        (LOOP % "{% set x = i + 1 %}", STEPS),
        (LOOP % "{% if i == 'a' %}{% endif %}", STEPS),
        (LOOP % "{% if i is eq 'a' %}{% endif %}", STEPS),
        (LOOP % "{% set x = messages[0] %}", STEPS),
        (LOOP % "{% set x = messages[:] %}", STEPS),
        (LOOP % "{% set x = [i, i] %}", STEPS),
        (LOOP % "{% set x = 'a,b,c'.split(',') %}", STEPS),
        (LOOP % "{% set x = i | string %}", STEPS),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", STEPS),
        ("{% for a in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 50 }}{% endfor %}", STEPS),
        ("{{ range(9999) | map('string') | map('upper') | list | length }}", STEPS),
        ("{{ range(9999) | groupby('real') | length }}", STEPS),
        ("{{ range(9999) | sort(attribute='real') | length }}", STEPS),
        ("{{ (range(9999) | list) * 9 }}", STEPS),
        (LOOP % ("a long text of the template " * 20), CHARACTERS),
        (LOOP % ("{{ '" + "a long text put in" * 20 + "' }}"), CHARACTERS),
        ("{% set x %}" + LOOP % ("a long text of a block" * 20) + "{% endset %}", CHARACTERS),
        ("{% macro m() %}" + "a long text of a macro" * 20 + "{% endmacro %}" + LOOP % "{% set x = m() %}", CHARACTERS),
        (LOOP % "{% set x %}{{ messages[0].items() }}{{ messages[0].values() }}{% endset %}", CHARACTERS),
        (LOOP % "{% set x = messages[0].items() ~ '' %}", CHARACTERS),
        (LOOP % ("{% generation %}" + "a long answer" * 20 + "{% endgeneration %}"), CHARACTERS),
    ],
)
def test_steps_and_characters_are_counted(monkeypatch: pytest.MonkeyPatch, template: str, complaint: str) -> None:
    monkeypatch.setattr(METER + "MAX_RENDER_STEPS", 15_000 if complaint == STEPS else 10**6)
    monkeypatch.setattr(METER + "MAX_RENDER_CHARACTERS", 100_000)
    with pytest.raises(ArgumentError, match=rf"t\.jinja accepts; the template raised: .*{complaint}"):
        ChatTemplate(template, {}, "t.jinja").render([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize("template", ["{{ 1 }}", "{% for i in [1] %}{% endfor %}", "{{ messages | length }}"])
def test_seconds_are_bounded_too(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    program = ChatTemplate(template, {}, "t.jinja")
    monkeypatch.setattr(METER + "MAX_RENDER_SECONDS", -1.0)
    with pytest.raises(ArgumentError, match=r"t\.jinja accepts; the template raised: .*seconds"):
        program.render([{"role": "user", "content": "Hello"}])


def test_what_is_written_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformer.checkpoints.template_program.MAX_OUTPUT_CHARACTERS", 10)
    template = ChatTemplate("{{ messages[0].content }}", {}, "t.jinja")
    assert template.render([{"role": "user", "content": "a" * 10}]) == "a" * 10
    with pytest.raises(ArgumentError, match="writes more than 10 characters"):
        template.render([{"role": "user", "content": "a" * 11}])


def test_a_long_conversation_is_within_the_bounds() -> None:
    template = (
        "{% set ns = namespace(l=[], n=0) %}{% for m in messages %}{% set ns.l = ns.l + [m] %}"
        "{% if m.role == 'user' and messages[loop.index0:] | length %}{% set ns.n = ns.n + 1 %}{% endif %}"
        "<|{{ m.role }}|>{{ m.content.replace('a', 'bb') | trim }}{{ m | tojson }}{% endfor %}{{ ns.l | length }}"
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": "a text " * 300} for i in range(300)]
    assert ChatTemplate(template, {}, "t.jinja").render(messages).endswith("300")


def test_each_run_has_its_own_bounds() -> None:
    template = ChatTemplate("{{ ('a' * 10 ** 7) | length }}", {}, "t.jinja")
    for _ in range(20):
        assert template.render([{"role": "user"}]) == "10000000"


@pytest.mark.parametrize(
    ("value", "size"),
    [("abc", 3), ([], 2), (["ab", 1], 9), ({"a": [1]}, 10), (((),), 6), (None, 24), (True, 1), (-(2**300), 101)],
)
def test_sizes_count_what_is_within(value: object, size: int) -> None:
    meter = Meter()
    assert meter.size(value)[0] == meter.size(value)[0] == size


def test_sizes_of_values_that_are_no_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METER + "MAX_KEPT_ELEMENTS", 10)
    meter = Meter()
    assert [meter.size(["a" * length])[0] for length in range(100)] == [4 + length for length in range(100)]


def test_a_shared_list_is_counted_at_each_place() -> None:
    value: list = ["a" * 100]
    for _ in range(40):
        value = [value, value]
    with pytest.raises(TooMuchError):
        Meter().size(value)
