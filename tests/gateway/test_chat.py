"""Chat templates: the environment Hugging Face's are written for, and what a broken one does."""

import json
from datetime import datetime

import pytest

from disaggd.errors import InvalidRequest, ModelError
from disaggd.gateway.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "a < b"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES, variables)


def test_a_template_sees_messages_special_tokens_and_the_generation_prompt() -> None:
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    assert render(source) == "<s>[user] a < b>"


def test_blocks_leave_no_whitespace_behind() -> None:
    assert render("{% if true %}\n    {% for m in messages %}\nx\n    {% endfor %}\n{% endif %}") == "x\n"


def test_tojson_is_plain_json() -> None:
    assert json.loads(render("{{ messages | tojson(indent=2) }}")) == MESSAGES
    assert "<" in render("{{ messages | tojson }}")


def test_loop_controls_and_generation_blocks_are_known() -> None:
    assert render("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}") == "1"
    assert render("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}") == "user"


def test_strftime_now_is_the_date() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_the_requests_variables_reach_the_template() -> None:
    assert render("{{ enable_thinking }} {{ tools is none }}", enable_thinking=False) == "False True"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5].role }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ nothing.at.all }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ (1).__class__.__base__.__subclasses__() }}",
    ],
)
def test_a_template_that_refuses_or_oversteps_is_a_bad_request(source: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        render(source)
    assert refused.value.param == "messages"


def test_what_the_template_says_is_repeated() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_a_template_that_does_not_compile_cannot_be_served() -> None:
    with pytest.raises(ModelError, match="chat template is broken"):
        render("{% if %}")
