"""What a chat template makes in memory has a limit, whichever operation makes it; real templates never meet it."""

import resource

import jinja2.sandbox
import pytest
from stock_templates import FAMILIES, FOLDERS, stock_tokenizer
from transformers.utils import chat_template_utils

from fledge.data.rejects import Reject
from fledge.data.rendering import Renderer
from fledge.data.template_memory import BUDGET, spend, within_budget

GROW = (
    "{% set ns = namespace(x='abcdefgh' * 100, l=[]) %}{% for i in range(90) %}{% set ns.x = EXPRESSION %}{% endfor %}"
)
NEST = GROW.replace("EXPRESSION", "[ns.x, ns.x]")
LONG = "{% set x = 'x' * 30000000 %}"
ATTACKS = {
    "a text": "{{ 'a' * 99999999999 }}",
    "a text, turned round": "{{ 99999999999 * 'a' }}",
    "a list": "{{ ([0] * 99999999999)|length }}",
    "added to itself": GROW.replace("EXPRESSION", "ns.x + ns.x"),
    "joined with itself": GROW.replace("EXPRESSION", "ns.x ~ ns.x"),
    "a block": GROW.replace("{% set ns.x = EXPRESSION", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y"),
    "a macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + GROW.replace("EXPRESSION", "m(ns.x)"),
    "escaped": "{% autoescape true %}" + GROW.replace("EXPRESSION", "ns.x ~ ns.x") + "{% endautoescape %}",
    "lists": GROW.replace("'abcdefgh' * 100", "[0]").replace("EXPRESSION", "ns.x + ns.x"),
    "the join filter": GROW.replace("EXPRESSION", "[ns.x, ns.x]|join"),
    "the join method": GROW.replace("EXPRESSION", "'-'.join([ns.x, ns.x])"),
    "what a join puts between": LONG + "{{ (range(9999)|list)|join(x) }}",
    "the replace filter": GROW.replace("EXPRESSION", "ns.x|replace('a', ns.x)"),
    "the replace method": GROW.replace("EXPRESSION", "ns.x.replace('a', ns.x)"),
    "an old format": GROW.replace("EXPRESSION", "'%s%s' % (ns.x, ns.x)"),
    "the format filter": GROW.replace("EXPRESSION", "'%s%s'|format(ns.x, ns.x)"),
    "the format method": GROW.replace("EXPRESSION", "'{0}{0}'.format(ns.x)"),
    "sums of lists": GROW.replace("'abcdefgh' * 100", "[0]").replace("EXPRESSION", "[ns.x, ns.x]|sum(start=[])"),
    "an old width": "{{ '%99999999999d' % 1 }}",
    "an old width of a name": "{{ '%(a)99999999999d' % {'a': 1} }}",
    "an old width, computed": "{{ '%*d' % (999999999, 1) }}",
    "a width": "{{ '{:>9999999999}'.format('x') }}",
    "a width, computed": "{{ '{:{}}'.format(1, 9999999999) }}",
    "center": "{{ 'x'|center(9999999999) }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "zfill": "{{ 'x'.zfill(9999999999) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(90000) }}",
    "an indent": "{{ ('\n' * 1000000)|indent(90000) }}",
    "an indent of text": LONG + "{{ ('\n' * 1000000)|indent(x) }}",
    "an indent of JSON": "{{ (range(99999)|list)|tojson(indent=90000) }}",
    "a fill": "{{ ([0]|batch(9999999999, 'x')|list)|length }}",
    "digits": "{{ 1.5|round(999999999) }}",
    "a product": "{% set ns = namespace(x=9) %}{% for i in range(90) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "translate": LONG + "{{ 'aaa'.translate({97: x}) }}",
    "nested, printed": NEST + "{{ ns.x }}",
    "nested, as text": NEST + "{{ (ns.x|string)|length }}",
    "nested, as JSON": NEST + "{{ ns.x|tojson }}",
    "nested, joined": NEST + "{{ ns.x ~ '' }}",
    "nested, formatted": NEST + "{{ '%s' % [ns.x] }}",
    "a namespace": NEST + "{{ ns }}",
    "nested, compared": NEST + "{% set a = ns.x %}" + NEST + "{{ a == ns.x }}",
    "nested, compared by a test": NEST + "{% set a = ns.x %}" + NEST + "{{ a is eq(ns.x) }}",
    "nested, looked for": NEST + "{% set a = ns.x %}" + NEST + "{{ a in [1, ns.x] }}",
    "nested, found": NEST + "{% set a = ns.x %}" + NEST + "{{ [ns.x].index(a) }}",
    "nested, sorted": NEST + "{% set a = ns.x %}" + NEST + "{{ [a, ns.x]|sort }}",
    "copies": LONG + GROW.replace("ns.x = EXPRESSION", "ns.l = ns.l + [x[1:]]"),
    "copies by a method": LONG + GROW.replace("ns.x = EXPRESSION", "ns.l = ns.l + [x.upper()]"),
    "letters": LONG.replace("x'", "字'") + "{{ (x|list)|length }}",
    "words": LONG.replace("x'", "x '") + "{{ x.split()|length }}",
}  # fmt: skip
HARMLESS = {
    "{{ 'ab' * 3 }}{{ 2 * 'c' }}{{ 2 * 3 }}{{ (1 + 2) * 1.5 }}": "abababcc64.5",
    "{{ [1] + [2] }}{{ 'a' ~ 1 ~ none }}{{ 7 % 4 }}{{ '%s-%5.2f' % ('x', 1.5) }}": "[1, 2]a1None3x- 1.50",
    "{{ '{}: {:>4} {a[0]}'.format(1, 'x', a=[2]) }}{{ 'a{x}'.format_map({'x': 1}) }}": "1:    x 2a1",
    "{{ [1, 'b']|join(', ') }}{{ '-'.join(['a', 'b']) }}{{ 'aXa'.replace('a', 'bb') }}": "1, ba-bbbXbb",
    "{{ 'aXa'|replace('a', 'b', 1) }}{{ [[1], [2]]|sum(start=[]) }}{{ [1, 2]|sum }}": "bXa[1, 2]3",
    "{{ {'a': [1, 'x']}|tojson(indent=1) }}": '{\n "a": [\n  1,\n  "x"\n ]\n}',
    "{{ 1 < 2 <= 2 != 3 }}{{ 'a' in 'ab' }}{{ [1] == [1] }}{{ 'x' not in ['y'] }}{{ [1, 2].index(2) }}":
        "TrueTrueTrueTrue1",
    "{{ [3, 1]|min }}{{ 1 is eq(1) }}{{ [1, 2, 1]|unique|list }}{{ [1, 2]|select('gt', 1)|list }}": "1True[1, 2][2]",
    "{{ 'abc'[1:] }}{{ [1, 2, 3][::-1] }}{{ 'abc'[:2] }}{{ 'abc'[0] }}{{ 'x'|center(3) }}|": "bc[3, 2, 1]aba x |",
    "{{ ' a b '.strip().split(' ') }}{{ 'a\nb'|indent(2) }}{{ [3, 1]|sort }}{{ 'ba'|list }}":
        "['a', 'b']a\n  b[1, 3]['b', 'a']",
    "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') ~ m('b') }}{% set y %}{{ 1 }}{% endset %}{{ y }}": "<a><b>1",
    "{% set x = '>' %}{% autoescape true %}{{ '<' ~ (x|safe) }}{% endautoescape %}{{ '<' ~ x }}": "&lt;><>",
    "{{ (messages|map(attribute='role'))|join }}{{ messages[0]['content'] }}{{ messages|length }}": "userHi1",
}  # fmt: skip
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def render(make_tokenizer):
    return lambda text, messages=HI: Renderer(make_tokenizer(), text, "made").render(messages)


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_operation_takes_all_memory(attack, render):
    """`{{ "a" * 10**10 }}` took what there was: the limit on CPU time works between operations, not inside one. (What
    grows by many operations may meet that limit first, on a slow machine.)"""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reasons = "makes more than|compares values|no chat template needs|width|digits|stopped after . s of CPU"
    with pytest.raises(Reject, match=f"template 'made': .*({reasons})"):
        render(ATTACKS[attack])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 900 << 10  # KiB


@pytest.mark.parametrize("text", HARMLESS)
def test_small_operations_are_jinjas(text, render, monkeypatch):
    """The negative control, and that counting changes no result."""
    assert render(text) == HARMLESS[text]
    monkeypatch.setattr(
        chat_template_utils, "ImmutableSandboxedEnvironment", jinja2.sandbox.ImmutableSandboxedEnvironment
    )
    assert chat_template_utils._cached_compile_jinja_template(text).render(messages=HI) == HARMLESS[text]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_long_conversation_meets_no_limit(name, make_tokenizer):
    """Two million characters, as in the longest contexts: no stock template makes more than it may."""
    tokenizer = stock_tokenizer(name, make_tokenizer)
    messages = [{"role": role, "content": "word " * 5000} for _ in range(40) for role in ("user", "assistant")]
    text = (FOLDERS[0] / f"{name}.jinja").read_text("utf-8") if (FOLDERS[0] / f"{name}.jinja").is_file() else None
    assert Renderer(tokenizer, text or tokenizer.chat_template, name).render(messages).count("word ") > 40 * 4999


def test_every_rendering_has_a_budget_of_its_own(render):
    for _ in range(4):
        assert len(render("{{ 'x' * 9000000 }}")) == 9_000_000
    with within_budget():
        spend(BUDGET)
        with pytest.raises(ValueError, match="makes more than"):
            spend(1)
    spend(10 * BUDGET)  # nobody renders
