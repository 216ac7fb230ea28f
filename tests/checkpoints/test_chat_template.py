"""Chat templates, compared with transformers: their input, the choice among several, and refusals."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from types import MappingProxyType

import pytest
from transformers import PreTrainedTokenizerFast

from tests.checkpoints.tokenizers_of_text import byte_level, save
from transformer.checkpoints import ChatTemplate, load_tokenizer
from transformer.errors import ArgumentError, FileFormatError

HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"ü": {}}}}},
    {"type": "function", "function": {"name": "<b>", "parameters": {}}},
]
DOCUMENTS = [{"title": "A", "text": "a & b"}, {"title": "B", "text": None}]


class Role(str, enum.Enum):
    USER = "user"


CONVERSATIONS = [
    HELLO,
    [
        {"role": "system", "content": "Be <brief> & naïve."},
        {"role": "user", "content": " 東京? \n"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1.5, "b": None}}]},
        {"role": "tool", "content": "3", "name": None},
        {"role": "assistant", "content": "<think>so</think>\n\nIt is 3.", "reasoning": "so"},
        {"role": "user", "content": [{"type": "text", "text": "more"}, {"type": "text", "text": "still"}]},
    ],
    [{"role": Role.USER, "content": "x", "thinking": "t"}, {"role": "assistant", "reasoning_content": "r"}],
    [MappingProxyType({"role": "user", "content": ("a", True, None, -1, 2.5)})],
]

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{ tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seen='') %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- macro shown(content) %}
    {%- if content is string %}{{ content }}
    {%- elif content is iterable %}
        {%- for part in content %}{{ part.text if part is mapping else part }}{% endfor %}
    {%- else %}{{ '' }}{%- endif %}
{%- endmacro %}
{%- for message in messages %}
    {%- if loop.first or loop.previtem.role != message.role %}
        {{- '<|im_start|>' + message.role + '\\n' }}
    {%- endif %}
    {%- set content = shown(message.content) %}
    {%- if '</think>' in content %}
        {%- set ns.seen = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' ~ (call.arguments | tojson) ~ '}' }}
        {%- endfor %}
    {%- endif %}
    {{- content | trim }}{{ message.reasoning_content or '' }}
    {{- '<|im_end|>\\n' if not loop.last or add_generation_prompt }}
{%- endfor %}
{{- ns.last }}{{ ns.seen }}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}
"""

TEMPLATES = [
    CHATML,
    "{{ messages }}",
    "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ documents | tojson(separators=(',', ':')) }}",
    "{{ tools is none }}{{ tools is defined }}{{ documents is none }}{{ documents | length if documents else '' }}",
    "{{ {'b': 'é<', 'a': [1, none]} | tojson(ensure_ascii=True, sort_keys=True, indent=1) }}",
    "{% for m in messages %}{{ m.keys() | list }}{{ 'content' in m }}{{ m.get('name', 'none') }}{% endfor %}",
    "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.reasoning }};{% endfor %}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ loop.index }}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list }}",
    "{{ (messages | rejectattr('role', 'in', ['user']) | list | first).role }}{{ messages | groupby('role') }}",
    "{{ messages | map(attribute='role') | unique | sort(reverse=true) | list }}{{ messages[-1:] }}{{ messages[::2] }}",
    "{% set ns = namespace(l=[], n=0) %}{% for m in messages %}{% set ns.l = ns.l + [m.role] %}"
    "{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.l }}{{ ns.n * 2 ** 3 // 5 % 4 - -1 }}{{ (ns.l + ['x']) * 2 }}",
    "{% macro t(x, depth=0) %}{% if x is mapping %}{% for k, v in x.items() %}{{ '  ' * depth }}{{ k }}:"
    "{{ t(v, depth + 1) }}{% endfor %}{% else %}{{ x }}{% endif %}{% endmacro %}{% for m in messages %}{{ t(m) }}"
    "{% endfor %}{% for x in tools or [] %}{{ t(x) }}{% endfor %}",
    "{% macro wrap() %}<{{ caller() }}>{{ varargs }}{{ kwargs }}{% endmacro %}{% call wrap(1, a=2) %}in{% endcall %}",
    "{{ '%s and %5.2f%%' % ('a', 2) }}{{ '{:>5}|{a!r}'.format('x', a='y') }}{{ '%03d' | format(7) }}"
    "{{ 'a' ~ 1 ~ none }}",
    "{{ 'abc'.upper().replace('B', 'x').center(9, '*') }}{{ 'a,b'.split(',') }}{{ 'é'.encode('utf-8').decode() }}",
    "{{ 'a\nb' | indent(3, true) }}{{ 'a b c' | wordwrap(3) }}{{ 'abcdef' | truncate(4, true, '.') }}"
    "{{ 'x' | center(5) }}",
    "{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}{{ [1, 2] | sum }}"
    "{{ [[1], [2]] | sum(start=[]) }}",
    "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys([1]) }}{{ range(3) | list }}{{ cycler(1, 2).next() }}"
    "{{ joiner(',')() }}",
    "{{ '<a>' | e }}{{ '<a>' | safe ~ '<b>' }}{% autoescape true %}<p>{{ '<a>' ~ '<b>' }}"
    "{{ '<c>' }}{% endautoescape %}",
    "{% filter upper %}a{{ 'b' }}{% endfilter %}{% set x %}a{{ 1 }}b{% endset %}{{ x | length }}{{ x[1:] }}{{ x[-1] }}",
    "{% for a in [[1, [2]], [3, []]] recursive %}{{ a[0] if a is sequence else a }}{{ loop(a[1]) if a is sequence }}"
    "{{ loop.depth }}{% endfor %}",
    "{{ 1 if messages else 2 }}{{ messages[0].nothing }}{{ nothing }}{{ nothing is defined }}"
    "{{ messages | length > 1 }}",
    "{{ (1, 2) == (1, 2) }}{{ 3 > 2 >= 2 }}{{ 1 in [1] and 'a' not in 'b' }}{{ {'a': 1}['a'] }}"
    "{{ {'a': 1}.items() | list }}",
    "A\n{%- if true %}\n  B\n{% endif %}\n  {# note #}\n  {% if false %}x{% endif %}\nC\n\n",
    "{{ 1.5 | round }}{{ '7' | int + 1 }}{{ 3 | string * 2 }}{{ [3, 1] | sort | first }}{{ -3 | abs }}"
    "{{ 'A b' | title }}",
    "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ messages is iterable }}{{ messages is string }}"
    "{{ '' is not none }}",
    "{{ strftime_now('%%') }}{{ strftime_now('%Y') | length }}",
    "{% block a %}a{{ messages | length }}{% endblock %}{{ self.a() }}{% raw %}{{ x }}{% endraw %}",
    "{% with a = 1, b = [2] %}{{ a }}{{ b }}{% endwith %}{{ a }}{% for k, v in {'x': 1}|dictsort %}{{ k }}"
    "{{ v }}{% endfor %}",
    "{{ messages | reverse | map(attribute='role') | list }}{{ 'abc' | reverse }}{{ 'a' | default('b') }}"
    "{{ x | d('b') }}",
    "{{ [1,2] | random in [1, 2] }}{{ [none, 1] | select | list }}{{ {'a': [1]} | pprint }}{{ 'a<b>c' | striptags }}",
]

