"""A template that loops is stopped, in every thread and process, and its row is rejected by name."""

import multiprocessing
import threading
import time

import pytest

from fledge.data import render_limits
from fledge.data.conversations import Conversation
from fledge.data.rejects import Reject
from fledge.data.render_limits import line_of_power, within_cpu_time
from fledge.data.tokenize import ChatTemplate

PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ON_DEMAND = "{% if messages[0].content == 'loop' %}" + NESTED + "{% endif %}" + PLAIN
LONG = "{% if messages[0].content == 'loop' %}{% for a in range(2000) %}{{ 'x' * 9999 }}{% endfor %}{% endif %}" + PLAIN


@pytest.fixture
def template(make_tokenizer, monkeypatch):
    monkeypatch.setattr(render_limits, "RENDER_CPU_S", 0.5)
    return lambda text: ChatTemplate(make_tokenizer(("<|im_start|>", "<|im_end|>"), text, eos="<|im_end|>"))


def talk(question: str) -> Conversation:
    return Conversation("c", ({"role": "user", "content": question}, {"role": "assistant", "content": "yes"}))


def endless() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("text", "reason"), [(ON_DEMAND, "'own'.*stopped after 0.5 s"), (LONG, "'own'.*rendered 19,998,")]
)
def test_a_row_on_which_the_template_loops_is_rejected(template, text, reason):
    """Nested loops over ranges run for hours: Jinja's sandbox limits each range, not what is inside."""
    made = template(text)
    results = made.encode_many([talk("fine"), talk("loop"), talk("fine")])
    assert isinstance(results[1], Reject)
    with pytest.raises(Reject, match=reason):
        raise results[1]
    assert results[0] and not isinstance(results[0], Reject) and str(results[0]) == str(results[2])


def test_a_template_with_generation_marks_is_stopped_too(template):
    marked = PLAIN.replace("{{ message.content }}", "{% generation %}{{ message.content }}{% endgeneration %}")
    looping = "{% if messages[0].content == 'loop' %}" + NESTED + "{% endif %}" + marked
    with pytest.raises(Reject, match="stopped"):
        template(looping).samples(talk("loop"))
    assert template(looping).samples(talk("fine"))


def outcome() -> str:
    try:
        within_cpu_time(endless, 0.3)
    except TimeoutError:
        return "stopped"
    return "went on"


def test_threads_are_stopped_alone():
    found = []
    threads = [threading.Thread(target=lambda: found.append(outcome())) for _ in range(3)]
    waiting = threading.Thread(target=lambda: found.append(within_cpu_time(lambda: time.sleep(3) or "slept", 0.3)))
    for thread in (*threads, waiting):
        thread.start()
    for thread in (*threads, waiting):
        thread.join(30)
    assert sorted(found) == ["slept"] + ["stopped"] * 3  # sleeping takes no CPU time: a busy machine rejects no row


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_workers_are_stopped_too():
    assert outcome() == "stopped"  # the parent's watching thread exists, and does not survive the fork
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap_async(outcome, [(), ()]).get(60) == ["stopped"] * 2


def test_results_and_errors_pass_through():
    assert within_cpu_time(lambda: 7, 9.0) == 7
    with pytest.raises(KeyError):
        within_cpu_time(lambda: {}["x"], 9.0)
    assert not render_limits._watched


def test_work_that_ends_as_it_is_stopped_leaves_no_exception_behind():
    """The exception is sent, then the work ends: it must not arrive in what the thread does next."""
    for _ in range(20):
        try:
            within_cpu_time(lambda: [None for _ in range(10**6)], 0.02)
        except TimeoutError:
            pass
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        pass
    assert not render_limits._watched


@pytest.mark.parametrize(("text", "line"), [("{{ 9**9**9 }}", 1), ("a\n{% set x = 2 ** 3 %}", 2)])
def test_the_power_operator_is_refused_before_jinja_computes_it(template, text, line):
    with pytest.raises(Reject, match=rf"'own': line {line} uses the operator `\*\*`"):
        template(text + PLAIN).samples(talk("fine"))


@pytest.mark.parametrize("text", ["{{ 9 * 9 }} ** bold **", "{# 9**9 #}", "{{ '**' }}", "{{ broken"])
def test_two_stars_elsewhere_are_no_operator(text):
    assert line_of_power(text) is None