FAILING = [
    "{{ raise_exception('no: ' ~ messages[0].role) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ namespace(_a=1) }}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ messages[0].content.nothing.more }}",
    "{{ 1 / 0 }}",
    "{{ range(10 ** 9) }}",
    "{{ 'a' + 1 }}",
    "{{ '%d' % 'a' }}",
    "{{ {[]: 1} }}",
]


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")


def ours(template: str) -> ChatTemplate:
    return ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"}, "template.jinja")


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_a_conversation_is_written_as_transformers_writes_it(
    theirs: PreTrainedTokenizerFast, template: str, messages: list
) -> None:
    for options in (
        {},
        {"tools": TOOLS, "documents": DOCUMENTS},
        {"tools": [], "documents": []},
        {"add_generation_prompt": False},
    ):
        expected = options | {"add_generation_prompt": options.get("add_generation_prompt", True)}
        try:
            text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **expected)
        except Exception:
            with pytest.raises(ArgumentError, match=r"template\.jinja"):
                ours(template).render(messages, **options)
        else:
            assert ours(template).render(messages, **options) == text


@pytest.mark.parametrize("template", FAILING)
def test_what_fails_there_fails_here_and_names_the_file(theirs: PreTrainedTokenizerFast, template: str) -> None:
    try:
        pytest.fail(theirs.apply_chat_template(HELLO, chat_template=template, tokenize=False))
    except Exception as error:
        said = str(error)
    with pytest.raises(
        ArgumentError, match=r"^messages: expected .* template\.jinja accepts; the template raised"
    ) as refusal:
        ours(template).render(HELLO)
    assert "namespace" in template or said[:40] in str(refusal.value)


# --- several templates ----------------------------------------------------------------------------------------------

NAMED = {"default": "D{{ bos_token }}", "tool_use": "T{{ tools | length }}", "rag": "R"}


def as_list(folder: Path, templates: dict[str, str]) -> Path:
    return save(byte_level(), folder, chat_template=[{"name": k, "template": v} for k, v in templates.items()])


def as_object(folder: Path, templates: dict[str, str]) -> Path:
    return save(byte_level(), folder, chat_template=templates)


def as_files(folder: Path, templates: dict[str, str]) -> Path:
    save(byte_level(), folder, chat_template="older")
    for name, text in templates.items():
        file = folder / "additional_chat_templates" / f"{name}.jinja"
        if name == "default":
            file = folder / "chat_template.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("put", [as_list, as_object, as_files])
@pytest.mark.parametrize("names", [["default"], ["default", "tool_use", "rag"], ["rag", "tool_use"], ["tool_use"]])
@pytest.mark.parametrize("tools", [None, [], TOOLS])
def test_the_template_is_taken_that_transformers_takes(tmp_path: Path, put, names: list[str], tools) -> None:
    folder = put(tmp_path, {name: NAMED[name] for name in names})
    tokenizer, theirs = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        text = theirs.apply_chat_template(HELLO, tools=tools, tokenize=False)
    except ValueError:
        with pytest.raises(ArgumentError, match=r"none of the chat templates \[.*\] in .*(json|jinja) is the default"):
            tokenizer.encode_chat(HELLO, tools=tools)
    else:
        assert tokenizer.template.render(HELLO, tools=tools) == text
        assert tokenizer.encode_chat(HELLO, tools=tools) == theirs.encode(text, add_special_tokens=False)


def test_a_template_elsewhere_is_not_read(tmp_path: Path) -> None:
    folder = as_files(tmp_path / "model", {"default": "D", "rag": "R"})
    (tmp_path / "secret.jinja").write_text("secret")
    (folder / "additional_chat_templates" / "tool_use.jinja").symlink_to(tmp_path / "secret.jinja")
    with pytest.raises(FileFormatError, match=r"tool_use\.jinja: expected a file in its own folder"):
        load_tokenizer(folder)


def test_templates_in_their_own_folder_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = as_files(tmp_path, NAMED), []

    def fetched(name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: str | None) -> str:
        asked.append((name, revision, "additional_chat_templates/*.jinja" in allow_patterns, ignore_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert load_tokenizer("owner/name").template.render(HELLO, tools=TOOLS) == "T2"
    assert asked == [("owner/name", None, True, None)]


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{{ messages", "unexpected end"),
        (b"{% if x %}", "Unexpected end"),
        (b"\xff\xfe", "UTF-8"),
        (b"{{ 'x' | nothing }}", "No filter named 'nothing'"),
        (b"{{ " + b"(" * 5_000, "recursion"),
        (b"{{ " + b"[" * 3_000 + b"]" * 3_000 + b" }}", "recursion"),
        (b"{% for a in b %}" * 30 + b"{% endfor %}" * 30, "nested"),
        (b"{% if a %}" * 120 + b"{% endif %}" * 120, "indentation"),
        (b"{{ a" + b" + a" * 5_000 + b" }}", "recursion"),
        (b"{{ a }}" * 6_000, "it has [\\d,]+ tokens"),
        (b"x" * 140_000, "at most 64 chat templates of 131,072 characters"),
        (b"x" * 600_000, "at most 524,288 bytes"),
    ],
)
def test_what_is_no_template_names_its_file(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    folder = as_files(tmp_path, {"default": "D", "rag": "R"})
    (folder / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=rf"{name}.*{complaint}"):
        load_tokenizer(folder)


def test_the_number_of_templates_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"tokenizer_config\.json: expected at most 64 chat templates.*got 65"):
        load_tokenizer(as_object(tmp_path, {str(number): "x" for number in range(65)}))


# --- arguments ------------------------------------------------------------------------------------------------------


def endless() -> dict:
    message: dict = {"role": "user"}
    message["content"] = [message]
    return message


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"messages": []}, "messages: expected at least one message"),
        ({"messages": "Hello"}, "messages: expected a list of mappings"),
        ({"messages": None}, "messages: expected a list of mappings"),
        ({"messages": {"role": "user"}}, "messages: expected a list of mappings"),
        ({"messages": ["Hello"]}, "messages: expected a list of mappings"),
        ({"messages": [HELLO]}, "messages: expected a list of mappings"),
        ({"messages": [{"role": "user", "content": object()}]}, "messages: expected text, numbers.* got a object"),
        ({"messages": [{"role": "user", "content": b"x"}]}, "messages: expected text, numbers.* got a bytes"),
        ({"messages": [endless()]}, "messages: .* nested too deeply"),
        ({"tools": [print]}, "tools: expected JSON schemas.*describe it by a schema"),
        ({"tools": print}, "tools: expected a list of mappings"),
        ({"tools": ["add"]}, "tools: expected a list of mappings"),
        ({"tools": {"name": "add"}}, "tools: expected a list of mappings"),
        ({"documents": ["text"]}, "documents: expected a list of mappings"),
        ({"documents": [{"text": {1, 2}}]}, "documents: expected text, numbers"),
    ],
)
def test_other_arguments_are_refused(arguments: dict, complaint: str) -> None:
    arguments = {"messages": HELLO} | arguments
    with pytest.raises(ArgumentError, match=complaint):
        ours("{{ messages }}").render(arguments.pop("messages"), **arguments)


def test_names_of_special_tokens_do_not_hide_the_conversation(tmp_path: Path) -> None:
    hiding = {"messages": "a", "tools": "b", "self": "c", "names": "d", "environment": "e"}
    folder = save(
        byte_level(), tmp_path, extra_special_tokens=hiding, chat_template="{{ messages | length }}{{ names }}"
    )
    assert load_tokenizer(folder).template.render(HELLO) == "1d"


def test_what_the_caller_gives_stays_as_it_was() -> None:
    messages = json.loads(json.dumps(CONVERSATIONS[1]))
    ours(CHATML).render(messages, tools=TOOLS)
    assert messages == CONVERSATIONS[1]
